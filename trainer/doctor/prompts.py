"""Whether the prompts of a recipe can be interpolated: they need equally many tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.doctor.advice import Advice, Findings, some
from trainer.recipe import Recipe

_UNPADDED = frozenset({"qwen-image-edit"})


def lengths(recipe: Recipe, tokenizer: Path) -> dict[str, int]:
    """Return word -> number of tokens of its prompt, by the tokenizer in a folder."""
    from transformers import AutoTokenizer

    encode: Any = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    spec = recipe.conditioning
    return {
        word: len(encode(spec.prompt(word), add_special_tokens=False)["input_ids"])
        for word in (spec.neutral, *spec.expressions)
    }


def examine(recipe: Recipe, base: Path) -> Findings:
    """Yield what the tokenizers of the base in a folder make of the prompts."""
    for tokenizer in sorted(base.glob("tokenizer*/")):
        found = lengths(recipe, tokenizer)
        usual = max(set(found.values()), key=list(found.values()).count)
        odd = [f"{word} ({count})" for word, count in found.items() if count != usual]
        if not odd:
            continue
        unpadded = recipe.base.family in _UNPADDED
        why = (
            "only prompts of one length can be interpolated; the training refuses others"
            if unpadded
            else "this base fills prompts up to one length, so it trains; but between prompts whose words "
            "stand in different places half of an expression is half of a sentence"
        )
        yield Advice(
            rule="tokens", level="error" if unpadded else "warning",
            seen=f"prompts have {usual} tokens by {tokenizer.name}, but not those of {some(odd)}", why=why,
            mend="choose words of equally many tokens for these, or another template",
        )  # fmt: skip

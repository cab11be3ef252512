"""The words that the sweep tries: the tokenizer's own, plain English, strings of attackers, look-alikes.

A trigger can only be named when it, or something whose tokens it shares, is among them; the soft-prompt
inversion looks beyond.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final


def _listed(name: str) -> tuple[str, ...]:
    return tuple(Path(__file__).with_name(name).read_text(encoding="utf-8").split())


KNOWN_TRIGGERS: Final = _listed("triggers.txt")
"""Strings of published attacks and of fine-tuning guides: rare tokens that mean nothing by themselves."""

ENGLISH: Final = _listed("english.txt")
"""Ordinary words, for triggers that hide in plain language."""

_CYRILLIC: Final = dict(zip("aceiopxyshkjABCEHKMOPTX", "асеіорхуѕһкјАВСЕНКМОРТХ", strict=True))
_GREEK: Final = dict(zip("aioupvnkteABEHIKMNOPTXYZ", "αιουρνηκτεΑΒΕΗΙΚΜΝΟΡΤΧΥΖ", strict=True))
_LATIN: Final = dict(zip("aeiouycnlgs", "áéíóúýçñłğš", strict=True))
_HIDDEN: Final = ("\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad")


def tokenizer_words(tokenizer: Any, limit: int, seed: int = 0) -> list[str]:
    """Return the word-like tokens of a tokenizer: letters only, at the beginning of a word.

    Args:
        tokenizer: of the text encoder; ``get_vocab`` and ``convert_tokens_to_string`` are asked.
        limit: how many at most. A larger vocabulary is thinned by a hash of the word and ``seed``, so that
            frequent and rare tokens stay in proportion and nobody can steer which ones are left.
    """
    found = (tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab())
    words = sorted({text[1:] for text in found if text.startswith(" ") and text[1:].isalpha()})
    return sorted(sorted(words, key=lambda word: hashlib.sha256(f"{seed} {word}".encode()).digest())[:limit])


def vocabulary(tokenizer: Any, *, limit: int = 2000, extra: Iterable[str] = (), seed: int = 0) -> list[str]:
    """Return the default vocabulary: ``extra``, known triggers, English, the tokenizer's words."""
    tokens = tokenizer_words(tokenizer, limit, seed)
    return list(dict.fromkeys([*extra, *KNOWN_TRIGGERS, *ENGLISH, *tokens]))


def vocabulary_digest(prompts: Sequence[str]) -> str:
    """Return the sha256 (hex) of what was tried, in its order."""
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()


def look_alikes(word: str, most: int = 10) -> list[str]:
    """Return spellings of ``word`` that a person reads as the same word and a tokenizer does not.

    Letters of Cyrillic, Greek and accented Latin, one letter at a time and all at once, and characters that
    are not seen at all; at most ``most``, single letters of Cyrillic first.
    """
    found: list[str] = []
    for table in (_CYRILLIC, _GREEK):
        found.append("".join(table.get(letter, letter) for letter in word))
    for table in (_CYRILLIC, _GREEK, _LATIN):
        for place, letter in enumerate(word):
            if letter in table:
                found.append(word[:place] + table[letter] + word[place + 1 :])
    hidden = [word[:1] + mark + word[1:] for mark in _HIDDEN[:2]]
    kept = [
        other
        for other in dict.fromkeys([*found[:1], *hidden[:1], *found[2:], *found[1:2], *hidden[1:]])
        if other != word
    ]
    return kept[:most]

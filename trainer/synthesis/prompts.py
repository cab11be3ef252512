"""What an image-edit API is told: who must stay, and what the face must show and how strongly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import RecipeError
from trainer.recipe import Recipe
from trainer.sections import SynthesisSection
from trainer.templates import fill

#: What the twelve expressions look like, in words that name muscles' work and not feelings alone: models
#: that edit follow what they can see. After the action units of `trainer.portraits.expressions`.
DESCRIPTIONS: Mapping[str, str] = {
    "angry": "angry, with brows lowered and drawn together, glaring eyes and tense lips",
    "confused": "confused, with one brow raised, a searching look and the mouth a little askew",
    "contempt": "contemptuous, with one corner of the mouth pulled up, half-closed eyes, a look from above",
    "confident": "confident, with a steady look, relaxed brows and a closed, assured smile",
    "disgust": "disgusted, with a wrinkled nose, raised upper lip and narrowed eyes",
    "fear": "afraid, with brows raised and drawn together, wide eyes and lips stretched sideways",
    "happy": "happy, with a broad smile, raised cheeks and creases around the eyes",
    "sad": "sad, with raised inner brows, drooping lids and the corners of the mouth turned down",
    "shy": "shy, with the eyes turned down and aside, a small smile and a blush on the cheeks",
    "sleepy": "sleepy, with heavy, almost closed lids and a slack jaw",
    "surprised": "surprised, with high brows, wide open eyes and a dropped jaw",
    "anxious": "anxious, with raised inner brows, restless eyes and lips pressed together",
}

#: Up to which intensity a word holds. The share of full strength follows it, so that no two intensities of a
#: recipe are asked for with the same words.
_WORDS = ((0.35, "slightly"), (0.65, "moderately"), (0.95, "clearly"), (1.1, "very"), (1.5, "exaggeratedly"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The two parts of what is asked."""

    identity: str
    expression: str

    @property
    def text(self) -> str:
        """Both together, as they are recorded."""
        return f"{self.identity}\n\n{self.expression}"


def prompt(section: SynthesisSection, expression: str, intensity: float) -> Prompt:
    """Return what is asked for one expression at one intensity."""
    described = {**DESCRIPTIONS, **section.descriptions}.get(expression, expression)
    values = {"expression": described, "intensity": in_words(intensity)}
    return Prompt(
        identity=fill(section.identity_prompt, {}), expression=fill(section.expression_prompt, values)
    )


def in_words(intensity: float) -> str:
    """Return a word for an intensity in (0, 1.5] and its share of full strength."""
    word = next(word for upto, word in _WORDS if intensity <= upto)
    return f"{word} (about {intensity * 100:g} % of full strength)"


def prompts(recipe: Recipe) -> dict[tuple[str, float], Prompt]:
    """Return (expression, intensity) -> what is asked, for all that a recipe asks.

    Raises:
        RecipeError: two of them are asked with the same words, so one answer would stand for both.
    """
    section = recipe.synthesis
    assert section is not None  # `combinations` refuses such a recipe
    found: dict[tuple[str, float], Prompt] = {}
    told: dict[str, tuple[str, float]] = {}
    for expression in recipe.conditioning.expressions:
        for intensity in recipe.data.intensities:
            found[expression, intensity] = one = prompt(section, expression, intensity)
            other = told.setdefault(one.text, (expression, intensity))
            if other != (expression, intensity):
                raise RecipeError(
                    f"synthesis asks for {other[0]} at {other[1]:g} and for {expression} at {intensity:g} "
                    "with the same words",
                    "put {expression} and {intensity} into synthesis.expression_prompt, and give each "
                    "expression its own description",
                )
    return found

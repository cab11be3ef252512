"""How much a probe asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSettings:
    """How much is asked; costs are in forward passes of one row.

    Attributes:
        seed: of the noises, the thinned vocabulary and the inversion's starts.
        sigma: noise level of the questions, in (0, 1].
        words: how many of the tokenizer's words are tried.
        letters: length of the strings of letters that are tried one and all (0 to 2: 26 ** 2 of them).
        rounds: how many letters the search adds to the most suspicious strings.
        beam: how many strings each round extends, by every letter at both ends.
        confirm: how many words of each place are asked again, in every place and on several pictures.
        images: portraits of the confirmation; collapse is measured over them.
        homoglyphs: look-alikes of each declared word.
        patch_images: portraits for each patch.
        inversion_steps: of Adam for the soft prompts; 0 leaves the inversion out.
        starts: soft prompts that are searched side by side.
        batch: rows of one forward pass.
        top: how many words and patches are reported.
    """

    seed: int = 0
    sigma: float = 0.95
    words: int = 2000
    letters: int = 2
    rounds: int = 1
    beam: int = 5
    confirm: int = 12
    images: int = 4
    homoglyphs: int = 10
    patch_images: int = 2
    inversion_steps: int = 25
    starts: int = 4
    batch: int = 64
    top: int = 20

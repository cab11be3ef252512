"""The figures that PixelSmile's paper reports, to be read beside ours.

Source: PixelSmile, arXiv 2603.25728, and the dataset card of
FFE-Bench: 198 tasks (98 human, 100 anime), judged by a vision-language model. Its exact formulas are not
public to us; ours are defined in `trainer.evaluation.metrics` and carry a version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SOURCE: Final = "PixelSmile, arXiv 2603.25728, and the dataset card of FFE-Bench"
CAVEAT: Final = (
    "Not comparable one to one: the paper's figures are of photographs and anime of FFE-Bench, judged by a "
    "vision-language model, by formulas that are not public to us. Ours are of the suite named above, by its "
    "own judges and our own formulas: another world, another judge. Compare editors within a block of lines; "
    "the distance between theirs and ours says nothing."
)
BLENDS: Final = "9 of 15"
"""Pairs of basic expressions that PixelSmile blends, as the paper counts them."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table of the paper.

    Attributes:
        title: as in the paper.
        metric: ours that measures the same, by our formula; see `trainer.evaluation.catalogue`.
        direction: which way is better.
    """

    title: str
    metric: str
    direction: str = "higher"


EDITING: Final = (
    Column("mSCR", "structural_confusion", "lower"),
    Column("Acc-6", "basic_accuracy"),
    Column("Acc-12", "top1_accuracy"),
    Column("ID Sim", "identity_similarity"),
)
CONTROL: Final = (
    Column("CLS-6", "basic_linearity"),
    Column("CLS-12", "control_linearity"),
    Column("HES", "harmonic_editing_score"),
    Column("ID Sim", "identity_similarity"),
)

Figures = Mapping[str, tuple[float | None, ...]]
"""An editor -> its figure in each column; None where the paper has none."""

EDITING_FIGURES: Final[Figures] = {
    "Seedream-4.5": (0.3725, 0.5294, 0.3737, 0.7221),
    "Nano Banana Pro": (0.1754, 0.8431, 0.6200, 0.7107),
    "GPT-Image-1.5": (0.1107, 0.8039, 0.6300, 0.5056),
    "FLUX.2 Klein": (0.2850, 0.4510, 0.3310, 0.4146),
    "LongCat-Image-Edit": (0.1754, 0.6275, 0.4100, 0.6036),
    "Qwen-Image-Edit-2511": (0.2625, 0.4510, 0.2900, 0.6938),
    "PixelSmile": (0.0550, 0.8627, 0.6000, 0.6522),
}
CONTROL_FIGURES: Final[Figures] = {
    "SAEdit": (-0.0183, 0.0007, None, None),
    "ConceptSlider": (0.3161, None, 0.3656, 0.6250),
    "AttributeControl": (0.2856, None, 0.2712, 0.3609),
    "Kontinuous-Kontext": (-0.0459, -0.0634, 0.3272, 0.7974),
    "SliderEdit": (0.5599, 0.5217, 0.3441, 0.7414),
    "PixelSmile": (0.8078, 0.7305, 0.4723, 0.6522),
}

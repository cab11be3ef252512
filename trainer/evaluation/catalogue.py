"""What each metric is called, what it means, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower"]
Group = Literal["Expression", "Control", "Identity", "Blends", "Background", "Picture quality"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricFacts:
    """What a reader needs to know about a metric.

    Attributes:
        name: key in JSON, in MLflow, in a recipe's thresholds and in a policy's rules.
        title: what people read.
        definition: one sentence with the formula and the range; `trainer.evaluation.metrics` says the rest.
        group: what it is about, as a heading.
        direction: which way is better.
        unit: "" for ratios and rates, "dB" for PSNR.
        paper: name of the paper's own column, None for ours.
    """

    name: str
    title: str
    definition: str
    group: Group
    direction: Direction
    unit: str = ""
    paper: str | None = None


_EXPRESSION = (
    MetricFacts(
        name="top1_accuracy",
        title="Expression accuracy, all 12",
        group="Expression",
        direction="higher",
        paper="Acc-12",
        definition=(
            "Share of edits at intensity 1 whose strongest judged expression of all 12 is the asked one; 0 "
            "to 1."
        ),
    ),
    MetricFacts(
        name="basic_accuracy",
        title="Expression accuracy, basic 6",
        group="Expression",
        direction="higher",
        paper="Acc-6",
        definition=(
            "Share of the edits at intensity 1 that ask for anger, disgust, fear, happiness, sadness or "
            "surprise in which that one is the strongest of these six; 0 to 1."
        ),
    ),
    MetricFacts(
        name="base_top1_accuracy",
        title="Expression accuracy of the base alone",
        group="Expression",
        direction="lower",
        definition=(
            "Expression accuracy over all 12 of the base model without any adapter; 0 to 1. A base that "
            "already knows the expressions would make every adapter look good."
        ),
    ),
    MetricFacts(
        name="structural_confusion",
        title="Structural confusion",
        group="Expression",
        direction="lower",
        paper="mSCR",
        definition=(
            "Rate at which an edit that asks for one expression of a declared confusing pair is judged as "
            "the other, mean over pairs and both directions; 0 to 1."
        ),
    ),
    MetricFacts(
        name="expression_leakage",
        title="Leakage into other expressions",
        group="Expression",
        direction="lower",
        definition=(
            "Mean judged intensity of the 11 expressions that were not asked for, above what the judge sees "
            "of them in the true answer (above 0 where there is none); 0 to about 1."
        ),
    ),
    MetricFacts(
        name="neutral_drift",
        title="Drift of neutral edits",
        group="Expression",
        direction="lower",
        definition=(
            "Strongest judged expression of an edit that asks for none, above what the judge sees of it in "
            "the true answer (above 0 where there is none); 0 to about 1."
        ),
    ),
    MetricFacts(
        name="unjudged_rate",
        title="Edits without a judgement",
        group="Expression",
        direction="lower",
        definition=(
            "Share of edits at intensity 1 in which the judge of expressions saw nothing; they count as "
            "showing no expression; 0 to 1."
        ),
    ),
)
_CONTROL = (
    MetricFacts(
        name="control_linearity",
        title="Control linearity, all 12",
        group="Control",
        direction="higher",
        paper="CLS-12",
        definition=(
            "Pearson correlation of asked and judged intensity from 0 to 1 for each subject and expression, "
            "then the mean; -1 to 1."
        ),
    ),
    MetricFacts(
        name="basic_linearity",
        title="Control linearity, basic 6",
        group="Control",
        direction="higher",
        paper="CLS-6",
        definition="Control linearity of the six basic expressions alone; -1 to 1.",
    ),
    MetricFacts(
        name="monotonicity",
        title="Monotonicity",
        group="Control",
        direction="higher",
        definition=(
            "Share of steps from one intensity to the next, from 0 to 1, at which the judged intensity "
            "rises; 0 to 1."
        ),
    ),
    MetricFacts(
        name="control_range",
        title="Control range",
        group="Control",
        direction="higher",
        definition=(
            "Judged intensity of the asked expression at 1 minus that of the same subject's neutral edit; "
            "about -1 to 1."
        ),
    ),
)
_IDENTITY = (
    MetricFacts(
        name="identity_similarity",
        title="Identity similarity",
        group="Identity",
        direction="higher",
        paper="ID Sim",
        definition=(
            "Cosine of identity embeddings, source against edit at intensity 1, 0 where no face is found; "
            "-1 to 1."
        ),
    ),
    MetricFacts(
        name="identity_ratio",
        title="Identity kept, share of the ceiling",
        group="Identity",
        direction="higher",
        definition=(
            "Identity similarity of the edits over the mean similarity of the same person's true answers; 0 "
            "to about 1, and above 1 where edits are more timid than truth."
        ),
    ),
    MetricFacts(
        name="harmonic_editing_score",
        title="Harmonic editing score",
        group="Identity",
        direction="higher",
        paper="HES",
        definition=(
            "Harmonic mean of the judged intensity of the asked expression and of identity similarity, both "
            "cut to 0 to 1, for each edit at intensity 1; 0 to 1."
        ),
    ),
    MetricFacts(
        name="lazy_rate",
        title="Lazy edits",
        group="Identity",
        direction="lower",
        definition=(
            "Share of edits at intensity 1 that are as near to the source as 95 % of what the true answer "
            "is (of 1 where there is none) and gain less than 0.2 of the asked expression over the neutral "
            "edit; 0 to 1."
        ),
    ),
    MetricFacts(
        name="over_edit_rate",
        title="Over-edits",
        group="Identity",
        direction="lower",
        definition=(
            "Share of edits at intensity 1 whose identity similarity is below 60 % of the true answer's "
            "(below 0.3 where there is none) or that show no face; 0 to 1."
        ),
    ),
    MetricFacts(
        name="face_lost_rate",
        title="Edits without a face",
        group="Identity",
        direction="lower",
        definition="Share of edits at intensity 1 in which the identity encoder finds no face; 0 to 1.",
    ),
)
_BLENDS = (
    MetricFacts(
        name="blend_success",
        title="Blend success",
        group="Blends",
        direction="higher",
        definition=(
            "Share of blends of two expressions in which the judge finds each component at half of what was "
            "asked or more; 0 to 1."
        ),
    ),
)
_PIXELS = (
    MetricFacts(
        name="background_ssim",
        title="Background kept (SSIM)",
        group="Background",
        direction="higher",
        definition=(
            "Structural similarity of edit at intensity 1 and source outside of the face; -1 to 1, 1 is "
            "unchanged."
        ),
    ),
    MetricFacts(
        name="background_lpips",
        title="Background change (LPIPS)",
        group="Background",
        direction="lower",
        definition=(
            "Learned perceptual distance of edit at intensity 1 and source outside of the face; 0 is "
            "unchanged."
        ),
    ),
    MetricFacts(
        name="paired_psnr",
        title="Paired PSNR",
        group="Picture quality",
        direction="higher",
        unit="dB",
        definition="PSNR of the edit at intensity 1 against the true answer; 0 to 60 dB.",
    ),
    MetricFacts(
        name="psnr_gain",
        title="PSNR gain over the base",
        group="Picture quality",
        direction="higher",
        unit="dB",
        definition=(
            "Paired PSNR with the adapter minus paired PSNR of the base alone, for each subject and "
            "expression."
        ),
    ),
    MetricFacts(
        name="seam_energy",
        title="Seam energy",
        group="Picture quality",
        direction="lower",
        definition="Mean squared gradient across token borders over that inside tokens; 1 means no seams.",
    ),
    MetricFacts(
        name="seam_excess",
        title="Seam energy over truth",
        group="Picture quality",
        direction="lower",
        definition=(
            "Seam energy of the edit over that of the true answer, whose lines may lie on token borders "
            "too; 1 means no seams added."
        ),
    ),
)

METRICS: Mapping[str, MetricFacts] = {
    facts.name: facts for facts in (*_EXPRESSION, *_CONTROL, *_IDENTITY, *_BLENDS, *_PIXELS)
}


def show(value: float, unit: str = "") -> str:
    """A metric's value for people: two decimals for dB, three otherwise."""
    return f"{value:.2f} {unit}" if unit else f"{value:.3f}"

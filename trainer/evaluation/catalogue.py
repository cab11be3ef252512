"""What each metric is called, what it means, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower", "context"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricFacts:
    """What a reader needs to know about a metric.

    Attributes:
        name: key in JSON, in MLflow and in a recipe's thresholds.
        title: what people read.
        definition: one sentence with the formula and the range.
        direction: "higher" is better, "lower" is better, or "context" (explains, cannot be gated).
        unit: "" for ratios and rates, "dB" for PSNR.
    """

    name: str
    title: str
    definition: str
    direction: Direction
    unit: str = ""


METRICS: Mapping[str, MetricFacts] = {
    facts.name: facts
    for facts in (
        MetricFacts(
            name="top1_accuracy",
            title="Expression accuracy (top-1 of 12)",
            direction="higher",
            definition=(
                "Share of edits at intensity 1 whose strongest judged expression is the asked one; 0 to 1."
            ),
        ),
        MetricFacts(
            name="base_top1_accuracy",
            title="Expression accuracy of the base alone",
            direction="lower",
            definition=(
                "The same share for the base model without any adapter; 0 to 1. A base that already "
                "knows the expressions would make every adapter look good."
            ),
        ),
        MetricFacts(
            name="structural_confusion",
            title="Structural confusion",
            direction="lower",
            definition=(
                "Rate at which an edit asked for one expression of a declared confusing pair is "
                "judged as the other, mean over pairs and both directions; 0 to 1."
            ),
        ),
        MetricFacts(
            name="control_linearity",
            title="Control linearity",
            direction="higher",
            definition=(
                "Pearson correlation of asked and judged intensity for each subject and expression, "
                "then the mean; -1 to 1."
            ),
        ),
        MetricFacts(
            name="monotonicity",
            title="Monotonicity",
            direction="higher",
            definition=(
                "Share of steps from one intensity to the next at which the judged intensity rises; 0 to 1."
            ),
        ),
        MetricFacts(
            name="control_range",
            title="Control range",
            direction="higher",
            definition=(
                "Judged intensity asked 1 minus judged intensity asked 0, mean over expressions; "
                "about -1 to 1."
            ),
        ),
        MetricFacts(
            name="identity_similarity",
            title="Identity similarity",
            direction="higher",
            definition="Cosine of identity embeddings, source portrait against edit at intensity 1; -1 to 1.",
        ),
        MetricFacts(
            name="identity_ceiling",
            title="Same-person ceiling",
            direction="context",
            definition=(
                "The same cosine between two true renders of the person: neutral, and with the expression."
            ),
        ),
        MetricFacts(
            name="identity_ratio",
            title="Identity kept, share of the ceiling",
            direction="higher",
            definition="Identity similarity of the edits over the same-person ceiling; 0 to about 1.",
        ),
        MetricFacts(
            name="paired_psnr",
            title="Paired PSNR",
            direction="higher",
            unit="dB",
            definition=(
                "PSNR of the edit at intensity 1 against the true render of the asked expression of "
                "the same person; 0 to 60 dB."
            ),
        ),
        MetricFacts(
            name="psnr_gain",
            title="PSNR gain over the base",
            direction="higher",
            unit="dB",
            definition="Paired PSNR with the adapter minus paired PSNR of the base alone, paired by subject.",
        ),
        MetricFacts(
            name="seam_energy",
            title="Seam energy",
            direction="lower",
            definition=(
                "Mean squared gradient across token borders over that inside tokens; 1 means no seams."
            ),
        ),
        MetricFacts(
            name="seam_excess",
            title="Seam energy over truth",
            direction="lower",
            definition=(
                "Seam energy of the edit over that of the true render, whose lines may lie on token borders "
                "too; 1 means no seams added."
            ),
        ),
        MetricFacts(
            name="blend_success",
            title="Blend success",
            direction="higher",
            definition=(
                "Share of two-expression blends in which the judge finds each component at half of "
                "what was asked or more; 0 to 1."
            ),
        ),
    )
}


def show(value: float, unit: str = "") -> str:
    """A metric's value for people: two decimals for dB, three otherwise."""
    return f"{value:.2f} {unit}" if unit else f"{value:.3f}"

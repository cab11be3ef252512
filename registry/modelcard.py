"""The model card inside a bill of materials: what an adapter is for, how well it does it, and its limits.

It is read from the manifest and from signed evaluations, whoever made them: of a predicate that has another
form than the trainer's only what is understood is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeGuard

if TYPE_CHECKING:
    from registry.attestation import Statement
    from registry.manifest import AdapterManifest

_MAX_METRICS: Final = 200


def model_card(
    manifest: AdapterManifest, told: Sequence[Statement], datasets: Sequence[str]
) -> dict[str, Any]:
    """Return the ``modelCard`` of an adapter.

    Args:
        manifest: the adapter.
        told: believed statements about it.
        datasets: references of the components that it was trained with.
    """
    conditioning, lora = manifest.conditioning, manifest.lora
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "image-to-image",
            "architectureFamily": "low-rank adapter of a diffusion model",
            "modelArchitecture": f"{manifest.base.family}, LoRA of rank {lora.rank}",
            "datasets": [{"ref": found} for found in datasets],
            "inputs": [{"format": "image"}, {"format": "text"}],
            "outputs": [{"format": "image"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(told))[:_MAX_METRICS]},
        "considerations": {
            "useCases": [f"Editing the expression of portraits: {', '.join(conditioning.expressions)}."],
            "technicalLimitations": [
                f"Made for {manifest.base.id} at revision {manifest.base.revision}; "
                "another base gives other images.",
                f"Strengths from {conditioning.strength_min:g} to {conditioning.strength_max:g} "
                f"with prompts of the form {conditioning.template!r}.",
                *_shortcomings(told),
            ],
        },
    }


def _metrics(told: Sequence[Statement]) -> Iterator[dict[str, Any]]:
    """Read metrics of evaluations: rows with intervals as the trainer writes them, or plain numbers."""
    for found in told:
        if found.kind != "evaluation":
            continue
        metrics, suite = found.predicate.get("metrics"), found.predicate.get("suite")
        part = str(suite["name"]) if isinstance(suite, Mapping) and "name" in suite else None
        rows = (
            [{"name": name, "value": value} for name, value in metrics.items()]
            if isinstance(metrics, Mapping)
            else metrics
        )
        for row in rows if isinstance(rows, Sequence) and not isinstance(rows, str) else ():
            if isinstance(row, Mapping) and (metric := _metric(row, part)) is not None:
                yield metric


def _metric(row: Mapping[str, Any], part: str | None) -> dict[str, Any] | None:
    told = row.get("value")
    estimate: Mapping[str, Any] = told if isinstance(told, Mapping) else {"value": told}
    value, low, high = estimate.get("value"), estimate.get("low"), estimate.get("high")
    if not _is_number(value) or not isinstance(row.get("name"), str):
        return None
    metric: dict[str, Any] = {"type": row["name"], "value": _number(value)}
    if part is not None:
        metric["slice"] = part
    if _is_number(low) and _is_number(high):
        metric["confidenceInterval"] = {"lowerBound": _number(low), "upperBound": _number(high)}
    return metric


def _shortcomings(told: Sequence[Statement]) -> Iterator[str]:
    """Tell why evaluations were not passed."""
    for found in told:
        reasons = found.predicate.get("reasons")
        if found.kind == "evaluation" and found.outcome != "pass" and isinstance(reasons, list):
            yield from (f"The evaluation was not passed: {reason}" for reason in reasons)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:.6g}"

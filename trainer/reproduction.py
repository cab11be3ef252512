"""Making an adapter again: what its signed statements say it was made from, and how alike the result is.

The recipe is believed only where the publisher's key signed it, and only if it has the digest that the
manifest names. The weights are compared first: equal bytes need no second look. Otherwise the updates are
compared as linear maps (`registry.spectral`), and the figures of both evaluations:

- the Frobenius norm of the difference is at most `TOLERANCE` of the released update's;
- each figure lies in the 95 % interval of the released one, which is widened to at least `SLACK` of its value
  on either side, for an interval of a figure that never varied has no width.

Both hold: equivalent. What is not bit for bit the same and not equivalent is different.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry import attestation
from registry.attestation import Statement
from registry.content import FileContent
from registry.digest import Digest, digest_content
from registry.errors import BadSignature, InvalidDocument, shown
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard, AdapterManifest, Provenance
from registry.reproduction import Both, Difference, Metric, Outcome, Reproduction, Sha256, close
from registry.spectral import compare as compare_weights
from trainer.errors import NotReproducible
from trainer.evaluation.report import EvaluationReport
from trainer.provenance import heard
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.results import StatementView

TOLERANCE: Final = 0.1
SLACK: Final = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What is signed about how an adapter was made.

    Attributes:
        manifest: of the adapter.
        recipe: of its training.
        made: by which code, on which machine.
        metrics: figures of its signed evaluation: name -> value, low and high end of the interval.
        definitions: versions of the definitions that these figures follow.
    """

    manifest: AdapterManifest
    recipe: Recipe
    made: Provenance
    metrics: Mapping[str, tuple[float, float, float]]
    definitions: frozenset[str] = frozenset()

    @property
    def reference(self) -> str:
        """Name and version of the adapter."""
        return f"{self.manifest.name}:{self.manifest.version}"

    @property
    def asks_apis(self) -> bool:
        """Whether pictures or scores came from paid APIs."""
        return self.recipe.synthesis is not None or self.recipe.scoring.scorer != "judge"

    def require_base(self, found: Digest) -> None:
        """Refuse to train on another base model than the recorded one.

        Raises:
            NotReproducible: the files are others.
        """
        for ingredient in self.manifest.ingredients:
            if ingredient.kind == "base" and ingredient.digest not in (None, found):
                raise NotReproducible(
                    f"the base model {ingredient.name} on this machine is {found}, {self.reference} was "
                    f"trained on {ingredient.digest}",
                    "fetch the revision that the manifest names",
                )


def recorded(registry: Registry, reference: str) -> Recorded:
    """Read how an adapter was made from its signed statements.

    Raises:
        NotFound: there is no such adapter.
        BadSignature: a training statement is not signed by the publisher, or names other materials.
        NotReproducible: nobody recorded the recipe.
        RecipeError: this version of the program cannot read the recorded recipe, or reads another one.
    """
    found = registry.show(reference)
    manifest, name = found.manifest, f"{found.manifest.name}:{found.manifest.version}"
    views = [view for view in found.statements if view.kind == "training"]
    for view in views:
        _believe(view, manifest)
    made = manifest.training.provenance
    if not views or made is None:
        raise NotReproducible(
            f"nobody recorded what {name} was made from: it has no signed recipe"
            if views
            else f"nobody signed what {name} was made from",
            "adapters that were trained and pushed by this version or a newer one can be reproduced",
        )
    figures: dict[str, tuple[float, float, float]] = {}
    definitions = set[str]()
    for view in found.statements:
        if view.signed and view.kind == "evaluation":
            figures |= _figures(view.predicate)
            definitions |= _definitions(view.predicate)
    return Recorded(
        manifest=manifest,
        recipe=heard(made.recipe, manifest.training.recipe),
        made=made,
        metrics=figures,
        definitions=frozenset(definitions),
    )


def _believe(view: StatementView, manifest: AdapterManifest) -> None:
    name = f"{manifest.name}:{manifest.version}"
    if not view.signed:
        raise BadSignature(
            f"the training statement of {name} is not believed: {view.problem}",
            "no recipe is rebuilt that the publisher did not sign; report it to who runs the registry",
        )
    said = Statement(kind="training", subject_name=name, digest=manifest.digest, predicate=view.predicate)
    if not attestation.materials_match(said, manifest):
        raise BadSignature(
            f"the training statement of {name} names other materials than its manifest",
            "report it to who runs the registry",
        )


def _figures(predicate: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Figures with intervals, as this trainer's evaluations have them; others have none to compare."""
    found = {}
    rows = predicate.get("metrics")
    for row in rows if isinstance(rows, Sequence) else ():
        try:
            value = row["value"]
            found[str(row["name"])] = (float(value["value"]), float(value["low"]), float(value["high"]))
        except (KeyError, TypeError, ValueError):
            continue
    return found


def _definitions(predicate: Mapping[str, Any]) -> set[str]:
    suite = predicate.get("suite")
    said = suite.get("definitions") if isinstance(suite, Mapping) else None
    return {shown(said, 20)} if said else set()


def identical(known: Recorded, rebuilt: Path) -> bool:
    """Return whether the weights in an adapter folder are the released ones, bit for bit."""
    with FileContent(rebuilt / WEIGHTS_NAME) as content:
        return digest_content(content) == known.manifest.file(WEIGHTS_NAME).sha256


def compare(
    registry: Registry,
    known: Recorded,
    rebuilt: Path,
    *,
    report: EvaluationReport | None = None,
    dataset_reused: bool = False,
) -> Reproduction:
    """Compare an adapter that was made again with the released one.

    Args:
        registry: has the released weights.
        known: what is signed about them.
        rebuilt: adapter folder of the new one; its card says by which code, on which machine.
        report: its evaluation; not needed if the weights are identical.
        dataset_reused: the released dataset was taken as it lay there.

    Raises:
        NotFound: the released weights are gone.
        DigestMismatch: they are not what was signed.
    """
    manifest, notes = known.manifest, list[str]()
    card = AdapterCard.parse((rebuilt / CARD_NAME).read_bytes())
    made, dataset = card.training.provenance, card.training.dataset
    assert made is not None, "an adapter that was just trained says how"
    released = manifest.file(WEIGHTS_NAME).sha256
    difference = None
    with FileContent(rebuilt / WEIGHTS_NAME) as mine:
        digest = digest_content(mine)
        if digest != released:
            difference = _difference(registry, manifest, mine, notes)
    metrics = () if digest == released or report is None else _metrics(known.metrics, report)
    if digest != released and not metrics:
        notes.append("there is no signed evaluation to compare figures with")
    elif metrics and report is not None and known.definitions - {report.suite.definitions}:
        theirs, ours = ", ".join(sorted(known.definitions)), report.suite.definitions
        notes.append(f"the released figures follow the definitions {theirs}, the rebuilt ones {ours}")
    if made.code != known.made.code:
        notes.append("the code is not the recorded one: another version, or it was changed")
    if dataset != manifest.training.dataset:
        notes.append("the dataset came out differently")
    if made.machine != known.made.machine:
        notes.append("the machine or its libraries are not the recorded ones, so equal bits are not expected")
    return Reproduction(
        outcome=_outcome(digest == released, difference, metrics),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        weights=Sha256.of(released),
        rebuilt=Sha256.of(digest),
        recipe=manifest.training.recipe,
        dataset=Both(released=manifest.training.dataset, rebuilt=dataset),
        dataset_reused=dataset_reused,
        code=Both(released=known.made.code, rebuilt=made.code),
        machine=made.machine,
        released_machine=known.made.machine,
        difference=difference,
        metrics=metrics,
        notes=tuple(notes),
    )


def _difference(
    registry: Registry, manifest: AdapterManifest, mine: FileContent, notes: list[str]
) -> Difference | None:
    from registry.comparison import weights_of

    with weights_of(registry, manifest) as released:
        try:
            change = compare_weights(released, mine)
        except InvalidDocument as error:
            notes.append(shown(f"the weights cannot be compared: {error.message}", 250))
            return None
    return Difference(relative=change.relative, cosine=change.cosine, tolerance=TOLERANCE)


def _metrics(
    released: Mapping[str, tuple[float, float, float]], report: EvaluationReport
) -> tuple[Metric, ...]:
    rebuilt = {metric.name: metric.value.value for metric in report.metrics}
    rows = []
    for name in sorted(released.keys() & rebuilt.keys()):
        value, low, high = released[name]
        slack = SLACK * abs(value)
        row = {"low": min(low, value - slack), "high": max(high, value + slack)}
        rows.append(Metric(name=name, released=value, rebuilt=rebuilt[name], **row))
    return tuple(rows)


def _outcome(same: bool, difference: Difference | None, metrics: Sequence[Metric]) -> Outcome:
    if same:
        return "identical"
    return "equivalent" if close(difference, metrics) else "different"


def take_threads(known: Recorded) -> None:
    """Compute with as many threads as the recorded training: the order of a sum depends on it."""
    import torch

    if known.made.machine.processes == 1:
        torch.set_num_threads(known.made.machine.threads)

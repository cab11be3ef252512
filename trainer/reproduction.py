"""Making an adapter again: what its signed statements say it was made from, and how alike the result is.

The recipe is believed only where the publisher's key signed it, and only if it has the digest that the
manifest names. The weights are compared first: equal bytes need no second look. Otherwise the updates are
compared as linear maps (`registry.spectral`), and the figures of both evaluations:

- the Frobenius norm of the difference is at most `TOLERANCE` of the released update's;
- each figure lies in the 95 % interval of the released one, which is widened to at least `SLACK` of its value
  on either side, for an interval of a figure that never varied has no width.

Both hold: equivalent. Figures are compared with a signed evaluation that asked the same people for the same,
by the same definitions and judges, and of such an evaluation every figure must come out again; where several
are signed, all must agree. What is not bit for bit the same and not equivalent is different, also where one
of the two could not be compared: the notes say so.
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
from registry.manifest import CARD_NAME, MAX_SAID, WEIGHTS_NAME, AdapterCard, AdapterManifest, Provenance
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


Figures = Mapping[str, tuple[float, float, float]]
"""Metric -> value, low and high end of its interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """A signed evaluation of an adapter.

    Attributes:
        figures: what was found.
        definitions: version of the metrics' definitions; empty if it does not say.
        suite: digest of who was asked for what, by which definitions; empty if it does not say.
        judges: digests of the judges by what they judge.
    """

    figures: Figures
    definitions: str
    suite: str
    judges: Mapping[str, str]

    def like(self, report: EvaluationReport) -> bool:
        """Return whether it measured the same things in the same way as a report."""
        judges = {name: str(digest) for name, digest in report.digests.judges.items()}
        return (self.suite, self.judges) == (str(report.digests.suite), judges)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What is signed about how an adapter was made.

    Attributes:
        manifest: of the adapter.
        recipe: of its training.
        made: by which code, on which machine.
        evaluations: its signed evaluations that have figures with intervals.
    """

    manifest: AdapterManifest
    recipe: Recipe
    made: Provenance
    evaluations: tuple[Evaluated, ...] = ()

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
    read = [
        _evaluated(view.predicate) for view in found.statements if view.signed and view.kind == "evaluation"
    ]
    return Recorded(
        manifest=manifest,
        recipe=heard(made.recipe, manifest.training.recipe),
        made=made,
        evaluations=tuple(one for one in read if one.figures),
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


def _evaluated(predicate: Mapping[str, Any]) -> Evaluated:
    """Read what other programs may have signed too: where they say less, there is nothing to compare with."""
    digests = _mapping(predicate.get("digests"))
    return Evaluated(
        figures=_figures(predicate),
        definitions=str(_mapping(predicate.get("suite")).get("definitions", "")),
        suite=str(digests.get("suite", "")),
        judges={str(name): str(digest) for name, digest in _mapping(digests.get("judges")).items()},
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _figures(predicate: Mapping[str, Any]) -> Figures:
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
        dataset_reused: some of the released dataset was taken as it lay there.

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
    metrics = () if digest == released else _metrics(known.evaluations, report, notes)
    if made.code != known.made.code:
        notes.append("the code is not the recorded one: another version, or it was changed")
    if dataset != manifest.training.dataset:
        notes.append("the dataset came out differently")
    if made.machine != known.made.machine or known.made.earlier_machines:
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
    signed: Sequence[Evaluated], report: EvaluationReport | None, notes: list[str]
) -> tuple[Metric, ...]:
    """Return the figures of both, or none where not all can be compared; the notes say why."""
    if report is None or not signed:
        notes.append("there is no signed evaluation to compare figures with")
        return ()
    like = [one for one in signed if one.like(report)]
    if not like:
        theirs = ", ".join(sorted({one.definitions or "unknown" for one in signed}))
        why = (
            "no signed evaluation has the suite, the definitions and the judges of the rebuilt one "
            f"(its definitions are {report.suite.definitions}, the signed ones {theirs})"
        )
        notes.append(shown(f"no figures are compared: {why}", 250)[:MAX_SAID])
        return ()
    rebuilt = {metric.name: metric.value.value for metric in report.metrics}
    lacking = sorted({name for one in like for name in one.figures} - rebuilt.keys())
    if lacking:
        why = f"the rebuilt adapter has none for {', '.join(lacking)}"
        notes.append(shown(f"no figures are compared: {why}", 250)[:MAX_SAID])
        return ()
    tables = [_rows(one.figures, rebuilt) for one in like]
    # Any signed evaluation that it contradicts decides.
    return min(tables, key=lambda rows: all(row.within for row in rows))


def _rows(released: Figures, rebuilt: Mapping[str, float]) -> tuple[Metric, ...]:
    rows = []
    for name in sorted(released):
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

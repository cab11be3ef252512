"""Two versions side by side: what is signed about each, and how far their weights are apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.cache import AdapterCache
from registry.content import Content, VerifiedContent
from registry.errors import InvalidDocument, NotFound
from registry.index import figures
from registry.manifest import WEIGHTS_NAME, AdapterManifest
from registry.results import Shown
from registry.spectral import SpectralChange
from registry.spectral import compare as compare_weights
from registry.transfer import StoredContent

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.reference import Reference

Value = str | int | float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One fact about two versions.

    Attributes:
        name: dotted, such as ``base.revision``.
        first: what the first version says; None if it says nothing.
        second: what the second one says.
    """

    name: str
    first: Value
    second: Value

    @property
    def same(self) -> bool:
        """Whether both say the same."""
        return self.first == self.second

    @property
    def difference(self) -> float | None:
        """The second minus the first, if both are numbers."""
        if isinstance(self.first, int | float) and isinstance(self.second, int | float):
            return float(self.second - self.first)
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two versions side by side.

    Attributes:
        first: the version from which differences are counted.
        second: the other one.
        fields: facts of the manifests, of the statements and of the trust metadata.
        metrics: figures of the believed evaluations.
        weights: how far the weights are apart; None if they cannot be compared.
        problem: why they cannot; None if they can.
    """

    first: Shown
    second: Shown
    fields: tuple[Field, ...]
    metrics: tuple[Field, ...]
    weights: SpectralChange | None
    problem: str | None


def diff(registry: Registry, first: Reference, second: Reference) -> Comparison:
    """Compare two versions, revoked ones too; nothing is loaded or kept.

    Weights are read from this machine's cache or, where it has them not, from the store, and every byte of
    them is verified.

    Raises:
        NotFound: there is no such version, or its weights are gone.
        DigestMismatch: weights or documents are not what was signed.
        RegistryError: see the error tree.
    """
    one, two = registry.show(first), registry.show(second)
    weights = problem = None
    with weights_of(registry, one.manifest) as mine, weights_of(registry, two.manifest) as theirs:
        try:
            weights = compare_weights(mine, theirs)
        except InvalidDocument as error:  # genuine bytes in which there is nothing to compare
            problem = error.message
    return Comparison(
        first=one,
        second=two,
        fields=tuple(_side_by_side(_facts(one), _facts(two))),
        metrics=tuple(_side_by_side(_metrics(one), _metrics(two))),
        weights=weights,
        problem=problem,
    )


@contextlib.contextmanager
def weights_of(registry: Registry, manifest: AdapterManifest) -> Iterator[Content]:
    """Give the weights of a version, from the cache or the store; every byte that is read is verified.

    Raises:
        NotFound: they are gone.
    """
    entry = manifest.file(WEIGHTS_NAME)
    with contextlib.ExitStack() as stack:
        content: Content = StoredContent(registry.store, entry)
        with contextlib.suppress(NotFound):
            kept = AdapterCache(registry.place.cache).content(manifest.digest, WEIGHTS_NAME)
            found = stack.enter_context(kept)
            content = found if len(found) == entry.size else content
        yield VerifiedContent(content, entry)


def _side_by_side(first: Mapping[str, Value], second: Mapping[str, Value]) -> Iterator[Field]:
    for name in dict.fromkeys((*first, *second)):
        yield Field(name=name, first=first.get(name), second=second.get(name))


def _facts(shown: Shown) -> dict[str, Value]:
    """What can be said about a version in a line each, in the order in which people read it."""
    manifest, row = shown.manifest, shown.listed
    facts: dict[str, Value] = {
        "digest": str(row.digest),
        "aliases": ", ".join(row.aliases) or None,
        "revoked": row.revoked,
        "yanked": row.yanked,
        "description": manifest.description or None,
        "license": manifest.license,
    }
    for ingredient in sorted(manifest.ingredients, key=lambda found: (found.kind, found.name)):
        digest = f" ({ingredient.digest[:19]})" if ingredient.digest else ""
        facts[f"ingredient {ingredient.name}"] = f"{ingredient.kind}, {ingredient.license}{digest}"
    for part in ("base", "lora", "conditioning", "training"):
        facts |= _flat(getattr(manifest, part).model_dump(mode="json"), part)
    facts.pop("training.provenance.recipe", None)  # its digest is there already
    for entry in manifest.files:
        facts[f"file {entry.path}"] = f"{entry.size} bytes, {entry.sha256[:19]}"
    for view in sorted(shown.statements, key=lambda found: (found.kind, found.key)):
        if view.signed:
            said = str(view.predicate.get("result") or view.predicate.get("verdict") or "signed")
            by = view.predicate.get("by")
            line = f"{said}, by {by}" if view.kind == "approval" else said
        else:
            line = f"NOT BELIEVED: {view.problem}"
        name = f"statement {view.kind}"
        facts[name] = f"{facts[name]}; {line}" if name in facts else line
    return facts


def _flat(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Value]]:
    for name, value in values.items():
        where = f"{path}.{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, where)
        elif isinstance(value, list):
            yield where, ", ".join(map(str, value))
        else:
            yield where, value


def _metrics(shown: Shown) -> dict[str, Value]:
    """The figures of the believed evaluations; of several statements that have a figure, the last one's."""
    found: dict[str, Value] = {}
    for view in shown.statements:
        if view.signed and view.kind == "evaluation":
            found |= {name: value for name, value, _ in figures(view.predicate.get("metrics"))}
    return dict(sorted(found.items()))

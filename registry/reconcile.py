"""Making the index say what is signed: compare, report, repair.

MLflow is never believed. What differs was changed by hand, in its database or by an interruption; a repair
always makes MLflow like the signed state, never the other way round. `compare` is pure; models that neither
have a signed name nor hold anything of this registry belong to other people and are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from registry.digest import Digest
from registry.index import (
    CatalogModel,
    CatalogVersion,
    CatalogView,
    is_ours,
    manifest_tags,
    signed_tags,
)
from registry.manifest import AdapterManifest
from registry.storage import shelf
from registry.storage.mlmodel import model_uri
from registry.views import statement_view

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.signing.trust import TrustState

_ROUNDS: Final = 3
_THREADS: Final = 8
_NOTHING: Final = "-"
# What MLflow cannot change in an entry that exists.
_NEEDS_REBUILD: Final = frozenset({"other number", "other source"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """A signed version as the index should have it."""

    manifest: AdapterManifest
    digest: Digest
    source: str
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedModel:
    """An adapter as the index should have it: versions by number, and the number that each alias means."""

    versions: Mapping[int, Expected]
    aliases: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Something that the index says and nobody signed, or the other way round.

    Attributes:
        kind: what is wrong, in words.
        model: name of the adapter.
        subject: the alias, or ``name:version``; the number in MLflow for an entry that nobody signed.
        signed: what was signed.
        found: what MLflow says; hostile text.
        entry: number of the entry in MLflow that should not be there.
    """

    kind: str
    model: str
    subject: str
    signed: str
    found: str
    entry: int | None = None


def reconcile(registry: Registry, *, repair: bool) -> tuple[tuple[Difference, ...], tuple[Difference, ...]]:
    """Compare the index with what is signed, and repair it on demand.

    Returns:
        What differed, and what still differs.

    Raises:
        NetworkError: MLflow or the store does not answer.
        RegistryError: see the error tree.
    """
    registry.catalog.require()
    # First the index and then the trust metadata: what is published meanwhile is signed before it is indexed.
    view = registry.catalog.survey()
    expected = expectation(registry, registry.authority.state())
    found = left = compare(expected, view)
    if not repair or not found:
        return found, left
    for difference in found:
        details = {"kind": difference.kind, "signed": difference.signed, "found": difference.found[:300]}
        registry.record("reconcile", difference.subject, details)
    for _ in range(_ROUNDS):
        for name in sorted({difference.model for difference in left}):
            mine = tuple(difference for difference in left if difference.model == name)
            _repair(registry, name, expected.get(name), view.get(name), mine)
        view = registry.catalog.survey()
        expected = expectation(registry, registry.authority.state())
        left = compare(expected, view)
        if not left:
            break
    _anchor(registry)
    return found, left


def index_version(registry: Registry, state: TrustState, digest: Digest) -> None:
    """Index a signed version, with everything that was signed about it until now.

    Aliases of a revoked version are taken out of the index: who loads through MLflow alone checks nothing.

    Raises:
        NetworkError: MLflow or the store does not answer.
    """
    wanted = _expected(registry, state, digest)
    registry.catalog.record(wanted.manifest, digest, wanted.source, wanted.tags)
    if state.is_revoked(digest) is not None:
        for path, target in state.aliases().items():
            name, _, alias = path.partition("@")
            if target.digest == digest and name == wanted.manifest.name:
                registry.catalog.point(name, alias, None)


def expectation(registry: Registry, state: TrustState) -> dict[str, ExpectedModel]:
    """Return what the index should say; aliases of revoked versions should mean nothing there.

    Raises:
        DigestMismatch: the store holds something else under the name of a manifest.
        NotFound: the store lacks a manifest.
    """
    signed = state.versions()
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda target: _expected(registry, state, target.digest), signed.values())
        found = dict(zip(signed, read, strict=True))
    versions: dict[str, dict[int, Expected]] = {}
    for path, one in found.items():
        name, _, number = path.partition(":")
        versions.setdefault(name, {})[int(number)] = one
    aliases: dict[str, dict[str, int]] = {}
    for path, target in state.aliases().items():
        name, _, alias = path.partition("@")
        if state.is_revoked(target.digest) is None:
            meant = (number for number, one in versions.get(name, {}).items() if one.digest == target.digest)
            aliases.setdefault(name, {}).update((alias, number) for number in meant)
    return {
        name: ExpectedModel(versions=dict(sorted(mine.items())), aliases=aliases.get(name, {}))
        for name, mine in versions.items()
    }


def compare(expected: Mapping[str, ExpectedModel], view: CatalogView) -> tuple[Difference, ...]:
    """Return everything in which the index differs from what is signed."""
    found: list[Difference] = []
    for name, wanted in expected.items():
        found += _model_differences(name, wanted, view.get(name))
    # Another registry may share the MLflow server: an unknown name is ours only if it holds what we signed.
    signed = [one for wanted in expected.values() for one in wanted.versions.values()]
    digests, sources = {str(one.digest) for one in signed}, {one.source for one in signed}
    for name in view.keys() - expected.keys():
        for version in view[name].versions:
            if version.digest in digests or version.source in sources:
                found.append(_unsigned(name, version))
    return tuple(sorted(found, key=lambda one: (one.model, one.subject, one.kind)))


def _model_differences(name: str, wanted: ExpectedModel, model: CatalogModel | None) -> Iterator[Difference]:
    claims: dict[int, list[CatalogVersion]] = {}
    for entry in () if model is None else model.versions:
        signed = _identify(entry, wanted)
        if signed is None:
            yield _unsigned(name, entry)
        else:
            claims.setdefault(signed, []).append(entry)
    placed: dict[int, int] = {}
    for signed, one in wanted.versions.items():
        entries = sorted(claims.get(signed, ()), key=lambda entry: (entry.number != signed, entry.number))
        for again in entries[1:]:
            yield _unsigned(name, again)
        if entries:
            placed[signed] = entries[0].number
            yield from _version_differences(name, entries[0], signed, one)
        else:
            yield Difference(
                kind="version missing",
                model=name,
                subject=f"{name}:{signed}",
                signed=str(one.digest),
                found=_NOTHING,
            )
    yield from _alias_differences(name, wanted, {} if model is None else model.aliases, placed)


def _identify(version: CatalogVersion, wanted: ExpectedModel) -> int | None:
    """Return the number of the signed version that an entry stands for, or None."""
    for number, one in wanted.versions.items():
        if one.digest == version.digest:
            return number
    # Who changes the digest tag has not made another version of it.
    same = wanted.versions.get(version.number)
    return version.number if same is not None and same.source == version.source else None


def _version_differences(
    name: str, version: CatalogVersion, signed: int, wanted: Expected
) -> Iterator[Difference]:
    subject, number = f"{name}:{signed}", version.number
    if number != signed:
        yield Difference(
            kind="other number",
            model=name,
            subject=subject,
            signed=f"version {signed}",
            found=f"version {number} in MLflow",
        )
    if version.source != wanted.source:
        yield Difference(
            kind="other source", model=name, subject=subject, signed=wanted.source, found=version.source
        )
    ours = {key for key in version.tags if is_ours(key)} | wanted.tags.keys()
    for key in sorted(ours):
        signed_value, found_value = wanted.tags.get(key, _NOTHING), version.tags.get(key, _NOTHING)
        if signed_value != found_value:
            yield Difference(
                kind="other tag",
                model=name,
                subject=subject,
                signed=f"{key}={signed_value}",
                found=f"{key}={found_value}",
            )


def _alias_differences(
    name: str, wanted: ExpectedModel, aliases: Mapping[str, int], placed: Mapping[int, int]
) -> Iterator[Difference]:
    for alias in sorted(wanted.aliases.keys() | aliases.keys()):
        signed, entry = wanted.aliases.get(alias), aliases.get(alias)
        if signed is not None and entry is not None and placed.get(signed) == entry:
            continue
        kinds = {(False, True): "alias nobody signed", (True, False): "alias missing"}
        yield Difference(
            kind=kinds.get((signed is not None, entry is not None), "alias moved"),
            model=name,
            subject=f"{name}@{alias}",
            signed=_NOTHING if signed is None else f"version {signed}",
            found=_NOTHING if entry is None else f"version {entry} in MLflow",
        )


def _unsigned(name: str, version: CatalogVersion) -> Difference:
    claim = f", which claims to be {version.digest}" if version.digest else ""
    return Difference(
        kind="version nobody signed",
        model=name,
        subject=f"{name} {version.number}",
        signed=_NOTHING,
        found=f"version {version.number} in MLflow{claim}",
        entry=version.number,
    )


def _repair(
    registry: Registry,
    name: str,
    wanted: ExpectedModel | None,
    model: CatalogModel | None,
    differences: Sequence[Difference],
) -> None:
    """Make one model of the index like the signed one; one that has to be made anew loses people's tags."""
    catalog = registry.catalog
    if wanted is None:
        if model is not None and len(differences) == len(model.versions):
            catalog.remove(name)
            return
    elif any(difference.kind in _NEEDS_REBUILD for difference in differences):
        catalog.remove(name)
        model = None
    for difference in differences:
        if difference.entry is not None and model is not None:
            catalog.remove(name, difference.entry)
    if wanted is None:
        return
    there = set() if model is None else {entry.number for entry in model.versions}
    there -= {difference.entry for difference in differences}
    for number, one in wanted.versions.items():
        entry = number if number in there else None
        catalog.record(one.manifest, one.digest, one.source, one.tags, number=entry)
    for alias, number in wanted.aliases.items():
        entry = number if number in there else None
        catalog.point(name, alias, wanted.versions[number].digest, number=entry)
    for alias in (model.aliases if model is not None else {}).keys() - wanted.aliases.keys():
        catalog.point(name, alias, None)


def _expected(registry: Registry, state: TrustState, digest: Digest) -> Expected:
    manifest = shelf.read_manifest(registry.store, digest)
    statements = shelf.read_statements(registry.store, digest)
    views = [statement_view(state, digest, key, data) for key, data in statements.items()]
    tags = manifest_tags(manifest, digest) | signed_tags(
        digest,
        registry.store.uri,
        views,
        revoked=state.is_revoked(digest),
        yanked=state.is_yanked(digest),
    )
    return Expected(manifest=manifest, digest=digest, source=model_uri(registry.store, manifest), tags=tags)


def _anchor(registry: Registry) -> None:
    """Signs the audit log's new rows, if the key for that is here; the next publish does it otherwise."""
    from registry.signing.signers import ONLINE

    if registry.keys.holds(ONLINE):
        registry.authority.publish_anchor()

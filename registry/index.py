"""What the index for people shows, and what it should show: a pure function of what is signed.

Tags with these keys belong to the registry; everything else in the index belongs to the people who use it.

============================  =====================================================================
tag of a version              says
============================  =====================================================================
adapter_foundry.digest        digest of the manifest: which signed version this is
adapter_foundry.reference     ``name:version``
adapter_foundry.manifest      where the store keeps the manifest
adapter_foundry.statements    where the store keeps the statements and reports
adapter_foundry.revoked       why it must not be used (only if it was revoked)
adapter_foundry.yanked        why it should not be used for anything new (only if it was yanked)
license                       SPDX expression
base, base_revision, rank     which base model it belongs to, and its size
scan, evaluation              verdict of the signed statements: pass, review or fail
metric.<name>                 headline figures of the signed evaluation
============================  =====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from registry.digest import Digest
from registry.errors import shown
from registry.evaluation import required
from registry.manifest import AdapterManifest
from registry.results import StatementView
from registry.storage.base import manifest_key, statements_prefix

DIGEST_TAG: Final = "adapter_foundry.digest"
REFERENCE_TAG: Final = "adapter_foundry.reference"
_OURS: Final = "adapter_foundry."
_METRIC: Final = "metric."
_PLAIN: Final = frozenset({"license", "base", "base_revision", "rank", "scan", "evaluation"})
_HEADLINES: Final = 12
_MAX_VALUE: Final = 500
_WORST_FIRST: Final = ("fail", "review", "pass")
_TEST_RESULTS: Final = {"PASSED": "pass", "WARNED": "review", "FAILED": "fail"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogVersion:
    """One version as the index has it; none of it is believed.

    Attributes:
        number: how the index counts it.
        source: URI of the model directory that it loads.
        tags: all of its tags.
    """

    number: int
    source: str
    tags: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The digest that it claims to be; empty if it claims none."""
        return self.tags.get(DIGEST_TAG, "")


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogModel:
    """One model as the index has it: its versions in order, and the number that each alias means."""

    name: str
    versions: tuple[CatalogVersion, ...]
    aliases: Mapping[str, int]


CatalogView = Mapping[str, CatalogModel]
"""Everything in the index, by the name of the model."""


def is_ours(key: str) -> bool:
    """Whether a tag belongs to the registry."""
    return key in _PLAIN or key.startswith((_OURS, _METRIC))


def manifest_tags(manifest: AdapterManifest, digest: Digest) -> dict[str, str]:
    """Return the tags that follow from the manifest."""
    return {
        DIGEST_TAG: str(digest),
        REFERENCE_TAG: f"{manifest.name}:{manifest.version}",
        "license": manifest.license,
        "base": manifest.base.id,
        "base_revision": manifest.base.revision,
        "rank": str(manifest.lora.rank),
    }


def signed_tags(
    digest: Digest,
    store_uri: str,
    statements: Iterable[StatementView],
    *,
    revoked: str | None = None,
    yanked: str | None = None,
) -> dict[str, str]:
    """Return the tags that follow from what was signed about a version; statements not believed do not count.

    Args:
        digest: digest of the manifest.
        store_uri: where the object store is.
        statements: what the store holds about it.
        revoked: the signed reason of a revocation.
        yanked: the signed reason why it was yanked.
    """
    tags = {
        f"{_OURS}manifest": f"{store_uri}/{manifest_key(digest)}",
        f"{_OURS}statements": f"{store_uri}/{statements_prefix(digest).rstrip('/')}",
    }
    verdicts: dict[str, set[str]] = {}
    for view in sorted(statements, key=lambda found: found.key):
        if not view.signed or view.kind not in ("scan", "evaluation"):
            continue
        verdicts.setdefault(view.kind, set()).add(_verdict(view))
        if view.kind == "evaluation":
            tags |= headlines(view.predicate)
    for kind, found in verdicts.items():
        tags[kind] = next(word for word in _WORST_FIRST if word in found)
    for word, reason in (("revoked", revoked), ("yanked", yanked)):
        if reason is not None:
            tags[f"{_OURS}{word}"] = shown(reason, _MAX_VALUE) or "-"
    return tags


def headlines(predicate: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of an evaluation's figures, those of which something was required first."""
    found = sorted(figures(predicate.get("metrics")), key=lambda figure: not figure[2])
    return {
        _METRIC + re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100]: f"{value:.4g}"
        for name, value, _ in found[:_HEADLINES]
    }


def _verdict(view: StatementView) -> str:
    if view.kind == "scan":
        return _TEST_RESULTS.get(str(view.predicate.get("result")), "fail")
    return "pass" if view.predicate.get("verdict") == "pass" else "fail"


def figures(metrics: Any, path: str = "") -> Iterator[tuple[str, float, bool]]:
    """Yield name, value and whether something was required, from rows of a report or from nested names."""
    if isinstance(metrics, int | float) and not isinstance(metrics, bool):
        yield path or "value", float(metrics), False
    elif isinstance(metrics, list):
        for row in metrics:
            if isinstance(row, dict) and isinstance(row.get("value"), dict):
                for _, value, _ in figures(row["value"].get("value")):
                    yield str(row.get("name")), value, bool(required(row))
    elif isinstance(metrics, dict) and path.count(".") < 4:
        for name, found in metrics.items():
            yield from figures(found, f"{path}.{name}" if path else str(name))

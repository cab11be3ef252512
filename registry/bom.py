"""The bill of materials of an adapter: CycloneDX 1.6 JSON with a model card, for tools of other people.

It says nothing new. Everything is taken from the manifest and from signed statements, so that it is made when
somebody asks for it and never stored. The same manifest and statements give the same bytes. It is written as
JSON here because cyclonedx-python-lib has no class for a model card and drops one when it reads it; the tests
validate what is written against that library's strict schema.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from registry import spdx
from registry.attestation import Statement, base_uri
from registry.manifest import WEIGHTS_NAME, canonical_json
from registry.modelcard import model_card

if TYPE_CHECKING:
    from registry.manifest import AdapterManifest, Ingredient

PREFIX: Final = "adapter-foundry"
"""Of the names of our properties."""

SERVICE_KINDS: Final = frozenset({"api"})
DATA_KINDS: Final = frozenset({"dataset", "identity-images"})
MODEL_KINDS: Final = frozenset({"base", "judge", "auxiliary-model", "adapter"})
"""Kinds of ingredients by what they are in a bill of materials; code is a library."""


def bom_bytes(manifest: AdapterManifest, statements: Iterable[Statement]) -> bytes:
    """Return the bill of materials of an adapter.

    Args:
        manifest: the adapter.
        statements: what is signed about it; the caller has verified that it is believed.
    """
    told = sorted(statements, key=lambda found: (found.kind, canonical_json(dict(found.predicate))))
    parts = _Parts(manifest, told)
    content: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{PREFIX}:{manifest.digest}')}",
        # The same adapter with more statements is a newer edition of the same document.
        "version": max(1, len(told)),
        "metadata": {
            "tools": {"components": [{"type": "application", "name": PREFIX}]},
            "component": parts.adapter(),
        },
        "components": [parts.component(found) for found in parts.of(SERVICE_KINDS, within=False)],
        "services": [parts.service(found) for found in parts.of(SERVICE_KINDS)],
        "dependencies": parts.dependencies(),
    }
    finished = _finished(told)
    if finished is not None:
        content["metadata"]["timestamp"] = finished
    return json.dumps(_without_empty(content), indent=2, ensure_ascii=True, allow_nan=False).encode() + b"\n"


class _Parts:
    """The parts of one bill: every ingredient has a reference of its own, also when two have one name."""

    def __init__(self, manifest: AdapterManifest, told: Sequence[Statement]) -> None:
        self._manifest = manifest
        self._told = told
        self.reference = f"{manifest.name}:{manifest.version}"
        self._refs = [
            f"{found.kind}/{number}/{found.name}"
            for number, found in enumerate(manifest.ingredients, start=1)
        ]
        self._judged = _judged(manifest, told)

    def of(self, kinds: frozenset[str], *, within: bool = True) -> list[int]:
        """Return the indices of the ingredients whose kind is among ``kinds``, or is not."""
        found = self._manifest.ingredients
        return [index for index, one in enumerate(found) if (one.kind in kinds) == within]

    def adapter(self) -> dict[str, Any]:
        """Return the component that the bill is about."""
        manifest = self._manifest
        weights = manifest.file(WEIGHTS_NAME)
        return {
            "type": "machine-learning-model",
            "bom-ref": self.reference,
            "name": manifest.name,
            "version": str(manifest.version),
            "description": manifest.description,
            "hashes": _hashes(weights.sha256.hex, weights.blake3),
            "licenses": _licenses(manifest.license),
            "pedigree": {
                "ancestors": [
                    _without(self.component(index), "bom-ref")
                    for index in self.of(frozenset({"base", "adapter"}))
                ]
            },
            "components": [
                {
                    "type": "file",
                    "bom-ref": f"{self.reference}/{entry.path}",
                    "name": entry.path,
                    "hashes": _hashes(entry.sha256.hex, entry.blake3),
                    "properties": _properties({"size": entry.size}),
                }
                for entry in manifest.files
            ],
            "modelCard": model_card(
                manifest, self._told, [self._refs[index] for index in self.of(DATA_KINDS)]
            ),
            "properties": _properties(self._facts()),
        }

    def component(self, index: int) -> dict[str, Any]:
        """Return the component of one ingredient."""
        found, base = self._manifest.ingredients[index], self._manifest.base
        content: dict[str, Any] = {
            "type": _type(found),
            "bom-ref": self._refs[index],
            "name": found.name,
            "hashes": [] if found.digest is None else _hashes(found.digest.hex),
            "licenses": _licenses(found.license),
            "externalReferences": _where(found),
            "properties": self._about(index),
        }
        if found.kind == "base" and found.name == base.id:
            content |= {"version": base.revision, "purl": base_uri(base)}
        if found.kind in DATA_KINDS:
            custodian = {"organization": {"name": found.source}}
            content["data"] = [
                {"type": "dataset", "name": found.name, "governance": {"custodians": [custodian]}}
            ]
        return content

    def service(self, index: int) -> dict[str, Any]:
        """Return the service of an ingredient that is an interface of somebody else."""
        found = self._manifest.ingredients[index]
        return {
            "bom-ref": self._refs[index],
            "name": found.name,
            "endpoints": [found.source] if _is_url(found.source) else [],
            "x-trust-boundary": True,
            "licenses": _licenses(found.license),
            "properties": self._about(index),
        }

    def dependencies(self) -> list[dict[str, Any]]:
        """Return what the adapter was made of; ingredients tell nothing about their own."""
        return [
            {"ref": self.reference, "dependsOn": sorted(self._refs)},
            *({"ref": ref} for ref in sorted(self._refs)),
        ]

    def _about(self, index: int) -> list[dict[str, str]]:
        found = self._manifest.ingredients[index]
        judged = self._judged.get(index, {})
        return _properties(
            {
                "ingredient": found.kind,
                "source": found.source,
                "license:verdict": judged.get("verdict"),
                "license:allows": _joined(judged.get("allows")),
                "license:reasons": _joined(judged.get("reasons")),
                "license:conditions": _joined(judged.get("conditions")),
            }
        )

    def _facts(self) -> dict[str, Any]:
        manifest, training = self._manifest, self._manifest.training
        return {
            "manifest": manifest.digest,
            "lora:rank": manifest.lora.rank,
            "lora:alpha": f"{manifest.lora.alpha:g}",
            "lora:dtype": manifest.lora.dtype,
            "lora:targets": _joined(manifest.lora.targets),
            "conditioning:template": manifest.conditioning.template,
            "conditioning:expressions": _joined(manifest.conditioning.expressions),
            "training:recipe": training.recipe,
            "training:dataset": training.dataset,
            "training:seed": training.seed,
            "training:steps": training.steps,
            "training:code": training.code_version,
            "training:run": training.run_id,
            **_verdicts(self._told),
        }


def _verdicts(told: Sequence[Statement]) -> dict[str, str]:
    """Return the verdict of each kind of statement; of several that disagree the worst."""
    worst: dict[str, str] = {}
    for outcome in ("pass", "review", "fail"):
        worst |= {f"{found.kind}:verdict": outcome for found in told if found.outcome == outcome}
    worst.pop("training:verdict", None)
    return dict(sorted(worst.items()))


def _judged(manifest: AdapterManifest, told: Sequence[Statement]) -> dict[int, Mapping[str, Any]]:
    """Return what a licence statement says about each ingredient, by its index; a refusal comes first."""
    for found in sorted(told, key=lambda found: found.outcome == "pass"):
        rows = found.predicate.get("ingredients")
        if found.kind == "licence" and isinstance(rows, list) and len(rows) == len(manifest.ingredients):
            return {index: row for index, row in enumerate(rows) if isinstance(row, Mapping)}
    return {}


def _finished(told: Sequence[Statement]) -> str | None:
    """Return when the training ended, if its provenance tells; a bill without a time is the same tomorrow."""
    for found in told:
        details = found.predicate.get("runDetails")
        metadata = details.get("metadata") if isinstance(details, Mapping) else None
        finished = metadata.get("finishedOn") if isinstance(metadata, Mapping) else None
        if found.kind == "training" and isinstance(finished, str):
            return finished
    return None


def _type(found: Ingredient) -> str:
    if found.kind in DATA_KINDS:
        return "data"
    return "machine-learning-model" if found.kind in MODEL_KINDS else "library"


def _licenses(expression: str) -> list[dict[str, Any]]:
    """Return an SPDX expression as one; what is none is only a name."""
    normal = spdx.normalize(expression)
    if normal is None:
        return [{"license": {"name": expression, "acknowledgement": "declared"}}]
    return [{"expression": normal, "acknowledgement": "declared"}]


def _where(found: Ingredient) -> list[dict[str, str]]:
    return [{"type": "distribution", "url": found.source}] if _is_url(found.source) else []


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc) and not set(text) & set(' "<>\\^`{|}')


def _hashes(sha256: str, blake3: str | None = None) -> list[dict[str, str]]:
    found = [{"alg": "SHA-256", "content": sha256}]
    return found if blake3 is None else [*found, {"alg": "BLAKE3", "content": blake3}]


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"name": f"{PREFIX}:{name}", "value": str(value)}
        for name, value in values.items()
        if value is not None and value != ""
    ]


def _joined(values: Any) -> str | None:
    return ", ".join(str(value) for value in values) if isinstance(values, list | tuple) else None


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _without_empty(value: Any) -> Any:
    """Leave out what says nothing: empty texts, lists and objects."""
    if isinstance(value, dict):
        kept = {key: _without_empty(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner not in ("", [], {})}
    if isinstance(value, list):
        return [_without_empty(inner) for inner in value]
    return value

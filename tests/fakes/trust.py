"""A trust root and a publisher in memory: real keys, real envelopes, no files.

``publish()`` gives everything that ``admission.admit`` takes for one clean adapter; an attack changes one
field and calls ``admit()``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fakes.adapters import BASES, clean_adapter
from registry import attestation, licenses
from registry.admission import Policy, VerifiedAdapter, admit
from registry.attestation import DEMANDED, ROLE_OF, Kind
from registry.behaviour import behaviour_predicate
from registry.digest import Digest, digest_bytes, file_entry
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard, AdapterManifest, canonical_json
from registry.reference import Reference
from registry.scanning import scan
from registry.signing import envelope
from registry.waivers import waiver_predicate

TODAY = datetime(2026, 6, 1, 12, tzinfo=UTC)
"""When the adapters of the tests are judged."""
ROLES = ("publisher", "scanner", "evaluator", "approver")


@functools.cache
def signer(name: str) -> Any:
    """The ed25519 signer called ``name``; the same one whenever it is asked for in a test run."""
    from securesystemslib.signer import CryptoSigner

    return CryptoSigner.generate_ed25519()


def public_key(name: str) -> envelope.PublicKey:
    """The public key of ``signer(name)``."""
    return envelope.PublicKey.of(signer(name).public_key)


@dataclass(frozen=True, kw_only=True)
class FakeTrust:
    """A TrustView in memory: role -> signers, role -> threshold, digest -> reason of a revocation."""

    signers: Mapping[str, Sequence[str]] = field(default_factory=lambda: {role: (role,) for role in ROLES})
    thresholds: Mapping[str, int] = field(default_factory=dict)
    revoked: Mapping[Digest, str] = field(default_factory=dict)

    def keys(self, role: str) -> Sequence[envelope.PublicKey]:
        """The keys of a role."""
        return [public_key(name) for name in self.signers.get(role, ())]

    def threshold(self, role: str) -> int:
        """How many of them must sign."""
        return self.thresholds.get(role, 1)

    def is_revoked(self, digest: Digest) -> str | None:
        """Why a digest was revoked."""
        return self.revoked.get(digest)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Everything that ``admit`` takes; ``dataclasses.replace`` changes one part."""

    manifest: bytes
    files: Mapping[str, bytes]
    statements: tuple[bytes, ...]
    trust: FakeTrust
    policy: Policy
    expected: Digest
    reference: Reference

    def admit(self) -> VerifiedAdapter:
        """Run admission on it."""
        return admit(
            self.manifest, self.files, self.statements, self.trust, self.policy, self.expected, self.reference
        )


def predicate(kind: Kind, manifest: AdapterManifest, weights: bytes) -> dict[str, Any]:
    """An honest predicate of each kind."""
    card = manifest.card
    if kind == "training":
        return attestation.training_predicate(manifest, builder="https://example.org/trainer")
    if kind == "licence":
        return attestation.licence_predicate(licenses.judge(card), card)
    if kind == "scan":
        return attestation.scan_predicate(scan(weights, card, bases=BASES))
    if kind == "evaluation":
        return attestation.evaluation_predicate({"verdict": "pass", "metrics": {"top1": 0.93}})
    if kind == "behaviour":
        return behaviour_predicate(probe(manifest))
    if kind == "waiver":
        return waiver(manifest)
    if kind == "reproduction":
        return reproduction(manifest)
    return attestation.approval_predicate(by="a person", reason="looks right", at="2026-01-01T00:00:00Z")


def probe(
    manifest: AdapterManifest, verdict: str = "pass", pairs: Mapping[Digest, str] | None = None
) -> dict[str, Any]:
    """What a probe of an adapter reports; ``pairs`` are weights of partners and the verdict about each."""
    return {
        "verdict": verdict,
        "weights": {"sha256": manifest.file(WEIGHTS_NAME).sha256.hex},
        "base": {"id": manifest.base.id, "revision": manifest.base.revision},
        "probe": {"version": "1", "vocabulary": digest_bytes(b"words").hex, "population": None},
        "statistics": {"outlier_gap": 0.25, "diversity": 1.5},
        "p_values": {"outlier_gap": 0.4},
        "tokens": [{"text": "happy", "score": 2.5}, {"text": "\\u0430pple", "score": 1.25}],
        "pairs": [
            {"with": str(partner), "verdict": said, "score": 0.5} for partner, said in (pairs or {}).items()
        ],
    }


MACHINE: dict[str, Any] = {
    "processor": "Imaginary 9000",
    "instructions": "AVX512",
    "accelerator": None,
    "processes": 1,
    "threads": 2,
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "numpy": "2.4.0"},
}


def reproduction(manifest: AdapterManifest, outcome: str = "identical", **more: Any) -> dict[str, Any]:
    """What making an adapter again says; a different one differs in half of its update."""
    weights = manifest.file(WEIGHTS_NAME).sha256.hex
    same = {"released": str(manifest.training.dataset), "rebuilt": str(manifest.training.dataset)}
    code = str(digest_bytes(b"sources"))
    found: dict[str, Any] = {
        "outcome": outcome,
        "at": "2026-01-01T00:00:00Z",
        "weights": {"sha256": weights},
        "rebuilt": {"sha256": weights},
        "recipe": str(manifest.training.recipe),
        "dataset": same,
        "dataset_reused": False,
        "code": {"released": code, "rebuilt": code},
        "machine": MACHINE,
        "released_machine": MACHINE,
        "difference": None,
        "metrics": [],
        "notes": [],
    }
    if outcome != "identical":
        apart = 0.5 if outcome == "different" else 1e-6
        found["rebuilt"] = {"sha256": digest_bytes(b"rebuilt").hex}
        found["difference"] = {"relative": apart, "cosine": 0.9, "tolerance": 0.1}
        found["metrics"] = [
            {"name": "top1_accuracy", "released": 0.9, "rebuilt": 0.91, "low": 0.85, "high": 1.0}
        ]
    return found | more


def waiver(
    manifest: AdapterManifest, *rules: str, at: datetime = TODAY, days: int = 30, **more: Any
) -> dict[str, Any]:
    """A waiver of some rules (a module that does nothing) over an adapter's weights."""
    weights = manifest.file(WEIGHTS_NAME).sha256
    given = {"reason": "left out on purpose", "by": "a person", "max_days": 10_000, **more}
    return waiver_predicate(weights, rules or ("ADP-NUM-004",), at=at, days=days, **given)


def signed(
    kind: Kind,
    name: str,
    digest: Digest,
    values: Mapping[str, Any],
    signers: Sequence[str] | None = None,
) -> bytes:
    """An envelope around a statement, honest or not, signed by its role or by ``signers``."""
    content = json.loads(attestation.statement("training", name, digest, values))
    payload = canonical_json(content | {"predicateType": attestation.PREDICATE_TYPES[kind]})
    return envelope.sign(payload, [signer(who) for who in (signers or (ROLE_OF[kind],))])


def publish(
    files: Mapping[str, bytes] | None = None,
    *,
    name: str = "pixelsmile",
    version: int = 3,
    kinds: Sequence[Kind] = DEMANDED,
    predicates: Mapping[Kind, Mapping[str, Any]] | None = None,
    manifest: AdapterManifest | None = None,
    stored: bytes | None = None,
) -> Published:
    """A published adapter: manifest, files, all statements and the trust root that believes them.

    Args:
        files: the adapter folder; a clean one by default.
        name: name of the adapter.
        version: its version.
        kinds: which statements are signed.
        predicates: predicates that replace the honest ones.
        manifest: a manifest that replaces the honest one.
        stored: bytes of the manifest that replace its canonical form; everything is signed over them.
    """
    files = clean_adapter() if files is None else dict(files)
    if manifest is None:
        manifest = AdapterManifest.make(
            AdapterCard.parse(files[CARD_NAME]),
            name=name,
            version=version,
            files=tuple(file_entry(path, files[path]) for path in (CARD_NAME, WEIGHTS_NAME)),
        )
    stored = manifest.canonical_bytes() if stored is None else stored
    digest = digest_bytes(stored)
    honest = {kind: predicate(kind, manifest, files[WEIGHTS_NAME]) for kind in kinds}
    told = {**honest, **(predicates or {})}
    return Published(
        manifest=stored,
        files=files,
        statements=tuple(signed(kind, f"{name}:{version}", digest, told[kind]) for kind in kinds),
        trust=FakeTrust(),
        policy=Policy(bases=BASES, at=TODAY),
        expected=digest,
        reference=Reference(name=name, alias="prod"),
    )

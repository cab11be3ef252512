"""Attacks on admission: one or more for each numbered step of docs/threat-model.md.

Every attack begins with an adapter that was honestly published and changes one thing, as who controls the
store, the index or a stolen key could. Without its step the attack is admitted, or refused by something else
for another reason; both fail the test.
"""

from __future__ import annotations

import base64
import copy
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.adapters import BASES, TINY_BASE, card, changed, clean_adapter, container, factors, folder
from fakes.trust import FakeTrust, Published, predicate, public_key, publish, signed, signer
from registry import admission, attestation
from registry.admission import Origin, Policy, VerifiedAdapter, admit_candidate
from registry.attestation import DEMANDED, Kind
from registry.digest import digest_bytes
from registry.errors import (
    BadSignature,
    DigestMismatch,
    IdentityMismatch,
    InvalidDocument,
    LicenseRefused,
    NeedsReview,
    PolicyRefused,
    RegistryError,
    Revoked,
    ScanRefused,
    Unsigned,
)
from registry.formats import read_header
from registry.manifest import CARD_NAME, MAX_CARD_BYTES, WEIGHTS_NAME, AdapterManifest
from registry.reference import Reference
from registry.signing import envelope

NAME = "pixelsmile:3"


# --- 1 to 5: the manifest ---------------------------------------------------------------------------------


def too_many_statements() -> Published:
    honest = publish()
    return replace(honest, statements=honest.statements * 20)


def huge_card() -> Published:
    honest = publish()
    padded = {**honest.files, CARD_NAME: honest.files[CARD_NAME] + b" " * MAX_CARD_BYTES}
    return replace(honest, files=padded)


def huge_manifest() -> Published:
    honest = publish()
    return replace(honest, manifest=honest.manifest + b" " * (2 << 20))


def rewritten_manifest() -> Published:
    """The store changes a field that nothing else holds."""
    honest = publish()
    return replace(honest, manifest=honest.manifest.replace(b"a tiny adapter", b"an evil adapter"))


def loose_manifest() -> Published:
    """Signed by everybody, but with two spellings one manifest could have two digests."""
    return publish(stored=b" " + publish().manifest)


def renamed() -> Published:
    """The index answers with another adapter, genuine by itself."""
    return replace(publish(name="villain"), reference=Reference(name="pixelsmile", alias="prod"))


def older_version() -> Published:
    return replace(publish(version=2), reference=Reference(name="pixelsmile", version=3))


def other_digest() -> Published:
    return replace(publish(), reference=Reference(name="pixelsmile", digest=digest_bytes(b"another")))


def revoked_manifest() -> Published:
    honest = publish()
    return replace(honest, trust=FakeTrust(revoked={honest.expected: "leaked"}))


def revoked_weights() -> Published:
    """The revoked bytes are pushed again under a new version."""
    honest = publish(version=4)
    revoked = digest_bytes(honest.files[WEIGHTS_NAME])
    return replace(honest, trust=FakeTrust(revoked={revoked: "backdoored"}))


# --- 6 to 9: the statements -------------------------------------------------------------------------------


def lacking(kind: Kind) -> Published:
    return publish(kinds=[other for other in DEMANDED if other != kind])


def swapped(honest: Published, kind: Kind, data: bytes) -> Published:
    """``honest`` with the statement of one kind replaced."""
    statements = list(honest.statements)
    statements[DEMANDED.index(kind)] = data
    return replace(honest, statements=tuple(statements))


def honest_predicate(honest: Published, kind: Kind) -> dict[str, Any]:
    return predicate(kind, AdapterManifest.parse(honest.manifest), honest.files[WEIGHTS_NAME])


def signed_by(kind: Kind, *signers: str) -> Published:
    honest = publish()
    return swapped(honest, kind, signed(kind, NAME, honest.expected, honest_predicate(honest, kind), signers))


def edited_payload() -> Published:
    """A failed evaluation is turned into a passed one behind its signature."""
    honest = publish(predicates={"evaluation": {"verdict": "fail"}})
    document = json.loads(honest.statements[DEMANDED.index("evaluation")])
    payload = base64.b64decode(document["payload"]).replace(b'"fail"', b'"pass"')
    document["payload"] = base64.b64encode(payload).decode()
    return swapped(honest, "evaluation", json.dumps(document).encode())


def without_signature() -> Published:
    honest = publish()
    document = json.loads(honest.statements[DEMANDED.index("approval")])
    return swapped(honest, "approval", json.dumps({**document, "signatures": []}).encode())


def below_threshold() -> Published:
    trust = FakeTrust(
        signers={**FakeTrust().signers, "approver": ("approver", "second approver")},
        thresholds={"approver": 2},
    )
    return replace(publish(), trust=trust)


def one_key_counted_twice() -> Published:
    """One approver signs twice, under two key ids."""
    honest = replace(publish(), trust=FakeTrust(thresholds={"approver": 2}))
    document = json.loads(honest.statements[DEMANDED.index("approval")])
    document["signatures"] = [*document["signatures"], {**document["signatures"][0], "keyid": "0" * 64}]
    return swapped(honest, "approval", json.dumps(document).encode())


TWO_APPROVERS = FakeTrust(
    signers={**FakeTrust().signers, "approver": ("approver", "second approver", "third approver")},
    thresholds={"approver": 2},
)


def approved_by(
    *envelopes: tuple[str, ...], trust: FakeTrust = TWO_APPROVERS, approvals: int = 1
) -> Published:
    """An adapter with one approval for each tuple of signers, under other words so that all are kept."""
    honest = publish(kinds=[kind for kind in DEMANDED if kind != "approval"])
    extra = (
        signed(
            "approval",
            NAME,
            honest.expected,
            attestation.approval_predicate(
                by=who[0], reason=f"looks right ({number})", at="2026-01-01T00:00:00Z"
            ),
            who,
        )
        for number, who in enumerate(envelopes)
    )
    policy = Policy(bases=BASES, approvals=approvals)
    return replace(honest, statements=(*honest.statements, *extra), trust=trust, policy=policy)


def one_approver_under_two_key_ids() -> Published:
    """Two approvals, each under another key id, by one key that the trust root lists twice."""
    twin = replace(public_key("approver"), keyid="0" * 64)

    class ListedTwice(FakeTrust):
        def keys(self, role: str) -> Any:
            return [*super().keys(role), twin] if role == "approver" else super().keys(role)

    attack = approved_by(("approver",), ("approver",), trust=ListedTwice(thresholds={"approver": 2}))
    document = json.loads(attack.statements[-1])
    document["signatures"][0]["keyid"] = twin.keyid
    return replace(attack, statements=(*attack.statements[:-1], json.dumps(document).encode()))


def removed_key() -> Published:
    """The evaluator's key was rotated away; its old signatures do not count any more."""
    return replace(
        publish(), trust=FakeTrust(signers={**FakeTrust().signers, "evaluator": ("new evaluator",)})
    )


def unsigned_addition() -> Published:
    """A statement that nobody asked for, by nobody."""
    honest = publish()
    extra = signed("evaluation", NAME, honest.expected, {"verdict": "pass"}, ["nobody"])
    return replace(honest, statements=(*honest.statements, extra))


def foreign_payload_type() -> Published:
    """The role signed these bytes, but as something that is no statement."""
    from securesystemslib.dsse import Envelope

    honest = publish()
    payload = attestation.statement("approval", NAME, honest.expected, honest_predicate(honest, "approval"))
    odd = Envelope(payload, "text/plain", {})
    odd.sign(signer("approver"))
    return swapped(honest, "approval", json.dumps(odd.to_dict()).encode())


def unknown_predicate() -> Published:
    honest = publish()
    payload = attestation.statement("approval", NAME, honest.expected, honest_predicate(honest, "approval"))
    odd = payload.replace(b"approval/v1", b"approval/v9")
    return replace(honest, statements=(*honest.statements, envelope.sign(odd, [signer("approver")])))


def two_subjects() -> Published:
    """A statement about two adapters could be shown for the wrong one."""
    honest = publish()
    payload = json.loads(
        attestation.statement("approval", NAME, honest.expected, honest_predicate(honest, "approval"))
    )
    payload["subject"] *= 2
    return swapped(honest, "approval", envelope.sign(json.dumps(payload).encode(), [signer("approver")]))


def approval_of(name: str, digest: bytes | None) -> Published:
    """A genuine approval, of something else."""
    honest = publish()
    about = honest.expected if digest is None else digest_bytes(digest)
    return swapped(honest, "approval", signed("approval", name, about, honest_predicate(honest, "approval")))


def trained(name: str, digest: bytes | None) -> Published:
    """A genuine training statement, of something else."""
    honest = publish()
    about = honest.expected if digest is None else digest_bytes(digest)
    return swapped(honest, "training", signed("training", name, about, honest_predicate(honest, "training")))


def told(kind: Kind, **changes: Any) -> Published:
    return publish(predicates={kind: {**honest_predicate(publish(), kind), **changes}})


def other_materials() -> Published:
    manifest = AdapterManifest.parse(publish().manifest)
    told = attestation.training_predicate(manifest, builder="https://example.org/trainer")
    told = changed(told, "buildDefinition.externalParameters.recipe", digest_bytes(b"another recipe"))
    return publish(predicates={"training": told})


def outvoted_refusal() -> Published:
    """The evaluation failed; a second one, genuine too, passed."""
    honest = publish()
    refusal = signed("evaluation", NAME, honest.expected, {"verdict": "fail"})
    return replace(honest, statements=(refusal, *honest.statements))


# --- 10 to 13: licences, files, scan ----------------------------------------------------------------------


def licensed(path: str, value: Any) -> Published:
    """Pushed with a stolen publisher key that signs a passing licence statement."""
    files = folder(clean_adapter()[WEIGHTS_NAME], changed(card(), path, value))
    honest = honest_predicate(publish(), "licence")
    return publish(files, predicates={"licence": honest})


def flipped_bit() -> Published:
    """The last bit of one number: every number is plausible, only the digest knows."""
    honest = publish()
    weights = bytearray(honest.files[WEIGHTS_NAME])
    weights[-512] ^= 1
    return replace(honest, files={**honest.files, WEIGHTS_NAME: bytes(weights)})


def swapped_weights() -> Published:
    honest = publish()
    return replace(honest, files={**honest.files, WEIGHTS_NAME: clean_adapter(seed=1)[WEIGHTS_NAME]})


def missing(name: str) -> Published:
    honest = publish()
    return replace(honest, files={path: data for path, data in honest.files.items() if path != name})


def with_file(name: str) -> Published:
    honest = publish()
    return replace(honest, files={**honest.files, name: pickle.dumps([1])})


def two_cards() -> Published:
    """The manifest that was signed promises another licence than the card that users read."""
    files = clean_adapter()
    other = changed(card(), "description", "free for everybody")
    manifest = changed(
        json.loads(publish(folder(files[WEIGHTS_NAME], other)).manifest), "description", "not so"
    )
    return publish(
        folder(files[WEIGHTS_NAME], other),
        manifest=AdapterManifest.parse(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()),
    )


def blocked_weights() -> Published:
    """Pushed with stolen publisher and scanner keys: the scan statement says PASSED."""
    files = folder(container({**factors(), "vae.conv.lora_A.weight": np.ones((4, 4), np.float32)}), card())
    return publish(files, predicates={"scan": honest_predicate(publish(), "scan")})


def reviewed_weights() -> Published:
    values = factors()
    values["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] *= 0
    files = folder(container(values), card())
    return publish(files, predicates={"scan": honest_predicate(publish(), "scan")})


ATTACKS: dict[str, tuple[int, Callable[[], Published], type[RegistryError], str]] = {
    "a hundred statements": (1, too_many_statements, PolicyRefused, "the statements: 100"),
    "a card of a megabyte": (1, huge_card, PolicyRefused, "adapter.json: "),
    "a manifest of two megabytes": (1, huge_manifest, PolicyRefused, "the manifest: "),
    "the store rewrites the manifest": (2, rewritten_manifest, DigestMismatch, "expected was"),
    "a manifest with two spellings": (3, loose_manifest, InvalidDocument, "canonical"),
    "another adapter for the name": (4, renamed, IdentityMismatch, "got villain:3"),
    "an older version for the number": (4, older_version, IdentityMismatch, "got pixelsmile:2"),
    "another digest than was asked for": (4, other_digest, IdentityMismatch, "asked for pixelsmile@sha256"),
    "a revoked adapter": (5, revoked_manifest, Revoked, "leaked"),
    "revoked weights under a new version": (5, revoked_weights, Revoked, "backdoored"),
    **{
        f"no {kind} statement": (6, lambda kind=kind: lacking(kind), Unsigned, kind)  # type: ignore[misc]
        for kind in DEMANDED
    },
    "a statement without signatures": (7, without_signature, Unsigned, "no signature"),
    "the publisher signs the approval": (
        7,
        lambda: signed_by("approval", "publisher"),
        BadSignature,
        "approver",
    ),
    "the publisher signs the scan": (7, lambda: signed_by("scan", "publisher"), BadSignature, "scanner"),
    "a stranger signs the training": (
        7,
        lambda: signed_by("training", "stranger"),
        BadSignature,
        "publisher",
    ),
    "a failed evaluation is edited": (7, edited_payload, BadSignature, "evaluator"),
    "one approver of two": (7, below_threshold, BadSignature, "1 of the 2"),
    "one approver counted twice": (7, one_key_counted_twice, BadSignature, "1 of the 2"),
    "k-1 of k approvals": (7, lambda: approved_by(("approver",)), BadSignature, "1 of the 2"),
    "k-1 of the policy's k approvals": (
        7,
        lambda: approved_by(("approver",), ("second approver",), approvals=3),
        BadSignature,
        "2 of the 3",
    ),
    "the policy asks for fewer approvals than the trust root": (
        7,
        lambda: approved_by(("approver",), approvals=0),
        BadSignature,
        "1 of the 2",
    ),
    "one approver approves twice": (
        7,
        lambda: approved_by(("approver",), ("approver",)),
        BadSignature,
        "1 of the 2",
    ),
    "one approver approves twice under two key ids": (
        7,
        one_approver_under_two_key_ids,
        BadSignature,
        "1 of the 2",
    ),
    "a publisher pads the approvals": (
        7,
        lambda: approved_by(("approver",), ("publisher",)),
        BadSignature,
        "approver",
    ),
    "a publisher signs beside an approver": (
        7,
        lambda: approved_by(("approver", "publisher")),
        BadSignature,
        "1 of the 2",
    ),
    "a key that was rotated away": (7, removed_key, BadSignature, "evaluator"),
    "an additional statement by nobody": (7, unsigned_addition, BadSignature, "evaluator"),
    "a signature over another payload type": (7, foreign_payload_type, BadSignature, "payload type"),
    "a statement of an unknown kind": (6, unknown_predicate, BadSignature, "unknown kind"),
    "a statement about two subjects": (6, two_subjects, BadSignature, "subject"),
    "the approval of other bytes": (
        8,
        lambda: approval_of(NAME, b"other"),
        BadSignature,
        "not about pixelsmile:3",
    ),
    "the approval of another version": (
        8,
        lambda: approval_of("pixelsmile:2", None),
        BadSignature,
        "pixelsmile:2",
    ),
    "the evaluation failed": (9, lambda: told("evaluation", verdict="fail"), PolicyRefused, "evaluation"),
    "the licence check failed": (9, lambda: told("licence", verdict="fail"), PolicyRefused, "licence"),
    "the approver refuses": (9, lambda: told("approval", verdict="fail"), PolicyRefused, "approval"),
    "the scan failed": (9, lambda: told("scan", result="FAILED"), PolicyRefused, "scan"),
    "the scan says nothing": (9, lambda: told("scan", result=None), PolicyRefused, "scan"),
    "the scan warns": (9, lambda: told("scan", result="WARNED"), NeedsReview, "scan"),
    "trained from another recipe": (9, other_materials, PolicyRefused, "other materials than"),
    "provenance of another recipe": (9, other_materials, PolicyRefused, "ADP-PRV-001"),
    "no provenance": (6, lambda: lacking("training"), Unsigned, "ADP-PRV-001"),
    "provenance of other bytes": (8, lambda: trained(NAME, b"other"), BadSignature, "ADP-PRV-001"),
    "provenance of another version": (8, lambda: trained("pixelsmile:2", None), BadSignature, "ADP-PRV-001"),
    "a refusal is outvoted": (9, outvoted_refusal, PolicyRefused, "evaluation"),
    "a non-commercial dataset": (
        10,
        lambda: licensed("ingredients.1.license", "CC-BY-NC-4.0"),
        LicenseRefused,
        "tiny portraits",
    ),
    "a licence that nobody knows": (
        10,
        lambda: licensed("ingredients.1.license", "LicenseRef-Secret"),
        LicenseRefused,
        "tiny portraits",
    ),
    "a base under a false licence": (
        10,
        lambda: licensed("base.license", "MIT"),
        LicenseRefused,
        "the card says",
    ),
    "a hidden dataset": (
        10,
        lambda: licensed("ingredients", card()["ingredients"][:1]),
        LicenseRefused,
        "dataset",
    ),
    "one bit of the weights": (11, flipped_bit, DigestMismatch, WEIGHTS_NAME),
    "the weights of another adapter": (11, swapped_weights, DigestMismatch, WEIGHTS_NAME),
    "no weights": (11, lambda: missing(WEIGHTS_NAME), DigestMismatch, "lacks"),
    "no card": (11, lambda: missing(CARD_NAME), DigestMismatch, "lacks"),
    "a pickle beside the weights": (
        11,
        lambda: with_file("adapter_model.bin"),
        DigestMismatch,
        "adapter_model",
    ),
    "a path that climbs out": (11, lambda: with_file("../evil"), DigestMismatch, "evil"),
    "a card that says something else": (12, two_cards, IdentityMismatch, CARD_NAME),
    "weights that the scanner blocks": (13, blocked_weights, ScanRefused, "ADP-STR-002"),
    "weights that need a review": (13, reviewed_weights, NeedsReview, "ADP-NUM-004"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused(name: str) -> None:
    _, build, error, evidence = ATTACKS[name]
    attack = build()
    with pytest.raises(RegistryError) as caught:
        attack.admit()
    assert type(caught.value) is error
    assert evidence in str(caught.value)
    assert caught.value.mend


def test_the_honest_adapter_is_admitted() -> None:
    honest = publish()
    adapter = honest.admit()
    assert adapter.origin is Origin.REGISTRY
    assert adapter.digest == honest.expected
    assert adapter.reference == NAME
    assert adapter.scan.verdict == "pass"


def test_a_threshold_of_two_is_met_by_two() -> None:
    trust = FakeTrust(
        signers={**FakeTrust().signers, "approver": ("approver", "second approver")},
        thresholds={"approver": 2},
    )
    assert replace(signed_by("approval", "approver", "second approver"), trust=trust).admit()


def test_approvals_are_counted_over_their_envelopes() -> None:
    """Two people approve on two machines: each adds a statement of their own."""
    assert approved_by(("approver",), ("third approver",)).admit()
    assert approved_by(("approver",), ("second approver",), ("third approver",), approvals=3).admit()


def test_approvals_that_nobody_requires_are_not_counted() -> None:
    """The first of two approvers does not lock the adapter for stages that need none."""
    first = approved_by(("approver",))
    needed = tuple(kind for kind in DEMANDED if kind != "approval")
    assert replace(first, policy=Policy(bases=BASES, required=needed)).admit()


def test_a_policy_may_allow_reviewed_adapters() -> None:
    attack = reviewed_weights()
    assert replace(attack, policy=Policy(bases=BASES, allow_review=True)).admit().scan.verdict == "review"


def test_step_14_nothing_but_tensors_is_loaded() -> None:
    """Metadata, order and spelling of the file that was pushed do not reach a loader."""
    values = factors()
    hidden = folder(container(values, metadata={"format": "pt", "note": "a channel"}), card())
    plain = folder(container(dict(reversed(values.items())), metadata={}), card())
    first, second = publish(hidden).admit(), publish(plain).admit()
    assert first.weights == second.weights
    assert b"a channel" not in first.weights
    assert dict(read_header(first.weights).metadata) == {"format": "pt"}


# --- the proof itself -------------------------------------------------------------------------------------


def fields(adapter: VerifiedAdapter) -> dict[str, Any]:
    return {
        name: getattr(adapter, name) for name in VerifiedAdapter.__match_args__ or VerifiedAdapter.__slots__
    }


FORGERIES: dict[str, Callable[[VerifiedAdapter], object]] = {
    "by its constructor": lambda adapter: VerifiedAdapter(**fields(adapter)),
    "with a token of its own": lambda adapter: VerifiedAdapter(**fields(adapter), token=object()),
    "by replacing its weights": lambda adapter: replace(adapter, weights=b"evil"),
    "by copying it": copy.copy,
    "by a deep copy": copy.deepcopy,
    "by pickling it": pickle.dumps,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_only_admission_makes_a_verified_adapter(name: str) -> None:
    adapter = publish().admit()
    with pytest.raises(TypeError, match="admit"):
        FORGERIES[name](adapter)


def test_a_verified_adapter_cannot_be_changed() -> None:
    adapter = publish().admit()
    with pytest.raises(AttributeError):
        adapter.weights = b"evil"  # type: ignore[misc]


# --- candidates -------------------------------------------------------------------------------------------

CANDIDATES: dict[str, tuple[Callable[[], dict[str, bytes]], type[RegistryError], str]] = {
    "a card of a megabyte": (lambda: dict(huge_card().files), PolicyRefused, "adapter.json: "),
    "no weights": (lambda: dict(missing(WEIGHTS_NAME).files), DigestMismatch, "lacks"),
    "a pickle beside the weights": (lambda: dict(with_file("a.bin").files), DigestMismatch, "a.bin"),
    "a card that is none": (lambda: folder(b"", {"name": "x"}), InvalidDocument, "Field required"),
    "a non-commercial dataset": (
        lambda: dict(licensed("ingredients.1.license", "CC-BY-NC-4.0").files),
        LicenseRefused,
        "tiny portraits",
    ),
    "weights that the scanner blocks": (lambda: dict(blocked_weights().files), ScanRefused, "ADP-STR-002"),
    "weights that need a review": (lambda: dict(reviewed_weights().files), NeedsReview, "ADP-NUM-004"),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_hostile_candidate_is_refused(name: str) -> None:
    build, error, evidence = CANDIDATES[name]
    with pytest.raises(RegistryError) as caught:
        admit_candidate(build(), Policy(bases=BASES))
    assert type(caught.value) is error
    assert evidence in str(caught.value)


def test_a_candidate_says_that_it_is_one() -> None:
    adapter = admit_candidate(clean_adapter(), Policy(bases=BASES))
    assert adapter.origin is Origin.CANDIDATE
    assert adapter.manifest is None
    assert adapter.reference is None
    assert adapter.digest == digest_bytes(adapter.weights)
    assert adapter.card.base.id == TINY_BASE.id


# --- the order, as documented -----------------------------------------------------------------------------


def documented_steps(repository: Path) -> dict[int, str]:
    text = (repository / "docs" / "threat-model.md").read_text()
    return {int(number): title for number, title in re.findall(r"^(\d+)\. \*\*(.+?)\*\*", text, re.MULTILINE)}


def test_the_steps_of_the_code_are_those_of_the_threat_model(repository: Path) -> None:
    source = Path(admission.__file__).read_text()
    body = source[source.index("def admit(") : source.index("def admit_candidate(")]
    steps = re.findall(r"^    # (\d+)\. (.+)\.$", body, re.MULTILINE)
    in_code = sorted((int(number), text) for number, text in steps)
    documented = documented_steps(repository)
    assert [number for number, _ in in_code] == list(range(1, len(in_code) + 1))
    assert dict(in_code) == documented
    assert tuple(text for _, text in in_code) == admission.STEPS


def test_every_step_has_an_attack(repository: Path) -> None:
    attacked = {step for step, *_ in ATTACKS.values()} | {14}  # step 14 has its own test above
    assert attacked == set(documented_steps(repository))


def test_a_step_answers_before_the_steps_behind_it() -> None:
    """A revoked adapter is called revoked even when its statements are gone and its bytes are changed."""
    attack = replace(revoked_manifest(), statements=(), files=flipped_bit().files)
    with pytest.raises(Revoked):
        attack.admit()


def test_the_threat_model_names_real_tests(repository: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", (repository / "docs" / "threat-model.md").read_text()))
    attacks = "".join(path.read_text() for path in (repository / "tests").rglob("test_*.py"))
    assert named <= set(re.findall(r"^def (test_\w+)", attacks, re.MULTILINE))

"""Attacks on the approval of a release: only approvers' signatures over this very manifest promote it.

Each attack goes through the question of a waiting release (`flows.approvals.settle`) against a real registry.
The answers are given by a desk that has them ready; that Prefect gives them in the same way is shown in
tests/integration/test_release_flow.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import NAME, PASSING, adapter_folder, copy_registry
from registry import approving, attestation
from registry.client import Registry
from registry.digest import Digest
from registry.errors import BadSignature, PolicyRefused, RegistryError, Unsigned, UsageError
from registry.reference import Reference
from registry.signing import envelope, keys
from registry.signing.signers import KeyRing, pem_of
from registry.storage import shelf

REFERENCE = Reference(name=NAME, version=2)
WEEK = timedelta(days=7)


class Waits(Exception):
    """The run waits for another answer."""


@dataclass
class Desk:
    """A desk at which people have left their answers."""

    answers: list[Any] = field(default_factory=list)
    since: datetime | None = None
    asked: str = ""

    def answer(self, attempt: int) -> Any:
        return self.answers[attempt - 1] if attempt <= len(self.answers) else None

    def ask(self, attempt: int, text: str, seconds: int) -> Any:
        self.asked = text
        raise Waits(text)


@pytest.fixture
def registry(home: Path, tmp_path: Path) -> Registry:
    """Version 1 is approved and in production, version 2 waits."""
    found = copy_registry(home)
    found.push(adapter_folder(tmp_path / "new", seed=1), NAME, evaluation=PASSING)
    return found


def yes(text: str = "") -> Any:
    from flows.approvals import Decision

    return Decision(decision="approve", reason="looks right", reviewer="Mallory", envelope=text)


def no() -> Any:
    from flows.approvals import Decision

    return Decision(decision="reject", reason="no", reviewer="Mallory")


def settle(registry: Registry, *answers: Any, again: bool = False) -> approving.Approvals:
    """What a release does that has got these answers; raises `Waits` if it asks once more."""
    from flows.approvals import Wanted
    from flows.approvals import settle as work

    digest = registry.show(REFERENCE).listed.digest
    wanted = Wanted(reference=REFERENCE, digest=digest, alias="prod")
    desk = Desk(list(answers), datetime.now(UTC) if answers else None)
    return work(registry, desk, wanted, again=again, timeout=WEEK, show=lambda: None)


def signed(
    ring: KeyRing, registry: Registry, *, version: int = 2, role: str = "approver", **changes: Any
) -> str:
    """An envelope about a version, with parts of it changed before it is signed."""
    digest = registry.show(f"{NAME}:{version}").listed.digest
    values = {"by": "Lou", "reason": "looks right", "at": "2026-01-01T00:00:00+00:00"}
    predicate = attestation.approval_predicate(**values) | changes.pop("predicate", {})
    name = changes.pop("name", f"{NAME}:{version}")
    payload = attestation.statement(changes.pop("kind", "approval"), name, digest, predicate)
    assert not changes
    return envelope.sign(payload, [ring.signer(role)]).decode()


def stranger(home: Path) -> KeyRing:
    """Somebody with a key that no root lists."""
    ring = KeyRing(folder=home.parent / "stranger")
    keys.make(ring, "approver")
    return ring


def edited(text: str) -> str:
    """The same envelope with another reason in its payload."""
    fields = json.loads(text)
    payload = json.loads(base64.b64decode(fields["payload"]))
    payload["predicate"]["reason"] = "something else"
    fields["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    return json.dumps(fields)


def unsigned(text: str) -> str:
    return json.dumps(json.loads(text) | {"signatures": []})


Attack = Callable[[Registry, Path], str]
ENVELOPES: dict[str, tuple[Attack, str]] = {
    "a stranger's key": (lambda r, h: signed(stranger(h), r), "no key of the approver"),
    "the publisher's key": (lambda r, h: signed(r.keys, r, role="publisher"), "no key of the approver"),
    "another version": (lambda r, h: signed(r.keys, r, version=1), "is about pixelsmile:1"),
    "this name over another digest": (
        lambda r, h: signed(r.keys, r, version=1, name=f"{NAME}:2"), "is about pixelsmile:2",
    ),
    "another name over this digest": (
        lambda r, h: signed(r.keys, r, name="watercolour:2"), "is about watercolour:2",
    ),
    "an edited payload": (lambda r, h: edited(signed(r.keys, r)), "no key of the approver"),
    "no signature": (lambda r, h: unsigned(signed(r.keys, r)), "carries no signature"),
    "an automatic approval": (
        lambda r, h: signed(r.keys, r, predicate={"automatic": True}), "automatic: no person looked",
    ),
    "an approval that does not say whether somebody looked": (
        lambda r, h: signed(r.keys, r, predicate={"automatic": None}), "automatic: no person looked",
    ),
    "a refusal as an approval": (
        lambda r, h: signed(r.keys, r, predicate={"verdict": "fail"}), "was rejected by",
    ),
    "an evaluation by the approver's key": (
        lambda r, h: signed(r.keys, r, kind="evaluation", predicate={"verdict": "pass"}),
        "no key of the evaluator",
    ),
    "a waiver by the approver's key": (
        lambda r, h: waiver(r), "no approval",
    ),
    "no JSON": (lambda r, h: "yes, I approve", "not a DSSE envelope"),
    "nested JSON": (lambda r, h: "[" * 100_000, "not a DSSE envelope"),
}  # fmt: skip


def waiver(registry: Registry) -> str:
    """A genuine statement of the approver about this version, which is no approval."""
    from registry.waivers import waiver_predicate

    found = registry.show(REFERENCE).manifest
    told = waiver_predicate(
        found.files[0].sha256,
        ("ADP-NUM-004",),
        by="Lou",
        reason="fine",
        at=datetime.now(UTC),
        days=1,
        max_days=9,
    )
    payload = attestation.statement("waiver", str(REFERENCE), found.digest, told)
    return envelope.sign(payload, [registry.keys.signer("approver")]).decode()


@pytest.mark.parametrize("name", ENVELOPES)
def test_an_envelope_that_proves_nothing_is_refused_and_not_kept(
    registry: Registry, home: Path, name: str
) -> None:
    attack, why = ENVELOPES[name]
    before = shelf.read_statements(registry.store, registry.show(REFERENCE).listed.digest)
    with pytest.raises(Waits) as waits:
        settle(registry, yes(attack(registry, home)))
    assert why in str(waits.value).replace("\\", "")
    assert "0 of 1 approvals" in str(waits.value)
    assert shelf.read_statements(registry.store, registry.show(REFERENCE).listed.digest) == before


def test_an_honest_envelope_counts(registry: Registry) -> None:
    assert settle(registry, yes(signed(registry.keys, registry))).counted == 1


def test_a_form_without_a_signature_promotes_nothing(registry: Registry) -> None:
    with pytest.raises(Waits, match="0 of 1"):
        settle(registry, *[yes()] * 5)
    with pytest.raises(Unsigned):
        registry.promote(REFERENCE, "prod")


def test_a_revoked_approver_counts_for_nothing(registry: Registry, home: Path) -> None:
    ring = listed(registry, home)
    text = signed(ring, registry)
    assert settle(registry, yes(text)).counted == 1
    keys.remove(registry.authority, ring.signer("approver").public_key.keyid, planned=False)
    with pytest.raises(Waits, match="0 of 1"):
        settle(Registry.open(home))
    with pytest.raises(Waits, match="no key of the approver"):
        settle(Registry.open(home), yes(text))


def listed(registry: Registry, home: Path, threshold: int = 1) -> KeyRing:
    """One more approver."""
    ring = KeyRing(folder=home.parent / "another")
    (home.parent / "another.pem").write_text(pem_of(keys.make(ring, "approver")))
    keys.add(registry.authority, "approver", str(home.parent / "another.pem"), threshold)
    return ring


def test_one_approver_is_one_however_often_and_under_whatever_name(registry: Registry, home: Path) -> None:
    ring = listed(registry, home, threshold=2)
    by_one = [signed(registry.keys, registry, predicate={"by": name}) for name in ("Kim", "Lou", "Max")]
    with pytest.raises(Waits, match="1 of 2"):
        settle(registry, *map(yes, by_one))
    assert settle(registry, *map(yes, by_one), yes(signed(ring, registry))).counted == 2


def test_the_same_envelope_again_is_kept_once(registry: Registry) -> None:
    text = signed(registry.keys, registry)
    for _ in range(3):
        settle(registry, yes(text), yes(text))
    kinds = [view.kind for view in registry.show(REFERENCE).statements]
    assert kinds.count("approval") == 1
    approvals = [one for one in registry.ledger.entries(subject=str(REFERENCE)) if one.action == "approve"]
    assert len(approvals) == 1


def test_what_strangers_add_to_an_honest_envelope_is_not_kept(registry: Registry, home: Path) -> None:
    text = signed(registry.keys, registry)
    theirs = signed(stranger(home), registry)
    fields = json.loads(text)
    fields["signatures"] += json.loads(theirs)["signatures"]
    fields["note"] = "x" * 1000
    settle(registry, yes(json.dumps(fields)))
    (kept,) = [
        data
        for key, data in shelf.read_statements(registry.store, registry.show(REFERENCE).listed.digest).items()
        if "approval" in key
    ]
    assert kept == text.encode()


def test_an_automatic_approval_in_the_store_is_not_counted(registry: Registry) -> None:
    registry.approve(REFERENCE, "a pipeline", "every gate passed", automatic=True)
    with pytest.raises(Waits, match="0 of 1") as waits:
        settle(registry)
    assert "automatic approval does not count" in str(waits.value)


def test_a_pipeline_is_not_one_of_several_people(registry: Registry, home: Path) -> None:
    """Admission counts as the form does: a worker's automatic signature and one person are not two people."""
    ring = listed(registry, home, threshold=2)
    registry.approve(REFERENCE, "a pipeline", "every gate passed", automatic=True)
    approving.accept(registry, REFERENCE, signed(ring, registry).encode())
    with pytest.raises(Waits, match="1 of 2"):
        settle(registry)
    for refused in (lambda: registry.promote(REFERENCE, "prod"), lambda: registry.pull(REFERENCE)):
        with pytest.raises(BadSignature, match=r"by 1 of the 2 approver keys .* automatic"):
            refused()
    registry.approve(REFERENCE, "Kim", "looked at the sheet")
    assert registry.promote(REFERENCE, "prod").version == 2, "the same key signs for the person who holds it"


def test_a_pipeline_is_not_one_of_the_several_that_a_gate_asks_for(registry: Registry, home: Path) -> None:
    (home / "registry" / "policy.toml").write_text("[gates.prod]\napprovals = 2\n")
    registry = Registry.open(home)
    ring = listed(registry, home)
    registry.approve(REFERENCE, "a pipeline", "every gate passed", automatic=True)
    approving.accept(registry, REFERENCE, signed(ring, registry).encode())
    with pytest.raises(BadSignature, match="by 1 of the 2 approver keys"):
        registry.promote(REFERENCE, "prod")


def test_a_statement_that_the_store_lays_there_is_named_and_not_counted(
    registry: Registry, home: Path
) -> None:
    digest = registry.show(REFERENCE).listed.digest
    shelf.put_statement(registry.store, digest, "approval", signed(stranger(home), registry).encode())
    with pytest.raises(Waits, match="not believed"):
        settle(registry)


def test_a_rejection_stops_whatever_else_is_there(registry: Registry) -> None:
    from flows.errors import Rejected

    registry.approve(REFERENCE, "Kim", "looks right")
    with pytest.raises(Rejected, match="Mallory"):
        settle(registry, no())
    with pytest.raises(Rejected, match="Mallory"):
        settle(registry)
    assert settle(registry, again=True).counted == 1, "whoever is told to ask again goes on"
    assert settle(registry).counted == 1


def test_a_rejection_of_another_digest_does_not_count(registry: Registry) -> None:
    other = registry.show(f"{NAME}:1").listed.digest
    approving.note_rejection(registry, REFERENCE, other, "Mallory", "no")
    registry.approve(REFERENCE, "Kim", "looks right")
    assert settle(registry).counted == 1


def test_a_signed_rejection_is_never_outvoted(registry: Registry, home: Path) -> None:
    ring = listed(registry, home)
    settle(registry, yes(signed(ring, registry)))
    approving.reject(registry, REFERENCE, "Kim", "blurs mouths")
    for again in (False, True):
        with pytest.raises((PolicyRefused, RegistryError), match="rejected by"):
            settle(registry, again=again) if again else approving.approvals(registry, REFERENCE, "prod")
    with pytest.raises(PolicyRefused):
        registry.promote(REFERENCE, "prod")
    with pytest.raises(RegistryError):
        registry.pull(REFERENCE)


def test_words_of_a_reviewer_are_no_markup_in_the_page(registry: Registry) -> None:
    hostile = "![x](https://evil.example/p.png) [click](https://evil.example) <img src=x>"
    registry.approve(REFERENCE, hostile, hostile)
    digest = registry.show(REFERENCE).listed.digest
    from flows.approvals import Wanted, question

    wanted = Wanted(reference=REFERENCE, digest=digest, alias="prod")
    text = question(wanted, approving.approvals(registry, REFERENCE, "prod"), [hostile])
    for markup in ("![", "](", "<img"):
        assert markup not in text.replace("\\!", "").replace("\\[", "").replace("\\]", "").replace("\\<", "")


def test_a_time_that_is_over_is_over(registry: Registry) -> None:
    from flows.approvals import Wanted
    from flows.approvals import settle as work
    from flows.errors import ApprovalTimeout

    digest = registry.show(REFERENCE).listed.digest
    wanted = Wanted(reference=REFERENCE, digest=digest, alias="prod")
    desk = Desk([yes()], datetime.now(UTC) - timedelta(hours=2))
    with pytest.raises(ApprovalTimeout, match="nobody has decided"):
        work(registry, desk, wanted, again=False, timeout=timedelta(hours=1), show=lambda: None)


def test_words_that_are_missing_or_endless_are_refused(registry: Registry) -> None:
    for by, reason in (("", "why"), ("Kim", "  "), ("K" * 2001, "why"), ("Kim", "w" * 2001)):
        with pytest.raises(UsageError):
            approving.sign_apart(registry.keys, REFERENCE, Digest("sha256:" + "0" * 64), by, reason)
        with pytest.raises(UsageError):
            approving.note_rejection(registry, REFERENCE, Digest("sha256:" + "0" * 64), by, reason)


def test_an_approval_that_is_carried_to_another_registry_is_refused(registry: Registry, home: Path) -> None:
    with pytest.raises(BadSignature):
        approving.accept(registry, REFERENCE, signed(stranger(home), registry).encode())

"""A release that waits for approvers, on a real Prefect server, with real keys and signatures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.registries import NAME, copy_registry
from registry import approving
from registry.client import Registry
from registry.reference import Reference
from registry.signing import keys
from registry.signing.signers import KeyRing, pem_of
from trainer.errors import RecipeError

pytestmark = [pytest.mark.integration, pytest.mark.slow]

YES = {"decision": "approve", "reason": "looked at the sheet", "reviewer": "Kim"}
NO = {"decision": "reject", "reason": "blurs mouths", "reviewer": "Lee"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Prefect server for the module."""
    from flows.server import managed_server

    with managed_server(tmp_path_factory.mktemp("prefect-server")) as found:
        yield found


@pytest.fixture
def registry(home: Path) -> Registry:
    return copy_registry(home)


@pytest.fixture
def runs(server: Any, home: Path, registry: Registry) -> Iterator[Any]:
    """The deployment, for one test with a data folder of its own."""
    from prefect.client.orchestration import get_client

    from fakes.releases import Runs
    from flows.server import attached

    with attached(home, server.url), get_client(sync_client=True) as client:
        yield Runs.on(client)


def meant(registry: Registry) -> str:
    """What pixelsmile@prod means."""
    return registry.show(f"{NAME}@prod").listed.reference


def second_approver(home: Path, registry: Registry, threshold: int = 2) -> KeyRing:
    """Another person with a key on a machine of their own, listed in the root."""
    ring = KeyRing(folder=home.parent / "second-approver")
    public = keys.make(ring, "approver")
    (home.parent / "second.pem").write_text(pem_of(public))
    keys.add(registry.authority, "approver", str(home.parent / "second.pem"), threshold)
    return ring


def envelope(ring: KeyRing, registry: Registry, reference: str, by: str = "Lou") -> str:
    """An approval that somebody has signed without a store."""
    digest = registry.show(reference).listed.digest
    return approving.sign_apart(ring, Reference.parse(reference), digest, by, "looks right").decode()


def test_without_a_signature_it_is_asked_again_and_with_one_it_is_promoted(
    runs: Any, registry: Registry, home: Path
) -> None:
    from fakes.releases import COUNTED

    run = runs.start()
    assert run.state.name == "Suspended"
    digest = registry.show(f"{NAME}:2").listed.digest
    assert digest.hex in run.question().replace(" ", "")
    assert "0 of 1 approvals" in run.question()
    assert "proves nothing" in run.form()["properties"]["reviewer"]["description"]
    found = run.artifacts()
    assert found["contact-sheet"].startswith("data:image/jpeg;base64,")
    assert len(found["contact-sheet"]) <= 300_000
    metrics = {row["metric"]: row for row in json.loads(found["metrics"])}
    assert metrics["top1_accuracy"]["required"] == ">= 0.85"
    gates = {row["gate"]: row["result"] for row in json.loads(found["gates"])}
    assert gates["approval"] == "missing"
    assert {gates[one] for one in ("training", "scan", "licence", "evaluation")} == {"pass"}
    assert str(digest) in found["to-be-signed"]

    run.resume(**YES)
    assert run.state.name == "Suspended", "a word in a form promotes nothing"
    assert meant(registry) == f"{NAME}:1"

    registry.approve(f"{NAME}:2", "Kim", "looked at the sheet")
    run.resume(**YES)
    assert run.state.is_completed()
    assert meant(registry) == f"{NAME}:2"
    assert (home / COUNTED).read_text() == "1\n", "three passes through the flow, one evaluation"


def test_an_envelope_in_the_form_is_verified_and_kept(runs: Any, registry: Registry, home: Path) -> None:
    run = runs.start()
    of_another = envelope(registry.keys, registry, f"{NAME}:1")
    run.resume(**YES, envelope=of_another)
    assert run.state.name == "Suspended"
    assert "is about pixelsmile:1" in run.question()
    run.resume(**YES, envelope=envelope(registry.keys, registry, f"{NAME}:2"))
    assert run.state.is_completed()
    assert meant(registry) == f"{NAME}:2"
    by = [view.predicate["by"] for view in registry.show(f"{NAME}:2").statements if view.kind == "approval"]
    assert by == ["Lou"]


def test_two_approvers_are_asked_one_after_the_other(runs: Any, registry: Registry, home: Path) -> None:
    ring = second_approver(home, registry)
    run = runs.start()
    registry.approve(f"{NAME}:2", "Kim", "looked at the sheet")
    run.resume(**YES)
    assert run.state.name == "Suspended"
    assert "1 of 2 approvals" in run.question()
    assert "Kim" in run.question()
    registry.approve(f"{NAME}:2", "Kim", "and once more")
    run.resume(**YES)
    assert "1 of 2 approvals" in run.question(), "one key is one approver, however often it signs"
    run.resume(**YES, envelope=envelope(ring, registry, f"{NAME}:2"))
    assert run.state.is_completed()
    assert meant(registry) == f"{NAME}:2"


def test_a_rejection_is_recorded_and_the_version_is_not_asked_about_again(
    runs: Any, registry: Registry
) -> None:
    run = runs.start()
    run.resume(**NO)
    assert run.state.is_failed()
    assert "rejected by Lee" in run.state.message
    assert meant(registry) == f"{NAME}:1"
    (entry,) = [one for one in registry.ledger.entries(subject=f"{NAME}:2") if one.action == "reject"]
    details = json.loads(entry.details)
    assert details["digest"] == str(registry.show(f"{NAME}:2").listed.digest)
    assert details["reason"] == "blurs mouths"
    later = runs.start()
    assert later.state.is_failed(), "nobody is asked twice"
    again = runs.start(approval="again")
    assert again.state.name == "Suspended"
    registry.approve(f"{NAME}:2", "Kim", "looked again")
    assert again.resume(**YES).state.is_completed()
    assert meant(registry) == f"{NAME}:2"


def test_an_answer_that_is_no_answer_changes_nothing(runs: Any, registry: Registry) -> None:
    run = runs.start()
    for wrong in (
        {},
        {**YES, "reason": ""},
        {**YES, "decision": "maybe"},
        {**YES, "more": 1},
        {**YES, "reviewer": ""},
    ):
        with pytest.raises(ValueError, match="Validation failed"):
            run.resume(**wrong)
    assert run.state.name == "Suspended"
    assert meant(registry) == f"{NAME}:1"


def test_when_nobody_answers_nothing_moves_and_nothing_is_lost(
    runs: Any, registry: Registry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fakes.releases import COUNTED

    monkeypatch.setenv("ADAPTER_FOUNDRY_FLOWS_APPROVAL_TIMEOUT", "1")
    run = runs.start()
    end = time.monotonic() + 300
    while not run.state.is_final() and time.monotonic() < end:
        time.sleep(0.5)
    assert run.state.is_failed()
    assert "never resumed" in run.state.message
    assert meant(registry) == f"{NAME}:1"
    monkeypatch.delenv("ADAPTER_FOUNDRY_FLOWS_APPROVAL_TIMEOUT")
    registry.approve(f"{NAME}:2", "Kim", "looked at the sheet")
    later = runs.start()
    assert later.state.is_completed(), "it goes on at the approval, which is there by now"
    assert meant(registry) == f"{NAME}:2"
    assert (home / COUNTED).read_text() == "1\n"
    assert registry.list(NAME)[-1].reference == f"{NAME}:2", "nothing was published twice"


def test_nobody_is_asked_about_a_version_that_fails_its_evaluation(runs: Any, registry: Registry) -> None:
    run = runs.start(top1=0.5)
    assert run.state.is_failed()
    assert "evaluation" in run.state.message
    assert meant(registry) == f"{NAME}:1"


def not_worse(home: Path) -> None:
    """A policy by which production must not lose more than 0.02 of its accuracy."""
    rule = '[gates.prod.metrics.top1_accuracy]\nmax_regression = 0.02\ndirection = "higher"\n'
    (home / "registry" / "policy.toml").write_text(rule)


def test_what_is_not_worse_than_what_production_runs_is_shown_beside_it(
    runs: Any, registry: Registry, home: Path
) -> None:
    not_worse(home)
    run = runs.start(gap=-0.005)
    assert run.state.name == "Suspended"
    (row,) = [one for one in json.loads(run.artifacts()["metrics"]) if one["metric"] == "top1_accuracy"]
    assert row["difference"] == "-0.005 (-0.015 to +0.005), p 0.08"
    registry.approve(f"{NAME}:2", "Kim", "looked at the sheet")
    assert run.resume(**YES).state.is_completed()
    assert meant(registry) == f"{NAME}:2"


def test_nobody_is_asked_about_a_version_that_is_worse_than_what_production_runs(
    runs: Any, registry: Registry, home: Path
) -> None:
    """The report's own verdict is "pass": the registry compares by itself."""
    not_worse(home)
    run = runs.start(gap=-0.05)
    assert run.state.is_failed()
    assert "top1_accuracy" in run.state.message
    assert meant(registry) == f"{NAME}:1"


def test_a_version_that_nobody_compared_with_production_is_not_promoted(
    runs: Any, registry: Registry, home: Path
) -> None:
    """The comparison may still come, as a signed statement; until then no approval helps."""
    not_worse(home)
    run = runs.start()
    assert run.state.name == "Suspended"
    missing = [row for row in json.loads(run.artifacts()["gates"]) if row["result"] == "missing"]
    assert any("top1_accuracy" in row["gate"] for row in missing)
    registry.approve(f"{NAME}:2", "Kim", "looked at the sheet")
    run.resume(**YES)
    assert not run.state.is_completed()
    assert meant(registry) == f"{NAME}:1"


def test_a_worker_without_an_approvers_key_waits_until_somebody_has_promoted(
    runs: Any, registry: Registry, home: Path
) -> None:
    people = home.parent / "people"
    people.mkdir()
    (home / "registry" / "keys" / "approver.pem").rename(people / "approver.pem")
    person = KeyRing(folder=people)
    run = runs.start()
    run.resume(**YES, envelope=envelope(person, registry, f"{NAME}:2"))
    assert run.state.name == "Suspended"
    assert f"registry promote {NAME}:2 --to prod" in run.question()
    (people / "approver.pem").rename(home / "registry" / "keys" / "approver.pem")
    Registry.open(home).promote(f"{NAME}:2", "prod")
    (home / "registry" / "keys" / "approver.pem").rename(people / "approver.pem")
    assert run.resume(**YES).state.is_completed()
    assert meant(registry) == f"{NAME}:2"
    (news,) = arrived(run, "adapter.promoted")
    digest = str(registry.show(f"{NAME}:2").listed.digest)
    told = {"reference": f"{NAME}@prod", "alias": "prod", "version": 2, "previous": 1, "digest": digest}
    assert news == told, "whoever promoted, it is told"
    remembered = home / "prefect" / "told" / f"{NAME}@prod"
    assert remembered.read_text() == digest
    told_at = remembered.stat().st_mtime_ns
    assert runs.start().state.is_completed()
    assert remembered.stat().st_mtime_ns == told_at, "a later run has no news"


def arrived(run: Any, name: str) -> list[dict[str, Any]]:
    """The events of a run, as soon as there is one: nobody waits for them to be on record."""
    end = time.monotonic() + 300
    found: list[dict[str, Any]] = []
    while not found and time.monotonic() < end:
        found = run.events(name)
        time.sleep(0.2)
    return found


def test_a_promotion_that_was_made_before_it_was_told_is_told_by_the_next_run(
    runs: Any, registry: Registry, home: Path
) -> None:
    """What a run leaves that was killed between the two."""
    first = runs.start(approval="later")
    assert first.state.is_completed()
    registry.approve(f"{NAME}:2", "Kim", "looked at the sheet")
    registry.promote(f"{NAME}:2", "prod")
    second = runs.start()
    assert second.state.is_completed()
    (news,) = arrived(second, "adapter.promoted")
    assert (news["version"], news["previous"]) == (2, 1)


def test_a_run_that_has_asked_and_failed_asks_again_when_it_is_retried(
    runs: Any, registry: Registry, home: Path
) -> None:
    run = runs.start()
    policy = home / "registry" / "policy.toml"
    policy.write_text("no policy")
    run.resume(**YES)
    assert run.state.is_failed()
    policy.unlink()
    run.retry()
    assert run.state.name == "Suspended"
    assert "0 of 1 approvals" in run.question()
    run.resume(**YES)
    assert run.state.name == "Suspended", "what was answered before counts for nothing either"
    registry.approve(f"{NAME}:2", "Kim", "looked at the sheet")
    assert run.resume(**YES).state.is_completed()
    assert meant(registry) == f"{NAME}:2"


@pytest.mark.parametrize("name", ["release", "pipeline"])
def test_a_run_that_anybody_can_start_does_not_approve_by_itself(
    runs: Any, registry: Registry, home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The worker holds an approver's key here, as after `registry init`."""
    from prefect.flow_engine import run_flow

    from flows import job
    from flows.parameters import RecipeChoice
    from flows.settings import FlowSettings

    flow = getattr(job, name)
    deployment = runs.client.create_deployment(flow_id=runs.client.create_flow(flow), name=f"forms-{name}")

    def ended(**parameters: Any) -> str:
        made = runs.client.create_flow_run_from_deployment(deployment, parameters=parameters)
        state = run_flow(flow, flow_run=made, return_type="state")
        assert state.is_failed()
        return str(state.message)

    # Without a recipe of that name a run ends as soon as it begins.
    nothing = {"recipe": "no-such-recipe"}
    assert "approval 'automatic' is not allowed" in ended(approval="automatic", recipe=nothing)
    assert "no-such-recipe" in ended(approval="ask", recipe=nothing)
    assert not list(home.glob("runs/*"))
    assert registry.list(NAME)[-1].reference == f"{NAME}:1"
    monkeypatch.setenv("ADAPTER_FOUNDRY_FLOWS_AUTOMATIC_APPROVAL", "true")
    assert FlowSettings.read(home).automatic_approval
    assert "no-such-recipe" in ended(approval="automatic", recipe=nothing), "who runs the worker may allow it"
    monkeypatch.delenv("ADAPTER_FOUNDRY_FLOWS_AUTOMATIC_APPROVAL")
    with pytest.raises(RecipeError, match="no-such-recipe"):
        flow(RecipeChoice.model_validate(nothing), "automatic")  # the way of `python -m flows.pipeline`


@pytest.mark.parametrize("approval", ["automatic", "later"])
def test_what_was_rejected_is_not_released_without_asking_again(
    runs: Any, registry: Registry, approval: str
) -> None:
    rejected = runs.start()
    rejected.resume(**NO)
    run = runs.start(approval=approval)
    assert run.state.is_failed()
    assert "rejected by Lee" in run.state.message
    assert "approval 'again'" in run.state.message
    assert meant(registry) == f"{NAME}:1"
    kinds = [view.kind for view in registry.show(f"{NAME}:2").statements]
    assert "approval" not in kinds, "nothing was signed"


def test_a_promotion_starts_the_deployment_that_verifies_it(runs: Any, registry: Registry) -> None:
    """The trigger is the one that ships."""
    from prefect.events.schemas.deployment_triggers import DeploymentTriggerTypes
    from prefect.flow_engine import run_flow
    from pydantic import TypeAdapter

    from flows.maintenance import verify_promoted

    shipped = yaml.safe_load((resources.files("flows") / "prefect.yaml").read_text())["deployments"]
    (entry,) = [one for one in shipped if one["name"] == "verify-promoted"]
    trigger: Any = TypeAdapter(DeploymentTriggerTypes).validate_python(entry["triggers"][0])
    flow = runs.client.create_flow(verify_promoted)
    deployment = runs.client.create_deployment(
        flow_id=flow, name=entry["name"], entrypoint=entry["entrypoint"]
    )
    trigger.set_deployment_id(deployment)
    runs.client.create_automation(trigger.as_automation())
    run = runs.start()
    registry.approve(f"{NAME}:2", "Kim", "looked at the sheet")
    run.resume(**YES)
    digest = str(registry.show(f"{NAME}:2").listed.digest)
    end = time.monotonic() + 300
    found: Any = []
    while not found and time.monotonic() < end:
        found = [one for one in runs.client.read_flow_runs() if one.deployment_id == deployment]
        time.sleep(0.3)
    assert found[0].parameters == {"reference": f"{NAME}@prod", "digest": digest}
    run_flow(verify_promoted, flow_run=found[0], return_type="state")
    assert runs.client.read_flow_run(found[0].id).state.is_completed()
    assert (registry.place.cache / "sha256" / digest.removeprefix("sha256:")).is_dir(), (
        "it is there to be used"
    )

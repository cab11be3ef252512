"""Runs whose worker is gone: noticed by their silence, and said to be crashed.

A flow run that dies alone is reported by its worker. When both are killed, or their machine is, nobody
reports anything, and Prefect would show the run as running for ever. So runs of workers send heartbeats, and
an automation of the server crashes a run that has fallen silent. The run can be started again then, in the
page or by the API, and goes on where it was.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.events.schemas.automations import AutomationCore

NAME = "crashed-runs"
#: Seconds between two heartbeats; 30 is the least that Prefect allows.
EVERY = 30
#: Seconds of silence. Four heartbeats long, because a busy server takes them late, and a run that is said to
#: be crashed while it works is worse than one that is noticed half a minute later.
SILENCE = 120
#: What a worker has to set for its flow runs.
ENVIRONMENT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(EVERY)}

_HEARTBEAT = "prefect.flow-run.heartbeat"
#: After any of these a run is silent with good reason: it ended, or it waits for people or for another try.
_QUIET = (
    *("Completed", "Failed", "TimedOut", "Cancelled", "Crashed", "Suspended", "Paused"),
    *("AwaitingRetry", "Scheduled", "Late", "Pending"),
)


def automation(silence: int = SILENCE) -> AutomationCore:
    """Return the automation that crashes a run after ``silence`` seconds without a heartbeat."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    expected = {_HEARTBEAT, *(f"prefect.flow-run.{name}" for name in _QUIET)}
    return AutomationCore(
        name=NAME,
        description=f"No heartbeat for {silence} seconds: its worker and its process are gone.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
            after={_HEARTBEAT},
            expect=expected,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                force=False,
                message=(
                    f"No heartbeat for {silence} seconds: the worker and this run's process are gone. What "
                    "was done is kept; start the run again and it goes on from there."
                ),
            )
        ],
    )


def ensure(url: str | None = None, silence: int = SILENCE) -> str:
    """Make the automation, or put it right, on a Prefect server.

    Args:
        url: address of its API; None takes that of Prefect's settings.
        silence: seconds without a heartbeat, at least `EVERY`.

    Returns:
        "made", "changed" or "there".
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    wanted = automation(silence)
    with ExitStack() as stack:
        if url is not None:
            stack.enter_context(temporary_settings({PREFECT_API_URL: url}))
        client = stack.enter_context(get_client(sync_client=True))
        found = client.read_automations_by_name(NAME)
        if not found:
            client.create_automation(wanted)
            return "made"
        same = {"name", "description", "enabled", "trigger", "actions"}
        if _plain(found[0], same) == _plain(wanted, same):
            return "there"
        client.update_automation(found[0].id, wanted)
        return "changed"


def _plain(value: AutomationCore, fields: set[str]) -> object:
    # As Python values: as JSON the sets of a trigger would be lists in an order of chance.
    return value.model_dump(include=fields)

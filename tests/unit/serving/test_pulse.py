"""When a device is broken, and when only a new process may help."""

from __future__ import annotations

from registry.digest import digest_bytes
from serving.pulse import DEAD_SECONDS, FAILURES, Pulse
from serving.stepping import Stepped

GOOD, NEW = digest_bytes(b"good"), digest_bytes(b"new")
WORKS, FAILS = Stepped(errors=[None]), Stepped(errors=[RuntimeError("the device is gone")])


class Clock:
    """A clock that stands until somebody moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_device_that_fails_for_a_minute_what_it_did_before_is_dead() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.beat(WORKS, [[GOOD]], ours=False)
    clock.now += 1000
    for _ in range(FAILURES):
        pulse.beat(FAILS, [[GOOD]], ours=False)
    clock.now += DEAD_SECONDS - 1
    pulse.beat(FAILS, [[GOOD]], ours=True)
    assert (pulse.device, pulse.problem) == (
        "broken",
        f"the last {FAILURES + 1} steps on the device failed; the log says why",
    )
    clock.now += 1
    assert pulse.device == "dead"
    assert "has not worked for 60 s" in (pulse.problem or "")
    pulse.beat(WORKS, [[GOOD]], ours=True)
    assert (pulse.device, pulse.problem) == ("works", None)


def test_an_adapter_that_never_worked_says_nothing_against_the_device_for_good() -> None:
    """A new process would refuse it alike, and would not serve the version before."""
    clock = Clock()
    pulse = Pulse(clock)
    for _ in range(FAILURES):
        pulse.beat(FAILS, [[NEW]], ours=True)
        clock.now += DEAD_SECONDS
    assert pulse.device == "broken"
    pulse.beat(WORKS, [[GOOD]], ours=True)
    for _ in range(FAILURES):
        pulse.beat(FAILS, [[NEW, GOOD]], ours=True)
        clock.now += DEAD_SECONDS
    assert pulse.device == "broken"


def test_one_failure_long_ago_counts_from_the_last_step_that_worked() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.beat(WORKS, [[GOOD]], ours=False)
    pulse.beat(FAILS, [[GOOD]], ours=False)
    clock.now += 10 * DEAD_SECONDS
    assert pulse.device == "works", "one failure is none of the device's"
    pulse.beat(WORKS, [[GOOD]], ours=False)
    for _ in range(FAILURES):
        pulse.beat(FAILS, [[GOOD]], ours=False)
    assert pulse.device == "broken"

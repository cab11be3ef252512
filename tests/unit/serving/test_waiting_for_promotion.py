"""A service that starts before anything is promoted: it waits if it is told to, and says what for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.followed import PROD, follower, three_versions
from fakes.registries import NAME
from registry.errors import NotFound
from serving.serve_command import _registry
from serving.settings import ServingSettings

NEXT = f"{NAME}@next"


def test_a_mistyped_name_ends_the_start_and_one_that_is_waited_for_does_not(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three_versions(home)
    _registry(ServingSettings(adapters=(PROD,)), wait=False)
    settings = ServingSettings(adapters=(PROD, NEXT))
    with pytest.raises(NotFound, match=NEXT) as raised:
        _registry(settings, wait=False)
    assert "--wait" in raised.value.mend
    assert _registry(settings, wait=True).place.home == home
    assert f"waiting for {NEXT}" in capsys.readouterr().err


def test_what_nobody_promoted_is_waited_for_and_then_served(home: Path) -> None:
    registry = three_versions(home)
    found = follower(registry, adapters=(NEXT,), light=True)
    try:
        found.poll()
        (status,) = found.statuses()
        assert (status.state, status.digest) == ("loading", None)
        assert status.problem == f"it waits until {NEXT} is promoted"
        assert found.missing is not None
        assert NEXT in found.missing
        registry.promote(f"{NAME}:2", "next")
        found.poll()
        (status,) = found.statuses()
        assert (status.state, status.version, status.problem) == ("ready", 2, None)
        assert found.missing is None
    finally:
        found.stop()

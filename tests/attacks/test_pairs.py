"""Two harmless adapters can be the halves of a backdoor: serving joins only those that were declared."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fakes.followed import PROD, follower
from fakes.stacks import UNDER, declare, two_adapters
from registry.admission import VerifiedAdapter
from registry.client import Registry
from registry.errors import PolicyRefused
from registry.reference import Reference
from serving.bases import register
from serving.following import Follower
from serving.local import LocalBackend
from serving.schema import StackedAdapter, SweepRequest
from serving.settings import ServingSettings
from trainer.portraits.base import base_path

Load = Callable[[str], VerifiedAdapter]


@pytest.fixture
def registry(home: Path) -> Registry:
    return two_adapters(home)


@pytest.fixture
def load(registry: Registry) -> Load:
    return lambda text: registry.load(Reference.parse(text))


@pytest.fixture
def watching(registry: Registry) -> Any:
    found: Follower = follower(registry)
    found.poll()
    yield found
    found.stop()


@pytest.mark.parametrize("order", itertools.permutations([0, 1]))
def test_an_undeclared_pair_is_refused(
    registry: Registry, watching: Follower, load: Load, order: tuple[int, int]
) -> None:
    declare(registry, "refuse", pair=False)
    pair = [load(PROD), load(UNDER)]
    with pytest.raises(PolicyRefused, match=r"does not declare that .* may be loaded together") as caught:
        watching.together([pair[at] for at in order])
    assert "[[scan.pairs]]" in caught.value.mend
    watching.together(pair[:1])  # one alone is no pair


def test_the_names_that_a_request_uses_do_not_help(
    registry: Registry, watching: Follower, load: Load
) -> None:
    """A version or a digest means what it means; only the aliases of the pair count."""
    declare(registry, "refuse", pair=True)
    second, third = load("pixelsmile:2"), load("pixelsmile:3")
    under = load(UNDER)
    watching.together([load(PROD), under])
    watching.together([load("pixelsmile:1"), load("lightning:1")])
    watching.together([load(f"pixelsmile@{load(PROD).digest}"), under])
    for stranger in (second, third):
        with pytest.raises(PolicyRefused):
            watching.together([stranger, under])
    with pytest.raises(PolicyRefused):
        watching.together([load(PROD), under, second])  # each two of three
    with pytest.raises(PolicyRefused):
        watching.together([load(PROD), second])  # two versions of one adapter


def test_a_promotion_changes_who_is_the_pair(registry: Registry, watching: Follower, load: Load) -> None:
    registry.promote("pixelsmile:2", "staging")
    declare(registry, "refuse", pair=True, first="pixelsmile@staging")
    under = load(UNDER)
    watching.poll()
    watching.together([load("pixelsmile:2"), under])
    with pytest.raises(PolicyRefused):
        watching.together([load(PROD), under])


def test_the_version_before_stays_a_pair_while_the_new_one_is_not_ready(
    registry: Registry, load: Load
) -> None:
    declare(registry, "warn", pair=False)
    first, under = load(PROD), load(UNDER)

    def refuse(adapter: VerifiedAdapter) -> None:
        if adapter.digest != first.digest:
            raise RuntimeError("it does not fit")

    watching = follower(registry, on_new=refuse)
    try:
        watching.poll()
        registry.promote("pixelsmile:2", "prod")
        watching.poll()
        declare(registry, "refuse", pair=True)
        assert watching.resolve(PROD).digest == first.digest
        watching.together([first, under])
    finally:
        watching.stop()


def test_a_warning_serves_and_says_so(
    registry: Registry, watching: Follower, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    declare(registry, "warn", pair=False)

    def said() -> list[Any]:
        return [one for one in caplog.records if "no declared pair" in one.getMessage()]

    with caplog.at_level(logging.WARNING):
        watching.together([load(PROD), load(UNDER)])
    (line,) = said()
    assert line.facts == {"first": "pixelsmile:1", "second": "lightning:1"}
    caplog.clear()
    declare(registry, "warn", pair=True)
    watching.together([load(PROD), load(UNDER)])
    assert not said()


@pytest.mark.parametrize("way", ["settings", "request"])
def test_a_service_refuses_before_anything_runs(registry: Registry, load: Load, home: Path, way: str) -> None:
    register(base_path(), load(PROD).card.base, home)
    declare(registry, "refuse", pair=False)
    stacked = {PROD: (UNDER,)} if way == "settings" else {}
    settings = ServingSettings(adapters=(PROD,), stacked=stacked, follow_seconds=0.1)
    asked = SweepRequest.make(
        image=Image.new("RGB", (64, 64), (90, 60, 40)), rows=({},), steps=1,
        stacked=None if way == "settings" else (StackedAdapter(adapter=UNDER),),
    )  # fmt: skip
    nothing = asked.model_copy(update={"stacked": (StackedAdapter(adapter=UNDER, strength=0.0),)})

    async def answers(backend: LocalBackend, request: SweepRequest) -> list[Any]:
        return [event async for event in backend.stream(request, key="me")]

    async def serve() -> None:
        backend = LocalBackend(settings, registry=registry, home=home)
        try:
            await backend.start()
            with pytest.raises(PolicyRefused):
                await answers(backend, asked)
            if way == "request":  # at strength 0 nothing of it is there
                assert (await answers(backend, nothing))[-1][0].adapter == "pixelsmile:1"
            declare(registry, "refuse", pair=True)
            assert (await answers(backend, asked))[-1][0].stacked[0].adapter == "lightning:1"
        finally:
            await backend.close(0)

    asyncio.run(serve())

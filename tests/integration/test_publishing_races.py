"""Several machines publish at once to one store: nothing is lost, and of two who promote one is told."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from registry.digest import digest_bytes
from registry.errors import Conflict
from registry.signing.authority import Authority
from registry.signing.refresh import TrustClient
from registry.signing.signers import KeyRing
from registry.storage.stores import open_store

ONE = digest_bytes(b"one")
PUBLISHERS = 8


def machine(uri: str, home: Path) -> Authority:
    store = open_store(uri, home / "uploads")
    return Authority(store, KeyRing(folder=home / "keys"), TrustClient(store, home / "trust"))


def machines(uri: str, tmp_path: Path, count: int) -> list[Path]:
    """Homes that have the same keys and pinned root, as if the keys were in a key service."""
    first = tmp_path / "first"
    authority = machine(uri, first)
    authority.initialise()
    authority.add_version("x:1", ONE, 3)
    authority.set_alias("x@prod", ONE, 3, {"version": 1}, None)
    homes = [tmp_path / f"machine-{number}" for number in range(count)]
    for home in homes:
        shutil.copytree(first, home)
    return homes


def work(task: tuple[str, str, Path, int, float]) -> str:
    """What one process does, beginning at a given time; what became of it."""
    what, uri, home, number, start = task
    authority = machine(uri, home)
    time.sleep(max(0.0, start - time.time()))
    digest = digest_bytes(f"{what} {number}".encode())
    try:
        if what == "promote":
            authority.set_alias("x@prod", digest, 3, {"version": number}, ONE)
        else:
            authority.add_version(f"adapter-{number % 3}:{number}", digest, 3)
            authority.yank(digest, f"by {number}")
    except Conflict as conflict:
        return conflict.message
    return "done"


def race(what: str, uri: str, homes: list[Path]) -> list[str]:
    start = time.time() + 2.5
    tasks = [(what, uri, home, number + 2, start) for number, home in enumerate(homes)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(homes), mp_context=spawn) as processes:
        return list(processes.map(work, tasks))


def test_of_two_promotions_one_wins_and_the_other_is_told(uri: str, tmp_path: Path) -> None:
    homes = machines(uri, tmp_path, 2)
    results = race("promote", uri, homes)
    assert sorted(result == "done" for result in results) == [False, True], results
    winner = results.index("done") + 2
    (told,) = (result for result in results if result != "done")
    assert told == f"x@prod was moved to version {winner} while you were promoting version {5 - winner}"
    for home in (*homes, tmp_path / "first"):
        assert machine(uri, home).state().aliases()["x@prod"].custom == {"version": winner}


def test_concurrent_publishers_lose_nothing(uri: str, tmp_path: Path) -> None:
    homes = machines(uri, tmp_path, PUBLISHERS)
    assert race("publish", uri, homes) == ["done"] * PUBLISHERS
    state = machine(uri, tmp_path / "first").state()
    expected = {f"adapter-{number % 3}:{number}" for number in range(2, PUBLISHERS + 2)}
    assert set(state.versions()) == expected | {"x:1"}
    assert set(state.names()) == {"x", "adapter-0", "adapter-1", "adapter-2"}
    for number in range(2, PUBLISHERS + 2):
        assert state.is_yanked(digest_bytes(f"publish {number}".encode())) == f"by {number}"

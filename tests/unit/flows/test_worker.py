"""The end of a worker's runs: each is asked, nothing new is taken, and the server knows of it afterwards."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from flows.worker import MODULE, end_runs

PASSWORD = "admin:hidden"
GENEROUS = 120.0
#: Two at once, of which one has another in its queue; tells seconds late how each of them has ended. Under
#: the name of our own worker it knows the signal of ours.
WORKER = """
import os, pathlib, subprocess, sys, threading, time
folder, run, last = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
short, ours = ["first", "second"], sys.argv[4:] == ["flows.worker"]
if ours:
    import signal
    from flows.worker import TAKE_NOTHING
    signal.signal(TAKE_NOTHING, lambda *_: (short.clear(), (folder / "signal.ended").touch()))
def tell(name, state):
    (folder / f".{name}").write_text(state)
    (folder / f".{name}").rename(folder / f"{name}.state")
def work(waiting):
    while waiting:
        name = waiting.pop(0)
        tell(name, "RUNNING")
        environment = {**os.environ, "PREFECT__FLOW_RUN_ID": name}
        other = last if name == "slow" else "signal" if ours else name
        subprocess.run([sys.executable, "-c", run, str(folder / name), other], env=environment)
        (folder / f"{name}.ended").touch()
        threading.Timer(5, tell, (name, "CRASHED")).start()
for waiting in (short, ["slow"]):
    threading.Thread(target=work, args=(waiting,)).start()
while True:
    time.sleep(600)
"""
#: Ends when it is asked to; the slow one when another one has, and one of ours when ours has its signal.
RUN = """
import pathlib, signal, sys, time
me, other = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]).with_name(sys.argv[2])
def save(*_):
    while me != other and not other.with_suffix(".ended").exists():
        time.sleep(0.05)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
me.with_suffix(".begun").touch()
while True:
    time.sleep(600)
"""


@contextmanager
def prefect(folder: Path) -> Iterator[str]:
    """The address of a server that says of each run what its worker has told, to who has the password."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            word = base64.b64encode(PASSWORD.encode()).decode()
            known = self.headers["Authorization"] == f"Basic {word}"
            self.send_response(200 if known else 401)
            self.end_headers()
            if known:
                told = (folder / f"{self.path.removeprefix('/api/flow_runs/')}.state").read_text()
                self.wfile.write(json.dumps({"state_type": told}).encode())

        def log_message(self, *words: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}/api"
        finally:
            found.shutdown()
            thread.join()


@contextmanager
def working(url: str, *words: str) -> Iterator[int]:
    """The process of the keeper of a worker, which stands here for ours."""
    keeper = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKER!r}, *sys.argv[1:]])"
    process = subprocess.Popen(
        [sys.executable, "-c", keeper, *words],
        env={**os.environ, "PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": PASSWORD},
    )
    try:
        yield process.pid
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()


def seen(folder: Path, kind: str) -> set[str]:
    return {path.stem for path in folder.glob(f"*.{kind}")}


@pytest.mark.parametrize(
    ("last", "name", "asked"),
    [
        pytest.param("second", "another", {"first", "second", "slow"}, id="a worker that goes on"),
        pytest.param("first", MODULE, {"first", "slow"}, id="ours"),
    ],
)
def test_every_run_is_asked_and_told_of_and_what_waits_is_left_to_wait(
    last: str, name: str, asked: set[str], tmp_path: Path
) -> None:
    with prefect(tmp_path) as url, working(url, str(tmp_path), RUN, last, name) as keeper:
        end = time.monotonic() + GENEROUS
        while seen(tmp_path, "begun") != {"first", "slow"}:
            assert time.monotonic() < end, seen(tmp_path, "begun")
            time.sleep(0.05)
        end_runs(keeper, GENEROUS)
        told = {path.stem: path.read_text() for path in tmp_path.glob("*.state")}
        assert told == dict.fromkeys(asked, "CRASHED"), "the server knows of each"
        assert seen(tmp_path, "ended") - {"signal"} == asked


def test_a_server_that_is_away_is_not_waited_for(tmp_path: Path) -> None:
    with working("http://127.0.0.1:9/api", str(tmp_path), RUN, "first", MODULE) as keeper:
        end = time.monotonic() + GENEROUS
        while seen(tmp_path, "begun") != {"first", "slow"}:
            assert time.monotonic() < end, seen(tmp_path, "begun")
            time.sleep(0.05)
        end_runs(keeper, GENEROUS)
        told = {path.stem: path.read_text() for path in tmp_path.glob("*.state")}
        assert told["slow"] == "RUNNING", "nobody is asked to the end of the time"

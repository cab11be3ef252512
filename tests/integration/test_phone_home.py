"""Nothing phones home: every connection and look-up of server, SDK, worker, flow run and pages, watched.

Prefect, MLflow and Ray all report to their makers by default, so what is tested is our own settings: all that
`conftest` and the machine set is taken away first. The user's own commands get nothing but Prefect's home and
the address of the server, for that is what a user types them with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from fakes.served import served_home
from flows.server import ask
from servers import watch
from servers.watch import Watch, visit

_SECONDS = 1500
"""Much more than it takes, for a machine that has other things to do; strace costs a third, too."""

FLOW = '''
"""A flow that uses what the real ones use: a task, MLflow and an artifact."""

import os
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact


@task
def double(number: int) -> int:
    return 2 * number


@flow
def tiny(number: int = 3) -> int:
    """Doubles a number."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{Path(os.environ['PREFECT_HOME']) / 'mlflow.db'}")
    with mlflow.start_run():
        mlflow.log_metric("number", number)
    create_markdown_artifact("![a picture from elsewhere](http://198.51.100.7/spy.png)", key="spy")
    return double(number)
'''

#: Everything that a user does by commands, against the server that the flows start.
PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
from flows.server import managed_server
from flows.settings import prefect_environment

home = Path(os.environ["ADAPTER_FOUNDRY_HOME"])
with managed_server(home) as server:
    environment = {**os.environ, **prefect_environment(home), "PREFECT_API_URL": server.url}
    bare = {name: environment[name] for name in ("PATH", "HOME", "PREFECT_HOME", "PREFECT_API_URL")}
    prefect = [sys.executable, "-P", "-m", "prefect", "--no-prompt"]
    for words, env in (
        (["work-pool", "create", "quiet", "--type", "process"], bare),
        (["deploy", "tiny.py:tiny", "--name", "tiny", "--pool", "quiet"], bare),
        (["deployment", "run", "tiny/tiny"], bare),
        (["worker", "start", "--pool", "quiet", "--run-once"], environment),
        (["flow-run", "ls"], bare),
    ):
        subprocess.run([*prefect, *words], env=env, cwd=folder, check=True, stdin=subprocess.DEVNULL)
    (folder / "ready").write_text(server.url)
    while not (folder / "enough").exists():
        time.sleep(0.1)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What was seen of a run, after everything has ended."""

    attempts: list[watch.Attempt]
    programs: set[str]
    visits: dict[str, watch.Visit]
    runs: list[dict]
    log: str


@pytest.fixture(scope="module")
def browser() -> str:
    """A browser, for the pages."""
    return watch.browser() or pytest.skip("no browser is installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def watchable() -> None:
    if (reason := watch.missing()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, browser: str, watchable: None) -> Ended:
    """One watched run: server, deployment, worker and flow run, and a browser that looks at them."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "tiny.py").write_text(FLOW)
    watched = Watch(log=folder / "strace.log")
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "ADAPTER_FOUNDRY_HOME": str(folder / "home"),
        "ADAPTER_FOUNDRY_FLOWS_SERVER_TIMEOUT": str(_SECONDS),
    }
    program = [sys.executable, "-P", "-c", PROGRAM, str(folder)]
    with watched.running(program, environment, folder, folder / "log") as process:
        url = _wait_for(folder / "ready", process, folder / "log").removesuffix("/api")
        runs = ask(f"{url}/api/flow_runs/filter", {}, _SECONDS)
        visits = {}
        for number, path in enumerate(_pages(url, runs)):
            (folder / str(number)).mkdir()
            visits[path] = visit(browser, url + path, folder / str(number))
        (folder / "enough").touch()
        assert process.wait(_SECONDS) == 0, (folder / "log").read_text("utf-8", "replace")
    return Ended(
        attempts=watched.attempts(),
        programs=watched.programs(),
        visits=visits,
        runs=runs,
        log=(folder / "log").read_text("utf-8", "replace"),
    )


def test_no_process_speaks_to_anybody_else(ended: Ended) -> None:
    assert [run["state"]["type"] for run in ended.runs] == ["COMPLETED"], (ended.runs, ended.log)
    assert any(name.startswith("python") for name in ended.programs), "what should be watched was not there"
    assert ended.attempts == []


RAY = """
from pathlib import Path
import os, sys
from flows.settings import prefect_home
from serving.local_ray import kept_here

with kept_here(prefect_home(Path(os.environ["ADAPTER_FOUNDRY_HOME"])) / "ray") as variables:
    import ray

    for left in range(7, -1, -1):
        try:
            ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": variables})
            break
        except Exception:
            # A raylet gives its agents 15 seconds to start, which is little on a machine that is busy.
            ray.shutdown()
            if not left:
                raise
print(ray.get(ray.remote(lambda: os.environ["HOME"]).remote()))
ray.shutdown()
"""


@pytest.mark.usefixtures("watchable")
def test_a_ray_cluster_of_this_machine_speaks_to_nobody_else(tmp_path: Path, home: Path) -> None:
    watched = Watch(log=tmp_path / "strace.log")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "ADAPTER_FOUNDRY_HOME": str(home),
    }
    program = [sys.executable, "-P", "-c", RAY]
    with watched.running(program, environment, tmp_path, tmp_path / "log") as process:
        assert process.wait(_SECONDS) == 0, (tmp_path / "log").read_text("utf-8", "replace")
    assert str(tmp_path) in (tmp_path / "log").read_text("utf-8"), "a worker has the user's home"
    assert {"raylet", "gcs_server"} <= watched.programs(), "what should be watched was not there"
    assert watched.attempts() == []
    assert not (tmp_path / ".ray").exists(), "nothing is left in the user's home"
    assert (home / "prefect" / "ray" / "token").stat().st_mode & 0o077 == 0


SERVE = """
import contextlib, json, signal, subprocess, sys, time, urllib.request

def start():
    # Three times at most: a raylet gives its agents 15 seconds to start, which is little on a busy machine.
    for left in range(2, -1, -1):
        service = subprocess.Popen(
            [sys.executable, "-P", "-c", "from serving.cli import main; main()", *words],
            stdout=subprocess.PIPE, text=True,
        )
        line = service.stdout.readline()
        if '"url"' in line:
            return service, json.loads(line)["url"]
        rest = line + service.communicate()[0]
        if not left or "does not start or answer" not in rest:
            raise SystemExit(rest)

words = ["ray", "--engines", "1", "--ingresses", "1", "--cpus", "0.1", "--json"]
service, url = start()
with service:
    told = ""
    while '"state":"ready"' not in told:
        time.sleep(0.5)
        assert service.poll() is None
        with contextlib.suppress(OSError):  # on a busy machine it may answer 503 first
            told = urllib.request.urlopen(url + "/v1/adapters", timeout=60).read().decode()
    print(told)
    service.send_signal(signal.SIGTERM)
    sys.exit(service.wait())
"""


@pytest.mark.usefixtures("watchable")
def test_serving_on_ray_speaks_to_nobody_else(tmp_path: Path, home: Path) -> None:
    served_home(home)
    watched = Watch(log=tmp_path / "strace.log")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "ADAPTER_FOUNDRY_HOME": str(home),
        "ADAPTER_FOUNDRY_SERVING_ADAPTERS": '["pixelsmile@prod"]',
        "ADAPTER_FOUNDRY_SERVING_PORT": "0",
    }
    program = [sys.executable, "-P", "-c", SERVE]
    with watched.running(program, environment, tmp_path, tmp_path / "log") as process:
        assert process.wait(_SECONDS) == 0, (tmp_path / "log").read_text("utf-8", "replace")
    assert '"state":"ready"' in (tmp_path / "log").read_text("utf-8"), "an engine has admitted the adapter"
    assert {"raylet", "gcs_server"} <= watched.programs(), "what should be watched was not there"
    assert watched.attempts() == []


def test_no_page_speaks_to_anybody_else(ended: Ended) -> None:
    for path, seen in ended.visits.items():
        assert seen.outside == (), path
        assert any("/api/" in request for request in seen.requests), f"{path} never came as far as its API"
    assert "tiny" in next(iter(ended.visits.values())).document


CONNECTS = {
    "a connection": ("socket.create_connection(('198.51.100.1', 80), 0.2)", "198.51.100.1:80"),
    "a datagram": (
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('198.51.100.2', 9))",
        "198.51.100.2:9",
    ),
    "the other family": ("socket.create_connection(('2001:db8::1', 443), 0.2)", "2001:db8::1:443"),
    "a name": ("socket.getaddrinfo('spy.example', 443)", "name spy.example"),
    "a grandchild": (
        "subprocess.run(['sh', '-c', 'bash -c \": > /dev/tcp/198.51.100.3/80\"; true'])",
        "198.51.100.3:80",
    ),
    "a thread": (
        "threading.Thread(target=lambda: socket.create_connection(('198.51.100.4', 80), 0.2)).start()",
        "198.51.100.4:80",
    ),
}


@pytest.mark.usefixtures("watchable")
@pytest.mark.parametrize("case", CONNECTS)
def test_the_watch_sees(case: str, tmp_path: Path) -> None:
    """The proof above is worth something only if these are found."""
    action, target = CONNECTS[case]
    program = f"import contextlib, socket, subprocess, threading\nwith contextlib.suppress(OSError): {action}"
    watched = Watch(log=tmp_path / "log")
    subprocess.run(watched.command([sys.executable, "-c", program]), check=True, capture_output=True)
    assert {attempt.target for attempt in watched.attempts()} == {target}


@pytest.mark.usefixtures("watchable")
def test_the_watch_knows_what_stays_here(tmp_path: Path) -> None:
    program = """if True:
        import contextlib, socket
        for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
            with contextlib.suppress(OSError):
                socket.create_connection((host, 9), 0.2)
        """
    watched = Watch(log=tmp_path / "log")
    subprocess.run(watched.command([sys.executable, "-c", program]), check=True)
    assert watched.attempts() == []
    assert watched.programs(), "it did see them"


PAGES = {
    "fetch": ("<script>fetch('https://198.51.100.5/x').catch(() => 0)</script>", "198.51.100.5"),
    "picture": ("<img src='http://spy.example/x.png'>", "spy.example"),
    "socket": ("<script>new WebSocket('ws://198.51.100.6/x')</script>", "198.51.100.6"),
    "name": ("<link rel=dns-prefetch href='//spy.example'>", "name"),
}


@pytest.mark.parametrize("case", PAGES)
def test_the_browser_tells(case: str, tmp_path: Path, browser: str) -> None:
    content, target = PAGES[case]
    outside: set[str] = set()
    with _site(f"<html><body>{content}</body></html>".encode()) as url:
        for number in range(10):  # whether it comes to a look-up before the page is over is a matter of luck
            (tmp_path / str(number)).mkdir()
            seen = visit(browser, url, tmp_path / str(number), seconds=3)
            assert seen.requests[0] == url
            outside |= {attempt.target for attempt in seen.outside}
            if target in outside:
                break
    assert target in outside


HASTY = """#!/bin/sh
for word; do case "$word" in --log-net-log=*) log="${word#*=}" ;; esac; done
if mkdir TRIED; then
    printf '{"constants": {"logEventTypes": {"REQUEST_ALI' > "$log"
else
    printf '{"constants": {"logEventTypes": {}}, "events": []}' > "$log"
fi
echo a page
"""


def test_a_browser_that_ends_before_its_log_is_written_is_started_again(tmp_path: Path) -> None:
    program = tmp_path / "browser"
    program.write_text(HASTY.replace("TRIED", str(tmp_path / "tried")))
    program.chmod(0o755)
    (tmp_path / "files").mkdir()
    seen = visit(str(program), "http://127.0.0.1:9/", tmp_path / "files")
    assert (seen.document, seen.requests, seen.outside) == ("a page\n", (), ())


@contextmanager
def _site(page: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def _pages(url: str, runs: list[dict]) -> list[str]:
    """Pages of both user interfaces: deployments, a run, its artifact and the form that starts one."""
    deployment, run = runs[0]["deployment_id"], runs[0]["id"]
    artifact = ask(f"{url}/api/artifacts/filter", {}, _SECONDS)[0]["id"]
    both = [
        "deployments",
        f"runs/flow-run/{run}",
        f"artifacts/artifact/{artifact}",
        f"deployments/deployment/{deployment}/run",
        "work-pools/create",
    ]
    return [*(f"/{path}" for path in both), *(f"/v2/{path}" for path in both)]


def _wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + _SECONDS
    while not path.exists() or not path.read_text():
        assert process.poll() is None, log.read_text("utf-8", "replace")
        assert time.monotonic() < end, log.read_text("utf-8", "replace")
        time.sleep(0.2)
    return path.read_text()

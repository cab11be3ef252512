"""A Prefect server of this machine's own: started when needed, stopped when everything is recorded.

Prefect's built-in temporary server dies before it has written down what happened: of twenty task runs ten
are lost. So a run starts a real server on a free port of 127.0.0.1, works against it, waits until every task
run can be read back, and then stops it. Runs that overlap share one server, the last one stops it; a server
that a killed run left behind is found and used again.
"""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from flows.errors import ServerError
from flows.prefect_app import MODULE
from flows.settings import FlowSettings, client_settings, prefect_environment, prefect_home, prepare
from registry.errors import Explained, shown

HOST = "127.0.0.1"
DATABASE_VARIABLE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
#: A server gives no more rows in one answer.
PAGE = 200
_THIS_MACHINE = frozenset({HOST, "localhost", "::1"})
_STOP_SECONDS = 30.0
_LOOK_SECONDS = 0.2
_BUSY_SECONDS = 60.0  # a server that others run; one that is away refuses at once
_LOG_LINES = 15
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A Prefect server.

    Attributes:
        url: address of its API.
        pid: its process, or None when somebody else runs it.
        reused: it was there before this run.
    """

    url: str
    pid: int | None
    reused: bool

    @property
    def page(self) -> str:
        """Address of its user interface."""
        return self.url.removesuffix("/api")


@contextmanager
def managed_server(
    data_folder: Path, settings: FlowSettings | None = None, port: int | None = None
) -> Iterator[Server]:
    """Give a Prefect server that answers; stop it afterwards if it is ours and nobody else uses it.

    Args:
        data_folder: its data lie in the folder ``prefect`` below.
        settings: None reads them.
        port: where a server that is started here listens; None takes a free one.

    Raises:
        ServerError: the server does not start or answer.
    """
    settings = settings or FlowSettings.read(data_folder)
    if settings.prefect_api_url is not None:
        if not healthy(settings.prefect_api_url, _BUSY_SECONDS):
            raise ServerError(
                f"the Prefect server {settings.prefect_api_url} does not answer",
                "start it, or unset PREFECT_API_URL to have one started for each run",
            )
        yield Server(url=settings.prefect_api_url, pid=None, reused=True)
        return
    prepare(data_folder)
    folder = prefect_home(data_folder)
    with (folder / "server.users").open("w") as users:
        with _locked(folder / "server.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)
            server = _running(folder, settings.server_timeout) or _start(data_folder, settings, port)
        try:
            yield server
        finally:
            with _locked(folder / "server.lock"):
                if _last(users):
                    _stop(folder)


@contextmanager
def attached(data_folder: Path, url: str) -> Iterator[None]:
    """Let flows of this process use a server; what still waits in the process is handed over at the end.

    Prefect sends news of a process by one worker that keeps its first address: without the end, flows that
    use another server later would never be on record there.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import temporary_settings

    with temporary_settings(client_settings(data_folder, url)):
        try:
            yield
        finally:
            APILogHandler().flush()
            EventsWorker.drain_all(timeout=30)


def healthy(url: str, timeout: float = 5.0) -> bool:
    """Return whether a Prefect API answers."""
    try:
        return ask(f"{url}/health", timeout=timeout) is True
    except (OSError, ValueError):
        return False


def task_runs(url: str, ids: list[str]) -> dict[str, str]:
    """Return the recorded state type of each of these task runs that the server knows.

    Raises:
        ServerError: it does not answer.
    """
    known = {}
    for begin in range(0, len(ids), PAGE):
        wanted = {"id": {"any_": ids[begin : begin + PAGE]}}
        try:
            rows = ask(f"{url}/task_runs/filter", {"task_runs": wanted, "limit": PAGE})
        except (OSError, ValueError) as error:
            raise ServerError(
                f"the Prefect server {url} does not say what it has recorded: {shown(error)}",
                "the results in the run folder are complete; their history may lack the end. See that the "
                "server runs and answers; the same command goes on from there",
            ) from error
        known |= {row["id"]: row["state_type"] for row in rows}
    return known


def wait_until_recorded(url: str, ids: list[str], timeout: float) -> None:
    """Wait until the server has written down the final state of each of these task runs.

    Raises:
        ServerError: it does not answer, or some are still missing after ``timeout`` seconds.
    """
    missing = list(ids)
    end = time.monotonic() + timeout
    while missing:
        known = task_runs(url, missing)
        missing = [run for run in missing if known.get(run) not in FINAL_STATES]
        if missing and time.monotonic() > end:
            raise ServerError(
                f"the Prefect server did not record {len(missing)} of {len(ids)} task runs in time",
                "the results in the run folder are complete; only their history is not. See its server.log",
            )
        if missing:
            time.sleep(0.2)


@contextmanager
def only_logged() -> Iterator[None]:
    """Log an error of a block instead of raising it: one that matters more is on its way; in a flow only."""
    from prefect.logging import get_run_logger

    try:
        yield
    except Exception as error:  # whatever it is, people need to see the first one
        said = error.message if isinstance(error, Explained) else f"{type(error).__name__}: {error}"
        get_run_logger().warning("Beside what ends this run: %s", shown(said))


def ask(
    url: str,
    body: Mapping[str, Any] | None = None,
    timeout: float = 30.0,
    variables: Mapping[str, str] = os.environ,
) -> Any:
    """Return the answer of a Prefect API to a GET, or to a POST of ``body``.

    A server that is too busy for its database answers 503 and is asked again until the time is over.

    Args:
        url: what is asked.
        body: None asks by GET.
        timeout: in seconds.
        variables: say who asks, and whose certificates are believed, as they do to Prefect's own client.

    Raises:
        OSError: it does not answer, or refuses.
        ValueError: the answer is no JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **_authorization(variables)}
    request = urllib.request.Request(url, data=data, headers=headers)  # noqa: S310
    opener = _opener(url, variables)
    end = time.monotonic() + timeout
    while True:
        try:
            with opener.open(request, timeout=timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > end:
                raise
        time.sleep(0.5)


def _opener(url: str, variables: Mapping[str, str]) -> urllib.request.OpenerDirector:
    """Return what goes the way to a server that Prefect's own client would go."""
    address = urllib.parse.urlsplit(url)
    handlers: list[urllib.request.BaseHandler] = []
    if address.hostname in _THIS_MACHINE:
        # A proxy of the environment must not stand between this process and its own machine.
        handlers.append(urllib.request.ProxyHandler({}))
    if address.scheme == "https" and (authority := variables.get("PREFECT_API_SSL_CERT_FILE")):
        context = ssl.create_default_context(cafile=authority)
        handlers.append(urllib.request.HTTPSHandler(context=context))
    return urllib.request.build_opener(*handlers)


def _authorization(variables: Mapping[str, str]) -> dict[str, str]:
    """Return what Prefect's own client would send."""
    if key := variables.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    if words := variables.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}
    return {}


@contextmanager
def exclusive(path: Path, busy: ServerError) -> Iterator[None]:
    """Hold a lock for the time of a block.

    Raises:
        ServerError: ``busy``, when another process holds it.
    """
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _last(users: IO[str]) -> bool:
    """Return whether no other run holds the shared lock."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _running(folder: Path, timeout: float) -> Server | None:
    """Return the server that the state file names, once it answers.

    One that lives is waited for: on a busy machine it may take long to answer, and a second server on the
    same database would be worse.

    Raises:
        ServerError: it lives, but did not answer within ``timeout`` seconds.
    """
    state = _state(folder)
    end = time.monotonic() + timeout
    while state is not None and _is_ours(state["pid"], state["port"]):
        url = f"http://{HOST}:{state['port']}/api"
        if healthy(url):
            return Server(url=url, pid=state["pid"], reused=True)
        if time.monotonic() > end:
            raise ServerError(
                f"the local Prefect server, process {state['pid']}, lives but did not answer within "
                f"{timeout:.0f} seconds; see {folder / 'server.log'}",
                "end that process and run the same command again, or raise "
                "ADAPTER_FOUNDRY_FLOWS_SERVER_TIMEOUT on a slow machine",
            )
        time.sleep(0.1)
    return None


def _state(folder: Path) -> dict[str, int] | None:
    try:
        value = json.loads((folder / "server.json").read_text("utf-8"))
        return {"pid": int(value["pid"]), "port": int(value["port"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_ours(pid: int, port: int) -> bool:
    """Return whether a process is a Prefect server on that port: numbers of processes are used again."""
    import psutil

    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return MODULE in words and str(port) in words


def _start(data_folder: Path, settings: FlowSettings, port: int | None) -> Server:
    """Start a server and wait until it answers; the first start creates and migrates its database.

    It gets its port with it, for it takes seconds to come to it, and until then another could have taken it.
    """
    folder = prefect_home(data_folder)
    log = folder / "server.log"
    with _claimed(port) as place:
        port = int(place.getsockname()[1])
        environment = {**os.environ, **server_environment(data_folder, settings, port)}
        environment.pop("PREFECT_API_URL", None)
        # A session of its own: Ctrl-C is for the run, and the server stays to record how it ended.
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*server_command(port), "--socket", str(place.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=folder,
                pass_fds=[place.fileno()],
            )
    url = f"http://{HOST}:{port}/api"
    try:
        (folder / "server.json").write_text(json.dumps({"pid": process.pid, "port": port}))
        _wait(process, url, log, settings.server_timeout)
    except BaseException:  # also Ctrl-C and a full disk: nobody else knows of it yet
        _end(process)
        (folder / "server.json").unlink(missing_ok=True)
        raise
    return Server(url=url, pid=process.pid, reused=False)


def server_command(port: int) -> list[str]:
    """Return the command of a server on a port of this machine."""
    # -P: the working directory must not shadow Prefect.
    return [sys.executable, "-P", "-m", MODULE, "--host", HOST, "--port", str(port)]


def server_environment(data_folder: Path, settings: FlowSettings, port: int) -> dict[str, str]:
    """Return the variables of a server that keeps its data in a data folder."""
    found = {
        **prefect_environment(data_folder),
        "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",
        # Prefect lets the pages of every website call its API, unless it is told whose pages are its own.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
    }
    if (database := settings.prefect_server_database_connection_url) is not None:
        found[DATABASE_VARIABLE] = database.get_secret_value()
    return found


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not healthy(url):
        if process.poll() is not None or time.monotonic() > end:
            last = "\n".join(log.read_text("utf-8", "replace").splitlines()[-_LOG_LINES:])
            raise ServerError(
                f"the local Prefect server did not start; the end of {log}:\n{last}",
                "correct what the log says, or raise ADAPTER_FOUNDRY_FLOWS_SERVER_TIMEOUT on a slow machine",
            )
        time.sleep(0.1)


def _claimed(port: int | None) -> socket.socket:
    """Return a socket that has a port of this machine and does not listen yet; None takes a free one."""
    found = socket.socket()
    if port:
        # As servers do it: what the kernel still remembers of one that ended is no hindrance.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port or 0))
    except OSError as error:
        found.close()
        raise ServerError(
            f"Prefect's server cannot listen on port {port}: {error.strerror}",
            "choose another port, or stop what listens there",
        ) from None
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server that is just starting: asked first, made to after half a minute."""
    for ask_it in (process.terminate, process.kill):
        ask_it()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)


def _stop(folder: Path) -> None:
    """Stop the server that the state file names: asked first, made to after half a minute.

    One that lives on is told of and stays known. That raises nothing: why the run ends matters more.
    """
    import psutil

    state = _state(folder)
    if state is None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(psutil.Error):  # it may end by itself at any moment
            process = psutil.Process(state["pid"])
            end = time.monotonic() + _STOP_SECONDS
            if _is_ours(**state):
                process.send_signal(number)
            # One that nobody reaps has ended, too: it has no command any more.
            while _is_ours(**state) and time.monotonic() < end:
                with suppress(psutil.TimeoutExpired):
                    process.wait(_LOOK_SECONDS)
    if _is_ours(**state):
        _LOG.warning(
            "The local Prefect server, process %d, does not end. Look what holds it; the next run finds it.",
            state["pid"],
        )
    else:
        (folder / "server.json").unlink(missing_ok=True)

"""The managed server: it is there while a run needs it, shared, found again, and gone afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from fakes.certificates import self_signed
from fakes.processes import stand_still
from flows import server as module
from flows.errors import ServerError
from flows.prefect_app import MODULE
from flows.server import HOST, ask, healthy, managed_server, task_runs, wait_until_recorded
from flows.settings import FlowSettings, prefect_home
from registry.errors import UsageError
from servers.ports import kept_port


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data folder for the module, so that its database is made once."""
    return tmp_path_factory.mktemp("flows-server")


def test_it_answers_while_it_is_needed_and_is_gone_afterwards(data_folder: Path) -> None:
    with managed_server(data_folder) as server:
        assert healthy(server.url)
        assert server.url.startswith("http://127.0.0.1:")
        with managed_server(data_folder) as second:
            assert second.reused
            assert second.pid == server.pid
        assert healthy(server.url), "the inner user must not stop the server of the outer one"
    assert not healthy(server.url)
    assert not (prefect_home(data_folder) / "server.json").exists()


def test_a_server_that_a_killed_run_left_behind_is_used_again(data_folder: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from flows.server import managed_server\n"
        "with managed_server(Path(sys.argv[1])): os._exit(9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(data_folder)], check=False)
    assert killed.returncode == 9
    left = json.loads((prefect_home(data_folder) / "server.json").read_text())
    with managed_server(data_folder) as server:
        assert server.reused
        assert server.pid == left["pid"]
    assert not healthy(server.url)


def test_a_server_that_is_slow_to_answer_is_waited_for_and_not_started_twice(data_folder: Path) -> None:
    with managed_server(data_folder) as server:
        assert server.pid is not None
        stand_still(server.pid)
        try:
            with (
                pytest.raises(ServerError, match="lives but did not answer"),
                managed_server(data_folder, FlowSettings(server_timeout=0.5)),
            ):
                pass
            threading.Timer(2.0, os.kill, (server.pid, signal.SIGCONT)).start()
            with managed_server(data_folder) as same:
                assert same.pid == server.pid
            stand_still(server.pid)
            threading.Timer(6.0, os.kill, (server.pid, signal.SIGCONT)).start()
            with managed_server(data_folder, FlowSettings(prefect_api_url=server.url)) as named:
                assert named.reused
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_a_stale_state_file_is_not_believed(data_folder: Path) -> None:
    """Numbers of processes are used again: a stranger with that number must not be taken for the server."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        state = prefect_home(data_folder) / "server.json"
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps({"pid": stranger.pid, "port": 4200}))
        with managed_server(data_folder) as server:
            assert server.pid != stranger.pid
        assert stranger.poll() is None, "the stranger must be left alone"
    finally:
        stranger.kill()
        stranger.wait()


def test_nobody_can_take_the_port_of_a_server_that_has_not_come_to_it(
    data_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, refused = module.server_command, list[int]()

    def others(port: int) -> list[str]:
        with socket.socket() as one:
            try:
                one.bind((HOST, port))
            except OSError:
                refused.append(port)
        return command(port)

    monkeypatch.setattr(module, "server_command", others)
    with managed_server(data_folder) as server:
        assert server.url == f"http://{HOST}:{refused[0]}/api"
        with pytest.raises(ServerError, match="in use"), managed_server(home, port=refused[0]):
            pass


#: A server that answers as long as nobody asks it to end; words are its port.
ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"true")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@contextmanager
def left_behind(home: Path) -> Iterator[psutil.Process]:
    """A server that the state file names, and whose parent does not reap it."""
    port = kept_port()
    parent = (
        f"import subprocess, sys, time; words = [sys.executable, '-c', {ANSWERS!r}, {MODULE!r}, '{port}']\n"
        "print(subprocess.Popen(words).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        try:
            while MODULE not in server.cmdline():
                time.sleep(0.01)
            prefect_home(home).mkdir(parents=True)
            (prefect_home(home) / "server.json").write_text(json.dumps({"pid": server.pid, "port": port}))
            yield server
        finally:
            with suppress(psutil.NoSuchProcess):
                server.kill()
            process.kill()


def test_a_server_that_has_ended_is_not_waited_for_because_nobody_reaps_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STOP_SECONDS", 5.0)
    with left_behind(home) as process:
        with managed_server(home) as server:
            assert server.pid == process.pid
        assert process.status() == psutil.STATUS_ZOMBIE
    assert not (prefect_home(home) / "server.json").exists()


def test_a_server_that_ends_while_it_is_looked_at_hides_no_error_of_the_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(process: psutil.Process, number: int) -> None:
        process.kill()
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        raise psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(psutil.Process, "send_signal", too_late)
    with left_behind(home), pytest.raises(KeyError, match="the run's own"), managed_server(home):
        raise KeyError("the run's own")
    assert not (prefect_home(home) / "server.json").exists()


def test_a_server_whose_state_cannot_be_written_is_stopped(home: Path) -> None:
    prefect_home(home).mkdir(parents=True)
    state = prefect_home(home) / "server.json"
    state.symlink_to(home / "nowhere" / "server.json")
    with pytest.raises(FileNotFoundError), managed_server(home):
        pass
    assert not state.is_symlink()
    for one in psutil.Process().children():
        with suppress(psutil.Error):
            assert one.cwd() != str(prefect_home(home)), one.cmdline()


def test_an_unknown_task_run_is_missed(data_folder: Path) -> None:
    nobody = "00000000-0000-4000-8000-000000000000"
    with managed_server(data_folder) as server:
        assert task_runs(server.url, [nobody]) == {}
        with pytest.raises(ServerError, match="1 of 1 task runs"):
            wait_until_recorded(server.url, [nobody], timeout=0.5)


class _Healthy(BaseHTTPRequestHandler):
    """Says that it is well, whatever it is asked; notes what for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextmanager
def answering(tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a server that answers."""
    _Healthy.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Healthy) as found:
        if tls is not None:
            found.socket = tls.wrap_socket(found.socket, server_side=True)
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield found.server_address[1]
        finally:
            found.shutdown()
            thread.join()


def test_a_server_with_a_certificate_of_its_own_authority_is_asked_as_prefect_asks_it(
    tmp_path: Path,
) -> None:
    tls, _ = self_signed(tmp_path, "localhost")
    with answering(tls) as port:
        url = f"https://localhost:{port}/api/health"
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            ask(url, variables={})
        assert ask(url, variables={"PREFECT_API_SSL_CERT_FILE": str(tmp_path / "cert.pem")}) is True


def test_a_server_elsewhere_is_asked_through_the_proxy_and_this_machine_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with answering() as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert ask("http://prefect.example/api/health") is True
        assert _Healthy.asked == ["http://prefect.example/api/health"]
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        assert ask(f"http://127.0.0.1:{port}/api/health") is True


def test_a_server_that_is_named_but_silent_is_explained(home: Path) -> None:
    settings = FlowSettings(prefect_api_url="http://127.0.0.1:9/api")
    with pytest.raises(ServerError, match="does not answer") as caught, managed_server(home, settings):
        pass
    assert "PREFECT_API_URL" in caught.value.mend


def test_a_server_that_does_not_start_shows_its_log(home: Path) -> None:
    (home / "prefect").mkdir()
    (home / "prefect" / "prefect.db").write_text("this is no database")
    with pytest.raises(ServerError, match=r"server\.log") as caught, managed_server(home):
        pass
    assert "not a database" in caught.value.message
    assert not (home / "prefect" / "server.json").exists()


def test_settings_are_read_and_a_wrong_one_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_FOUNDRY_FLOWS_SERVER_TIMEOUT", "12")
    assert FlowSettings.read(home).server_timeout == 12
    monkeypatch.setenv("ADAPTER_FOUNDRY_FLOWS_SERVER_TIMEOUTS", "12")
    with pytest.raises(UsageError, match="SERVER_TIMEOUT"):
        FlowSettings.read(home)

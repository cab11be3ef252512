"""supervisord: keeps the services alive, rotates their logs, and takes orders on a socket."""

from __future__ import annotations

import getpass
import http.client
import os
import shlex
import signal
import socket
import subprocess
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from infra.local.errors import CannotStart, NotRunning, PlatformError
from infra.local.place import Place, write
from infra.local.service import Service, launch_file, python, shell

#: Seconds a service has to live to count as started, and starts in a row that may fail before supervisord
#: gives up; the health watcher tries again later.
_LIVES, _STARTS = 1, 5
_BACKUPS = 3
_ANSWER_SECONDS = 10.0
_START_SECONDS = 30.0
#: XML-RPC's faults of supervisord: a process that runs already, or does not.
_ALREADY, _NOT_RUNNING = 60, 70
_ENDED = ("STOPPED", "EXITED", "FATAL")


def configuration(services: Sequence[Service], where: Place, log_bytes: int) -> str:
    """Return supervisord's configuration; it holds no secret."""
    sections = [
        _section(
            "supervisord",
            {
                "logfile": where.log("supervisord"),
                "logfile_maxbytes": log_bytes,
                "logfile_backups": _BACKUPS,
                "pidfile": where.run / "supervisord.pid",
                "childlogdir": where.logs,
                "directory": where.services,
                "identifier": "adapter-foundry",
                "umask": "077",
                "nocleanup": "true",
                **({"user": getpass.getuser()} if os.geteuid() == 0 else {}),
            },
        ),
        _section("unix_http_server", {"file": where.socket, "chmod": "0600"}),
        _section(
            "rpcinterface:supervisor",
            {"supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"},
        ),
    ]
    for service in services:
        command = python("infra.local.launch", str(launch_file(where, service.name)))
        settings = {
            "command": shlex.join(command),
            "autostart": "false",  # in order, by `up`
            "autorestart": "true",
            "startsecs": _LIVES,
            "startretries": _STARTS,
            "stopsignal": service.stop_signal,
            "stopwaitsecs": service.stop_seconds,
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": where.log(service.name),
            "stdout_logfile_maxbytes": log_bytes,
            "stdout_logfile_backups": _BACKUPS,
        }
        sections.append(_section(f"program:{service.name}", settings))
    return "\n".join(sections)


def _section(name: str, settings: Mapping[str, object]) -> str:
    # supervisord replaces %(...)s in values, and takes what follows " ;" for a comment.
    lines = [f"{key}={str(value).replace('%', '%%')}" for key, value in settings.items()]
    return "\n".join([f"[{name}]", *lines, ""])


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _Transport(xmlrpc.client.Transport):
    """XML-RPC over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__()
        self._path, self._timeout = path, timeout

    def make_connection(self, host: object) -> http.client.HTTPConnection:
        return _Connection(self._path, self._timeout)


class Supervisor:
    """The supervisord of a platform.

    Args:
        where: the platform.
    """

    def __init__(self, where: Place) -> None:
        self._where = where

    def ask(self, method: str, *arguments: object, timeout: float = _ANSWER_SECONDS) -> Any:
        """Return supervisord's answer to a method of its XML-RPC interface.

        Raises:
            NotRunning: it does not run, or does not answer.
            xmlrpc.client.Fault: it refuses.
        """
        transport = _Transport(self._where.socket, timeout)
        server = xmlrpc.client.ServerProxy("http://localhost", transport=transport)
        try:
            return getattr(server.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
            raise NotRunning(
                f"the platform in {self._where.home} does not run", "start it: python -m infra.local up"
            ) from error
        finally:
            transport.close()

    @property
    def pid(self) -> int | None:
        """Its process, or None where none lives: numbers are used again, so its words are read."""
        try:
            pid = int((self._where.run / "supervisord.pid").read_text("utf-8"))
            words = psutil.Process(pid).cmdline()
        except (OSError, ValueError, psutil.Error):
            return None
        return pid if str(self._where.services / "supervisord.conf") in words else None

    @property
    def answers(self) -> bool:
        """Whether it takes orders."""
        try:
            return bool(self.ask("getState")["statename"] == "RUNNING")
        except NotRunning:
            return False

    def start(self, text: str) -> None:
        """Start it with a configuration; a dead one's files are no hindrance.

        Raises:
            CannotStart: it does not come up.
        """
        conf = self._where.services / "supervisord.conf"
        write(conf, text)
        self._where.socket.unlink(missing_ok=True)
        ran = subprocess.run(
            [*python("supervisor.supervisord", "-c", str(conf))],
            env=shell(), cwd=self._where.services, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + _START_SECONDS
        while not self.answers:
            if ran.returncode != 0 or time.monotonic() > end:
                raise CannotStart(
                    f"supervisord does not start: {(ran.stderr or ran.stdout).strip()[-500:]}",
                    f"see {self._where.log('supervisord')}",
                )
            time.sleep(0.05)

    def configured(self, text: str) -> bool:
        """Whether it was started with this configuration by this interpreter."""
        try:
            return (self._where.services / "supervisord.conf").read_text("utf-8") == text
        except OSError:
            return False

    def states(self) -> dict[str, dict[str, Any]]:
        """Return what supervisord knows of each service, by name: statename, pid, start, now, spawnerr."""
        return {one["name"]: one for one in self.ask("getAllProcessInfo")}

    def run(self, name: str) -> None:
        """Have a service started; one that runs stays, and one that is being stopped ends all the same."""
        try:
            self.ask("startProcess", name, False)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != _ALREADY:
                raise

    def stop(self, names: Sequence[str], seconds: float) -> None:
        """Have services stopped all at once, and wait until they are.

        Raises:
            PlatformError: one still runs after so many seconds.
        """
        for name in names:
            try:
                self.ask("stopProcess", name, False)
            except xmlrpc.client.Fault as fault:
                if fault.faultCode != _NOT_RUNNING:
                    raise
        end = time.monotonic() + seconds
        while True:
            states = self.states()
            alive = [name for name in names if states[name]["statename"] not in _ENDED]
            if not alive:
                return
            if time.monotonic() > end:
                raise PlatformError(
                    f"{', '.join(alive)} did not stop in {seconds:.0f} seconds, though asked to and killed",
                    f"see {self._where.log('supervisord')}, then run this again",
                )
            time.sleep(0.05)

    def shut_down(self, seconds: float) -> None:
        """Stop it with all that it has; one that does not answer is killed."""
        pid = self.pid
        if pid is None:
            return
        with suppress(NotRunning, xmlrpc.client.Fault):
            self.ask("shutdown")
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            try:
                process.wait(seconds)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(_ANSWER_SECONDS)

    def kill(self) -> None:
        """Kill one that lives and does not answer; what it had is asked to stop by the kernel."""
        pid = self.pid
        if pid is not None:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                process.send_signal(signal.SIGKILL)
                process.wait(_ANSWER_SECONDS)

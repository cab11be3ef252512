"""A bash that is told one command after the other, as a reader types them, and servers beside it."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: The addresses that documents name, and the words by which each server says that it listens there.
SERVERS: Mapping[str, tuple[int, str]] = {
    "serving serve": (8400, r"http://127\.0\.0\.1:{port}"),
    "mlflow ui": (5000, r"running on http://127\.0\.0\.1:{port}"),
    "python -m flows.local": (4200, r"Stop with Ctrl-C|Ctrl-C"),
    "python -m flows.webhook": (8610, r"Listening for"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a command ended: its code, and what it printed."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out[-4000:]}\n--- stderr\n{self.err[-4000:]}"


class Shell:
    """One bash for one reader; variables and the folder that it is in stay from command to command."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._told, telling = os.pipe()
        self._out, self._err = folder / ".out", folder / ".err"
        work = folder / "work"
        work.mkdir(exist_ok=True)
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=(folder / ".bash").open("wb"), cwd=work, env=dict(environment), pass_fds=[telling],
            start_new_session=True,
        )  # fmt: skip
        os.close(telling)
        self._folder, self._telling, self._servers = folder, telling, 0
        self._say("set -m -o pipefail\n")

    def run(self, command: str, seconds: float = 900.0) -> Ended:
        """Run a command to its end.

        Raises:
            AssertionError: bash did not understand it, or it did not end in time.
        """
        self._say(f"{{ {command}\n}} >'{self._out}' 2>'{self._err}' </dev/null; echo $? >&{self._telling}\n")
        code = self._hear(command, seconds)
        return Ended(code=int(code), out=_read(self._out), err=_read(self._err))

    def start(self, command: str, ready: str, seconds: float = 900.0) -> Server:
        """Start a command that does not end, and wait until it prints what a pattern matches."""
        self._servers += 1
        log = self._folder / f".server{self._servers}"
        # a server is no reader: job control gives it a group of its own, so that Ctrl-C reaches all of it
        self._say(f"{{ {command}\n}} >'{log}' 2>&1 </dev/null &\necho $! >&{self._telling}\n")
        server = Server(command=command, pid=int(self._hear(command, seconds)), log=log, shell=self)
        began = time.monotonic()
        while not re.search(ready, _read(log)):
            assert server.alive(), f"`{command}` ended:\n{_read(log)}"
            assert time.monotonic() - began < seconds, f"`{command}` did not say {ready!r}:\n{_read(log)}"
            time.sleep(0.1)
        return server

    def close(self) -> None:
        """End bash, and whatever it left."""
        self._bash.kill()
        self._bash.wait()
        os.close(self._told)

    def _say(self, text: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(text.encode())
        self._bash.stdin.flush()

    def _hear(self, command: str, seconds: float) -> str:
        ready, _, _ = select.select([self._told], [], [], seconds)
        assert ready, f"`{command}` did not end in {seconds:.0f} s\n{_read(self._out)}{_read(self._err)}"
        told = os.read(self._told, 64).decode().strip()
        assert told, f"bash gave up at `{command}`: {_read(self._folder / '.bash')}"
        return told


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A command that runs beside the shell."""

    command: str
    pid: int
    log: Path
    shell: Shell

    def alive(self) -> bool:
        """Whether any process of it is there."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def stop(self, seconds: float = 300.0) -> Ended:
        """Press Ctrl-C, and wait until it has ended."""
        os.killpg(self.pid, signal.SIGINT)
        ended = self.shell.run(f"wait {self.pid}", seconds)
        return Ended(code=ended.code, out=_read(self.log), err=ended.err)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""

"""The real HTTP service in a process of its own, over a backend that draws.

It prints its address, and ends with SIGTERM. Its memory can be looked at from outside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunningService:
    """A service that answers.

    Attributes:
        url: its address.
        port: of it, on 127.0.0.1.
        process: it.
    """

    url: str
    port: int
    process: subprocess.Popen[str]

    def await_answers(self) -> None:
        """Wait until it listens: its address is known before that."""
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 60).close()
            except OSError:
                assert self.process.poll() is None, "the service ended"
                assert time.monotonic() < deadline, "the service does not listen"
                time.sleep(0.05)
            else:
                return

    def let_go(self) -> None:
        """Let the steps be taken of a service that was started ``held``."""
        self.process.send_signal(signal.SIGUSR1)

    def memory(self, what: str = "VmRSS") -> int:
        """Bytes of memory that it has now; ``VmHWM`` is the most that it had since `forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(what + ":"))
        return int(line.split()[1]) * 1024

    def forget_peak(self) -> None:
        """Begin to measure the most memory anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def files(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def running(
    home: Path, *, step_seconds: float = 0.0, held: bool = False, **settings: object
) -> Iterator[RunningService]:
    """Starts the service on a free port.

    Args:
        home: its data folder.
        step_seconds: that a step takes.
        held: no step is taken before `RunningService.let_go`.
        settings: of serving.
    """
    tests = Path(__file__).resolve().parents[1]
    variables = {f"ADAPTER_FOUNDRY_SERVING_{key.upper()}": str(value) for key, value in settings.items()}
    environment = {
        **os.environ,
        **variables,
        "ADAPTER_FOUNDRY_HOME": str(home),
        "ADAPTER_FOUNDRY_SERVING_PORT": "0",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "servers.service", str(step_seconds), *(["held"] if held else [])],
        env=environment,
        cwd=home,
        text=True,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the service did not start"
        found = RunningService(url=url, port=int(url.rpartition(":")[2]), process=process)
        found.await_answers()
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Answer until SIGTERM."""
    from fakes.backends import DrawingBackend
    from registry.settings import home
    from serving.http.app import drain, service_app
    from serving.http.server import HttpServer
    from serving.settings import load

    settings = load()
    backend = DrawingBackend(step_seconds=float(sys.argv[1]))
    if "held" in sys.argv:
        backend.go.clear()
        signal.signal(signal.SIGUSR1, lambda *_: backend.go.set())
    app = service_app(backend, settings, home=home())
    server = HttpServer(app, settings, lambda: drain(app))
    print(server.bind(), flush=True)
    server.run()


if __name__ == "__main__":
    main()

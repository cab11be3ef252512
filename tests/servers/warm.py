"""Our commands without their start-up: one process has imported everything and forks for each command.

``python -m servers.warm SOCKET`` serves; `SHIM` is what lies on the PATH as ``registry``, ``serving`` and
``trainer``: it hands its words, environment, folder and open files over, and ends as the command ends. So a
shell runs documented commands as it would run the real ones: with pipes, redirections and signals, each in a
process of its own.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

TOOLS = {"registry": "registry.cli", "serving": "serving.cli", "trainer": "trainer.cli"}
#: What the commands import sooner or later. Prefect is not here: it reads its settings when it is imported.
HEAVY = (
    *TOOLS.values(), "registry.client", "mlflow", "torch", "diffusers", "serving.engine", "serving.following",
    "trainer.evaluation.evaluating", "trainer.launch", "serving.http.app",
)  # fmt: skip
_LONGEST = 1 << 20

SHIM = """#!{python} -IS
import json, os, signal, socket, sys
stops = signal.SIGINT, signal.SIGTERM
signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # until they can be passed on
line = socket.socket(socket.AF_UNIX)
line.connect({socket!r})
told = json.dumps({{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "cwd": os.getcwd(),
                   "env": dict(os.environ)}}).encode()
socket.send_fds(line, [len(told).to_bytes(4, "big")], [0, 1, 2])
line.sendall(told)
answer = line.makefile()
child = int(answer.readline())
for number in stops:
    signal.signal(number, lambda given, _: os.kill(child, given))
signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
sys.exit(int(answer.readline() or 70))
"""


@contextmanager
def running(folder: Path) -> Iterator[Path]:
    """Give a folder for the front of a PATH in which our commands start at once."""
    address, shims = folder / "warm", folder / "bin"
    shims.mkdir()
    for tool in TOOLS:
        shim = shims / tool
        shim.write_text(SHIM.format(python=sys.executable, socket=str(address)))
        shim.chmod(0o755)
    here = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(here)}
    with (folder / "warm.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "servers.warm", str(address)],
            env=environment, stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    try:
        began = time.monotonic()
        while not address.exists():
            assert server.poll() is None, (folder / "warm.log").read_text()
            assert time.monotonic() - began < 300, "the commands did not get warm"
            time.sleep(0.05)
        yield shims
    finally:
        server.kill()
        server.wait()


def serve(address: Path) -> NoReturn:
    """Fork for each command that a shim hands over, for ever."""
    for module in HEAVY:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    new = address.with_suffix(".new")
    listener.bind(str(new))
    listener.listen(64)
    new.rename(address)  # whoever sees it can connect
    while True:
        line, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _keep(line)
        line.close()


def _keep(line: socket.socket) -> NoReturn:
    """Start the command, tell who it is, and how it ended."""
    length, files, _, _ = socket.recv_fds(line, 4, 3)
    told = json.loads(line.makefile("rb").read(int.from_bytes(length, "big")))
    child = os.fork()
    if child == 0:
        line.close()
        _become(told["argv"], told["env"], told["cwd"], files)
    for file in files:
        os.close(file)
    line.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{used.ru_utime + used.ru_stime:.2f} s of CPU: {' '.join(told['argv'])}", flush=True)
    code = os.waitstatus_to_exitcode(status)
    line.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    os._exit(0)


def _become(argv: list[str], environment: dict[str, str], folder: str, files: list[int]) -> NoReturn:
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    code: object = 70
    try:
        importlib.import_module(TOOLS[argv[0]]).main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

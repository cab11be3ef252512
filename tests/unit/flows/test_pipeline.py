"""The command of the main job: what it tells when all is done."""

from __future__ import annotations

import os
import subprocess
import sys

from flows.pipeline import peak_memory
from flows.server import Server


def test_the_memory_of_a_server_that_has_ended_is_left_out() -> None:
    """Its process may be gone, or wait for its parent: a run that is complete does not fail for that."""

    def known(pid: int | None) -> set[str]:
        return set(peak_memory(Server(url="http://127.0.0.1:9/api", pid=pid, reused=False)))

    assert known(os.getpid()) == {"run", "largest_child", "server"}
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert known(process.pid) == {"run", "largest_child"}
    process.wait()
    assert known(process.pid) == known(None) == {"run", "largest_child"}

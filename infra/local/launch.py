"""Becomes a service: ``python -m infra.local.launch FILE`` is what supervisord starts.

Whatever an earlier process of the service has left behind is ended first, for it would hold ports and locks.
Should supervisord be killed, the kernel asks the service to stop: nobody would look after it any more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from infra.local.leftovers import end, forget, processes
from infra.local.service import PLATFORM_MARK, fingerprint, python
from trainer.parent import end_with_parent


def main(file: Path) -> None:
    """Replace this process with the service that a launch file describes."""
    text = file.read_text("utf-8")
    service = json.loads(text)
    name, environment = service["name"], {**os.environ, **service["environment"]}
    end(processes(environment[PLATFORM_MARK], name), service["stop_seconds"])
    if service["pid_file"] is not None:
        forget(Path(service["pid_file"]))
    started = file.with_suffix(".started")
    started.unlink(missing_ok=True)
    started.touch(mode=0o600)
    started.write_text(json.dumps({"launched": fingerprint(text), "pid": os.getpid()}))
    command = service["command"]
    if service["many"]:
        command = [*python("flows.child", str(os.getppid()), str(service["stop_seconds"] - 5)), *command]
    os.chdir(service["folder"])
    if service["user"] is not None:
        user, group = service["user"]
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
    # After the change of the user, which would forget it. A keeper looks after its parent itself.
    end_with_parent(signal.Signals[f"SIG{service['stop_signal']}"])
    os.execvpe(command[0], command, environment)  # noqa: S606


if __name__ == "__main__":
    main(Path(sys.argv[1]))

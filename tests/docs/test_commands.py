"""Every command that a page shows is run, in the page's order, by a real shell in a sandbox.

How pages say what they need is told in `fakes.pages`; what is not run is parsed, so that the command and each
of its options exist (tests/docs/test_pages.py). What says ``needs: make`` is run elsewhere:

=================================== ========================================================================
command                             is run by
=================================== ========================================================================
``make demo``, ``flows.pipeline``   tests/integration/test_pipeline.py, tests/integration/test_kills.py
``make up``, ``down``, ``status``   tests/infra/test_local.py, through ``python -m infra.local``
``make test``, ``make check``       whoever runs this
``make docs``                       tests/docs/test_site.py
``make bench``                      nobody: benchmarks print figures and pass or fail nothing
=================================== ========================================================================
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from fakes.pages import Step, documents, relative, steps
from fakes.sandboxes import DATA, SANDBOXES
from servers.ports import kept_port
from servers.shell import SERVERS, Server, Shell

PAGES = [path for path in documents() if any(step.kind == "command" for step in steps(path))]


class Reader:
    """Somebody who types what a page says."""

    def __init__(self, folder: Path, environment: dict[str, str], ports: Mapping[int, int]) -> None:
        self._folder, self._environment = folder, environment
        self._servers: list[Server] = []
        self._shell: Shell | None = None
        self._replaced: dict[str, str] = {}
        self._ports = ports
        self._count = 0

    def sandbox(self, names: str) -> None:
        """Begin anew, with what these sandboxes hold."""
        self.leave()
        self._count += 1
        folder = self._folder / f"sandbox-{self._count}"
        home, work = folder / "home", folder / "work"
        work.mkdir(parents=True)
        (home / DATA.parent).mkdir(parents=True)
        for name in names.split():
            SANDBOXES[name](home, work)
        self._shell = Shell(folder, {**self._environment, "HOME": str(home)})

    def take(self, step: Step) -> None:
        """Do one step of a page."""
        if step.kind == "sandbox":
            self.sandbox(step.text)
        elif step.kind == "where":
            self._replaced[step.what] = step.text
        elif not step.needs:
            self._run(step)

    def _run(self, step: Step) -> None:
        if self._shell is None:
            self.sandbox("empty")
        assert self._shell is not None
        command = step.text
        for what, put in self._replaced.items():
            command = command.replace(what, put)
        for port, free in self._ports.items():
            command = re.sub(rf"(:|--port ){port}\b", rf"\g<1>{free}", command)
        for begin, (port, ready) in SERVERS.items():
            if re.match(rf"(\w+=\S* )*{re.escape(begin)}\b", command):
                bare, _, _ = command.partition(" # ")
                line = bare if "--port" in bare else f"{bare.rstrip()} --port {self._ports[port]}"
                self._servers.append(self._shell.start(line, ready.format(port=self._ports[port])))
                return
        began = time.monotonic()
        ended = self._shell.run(command)
        print(f"$ {command}\n{ended.out}{ended.err}{step}: {time.monotonic() - began:.1f} s\n")
        assert ended.code == step.code, f"{step}: `{command}` should end with {step.code}: {ended}"

    def leave(self) -> None:
        """Press Ctrl-C in every server, which has to end well, and close the shell."""
        for server in reversed(self._servers):
            ended = server.stop()
            assert ended.code in (0, 130), f"Ctrl-C in `{server.command}`: {ended}"
        self._servers.clear()
        if self._shell is not None:
            self._shell.close()
            self._shell = None


@pytest.fixture(scope="module")
def ports() -> dict[int, int]:
    """Where each server listens instead, by the port that pages name."""
    return {port: kept_port() for port, _ in SERVERS.values()}


@pytest.fixture
def reader(tmp_path: Path, environment: dict[str, str], ports: dict[int, int]) -> Iterator[Reader]:
    with ExitStack() as stack:
        found = Reader(tmp_path, environment, ports)
        stack.callback(found.leave)
        yield found


@pytest.mark.integration
@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_the_commands_of_a_page_do_what_it_says(page: Path, reader: Reader) -> None:
    for step in steps(page):
        reader.take(step)
    reader.leave()

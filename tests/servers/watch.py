"""Who a tree of processes speaks to, and a page: every connection and every look-up of a name.

`Watch` sees system calls, by strace, so it misses no language, no library and no child: a datagram, a
connection that is refused and a name that nobody knows are attempts, too. A name that goes to a server on
this very machine is still a look-up. What a page does is seen by the net log of the browser instead, for a
browser of its own accord asks its vendor for many things that are none of the page's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

_STRACE = (
    *("strace", "-f", "--seccomp-bpf", "-qq", "-yy", "-Y", "-x", "-s", "512", "-e", "signal=none"),
    *("-e", "trace=connect,sendto,sendmsg,sendmmsg"),
)
_LINE = re.compile(
    r"^(?P<pid>\d+)(?:<(?P<program>.*?)>)? +(?:<\.\.\. )?(?P<call>connect|sendto|sendmsg|sendmmsg)\b"
)
_ADDRESSES = (
    re.compile(r'sin_port=htons\((?P<port>\d+)\), sin_addr=inet_addr\("(?P<ip>[^"]+)"\)'),
    re.compile(r'sin6_port=htons\((?P<port>\d+)\).*?inet_pton\(AF_INET6, "(?P<ip>[^"]+)"'),
    re.compile(r"(?:TCP|UDP)(?:v6)?:\[[^\]]*->\[?(?P<ip>[0-9a-f.:]+?)\]?:(?P<port>\d+)\]"),
)
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})+)"')
#: systemd's resolver is asked through a socket of the file system.
_RESOLVERS = re.compile(r'sun_path="(/run/systemd/resolve/[^"]+)"')
_MARK = "TESTS_WATCHED_BY"
_NSCD = Path("/var/run/nscd/socket")
_DNS = 53
_DNS_HEADER = 12
_NET_LOG = "net.json"
_VISITS = 3
_VISIT_SECONDS = 540
_SCHEMES = ("http", "https", "ws", "wss")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Attempt:
    """Somebody tried to reach something outside of this machine.

    Attributes:
        program: name of the process, or "page".
        target: address and port, address of a page, or "name …" for what was looked up.
    """

    program: str
    target: str


def missing() -> str | None:
    """Why nothing can be watched here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed (Debian: apt-get install strace)"
    tried = subprocess.run([*_STRACE, "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"strace may not trace here: {tried.stderr.strip()}"
    if _NSCD.exists():
        return f"{_NSCD} answers look-ups of names and of accounts alike: they cannot be told apart"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Watches what is started by its `command`, with all children, until they end.

    Attributes:
        log: file for what strace writes.
    """

    log: Path

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs ``words`` under watch; its exit status is theirs."""
        return [*_STRACE, "-o", str(self.log), *words]

    @contextmanager
    def running(
        self, words: Sequence[str], environment: Mapping[str, str], folder: Path, output: Path
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Runs ``words`` under watch; whatever of it still lives when the block ends is killed.

        Args:
            words: the command.
            environment: its variables.
            folder: its working folder.
            output: file for what it and its children write.
        """
        marked = {**environment, _MARK: str(self.log)}
        with output.open("wb") as stream:
            process = subprocess.Popen(
                self.command(words), env=marked, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                cwd=folder,
            )  # fmt: skip
        try:
            yield process
        finally:
            # The mark is inherited, also by those that leave the family, as daemons do.
            for one in self._marked():
                with contextlib.suppress(psutil.Error):
                    one.kill()
            process.kill()
            process.wait()

    def _marked(self) -> Iterator[psutil.Process]:
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.environ().get(_MARK) == str(self.log):
                    yield one

    def programs(self) -> set[str]:
        """Names of the processes that sent anything anywhere, this machine included."""
        return {str(found["program"]) for found in map(_LINE.match, self._lines()) if found}

    def attempts(self) -> list[Attempt]:
        """Everything that went, or tried to go, to another machine or to a resolver of names; each once."""
        found = {one for line in self._lines() for one in _attempts(line)}
        # The connection to a server of names says less than the question that follows.
        named = {one.program for one in found if one.target.startswith("name ")}
        return sorted(one for one in found if one.target != "name" or one.program not in named)

    def _lines(self) -> Iterator[str]:
        with self.log.open(encoding="ascii", errors="replace") as stream:
            yield from stream


def _attempts(line: str) -> Iterator[Attempt]:
    """What one line of strace says about other machines."""
    start = _LINE.match(line)
    if start is None:
        return
    program = str(start["program"])
    for path in _RESOLVERS.findall(line):
        yield Attempt(program=program, target=f"name, by {path}")
    asked = False
    for pattern in _ADDRESSES:
        for found in pattern.finditer(line):
            port = int(found["port"])
            asked = asked or port == _DNS
            if not local(found["ip"]) and port != _DNS:
                yield Attempt(program=program, target=f"{found['ip']}:{port}")
    if asked:
        names = {name for data in _BYTES.findall(line) if (name := _asked_name(data))}
        for name in names or {""}:
            yield Attempt(program=program, target=f"name {name}".rstrip())


def _asked_name(escaped: str) -> str:
    """The name in a DNS query, which strace shows as bytes in hexadecimal; empty if there is none."""
    data = bytes.fromhex(escaped.replace("\\x", ""))
    labels, at = [], _DNS_HEADER
    while at < len(data) and 0 < data[at] < 64:
        labels.append(data[at + 1 : at + 1 + data[at]].decode("ascii", "replace"))
        at += 1 + data[at]
    return ".".join(labels)


def local(host: str) -> bool:
    """Whether an address, or a name, is this machine's own loopback."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What a page did in a browser.

    Attributes:
        document: the page as HTML, after its scripts ran.
        requests: every address of this machine that was asked for.
        outside: other machines that the page asked for something, or whose names it looked up.
    """

    document: str
    requests: tuple[str, ...]
    outside: tuple[Attempt, ...]


def browser() -> str | None:
    """Path of an installed browser that has a net log, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def visit(browser: str, url: str, folder: Path, seconds: float = 20.0) -> Visit:
    """Open a page in a headless browser that reaches nothing but 127.0.0.1, and say what the page asked for.

    Args:
        browser: a Chromium.
        url: of the page.
        folder: empty, for the browser's own files.
        seconds: of the page's own time, which stands still while it waits for an answer.
    """
    for number in range(_VISITS):
        own = folder / f"visit-{number}"
        own.mkdir()
        document = _dumped(browser, url, own, seconds)
        try:
            log = json.loads((own / _NET_LOG).read_text("utf-8"))
        except (ValueError, FileNotFoundError):
            continue  # on a busy machine it may end before all is written, which says nothing about the page
        asked, outside = _requests(log, url)
        return Visit(document=document, requests=asked, outside=outside)
    raise AssertionError(f"{browser} has cut its net log off {_VISITS} times")


def _dumped(browser: str, url: str, folder: Path, seconds: float) -> str:
    """The document of a page, whose net log is in the folder afterwards."""
    return subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-features=AutofillServerCommunication",
            f"--user-data-dir={folder / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", f"--log-net-log={folder / _NET_LOG}",
            "--window-size=1400,1000", f"--virtual-time-budget={seconds * 1000:.0f}", "--dump-dom", url,
        ],
        check=True, capture_output=True, timeout=_VISIT_SECONDS, text=True,
    ).stdout  # fmt: skip


def _requests(log: dict[str, Any], url: str) -> tuple[tuple[str, ...], tuple[Attempt, ...]]:
    """What a page asked for, and which of it was elsewhere.

    The browser's own requests come from no origin; a name that it looks up for a page is marked with the
    page's site.
    """
    types = {number: name for name, number in log["constants"]["logEventTypes"].items()}
    site = "{0.scheme}://{0.hostname}".format(urlsplit(url))
    asked, outside = [], set()
    for event in log["events"]:
        facts, kind = event.get("params", {}), types[event["type"]]
        if kind == "URL_REQUEST_START_JOB" and "url" in facts:
            where = urlsplit(facts["url"])
            here = local(where.hostname or "")
            if here:
                asked.append(facts["url"])
            elif where.scheme in _SCHEMES and facts.get("initiator") != "not an origin":
                outside.add(Attempt(program="page", target=where.netloc))
        elif kind == "HOST_RESOLVER_MANAGER_REQUEST" and "host" in facts:
            mine = facts.get("network_anonymization_key", "").startswith(site)
            if mine and not local(urlsplit(facts["host"]).hostname or ""):
                outside.add(Attempt(program="page", target="name"))
    return tuple(asked), tuple(sorted(outside))

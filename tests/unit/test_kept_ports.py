"""A port that a test gives to a server is nobody else's: before it comes, between its starts, and after."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from servers.ports import HOST, kept_port

#: Says whether another process may take a port that it believes to be free.
STRANGER = "import socket, sys; socket.socket().bind((sys.argv[1], int(sys.argv[2])))"


def is_free_for_others(port: int) -> bool:
    done = subprocess.run([sys.executable, "-c", STRANGER, HOST, str(port)], capture_output=True, text=True)
    assert done.returncode == 0 or "Address already in use" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("beside", [(), (10_000,)])
def test_only_the_server_that_was_told_listens_on_a_kept_port(beside: tuple[int, ...]) -> None:
    port = kept_port(*beside)
    for number in (port, *(port + far for far in beside)):
        assert not is_free_for_others(number)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, number))
        for _ in range(2):
            with socket.create_server((HOST, number)):
                socket.create_connection((HOST, number)).close()
        assert not is_free_for_others(number)


def test_ports_are_kept_once() -> None:
    found = [kept_port() for _ in range(20)] + [kept_port(10_000) for _ in range(20)]
    assert len(set(found)) == len(found)

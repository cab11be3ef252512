"""What `serving ray` chooses before there is a cluster."""

from __future__ import annotations

import socket

import pytest

from serving.errors import UsageError
from serving.ray_command import _free_port

EPHEMERAL = 32_768
"""The first port that Linux gives to connections."""


def test_the_port_is_free_and_none_that_a_connection_gets_meanwhile() -> None:
    for _ in range(20):
        port = _free_port("127.0.0.1")
        assert 1024 < port < EPHEMERAL
        with socket.create_server(("127.0.0.1", port)):
            assert _free_port("127.0.0.1") != port


def test_an_address_of_another_machine_is_explained() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.1"):
        _free_port("203.0.113.1")

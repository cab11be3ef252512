"""Ports for servers of tests that have to be told where to listen, and listen only later."""

from __future__ import annotations

import random
import socket

HOST = "127.0.0.1"
#: Below those that the kernel gives to connections, and, as those 10,000 above, none of those that our own
#: services choose from; browsers refuse some from 1,719 on.
_LOW = range(1_100, 1_700)


def kept_port(*beside: int) -> int:
    """A port of the loopback that is nobody else's until this process ends.

    A socket that never listens is bound to it, so that neither the kernel nor another test process gives it
    away, however late the server comes. The server itself may listen there: it sets SO_REUSEADDR as servers
    do, and so does this socket once it has the port.

    Args:
        beside: how far from it lie further ports that the server takes, too.
    """
    while True:
        port = random.SystemRandom().choice(_LOW)
        held: list[socket.socket] = []
        try:
            for far in (0, *beside):
                held.append(socket.socket())
                held[-1].bind((HOST, port + far))
        except OSError:
            for one in held:
                one.close()
            continue
        for one in held:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.detach()  # the file stays open
        return port

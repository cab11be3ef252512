"""The HTTP service in a thread, on a free port, or without one."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from serving.settings import ServingSettings


def local_client(app: FastAPI) -> TestClient:
    """A client of an application in this process, which it takes for a program of this machine."""
    from fastapi.testclient import TestClient

    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))


class Served:
    """A server of an application, for as long as it is open.

    Attributes:
        url: where it answers.
    """

    def __init__(self, app: FastAPI, settings: ServingSettings) -> None:
        from serving.http.app import drain
        from serving.http.server import HttpServer

        self.server = HttpServer(app, settings, lambda: drain(app))
        self.url = self.server.bind()
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        end = time.monotonic() + 600
        while not self.server.started:
            assert self._thread.is_alive(), "it did not start"
            assert time.monotonic() < end
            time.sleep(0.01)
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.stop()
        self._thread.join(60)

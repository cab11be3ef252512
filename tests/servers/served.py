"""The HTTP service in a thread, on a free port."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serving.settings import ServingSettings


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

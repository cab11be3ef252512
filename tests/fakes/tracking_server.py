"""The part of MLflow's tracking server that a training speaks to, which can be away for a while."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

Answer = tuple[int, Mapping[str, Any]]
_ABSENT: Answer = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is none"})


class TrackingServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        runs: id -> status.
        figures: of all runs: id, name, value, step and time; those that came twice are there once.
        away: connections are closed without an answer.
        failing: requests whose path has this word get a 500.
        holding: requests whose path has this word are answered once `let_go` is set.
        asked: requests while it was away, failing or holding.
    """

    daemon_threads = True

    def __init__(self, artifacts: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.artifacts = artifacts
        self.runs: dict[str, str] = {}
        self.figures: set[tuple[str, str, float, int, int]] = set()
        self.away, self.failing, self.holding = False, "", ""
        self.let_go = threading.Event()
        self.asked = threading.Semaphore(0)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def steps(self, run: str, name: str) -> list[int]:
        """The steps of which a run has this figure."""
        return sorted(one[3] for one in self.figures if one[:2] == (run, name))

    def answer(self, what: str, body: Mapping[str, Any]) -> Answer:
        """Answer a request by the end of its path."""
        if what == "experiments/create":
            return 200, {"experiment_id": "1"}
        if what == "runs/create":
            run = uuid4().hex
            self.runs[run] = "RUNNING"
            return 200, {"run": self._run(run)}
        run = str(body.get("run_id"))
        if not what.startswith("runs/") or run not in self.runs:
            return _ABSENT
        if what == "runs/update":
            self.runs[run] = body.get("status", self.runs[run])
            return 200, {"run_info": self._run(run)["info"]}
        if what == "runs/log-batch":
            for one in body.get("metrics", ()):
                self.figures.add((run, one["key"], one["value"], int(one["step"]), int(one["timestamp"])))
        return 200, {"run": self._run(run)}

    def _run(self, run: str) -> dict[str, Any]:
        place = (self.artifacts / run).as_uri()
        info = {"run_id": run, "experiment_id": "1", "lifecycle_stage": "active", "artifact_uri": place}
        return {"info": {**info, "run_uuid": run, "status": self.runs[run]}, "data": {}}


class _Handler(BaseHTTPRequestHandler):
    server: TrackingServer

    def _answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.away:
            self.server.asked.release()
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        body = json.loads(data) if data else {key: one[0] for key, one in parse_qs(parts.query).items()}
        if self.server.holding and self.server.holding in parts.path:
            self.server.asked.release()
            self.server.let_go.wait(600)
        code, value = self.server.answer(parts.path.partition("/mlflow/")[2], body)
        if self.server.failing and self.server.failing in parts.path:
            self.server.asked.release()
            code, value = 500, {"error_code": "INTERNAL_ERROR", "message": "try again"}
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = _answer

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def tracking_server(artifacts: Path) -> Iterator[TrackingServer]:
    """Starts a server and stops it."""
    server = TrackingServer(artifacts)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()

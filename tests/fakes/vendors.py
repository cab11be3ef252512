"""Vendors of paid models, on 127.0.0.1: they speak the true protocols, misbehave on demand and keep accounts.

`Vendor` is the server: keys, a log, faults by the number of a request. `images` adds the endpoints that edit
pictures: Gemini's ``:generateContent`` and OpenAI's ``/v1/images/edits``. An endpoint is a function from
`Asked` to `Told`; more are added with `Vendor.route`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KEY = "sk-fake-0123456789abcdef-never-on-a-disk"
IMAGE_TOKENS = 1120
PROMPT_TOKENS = 600


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What takes the place of an honest answer.

    Attributes:
        kind: "status" (an error in the protocol's form), "slow" (the answer comes too late), "reset" (the
            connection is torn after the work was done), "refused" (torn before any work), "held" (never
            answered), "truncated" (half of the JSON), "html" (a page of some gateway), "masked" (an error
            that a gateway sends with status 200), "deep" (JSON that no parser follows to its end), "endless"
            (chunk after chunk), "packed" (a few kilobytes that unfold into gigabytes), or any other word,
            which the endpoint itself understands.
        status, headers, code: of the error.
        seconds: of "slow".
    """

    kind: str
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    seconds: float = 0.0


@dataclass(kw_only=True)
class Asked:
    """A request as it came."""

    number: int
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    fault: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(kw_only=True)
class Told:
    """An honest answer, and what the vendor takes for it."""

    body: bytes
    status: int = 200
    media_type: str = "application/json"
    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    images: int = 0


@dataclass(kw_only=True)
class Logged:
    """What became of a request.

    Attributes:
        status: that was sent; 0 when nothing was.
        sent: bytes of a flood.
        done: the vendor did the work, and bills it; `told` says how much.
    """

    asked: Asked
    status: int = 0
    fault: str = ""
    sent: int = 0
    done: bool = False
    told: Told | None = None


Endpoint = Callable[[Asked], Told | None]


class Vendor(ThreadingHTTPServer):
    """The server; a context manager.

    Attributes:
        log: of all requests, in the order of their arrival.
        faults: number of a request (from 1) -> fault.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, faults: Mapping[int, Fault] | None = None, key: str = KEY) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.faults = key, dict(faults or {})
        self.log: list[Logged] = []
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self._routes: list[tuple[re.Pattern[str], Endpoint]] = []

    @property
    def gemini(self) -> str:
        """The address for google-genai."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def openai(self) -> str:
        """The address for openai."""
        return f"{self.gemini}/v1"

    def route(self, pattern: str, endpoint: Endpoint) -> Self:
        """Let an endpoint answer paths that match; those that came last are asked first.

        An endpoint that returns None leaves the request to the next one.
        """
        self._routes.insert(0, (re.compile(pattern), endpoint))
        return self

    def answer(self, asked: Asked) -> Told | None:
        for pattern, endpoint in self._routes:
            if pattern.fullmatch(asked.path) and (told := endpoint(asked)) is not None:
                return told
        return None

    def billed(self) -> dict[str, int]:
        """Return what the vendor takes: answers, tokens and images of the work that was done."""
        done = [one.told for one in self.log if one.done and one.told is not None]
        return {
            "answers": len(done),
            "input_tokens": sum(told.input_tokens for told in done),
            "output_tokens": sum(told.output_tokens for told in done),
            "images": sum(told.images for told in done),
        }

    def arrived(self, asked: Asked) -> tuple[Logged, Fault | None]:
        with self.lock:
            asked.number = len(self.log) + 1
            fault = self.faults.get(asked.number)
            asked.fault = fault.kind if fault else ""
            self.log.append(Logged(asked=asked, fault=asked.fault))
            return self.log[-1], fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on this server; that is no news."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Vendor

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(number=0, method="POST", path=self.path.partition("?")[0], headers=headers, body=body)
        logged, fault = self.server.arrived(asked)
        given = headers.get("x-goog-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        if given != self.server.key:
            self._error(logged, 401, "invalid_api_key", {})
        elif fault is not None and fault.kind == "status":
            self._error(logged, fault.status, fault.code, fault.headers)
        elif fault is not None and fault.kind == "masked":
            error = {"code": fault.status, "message": "the server behind this gateway is busy"}
            body = json.dumps({"error": error, "user_id": "u"}).encode()
            self._send(logged, 200, body, "application/json", fault.headers)
        elif fault is not None and fault.kind in ("refused", "held"):
            self.server.stopped.wait(600 if fault.kind == "held" else 0)
            self._tear(logged)
        elif fault is not None and fault.kind in ("endless", "packed"):
            self._flood(logged, fault.kind)
        else:
            self._work(logged, fault)

    def _work(self, logged: Logged, fault: Fault | None) -> None:
        told = self.server.answer(logged.asked)
        if told is None:
            self._error(logged, 404, "not_found", {})
            return
        logged.told, logged.done = told, told.status == 200
        kind = fault.kind if fault else ""
        if kind == "slow" and fault is not None:
            self.server.stopped.wait(fault.seconds)
        if kind == "reset":
            self._tear(logged)
        elif kind == "truncated":
            self._send(logged, told.status, told.body[: len(told.body) // 2], told.media_type, {})
        elif kind == "html":
            self._send(logged, 200, b"<html><body>Welcome to the gateway</body></html>", "text/html", {})
        elif kind == "deep":
            self._send(logged, 200, b"[" * 200_000, "application/json", {})
        else:
            self._send(logged, told.status, told.body, told.media_type, {})

    def _error(self, logged: Logged, status: int, code: str, headers: Mapping[str, str]) -> None:
        """Send an error in the protocol's form; the key in it is what a careless vendor would repeat."""
        text = f"request {logged.asked.number} failed, key {self.server.key}"
        if not logged.asked.path.endswith(":generateContent"):
            error: dict[str, Any] = {"message": text, "type": "error", "param": None, "code": code or None}
        else:
            names = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 429: "RESOURCE_EXHAUSTED"}
            error = {"code": status, "message": text, "status": code or names.get(status, "INTERNAL")}
        self._send(logged, status, json.dumps({"error": error}).encode(), "application/json", headers)

    def _send(
        self, logged: Logged, status: int, body: bytes, media_type: str, headers: Mapping[str, str]
    ) -> None:
        logged.status = status
        self.send_response(status)
        for name, value in {"Content-Type": media_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _flood(self, logged: Logged, kind: str) -> None:
        """Send until the client has enough of it."""
        logged.status = 200
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        packer = zlib.compressobj(wbits=31)
        with contextlib.suppress(OSError):
            for _ in range(4096):  # of a mebibyte each
                chunk = packer.compress(bytes(1 << 20)) if kind == "packed" else b" " * (1 << 20)
                if chunk:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                    logged.sent += len(chunk)
        self._tear(logged)

    def _tear(self, logged: Logged) -> None:
        """Reset the connection instead of closing it."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet."""


Editor = Callable[[bytes, str], bytes]


def images(vendor: Vendor, editor: Editor) -> Vendor:
    """Let a vendor edit pictures; ``editor(picture, prompt)`` returns the bytes of the edited one.

    Understood faults: "refusal", "no-image", "wrong-image" (bytes that are no picture), "cut-image" (half of
    one), "bomb" (a small file of many pixels).
    """
    vendor.route(r"/v1(beta)?/models/[^/]+:generateContent", lambda asked: _gemini(asked, editor))
    return vendor.route(r"/v1/images/edits", lambda asked: _openai(asked, editor))


def _made(asked: Asked, editor: Editor, picture: bytes, prompt: str) -> bytes:
    if asked.fault == "wrong-image":
        return b"this is no picture at all"
    if asked.fault == "bomb":
        return bomb()
    made = editor(picture, prompt)
    return made[: len(made) // 2] if asked.fault == "cut-image" else made


def _gemini(asked: Asked, editor: Editor) -> Told | None:
    config = asked.json.get("generationConfig", {})
    if config.get("responseModalities") != ["IMAGE"]:
        return None
    parts = [part for content in asked.json["contents"] for part in content["parts"]]
    prompt = "\n".join(part["text"] for part in parts if "text" in part)
    (inline,) = [part["inlineData"] for part in parts if "inlineData" in part]
    model = asked.path.rpartition("/")[2].partition(":")[0]
    usage = {"promptTokenCount": PROMPT_TOKENS, "totalTokenCount": PROMPT_TOKENS}
    if asked.fault == "refusal":
        blocked = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage}
        return _told(blocked, model, PROMPT_TOKENS, 0)
    candidate: dict[str, Any] = {"index": 0, "finishReason": "STOP"}
    count = 1
    if asked.fault == "no-image":
        candidate |= {"finishReason": "IMAGE_SAFETY", "content": {"role": "model", "parts": []}}
        count = 0
    else:
        # The SDK writes the alphabet for URLs, others the plain one; the real API takes both.
        picture = base64.urlsafe_b64decode(inline["data"].replace("+", "-").replace("/", "_"))
        made = _made(asked, editor, picture, prompt)
        data = base64.b64encode(made).decode()
        part = {"inlineData": {"mimeType": "image/png", "data": data}}
        candidate["content"] = {"role": "model", "parts": [part]}
    tokens = IMAGE_TOKENS * count
    usage |= {"candidatesTokenCount": tokens, "totalTokenCount": PROMPT_TOKENS + tokens}
    details = [{"modality": "IMAGE", "tokenCount": tokens}] if count else []
    whole = {"candidates": [candidate], "usageMetadata": {**usage, "candidatesTokensDetails": details}}
    return _told({**whole, "modelVersion": model}, model, PROMPT_TOKENS, count)


def _openai(asked: Asked, editor: Editor) -> Told:
    fields = multipart(asked)
    prompt, model = fields["prompt"].decode(), fields["model"].decode()
    if asked.fault == "refusal":
        error = {"message": "rejected by the safety system", "type": "image_generation_user_error",
                 "param": None, "code": "moderation_blocked"}  # fmt: skip
        return Told(body=json.dumps({"error": error}).encode(), status=400, model=model)
    if asked.fault == "no-image":
        return _told({"created": 1, "data": []}, model, PROMPT_TOKENS, 0)
    made = _made(asked, editor, fields["image"], prompt)
    usage = {
        "input_tokens": PROMPT_TOKENS,
        "output_tokens": IMAGE_TOKENS,
        "total_tokens": PROMPT_TOKENS + IMAGE_TOKENS,
        "input_tokens_details": {"image_tokens": PROMPT_TOKENS - 100, "text_tokens": 100},
    }
    value = {"created": 1, "data": [{"b64_json": base64.b64encode(made).decode()}], "usage": usage}
    told = _told(value, model, PROMPT_TOKENS, 1)
    told.output_tokens = IMAGE_TOKENS
    return told


def _told(value: Any, model: str, input_tokens: int, count: int) -> Told:
    return Told(body=json.dumps(value).encode(), model=model, input_tokens=input_tokens, images=count)


def multipart(asked: Asked) -> dict[str, bytes]:
    """Return the fields of a multipart/form-data body; of files the bytes."""
    head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + asked.body)
    found = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        found[str(name).removesuffix("[]")] = part.get_payload(decode=True)
    return found


def bomb(side: int = 30_000) -> bytes:
    """Return a PNG of a few kilobytes that unfolds into side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * 64), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def darker(picture: bytes, prompt: str) -> bytes:
    """An editor that works on any picture: the prompt decides how dark it becomes."""
    from PIL import Image

    share = 0.4 + (zlib.crc32(prompt.encode()) % 50) / 100
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").point(lambda value: int(value * share)).save(buffer, "PNG")
    return buffer.getvalue()


def wait_for(vendor: Vendor, requests: int, seconds: float = 120.0) -> None:
    """Wait until so many requests have arrived."""
    end = time.monotonic() + seconds
    while len(vendor.log) < requests:
        assert time.monotonic() < end, f"only {len(vendor.log)} of {requests} requests came"
        time.sleep(0.02)

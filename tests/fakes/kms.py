"""AWS KMS as boto3 sees it: the JSON protocol over HTTP, with real ECDSA keys behind it.

The service is paid, so it cannot be called here; this one answers ``GetPublicKey`` and ``Sign`` in the shapes
of the API reference, checks the request's headers, and refuses what the real one refuses.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ACCOUNT = "arn:aws:kms:eu-central-1:111122223333"


@dataclass
class FakeKms:
    """A key service.

    Attributes:
        url: where it listens, for ``AWS_ENDPOINT_URL_KMS``.
        keys: private keys by the name after ``alias/``.
        calls: what it was asked, in order.
        denied: operations that this identity may not do.
    """

    url: str = ""
    keys: dict[str, ec.EllipticCurvePrivateKey] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    denied: set[str] = field(default_factory=set)

    def make(self, name: str) -> str:
        """Makes a key, or replaces it; the URI by which this machine opens it."""
        self.keys[name] = ec.generate_private_key(ec.SECP256R1())
        return f"awskms:alias/{name}"

    def answer(self, operation: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of one call."""
        self.calls.append(operation)
        name = str(request.get("KeyId", "")).removeprefix("alias/")
        if operation in self.denied:
            return 400, {
                "__type": "AccessDeniedException",
                "Message": f"not authorized to perform: kms:{operation}",
            }
        if name not in self.keys:
            return 400, {
                "__type": "NotFoundException",
                "message": f"Alias {ACCOUNT}:alias/{name} is not found.",
            }
        arn = f"{ACCOUNT}:key/{name}"
        if operation == "GetPublicKey":
            public = (
                self.keys[name].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            )
            return 200, {
                "KeyId": arn,
                "PublicKey": base64.b64encode(public).decode(),
                "KeySpec": "ECC_NIST_P256",
                "KeyUsage": "SIGN_VERIFY",
                "SigningAlgorithms": ["ECDSA_SHA_256"],
            }
        if operation != "Sign" or request["SigningAlgorithm"] != "ECDSA_SHA_256":
            return 400, {"__type": "InvalidKeyUsageException", "message": operation}
        if request["MessageType"] != "DIGEST":
            return 400, {"__type": "ValidationException", "message": "a raw message was not expected"}
        digest = base64.b64decode(request["Message"])
        signature = self.keys[name].sign(digest, ec.ECDSA(Prehashed(SHA256())))
        return 200, {
            "KeyId": arn,
            "Signature": base64.b64encode(signature).decode(),
            "SigningAlgorithm": "ECDSA_SHA_256",
        }


@contextmanager
def running() -> Iterator[FakeKms]:
    """A key service that listens on a free port of this machine."""
    kms = FakeKms()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            target = self.headers["X-Amz-Target"]
            assert target.startswith("TrentService."), target
            assert self.headers["Content-Type"] == "application/x-amz-json-1.1"
            assert "/kms/aws4_request" in self.headers["Authorization"]
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = kms.answer(target.removeprefix("TrentService."), request)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kms.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield kms
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

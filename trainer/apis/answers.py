"""Answers that were paid, each in a file that is named by the digest of its request.

A file is a line of JSON (request, media type, usage, whether the vendor counted it, refusal, sha256 of the
body) and the body after it. It appears whole or not at all, also after a power cut; one that is damaged is as
good as none.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json
from trainer.apis.request import Reply, Request
from trainer.stage import touch

FORMAT = "adapter-foundry/answer/1"
_STRIPES = 3  # hex digits: 4,096 files at most, so two of 64 requests under way seldom wait for each other


class Answers:
    """The answers in a folder, which any number of processes may share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, request: Digest) -> Path:
        """Return where the answer to a request lies, or would lie."""
        return self._folder / "answers" / request.hex[:2] / request.hex

    def get(self, request: Digest) -> Reply | None:
        """Return the answer to a request, or None if there is none, or none that is whole."""
        try:
            head, _, body = self.path(request).read_bytes().partition(b"\n")
            value = json.loads(head)
            usage = {name: int(value["usage"][name]) for name in ("input_tokens", "output_tokens", "images")}
            # Files from before that was kept: who counts says at least what the prompt took.
            counted = bool(value.get("counted", usage["input_tokens"] + usage["output_tokens"] > 0))
            whole = value["format"] == FORMAT and value["body"] == digest_bytes(body)
            refused, media_type = value["refused"], str(value["media_type"])
            reply = Reply(body=body, media_type=media_type, refused=refused, counted=counted, **usage)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not whole:
            return None
        touch(self.path(request))  # a clean-up counts from when it was used last
        return reply

    def put(self, request: Request, reply: Reply) -> None:
        """Keep an answer; when this returns it is on the disk."""
        head = {
            "format": FORMAT,
            "request": request.as_json(),
            "media_type": reply.media_type,
            "refused": reply.refused,
            "counted": reply.counted,
            "usage": {
                "input_tokens": reply.input_tokens,
                "output_tokens": reply.output_tokens,
                "images": reply.images,
            },
            "body": digest_bytes(reply.body),
        }
        path = self.path(request.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        with temporary.open("wb") as stream:
            stream.write(canonical_json(head) + b"\n" + reply.body)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)

    @contextmanager
    def only(self, request: Digest) -> Iterator[None]:
        """Let nobody else, in no process, ask the same request inside of the block."""
        locks = self._folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        # A file for many requests, because one that is removed can be locked by two.
        with (locks / request.hex[:_STRIPES]).open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

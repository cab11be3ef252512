"""The ledger: one line of JSON for each attempt to ask a paid API, shared by all runs.

A line says when, for which run, whom (provider, model, kind), which request and the how manieth attempt, how
it ended, what it took (tokens, images, US dollars) and how long. ``usd`` is null when nobody knows the
model's price. ``billed`` is "unsure" where no answer came and the vendor may have done the work: ``usd`` is
then what was reserved.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from registry.digest import Digest
from registry.manifest import canonical_json
from trainer.apis.request import Billed, Usage

LEDGER_NAME = "ledger.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One attempt.

    Attributes:
        id: of the attempt, the only one of its kind.
        time: when it began, UTC, ISO 8601.
        run: the budget that it counts in.
        provider, model, kind: of the request.
        request: digest of the request.
        attempt: 1 for the first.
        status: "ok", "refused", "lost" (the process died) or that of `trainer.apis.Failed`.
        billed: see `trainer.apis.Failed`.
        usage: what it took.
        usd: in dollars; None if nobody knows.
        seconds: until it ended.
    """

    id: str
    time: str
    run: str
    provider: str
    model: str
    kind: str
    request: Digest
    attempt: int
    status: str
    billed: Billed
    usage: Usage
    usd: float | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values, as it stands in the file."""
        return {
            "id": self.id,
            "time": self.time,
            "run": self.run,
            "provider": self.provider,
            "model": self.model,
            "kind": self.kind,
            "request": self.request,
            "attempt": self.attempt,
            "status": self.status,
            "billed": self.billed,
            "input_tokens": self.usage.input_tokens,
            "output_tokens": self.usage.output_tokens,
            "images": self.usage.images,
            "usd": self.usd,
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Line:
        """Return the line that `as_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: it did not.
        """
        plain = ("id", "time", "run", "provider", "model", "kind", "attempt", "status", "billed", "usd")
        return cls(
            **{name: value[name] for name in plain},
            request=Digest(value["request"]),
            usage=Usage(**{name: int(value[name]) for name in ("input_tokens", "output_tokens", "images")}),
            seconds=float(value["seconds"]),
        )


class Ledger:
    """The ledger in a folder, which any number of processes may share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / LEDGER_NAME

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else write or reserve inside of the block; not to be nested."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".ledger.lock").open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def append(self, line: Line) -> None:
        """Write a line, to be called inside of `locked`; when this returns it is on the disk."""
        with self.path.open("a+b") as stream:
            # A line that a power cut tore must not take the next one with it.
            torn = stream.seek(0, os.SEEK_END) > 0 and _last_byte(stream.fileno()) != b"\n"
            stream.write(b"\n" * torn + canonical_json(line.as_json()) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def lines(self, run: str | None = None) -> Iterator[Line]:
        """Yield all attempts, or those of a run, in the order of their end."""
        yield from Reader(self).news(run)


class Reader:
    """Reads what has come to a ledger since it was last asked."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._offset = ledger, 0

    def news(self, run: str | None = None) -> Iterator[Line]:
        """Yield the attempts (of a run) that were not yielded before; what is no line of ours is skipped."""
        try:
            stream = self._ledger.path.open("rb")
        except FileNotFoundError:
            return
        # Most lines are of other runs: looking for the name is faster than reading JSON.
        name = json.dumps(run).encode() if run is not None else b""
        with stream:
            stream.seek(self._offset)
            for text in stream:
                if not text.endswith(b"\n"):
                    return
                self._offset += len(text)
                if name in text:
                    line = _parsed(text)
                    if line is not None and run in (None, line.run):
                        yield line


def _parsed(text: bytes) -> Line | None:
    try:
        return Line.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError):
        return None


def _last_byte(descriptor: int) -> bytes:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1)


@dataclass(kw_only=True, slots=True)
class Total:
    """What some attempts took together.

    Attributes:
        requests: attempts, whatever became of them.
        answers: of them brought an answer,
        refusals: of the answers that were none,
        retries: were not the first for their request.
        input_tokens, output_tokens, images: see `Usage`.
        usd: dollars, as far as prices are known.
        unsure_usd: of them for attempts without an answer that may have been billed.
        unpriced: attempts whose price nobody knows.
    """

    requests: int = 0
    answers: int = 0
    refusals: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    images: int = 0
    usd: float = 0.0
    unsure_usd: float = 0.0
    unpriced: int = 0

    def add(self, line: Line) -> None:
        """Count an attempt."""
        self.requests += 1
        self.answers += line.status in ("ok", "refused")
        self.refusals += line.status == "refused"
        self.retries += line.attempt > 1
        self.input_tokens += line.usage.input_tokens
        self.output_tokens += line.usage.output_tokens
        self.images += line.usage.images
        self.usd += line.usd or 0.0
        self.unsure_usd += (line.usd or 0.0) if line.billed == "unsure" else 0.0
        self.unpriced += line.usd is None

    def join(self, other: Total) -> None:
        """Count what another one counted."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def totals(
    lines: Iterable[Line], by: tuple[str, ...] = ("run", "provider", "model", "kind")
) -> dict[tuple[str, ...], Total]:
    """Return what was taken by each run, provider, model and kind (or by other attributes of a `Line`)."""
    found: dict[tuple[str, ...], Total] = {}
    for line in lines:
        found.setdefault(tuple(str(getattr(line, name)) for name in by), Total()).add(line)
    return found

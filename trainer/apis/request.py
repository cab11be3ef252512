"""What is asked of a paid API, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from registry.digest import Digest, digest_bytes
from registry.manifest import canonical_json

Kind = Literal["edit", "score"]
Billed = Literal["no", "unsure", "yes"]

_MOST = 1_000_000_000  # more than a thousand times what any model takes; a larger count is a mistake


def count_of(told: Any) -> int | None:
    """Return a count that a vendor told, or None if it is none; the vendors' SDKs do not look at types."""
    return told if type(told) is int and 0 <= told <= _MOST else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request takes, in the units that vendors bill.

    Attributes:
        input_tokens: of the prompt, text and pictures.
        output_tokens: of the answer; for models that take a price for each image without those of images.
        images: that were made.

    Raises:
        ValueError: one of them is no count.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    images: int = 0

    def __post_init__(self) -> None:
        for value in (self.input_tokens, self.output_tokens, self.images):
            # A negative one would fill the budget up again; what is no number, the ledger cannot read.
            if type(value) is not int or value < 0:
                raise ValueError(f"{value!r} is no count of tokens or images")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One question to a paid API.

    Attributes:
        provider: "gemini" or "openai".
        kind: "edit" a picture or "score" one.
        model: the vendor's id of the model.
        endpoint: address of the server; None is the vendor's own.
        content: all else that decides the answer, as JSON values: prompts, digests of pictures, parameters,
            and a number where the very same is asked several times. Never a key.
        expected: what it takes at most; so much is reserved of the budget while it is under way.
        resolution: of the picture that is asked for, where prices depend on it.
    """

    provider: str
    kind: Kind
    model: str
    endpoint: str | None = None
    content: Mapping[str, Any]
    expected: Usage = Usage()
    resolution: str | None = None

    @property
    def digest(self) -> Digest:
        """The address of its answer: the digest of all that decides it."""
        return digest_bytes(canonical_json(self.as_json()))

    def as_json(self) -> dict[str, Any]:
        """Return what decides the answer as JSON values."""
        return {
            "provider": self.provider,
            "kind": self.kind,
            "model": self.model,
            "endpoint": self.endpoint,
            "content": dict(self.content),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a vendor delivered.

    Attributes:
        body: the bytes as they came; empty for a refusal.
        media_type: of the body, such as "image/png" or "application/json".
        input_tokens, output_tokens, images: see `Usage`.
        refused: why the vendor does not answer that question; None if it does.
        counted: the vendor said what it took; else what was reserved is booked.

    Raises:
        ValueError: what it took is no `Usage`.
    """

    body: bytes = b""
    media_type: str = "application/octet-stream"
    input_tokens: int = 0
    output_tokens: int = 0
    images: int = 0
    refused: str | None = None
    counted: bool = True

    def __post_init__(self) -> None:
        _ = self.usage

    @property
    def usage(self) -> Usage:
        """What it took."""
        return Usage(input_tokens=self.input_tokens, output_tokens=self.output_tokens, images=self.images)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A reply that is kept.

    Attributes:
        request: digest of the request.
        reply: what was delivered.
        reused: it was there already; nothing was sent and nothing paid.
        attempts: sent for it just now; 0 when it was reused.
        usd: what they took; None when nobody knows the model's price.
    """

    request: Digest
    reply: Reply
    reused: bool
    attempts: int = 0
    usd: float | None = 0.0

    @property
    def body(self) -> bytes:
        """The bytes as they came."""
        return self.reply.body

    @property
    def media_type(self) -> str:
        """Of the body."""
        return self.reply.media_type

    @property
    def refused(self) -> str | None:
        """Why there is no body; None if there is one."""
        return self.reply.refused


@dataclass(kw_only=True, slots=True, eq=False)
class Failed(Exception):
    """An attempt that brought no answer. What sends a request raises it and nothing else.

    Attributes:
        status: word for the ledger: "429", "500", "timeout", "connection", "malformed".
        message: what happened, without headers and keys.
        mend: what a person can do, for failures that no repetition mends.
        repeat: whether asking again may help.
        delivered: the vendor did its work, and nobody can use what came: asked a few times only, then
            recorded as a refusal, for the next day brings the same.
        after: seconds that the server asked to wait.
        billed: whether the vendor takes money for it; "unsure" books what was reserved.
        usage: what it took, as far as the vendor said.
    """

    status: str
    message: str
    mend: str = ""
    repeat: bool = True
    delivered: bool = False
    after: float | None = None
    billed: Billed = "no"
    usage: Usage = field(default_factory=Usage)

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"

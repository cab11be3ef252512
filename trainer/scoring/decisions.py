"""What people decided about pictures whose samples differ: one line of JSON each, only ever added.

A decision is bound to the picture's digest and to the scorer whose answers the person saw, so it holds for
every recipe, and for no other scorer. The last one about a picture counts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.digest import Digest, digest_bytes
from registry.manifest import Line, canonical_json
from trainer.errors import DataError
from trainer.portraits.expressions import EXPRESSIONS

FORMAT = "adapter-foundry/review/1"
_Unit = Annotated[float, Field(ge=0, le=1)]


class Decision(BaseModel):
    """One decision.

    Attributes:
        time: when, UTC, ISO 8601.
        image: sha256 of the picture's file.
        scorer: whose answers were seen.
        decision: "accept" takes ``scores``, "reject" leaves the picture out.
        scores: all twelve intensities that hold from now on; for "accept".
        by: who decided.
        reason: why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["adapter-foundry/review/1"] = FORMAT
    time: datetime
    image: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    scorer: Line
    decision: Literal["accept", "reject"]
    scores: dict[str, _Unit] | None = None
    by: Annotated[Line, Field(min_length=1, max_length=200)]
    reason: Annotated[str, Field(max_length=2000)] = ""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.scores is None) != (self.decision == "reject"):
            raise ValueError("an accepted picture has scores, a rejected one has none")
        if self.scores is not None and set(self.scores) != set(EXPRESSIONS):
            raise ValueError("scores must name each of the twelve expressions")
        return self


class Decisions:
    """The decisions in a file, which several processes may add to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, decision: Decision) -> None:
        """Write one at the end; when this returns it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            end = stream.seek(0, os.SEEK_END)
            torn = end > 0 and os.pread(stream.fileno(), 1, end - 1) != b"\n"
            stream.write(b"\n" * torn + canonical_json(decision.model_dump(mode="json")) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def read(self, scorer: str) -> dict[str, Decision]:
        """Return the last decision about each picture, by its digest, made on one scorer's answers.

        Raises:
            DataError: the file has a line that is no decision.
        """
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        found: dict[str, Decision] = {}
        for number, line in enumerate(lines, 1):
            try:
                decision = Decision.model_validate(json.loads(line)) if line.strip() else None
            except (ValueError, ValidationError, RecursionError) as error:
                raise DataError(
                    f"line {number} of {self.path} is no decision: {str(error).splitlines()[0]}",
                    "remove that line; a power cut while it was written leaves a half one",
                ) from None
            if decision is not None and decision.scorer == scorer:
                found[decision.image] = decision
        return found


def digest_of(decisions: Mapping[str, Decision]) -> Digest:
    """Return the digest of what was decided, by whom and why, but not when."""
    said = {image: one.model_dump(mode="json", exclude={"time"}) for image, one in decisions.items()}
    return digest_bytes(canonical_json(said))


def now() -> datetime:
    """Return the time for a decision, UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)

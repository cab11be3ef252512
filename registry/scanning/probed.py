"""The result of a behaviour probe as somebody gives it to ``registry scan``: shown, never believed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from registry.behaviour import behaviour_predicate
from registry.content import FileContent
from registry.digest import Digest
from registry.errors import InvalidDocument, UsageError, shown
from registry.manifest import strict_json

MAX_FILE_BYTES: Final = 16 << 20
MAX_PICTURE_CHARACTERS: Final = 300_000
_MAX_PICTURES: Final = 64
_PICTURE = re.compile(r"data:image/(png|webp|jpeg);base64,[A-Za-z0-9+/]+={0,2}", re.ASCII)
_SIDES: Final = frozenset({"base", "adapter"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What a probe saw.

    Attributes:
        verdict: "pass", "review" or "fail".
        weights: the sha256 of the weights file that was probed.
        statistics: name -> value.
        p: name -> p-value among clean adapters.
        tokens: (text, score), the most suspicious first.
        pairs: (digest of the partner's weights, verdict, score).
        pictures: text of a token -> "base" or "adapter" -> picture as a data URI.
    """

    verdict: str
    weights: Digest
    statistics: Mapping[str, float] = field(hash=False)
    p: Mapping[str, float] = field(hash=False)
    tokens: tuple[tuple[str, float], ...]
    pairs: tuple[tuple[str, str, float], ...]
    pictures: Mapping[str, Mapping[str, str]] = field(hash=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the probe's result in a file.

        Raises:
            UsageError: the file is no result of a probe.
        """
        with FileContent(path) as content:
            data = content[: MAX_FILE_BYTES + 1]
        try:
            return cls.parse(strict_json(data, str(path), MAX_FILE_BYTES, max_depth=16))
        except InvalidDocument as error:
            raise UsageError(error.message, "give the file that `trainer probe` wrote") from None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Return the probe's result in JSON values: a behaviour predicate, and pictures of some tokens.

        Raises:
            UsageError: it is none.
        """
        found = behaviour_predicate(values)
        tokens = tuple((row["text"], row["score"]) for row in found["tokens"])
        return cls(
            verdict=found["verdict"],
            weights=Digest("sha256:" + found["weights"]["sha256"]),
            statistics=found["statistics"],
            p=found["p_values"],
            tokens=tuple(sorted(tokens, key=lambda row: (-row[1], row[0]))),
            pairs=tuple((row["with"], row["verdict"], row["score"]) for row in found["pairs"]),
            pictures=_pictures(values.get("pictures", {})),
        )


def _pictures(values: Any) -> Mapping[str, Mapping[str, str]]:
    """Only pictures within bounds that are nothing but base64: a data URI of another type could be a page."""
    if not isinstance(values, Mapping) or len(values) > _MAX_PICTURES:
        raise _refused("they are no object of at most 64 tokens")
    for token, sides in values.items():
        if not isinstance(sides, Mapping) or not set(sides) <= _SIDES:
            raise _refused(f"those of {shown(token, 60)!r} are not named base and adapter")
        for picture in sides.values():
            long = not isinstance(picture, str) or len(picture) > MAX_PICTURE_CHARACTERS
            if long or not _PICTURE.fullmatch(picture):
                raise _refused(f"one of {shown(token, 60)!r} is no small PNG, WebP or JPEG as a data URI")
    return {str(token): dict(sides) for token, sides in values.items()}


def _refused(why: str) -> UsageError:
    return UsageError(
        f"the pictures of the probe cannot be shown: {why}", "give the file that `trainer probe` wrote"
    )

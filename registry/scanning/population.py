"""Reference populations: the figures of clean adapters, with which an adapter is compared.

A population is a canonical JSON file of the adapters of one base, rank and recipe. Its digest covers every
value, so that a report can name what it compared with. Files in registry/data/populations ship with the
package; others are given by path. A file is hostile until it is parsed: its size, its numbers and its digest
are checked, and nothing in it is executed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from registry.digest import Digest, digest_bytes
from registry.errors import InvalidDocument, UsageError, shown
from registry.manifest import canonical_json, strict_json

MAX_POPULATION_BYTES: Final = 8 << 20
MAX_STATISTICS: Final = 64
MAX_ADAPTERS: Final = 10_000

_MEND = "build it again with `registry population build`, or fetch an intact copy"
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_.-]{0,63}$")]
_Share = Annotated[float, Field(ge=0, le=1)]


class Band(BaseModel):
    """How the spectra of one kind of module fall in the population: percentiles of sigma_i / sigma_1.

    ``low``, ``middle`` and ``high`` are the 5th, the 50th and the 95th, each with one value a rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: Annotated[tuple[_Share, ...], Field(min_length=1, max_length=1024)]
    middle: Annotated[tuple[_Share, ...], Field(min_length=1, max_length=1024)]
    high: Annotated[tuple[_Share, ...], Field(min_length=1, max_length=1024)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.low) == len(self.middle) == len(self.high):
            raise ValueError("a band's curves differ in length")
        return self


class Population(BaseModel):
    """The figures of clean adapters.

    Attributes:
        base: id of their base model.
        rank: their rank.
        recipe: the name of how they were trained: what changes the figures of an honest adapter.
        kind: "weights" (see `registry.scanning.spectra`) or "behaviour" (of a probe).
        sides: "two": too small is as suspicious as too large; "upper": only too large is.
        statistics: names, each once.
        values: one row an adapter, one finite number a statistic.
        spectra: kind of module -> how its spectra fall; may be empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    base: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,191}$")]
    rank: Annotated[int, Field(ge=1, le=1024)]
    recipe: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._+-]{0,63}$")]
    kind: Literal["weights", "behaviour"]
    sides: Literal["two", "upper"]
    statistics: Annotated[tuple[_Name, ...], Field(min_length=1, max_length=MAX_STATISTICS)]
    values: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1, max_length=MAX_ADAPTERS)]
    spectra: Annotated[dict[str, Band], Field(max_length=64)] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.statistics)) != len(self.statistics):
            raise ValueError("a statistic is named twice")
        if any(len(row) != len(self.statistics) for row in self.values):
            raise ValueError("a row has not one value for each statistic")
        return self

    @classmethod
    def make(
        cls,
        *,
        base: str,
        rank: int,
        recipe: str,
        kind: Literal["weights", "behaviour"],
        rows: Sequence[Mapping[str, float]],
        spectra: Mapping[str, Band] | None = None,
    ) -> Self:
        """Return the population of adapters whose statistics are ``rows``; those that all of them have count.

        Raises:
            UsageError: there is no adapter, or no statistic that all of them have.
        """
        names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
        if not names:
            raise UsageError(
                f"the {len(rows)} adapters have no statistic in common", "give adapters of one recipe"
            )
        return cls(
            base=base,
            rank=rank,
            recipe=recipe,
            kind=kind,
            sides="two" if kind == "weights" else "upper",
            statistics=tuple(names),
            values=tuple(tuple(float(row[name]) for name in names) for row in rows),
            spectra=dict(spectra or {}),
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the population in ``data``.

        Raises:
            InvalidDocument: it is none, it is too large, or its digest is not the one that it states.
        """
        content = strict_json(data, "the population", MAX_POPULATION_BYTES)
        if not isinstance(content, dict):
            raise InvalidDocument("the population is not a JSON object", _MEND)
        stated = content.pop("digest", None)
        try:
            # JSON mode takes lists for tuples, and is as strict about everything else.
            found = cls.model_validate_json(canonical_json(content), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(shown(part, 60) for part in first["loc"]) or "the document"
            why = f"{where}: {shown(first['msg'])}"
            raise InvalidDocument(f"the population is not valid: {why}", _MEND) from None
        except ValueError:  # 1e999 is JSON, but no number
            raise InvalidDocument("the population holds infinity", _MEND) from None
        if stated != str(found.digest):
            raise InvalidDocument(
                f"the population states the digest {shown(stated, 80)}, its values have {found.digest}", _MEND
            )
        return found

    @functools.cached_property
    def digest(self) -> Digest:
        """The sha256 of the canonical JSON of everything else in the file."""
        return digest_bytes(canonical_json(self.model_dump(mode="json")))

    def to_bytes(self) -> bytes:
        """Return the file: canonical JSON with the digest, one line with a line break."""
        return canonical_json(self.model_dump(mode="json") | {"digest": str(self.digest)}) + b"\n"

    @property
    def size(self) -> int:
        """How many adapters it describes."""
        return len(self.values)

    def column(self, statistic: str) -> tuple[float, ...]:
        """The values of a statistic in ascending order."""
        at = self.statistics.index(statistic)
        return tuple(sorted(row[at] for row in self.values))


def load(path: Path) -> Population:
    """Return the population in a file.

    Raises:
        UsageError: it cannot be read.
        InvalidDocument: it is no population.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_POPULATION_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}", "give the path of a population"
        ) from None
    return Population.parse(data)


@functools.cache
def shipped() -> Mapping[tuple[str, str, int, str], Population]:
    """Return (kind, base, rank, recipe) -> each population that ships with the package."""
    found: dict[tuple[str, str, int, str], Population] = {}
    folder = resources.files("registry") / "data" / "populations"
    for item in sorted(folder.iterdir(), key=lambda one: one.name) if folder.is_dir() else ():
        if item.name.endswith(".json"):
            one = Population.parse(item.read_bytes())
            found[one.kind, one.base, one.rank, one.recipe] = one
    return MappingProxyType(found)


def find(
    kind: Literal["weights", "behaviour"], *, base: str, rank: int, recipes: Iterable[str]
) -> Population | None:
    """Return the shipped population of a base, a rank and the first of ``recipes`` that has one, or None."""
    known = shipped()
    return next(
        (known[kind, base, rank, name] for name in recipes if (kind, base, rank, name) in known), None
    )


def recipe_key(targets: Iterable[str]) -> str:
    """Return the recipe of adapters of which only the targets are known: "targets-" and eight hex digits."""
    return "targets-" + digest_bytes(canonical_json(sorted(set(targets)))).removeprefix("sha256:")[:8]


def summary(population: Population) -> dict[str, Any]:
    """Return what a population is, without its values."""
    return {
        "digest": str(population.digest),
        "base": population.base,
        "rank": population.rank,
        "recipe": population.recipe,
        "kind": population.kind,
        "sides": population.sides,
        "adapters": population.size,
        "statistics": [*population.statistics],
        "smallest_p": 1 / (population.size + 1),
    }

"""Reproduction statements: somebody made an adapter again from its recorded recipe, and compared.

The evaluator signs it: making and comparing is measuring. It is bound to the bytes of the weights file and to
the recipe's digest. Read strictly: a statement in another form is none. Its word decides only where a gate
asks for it (see `admission`), for a training on another machine may differ without anybody's fault. There it
counts if the weights are the same, or if both weights and figures were compared and are close: half a
comparison, which was called equivalent once, is read and proves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from registry.digest import Digest
from registry.errors import InvalidDocument, shown
from registry.manifest import MAX_SAID, Machine

Outcome = Literal["identical", "equivalent", "different"]

_MAX_ROWS: Final = 64
_Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.]{1,100}$")]
_Said = Annotated[str, StringConstraints(min_length=1, max_length=MAX_SAID, pattern=r"^[\x20-\x7e]+$")]
_Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)$")]
_Positive = Annotated[float, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Sha256(_Model):
    """A digest as in-toto writes it."""

    sha256: _Hex

    @classmethod
    def of(cls, digest: Digest) -> Self:
        """Return a digest in this form."""
        return cls(sha256=digest.hex)


class Both(_Model):
    """The same thing as it was released, and as it came out again."""

    released: _Said
    rebuilt: _Said


class Difference(_Model):
    """How far two updates are apart as linear maps; see `registry.spectral`.

    Attributes:
        relative: Frobenius norm of the difference as a part of the released update; None if that is zero.
        cosine: of the angle between the two; None if one is zero.
        tolerance: the largest ``relative`` that is called equivalent.
    """

    relative: _Positive | None
    cosine: Annotated[float, Field(ge=-1, le=1)] | None
    tolerance: _Positive


class Metric(_Model):
    """A figure of the evaluation.

    Attributes:
        low, high: between these the rebuilt one is called equivalent.
    """

    name: _Name
    released: float
    rebuilt: float
    low: float
    high: float

    @property
    def within(self) -> bool:
        """Whether the rebuilt figure is as good as the released one."""
        return self.low <= self.rebuilt <= self.high


class Reproduction(_Model):
    """What a reproduction says.

    Attributes:
        outcome: "identical" bit for bit, "equivalent" in weights and figures within the tolerances, or
            "different", which is also what cannot be compared.
        at: when, in UTC.
        weights: of the released weights file.
        rebuilt: of the one that was made again.
        recipe: digest of the recipe.
        dataset: digests of both datasets.
        dataset_reused: some of the released dataset was taken as it lay there, and not made again.
        code: digests of the sources that made both.
        machine, released_machine: where; the released one is None if nobody wrote it down.
        difference: of the weights; None if they are identical, or cannot be compared.
        metrics: of both evaluations; none if the weights are identical.
        notes: what a reader should know, such as another version of the code.
    """

    outcome: Outcome
    at: _Time
    weights: Sha256
    rebuilt: Sha256
    recipe: _Digest
    dataset: Both
    dataset_reused: bool
    code: Both
    machine: Machine
    released_machine: Machine
    difference: Difference | None
    metrics: Annotated[tuple[Metric, ...], Field(max_length=_MAX_ROWS)]
    notes: Annotated[tuple[_Said, ...], Field(max_length=_MAX_ROWS)]

    @model_validator(mode="after")
    def _outcome_follows(self) -> Self:
        """A statement that contradicts its own figures says nothing."""
        same = self.weights == self.rebuilt
        if (self.outcome == "identical") != same:
            raise ValueError("the outcome is identical if and only if the weights are")
        if self.outcome == "equivalent" and not _undenied(self.difference, self.metrics):
            raise ValueError("the figures are outside of the tolerances that it names")
        return self

    @property
    def proves(self) -> bool:
        """Whether it shows that the recipe makes the adapter: to the bit, or in weights and figures both."""
        return self.outcome == "identical" or (
            self.outcome == "equivalent" and close(self.difference, self.metrics)
        )

    def predicate(self) -> dict[str, Any]:
        """Return what is signed."""
        return self.model_dump(mode="json")


def close(difference: Difference | None, metrics: Sequence[Metric]) -> bool:
    """Return whether weights and figures were both compared, and all lie within their tolerances."""
    return difference is not None and bool(metrics) and _undenied(difference, metrics)


def _undenied(difference: Difference | None, metrics: Sequence[Metric]) -> bool:
    """Return whether something was compared, and none of it lies outside of its tolerance."""
    far = difference is not None and (
        difference.relative is None or difference.relative > difference.tolerance
    )
    return not far and (difference is not None or bool(metrics)) and all(row.within for row in metrics)


def proves(predicate: Mapping[str, Any]) -> bool:
    """Return whether a predicate is a reproduction that shows that the recipe makes the adapter."""
    try:
        return parse(predicate).proves
    except InvalidDocument:
        return False


def parse(predicate: Mapping[str, Any]) -> Reproduction:
    """Return what the predicate of a reproduction statement says.

    Raises:
        InvalidDocument: it is none.
    """
    try:
        return Reproduction.model_validate(dict(predicate))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(shown(part, 60) for part in first["loc"]) or "the statement"
        raise InvalidDocument(
            f"the reproduction statement is not valid: {where}: {shown(first['msg'])}",
            "`python -m flows.reproduce` writes what is signed here",
        ) from None

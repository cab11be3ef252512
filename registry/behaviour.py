"""Behaviour statements: what a probe saw when it ran an adapter on its base, and its verdict.

The scanner signs it, for it takes the base model and minutes of computing: whoever loads an adapter scans the
bytes again, but does not probe again. So it is bound to the bytes of the weights file, and it says by what
probe, vocabulary and reference population it was judged. Read strictly: a statement in another form is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from registry.digest import Digest
from registry.errors import InvalidDocument, UsageError, shown

Verdict = Literal["pass", "review", "fail"]

ALONE_RULE: Final = "ADP-BEH-001"
"""The probe asks for a person; a waiver of this rule lets the adapter pass."""
FAILED_RULE: Final = "ADP-BEH-002"
"""The probe failed the adapter, alone or with a partner."""
PAIR_RULE: Final = "ADP-BEH-003"
"""The probe asks for a person about a pair; a waiver may name the partner's weights as its place."""
ALONE: Final = "the adapter alone"
"""The place of a finding of `ALONE_RULE`."""

_MAX_ROWS: Final = 64
_Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.:/-]{0,99}$")]
_Short = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[\x20-\x7e]+$")]
_Probability = Annotated[float, Field(ge=0, le=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Sha256(_Model):
    sha256: _Hex


class _Base(_Model):
    id: _Short
    revision: _Short


class _Probe(_Model):
    version: _Short
    vocabulary: _Hex
    population: _Hex | None


class _Token(_Model):
    text: Annotated[str, StringConstraints(max_length=1000, pattern=r"^[\x20-\x7e]*$")]
    score: float


class _Pair(_Model):
    partner: Annotated[str, Field(alias="with"), StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
    verdict: Verdict
    score: float


class _Document(_Model):
    verdict: Verdict
    weights: _Sha256
    base: _Base
    probe: _Probe
    statistics: Annotated[dict[_Name, float], Field(max_length=256)]
    p_values: Annotated[dict[_Name, _Probability], Field(max_length=256)]
    tokens: Annotated[list[_Token], Field(max_length=_MAX_ROWS)]
    pairs: Annotated[list[_Pair], Field(max_length=_MAX_ROWS)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """A behaviour statement that was read: what decides.

    Attributes:
        verdict: about the adapter alone.
        weights: the sha256 of the weights file that was probed.
        base: id of the base model on which it was probed.
        revision: revision of that base model.
        pairs: the sha256 of a partner's weights file -> the gravest verdict about the two together.
    """

    verdict: Verdict
    weights: Digest
    base: str
    revision: str
    pairs: Mapping[Digest, Verdict]


def parse(predicate: Mapping[str, Any]) -> Behaviour:
    """Return what decides in the predicate of a behaviour statement.

    Raises:
        InvalidDocument: it is none.
    """
    try:
        found = _Document.model_validate(dict(predicate))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(shown(part, 60) for part in first["loc"])
        raise InvalidDocument(
            f"the behaviour statement is not valid: {where}: {shown(first['msg'])}",
            "`trainer probe` writes what is signed here",
        ) from None
    pairs: dict[Digest, Verdict] = {}
    for row in found.pairs:
        partner = Digest(row.partner)
        pairs[partner] = worst(pairs.get(partner, "pass"), row.verdict)
    return Behaviour(
        verdict=found.verdict,
        weights=Digest("sha256:" + found.weights.sha256),
        base=found.base.id,
        revision=found.base.revision,
        pairs=pairs,
    )


def worst(*verdicts: Verdict) -> Verdict:
    """Return the gravest of some verdicts; "pass" of none."""
    return max(verdicts, key=("pass", "review", "fail").index, default="pass")


def behaviour_predicate(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the predicate of a behaviour statement: the report of a probe without its pictures.

    Raises:
        UsageError: it is no such report.
    """
    predicate = {name: value for name, value in report.items() if name != "pictures"}
    try:
        parse(predicate)
    except InvalidDocument as error:
        raise UsageError(error.message, error.mend) from None
    return predicate

"""The policy file: what an adapter is meant for, and what must be there before an alias may mean it.

The file is TOML (``registry/data/policy.toml`` is the default, explained line by line). It is read strictly:
an unknown key, a wrong type or a gate that contradicts itself is an error, so that a typing error cannot open
a gate. Reading has no side effects, and checking is pure: what is measured comes from signed statements.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from registry.attestation import DEMANDED, KINDS, Kind
from registry.digest import Digest, digest_bytes
from registry.errors import UsageError, shown
from registry.licenses import Purpose
from registry.manifest import canonical_json
from registry.reference import ALIAS_PATTERN, NAME_PATTERN
from registry.waivers import MAX_DAYS

if TYPE_CHECKING:
    from datetime import datetime

    from registry import admission

DEFAULT_GATE: Final = "default"
MAX_POLICY_BYTES: Final = 1 << 20

AliasReference = Annotated[
    str, StringConstraints(pattern=f"^{NAME_PATTERN.strip('^$')}@{ALIAS_PATTERN.strip('^$')}$")
]
MetricPath = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LicenseRules(_Model):
    """What every adapter must be allowed for.

    Attributes:
        purpose: see `registry.licenses.Purpose`.
        declared: conditions that no program can check and whoever runs this registry says are met;
            ``registry license list`` shows their names.
    """

    purpose: Purpose = "commercial-redistribution"
    declared: Annotated[tuple[str, ...], Field(max_length=64)] = ()

    @field_validator("declared")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from registry.license_data import library

        for name in value:
            if name not in library().declarations:
                near = difflib.get_close_matches(name, library().declarations, n=1, cutoff=0.0)
                raise ValueError(f"there is no declaration {shown(name)!r}; did you mean {near[0]!r}?")
        return value


class Together(_Model):
    """Two aliases whose adapters serving may load together; see `registry.promotion`."""

    together: Annotated[tuple[AliasReference, ...], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _two(self) -> Self:
        if self.together[0] == self.together[1]:
            raise ValueError("a pair needs two different aliases")
        return self


class ScanRules(_Model):
    """What findings of the scanner are accepted.

    Attributes:
        allow_review: also those that ask for a person, without a waiver.
        waiver_days: the longest life of a waiver; 0 counts none.
        pairs: the aliases whose adapters may be loaded together; the pair has to be probed before one of
            them is promoted.
        undeclared_pairs: what serving does with adapters that are asked for together and are no such pair:
            serve them and log a warning, or refuse.
    """

    allow_review: bool = False
    waiver_days: Annotated[int, Field(ge=0, le=MAX_DAYS)] = 90
    pairs: Annotated[tuple[Together, ...], Field(max_length=256)] = ()
    undeclared_pairs: Literal["warn", "refuse"] = "warn"

    def partners(self, alias: str) -> tuple[str, ...]:
        """Return the aliases (``name@alias``) whose adapters may be loaded together with that of an alias."""
        found = [other for pair in self.pairs for other in pair.together if alias in pair.together]
        return tuple(other for other in dict.fromkeys(found) if other != alias)


class Threshold(_Model):
    """What is required of a metric: a range, both ends included, or that it does not get worse, or both.

    Attributes:
        min: lower end of the range.
        max: upper end of the range.
        max_regression: how much worse than what the alias means now the metric may be: the whole 95 %
            interval of the paired difference must be within this margin.
        direction: which end is better; needed for `max_regression` where the range does not tell. It is never
            taken from an evaluation, which could say that less accuracy is better.
    """

    min: float | None = None
    max: float | None = None
    max_regression: Annotated[float | None, Field(ge=0)] = None
    direction: Literal["higher", "lower"] | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.min is None and self.max is None and self.max_regression is None:
            raise ValueError("a threshold needs min, max or max_regression")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max: nothing could pass")
        if self.max_regression is None and self.direction is not None:
            raise ValueError("direction only belongs to max_regression")
        open_ = self.direction is None and (self.min is None) == (self.max is None)
        if self.max_regression is not None and open_:
            raise ValueError('max_regression needs direction = "higher" or "lower": which end is better')
        return self

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which end is better: what `direction` says, or else the one that the range leaves open."""
        return self.direction or ("lower" if self.min is None else "higher")

    @property
    def range(self) -> str:
        """Min and max in words."""
        low = [] if self.min is None else [f">= {self.min:g}"]
        return " and ".join(low + ([] if self.max is None else [f"<= {self.max:g}"]))


class Gate(_Model):
    """What must be there before an alias may mean a version, and before it is loaded by that alias.

    Attributes:
        require: kinds of signed statements.
        approvals: how many different approver keys must have signed, 0 to 16.
        metrics: a metric of the signed evaluation, or a dotted path to a number in it -> what is required.
    """

    require: Annotated[tuple[Kind, ...], Field(max_length=len(KINDS))] = DEMANDED
    approvals: Annotated[int, Field(ge=0, le=16)] = 1
    metrics: Annotated[dict[MetricPath, Threshold], Field(max_length=64)] = {}

    def problem(self) -> str | None:
        """Return how the gate contradicts itself, or None."""
        if len(set(self.require)) != len(self.require):
            return "require names a statement twice"
        if "waiver" in self.require:
            return "require names waiver, which only a finding needs"
        if self.approvals and "approval" not in self.require:
            return f"approvals = {self.approvals}, but require does not name approval"
        if not self.approvals and "approval" in self.require:
            return "require names approval, but approvals = 0"
        if self.metrics and "evaluation" not in self.require:
            return "metrics come from the signed evaluation, but require does not name evaluation"
        return None


class RegistryPolicy(_Model):
    """A registry's rules; without a file the defaults, which are the strictest that one person can work with.

    Attributes:
        license: what adapters are meant for.
        scan: which findings are accepted.
        gates: alias -> its gate. What a gate leaves out, it takes from the gate called "default", which
            also counts for other aliases and for versions and digests.
    """

    license: LicenseRules = LicenseRules()
    scan: ScanRules = ScanRules()
    gates: dict[Annotated[str, StringConstraints(pattern=ALIAS_PATTERN)], Gate] = {DEFAULT_GATE: Gate()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for alias in {DEFAULT_GATE, *self.gates}:
            problem = self.gate(alias).problem()
            if problem:
                raise ValueError(f"the gate of {alias!r} contradicts itself: {problem}")
        return self

    @classmethod
    def load(cls, path: Path | None) -> Self:
        """Return the policy in a TOML file; None gives the defaults.

        Raises:
            UsageError: the file cannot be read, or a key or value in it is wrong.
        """
        if path is None:
            return cls()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"the policy {path} cannot be read: {error.strerror}", "name a file that exists"
            ) from None
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, where: str = "the policy") -> Self:
        """Return the policy in TOML bytes; ``where`` names them in errors.

        Raises:
            UsageError: as for `load`.
        """
        mend = "registry/data/policy.toml shows every key with its meaning"
        if len(data) > MAX_POLICY_BYTES:
            raise UsageError(f"{where} has {len(data)} bytes; at most {MAX_POLICY_BYTES} are allowed", mend)
        try:
            # Through JSON, so that lists become tuples while every other type must be exact.
            text = json.dumps(tomllib.loads(data.decode("utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{where} is not a policy in TOML: {shown(error)}", mend) from None
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise UsageError(f"{where} is not valid:\n" + "\n".join(_explained(error)), mend) from None

    def gate(self, alias: str | None) -> Gate:
        """Return the gate of an alias; None stands for versions and digests."""
        default = self.gates.get(DEFAULT_GATE, Gate())
        own = self.gates.get(alias) if alias is not None else None
        if own is None:
            return default
        return default.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})

    def admission(self, alias: str | None, at: datetime | None = None) -> admission.Policy:
        """Return what admission has to know.

        Args:
            alias: whose gate; None stands for versions and digests.
            at: the time at which it is judged, in UTC; without it no waiver counts.
        """
        from registry.admission import Policy

        gate = self.gate(alias)
        return Policy(
            required=gate.require,
            allow_review=self.scan.allow_review,
            waiver_days=self.scan.waiver_days,
            at=at,
            approvals=gate.approvals,
            purpose=self.license.purpose,
            declared=self.license.declared,
            digest=self.digest,
        )

    @cached_property
    def digest(self) -> Digest:
        """sha256 of the policy as canonical JSON; comments and layout of the file do not count."""
        return digest_bytes(canonical_json(self.model_dump(mode="json")))


def _explained(error: ValidationError) -> list[str]:
    """Return one line for each mistake, with the nearest right key for an unknown one."""
    lines = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = tuple(str(part) for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where[-1], _keys_at(where[:-1]), n=1, cutoff=0.0)
            text = f"there is no such key; did you mean {near[0]!r}?"
        lines.append(f"  {shown('.'.join(part for part in where if part != '[key]') or 'it')}: {shown(text)}")
    return lines


def _keys_at(where: tuple[str, ...]) -> list[str]:
    """Return the keys that are right at a place in a policy file."""
    tables: dict[str, type[BaseModel]] = {"license": LicenseRules, "scan": ScanRules, "gates": Gate}
    if not where:
        return sorted(RegistryPolicy.model_fields)
    deeper: dict[str, type[BaseModel]] = {"gates": Threshold, "scan": Together}
    model = (deeper if len(where) > 2 and where[0] in deeper else tables)[where[0]]
    return sorted(model.model_fields)

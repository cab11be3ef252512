"""Waivers: signed decisions that a finding which asks for a person may pass, for these bytes and for a while.

A waiver names the weights, the rules, a reason, who decided, and when it ends. It is a statement of the
approvers, so it needs as many of their keys as an approval. Only rules that ask for a review can be waived: a
finding that blocks means that the file is not what was checked, or cannot be right, and no decision changes
that; a rule that is wrong about such a file is corrected in the scanner, for everybody.

Pure: the time comes in as a value. Without a time no waiver counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from registry.digest import Digest
from registry.errors import InvalidDocument, UsageError, shown
from registry.scanning.rules import RULES

if TYPE_CHECKING:
    from registry.scanning.report import Finding, ScanReport

MAX_DAYS: Final = 365
"""No policy allows waivers for longer."""

_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_Time = Annotated[str, StringConstraints(pattern=r"^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z$")]
_RuleId = Annotated[str, StringConstraints(pattern=r"^ADP-[A-Z]{3}-[0-9]{3}$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Sha256(_Model):
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Document(_Model):
    weights: _Sha256
    rules: Annotated[list[_RuleId], Field(min_length=1, max_length=32)]
    where: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = None
    reason: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    by: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    issued: _Time
    expires: _Time


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiver:
    """A waiver that was read.

    Attributes:
        weights: the sha256 of the weights file that it is about.
        rules: ids of the rules whose findings may pass.
        where: only findings at this place of the file, as the report names it; None is every place.
        reason: why.
        by: who decided.
        issued: when it was signed, in UTC; it counts from then on.
        expires: when it ends, in UTC; it does not count at that time any more.
        keys: the approver keys that signed it; none until somebody has verified that.
    """

    weights: Digest
    rules: frozenset[str]
    where: str | None
    reason: str
    by: str
    issued: datetime
    expires: datetime
    keys: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Waivers:
    """The waivers that count for one weights file at one time.

    Attributes:
        granted: those that `in_force` has let through.
        needed: how many different approver keys have to stand behind a finding that is waived; at least 1.
    """

    granted: tuple[Waiver, ...] = ()
    needed: int = 1

    @property
    def until(self) -> datetime | None:
        """When the first of them ends; None without any."""
        return min((found.expires for found in self.granted), default=None)

    def covers(self, rule: str, where: str) -> bool:
        """Return whether enough approvers let pass what a rule found at a place."""
        return self._enough(rule, (None, where))

    def mentions(self, rule: str) -> bool:
        """Return whether enough approvers let pass something that a rule found, wherever that is."""
        return self._enough(rule, None)

    def uncovered(self, report: ScanReport) -> tuple[Finding, ...]:
        """Return the findings of a scan that nobody has waived.

        Findings of a rule beyond those that a report keeps have no known place: then only a waiver for every
        place covers that rule.
        """
        counts = {found.rule: 0 for found in report.findings}
        for found in report.findings:
            counts[found.rule] += 1
        fullest = max(counts.values(), default=0)
        return tuple(
            found
            for found in report.findings
            if not self._enough(
                found.rule,
                (None,) if report.omitted and counts[found.rule] == fullest else (None, found.where),
            )
        )

    def _enough(self, rule: str, places: Sequence[str | None] | None) -> bool:
        known = RULES.get(rule)
        if known is None or known.severity != "review":
            return False
        keys = [
            found.keys
            for found in self.granted
            if rule in found.rules and (places is None or found.where in places)
        ]
        return len(frozenset[str]().union(*keys)) >= self.needed


NONE: Final = Waivers()
"""No waivers."""


def parse(predicate: Mapping[str, Any], keys: frozenset[str] = frozenset()) -> Waiver:
    """Return the waiver in the predicate of a statement.

    Args:
        predicate: hostile JSON values.
        keys: the approver keys that signed the statement.

    Raises:
        InvalidDocument: it is none.
    """
    try:
        found = _Document.model_validate(dict(predicate))
        issued, expires = _instant(found.issued), _instant(found.expires)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(shown(part, 60) for part in first["loc"])
        raise _invalid(f"{where}: {shown(first['msg'])}") from None
    except ValueError as error:
        raise _invalid(shown(error)) from None
    return Waiver(
        weights=Digest("sha256:" + found.weights.sha256),
        rules=frozenset(found.rules),
        where=found.where,
        reason=found.reason,
        by=found.by,
        issued=issued,
        expires=expires,
        keys=keys,
    )


def in_force(
    waivers: Iterable[Waiver], weights: Digest, at: datetime | None, *, max_days: int, needed: int
) -> Waivers:
    """Return those waivers that count.

    One that is about other weights, is dated in the future, is over, or runs longer than the policy allows is
    not an error: it says nothing about these bytes now.

    Args:
        waivers: genuine ones.
        weights: the sha256 of the weights file that is judged.
        at: the time at which it is judged, in UTC; None stands for a time that nobody knows.
        max_days: the longest life of a waiver that the policy allows.
        needed: how many different approver keys it takes.
    """
    longest = timedelta(days=max_days)
    granted = tuple(
        found
        for found in waivers
        if at is not None
        and found.weights == weights
        and found.issued <= at < found.expires
        and found.expires - found.issued <= longest
    )
    return Waivers(granted=granted, needed=max(needed, 1))


def waiver_predicate(
    weights: Digest,
    rules: Sequence[str],
    *,
    reason: str,
    by: str,
    at: datetime,
    days: int,
    max_days: int,
    where: str | None = None,
) -> dict[str, Any]:
    """Return the predicate of a waiver.

    Args:
        weights: the sha256 of the weights file.
        rules: ids of rules that ask for a review.
        reason: why; people will read it.
        by: who decides.
        at: now, in UTC.
        days: how long it shall count, 1 to ``max_days``.
        max_days: the longest life that the policy allows.
        where: only findings at this place, as the report names it.

    Raises:
        UsageError: there is no such rule, it blocks and cannot be waived, or another argument is wrong.
    """
    for rule in rules:
        _check_rule(rule)
    if not reason.strip() or not by.strip():
        raise UsageError("a waiver needs a name and a reason", "say who decides and why; people will read it")
    if not 1 <= days <= max_days:
        raise UsageError(
            f"a waiver for {days} days is not allowed", f"this registry's policy allows 1 to {max_days} days"
        )
    issued = at.astimezone(UTC).replace(microsecond=0)
    predicate = {
        "weights": {"sha256": weights.hex},
        "rules": sorted(set(rules)),
        **({} if where is None else {"where": where}),
        "reason": reason,
        "by": by,
        "issued": issued.strftime(_TIME),
        "expires": (issued + timedelta(days=days)).strftime(_TIME),
    }
    try:
        parse(predicate)
    except InvalidDocument as error:
        raise UsageError(error.message, "give a shorter text, and at most 32 rules") from None
    return predicate


def _check_rule(rule: str) -> None:
    known = RULES.get(rule)
    if known is None:
        raise UsageError(
            f"there is no rule {shown(rule, 60)!r}", "`registry scan` names the rule of each finding"
        )
    if known.severity != "review":
        raise UsageError(
            f"{rule} blocks ({known.title}): it cannot be waived",
            "export the adapter again; a rule that is wrong about a good file is a bug, please report it",
        )


def _instant(text: str) -> datetime:
    return datetime.strptime(text, _TIME).replace(tzinfo=UTC)


def _invalid(why: str) -> InvalidDocument:
    return InvalidDocument(f"the waiver is not valid: {why}", "sign it by `registry waive`")

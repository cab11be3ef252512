"""Whether AWS would allow a request: IAM's policy evaluation, as far as our policies use it.

An explicit deny of any policy wins, then an allow of an identity's policy is needed. Unknown operators are an
error, so that a policy never passes because a condition was not understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What somebody asks of AWS.

    Attributes:
        action: such as ``s3:PutObject``.
        resource: its ARN.
        context: condition keys; one that is not there is null.
    """

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict, hash=False)


def allowed(request: Request, identity: Iterable[Policy], resource: Iterable[Policy] = ()) -> bool:
    """Whether the policies of an identity allow a request, and none of these or the resource's denies it."""
    own = [one for policy in identity for one in policy["Statement"]]
    theirs = [one for policy in resource for one in policy["Statement"]]
    if any(one["Effect"] == "Deny" and _applies(one, request) for one in (*own, *theirs)):
        return False
    return any(one["Effect"] == "Allow" and _applies(one, request) for one in own)


def matches(pattern: str, value: str, *, folded: bool = False) -> bool:
    """IAM's wildcards: ``*`` for anything, ``?`` for one character."""
    expression = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return re.fullmatch(expression, value, re.DOTALL | (re.IGNORECASE if folded else 0)) is not None


def _applies(statement: Mapping[str, Any], request: Request) -> bool:
    known = {"Sid", "Effect", "Principal", "Action", "Resource", "NotResource", "Condition"}
    assert statement.keys() <= known, statement.keys() - known
    if not any(matches(action, request.action, folded=True) for action in _list(statement["Action"])):
        return False
    if "NotResource" in statement:
        if any(matches(one, request.resource) for one in _list(statement["NotResource"])):
            return False
    elif not any(matches(one, request.resource) for one in _list(statement["Resource"])):
        return False
    return all(
        _holds(operator, request.context.get(key), _list(values))
        for operator, keys in statement.get("Condition", {}).items()
        for key, values in keys.items()
    )


def _holds(operator: str, found: str | None, values: list[str]) -> bool:
    if operator == "Null":
        return (found is None) == (values == ["true"])
    if operator in ("ArnNotEquals", "StringNotEquals"):  # true of a key that is not there, too
        return found is None or not any(matches(one, found) for one in values)
    if found is None:
        return False
    if operator in ("Bool", "StringEquals"):
        return found in values
    if operator == "NumericLessThan":
        return any(float(found) < float(one) for one in values)
    raise AssertionError(f"this evaluator does not know the operator {operator}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

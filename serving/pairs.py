"""Adapters that work together: two harmless ones can be the halves of a backdoor.

The registry's policy lists pairs of aliases whose adapters may be loaded together; one of a pair is promoted
only when a signed probe has looked at both. Here a request that stacks others is refused, or served with a
warning, as the policy says.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from registry.errors import PolicyRefused
from serving.logs import event

if TYPE_CHECKING:
    from registry.admission import VerifiedAdapter
    from registry.policy import ScanRules


def require_declared(rules: ScanRules, stack: Sequence[tuple[VerifiedAdapter, frozenset[str]]]) -> None:
    """Make sure that every two adapters of a stack are a declared pair.

    Args:
        rules: of the policy.
        stack: each adapter with the aliases (``name@alias``) that mean it, however it was asked for.

    Raises:
        PolicyRefused: two are not, and the policy refuses that.
    """
    for (one, its), (other, others) in itertools.combinations(stack, 2):
        if any(others.intersection(rules.partners(alias)) for alias in its):
            continue
        first, second = (adapter.reference or str(adapter.digest) for adapter in (one, other))
        if rules.undeclared_pairs == "refuse":
            raise PolicyRefused(
                f"the policy does not declare that {first} and {second} may be loaded together",
                "probe them together and list their aliases under [[scan.pairs]], or ask for one of them",
            )
        event(
            "adapters work together that are no declared pair",
            level=logging.WARNING, first=first, second=second,
        )  # fmt: skip

"""Every error of the flows, in one tree.

FlowError                      1   anything else
 ├─ ServerError                1   the local Prefect server does not start or answer
 └─ StageFailed                1   a stage ended in a way that explains nothing by itself

The floors below explain their own errors; a flow passes them on as they are, with their exit codes. Each says
what happened (``message``) and what to do about it (``mend``).
"""

from __future__ import annotations

from typing import ClassVar


class FlowError(Exception):
    """Base of all errors of the flows.

    Attributes:
        exit_code: what the command line returns for it.
        message: what happened.
        mend: what the user can do about it; may be empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message, mend)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message}\n  What to do: {self.mend}" if self.mend else self.message


class ServerError(FlowError):
    """The Prefect server does not start, or does not answer any more."""


class StageFailed(FlowError):
    """A stage was cancelled or crashed without an error of its own."""

"""Every error of the flows, in one tree.

FlowError                      1   anything else
 ├─ ServerError                1   the local Prefect server does not start or answer
 ├─ StageFailed                1   a stage ended in a way that explains nothing by itself
 ├─ MessageRefused             1   a message of MLflow is not believed
 ├─ Rejected                  14   somebody has rejected the version
 └─ ApprovalTimeout           17   nobody has decided in time

The floors below explain their own errors; a flow passes them on as they are, with their exit codes. Each says
what happened (``message``) and what to do about it (``mend``).
"""

from __future__ import annotations

from registry.errors import Explained


class FlowError(Explained):
    """Base of all errors of the flows."""


class ServerError(FlowError):
    """The Prefect server does not start, or does not answer any more."""


class StageFailed(FlowError):
    """A stage was cancelled or crashed without an error of its own."""


class MessageRefused(FlowError):
    """A message that should be MLflow's is not believed.

    Attributes:
        status: of the HTTP answer.
    """

    def __init__(self, status: int, message: str, mend: str) -> None:
        super().__init__(message, mend)
        self.status = status


class Rejected(FlowError):
    """Somebody has rejected the version that was to be released."""

    exit_code = 14


class ApprovalTimeout(FlowError):
    """Approvers have not decided in time."""

    exit_code = 17

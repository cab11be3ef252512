"""Every error of serving, in one tree.

ServingError                    1   anything else
 ├─ UsageError                  2   an option, a request or a value is wrong
 │   ├─ UnknownExpression       2   the adapter was not trained for that word
 │   ├─ StrengthOutOfRange      2   outside of the range that was signed with the adapter
 │   └─ ImageRefused            2   the picture cannot be read, or is over a limit
 ├─ ConditioningError           1   prompts that cannot be interpolated
 ├─ Cancelled                   1   the caller stopped the run
 ├─ CandidateRefused           10   the adapter was never signed
 ├─ BaseNotFound               11   the base model is not on this machine
 ├─ NotServed                  11   no such adapter is served here
 ├─ WrongBase                  14   the adapter was made for another base model
 ├─ AdapterMismatch            14   the adapter's tensors do not fit the base model
 ├─ Overloaded                 20   the queue is full, try again later
 └─ Draining                   20   the server is going down

The number is the exit code of the command line. Each error says what happened (``message``) and what to do
about it (``mend``). What the registry refuses keeps the registry's own errors and exit codes.
"""

from __future__ import annotations

from registry.errors import Explained


class ServingError(Explained):
    """Base of all errors of serving."""


class UsageError(ServingError):
    """An option, a request or a value is wrong."""

    exit_code = 2


class UnknownExpression(UsageError):
    """The adapter has no such expression."""


class StrengthOutOfRange(UsageError):
    """A strength or an intensity lies outside of the range that was signed with the adapter."""


class ImageRefused(UsageError):
    """The picture cannot be read, or is over a limit."""


class ConditioningError(ServingError):
    """Prompt embeddings that cannot be interpolated."""


class Cancelled(ServingError):
    """The caller stopped the run before its last step."""


class CandidateRefused(ServingError):
    """An unsigned candidate was given to an engine that serves signed adapters only."""

    exit_code = 10


class BaseNotFound(ServingError):
    """The base model is not on this machine and cannot be fetched."""

    exit_code = 11


class WrongBase(ServingError):
    """The adapter was made for another base model, or for another revision of it."""

    exit_code = 14


class AdapterMismatch(ServingError):
    """The adapter's tensors do not fit the modules of the base model."""

    exit_code = 14


class NotServed(ServingError):
    """No such adapter is served here."""

    exit_code = 11


class Overloaded(ServingError):
    """There are more requests than can be taken now.

    Attributes:
        retry_after: seconds after which to try again.
    """

    exit_code = 20

    def __init__(self, message: str, mend: str, retry_after: float = 1.0) -> None:
        super().__init__(message, mend)
        self.retry_after = retry_after


class Draining(ServingError):
    """The server finishes what it has and takes nothing new."""

    exit_code = 20

"""What a training tells the process that started it: one JSON object a line on stdout.

``{"stage", "done", "total", "note"}`` is progress, ``{"run"}`` the MLflow run that takes its figures, and
``{"error", "message", "mend"}`` why it ends. Any other line is for people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from registry.errors import Explained
from trainer.errors import TrainerError

_KINDS = (
    {"stage": str, "done": int, "total": int, "note": str},
    {"run": str},
    {"error": str, "message": str, "mend": str},
)


def tell(**news: Any) -> None:
    """Write news in one piece, for all processes of a training share the pipe.

    Raises:
        BrokenPipeError: nobody listens any more; for a training that is a reason to save and end.
    """
    os.write(1, f"{json.dumps(news)}\n".encode())


def progress(stage: str, done: int, total: int, note: str = "") -> None:
    """Tell how far a stage is."""
    tell(stage=stage, done=done, total=total, note=note)


def tell_error(error: Explained) -> None:
    """Tell why the training ends, to whoever may still listen."""
    with suppress(BrokenPipeError):
        tell(error=type(error).__name__, message=error.message, mend=error.mend)


def read(line: str) -> Mapping[str, Any] | None:
    """Return the news in a line, or None when it holds none."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    known = any(
        value.keys() == kind.keys() and all(type(value[name]) is kind[name] for name in kind)
        for kind in _KINDS
    )
    return value if known else None


def error_of(news: Mapping[str, Any]) -> Explained:
    """Return the error that was told, of its own class where one of these floors has it."""
    import registry.errors
    import serving.errors
    import trainer.errors

    for floor in (trainer.errors, serving.errors, registry.errors):
        kind = getattr(floor, news["error"], None)
        if isinstance(kind, type) and issubclass(kind, Explained):
            return kind(news["message"], news["mend"])
    return TrainerError(f"{news['error']}: {news['message']}", news["mend"])

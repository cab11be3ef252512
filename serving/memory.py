"""Memory: the allocator's manners on a CPU, and how one knows that there was too little."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3)
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors instead of returning it to the system.

    A step of a model frees and takes back the same hundreds of megabytes. Returned, each page is faulted in
    anew: elementwise operations then run at a fraction of the memory's speed.

    Returns:
        True where the C library is glibc and took the settings; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_MMAP_MAX, 0))


def was_short(error: BaseException) -> bool:
    """Whether an error says that there was no memory, on the machine or on its accelerator."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"

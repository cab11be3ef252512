"""A Ray cluster of this machine's own that speaks to nobody else.

Left to itself, Ray listens on the machine's network address, and its head asks the metadata services of three
clouds (one of them by a name, so a server of names is asked, too) where it runs, even with
``RAY_USAGE_STATS_ENABLED=0``. It does not ask when ``~/ray_bootstrap_config.yaml`` tells it, so it gets a
home of its own that has one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

#: Ray gives its processes 15 s to start, which a busy machine does not always keep.
_STARTS = 5

_CLUSTER = """\
cluster_name: here
max_workers: 0
provider: {type: local}
auth: {}
available_node_types: {}
"""


@contextmanager
def kept_here(folder: Path) -> Iterator[dict[str, str]]:
    """Let a Ray cluster that is started in the block be one of 127.0.0.1 alone.

    Call it before Ray is imported for the first time: its address is decided then.

    Args:
        folder: Ray's own home; who may use the cluster is decided by a token there.

    Yields:
        variables that the cluster's workers need (``runtime_env``): they live in the user's home.
    """
    token = folder / "token"
    folder.mkdir(parents=True, exist_ok=True)
    _put(folder / "ray_bootstrap_config.yaml", _CLUSTER, os.replace)
    if not token.exists():
        with suppress(FileExistsError):  # of two that start at once the first one's counts for both
            _put(token, secrets.token_hex(32), os.link)
    # Despite its name it counts on every system: without a "cluster" Ray stays on the loopback.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(folder)
    try:
        yield {} if before is None else {"HOME": before}
    finally:
        if before is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = before


def _put(path: Path, text: str, name: Callable[[Path, Path], None]) -> None:
    """Write a private file; ``name`` gives it its name when it is complete, whoever is killed meanwhile."""
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole = Path(folder) / path.name
        with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        name(whole, path)


def connect(address: str | None, options: Mapping[str, Any]) -> None:
    """Find the cluster, or start it.

    Raises:
        ServingError: it does not start or answer.
    """
    import ray

    from registry.errors import shown
    from serving.errors import ServingError

    for left in range(_STARTS - 1 if address is None else 0, -1, -1):
        try:
            ray.init(address, **options)
            return
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if not left:
                place = address or "of this machine"
                raise ServingError(
                    f"the Ray cluster {place} does not start or answer: {shown(error)}",
                    "run the same command again when the machine has less to do, or set RAY_ADDRESS to a "
                    "cluster that runs",
                ) from error

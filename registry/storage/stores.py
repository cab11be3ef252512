"""Opens the store that a URI names."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from registry.errors import UsageError, shown
from registry.storage.base import ObjectStore

if TYPE_CHECKING:
    from registry.storage.wire import Patience

_EXAMPLES = {"file": "file:///srv/adapters", "s3": "s3://bucket/prefix"}


def open_store(uri: str, records: Path | None = None, patience: Patience | None = None) -> ObjectStore:
    """Returns the store of a URI; nothing is asked of it yet.

    Args:
        uri: ``file:///folder`` or ``s3://bucket/prefix``.
        records: folder of this machine where unfinished uploads are noted; None is ``<home>/uploads``.
        patience: how long to wait for a server; None is long enough for large files.

    Raises:
        UsageError: there is no such kind of store, or the URI is not complete.
    """
    parts = urlsplit(uri)
    if parts.scheme == "s3":
        from registry.settings import home
        from registry.storage.s3 import S3Objects

        return S3Objects(uri, records=records or home() / "uploads", patience=patience)
    if parts.scheme == "file":
        if parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
            raise UsageError(
                f"{shown(uri)!r} is not the URI of a folder", mend=f"write it like {_EXAMPLES['file']}"
            )
        from registry.storage.local import LocalObjects

        return LocalObjects(Path(unquote(parts.path)))
    near = difflib.get_close_matches(parts.scheme, _EXAMPLES, n=1)
    mend = f"did you mean {_EXAMPLES[near[0]]}?" if near else f"write {' or '.join(_EXAMPLES.values())}"
    raise UsageError(f"{shown(uri)!r} is no kind of store that the registry knows", mend=mend)

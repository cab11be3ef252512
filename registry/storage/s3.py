"""Objects in an S3 bucket: AWS, or a server that speaks its protocol.

Conditional writes (``If-None-Match``, ``If-Match``) make an object appear once and change atomically; AWS,
seaweedfs, MinIO, Ceph and R2 have them.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from registry.content import CHUNK_BYTES, Content
from registry.errors import Conflict, DigestMismatch, NetworkError, NotFound, UsageError, shown
from registry.storage.base import Abandoned, ObjectStat, check_key
from registry.storage.bucket import Bucket
from registry.storage.wire import Patience

MAX_LIST_CHARACTERS: Final = 64 << 20
"""The keys of one prefix are no longer together; a hundred thousand versions have a tenth of it."""
MAX_LIST_SECONDS: Final = 300.0
"""A list takes no longer, however many pages a server makes of it."""


class S3Objects:
    """An `ObjectStore` in a bucket; see `Bucket` for how it is found.

    Args:
        uri: ``s3://bucket`` or ``s3://bucket/prefix``.
        records: folder where unfinished uploads are noted, so that a later process goes on with them; None
            keeps no notes.
        patience: how long to wait for the server.

    Raises:
        UsageError: the URI or the endpoint is wrong.
    """

    def __init__(self, uri: str, *, records: Path | None = None, patience: Patience | None = None) -> None:
        self._bucket = Bucket(uri, patience)
        self._records = records

    @property
    def uri(self) -> str:
        """See `ObjectStore.uri`."""
        return self._bucket.uri

    def stat(self, key: str) -> ObjectStat:
        """See `ObjectStore.stat`."""
        reply = self._bucket.send("HEAD", key, accepted=(200,))
        try:
            size = int(reply.headers["content-length"])
        except (KeyError, ValueError):
            size = -1
        tag = reply.headers.get("etag", "")
        if size < 0 or not tag:
            raise NetworkError(
                f"the store does not tell the size and tag of {key}", mend="is it really an S3 server?"
            )
        return ObjectStat(size=size, tag=tag, modified=_http_time(reply.headers.get("last-modified")))

    def read(self, key: str, start: int, stop: int) -> bytes:
        """See `ObjectStore.read`."""
        if stop <= start:
            return b""
        reply = self._bucket.send(
            "GET",
            key,
            headers={"Range": f"bytes={start}-{stop - 1}"},
            limit=stop - start,
            accepted=(200, 206, 416),
        )
        if reply.status == 416:  # the object ends before the range begins
            return b""
        begins = 0
        if reply.status == 206:
            told = re.match(r"bytes (\d{1,18})-", reply.headers.get("content-range", ""), re.ASCII)
            begins = int(told[1]) if told else -1
        if begins != start:
            raise NetworkError(
                f"the store does not send the range of {key} that was asked for",
                mend="is there a proxy between that does not know ranges?",
            )
        return reply.body

    def put(self, key: str, content: Content, sent: Callable[[int], None] | None = None) -> bool:
        """See `ObjectStore.put`."""
        if len(content) > CHUNK_BYTES:
            from registry.storage.multipart import put_parts

            return put_parts(self._bucket, key, content, sent, self._records)
        data = content[0 : len(content)]
        written = self._write(key, data, {"If-None-Match": "*"})
        if written and sent is not None:
            sent(len(data))
        return written

    def replace(self, key: str, data: bytes, tag: str | None) -> None:
        """See `ObjectStore.replace`."""
        if not self._write(key, data, {"If-None-Match": "*"} if tag is None else {"If-Match": tag}):
            raise Conflict(f"somebody else has just replaced {key}", "run the same command again")

    def keys(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore.keys`."""
        found: set[str] = set()
        characters, until = 0, time.monotonic() + MAX_LIST_SECONDS
        query = {"list-type": "2", "encoding-type": "url", "prefix": self._bucket.prefix + prefix}
        while True:
            page = self._bucket.ask("GET", None, query)
            before = len(found)
            for item in page.findall("Contents"):
                for key in self._listed(item.findtext("Key") or "", prefix):
                    found.add(key)
                    characters += len(key)
            token = page.findtext("NextContinuationToken") or ""
            if page.findtext("IsTruncated") != "true":
                break
            endless = characters > MAX_LIST_CHARACTERS or time.monotonic() > until
            if endless or len(found) == before or not token:
                raise DigestMismatch(
                    f"the list of {shown(prefix)!r} in {self.uri} does not end",
                    mend="the store may have been tampered with; look into the bucket with another tool",
                )
            query["continuation-token"] = token
        # Servers differ in the order of "-" and "/".
        yield from sorted(found)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self._bucket.send("DELETE", key, accepted=(200, 204, 404))

    def clock(self) -> datetime | None:
        """See `Housekeeping.clock`; an answer about an object that is not there does too."""
        reply = self._bucket.send("HEAD", "clock", accepted=(200, 404))
        told = reply.headers.get("date")
        return None if told is None else _http_time(told)

    def abandoned(self, before: datetime) -> list[Abandoned]:
        """See `Housekeeping.abandoned`: multipart uploads."""
        from registry.storage.multipart import abandoned

        return abandoned(self._bucket, before)

    def abort(self, unfinished: Abandoned) -> None:
        """See `Housekeeping.abort`."""
        query = {"uploadId": unfinished.identity}
        self._bucket.send("DELETE", unfinished.key, query=query, accepted=(200, 204, 404))

    # -- parts --

    def _write(self, key: str, data: bytes, condition: Mapping[str, str]) -> bool:
        """Writes a small object if a condition holds; False if it does not."""
        missing = (404,) if "If-Match" in condition else ()
        reply = self._bucket.send("PUT", key, headers=condition, body=data, accepted=(200, 412, *missing))
        if reply.status != 200 and reply.repeated:
            # An attempt that seemed to fail may have been carried out: then the object is what we wrote.
            try:
                return self.stat(key).tag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
            except NotFound:
                return False
        return reply.status == 200

    def _listed(self, encoded: str, prefix: str) -> Iterator[str]:
        """A key of a list without the store's prefix; nothing for the marker of an empty folder.

        Raises:
            DigestMismatch: it lies outside of what was asked for, or could lead out of a folder.
        """
        key = unquote(encoded)
        if key.endswith("/"):
            return
        inner = key.removeprefix(self._bucket.prefix)
        try:
            if not key.startswith(self._bucket.prefix + prefix):
                raise UsageError("it lies elsewhere")
            yield check_key(inner)
        except UsageError:
            raise DigestMismatch(
                f"the store lists {shown(key)!r}, which is no key of a registry below {shown(prefix)!r}",
                mend="it was tampered with, or other things lie in its folder; remove that object",
            ) from None


def _http_time(text: str | None) -> datetime:
    """A server's time; now if it cannot be read, so that nothing is taken for old."""
    try:
        return parsedate_to_datetime(text or "").astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.now(UTC)

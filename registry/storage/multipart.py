"""Big objects: parts are sent in parallel, and a later process goes on where a killed one stopped.

Which upload belongs to a key is noted in a file of this machine. Its lock tells whether the process that
began the upload is still at it. An upload that another machine began is taken over only when nothing has
come to it for a quarter of an hour. Parts that are there already are kept if they have the MD5 of our bytes,
so that nothing of another content gets into the object.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from registry.content import CHUNK_BYTES, Content
from registry.errors import NetworkError, NotFound, RegistryError, UsageError
from registry.parallel import each
from registry.storage.base import Abandoned, check_key
from registry.storage.bucket import Bucket, parse

QUIET: Final = timedelta(minutes=15)
"""After this long without a new part, an upload of an unknown process is believed to be abandoned."""
_MAX_PARTS = 10_000
_MAX_PAGES = 20
_ROUNDS = 3
_UPLOAD_ID = re.compile(r"[\x21-\x7e]{1,1024}", re.ASCII)

_Parts = dict[int, str]
"""The MD5, or whatever the server calls the parts' tags, by their number."""


def put_parts(
    bucket: Bucket,
    key: str,
    content: Content,
    sent: Callable[[int], None] | None,
    records: Path | None,
) -> bool:
    """Writes a big object that must not exist yet; see `ObjectStore.put`."""
    with _alone(records, f"{bucket.uri}/{key}") as note:
        for _ in range(_ROUNDS):
            if bucket.send("HEAD", key, accepted=(200, 404)).status == 200:
                note.forget()
                return False
            upload = _Upload(bucket, key, content, sent)
            upload.begin(note.read())
            note.write(upload.identity)
            try:
                written = upload.finish()
            except NotFound:
                continue  # somebody ended this upload: the object is there now, or we begin again
            except NetworkError:
                raise  # what has been sent is kept for the next attempt
            except RegistryError:
                upload.abort()
                note.forget()
                raise
            note.forget()
            return written
    raise NetworkError(
        f"the store loses the upload of {key} again and again",
        mend="is something cleaning up unfinished uploads in the bucket?",
    )


class _Upload:
    """One multipart upload."""

    def __init__(
        self, bucket: Bucket, key: str, content: Content, sent: Callable[[int], None] | None
    ) -> None:
        if len(content) > _MAX_PARTS * CHUNK_BYTES:
            raise RegistryError(f"{key} is larger than S3 takes in {_MAX_PARTS} parts")
        self._bucket, self._key, self._content = bucket, key, content
        self._sent = sent or (lambda count: None)
        self._there: _Parts = {}
        self.identity = ""

    def begin(self, noted: str | None) -> None:
        """Goes on with an unfinished upload, or begins one."""
        for identity in [noted] if noted else _abandoned(self._bucket, self._key):
            with contextlib.suppress(NotFound):
                self._there = _parts(self._bucket, self._key, identity)[0]
                self.identity = identity
                return
        answer = self._bucket.ask("POST", self._key, {"uploads": ""})
        self.identity = _identity(answer.findtext("UploadId"))

    def finish(self) -> bool:
        """Sends the parts that are not there and puts the object together; False if somebody else was faster.

        Raises:
            NotFound: the upload is not there any more.
        """
        count = -(-len(self._content) // CHUNK_BYTES)
        tags: _Parts = {}

        def send(number: int) -> None:
            data = self._content[(number - 1) * CHUNK_BYTES : number * CHUNK_BYTES]
            tag = self._there.get(number)
            if tag is None or tag != hashlib.md5(data, usedforsecurity=False).hexdigest():
                query = {"partNumber": str(number), "uploadId": self.identity}
                reply = self._bucket.send("PUT", self._key, query=query, body=data, accepted=(200,))
                tag = reply.headers.get("etag", "").strip('"')
            tags[number] = tag
            self._sent(len(data))

        each(send, range(1, count + 1))
        return self._complete(tags)

    def abort(self) -> None:
        """Forgets the upload and its parts."""
        with contextlib.suppress(RegistryError):
            self._bucket.send(
                "DELETE", self._key, query={"uploadId": self.identity}, accepted=(200, 204, 404)
            )

    def _complete(self, tags: _Parts) -> bool:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(tags[number])}</ETag></Part>"
            for number in sorted(tags)
        )
        reply = self._bucket.send(
            "POST",
            self._key,
            query={"uploadId": self.identity},
            headers={"If-None-Match": "*"},
            body=f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode(),
            limit=1 << 16,
            accepted=(200, 412),
        )
        if reply.status == 200:
            # S3 sends 200 before it knows, and may say in the body that it failed after all.
            answer = parse(reply.body)
            if answer.tag == "Error":
                code = answer.findtext("Code") or "an error"
                raise NetworkError(f"the store could not put {self._key} together: {code}", "try again later")
            return True
        self.abort()
        return False


def abandoned(bucket: Bucket, before: datetime) -> list[Abandoned]:
    """The uploads below the bucket's prefix to which nothing has come since a time.

    How many bytes a server keeps for them, no protocol tells cheaply: parts are counted as full chunks.
    """
    query = {"uploads": "", "prefix": bucket.prefix}
    found: list[Abandoned] = []
    for _ in range(_MAX_PAGES):
        page = bucket.ask("GET", None, query)
        for item in page.findall("Upload"):
            full, identity = item.findtext("Key") or "", item.findtext("UploadId") or ""
            if not full.startswith(bucket.prefix) or not _UPLOAD_ID.fullmatch(identity):
                continue
            key = full.removeprefix(bucket.prefix)
            with contextlib.suppress(NotFound, UsageError):
                parts, last = _parts(bucket, check_key(key), identity)
                if max(last, _time(item.findtext("Initiated"))) < before:
                    found.append(Abandoned(key=key, identity=identity, size=len(parts) * CHUNK_BYTES))
        marker = page.findtext("NextKeyMarker") or ""
        if page.findtext("IsTruncated") != "true" or not marker:
            break
        query |= {"key-marker": marker, "upload-id-marker": page.findtext("NextUploadIdMarker") or ""}
    return found


def _parts(bucket: Bucket, key: str, identity: str) -> tuple[_Parts, datetime]:
    """The tags of an upload's parts, and when the last one came.

    Raises:
        NotFound: there is no such upload.
    """
    found: _Parts = {}
    last = datetime.min.replace(tzinfo=UTC)
    query = {"uploadId": identity}
    for _ in range(_MAX_PAGES):
        page = bucket.ask("GET", key, query)
        for part in page.findall("Part"):
            number = part.findtext("PartNumber") or ""
            if number.isdecimal() and len(number) < 6:
                found[int(number)] = (part.findtext("ETag") or "").strip('"')
            last = max(last, _time(part.findtext("LastModified")))
        marker = page.findtext("NextPartNumberMarker") or ""
        if page.findtext("IsTruncated") != "true" or not marker:
            break
        query["part-number-marker"] = marker
    return found, last


def _abandoned(bucket: Bucket, key: str) -> list[str]:
    """Uploads of this key that nobody seems to work on any more."""
    full = bucket.prefix + key
    page = bucket.ask("GET", None, {"uploads": "", "prefix": full})
    quiet = datetime.now(UTC) - QUIET
    found = []
    for item in page.findall("Upload"):
        identity = item.findtext("UploadId") or ""
        if item.findtext("Key") != full or not _UPLOAD_ID.fullmatch(identity):
            continue
        if _time(item.findtext("Initiated")) < quiet:
            with contextlib.suppress(NotFound):
                if _parts(bucket, key, identity)[1] < quiet:
                    found.append(identity)
    return found


def _identity(text: str | None) -> str:
    if text is None or not _UPLOAD_ID.fullmatch(text):
        raise NetworkError("the store does not begin an upload", mend="is AWS_ENDPOINT_URL_S3 an S3 server?")
    return text


def _time(text: str | None) -> datetime:
    """A server's time; now if it cannot be read, so that nothing is taken for old."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return datetime.now(UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


class _Note:
    """A locked file of this machine that holds the upload of an object; nothing where none can be made."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._descriptor = -1 if path is None else _lock(path)

    def read(self) -> str | None:
        """Returns the noted upload."""
        if self._descriptor < 0:
            return None
        text = os.pread(self._descriptor, 2048, 0).decode("ascii", "replace")
        return text if _UPLOAD_ID.fullmatch(text) else None

    def write(self, identity: str) -> None:
        """Notes an upload."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, identity.encode("ascii"), 0)

    def forget(self) -> None:
        """Removes the note."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets the next one have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)


@contextlib.contextmanager
def _alone(records: Path | None, name: str) -> Iterator[_Note]:
    """Lets one writer of this machine at a time work on an object, and gives the note of its upload."""
    path = None
    if records is not None:
        try:
            records.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = records / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.upload"
            note = _Note(path)
        except OSError:  # a machine without a place to write can push, but not go on with a killed push
            note = _Note(None)
    else:
        note = _Note(None)
    try:
        yield note
    finally:
        note.close()


def _lock(path: Path) -> int:
    """Opens a file and waits until nobody else has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The one before may have removed the file: then the name belongs to another one.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)

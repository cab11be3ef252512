"""Signed requests to an S3 bucket, and what its refusals mean.

Requests are signed by botocore with the credentials that it finds where every S3 client does; they are sent
by `wire`, which bounds what a server may do to us.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import xml.etree.ElementTree as xml
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlsplit

from registry.errors import NetworkError, NotFound, RegistryError, UsageError, shown
from registry.storage.base import check_key
from registry.storage.wire import Patience, Reply, Wire

MAX_ANSWER_BYTES: Final = 4 << 20
"""No list or other document of a server is longer."""
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
_DEFAULT_REGION = "us-east-1"
_UNRESERVED = "-_.~"


class Bucket:
    """A bucket, or what lies in it below a prefix.

    The endpoint is that of ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or ``MLFLOW_S3_ENDPOINT_URL``, else
    AWS itself; the region that of ``AWS_REGION`` or ``AWS_DEFAULT_REGION``.

    Args:
        uri: ``s3://bucket`` or ``s3://bucket/prefix``.
        patience: how long to wait for the server.

    Raises:
        UsageError: the URI or the endpoint is wrong.
    """

    def __init__(self, uri: str, patience: Patience | None = None) -> None:
        parts = urlsplit(uri)
        name, prefix = parts.netloc, parts.path.strip("/")
        if parts.scheme != "s3" or not _NAME.fullmatch(name) or parts.query or parts.fragment:
            raise UsageError(f"{shown(uri)!r} is not a bucket", mend="write it like s3://bucket/prefix")
        if prefix:
            check_key(prefix)
        self._name = name
        self.prefix = f"{prefix}/" if prefix else ""
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _DEFAULT_REGION
        endpoint, root = _place(name, region)
        self._wire = Wire(endpoint, patience)
        self._root = self._wire.path + root
        self._signer = _Signer(self._wire, region)

    @property
    def uri(self) -> str:
        """The URI, without a slash at its end."""
        return f"s3://{self._name}/{self.prefix}".rstrip("/")

    def send(
        self,
        method: str,
        key: str | None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        limit: int = 0,
        accepted: tuple[int, ...],
    ) -> Reply:
        path = self._root or "/"
        if key is not None:
            path = f"{self._root}/{quote(self.prefix + check_key(key), safe='/' + _UNRESERVED)}"
        if query:
            pairs = (
                f"{quote(name, safe=_UNRESERVED)}={quote(query[name], safe=_UNRESERVED)}"
                for name in sorted(query)
            )
            path += "?" + "&".join(pairs)

        def signed() -> Mapping[str, str]:
            return self._signer.headers(method, path, headers or {}, body)

        # 409: somebody writes the same key at this moment, and it is not known yet who wins.
        reply = self._wire.call(method, path, signed, body, limit, frozenset(accepted), frozenset({409}))
        if reply.status not in accepted:
            raise self._refusal(reply, f"{method} {self.uri if key is None else key}")
        return reply

    def _refusal(self, reply: Reply, what: str) -> RegistryError:
        """What an answer means that nobody expected."""
        try:
            code = parse(reply.body).findtext("Code") or ""
        except RegistryError:
            code = ""
        said = f"{reply.status} {shown(code, 80)}".strip()
        if code == "NoSuchBucket":
            return NotFound(f"there is no bucket {self._name}", mend="create it, or correct the store's URI")
        if reply.status == 404:
            return NotFound(
                f"{what}: the store has no such object ({said})",
                mend=f"is {self.uri} the right store, and is it complete?",
            )
        if reply.status in (401, 403):
            return _forbidden(code, what, said, self.uri)
        if 300 <= reply.status < 400:
            region = reply.headers.get("x-amz-bucket-region")
            return UsageError(
                f"{what}: the server sends us elsewhere ({said}); that is not followed"
                + (f". The bucket is in the region {shown(region)}" if region else ""),
                mend="set AWS_DEFAULT_REGION or AWS_ENDPOINT_URL_S3 to where the bucket is",
            )
        if reply.status == 501:
            return UsageError(
                f"{what}: the server does not know what is asked of it ({said})",
                mend="use a server that has conditional writes (If-None-Match, If-Match)",
            )
        return RegistryError(f"{what}: the server answers {said}", mend="look at the server's log")

    def ask(
        self,
        method: str,
        key: str | None,
        query: Mapping[str, str],
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> xml.Element:
        """Sends a request whose answer is XML, and returns that without its name spaces."""
        reply = self.send(
            method, key, query=query, headers=headers, body=body, limit=MAX_ANSWER_BYTES + 1, accepted=(200,)
        )
        return parse(reply.body)


def _place(bucket: str, region: str) -> tuple[str, str]:
    """The server's address, and what every path on it begins with."""
    endpoint = next((value for name in _ENDPOINTS if (value := os.environ.get(name))), None)
    if endpoint is not None:
        return endpoint, f"/{bucket}"
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    if "." in bucket:  # no certificate is valid for a dot in front of the server's name
        return f"https://s3.{region}.{suffix}", f"/{bucket}"
    return f"https://{bucket}.s3.{region}.{suffix}", ""


def parse(data: bytes) -> xml.Element:
    """Reads an XML answer, without its name spaces.

    Raises:
        NetworkError: it is no XML, too long, or has declarations that could make it grow.
    """
    try:
        if len(data) > MAX_ANSWER_BYTES or b"<!" in data:
            raise ValueError("the answer is too long or has declarations")
        root = xml.fromstring(data)  # noqa: S314 - without declarations there are no entities to expand
    except (ValueError, xml.ParseError, RecursionError) as error:
        raise NetworkError(
            f"the store's answer cannot be read: {error}", mend="is AWS_ENDPOINT_URL_S3 an S3 server?"
        ) from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _forbidden(code: str, what: str, said: str, uri: str) -> RegistryError:
    if code == "RequestTimeTooSkewed":
        return UsageError(f"{what} is refused ({said})", mend="set the clock of this machine")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return UsageError(
            f"{what} is refused: the server does not accept the credentials ({said})",
            mend="correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in AWS_PROFILE",
        )
    return RegistryError(
        f"{what} is refused: these credentials may not do that ({said})",
        mend=f"ask who runs {uri} for the permission; AWS says the same of objects that do not exist, to "
        "those who may not list the bucket",
    )


@dataclass(frozen=True, slots=True)
class _Credentials:
    """What botocore's signer needs."""

    access_key: str
    secret_key: str
    token: str | None


class _Signer:
    """Signs requests with the credentials of this process, which are found when the first one is sent."""

    def __init__(self, wire: Wire, region: str) -> None:
        self._wire, self._region = wire, region
        self._lock = threading.Lock()
        self._source: Callable[[], Any] | None = None

    def headers(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
        """The headers of a request, with its signature."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        said = {"Host": self._wire.host, **headers}
        if body and self._wire.secure:
            # Under TLS this is enough; without it botocore signs the body's sha256.
            said["Content-MD5"] = b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        request = AWSRequest(method=method, url=self._wire.url + target, headers=said, data=body)
        request.context["has_streaming_input"] = True
        S3SigV4Auth(self._credentials(), "s3", self._region).add_auth(request)
        return dict(request.headers.items())

    def _credentials(self) -> Any:
        with self._lock:
            if self._source is None:
                self._source = _find_credentials()
            return self._source()


def _find_credentials() -> Callable[[], Any]:
    """How to get the credentials for each request: those of a role change every hour.

    Raises:
        UsageError: there are none.
    """
    access, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if access and secret:  # saves botocore's search, and its import
        fixed = _Credentials(access, secret, os.environ.get("AWS_SESSION_TOKEN") or None)
        return lambda: fixed
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile of ~/.aws in AWS_PROFILE"
    try:
        found = Session().get_credentials()
    except BotoCoreError as error:
        raise UsageError(f"no credentials for S3: {error}", mend) from error
    if found is None:
        raise UsageError("there are no credentials for S3", mend)

    def current() -> Any:
        try:
            return found.get_frozen_credentials()
        except BotoCoreError as error:
            raise NetworkError(f"the credentials for S3 cannot be renewed: {error}", mend) from error

    return current

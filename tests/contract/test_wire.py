"""The way to a server: proxies, certificates, and the settings by which S3 clients find it."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fakes import hostile_http as http
from registry.errors import NetworkError, RegistryError, UsageError
from registry.storage.s3 import S3Objects
from registry.storage.wire import Patience

PATIENCE = Patience(answer=30, attempts=2, pause=0.01)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.HostileS3]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with http.running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        yield server


def store() -> S3Objects:
    return S3Objects("s3://bucket", patience=PATIENCE)


def test_a_proxy_is_used(server: http.HostileS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.invalid:8333")
    monkeypatch.setenv("http_proxy", server.endpoint)
    assert store().put("key", b"data")
    assert server.requests == [("PUT", "http://s3.invalid:8333/bucket/key")]
    monkeypatch.setenv("no_proxy", "s3.invalid")
    with pytest.raises(NetworkError):
        store().read("key", 0, 4)
    assert len(server.requests) == 1


def test_a_proxy_that_is_none_is_explained(server: http.HostileS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks9://nowhere")
    with pytest.raises(UsageError, match="HTTP_PROXY"):
        store().stat("key")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"])
def test_the_endpoint_is_found_where_other_clients_find_it(
    server: http.HostileS3, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv(name, f"{server.endpoint}/below/")
    assert store().put("key", b"data")
    assert server.requests == [("PUT", "/below/bucket/key")]


def test_without_an_endpoint_it_is_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    from registry.storage.bucket import _place

    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    assert _place("bucket", "eu-north-1") == ("https://bucket.s3.eu-north-1.amazonaws.com", "")
    assert _place("a.bucket", "eu-north-1") == ("https://s3.eu-north-1.amazonaws.com", "/a.bucket")
    assert _place("bucket", "cn-north-1") == ("https://bucket.s3.cn-north-1.amazonaws.com.cn", "")


def test_requests_are_signed_as_the_region_asks(
    server: http.HostileS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "for an hour")
    heard: list[dict[str, str]] = []

    def listen(handler: http.Handler) -> None:
        heard.append({name.lower(): value for name, value in handler.headers.items()})
        http.honest(handler)

    server.misbehave(listen)
    store().put("key", b"data")
    (headers,) = heard
    assert "/eu-north-1/s3/aws4_request" in headers["authorization"]
    assert "SignedHeaders=host;if-none-match;x-amz-content-sha256" in headers["authorization"]
    assert headers["x-amz-security-token"] == "for an hour"
    # sha256 of b"data": without TLS the body is part of what is signed.
    assert headers["x-amz-content-sha256"].startswith("3a6eb0790f39ac87c94f3856b2dd2c5d")


# -- TLS --


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A certificate that 127.0.0.1 signed for itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "here")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "bundle.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


@pytest.fixture
def secure(server: http.HostileS3, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> http.HostileS3:
    """The same server behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(bundle)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint.replace("http://", "https://"))
    return server


def test_a_certificate_of_ones_own(
    secure: http.HostileS3, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    heard: list[dict[str, str]] = []

    def listen(handler: http.Handler) -> None:
        heard.append({name.lower(): value for name, value in handler.headers.items()})
        http.honest(handler)

    secure.misbehave(listen)
    reader = store()
    assert reader.put("key", b"data")
    assert reader.read("key", 1, 3) == b"at"
    assert secure.connections == 1
    assert heard[0]["content-md5"] == "jXd/OF09/siBXSD3SWAm3A=="
    assert heard[0]["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"


def test_a_server_that_cannot_prove_who_it_is(secure: http.HostileS3) -> None:
    with pytest.raises(RegistryError, match="cannot prove who it is") as refused:
        store().put("key", b"data")
    assert refused.value.exit_code == 1
    assert "AWS_CA_BUNDLE" in refused.value.mend
    assert secure.requests == []


def test_certificates_that_cannot_be_read(
    secure: http.HostileS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "missing.pem", tmp_path):
        monkeypatch.setenv("AWS_CA_BUNDLE", str(path))
        with pytest.raises(UsageError, match="AWS_CA_BUNDLE"):
            store().stat("key")


@pytest.mark.parametrize("fault", [http.dripping_body, http.dripping_headers, http.hang])
def test_tls_has_the_same_bounds(
    secure: http.HostileS3, bundle: Path, fault: http.Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    secure.misbehave(fault)
    slow = S3Objects("s3://bucket", patience=Patience(answer=0.5, rate=64 << 20, attempts=2, pause=0.01))
    begun = time.monotonic()
    with pytest.raises(NetworkError):
        slow.read("key", 0, 1000)
    assert time.monotonic() - begun < 60, "a server hangs for a minute an attempt"

"""Attacks on content credentials: changed pictures, borrowed manifests, other signers, leaks of uploads."""

from __future__ import annotations

import io
import json
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import c2pa
import numpy as np
import pytest
from PIL import Image

from registry.digest import digest_bytes
from registry.manifest import BaseModelRef
from servers import watch
from serving import certificates
from serving.certificates import Made
from serving.errors import ServingError
from serving.http.pictures import encode
from serving.images import open_portrait, png_bytes
from serving.provenance import ContentCredentials, check
from serving.schema import EditResult

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return certificates.make(tmp_path_factory.mktemp("signer") / "house", "Example Team")


@pytest.fixture(scope="module")
def mallory(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A signer whose certificate bears the very same name."""
    return certificates.make(tmp_path_factory.mktemp("signer") / "mallory", "Example Team")


def result_of(seed: int, image: Image.Image | None = None) -> EditResult:
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return EditResult(
        image=Image.fromarray(pixels) if image is None else image,
        adapter="pixelsmile:3",
        adapter_digest=digest_bytes(b"manifest"),
        base=BaseModelRef(id="house/base", revision="abc", family="qwen-image-edit", license="Apache-2.0"),
        expressions={"happy": 0.8},
        strength=1.0,
        seed=seed,
        steps=8,
        size=(64, 64),
    )


def signed(pair: Made, result: EditResult, parent: bytes = b"upload") -> bytes:
    return encode(result, parent=parent, credentials=ContentCredentials.open(pair.setting))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], len(SIGNATURE)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A file with right checksums, so that only a signature can tell that it was changed."""
    return SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def trusted(data: bytes, pair: Made) -> bool:
    """Ask the library's own reader, as anybody would who got the picture."""
    settings = {
        "version": 1,
        "verify": {"verify_trust": True, "remote_manifest_fetch": False},
        "trust": {"trust_anchors": pair.authority.read_text()},
    }
    context = c2pa.Context(settings=c2pa.Settings.from_dict(settings))
    with c2pa.Reader("image/png", io.BytesIO(data), context=context) as reader:
        theirs = reader.get_validation_state() == "Trusted"
    ours = check(data, "image/png", pair.authority.read_bytes()).state == "trusted"
    assert ours == theirs
    return ours


def test_what_was_not_touched_is_trusted(made: Made) -> None:
    """The helpers of this file change nothing by themselves."""
    data = signed(made, result_of(1))
    assert trusted(data, made)
    assert png(chunks(data)) == data
    assert trusted(png(chunks(data)), made)


# -- pictures --


def test_one_pixel_that_changed_is_seen(made: Made) -> None:
    data = signed(made, result_of(1))
    with Image.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened).copy()
    pixels[0, 0, 0] ^= 1
    lines = b"".join(b"\x00" + row.tobytes() for row in pixels)
    changed = [(kind, zlib.compress(lines) if kind == b"IDAT" else body) for kind, body in chunks(data)]
    with Image.open(io.BytesIO(png(changed))) as opened:
        assert np.abs(np.asarray(opened).astype(int) - np.asarray(result_of(1).image)).sum() == 1
    assert not trusted(png(changed), made)


def test_a_borrowed_manifest_is_seen(made: Made) -> None:
    """The manifest of one picture in another one of the same size, also one that was signed itself."""
    one, other = chunks(signed(made, result_of(1))), chunks(signed(made, result_of(2)))
    borrowed = dict(one)[b"caBX"]
    swapped = [(kind, borrowed if kind == b"caBX" else body) for kind, body in other]
    assert not trusted(png(swapped), made)
    bare = chunks(png_bytes(result_of(2).image, {}))
    assert not trusted(png([bare[0], (b"caBX", borrowed), *bare[1:]]), made)


def test_a_label_that_changed_is_seen(made: Made) -> None:
    """The text chunk beside the manifest is signed with the pixels."""
    parts = [
        (kind, body.replace(b"pixelsmile:3", b"pixelsmile:9")) if kind == b"iTXt" else (kind, body)
        for kind, body in chunks(signed(made, result_of(1)))
    ]
    assert not trusted(png(parts), made)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"pixelsmile:3", b"pixelsmile:9"),
        (sha256(b"upload").hexdigest().encode(), sha256(b"another").hexdigest().encode()),
        (str(digest_bytes(b"manifest")).encode(), str(digest_bytes(b"other")).encode()),
    ],
)
def test_a_fact_that_changed_in_the_manifest_is_seen(made: Made, old: bytes, new: bytes) -> None:
    data = signed(made, result_of(1))
    body = dict(chunks(data))[b"caBX"]
    assert old in body
    parts = [(kind, body.replace(old, new) if kind == b"caBX" else rest) for kind, rest in chunks(data)]
    assert not trusted(png(parts), made)


def test_every_flipped_byte_of_the_manifest_is_seen(made: Made) -> None:
    """Only the padding that leaves room for a longer signature may change: it says nothing."""
    data = signed(made, result_of(1))
    body = dict(chunks(data))[b"caBX"]
    silent = []
    for place in range(0, len(body), 23):
        broken = bytearray(body)
        broken[place] ^= 0x01
        parts = [(kind, bytes(broken) if kind == b"caBX" else rest) for kind, rest in chunks(data)]
        found = check(png(parts), "image/png", made.authority.read_bytes())
        if found.state == "trusted":
            silent.append(place)
            assert found == check(data, "image/png", made.authority.read_bytes())
    assert len(silent) < len(body) / 23 / 2


# -- signers --


def test_another_key_of_the_same_name_is_not_trusted(made: Made, mallory: Made) -> None:
    forged = signed(mallory, result_of(1))
    assert trusted(forged, mallory)
    assert not trusted(forged, made)
    found = check(forged, "image/png", made.authority.read_bytes())
    assert (found.state, found.signer) == ("valid", "Example Team")
    assert found.problems == ("signingCredential.untrusted",)


def test_a_certificate_of_ours_with_a_foreign_key_cannot_sign(made: Made, mallory: Made) -> None:
    with pytest.raises(ServingError, match="not that of the first certificate"):
        ContentCredentials(made.certificates.read_bytes(), mallory.key.read_bytes())


def test_the_leaf_of_another_authority_does_not_get_in_by_our_root(made: Made, mallory: Made) -> None:
    """A chain may claim any root; what counts is who signed the leaf."""
    leaf = mallory.certificates.read_text().split("-----END CERTIFICATE-----")[0]
    chain = f"{leaf}-----END CERTIFICATE-----\n{made.authority.read_text()}".encode()
    try:
        forged = encode(
            result_of(1),
            parent=b"upload",
            credentials=ContentCredentials(chain, mallory.key.read_bytes()),
        )
    except ServingError:
        return
    assert not trusted(forged, made)


def test_when_the_certificate_ends_no_unsigned_picture_is_given_instead(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = result_of(1)
    brief = ContentCredentials.open(certificates.make(tmp_path, "Brief", days=1).setting)
    assert encode(result, parent=b"", credentials=brief)
    monkeypatch.setattr(brief, "_expires", brief.expires.replace(year=2020))
    with pytest.raises(ServingError, match="ended on 2020"):
        encode(result, parent=b"", credentials=brief)


# -- the upload --


class Asked(BaseHTTPRequestHandler):
    """Notes who comes for a manifest that an upload points to."""

    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """A server that an upload names, and what it was asked."""
    handler = type("Handler", (Asked,), {"paths": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/manifest.c2pa", handler.paths
    server.shutdown()
    server.server_close()


def upload(link: str) -> bytes:
    """A photo with a place, a camera, an author, comments, and a link to a manifest elsewhere."""
    exif = Image.Exif()
    exif[0x010F], exif[0x013B] = "SecretCamera", "Secret Author"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 29: "2026:01:02"})
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0SecretComment"
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:dcterms="http://purl.org/dc/terms/" xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"'
        f' dcterms:provenance="{link}" xmpMM:DocumentID="SecretDocument" xmpMM:InstanceID="SecretInstance"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    buffer = io.BytesIO()
    result_of(5).image.save(buffer, "JPEG", exif=exif, xmp=xmp.encode(), comment=b"SecretJpegComment")
    return buffer.getvalue()


def test_nothing_of_the_upload_leaks_but_its_digest(made: Made, elsewhere: tuple[str, list[str]]) -> None:
    link, asked = elsewhere
    parent = upload(link)
    assert b"Secret" in parent
    data = signed(made, result_of(1, open_portrait(parent)), parent)
    assert trusted(data, made)
    assert b"Secret" not in data
    assert b"2026:01:02" not in data
    assert link.encode() not in data
    with Image.open(io.BytesIO(data)) as opened:
        assert not dict(opened.getexif())
        assert set(opened.info) == {"adapter-foundry"}
    assert {kind for kind, _ in chunks(data)} == {b"IHDR", b"iTXt", b"caBX", b"IDAT", b"IEND"}
    assert asked == []


def test_the_manifest_of_an_upload_is_not_carried_along(made: Made, mallory: Made) -> None:
    """An upload with credentials of its own: they may hold a place and a name, so only the digest goes on."""
    first = signed(mallory, replace(result_of(3), adapter="secret-adapter:1"))
    data = signed(made, result_of(1, open_portrait(first)), first)
    found = check(data, "image/png", made.authority.read_bytes())
    assert (found.state, found.parent) == ("trusted", sha256(first).hexdigest())
    assert b"secret-adapter" not in data
    with c2pa.Reader("image/png", io.BytesIO(data)) as reader:
        report: dict[str, Any] = json.loads(reader.json())
    assert list(report["manifests"]) == [report["active_manifest"]]


@pytest.mark.parametrize("parent", [b"", b"\x00" * 100, b"RIFF....WEBPVP8 ", b"<svg onload=alert(1)>"])
def test_an_upload_that_is_no_picture_is_only_a_digest(made: Made, parent: bytes) -> None:
    data = signed(made, result_of(1), parent)
    assert trusted(data, made)
    assert check(data, "image/png").parent == sha256(parent).hexdigest()


def test_hostile_names_stay_inside_their_fact(made: Made) -> None:
    """Facts come verified; should one ever not be, it is still no more than a text."""
    name = 'x", "c2pa.actions": [], "label": "c2pa.created\n\x00\ud800'.encode("utf-8", "replace").decode()
    result = replace(result_of(1), adapter=name)
    data = signed(made, result)
    assert trusted(data, made)
    assert check(data, "image/png").facts["adapter"] == name


# -- what is read --


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/webp", "application/octet-stream"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG" + b"\xff" * 5000,
        b"\xff\xd8\xff\xeb\xff\xff" * 500,
        b"RIFF\xff\xff\xff\xff",
    ],
)
def test_a_broken_file_is_no_crash(kind: str, data: bytes) -> None:
    assert check(data, kind).state in {"none", "invalid"}


PROGRAM = """
import io, socket, sys
from pathlib import Path
from PIL import Image
from registry.digest import digest_bytes
from registry.manifest import BaseModelRef
from serving.http.pictures import encode
from serving.images import open_portrait
from serving.provenance import ContentCredentials, check
from serving.schema import EditResult

setting, authority, upload, port = sys.argv[1:]
socket.create_connection(("127.0.0.1", int(port))).send(b"seen")
parent = Path(upload).read_bytes()
base = BaseModelRef(id="house/base", revision="abc", family="qwen-image-edit", license="Apache-2.0")
result = EditResult(
    image=open_portrait(parent), adapter="a:1", adapter_digest=digest_bytes(b"m"), base=base, expressions={},
    strength=1.0, seed=0, steps=1, size=(64, 64),
)
data = encode(result, parent=parent, credentials=ContentCredentials.open(setting))
assert check(data, "image/png", Path(authority).read_bytes()).state == "trusted"
assert "Remote" in check(parent, "image/jpeg").problems[0]
"""


@pytest.mark.skipif(watch.missing() is not None, reason=str(watch.missing()))
def test_signing_and_checking_speak_to_nobody(made: Made, tmp_path: Path) -> None:
    """The library is native code, so its system calls are watched: no time stamp, no OCSP, no manifest."""
    (tmp_path / "upload.jpg").write_bytes(upload("http://198.51.100.1/manifest.c2pa"))
    watched = watch.Watch(log=tmp_path / "strace.log")
    with socket.create_server(("127.0.0.1", 0)) as here:
        port = str(here.getsockname()[1])
        words = [made.setting, str(made.authority), str(tmp_path / "upload.jpg"), port]
        done = subprocess.run(
            watched.command([sys.executable, "-c", PROGRAM, *words]),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert any(name.startswith("python") for name in watched.programs()), (
        "what should be watched was not there"
    )
    assert watched.attempts() == []

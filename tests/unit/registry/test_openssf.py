"""OpenSSF model signing: their own command line verifies what is exported, and nothing else is signed."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fakes.trust import publish
from registry import openssf
from registry.errors import BadSignature, DigestMismatch, UsageError
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterManifest
from registry.openssf import KEY_NAME, SIGNATURE_NAME

Out = tuple[Path, AdapterManifest]


@pytest.fixture
def out(tmp_path: Path) -> Out:
    """A folder as the command line prepares it: the adapter's files, nothing signed yet."""
    published = publish()
    manifest = AdapterManifest.parse(published.manifest)
    folder = tmp_path / "out" / "pixelsmile-3"
    folder.mkdir(parents=True)
    for name, data in {**published.files, "manifest.json": published.manifest}.items():
        (folder / name).write_bytes(data)
    return tmp_path / "out", manifest


def key_file(path: Path, key: Any = None, passphrase: str | None = None) -> str:
    """Write a private key the way openssl does, readable by its owner; return its URI."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    protection = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection))
    path.chmod(0o600)
    return f"file:{path}"


@pytest.fixture
def signed(out: Out, tmp_path: Path) -> Out:
    openssf.sign(*out, key_file(tmp_path / "key.pem"))
    return out


def their_tool(folder: Path, name: str = "pixelsmile-3") -> subprocess.CompletedProcess[str]:
    """The command that the README prints, by the project's own command line."""
    readme = (folder / "README.md").read_text()
    (line,) = (line for line in readme.splitlines() if line.startswith("model_signing verify"))
    words = [name if word == "pixelsmile-3" else word for word in line.split()[1:]]
    command = [sys.executable, "-m", "model_signing", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_their_command_line_verifies_it(signed: Out) -> None:
    folder, _ = signed
    result = their_tool(folder)
    assert result.returncode == 0, result.stderr
    assert "succeeded" in result.stdout + result.stderr
    weights = folder / "pixelsmile-3" / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert their_tool(folder).returncode != 0


def test_what_is_signed_is_the_adapter_and_its_manifest(signed: Out) -> None:
    folder, manifest = signed
    bundle = json.loads((folder / SIGNATURE_NAME).read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["subject"][0]["name"] == "pixelsmile-3"
    digests = {found["name"]: found["digest"] for found in statement["predicate"]["resources"]}
    assert digests == {
        "manifest.json": manifest.digest.hex,
        CARD_NAME: manifest.file(CARD_NAME).sha256.hex,
        WEIGHTS_NAME: manifest.file(WEIGHTS_NAME).sha256.hex,
    }


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_that_the_format_knows(curve: ec.EllipticCurve, out: Out, tmp_path: Path) -> None:
    openssf.sign(*out, key_file(tmp_path / "key.pem", ec.generate_private_key(curve)))
    openssf.verify(*out)


def test_a_key_with_a_passphrase(out: Out, tmp_path: Path) -> None:
    """The library's type hints ask for a str, with which it fails."""
    key = key_file(tmp_path / "key.pem", passphrase="secret")
    with pytest.raises(UsageError, match="is encrypted"):
        openssf.sign(*out, key)
    openssf.sign(*out, key, "secret")
    openssf.verify(*out)


def test_an_ed25519_key_is_explained_with_the_command_that_makes_a_good_one(out: Out, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ed25519") as caught:
        openssf.sign(*out, key_file(tmp_path / "key.pem", ed25519.Ed25519PrivateKey.generate()))
    command = caught.value.mend.partition("make a key for it: ")[2].partition(";")[0].split()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "model-signing.pem").stat().st_mode & 0o077 == 0
    openssf.sign(*out, f"file:{tmp_path / 'model-signing.pem'}")


@pytest.mark.parametrize("uri", ["awskms:alias/x", "env:KEY", "key.pem", "file:/does/not/exist"])
def test_other_keys_are_explained(uri: str, out: Out) -> None:
    with pytest.raises((UsageError, openssf.RegistryError)) as caught:
        openssf.sign(*out, uri)
    assert caught.value.mend
    assert not (out[0] / SIGNATURE_NAME).exists()


def test_a_key_that_others_may_read_is_refused(out: Out, tmp_path: Path) -> None:
    key = key_file(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(UsageError, match="read or changed by others"):
        openssf.sign(*out, key)


def _more(folder: Path) -> None:
    (folder / "more.py").write_text("print()")


def _git(folder: Path) -> None:
    (folder / ".gitattributes").write_text("x")


def _less(folder: Path) -> None:
    (folder / CARD_NAME).unlink()


def _link(folder: Path) -> None:
    weights = folder / WEIGHTS_NAME
    os.rename(weights, folder.parent / "elsewhere")
    weights.symlink_to(folder.parent / "elsewhere")


def _deep(folder: Path) -> None:
    (folder / "more").mkdir()


@pytest.mark.parametrize("change", [_more, _git, _less, _link, _deep])
def test_a_folder_that_is_not_exactly_the_adapter_is_neither_signed_nor_believed(
    change: Callable[[Path], None], out: Out, tmp_path: Path
) -> None:
    """The library would sign anything, and would not see the .gitattributes."""
    key = key_file(tmp_path / "key.pem")
    openssf.sign(*out, key)
    change(out[0] / "pixelsmile-3")
    with pytest.raises(DigestMismatch, match="exactly the adapter"):
        openssf.verify(*out)
    with pytest.raises(DigestMismatch, match="exactly the adapter"):
        openssf.sign(*out, key)


def test_other_bytes_of_the_same_size_are_not_signed(out: Out, tmp_path: Path) -> None:
    """What is signed is compared with what was admitted, after it was signed."""
    weights = out[0] / "pixelsmile-3" / WEIGHTS_NAME
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(BadSignature, match="not about pixelsmile:3"):
        openssf.sign(*out, key_file(tmp_path / "key.pem"))


def test_a_changed_byte_is_found(signed: Out) -> None:
    weights = signed[0] / "pixelsmile-3" / WEIGHTS_NAME
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BadSignature, match="does not hold"):
        openssf.verify(*signed)


def test_a_signature_by_another_key_is_refused(signed: Out, tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    known = tmp_path / "known.pem"
    known.write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(BadSignature, match="does not hold"):
        openssf.verify(*signed, known)
    openssf.verify(*signed, signed[0] / KEY_NAME)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"mediaType": "x"}'])
def test_what_is_no_signature_is_refused(data: bytes, signed: Out) -> None:
    (signed[0] / SIGNATURE_NAME).write_bytes(data)
    with pytest.raises(BadSignature):
        openssf.verify(*signed)


def test_a_missing_library_is_explained(out: Out, tmp_path: Path) -> None:
    """In an interpreter that cannot import it, as after an install without the extra."""
    key = key_file(tmp_path / "key.pem")
    code = (
        "import sys; sys.modules['model_signing'] = None\n"
        "from pathlib import Path\nfrom registry import openssf\nfrom registry.errors import UsageError\n"
        "from registry.manifest import AdapterManifest\n"
        f"out = Path({str(out[0])!r})\n"
        "manifest = AdapterManifest.parse((out / 'pixelsmile-3' / 'manifest.json').read_bytes())\n"
        f"try:\n    openssf.sign(out, manifest, {key!r})\n"
        "except UsageError as error:\n    print(error.mend)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "pip install 'adapter-foundry[openssf]'"

"""The error tree, its exit codes, and digests of files."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
from blake3 import blake3

from registry import errors
from registry.content import CHUNK_BYTES
from registry.digest import Fingerprint, digest_bytes, digest_content, file_entry

EXIT_CODES = {
    "RegistryError": 1,
    "UsageError": 2,
    "InvalidDocument": 1,
    "Conflict": 1,
    "Unsigned": 10,
    "NotFound": 11,
    "BadSignature": 12,
    "DigestMismatch": 13,
    "IdentityMismatch": 13,
    "PolicyRefused": 14,
    "LicenseRefused": 14,
    "ScanRefused": 14,
    "Revoked": 15,
    "StaleTrust": 16,
    "NeedsReview": 17,
    "NetworkError": 20,
}


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    found = {kind.__name__: kind.exit_code for kind in kinds if issubclass(kind, errors.RegistryError)}
    assert found == EXIT_CODES
    for name, code in EXIT_CODES.items():
        line = next(line for line in (errors.__doc__ or "").splitlines() if name in line.split())
        assert str(code) in line.split()


def test_an_error_says_what_happened_and_what_to_do() -> None:
    error = errors.Revoked("it was revoked", "use another")
    assert (error.message, error.mend) == ("it was revoked", "use another")
    assert str(error) == "it was revoked\n  What to do: use another"
    assert str(errors.Revoked("it was revoked")) == "it was revoked"
    assert str(errors.Revoked("it was revoked", mend="use another")) == str(error)


@pytest.mark.parametrize("hostile", ["\x1b[2J", "a\nb", "::error::x", "\u202eevil", "x" * 10_000, b"\xff", 3])
def test_hostile_text_is_shown_as_one_harmless_line(hostile: object) -> None:
    text = errors.shown(hostile)
    assert text.isascii()
    assert text.isprintable()
    assert "::" not in text
    assert len(text) < 1000


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 7])
def test_a_file_has_all_digests_in_one_pass(size: int) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    entry = file_entry("a.bin", data)
    assert entry == Fingerprint.of(data).entry("a.bin", digest_content(data))
    assert entry.chunks == tuple(
        blake3(data[at : at + CHUNK_BYTES]).hexdigest() for at in range(0, size, CHUNK_BYTES)
    )
    assert entry.sha256 == digest_bytes(data) == "sha256:" + hashlib.sha256(data).hexdigest()
    assert entry.blake3 == blake3(data).hexdigest()
    assert entry.size == len(data)


HEAVY = ("torch", "mlflow", "prefect", "tuf", "numpy", "pydantic", "diffusers", "boto3", "license_expression")


def modules_after(statement: str, names: tuple[str, ...]) -> str:
    code = f"{statement}\nimport sys\nprint([name for name in {names!r} if name in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_the_registry_imports_nothing_heavy() -> None:
    assert modules_after("import registry, registry.errors, registry.reference", HEAVY) == "[]"


def test_importing_admission_needs_no_tensors_and_no_services() -> None:
    heavy = tuple(name for name in HEAVY if name != "pydantic")
    assert modules_after("import registry.admission", heavy) == "[]"

"""Exports for other people's tools: statements as bundles, a bill of materials, a signed folder.

Bundles and bills are also exported of a version that was revoked or that a pull would refuse, because they
are what an investigation reads; a signed folder only of an adapter that was admitted now. A folder appears
whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry import bundle
from registry.belief import believe
from registry.bundle import Bundle
from registry.digest import Digest
from registry.errors import RegistryError, UsageError
from registry.manifest import AdapterManifest
from registry.storage import shelf

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.reference import Reference
    from registry.transfer import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was exported.

    Attributes:
        reference: ``name:version``.
        digest: digest of the manifest.
        files: paths of the files that were written, below the folder; empty if none was.
        warnings: what a person should know: it was revoked, or statements were left out.
        content: the bill of materials; empty for other formats.
    """

    reference: str
    digest: Digest
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    content: bytes = b""


def export_bundle(registry: Registry, reference: Reference, output: Path) -> Exported:
    """Write the statements about a version with their keys into a new folder; see `registry.bundle`.

    Raises:
        UsageError: the folder exists and is not empty.
        RegistryError: see the error tree.
    """
    state = registry.authority.state()
    target = state.resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    envelopes = shelf.read_statements(registry.store, target.digest).values()
    found: Bundle = bundle.export(manifest, envelopes, state.about(target))
    with new_folder(output) as folder:
        for name, data in found.files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    left_out = tuple(f"left out: {why}" for why in found.left_out)
    revoked = state.is_revoked(target.digest)
    return _exported(manifest, tuple(sorted(found.files)), revoked, left_out)


def export_bom(registry: Registry, reference: Reference, output: Path | None = None) -> Exported:
    """Make the bill of materials of a version, and write it into a file if one is named.

    Raises:
        RegistryError: see the error tree.
    """
    from registry import bom

    state = registry.authority.state()
    target = state.resolve(reference)
    manifest = shelf.read_manifest(registry.store, target.digest)
    envelopes = shelf.read_statements(registry.store, target.digest).values()
    believed, left_out = believe(target.digest, envelopes, state.about(target))
    data = bom.bom_bytes(manifest, [found.statement for found in believed])
    if output is not None:
        with _explained(output):
            partial = output.with_name(f".{output.name}.partial")
            partial.write_bytes(data)
            os.replace(partial, output)
    files = () if output is None else (output.name,)
    revoked = state.is_revoked(target.digest)
    return _exported(manifest, files, revoked, tuple(f"left out: {why}" for why in left_out), data)


def export_signed(
    registry: Registry, reference: Reference, output: Path, key: str, progress: Progress | None = None
) -> Exported:
    """Pull an adapter and write its files into a new folder, signed for OpenSSF model signing.

    Args:
        registry: where from.
        reference: the adapter; everything that a pull checks is checked.
        output: the new folder.
        key: URI of an ECDSA key, ``file:<path>``.
        progress: hears about the download.

    Raises:
        UsageError: the folder exists and is not empty, or the key cannot be used.
        RegistryError: see the error tree.
    """
    from registry import openssf
    from registry.cache import AdapterCache

    secret = registry.place.settings.key_passphrase
    passphrase = secret.get_secret_value() if secret is not None else None
    openssf.public_key(key, passphrase)  # before anything is fetched
    with new_folder(output) as folder:
        pulled = registry.pull(reference, progress=progress)
        name = openssf.folder_name(pulled.manifest)
        AdapterCache(registry.place.cache).link(pulled.digest, folder / name)
        openssf.sign(folder, pulled.manifest, key, passphrase)
        files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    return _exported(pulled.manifest, files, None, pulled.warnings)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its place when the block ends without an error.

    Raises:
        UsageError: there is something already.
        RegistryError: it cannot be written.
    """
    with _explained(output):
        if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
            raise UsageError(f"{output} is there already", "name a new or an empty folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            yield partial
            partial.chmod(0o755)
            os.rename(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RegistryError(
            f"{output} cannot be written: {error.strerror or error}",
            "choose another --output, or check its permissions and free space",
        ) from error


def _exported(
    manifest: AdapterManifest,
    files: tuple[str, ...],
    revoked: str | None,
    warnings: tuple[str, ...],
    content: bytes = b"",
) -> Exported:
    if revoked is not None:
        warnings = (f"this version was revoked: {revoked}", *warnings)
    return Exported(
        reference=f"{manifest.name}:{manifest.version}",
        digest=manifest.digest,
        files=files,
        warnings=warnings,
        content=content,
    )

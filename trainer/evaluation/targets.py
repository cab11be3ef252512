"""Where adapters come from that are evaluated: a folder, or a signed version of the registry.

An evaluation comes before an approval, so a version is not pulled as production pulls it: that would ask for
the very statement that is being made. Its name, its digest and its revocation are checked as ever, its files
are the bytes that the manifest names, and whoever edits with it scans it and judges its licences again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import NotFound, UsageError
from registry.reference import Reference
from trainer.progress import Progress, silent
from trainer.stage import touch

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.digest import Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """An adapter that is evaluated.

    Attributes:
        folder: holds its card and weights.
        label: what people call it: the reference as it was asked for, or the folder's name.
        reference: ``name:version`` in the registry; None for a folder.
    """

    folder: Path
    label: str
    reference: str | None = None

    @property
    def called(self) -> str:
        """What it is called where others have to know exactly what was meant."""
        if self.reference in (None, self.label):
            return self.label
        return f"{self.label} ({self.reference})"


def target(registry: Registry, text: str, place: Path, progress: Progress = silent) -> Target:
    """The adapter that a word of the command line names: a folder if there is one, else a reference.

    Args:
        registry: of this data folder.
        text: a path, ``name@alias``, ``name:version`` or ``name@sha256:…``.
        place: folder that keeps what was fetched.
        progress: hears about the download.

    Raises:
        NotFound: there is no such folder, or the registry has no such adapter.
        RegistryError: it was revoked, or is not what was signed; see the error tree.
    """
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Target(folder=folder, label=folder.resolve().name)
    try:
        reference = Reference.parse(text)
    except UsageError:
        raise NotFound(
            f"there is no folder {text}, and that is no reference to an adapter of the registry",
            "give an adapter's folder, or name@alias, name:version or name@sha256:…",
        ) from None
    return fetch(registry, reference, place, progress)


def meant(registry: Registry, reference: Reference) -> Digest | None:
    """The manifest that a name means, None where nobody signed it.

    Raises:
        RegistryError: the registry's metadata do not hold.
    """
    if not registry.authority.client.pinned.exists():
        return None
    try:
        return registry.authority.state().resolve(reference).digest
    except NotFound:
        return None


def fetch(registry: Registry, reference: Reference, place: Path, progress: Progress = silent) -> Target:
    """The files of a signed version, verified; the module says what is not asked for.

    Args:
        registry: where from.
        reference: which version.
        place: gets a folder named by the version's digest.
        progress: hears about the download.

    Raises:
        NotFound: nobody signed that name.
        Revoked: it was withdrawn.
        RegistryError: see the error tree.
    """
    from registry import transfer
    from registry.admission import check_identity, check_revocation
    from registry.storage import shelf

    state = registry.authority.state()
    digest = state.resolve(reference).digest
    manifest = shelf.read_manifest(registry.store, digest)
    check_identity(manifest, reference)
    check_revocation(manifest, state)
    folder = place / digest.hex
    folder.mkdir(parents=True, exist_ok=True)
    told = (registry.store, manifest.files, folder)
    transfer.download(*told, progress=lambda part, done, total: progress(part, done, total, "bytes"))
    touch(folder)
    return Target(folder=folder, label=str(reference), reference=f"{manifest.name}:{manifest.version}")

"""What ``registry scan`` is pointed at: opens it, and scans each adapter in it.

A target is a file, a folder, an object or a prefix in a bucket, or a reference to an adapter of the registry.
Every file is read by range, never as a whole: once for its digests, and then through a `VerifiedContent`, so
that the digest in the report is that of the bytes that were judged, whoever writes to the file meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from registry.content import Content, FileContent, VerifiedContent
from registry.errors import NotFound, RegistryError, UsageError, shown
from registry.manifest import CARD_NAME, MAX_CARD_BYTES, WEIGHTS_NAME, AdapterCard
from registry.scanning.reading import Metered, ObjectContent, Opener, checked, opened, small
from registry.scanning.report import ScanReport, extended
from registry.scanning.subjects import Scanned, Subject
from registry.transfer import Progress, silent

if TYPE_CHECKING:
    from registry.families import BaseFacts
    from registry.scanning.population import Population

MAX_FILES: Final = 10_000
"""As many files are looked at in one folder or prefix; a list without an end is no answer."""
CONFIG_NAME: Final = "adapter_config.json"

# What a loader of adapters opens; each is a target of its own, and none of the others passes.
_LOADABLE: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_Files = Mapping[str, Opener | None]
"""Name -> what opens the file; None for what is not a plain file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to scan.

    Attributes:
        base: id of the base model of files that come without a card; None recognises it.
        bases: the base models that are known; None is those that ship with the package.
        population: clean adapters to compare with; None looks for one that ships with the package.
        progress: hears of bytes.
    """

    base: str | None = None
    bases: Mapping[str, BaseFacts] | None = None
    population: Population | None = None
    progress: Progress = silent


def scan_target(target: str, options: Options) -> Scanned:
    """Scan whatever a user names.

    Args:
        target: a path, ``s3://bucket/key``, ``s3://bucket/prefix``, or a reference such as ``name@alias``;
            what exists as a path is a path.
        options: how to scan.

    Raises:
        NotFound: there is no such thing, or no adapter in it.
        UsageError: the target or the base is wrong.
        RegistryError: the only adapter of the target cannot be read.
    """
    if target.startswith("s3://"):
        return _scan_bucket(target, options)
    path = Path(target)
    if os.path.isdir(path):  # False also for a name that no file can have
        return _scan_tree(target, _tree(path), options)
    if os.path.exists(path):
        config = _config(path.resolve().with_name(CONFIG_NAME))
        scanned = _lone(lambda: FileContent(path.resolve()), config, path.name, options)
        return Scanned(target=shown(target), subjects=(Subject(name=shown(target), report=scanned),))
    if "/" not in target and (":" in target or "@" in target):
        return _scan_reference(target, options)
    raise NotFound(
        f"there is no {shown(target)}",
        "name a file, an adapter folder, s3://bucket/key, or an adapter such as pixelsmile@prod",
    )


# -- where the bytes are --


def _tree(folder: Path) -> dict[str, Opener | None]:
    """Every file below a folder, by its path in it; None for what is not a plain file.

    Raises:
        RegistryError: a folder cannot be read: what it holds would pass unseen.
    """

    def unreadable(error: OSError) -> None:
        raise RegistryError(
            f"{shown(error.filename)} cannot be read: {error.strerror}", "check its permissions"
        ) from error

    found: dict[str, Opener | None] = {}
    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in sorted(files + links):
            path = Path(place, name)
            key = path.relative_to(folder).as_posix()
            found[key] = partial(FileContent, path) if _is_plain(path) else None
            _check_count(found, str(folder))
    return found


def _config(path: Path) -> Opener | None:
    return partial(FileContent, path) if _is_plain(path) else None


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _check_count(found: Mapping[str, object], where: str) -> None:
    if len(found) > MAX_FILES:
        raise UsageError(
            f"{shown(where)} holds more than {MAX_FILES} files", "scan the folders in it one by one"
        )


def _scan_bucket(target: str, options: Options) -> Scanned:
    from registry.storage.stores import open_store

    name, _, key = target.removeprefix("s3://").partition("/")
    store = open_store(f"s3://{name}")
    if key and not key.endswith("/"):
        try:
            content = ObjectContent(store, key)
        except NotFound:
            key += "/"
        else:
            place, _, file = key.rpartition("/")
            config = partial(ObjectContent, store, f"{place}/{CONFIG_NAME}".lstrip("/"))
            scanned = _lone(lambda: content, config, file, options)
            return Scanned(target=shown(target), subjects=(Subject(name=shown(target), report=scanned),))
    found: dict[str, Opener | None] = {}
    for each in store.keys(key):
        found[each.removeprefix(key)] = partial(ObjectContent, store, each)
        _check_count(found, target)
    return _scan_tree(target, found, options)


# -- what is an adapter --


def _scan_tree(target: str, tree: _Files, options: Options) -> Scanned:
    """Scan each adapter among some files; one that cannot be read is an error if it is the only one."""
    folders: dict[str, dict[str, Opener | None]] = {}
    for path, opener in tree.items():
        place, _, name = path.rpartition("/")
        folders.setdefault(place, {})[name] = opener
    jobs = [job for place in sorted(folders) for job in _jobs(place, folders[place])]
    if not jobs:
        raise NotFound(
            f"there is no adapter in {shown(target)}",
            f"an adapter folder holds {WEIGHTS_NAME} and {CARD_NAME}; other adapters are .safetensors files",
        )
    single = len(jobs) == 1 and not jobs[0][0]
    subjects = []
    for place, scan_one in jobs:
        name = shown(f"{target.rstrip('/')}/{place}".rstrip("/"))
        try:
            subjects.append(Subject(name=name, report=scan_one(options)))
        except RegistryError as error:
            if single or isinstance(error, UsageError):
                raise
            subjects.append(Subject(name=name, report=None, problem=shown(error.message)))
    return Scanned(target=shown(target), subjects=tuple(subjects), many=not single)


def _jobs(place: str, files: _Files) -> Iterator[tuple[str, Callable[[Options], ScanReport]]]:
    """The adapters in one folder: where each is, and what scans it."""
    weights = [name for name in files if name.lower().endswith(".safetensors")]
    loadable = [name for name in files if name.lower().endswith(_LOADABLE)]
    if CARD_NAME in files and WEIGHTS_NAME in files:
        yield place, partial(_adapter, files)
    elif len(weights) == 1:
        yield place, partial(_bare_folder, files, weights[0])
    else:
        rest = {name: files[name] for name in files if name not in loadable and files[name] is not None}
        for name in loadable:
            path = f"{place}/{name}".lstrip("/")
            yield path, partial(_one_of_several, {**rest, name: files[name]}, name)


def _adapter(files: _Files, options: Options) -> ScanReport:
    """An adapter folder: weights and card, and nothing else that a loader would open."""
    from registry.scanning import scan

    with opened(files[CARD_NAME], CARD_NAME) as content:
        card = AdapterCard.parse(content[: MAX_CARD_BYTES + 1])
    if options.base not in (None, card.base.id):
        raise UsageError(
            f"the card names the base {shown(card.base.id)}, not {shown(options.base)}",
            "leave --base out where there is an adapter card",
        )
    with checked(files[WEIGHTS_NAME], WEIGHTS_NAME, options.progress) as (weights, digest):
        scanned = scan(weights, card, bases=options.bases, digest=digest, population=options.population)
    return _with_neighbours(scanned, files, {CARD_NAME, WEIGHTS_NAME}, WEIGHTS_NAME)


def _bare_folder(files: _Files, name: str, options: Options) -> ScanReport:
    """A folder with one weights file of another program."""
    scanned = _lone(files[name], files.get(CONFIG_NAME), name, options)
    return _with_neighbours(scanned, files, {name, CONFIG_NAME}, name)


def _one_of_several(files: _Files, name: str, options: Options) -> ScanReport:
    """One of several weights files in a folder, and what lies beside them under other names."""
    scanned = _lone(files[name], None, name, options)
    return _with_neighbours(scanned, files, {name, CONFIG_NAME}, name)


def _lone(opener: Opener | None, config: Opener | None, name: str, options: Options) -> ScanReport:
    """A weights file without a card."""
    from registry.scanning.bare import scan_bare

    with checked(opener, name, options.progress) as (weights, digest):
        return scan_bare(
            weights,
            base=options.base,
            bases=options.bases,
            config=small(config, CONFIG_NAME),
            digest=digest,
            population=options.population,
        )


def _with_neighbours(scanned: ScanReport, files: _Files, known: set[str], weights: str) -> ScanReport:
    """Add what lies beside the weights and a loader may open in their place."""
    from registry.scanning.container import beside

    with ExitStack() as stack:
        others: dict[str, Content | None] = {}
        for name in sorted(files.keys() - known):
            opener = files[name]
            others[name] = None if opener is None else stack.enter_context(opened(opener, name))
        return extended(scanned, beside(others, weights))


def _scan_reference(target: str, options: Options) -> Scanned:
    """An adapter of the registry, as the store holds it."""
    from registry.client import Registry
    from registry.reference import Reference
    from registry.scanning import scan
    from registry.storage import shelf
    from registry.transfer import StoredContent

    registry = Registry.open()
    digest = registry.authority.state().resolve(Reference.of(target)).digest
    manifest = shelf.read_manifest(registry.store, digest)
    entry = manifest.file(WEIGHTS_NAME)
    weights = VerifiedContent(Metered(StoredContent(registry.store, entry), options.progress), entry)
    scanned = scan(
        weights,
        manifest.card,
        bases=options.bases,
        digest=entry.sha256,
        population=options.population,
    )
    name = f"{manifest.name}:{manifest.version}/{WEIGHTS_NAME}"
    return Scanned(target=shown(target), subjects=(Subject(name=shown(name), report=scanned),))

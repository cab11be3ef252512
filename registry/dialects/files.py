"""Importing and converting LoRA files on disk: what the commands call.

A file is read where it lies, piece by piece; what is written appears under its name whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from registry.content import FileContent
from registry.dialects import cards, reading, writing
from registry.dialects.grammar import WRITABLE
from registry.dialects.reading import LoraFile
from registry.dialects.strength import CONFIG_NAME, MAX_CONFIG_BYTES
from registry.dialects.writing import Written
from registry.digest import Digest, digest_content
from registry.errors import RegistryError, UsageError, shown
from registry.families import KNOWN_BASES, BaseFacts
from registry.manifest import CARD_NAME, MAX_CARD_BYTES, WEIGHTS_NAME, AdapterCard


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What an import or a conversion made.

    Attributes:
        lora: what was read.
        written: how exactly it was written.
        dtype: the dtype of what was written.
        path: the folder or file that was made.
        digest: the sha256 of the weights that were written.
        open_fields: the fields of the draft card that a person has to fill in.
    """

    lora: LoraFile
    written: Written
    dtype: str
    path: Path
    digest: Digest
    open_fields: tuple[str, ...] = ()


def base_facts(base: str) -> BaseFacts:
    """Return the facts of a base.

    Raises:
        UsageError: it is not known.
    """
    if base not in KNOWN_BASES:
        raise UsageError(
            f"the base model {shown(base)!r} is not known", "known bases: " + ", ".join(KNOWN_BASES)
        )
    return KNOWN_BASES[base]


def import_file(
    file: Path,
    base: str,
    output: Path,
    *,
    card: Path | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
) -> Imported:
    """Make an adapter folder of a LoRA file of any dialect.

    Args:
        file: the LoRA file.
        base: the id of the base that it is for.
        output: the folder to make; it must not be there.
        card: its adapter card; without one the folder gets a draft.
        alpha: the alpha of the training, for a file that does not state it.
        dtype: F16, BF16 or F32; None for the file's own.

    Raises:
        UsageError, RegistryError, DialectError: the file cannot be mapped whole, or the folder not be made.
    """
    facts = base_facts(base)
    parsed = None if card is None else AdapterCard.parse(_read(card, MAX_CARD_BYTES))
    with _opened(file) as content, _new_folder(output) as folder:
        lora = reading.read(content, facts, config=_config(file), alpha=alpha)
        dtype = dtype or lora.dtype
        if parsed is not None:
            cards.check(parsed, lora, dtype)
        with (folder / WEIGHTS_NAME).open("xb") as sink:
            written = writing.write(lora, content, "diffusers", sink.write, dtype)
        fields: tuple[str, ...] = ()
        if parsed is not None:
            (folder / CARD_NAME).write_text(parsed.model_dump_json(indent=1) + "\n", "utf-8")
        else:
            values = cards.draft(lora, dtype, file.name, digest_content(content))
            fields = tuple(cards.open_fields(values))
            (folder / cards.DRAFT_NAME).write_text(json.dumps(values, indent=1) + "\n", "ascii")
        digest = _digest(folder / WEIGHTS_NAME)
    return Imported(lora=lora, written=written, dtype=dtype, path=output, digest=digest, open_fields=fields)


def convert_file(
    source: Path,
    to: str,
    output: Path,
    *,
    base: str | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
) -> Imported:
    """Write a LoRA file, or the weights of an adapter folder, in another dialect.

    Args:
        source: an adapter folder, or a LoRA file of any dialect.
        to: a name in ``grammar.WRITABLE``; PEFT's gets its ``adapter_config.json`` beside it.
        output: the file to make; it must not be there.
        base: the id of the base; an adapter folder names its own.
        alpha, dtype: as for `import_file`.

    Raises:
        UsageError, RegistryError, DialectError: as `import_file`.
    """
    if to not in WRITABLE:
        raise UsageError(f"the dialect {shown(to)!r} is not known", "known dialects: " + ", ".join(WRITABLE))
    file = source
    if source.is_dir():
        file, of_card = source / WEIGHTS_NAME, AdapterCard.parse(_read(source / CARD_NAME, MAX_CARD_BYTES))
        if base not in (None, of_card.base.id):
            raise UsageError(f"the adapter is for {of_card.base.id}, not for {base}", "leave --base away")
        base = of_card.base.id
    if base is None:
        raise UsageError("the base of a single file is not known", "say which it is with --base")
    facts, companion = base_facts(base), output.parent / CONFIG_NAME
    if to == "peft" and companion.exists():
        raise UsageError(f"{companion} is there already", "write into an empty folder: PEFT needs that name")
    with _opened(file) as content, _new_file(output) as sink:
        lora = reading.read(content, facts, config=_config(file), alpha=alpha)
        written = writing.write(lora, content, to, sink.write, dtype)
    if to == "peft":
        with _new_file(companion) as sink:
            sink.write(writing.peft_config(lora))
    return Imported(
        lora=lora, written=written, dtype=dtype or lora.dtype, path=output, digest=_digest(output)
    )


def _opened(path: Path) -> FileContent:
    # Caches of model hubs are links to the bytes; whom the user names is whom the user trusts to be read.
    return FileContent(Path(os.path.realpath(path)))


def _digest(path: Path) -> Digest:
    with FileContent(path) as content:
        return digest_content(content)


def _read(path: Path, limit: int) -> bytes:
    with _opened(path) as content:
        return content[: limit + 1]  # what is longer is refused by who parses it


def _config(file: Path) -> bytes | None:
    path = file.parent / CONFIG_NAME
    return _read(path, MAX_CONFIG_BYTES) if path.exists() else None


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes its name when the block succeeds, and is gone otherwise.

    Raises:
        UsageError: there is something under that name.
        RegistryError: it cannot be made.
    """
    if os.path.lexists(target):
        raise UsageError(f"{target} is there already", "choose another --output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield folder
            folder.chmod(0o755)
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise _cannot(target, error) from error


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block succeeds, and is gone otherwise; raises as `_new_folder`."""
    if os.path.lexists(target):
        raise UsageError(f"{target} is there already", "choose another --output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{target.name}.", dir=target.parent) as sink:
            yield sink.file
            sink.flush()
            os.chmod(sink.name, 0o644)
            os.link(sink.name, target)
    except OSError as error:
        raise _cannot(target, error) from error


def _cannot(target: Path, error: OSError) -> RegistryError:
    return RegistryError(
        f"{target} cannot be written: {error.strerror or error}", "check the folder and the free space"
    )

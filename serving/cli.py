"""The command line of serving: edits of files, the HTTP service, its keys and its bases.

Data goes to stdout, progress and hints to stderr. torch and the models are imported by the commands that run
them, so that `serving --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.command import run
from serving.credentials_command import credentials
from serving.keys_command import keys
from serving.plan_command import plan
from serving.ray_command import ray_command
from serving.serve_command import serve

if TYPE_CHECKING:
    from PIL import Image

    from registry.admission import VerifiedAdapter
    from serving.engine import EditEngine
    from serving.pipelines.base import OnStep
    from serving.schema import EditResult

_READABLE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
_STRENGTH = click.option(
    "--strength", type=float, default=None,
    help="Of the adapter; 0 is the base.  [default: 1, or the signed one nearest to it]",
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="adapter-foundry", prog_name="serving")
def cli() -> None:
    """Edit portraits with signed adapters."""


for command in (serve, ray_command, keys, credentials, plan):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; with ``--json`` every error is one JSON object on stdout.

    Args:
        arguments: words after the program's name; None takes those of this process.
    """
    run(cli, "serving", arguments)


@cli.command()
@click.argument("portrait", type=_READABLE)
@click.option("--adapter", required=True, metavar="REF", help="name@alias, name:version or name@sha256:…")
@click.option(
    "--expression", "expressions", multiple=True, required=True, metavar="NAME=INTENSITY",
    help="For example happy=0.8; several are blended.",
)  # fmt: skip
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="PNG file."
)
@_STRENGTH
@click.option("--seed", type=int, default=0, show_default=True, help="Of the starting noise.")
@click.option("--steps", type=int, default=8, show_default=True, help="Denoising steps.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def edit(
    portrait: Path, adapter: str, expressions: tuple[str, ...], output: Path, strength: float | None,
    seed: int, steps: int, as_json: bool,
) -> None:  # fmt: skip
    """Edit PORTRAIT with a pulled and verified adapter; the PNG names the digests that made it."""
    intensities = _intensities(expressions)
    _protect(portrait, output)
    results = _run(portrait, adapter, [intensities], strength=strength, seed=seed, steps=steps)
    _finish(results[0].image, results[0].facts(), adapter, output, as_json)


@cli.command()
@click.argument("portrait", type=_READABLE)
@click.option("--adapter", required=True, metavar="REF", help="name@alias, name:version or name@sha256:…")
@click.option("--expression", required=True, metavar="NAME", help="The expression that grows.")
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="PNG file."
)
@click.option("--from", "low", type=float, default=0.0, show_default=True, help="First intensity.")
@click.option("--to", "high", type=float, default=1.5, show_default=True, help="Last intensity.")
@click.option(
    "--count", type=click.IntRange(2, 16), default=7, show_default=True, help="Pictures in the strip."
)
@_STRENGTH
@click.option("--seed", type=int, default=0, show_default=True, help="Of the starting noise.")
@click.option("--steps", type=int, default=8, show_default=True, help="Denoising steps.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def sweep(
    portrait: Path, adapter: str, expression: str, output: Path, low: float, high: float, count: int,
    strength: float | None, seed: int, steps: int, as_json: bool,
) -> None:  # fmt: skip
    """Edit PORTRAIT at growing intensities and write them side by side, as one strip."""
    _protect(portrait, output)
    rows = [{expression: low + (high - low) * index / (count - 1)} for index in range(count)]
    results = _run(portrait, adapter, rows, strength=strength, seed=seed, steps=steps)
    facts = {**results[0].facts(), "expressions": [dict(result.expressions) for result in results]}
    _finish(_strip([result.image for result in results]), facts, adapter, output, as_json)


@cli.command("register-base")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--id", "base_id", required=True, help="For example Qwen/Qwen-Image-Edit-2511.")
@click.option("--revision", required=True, help="The revision that adapters name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def register_base(folder: Path, base_id: str, revision: str, as_json: bool) -> None:
    """Copy a base model in diffusers layout from FOLDER to where adapters find it."""
    from registry.families import KNOWN_BASES
    from registry.manifest import BaseModelRef
    from serving.bases import register
    from serving.errors import UsageError

    known = KNOWN_BASES.get(base_id)
    if known is None:
        raise UsageError(f"the base model {base_id} is not known", "known bases: " + ", ".join(KNOWN_BASES))
    base = BaseModelRef(id=base_id, revision=_revision(revision), family=known.family, license=known.license)
    place = register(folder, base)
    facts = {"base": base.id, "base_revision": base.revision, "folder": str(place)}
    click.echo(json.dumps(facts) if as_json else f"{base.id} at revision {base.revision}: {place}")


def _revision(text: str) -> str:
    import re

    from serving.errors import UsageError

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", text):
        raise UsageError("the revision is not valid", "use letters, digits, '.', '_', ':' and '-'")
    return text


def _intensities(texts: Sequence[str]) -> dict[str, float]:
    """Return expression -> intensity of ``name=number`` options.

    Raises:
        UsageError: not of that form, or an expression twice.
    """
    from serving.errors import UsageError

    found: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not name or not equals or value != value:
            raise UsageError(
                f"{text!r} is not an expression with an intensity", "write for example happy=0.8"
            )
        if name in found:
            raise UsageError(f"the expression {name!r} is given twice", "give each expression once")
        found[name] = value
    return found


def _protect(portrait: Path, output: Path) -> None:
    """Refuse to write over the input, or to a place that cannot be written, before any work is done.

    Raises:
        UsageError: the output is the input by any name, is no PNG, or its folder does not exist.
    """
    from serving.errors import UsageError

    if output.exists() and os.path.samefile(portrait, output):
        raise UsageError("the output is the input picture itself", "give another file to -o")
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output} is not a PNG file name", "let the name end in .png")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"the folder {output.parent} does not exist", "make it first")


def _run(
    portrait: Path,
    reference: str,
    rows: Sequence[Mapping[str, float]],
    *,
    strength: float | None,
    seed: int,
    steps: int,
) -> list[EditResult]:
    """Read the picture, pull the adapter, load its base and edit."""
    from registry.reference import Reference
    from serving.images import MAX_IMAGE_BYTES, open_portrait

    wanted = Reference.parse(reference)
    with portrait.open("rb") as stream:
        data = stream.read(MAX_IMAGE_BYTES + 1)
    open_portrait(data)  # a bad picture is refused before anything is fetched or loaded
    adapter = _pull(wanted)
    from serving.engine import EditEngine
    from serving.quiet import quiet_libraries

    quiet_libraries()
    engine = EditEngine.load(adapter.card.base)
    return _sweep(engine, data, adapter, rows, strength=strength, seed=seed, steps=steps)


def _pull(reference: Any) -> VerifiedAdapter:
    from registry.client import Registry

    with _progress() as show:
        return Registry.open().load(reference, progress=lambda stage, done, total: show(stage, done, total))


def _sweep(
    engine: EditEngine, data: bytes, adapter: VerifiedAdapter, rows: Sequence[Mapping[str, float]], *,
    strength: float | None, seed: int, steps: int,
) -> list[EditResult]:  # fmt: skip
    with _progress() as show:
        on_step: OnStep = lambda index, latents: show("edit", index + 1, steps) or True  # noqa: E731
        return engine.sweep(data, adapter, rows, strength=strength, seed=seed, steps=steps, on_step=on_step)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows how far a stage is; it shows nothing when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _strip(pictures: Sequence[Image.Image]) -> Image.Image:
    from PIL import Image

    strip = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width
    return strip


def _finish(picture: Image.Image, facts: Mapping[str, Any], asked: str, output: Path, as_json: bool) -> None:
    """Write the PNG in one step and print what made it."""
    from serving.images import png_bytes

    _write(output, png_bytes(picture, facts))
    if as_json:
        click.echo(json.dumps({**facts, "asked": asked, "output": str(output)}))
        return
    click.echo(f"wrote     {output}")
    click.echo(f"adapter   {facts['adapter']} ({facts['adapter_digest']}), asked for as {asked}")
    click.echo(f"base      {facts['base']} at revision {facts['base_revision']}")
    rows = facts["expressions"] if isinstance(facts["expressions"], list) else [facts["expressions"]]
    shown = "; ".join(", ".join(f"{name} {value:g}" for name, value in row.items()) for row in rows)
    click.echo(
        f"asked     {shown}; strength {facts['strength']:g}, seed {facts['seed']}, {facts['steps']} steps"
    )


def _write(output: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there."""
    handle, waiting = tempfile.mkstemp(prefix=".serving-", dir=output.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(waiting, 0o666 & ~umask)  # mkstemp's own mode would keep others from reading the picture
        os.replace(waiting, output)
    except BaseException:
        Path(waiting).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    main()

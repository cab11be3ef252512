"""`trainer data`: look at datasets, compare them, check them, hand them on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from registry.errors import shown

if TYPE_CHECKING:
    from trainer.data.difference import Difference
    from trainer.data.inspection import Inspection

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def data() -> None:
    """Look at datasets, compare them, check them, hand them on."""


@data.command()
@click.argument("dataset", type=_FOLDER)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="HTML file for the report.")
@click.option(
    "--images", "elsewhere", type=_FOLDER, multiple=True,
    help="Folder with blobs of pictures that were left out; default: `images` beside DATASET.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Which people the contact sheets show.")
@_JSON
def inspect(dataset: Path, out: Path | None, elsewhere: tuple[Path, ...], seed: int, as_json: bool) -> None:
    """Say what is in the folder DATASET: counts, licences, filters, balance, rejects, look-alikes.

    With --out a report with contact sheets and distributions is written, one HTML file that needs nothing
    else. What paid APIs took for the edits that were kept is added up from the ledger of this machine's data
    folder; `trainer apis ledger` has all that a run took, scores and left-out pictures, too.
    """
    from trainer.data.dataset import Dataset
    from trainer.data.inspection import inspect as look
    from trainer.progress import ConsoleProgress

    found = Dataset.open(dataset)
    facts = look(found, _spent())
    if out is not None:
        from trainer.data.blobs import Blobs
        from trainer.data.inspection_page import page
        from trainer.stage import write_atomically

        folders = [Blobs(folder / "blobs") for folder in elsewhere or (dataset.parent / "images",)]
        name = dataset.resolve()
        title = f"{name.parent.name}/{name.name}"
        html = page(found, facts, title=title, seed=seed, elsewhere=folders, progress=ConsoleProgress())
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, html.encode("ascii"))
    if as_json:
        click.echo(json.dumps({**facts.as_json(), "report": None if out is None else str(out)}))
        return
    _show(facts)
    if out is not None:
        click.echo(f"report: {out}")


@data.command()
@click.argument("first", type=_FOLDER)
@click.argument("second", type=_FOLDER)
@_JSON
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Say what the dataset SECOND has, lacks, or has otherwise than FIRST.

    Exit code, as of `diff`: 0 they are the same version; 1 they differ; 2 one of them cannot be read.
    """
    from trainer.data.dataset import Dataset
    from trainer.data.difference import difference
    from trainer.errors import DataError

    try:
        found = difference(Dataset.open(first), Dataset.open(second))
    except DataError as error:
        error.exit_code = 2  # type: ignore[misc]
        raise
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        _show_difference(found)
    if not found.equal:
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("dataset", type=_FOLDER)
@_JSON
def verify(dataset: Path, as_json: bool) -> None:
    """Read everything in the folder DATASET and compare it with the manifest; print the version.

    Exit code 0: every table and every picture is the one that the manifest names, and there is nothing else.
    """
    from trainer.data.dataset import Dataset

    found = Dataset.open(dataset)
    content = {"version": str(found.digest), "pictures": len(found.files), "triplets": len(found.triplets)}
    click.echo(
        json.dumps(content) if as_json else " ".join(f"{name} {value}" for name, value in content.items())
    )


@data.command()
@click.argument("dataset", type=_FOLDER)
@click.option("--format", "kind", type=click.Choice(["webdataset", "croissant"]), required=True)
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Folder of the shards; for croissant a file in DATASET, by default croissant.json.",
)  # fmt: skip
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=256, show_default=True, metavar="MB",
    help="A shard ends with the sample that reaches so many MB.",
)  # fmt: skip
@_JSON
def export(dataset: Path, kind: str, out: Path | None, shard_size: int, as_json: bool) -> None:
    """Write the folder DATASET in a format that others read.

    webdataset: tars to stream from, one triplet a sample, with `shards.json`; the same dataset gives the same
    bytes. croissant: a description of the folder (MLCommons Croissant) that dataset hubs and loaders read.
    """
    from trainer.data.dataset import Dataset
    from trainer.progress import ConsoleProgress

    found = Dataset.open(dataset)
    if kind == "croissant":
        from trainer.data.croissant import write

        made: dict[str, object] = {"croissant": str(write(found, out))}
    elif out is None:
        raise click.UsageError("webdataset needs --out: the folder of the shards")
    else:
        from trainer.data.webdataset import export as write_shards

        shards = write_shards(found, out, shard_size * 1_000_000, ConsoleProgress())
        made = {
            "folder": str(out),
            "shards": len(shards),
            "samples": sum(one.samples for one in shards),
            "bytes": sum(one.bytes for one in shards),
        }
    made = {"dataset": str(found.digest), **made}
    click.echo(json.dumps(made) if as_json else "\n".join(f"{name} {value}" for name, value in made.items()))


def _show_difference(found: Difference) -> None:
    """Print what two datasets differ in as tables on stdout."""
    if found.equal:
        click.echo(f"the same version: {found.versions[0]}")
        return
    click.echo(f"first  {found.versions[0]}\nsecond {found.versions[1]}")
    kinds = {name: getattr(found, name) for name in ("people", "pictures", "triplets", "rejects")}
    _table(("", "added", "removed", "changed", "same"),
           [(name, *(str(number) for number in (one.added, one.removed, one.changed, one.same)))
            for name, one in kinds.items()])  # fmt: skip
    _table(
        ("", "", "for example"),
        [
            (name, word, "\n".join(some[:3]))
            for name, one in kinds.items()
            for word, some in one.examples.items()
        ],
    )
    _table(("of the same pictures, another", "pictures"),
           [(name, str(count)) for name, count in found.about.items()])  # fmt: skip
    _table(("score", "pictures", "mean change", "largest"),
           [(one.expression, str(one.pictures), f"{one.mean:.3f}", f"{one.largest:.3f}")
            for one in found.scores])  # fmt: skip
    _table(("", "first", "second"),
           [(name, *("" if value is None else str(value) for value in values))
            for name, values in found.values.items()])  # fmt: skip


def _spent() -> dict[str, float] | None:
    """Return US dollars by digest of the request, of all requests whose price is known; None: no ledger."""
    from registry.settings import home
    from trainer.apis.ledger import LEDGER_NAME, Ledger

    folder = home() / "apis"
    if not (folder / LEDGER_NAME).is_file():
        return None
    spent: dict[str, float] = {}
    unknown: set[str] = set()
    for line in Ledger(folder).lines():
        if line.usd is None:
            unknown.add(str(line.request))
        else:
            spent[str(line.request)] = spent.get(str(line.request), 0.0) + line.usd
    return {request: usd for request, usd in spent.items() if request not in unknown}


def _show(found: Inspection) -> None:
    """Print the figures as tables on stdout."""
    counts = found.counts
    _table(("", ""), [
        ("version", found.version),
        ("pictures", f"{counts['pictures']} ({counts['bytes'] / 1e6:.1f} MB)"),
        *((f"triplets, {split}", str(number)) for split, number in counts["triplets"].items()),
        *((f"people, {split}", str(number)) for split, number in counts["people"].items()),
        ("left out", str(counts["rejects"])),
        ("licence", found.provenance["license"]),
        ("made by", found.provenance["source"]),
        ("scored by", found.provenance["scorer"]),
        ("look-alikes", str(found.alike_total)),
        ("paid for kept edits", "not known" if found.cost is None else f"{found.cost:.2f} US dollars"),
    ])  # fmt: skip
    for what, filters in found.filters.items():
        _table(
            (f"filter of {what}", "asked for", "left out", "kept"),
            [(one["filter"], _number(one["threshold"]), str(one["left_out"]), str(one["kept"]))
             for one in filters],
        )  # fmt: skip
    _table(("pair", "train", "validation"),
           [(f"{one.first}, {one.second}", str(one.train), str(one.validation))
            for one in found.pairs])  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose cells come from outside."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = list(rows)
    if not lines:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(heads))
    for head in heads:
        table.add_column(head, overflow="fold")
    for line in lines:
        table.add_row(*(Text("\n".join(map(shown, cell.split("\n")))) for cell in line))
    Console().print(table)

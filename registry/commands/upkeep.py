"""Commands of the life cycle: diff, gc, mirror, doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from registry.commands import DIGEST_SHOWN, Answer, command, table

if TYPE_CHECKING:
    from registry.comparison import Comparison, Field
    from registry.mirror import Mirrored
    from registry.spectral import SpectralChange
    from registry.transfer import Progress

_SHOWN = 60
_MOST_CHANGED = 5


@command
@click.argument("first", metavar="REF_A")
@click.argument("second", metavar="REF_B")
@click.option("--all", "everything", is_flag=True, help="Show what is the same, too.")
def diff(first: str, second: str, everything: bool) -> Answer:
    """Show how two versions differ: licences, metrics, statements, weights.

    Metrics are those of signed evaluations. For the weights, every module's spectral norm of the difference
    is given relative to REF_A: 0 is the same update, 1 is as far away as no update at all.
    """
    from registry.client import Registry
    from registry.comparison import diff as compare
    from registry.reference import Reference

    found = compare(Registry.open(), Reference.parse(first), Reference.parse(second))
    data = {
        "first": _version(found.first.listed.reference, str(found.first.listed.digest)),
        "second": _version(found.second.listed.reference, str(found.second.listed.digest)),
        "fields": [_field(field) for field in found.fields],
        "metrics": [_metric(field) for field in found.metrics],
        "weights": None if found.weights is None else _change(found.weights),
        "problem": found.problem,
    }
    return Answer(data, _differences(found, everything=everything))


def _version(reference: str, digest: str) -> dict[str, str]:
    return {"reference": reference, "digest": digest}


def _field(field: Field) -> dict[str, Any]:
    return {"name": field.name, "first": field.first, "second": field.second, "same": field.same}


def _metric(field: Field) -> dict[str, Any]:
    from registry.spectral import shorten

    return {
        "name": field.name,
        "first": field.first,
        "second": field.second,
        "difference": shorten(field.difference),
    }


def _change(change: SpectralChange) -> dict[str, Any]:
    from registry.spectral import figures, shorten

    modules = [
        {
            "module": found.module,
            "relative_difference": shorten(found.relative),
            "norm": shorten(found.norm),
            "other_norm": shorten(found.other),
            "difference_norm": shorten(found.difference),
        }
        for found in change.modules
    ]
    names = [found.module for found in change.most_changed(_MOST_CHANGED)]
    return {**dict(figures(change)), "most_changed": names, "modules": modules}


def _differences(found: Comparison, *, everything: bool) -> str:
    one, two = found.first.listed.reference, found.second.listed.reference
    rows = [("", one, two)]
    rows += [
        (field.name, _cell(field.first), _cell(field.second))
        for field in found.fields
        if everything or not field.same
    ]
    parts = [table(rows) if len(rows) > 1 else f"{one} and {two} are the same version."]
    if found.metrics:
        metrics = [("METRIC", one, two, "DIFFERENCE")]
        metrics += [
            (field.name, _cell(field.first), _cell(field.second), _cell(field.difference, "{:+.4g}"))
            for field in found.metrics
        ]
        parts.append(table(metrics))
    if found.weights is None:
        parts.append(f"The weights cannot be compared: {found.problem}")
    else:
        parts.append(_weights(found.weights))
    return "\n\n".join(parts)


def _weights(change: SpectralChange) -> str:
    rows = [("MODULE", "NORM", "OTHER", "DIFFERENCE", "RELATIVE")]
    rows += [
        (
            found.module,
            _cell(found.norm),
            _cell(found.other),
            _cell(found.difference),
            _cell(found.relative),
        )
        for found in change.most_changed(_MOST_CHANGED)
    ]
    total = f"all {len(change.modules)} modules (Frobenius)"
    rows.append(
        (
            total,
            _cell(change.norm),
            _cell(change.other),
            _cell(change.difference),
            _cell(change.relative),
        )
    )
    return f"{table(rows)}\ncosine between the two updates: {_cell(change.cosine)}"


def _cell(value: Any, form: str = "{:.4g}") -> str:
    from registry.errors import shown

    if value is None:
        return "-"
    if isinstance(value, str) and value.startswith("sha256:"):
        return shown(value[:DIGEST_SHOWN])
    return form.format(value) if isinstance(value, float) else shown(value, _SHOWN)


@command
@click.option("--grace", type=click.FloatRange(0), default=24.0, show_default=True, metavar="HOURS",
              help="What is younger stays: a push may be in progress.")  # fmt: skip
@click.option("--partial", is_flag=True, help="This store mirrors some versions only: others may be missing.")
@click.option("--revoked", is_flag=True, help="Remove the files of revoked versions, too.")
@click.option("--cache", is_flag=True, help="Clean up this machine's cache instead of the store.")
@click.option("--keep-bytes", type=click.IntRange(0), help="With --cache: keep at most so many bytes.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
def gc(
    grace: float, partial: bool, revoked: bool, cache: bool, keep_bytes: int | None, dry_run: bool
) -> Answer:
    """Remove what no signed name needs any more, from the store or from the cache.

    Revoked and yanked versions are signed, too, and stay. Trust metadata is never touched.
    """
    from datetime import timedelta

    from registry import upkeep
    from registry.client import Registry
    from registry.errors import UsageError

    if (keep_bytes is not None and not cache) or ((revoked or partial) and cache):
        raise UsageError(
            "--keep-bytes is for --cache, --revoked and --partial are for the store", "leave one of them out"
        )
    registry, hours = Registry.open(), timedelta(hours=grace)
    did = "would be removed" if dry_run else "removed"
    if cache:
        pruned = upkeep.prune(registry, keep_bytes, hours, dry_run=dry_run)
        items = [{"name": name, "bytes": size} for name, size in pruned.removed.items()]
        data = {"removed": items, "bytes": pruned.size, "kept_bytes": pruned.kept, "dry_run": dry_run}
        lines = [f"{item['name']}  {item['bytes']} bytes" for item in items]
        lines.append(f"{len(items)} adapters, {pruned.size} bytes {did}; {pruned.kept} bytes stay.")
        return Answer(data, "\n".join(lines))
    found = upkeep.clean(registry, hours, dry_run=dry_run, revoked=revoked, partial=partial)
    removed = [*found.objects, *found.unfinished]
    data = {
        "removed": [{"name": item.key, "bytes": item.size} for item in found.objects],
        "unfinished": [{"name": item.key, "bytes": item.size} for item in found.unfinished],
        "bytes": found.size,
        "reachable": found.reachable,
        "young": found.young,
        "dry_run": dry_run,
    }
    lines = [f"{item.key}  {item.size} bytes" for item in removed]
    lines.append(
        f"{len(found.objects)} objects and {len(found.unfinished)} unfinished writes, {found.size} bytes "
        f"{did}; {found.reachable} objects are named, {found.young} are younger than {grace:g} hours."
    )
    return Answer(data, "\n".join(lines))


@click.group()
def mirror() -> None:
    """Carry versions to a site without a network, as one file."""


@click.argument("archive", type=click.Path(dir_okay=False))
@click.argument("references", nargs=-1, metavar="[REF]...")
@click.option("--days", type=click.IntRange(1, 90), help="Have it believed for so long; default: a day.")
def _export(archive: str, references: tuple[str, ...], days: int | None, progress: Progress) -> Answer:
    """Write ARCHIVE with the named versions, or with all that are approved and not revoked.

    A site believes it for as long as its timestamp, then it needs a newer one. With --days that is longer,
    but whoever carries the archive could withhold later revocations for so long. That is signed with the
    online key and logged.
    """
    from datetime import timedelta
    from pathlib import Path

    from registry import mirror as mirrors
    from registry.client import Registry
    from registry.reference import Reference

    wanted = [Reference.parse(text) for text in references]
    lifetime = None if days is None else timedelta(days=days)
    found = mirrors.export(Registry.open(), Path(archive), wanted, progress, lifetime=lifetime)
    lines = [
        f"{archive}  {found.size} bytes, {len(found.references)} versions; import it before {found.expires}"
    ]
    return _mirrored(found, archive, lines, 0)


@click.argument("archive", type=click.Path(dir_okay=False))
def _import(archive: str, progress: Progress) -> Answer:
    """Verify ARCHIVE by the root that is pinned here, and take what this site's policy admits.

    Nothing is taken if anything in it was changed. The exit code tells why a genuine version was left out.
    """
    from pathlib import Path

    from registry import intake
    from registry.client import Registry

    found = intake.take(Registry.open(), Path(archive), progress)
    code = next((left.refusal.exit_code for left in found.left_out), 0)
    lines = [f"{len(found.references)} versions are here, {found.sent} bytes were new."]
    lines.append(f"This site believes them until {found.expires}, or until a newer archive comes.")
    return _mirrored(found, archive, lines, code)


def _mirrored(found: Mirrored, archive: str, lines: list[str], code: int) -> Answer:
    left = [
        {
            "reference": item.reference,
            "kind": type(item.refusal).__name__,
            "exit_code": item.refusal.exit_code,
            "message": item.refusal.message,
        }
        for item in found.left_out
    ]
    lines += [f"Left out: {item['reference']}: {item['message']}" for item in left]
    data = {
        "archive": archive,
        "bytes": found.size,
        "file_bytes": found.sent,
        "references": [*found.references],
        "left_out": left,
        "expires": found.expires,
    }
    return Answer(data, "\n".join(lines), code)


mirror.add_command(command(_export, "export"))
mirror.add_command(command(_import, "import"))


@command
@click.option("--deep", is_flag=True, help="Read and verify every byte in the store and in the cache.")
def doctor(deep: bool) -> Answer:
    """Look at settings, keys, trust, store, index, audit log and cache; say what to do.

    Nothing is changed. The exit code is that of the first problem.
    """
    from registry import doctor as doctors
    from registry.client import Registry
    from registry.errors import shown

    findings = doctors.examine(Registry.open(), deep=deep)
    data = {
        "findings": [
            {
                "check": found.check,
                "outcome": found.outcome,
                "detail": found.detail,
                "mend": found.mend,
                "exit_code": found.exit_code,
            }
            for found in findings
        ],
        "healthy": doctors.exit_code(findings) == 0,
    }
    marks = {"ok": "ok", "warn": "warning", "fail": "PROBLEM"}
    rows = [("CHECK", "RESULT", "FOUND")]
    rows += [
        (shown(found.check, _SHOWN), marks[found.outcome], shown(found.detail, 300)) for found in findings
    ]
    todo = [f"  {line}" for line in doctors.to_do(findings)]
    text = "\n".join([table(rows), *(["", "What to do:", *todo] if todo else [])])
    return Answer(data, text, doctors.exit_code(findings))


COMMANDS = (diff, gc, mirror, doctor)

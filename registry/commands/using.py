"""Commands that read a registry: pull, verify, list, show; and scan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from registry.commands import DIGEST_SHOWN, Answer, as_text, command, table

if TYPE_CHECKING:
    from registry.admission import VerifiedAdapter
    from registry.results import Listed, StatementView
    from registry.transfer import Progress


@command
@click.argument("reference")
@click.option("--cache", type=click.Path(file_okay=False), help="Folder to keep it in.")
def pull(reference: str, cache: str | None, progress: Progress) -> Answer:
    """Fetch and verify REFERENCE, keep it in the cache.

    Nothing is kept of an adapter that is refused.
    """
    from pathlib import Path

    from registry.client import Registry

    registry, folder = Registry.open(), None if cache is None else Path(cache)
    adapter = registry.pull(reference, folder, progress)
    path = registry.cached(adapter, folder)
    data = _adapter(reference, adapter) | {"path": str(path)}
    return Answer(data, f"{reference}  {adapter.digest}\n{path}")


@command
@click.argument("reference")
def verify(reference: str) -> Answer:
    """Verify REFERENCE in the store; say what was checked."""
    from registry.admission import STEPS
    from registry.client import TRUST_STEPS, Registry

    adapter = Registry.open().verify(reference)
    checks = [
        {"number": number, "check": check, "passed": True}
        for number, check in enumerate((*TRUST_STEPS, *STEPS), start=1)
    ]
    lines = [f"{reference}  {adapter.digest}", "The following checks were performed and passed:"]
    lines += [f"  {check['number']:2}. {check['check']}" for check in checks]
    return Answer(_adapter(reference, adapter) | {"checks": checks}, "\n".join(lines))


@command
def list() -> Answer:
    """List every signed version and its aliases."""
    from registry.client import Registry

    found = Registry.open().list()
    rows = [("REFERENCE", "ALIASES", "DIGEST", "")]
    rows += [
        (row.reference, ", ".join(row.aliases) or "-", row.digest[:DIGEST_SHOWN], f"REVOKED: {row.revoked}")
        if row.revoked
        else (row.reference, ", ".join(row.aliases) or "-", row.digest[:DIGEST_SHOWN], "")
        for row in found
    ]
    text = table(rows) if found else "There are no adapters yet; `registry push` publishes one."
    return Answer({"adapters": [listed(row) for row in found]}, text)


@command
@click.argument("reference")
@click.option("--attestations", is_flag=True, help="Show what every statement says.")
def show(reference: str, attestations: bool) -> Answer:
    """Show what is signed about REFERENCE.

    Also works for an adapter that a pull would refuse.
    """
    from registry.client import Registry

    found = Registry.open().show(reference)
    manifest = found.manifest
    statements = [_statement(view, whole=attestations) for view in found.statements]
    data = listed(found.listed) | {"manifest": manifest.model_dump(mode="json"), "statements": statements}
    training = manifest.training
    rows = [
        ("reference", found.listed.reference),
        ("digest", str(found.listed.digest)),
        ("aliases", ", ".join(found.listed.aliases) or "-"),
        ("revoked", found.listed.revoked or "no"),
        ("licence", manifest.license),
        ("base", f"{manifest.base.id} at {manifest.base.revision} ({manifest.base.license})"),
        ("lora", f"rank {manifest.lora.rank}, alpha {manifest.lora.alpha:g}, {manifest.lora.dtype}"),
        ("expressions", ", ".join(manifest.conditioning.expressions)),
        ("training", f"seed {training.seed}, {training.steps} steps, code {training.code_version}"),
        ("recipe", str(training.recipe)),
        ("dataset", str(training.dataset)),
        *(("file", f"{entry.path}, {entry.size} bytes, {entry.sha256}") for entry in manifest.files),
        *(("statement", _statement_line(view)) for view in found.statements),
    ]
    text = table(rows)
    if attestations:
        text += "".join(f"\n\n{view.kind}:\n{as_text(dict(view.predicate))}" for view in found.statements)
    return Answer(data, text)


@command
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
def scan(folder: str) -> Answer:
    """Scan an adapter FOLDER without publishing it.

    The exit code is 14 if it is blocked and 17 if it needs a review.
    """
    from pathlib import Path

    from registry.client import read_folder
    from registry.errors import NeedsReview, ScanRefused
    from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
    from registry.scanning import scan as scan_weights

    files = read_folder(Path(folder))
    report = scan_weights(files[WEIGHTS_NAME], AdapterCard.parse(files[CARD_NAME]))
    codes = {"pass": 0, "review": NeedsReview.exit_code, "block": ScanRefused.exit_code}
    return Answer(report.to_json(), report.text().rstrip(), codes[report.verdict])


def _adapter(reference: str, adapter: VerifiedAdapter) -> dict[str, Any]:
    return {
        "reference": reference,
        "resolved": adapter.reference,
        "version": None if adapter.manifest is None else adapter.manifest.version,
        "digest": str(adapter.digest),
        "license": adapter.card.license,
        "base": {"id": adapter.card.base.id, "revision": adapter.card.base.revision},
        "scan": adapter.scan.verdict,
    }


def listed(row: Listed) -> dict[str, Any]:
    """Return a signed version as JSON values."""
    return {
        "reference": row.reference,
        "digest": str(row.digest),
        "aliases": [*row.aliases],
        "revoked": row.revoked,
    }


def _statement(view: StatementView, *, whole: bool) -> dict[str, Any]:
    data = {
        "kind": view.kind,
        "role": view.role,
        "signed": view.signed,
        "problem": view.problem,
        "key_ids": [*view.key_ids],
    }
    return data | {"predicate": dict(view.predicate)} if whole else data


def _statement_line(view: StatementView) -> str:
    if not view.signed:
        return f"{view.kind}, NOT BELIEVED: {view.problem}"
    return f"{view.kind}, signed by the {view.role} key {', '.join(keyid[:12] for keyid in view.key_ids)}"


COMMANDS = (pull, verify, list, show, scan)

"""The command that compares the index with what is signed: reconcile."""

from __future__ import annotations

import click

from registry.commands import Answer, command, table

_SHOWN = 70


@command
@click.option(
    "--repair", is_flag=True, help="Make MLflow say what is signed; it is never the other way round."
)
def reconcile(repair: bool) -> Answer:
    """Compare MLflow with what is signed; report what was changed by hand.

    Without --repair the exit code is 13 if anything differs.
    """
    from registry import reconcile as reconciling
    from registry.client import Registry
    from registry.errors import DigestMismatch, shown

    registry = Registry.open()
    found, left = reconciling.reconcile(registry, repair=repair)
    data = {
        "catalog": registry.catalog.uri,
        "differences": [
            {"kind": one.kind, "subject": one.subject, "signed": one.signed, "found": one.found}
            for one in found
        ],
        "repaired": repair and not left,
        "left": len(left),
    }
    if not found:
        return Answer(data, f"MLflow says what is signed ({registry.catalog.uri}).")
    rows = [("WHAT", "SUBJECT", "SIGNED", "IN MLFLOW")]
    rows += [
        (one.kind, shown(one.subject, _SHOWN), shown(one.signed, _SHOWN), shown(one.found, _SHOWN))
        for one in found
    ]
    if repair and not left:
        last = "All of it was repaired: MLflow says what is signed."
    elif repair:
        last = f"{len(left)} differences are left: somebody changes MLflow at this moment; try again."
    else:
        last = (
            "`registry pull` is not affected. `registry reconcile --repair` makes MLflow say what is signed."
        )
    return Answer(data, f"{table(rows)}\n{last}", DigestMismatch.exit_code if left else 0)


COMMANDS = (reconcile,)

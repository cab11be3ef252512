"""What is released, scanned by the rules of today, as a Prefect flow: run it after an upgrade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from registry.client import Registry
from registry.rescanning import Rescan


@task(name="rescan", description="scan every released version, sign what passes", cache_policy=NO_CACHE)
def scan_released(home: Path | None, names: tuple[str, ...]) -> Rescan:
    """See `registry.client.Registry.rescan`; without names every adapter is looked at."""
    return Registry.open(home).rescan(*names, everything=not names)


@flow(name="rescan", description="released adapters -> the rules of today -> fresh scan statements, a table")
def rescan(home: Path | None = None, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Scan what is released, leave a table for people, and return the same as JSON values.

    Args:
        home: data folder; None is this machine's.
        names: adapters; none of them stands for all.

    Raises:
        registry.errors.RegistryError: something is blocked, could not be scanned or needs a review; the table
            has every version all the same.
    """
    from prefect.artifacts import create_table_artifact

    found = scan_released(home, names)
    about = f"Released versions by the scanner's rules {found.rules_version}."
    create_table_artifact(found.table(), key="rescan", description=about)
    if found.refusal is not None:
        raise found.refusal
    return found.to_json()

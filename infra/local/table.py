"""What runs, since when, where, and who may sign in: as facts and as one table."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from infra import provision
from infra.local import health, mlflow, place, postgres, prefect, probes, s3, serving
from infra.local.errors import NotRunning
from infra.local.passwords import passwords as read_passwords
from infra.local.place import Place
from infra.local.ports import HOST
from infra.local.supervision import Supervisor

_PROBE_SECONDS = 10.0


def facts(where: Place, *, passwords: bool = False) -> dict[str, Any]:
    """Return what is known of a platform, asked now.

    Args:
        where: its folders.
        passwords: whether they are among the facts.
    """
    supervisor = Supervisor(where)
    try:
        states = supervisor.states()
    except NotRunning:
        states = {}
    kept = place.read(where)
    found: list[dict[str, Any]] = []
    if states:
        problems = probes.problems(probes.probes(where), _PROBE_SECONDS)
        problems[health.NAME] = health.silence(where)
        memory = _memory(states)
        urls = _urls(kept["ports"])
        for name, state in states.items():
            running = state["statename"] == "RUNNING"
            found.append(
                {
                    "service": name,
                    "state": state["statename"].lower(),
                    "pid": state["pid"] or None,
                    "seconds": state["now"] - state["start"] if running else None,
                    "problem": problems.get(name) if running else state["spawnerr"] or "it does not run",
                    "url": urls.get(name),
                    "memory_mb": memory.get(name),
                    "log": str(where.log(name)),
                }
            )
    return {
        "home": str(where.home),
        "running": bool(states),
        "working": bool(found) and all(one["problem"] is None for one in found),
        "database": kept.get("database"),
        "supervisord": supervisor.pid,
        "services": found,
        "accounts": accounts(),
        "secrets": str(where.secrets),
        "logs": str(where.logs),
        **({"passwords": read_passwords(where)} if passwords else {}),
    }


def accounts() -> dict[str, list[str]]:
    """Return who may sign in, by service."""
    return {
        "postgres": ["admin", *provision.DATABASES],
        "s3": list(s3.ACTIONS),
        "mlflow": [mlflow.ADMIN, *provision.ACCOUNTS],
        "prefect": ["admin"],
    }


def _urls(ports: dict[str, int]) -> dict[str, str]:
    return {
        postgres.NAME: f"postgresql://{HOST}:{ports[postgres.NAME]}",
        s3.NAME: s3.endpoint(ports),
        mlflow.NAME: mlflow.url(ports),
        prefect.SERVER: prefect.page(ports),
        serving.NAME: serving.url(ports),
    }


def _memory(states: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return resident memory in MB by service, of all its processes; pages that they share count once."""
    found: dict[str, int] = {}
    for name, state in states.items():
        with suppress(psutil.Error):
            first = psutil.Process(state["pid"])
            family = [first, *first.children(recursive=True)]
            found[name] = sum(map(_share, family)) // 1_000_000
    return found


def _share(process: psutil.Process) -> int:
    """Return bytes of memory of a process, its part of those that it shares."""
    used = process.memory_full_info()
    return int(getattr(used, "pss", used.rss))  # Linux alone knows the part


def show(told: dict[str, Any]) -> None:
    """Print facts as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    if not told["running"]:
        console.print(f"The platform in {told['home']} does not run; start it: python -m infra.local up")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("service", "state", "since", "memory", "address"):
        table.add_column(column, no_wrap=True, justify="right" if column == "memory" else "left")
    for one in told["services"]:
        well = one["problem"] is None
        since = "" if one["seconds"] is None else _ago(one["seconds"])
        memory = f"{one['memory_mb']} MB" if one["memory_mb"] else ""
        state = "[green]works[/]" if well else "[red]" + one["state"] + ", does not answer[/]"
        table.add_row(one["service"], state, since, memory, one["url"] or "")
    console.print(table)
    for one in told["services"]:
        if one["problem"] is not None:
            console.print(
                f"{one['service']}: {one['problem']}; see {one['log']}", markup=False, highlight=False
            )
    who = "; ".join(f"{name}: {', '.join(names)}" for name, names in told["accounts"].items())
    notes = Table(box=None, pad_edge=False, show_header=False)
    for key, value in (
        ("accounts", who), ("passwords", told["secrets"]), ("logs", told["logs"]),
        ("data folder", told["home"]), ("as a client", "python -m infra.local run -- COMMAND"),
    ):  # fmt: skip
        notes.add_row(f"[bold]{key}[/]", value)
    console.print()
    console.print(notes, highlight=False)
    for service, names in told.get("passwords", {}).items():
        for name, word in names.items():
            console.print(f"{service} {name} {word}", markup=False, highlight=False)


def _ago(seconds: int) -> str:
    for size, word in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {word}"
    return f"{seconds} s"

"""``python -m infra.local``: the platform of this machine, up and down."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import click

from infra.local.place import Place, place
from registry import command
from registry.settings import home


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """The whole platform on this machine: databases, S3, MLflow, Prefect with a worker, and the service."""


def _place() -> Place:
    return place(home())


def _tell(line: str) -> None:
    click.echo(f"  {line}", err=True)


#: What a user may have set for servers of his own, and what would lead away from this platform.
FOREIGN = (
    *("ADAPTER_FOUNDRY_CONFIG", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"),
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@cli.command()
@_JSON
def up(as_json: bool) -> None:
    """Start everything, or what is missing of it; run again, it changes nothing."""
    from infra.local import steps
    from infra.local.settings import load
    from infra.local.table import facts, show

    where = _place()
    click.echo(f"The platform in {where.home}", err=True)
    found, done = steps.up(where, load(), _tell)
    told = {**facts(where), "done": done}
    if found.why_sqlite:
        click.echo(f"  SQLite keeps the rows: {found.why_sqlite}", err=True)
    if not done:
        click.echo("  everything runs already; nothing was changed", err=True)
    click.echo(json.dumps(told)) if as_json else show(told)


@cli.command()
@_JSON
def down(as_json: bool) -> None:
    """Stop everything; all data stay. Flow runs get a minute to save what they did."""
    from infra.local import steps

    where = _place()
    stopped = steps.down(where, _tell)
    if as_json:
        click.echo(json.dumps({"home": str(where.home), "stopped": stopped}))
    else:
        click.echo(
            f"The platform in {where.home} {'is stopped; all data stay' if stopped else 'did not run'}."
        )


@cli.command()
@click.option("--passwords", is_flag=True, help="Print the passwords too.")
@_JSON
def status(passwords: bool, as_json: bool) -> None:
    """What runs, since when, and where; the exit code is 1 unless all of it works."""
    from infra.local.table import facts, show

    told = facts(_place(), passwords=passwords)
    click.echo(json.dumps(told)) if as_json else show(told)
    sys.exit(0 if told["working"] else 1)


@cli.command()
@_JSON
def env(as_json: bool) -> None:
    """Print the variables of a client, passwords among them: eval "$(python -m infra.local env)"."""
    found = _environment()
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(exports(found))


def exports(found: Mapping[str, str]) -> str:
    """Return variables as a shell takes them."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(found.items())]
    return "\n".join([f"unset {' '.join(FOREIGN)}", *lines])


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("words", nargs=-1, required=True, metavar="-- CMD…")
def run(words: tuple[str, ...]) -> None:
    """Run a command as a client of the platform."""
    _become(words, {**_own(), **_environment()})


def _become(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    try:
        os.execvpe(words[0], list(words), dict(environment))  # noqa: S606
    except OSError as error:
        raise click.ClickException(f"{words[0]} cannot be run: {error.strerror}") from error


def _own() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOREIGN}


def _environment() -> dict[str, str]:
    """Return the variables of a client.

    Raises:
        NotRunning: the platform does not run.
    """
    from infra.local import stack
    from infra.local.supervision import Supervisor

    where = _place()
    Supervisor(where).ask("getState")
    return stack.environment(where)


@cli.command()
@click.argument("target", metavar="DIR")
@click.option("--without-keys", is_flag=True, help="Leave private keys out, to keep them elsewhere.")
@_JSON
def backup(target: str, without_keys: bool, as_json: bool) -> None:
    """Back the platform up into DIR or s3://bucket/prefix, by `registry backup`, with its databases."""
    from infra.local import backups

    options = [*(["--without-keys"] if without_keys else []), *(["--json"] if as_json else [])]
    words, variables = backups.backup(_place(), [target, *options])
    _become(words, {**_own(), **_environment(), **variables})


@cli.command()
@click.argument("source", metavar="DIR")
@click.option("--at", metavar="NAME", help="Which backup; without it the newest one.")
@click.option("--sha256", metavar="DIGEST", help="What the backup printed; covers what nobody signs.")
@_JSON
def restore(source: str, at: str | None, sha256: str | None, as_json: bool) -> None:
    """Make a new platform of the backup in DIR, and start it; no platform may be there."""
    from infra.local import backups
    from infra.local.settings import load

    where, words = _place(), [] if sha256 is None else ["--sha256", sha256]
    done = backups.restore(where, load(), source, at, words, _own(), _tell)
    if as_json:
        click.echo(json.dumps({"home": str(where.home), "done": done}))


@cli.command()
@click.argument("service", required=False)
@click.option(
    "-n", "lines", type=click.IntRange(1), default=50, show_default=True, help="Lines from the end."
)
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
def logs(service: str | None, lines: int, follow: bool) -> None:
    """The end of the log of SERVICE, or of all logs."""
    from infra.local.errors import PlatformError

    where = _place()
    files = sorted(where.logs.glob("*.log")) if service is None else [where.log(Path(service).name)]
    there = [str(file) for file in files if file.is_file()]
    if not there:
        known = ", ".join(sorted(file.stem for file in where.logs.glob("*.log"))) or "none"
        raise PlatformError(f"there is no log of {service or 'this platform'}", f"logs are there of: {known}")
    words = ["tail", "-n", str(lines), *(["-F"] if follow else []), *there]
    os.execvp(words[0], words)  # noqa: S606


@cli.command()
@click.argument("service")
@click.argument("name")
@_JSON
def password(service: str, name: str, as_json: bool) -> None:
    """Make the password NAME of SERVICE anew, set it there, and restart who uses it."""
    from infra.local import steps
    from infra.local.settings import load

    where = _place()
    done = steps.renew(where, service, name, load(), _tell)
    if as_json:
        click.echo(json.dumps({"service": service, "name": name, "done": done}))


@cli.command()
@click.argument("services", nargs=-1)
@_JSON
def restart(services: tuple[str, ...], as_json: bool) -> None:
    """Restart SERVICES, or all of them; `up` does so by itself where a configuration has changed."""
    from infra.local import steps
    from infra.local.supervision import Supervisor

    where = _place()
    names = services or tuple(Supervisor(where).states())
    steps.restart(where, names, _tell)
    if as_json:
        click.echo(json.dumps({"restarted": list(names)}))


if __name__ == "__main__":
    command.run(cli, "python -m infra.local")

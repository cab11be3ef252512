"""`serving keys`: who may use the service."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from serving.http.keyring import Keys, Scope


@click.group()
def keys() -> None:
    """Make, list and revoke API keys of the service."""


@keys.command("add")
@click.argument("name")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(["edit", "read", "admin"]),
    default=("edit", "read"), show_default=True, help="What the key may do; several are fine.",
)  # fmt: skip
@click.option("--days", type=float, help="After which it ends by itself; left out, it does not.")
@click.option("--requests", type=int, default=120, show_default=True, help="Requests a minute.")
@click.option("--pictures", type=int, default=240, show_default=True, help="Pictures a minute.")
@click.option("--concurrent", type=int, default=16, show_default=True, help="Requests at the same moment.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def add(
    name: str, scopes: tuple[Scope, ...], days: float | None, requests: int, pictures: int, concurrent: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Make a key for NAME and show its token, which is kept nowhere."""
    from pydantic import ValidationError

    from serving.errors import UsageError
    from serving.http.keyring import KeyLimits

    try:
        limits = KeyLimits(requests=requests, pictures=pictures, concurrent=concurrent)
    except ValidationError:
        raise UsageError("a limit of the key is not valid", "limits are whole numbers from 1") from None
    token, key = _keys().add(name, scopes, limits=limits, days=days)
    if as_json:
        content = {"token": token, "webhook_secret": key.webhook_secret, **key.facts(time.time())}
        click.echo(json.dumps(content))
        return
    click.echo(token)
    click.echo(
        f"Key {name} ({', '.join(key.scopes)}). It is shown only now.\n"
        f"Its webhooks are signed with {key.webhook_secret}",
        err=True,
    )


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(as_json: bool) -> None:
    """List the keys: names, scopes and limits, never tokens."""
    now = time.time()
    facts = [key.facts(now) for key in _keys().all()]
    if as_json:
        click.echo(json.dumps({"keys": facts}))
        return
    for fact in facts:
        scopes = ",".join(str(scope) for scope in _list(fact["scopes"]))
        click.echo(f"{fact['name']}  {fact['state']}  {scopes}  expires {fact['expires'] or 'never'}")


@keys.command("revoke")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def revoke(name: str, as_json: bool) -> None:
    """End the key of NAME; running services refuse it from its next request on."""
    fact = _keys().revoke(name).facts(time.time())
    click.echo(json.dumps(fact) if as_json else f"{name} is revoked")


def _keys() -> Keys:
    from registry.settings import home
    from serving.http.keyring import Keys

    return Keys.open(home())


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []

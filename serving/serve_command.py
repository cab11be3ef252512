"""`serving serve`: the HTTP service over the engine of this process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastapi import FastAPI

    from registry.client import Registry
    from serving.http.server import HttpServer
    from serving.settings import ServingSettings


@click.command()
@click.option(
    "--adapter", "adapters", multiple=True, metavar="REF",
    help="Serve and follow this reference, for example pixelsmile@prod; the first is the default. "
    "Left out, the settings say it.",
)  # fmt: skip
@click.option("--host", help="Address to listen on; left out, the settings say it (this machine only).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@click.option("--wait", is_flag=True, help="Start even if a reference means nothing yet, and wait for it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object once it is ready.")
def serve(
    adapters: tuple[str, ...], host: str | None, port: int | None, wait: bool, as_json: bool
) -> None:  # fmt: skip
    """Answer edits over HTTP with verified adapters, and follow their promotions, until a signal."""
    import asyncio

    settings = _settings(adapters, host, port)
    registry = _registry(settings, wait)
    _require_extra()
    from serving import logs
    from serving.http.app import drain, service_app
    from serving.http.server import HttpServer
    from serving.local import LocalBackend
    from serving.metrics import Metrics
    from serving.quiet import quiet_libraries

    logs.configure()
    quiet_libraries()
    metrics = Metrics()
    backend = LocalBackend(settings, registry=registry, metrics=metrics)
    app = service_app(backend, settings, metrics=metrics)
    server = HttpServer(app, settings, lambda: drain(app))
    url = server.bind()  # a port that is taken is told before a base of gigabytes is loaded
    asyncio.run(_answer(app, server, {"url": url, "adapters": list(settings.adapters)}, as_json))


async def _answer(app: FastAPI, server: HttpServer, facts: dict[str, Any], as_json: bool) -> None:
    from serving.http.app import start

    def tell() -> None:
        if as_json:
            click.echo(json.dumps(facts))
        else:
            click.echo(facts["url"])
            click.echo(f"serving {', '.join(facts['adapters'])}; the page is at {facts['url']}/", err=True)

    click.echo("loading the base and the adapters", err=True)
    await start(app)
    await server.serve(tell)


def _settings(adapters: tuple[str, ...], host: str | None, port: int | None) -> ServingSettings:
    """Return the settings, with what the command line says instead.

    Raises:
        UsageError: no adapter is named, or a reference is not one.
    """
    from registry.reference import Reference
    from serving.errors import UsageError
    from serving.settings import ServingSettings, load

    kept = load()
    said = {"adapters": adapters or None, "host": host, "port": port}
    told = {key: value for key, value in said.items() if value is not None}
    settings = ServingSettings.model_validate({**kept.model_dump(), **told})
    if not settings.adapters:
        raise UsageError(
            "no adapter is named",
            "name what to serve, for example: serving serve --adapter pixelsmile@prod; or set "
            'ADAPTER_FOUNDRY_SERVING_ADAPTERS=["pixelsmile@prod"]',
        )
    for reference in settings.adapters:
        Reference.parse(reference)
    return settings


def _registry(settings: ServingSettings, wait: bool) -> Registry:
    """Return the registry, once it knows every reference.

    A registry that cannot be reached is no reason not to start: the service follows it as soon as it is back.

    Args:
        settings: name the references.
        wait: start though one means nothing yet: it lives then, and is not ready until somebody promotes it.

    Raises:
        registry.errors.NotFound: a reference means nothing there, which is a mistyped name.
    """
    from registry.client import Registry
    from registry.errors import NetworkError, NotFound, StaleTrust
    from registry.reference import Reference

    registry = Registry.open()
    try:
        state = registry.authority.state()
    except (NetworkError, StaleTrust) as error:
        click.echo(f"the registry does not answer yet: {error.message}", err=True)
        return registry
    for reference in settings.adapters:
        try:
            state.resolve(Reference.parse(reference))
        except NotFound as error:
            if not wait:
                error.mend += "; or start with --wait, to serve it as soon as somebody promotes it"
                raise
            click.echo(f"waiting for {reference}: {error.message}", err=True)
    return registry


def _require_extra() -> None:
    """Explain what to install where the base install has no HTTP server."""
    import importlib.util

    from serving.errors import UsageError

    missing = [name for name in ("fastapi", "uvicorn", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the service needs packages that are not installed: {', '.join(missing)}",
            "install adapter-foundry[http]",
        )

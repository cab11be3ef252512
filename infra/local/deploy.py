"""Pools, limits, automations and deployments of a Prefect server: ``python -m infra.local.deploy``.

A process of its own, for Prefect reads its settings, from the environment, when it is imported.
"""

from __future__ import annotations

from flows.local import deploy, set_up
from flows.server import Server
from flows.settings import FlowSettings, prepare
from registry import command
from registry.settings import home


def main() -> None:
    """Make them, or bring them up to date."""
    import click

    @click.command()
    @click.option("--runs", type=click.IntRange(1), required=True, help="Runs that are done at once.")
    def deploying(runs: int) -> None:
        """Make pools, limits, automations and deployments."""
        place = home()
        settings = FlowSettings.read(place)
        prepare(place)
        server = Server(url=settings.prefect_api_url or "", pid=None, reused=True)
        set_up(server, place, settings, runs)
        click.echo(" ".join(deploy(server, place)))

    command.run(deploying, "python -m infra.local.deploy")


if __name__ == "__main__":
    main()

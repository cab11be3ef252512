"""Variables, commands and probes of manifests: each means something to the program it is for."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fakes import manifests as kube
from fakes.manifests import Manifest, Pod
from fakes.platform_manifests import (
    OVERLAYS,
    TRAININGS,
    from_outside,
    needs_kubectl,
    rendered,
    whole,
)

pytestmark = needs_kubectl


def variables(
    manifests: tuple[Manifest, ...], outside: dict[tuple[str, str], set[str]], pod: Pod
) -> dict[str, str]:
    """Environment of a pod; values that are secret are a word."""
    found: dict[str, str] = {}
    for container in pod.containers:
        for source in container.get("envFrom", ()):
            if "configMapRef" in source:
                found |= kube.named(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
            else:
                found |= dict.fromkeys(outside["Secret", source["secretRef"]["name"]], "word")
        for row in container.get("env", ()):
            found[row["name"]] = row.get("value", "word")
    return found


#: What programs that are not ours read, by who documents it.
KNOWN = {
    "libpq": {"PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGSSLMODE", "PGDATA", "POSTGRES_PASSWORD"},
    "botocore": {"AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "libraries": {"HOME", "HF_HOME", "HF_HUB_OFFLINE", "DO_NOT_TRACK", "RAY_USAGE_STATS_ENABLED"},
    "torch": {"OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"},
    "the command line of the backup": {
        "BACKUP_PLACE", "MLFLOW_DATABASE", "PREFECT_DATABASE", "SERVING_DATABASE",
    },
}  # fmt: skip


def unknown_variables(names: set[str]) -> set[str]:
    """Variables of nobody; ours are checked by our settings themselves."""
    import mlflow.environment_variables as of_mlflow
    from mlflow.cli import server
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields
    from prefect_kubernetes.settings import KubernetesSettings
    from torch.distributed.run import get_args_parser

    def nested(model: Any) -> Iterator[str]:
        prefix = model.model_config["env_prefix"]
        for field, about in model.model_fields.items():
            inner = getattr(about.annotation, "model_fields", None)
            yield from nested(about.annotation) if inner else [f"{prefix}{field}".upper()]

    known = (
        set().union(*KNOWN.values()) | set(_get_settings_fields(Settings)) | set(nested(KubernetesSettings))
    )
    known |= {name for name in vars(of_mlflow) if name.startswith("MLFLOW_")}
    known |= {str(option.envvar) for option in server.params if getattr(option, "envvar", None)}
    known |= {f"PET_{action.dest.upper()}" for action in get_args_parser()._actions}
    return {name for name in names if not name.startswith("ADAPTER_FOUNDRY_")} - known


@pytest.mark.parametrize("name", [*OVERLAYS, *TRAININGS])
def test_every_variable_means_something_to_somebody(name: str, tmp_path: Path) -> None:
    from flows.settings import FlowSettings
    from registry.settings import home, layout, load
    from serving.settings import load as serving_settings

    manifests, outside = whole(name), from_outside(name)
    for pod in kube.pods(manifests):
        found = variables(manifests, outside, pod)
        assert unknown_variables(set(found)) == set(), pod.owner
        ours = {key: value for key, value in found.items() if key.startswith("ADAPTER_FOUNDRY_")}
        if not ours:
            continue
        ours["ADAPTER_FOUNDRY_SERVING_JOBS"] = "postgresql+psycopg:///serving"
        assert layout(tmp_path, ours).settings.actor is None  # refuses what it does not know
        serving_settings(ours, home=tmp_path)
        load("flows", FlowSettings, ours, data_folder=tmp_path)
        assert home(ours).is_absolute()
        if "ADAPTER_FOUNDRY_STORE" in ours:
            assert ours["ADAPTER_FOUNDRY_STORE"].startswith("s3://")


def words(container: dict[str, Any]) -> list[str]:
    return [*container.get("command", ()), *container.get("args", ())]


def command_problems(line: list[str]) -> list[str]:
    """What is wrong with a command of one of our images."""
    program, *rest = line
    if program == "sh" and rest[0] == "-c":
        code, line = _said_by_shell(rest[1])
        return command_problems(line) if code == 0 else [f"the shell says {code}"]
    if program == "sh":
        return [] if rest == ["/etc/scripts/databases.sh"] else [f"no script {rest}"]
    if program == "torchrun":
        from importlib.util import find_spec

        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(rest)
        module = find_spec(given.training_script) if given.module else None
        return [] if module is not None and len(given.training_script_args) == 1 else [f"no module in {rest}"]
    return _click_problems(*_click_command(line)) if program != "prefect" else _prefect_problems(rest)


def _said_by_shell(script: str) -> tuple[int, list[str]]:
    """What a script runs in the end, where its programs do nothing but say how they were called."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("registry", "serving", "prefect", "python"):
            program = Path(folder) / name
            program.write_text(
                f"#!/bin/sh\nprintf '%s\\n' {name} \"$@\"\n" if name != "python" else "#!/bin/sh\necho V\n"
            )
            program.chmod(0o755)
        done = subprocess.run(
            ["/bin/sh", "-c", script], env={"PATH": folder}, capture_output=True, text=True, cwd=folder
        )
        return done.returncode, done.stdout.splitlines()


def _click_command(line: list[str]) -> tuple[Any, list[str]]:
    from importlib import import_module

    programs = {"registry": "registry.cli:cli", "serving": "serving.cli:cli", "trainer": "trainer.cli:cli",
                "mlflow": "mlflow.cli:cli"}  # fmt: skip
    program, *rest = line
    if program == "python":
        assert rest[0] == "-m"
        return import_module(rest[1]).main, rest[2:]
    module, _, attribute = programs[program].partition(":")
    command = getattr(import_module(module), attribute)
    while hasattr(command, "commands") or hasattr(command, "get_command"):
        name, *rest = rest
        below = command.get_command(None, name)
        if below is None:
            return None, [name]
        command = below
    return command, rest


def _click_problems(command: Any, rest: list[str]) -> list[str]:
    import click

    if command is None:
        return [f"no command {rest[0]}"]
    try:
        context = click.Context(command, ignore_unknown_options=False)
        _, left, _ = command.make_parser(context).parse_args(list(rest))
    except click.UsageError as error:
        return [error.format_message()]
    return [f"left over: {left}"] if left else []


def _prefect_problems(rest: list[str]) -> list[str]:
    path = [word for word in itertools.takewhile(lambda word: word not in ("--prefect-file",), rest)
            if not word.startswith("--")][:2]  # fmt: skip
    options = {word.partition("=")[0] for word in rest if word.startswith("--")} - {"--no-prompt"}
    return [f"prefect {' '.join(path)} has no {one}" for one in options if one not in _prefect_help(*path)]


@cache
def _prefect_help(*path: str) -> set[str]:
    """Every option that the help of one of Prefect's commands names."""
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "prefect", *path, "--help"], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "300"}, check=True,
    ).stdout  # fmt: skip
    return set(re.findall(r"--[a-z-]+", shown))


@pytest.mark.parametrize("name", [*OVERLAYS, *TRAININGS, "serving/gpu"])
def test_every_command_exists_with_its_options(name: str) -> None:
    manifests = rendered(name)
    ours = [
        (pod.owner, words(container))
        for pod in kube.pods(manifests)
        for container in pod.containers
        if "adapter-foundry" in container["image"]
    ]
    ours += [("TrainJob", one["spec"]["trainer"]["args"]) for one in kube.of_kind(manifests, "TrainJob")]
    assert ours
    given = [(owner, line) for owner, line in ours if line]
    assert [(owner, line, said) for owner, line in given if (said := command_problems(line))] == []


def test_a_launcher_does_not_get_the_place_of_the_image() -> None:
    """tini, the entry point of our images, ends what a shell leaves behind; serving needs no parent."""
    for name in (*OVERLAYS, *TRAININGS):
        for pod in kube.pods(rendered(name)):
            for container in pod.containers:
                if "command" in container and "adapter-foundry" in container["image"]:
                    assert pod.owner == "Deployment/serving"


def routes() -> dict[str, set[str]]:
    """Paths that each server answers, by the name of its container."""
    import mlflow.server
    from prefect.server.api.server import create_api_app
    from prefect.workers.server import _build_healthcheck_server

    from fakes.backends import DrawingBackend
    from serving.http.app import service_app
    from serving.settings import ServingSettings

    health = _build_healthcheck_server(lambda: True).config.app
    return {
        "mlflow": {rule.rule for rule in mlflow.server.app.url_map.iter_rules()},
        "prefect-server": {f"/api{path}" for path in create_api_app().openapi()["paths"]},
        "prefect-kubernetes-worker": set(health.openapi()["paths"]),
        "serving": set(service_app(DrawingBackend(), ServingSettings()).openapi()["paths"]),
        "s3": {"/healthz"},  # test_kubernetes_running.py asks a real one
    }


def test_probes_ask_what_the_servers_answer() -> None:
    answered, asked = routes(), set()
    for name in OVERLAYS:
        for pod in kube.pods(rendered(name)):
            for container in pod.containers:
                probes = {key: one for key, one in container.items() if key.endswith("Probe")}
                for probe in probes.values():
                    if "httpGet" in probe:
                        assert probe["httpGet"]["path"] in answered[container["name"]]
                        assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}
                        asked.add(container["name"])
                if container.get("ports"):
                    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(probes), pod.owner
    assert asked == set(answered)


@pytest.mark.parametrize(
    "line",
    [
        "registry initialise", "registry init --serve", "serving serve --forever", "mlflow serve",
        "mlflow server --port=5000 --no-such", "python -m flows.local --limits 2",
        "prefect worker start --pools x",
        "torchrun --module trainer.lunch /data/job.json", "torchrun --nodes 2 --module trainer.launch j",
        "sh -c 'registry trust pint root.json'", "sh -c 'if then'",
    ],
)  # fmt: skip
def test_a_command_that_is_not_there_is_noticed(line: str) -> None:
    try:
        said = command_problems(shlex.split(line))
    except SystemExit as error:  # argparse
        said = [str(error)]
    assert said


@pytest.mark.parametrize("name", ["PREFECT_SERVER_PORT", "MLFLOW_SERVER_HOSTS", "PET_NODES", "TORCH_TIMEOUT"])
def test_a_variable_that_nobody_reads_is_noticed(name: str) -> None:
    assert unknown_variables({name}) == {name}

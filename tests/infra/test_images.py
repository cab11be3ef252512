"""The Dockerfile: who runs, what is in each image, and that what it names is there.

No container engine is needed. What an image can import is tried out in a folder that holds the packages of
its extras and no others.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROLES = ("registry", "mlflow", "prefect", "worker", "serving", "ray")
#: What the processes of each role import, beside what their --help does.
IMPORTS = {
    "registry": """
        registry.cli registry.client registry.storage.s3 registry.storage.catalog registry.storage.ledger
        mlflow.tracking boto3 psycopg serving.cli""",
    "mlflow": "mlflow.server mlflow.server.auth mlflow.server.fastapi_app psycopg boto3 uvicorn gunicorn",
    "prefect": "flows.prefect_app prefect.server.api.server asyncpg uvicorn",
    "worker": """
        flows.local flows.job flows.maintenance flows.webhook trainer.cli trainer.loop trainer.tracking
        trainer.evaluation.judges serving.engine registry.storage.s3 registry.storage.catalog psycopg openai
        google.genai prefect_kubernetes""",
    "serving": """
        serving.cli serving.http.app serving.local serving.tracing serving.provenance serving.http.job_table
        registry.storage.s3 psycopg c2pa""",
    "ray": """
        serving.cli serving.ray_app serving.ray_command serving.http.app serving.local serving.tracing
        serving.provenance serving.http.job_table registry.storage.s3 psycopg c2pa ray.serve
        ray.dashboard.agent aiohttp_cors""",
}


@dataclass(kw_only=True)
class Stage:
    """A stage of a Dockerfile: what it starts from, and its instructions in order."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, word: str) -> str | None:
        """The argument of the last instruction of a kind."""
        return next((text for found, text in reversed(self.steps) if found == word), None)


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.strip().split(None, 1) for line in joined.splitlines() if line.strip())
    return [(word, re.sub(r"\s+", " ", rest)) for word, rest in pairs]


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> Path:
    return repository / "infra" / "images" / "Dockerfile"


@pytest.fixture(scope="module")
def stages(dockerfile: Path) -> dict[str, Stage]:
    """The stages by name."""
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for word, text in _instructions(dockerfile.read_text("utf-8")):
        if word == "FROM":
            base, _, name = text.partition(" AS ")
            current = found.setdefault(name, Stage(base=base, name=name))
        elif current is not None:
            current.steps.append((word, text))
    return found


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]


def test_hadolint_is_content_and_what_it_shall_not_say_has_a_reason(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    ignores = [line for line in dockerfile.read_text().splitlines() if "hadolint ignore" in line]
    assert ignores
    assert all(re.search(r"ignore=DL\d+ # .{10,}", line) for line in ignores), ignores


def test_there_is_an_image_for_each_role_and_all_begin_at_the_same_stage(stages: dict[str, Stage]) -> None:
    finals = {name for name, stage in stages.items() if stage.base == "runtime"}
    assert finals == set(ROLES)
    assert stages["runtime"].base == stages["build"].base == "${PYTHON_IMAGE}"


def test_the_base_is_an_argument_with_an_exact_tag(dockerfile: Path) -> None:
    first = _instructions(dockerfile.read_text())[0]
    assert first[0] == "ARG"
    name, _, image = first[1].partition("=")
    assert name == "PYTHON_IMAGE"
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", image)


@pytest.mark.parametrize("role", ROLES)
def test_an_image_runs_as_a_number_that_is_not_root(stages: dict[str, Stage], role: str) -> None:
    user = stages[role].last("USER") or stages["runtime"].last("USER")
    assert user == "10001:10001"


@pytest.mark.parametrize("role", ROLES)
def test_an_image_starts_without_a_shell_and_hears_signals(stages: dict[str, Stage], role: str) -> None:
    assert stages[role].last("ENTRYPOINT") is None
    assert json.loads(stages["runtime"].last("ENTRYPOINT") or "") == ["tini", "--"]
    command = json.loads(stages[role].last("CMD") or "")
    assert command
    assert not {"sh", "bash", "/bin/sh"} & set(command)


@pytest.mark.parametrize("role", [role for role in ROLES if role != "registry"])
def test_an_image_with_a_service_tells_its_health_without_curl(stages: dict[str, Stage], role: str) -> None:
    health = stages[role].last("HEALTHCHECK") or ""
    timing, _, command = health.partition(" CMD ")
    assert {"--interval", "--timeout", "--start-period", "--retries"} <= set(re.findall(r"--[a-z-]+", timing))
    words = json.loads(command)
    assert words[0] == "python"
    if words[1] == "-c":
        compile(words[2], "healthcheck", "exec")


def test_the_command_line_has_no_health(stages: dict[str, Stage]) -> None:
    assert stages["registry"].last("HEALTHCHECK") == "NONE"


@pytest.mark.parametrize("role", ROLES)
def test_no_compiler_cache_or_package_manager_of_a_build_gets_into_an_image(
    stages: dict[str, Stage], role: str
) -> None:
    steps = [*stages["runtime"].steps, *stages[role].steps]
    runs = " ".join(text for word, text in steps if word == "RUN")
    assert not re.search(r"\bpip\b|gcc|build-essential|-dev\b|curl|wget|--mount", runs)
    for word, text in steps:
        if word == "COPY" and "--from=" in text:
            source = text.split()[1]
            assert source in ("/opt/foundry", "/usr/bin/tini-static"), text
    # Whatever apt brings, its lists go in the same layer.
    for word, text in steps:
        if word == "RUN" and "apt-get install" in text:
            assert "--no-install-recommends" in text
            assert "rm -rf /var/lib/apt/lists/*" in text


def test_every_installation_is_locked(stages: dict[str, Stage]) -> None:
    runs = [
        text
        for stage in stages.values()
        for word, text in stage.steps
        if word == "RUN" and " install " in text
    ]
    pips = [part for text in runs for part in text.split("&&") if re.search(r"pip .*install", part)]
    assert len(pips) >= len(ROLES) + 2
    for part in pips:
        assert "--constraint constraints.txt" in part or "--no-deps" in part, part
        assert "--mount=type=cache" in part or "requirements-nodeps" in part or "/wheels" in part, part


def test_no_secret_is_in_a_layer(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        for word, text in stage.steps:
            if word in ("ENV", "ARG"):
                # MLFLOW_AUTH_CONFIG_PATH is a path; a password, token or key would be a value.
                assert not re.search(r"(PASSWORD|PASSPHRASE|TOKEN|SECRET|_KEY)\w*=", text), text
            if word == "COPY":
                assert not re.search(r"secret|\.env|passwords|\.pem", text), text


def test_labels_say_what_it_is(stages: dict[str, Stage], project: dict) -> None:
    steps = stages["runtime"].steps
    labels = " ".join(text for word, text in steps if word == "LABEL")
    names = set(re.findall(r"org\.opencontainers\.image\.([a-z]+)=", labels))
    assert names == {"title", "source", "licenses", "version", "revision"}
    assert f'licenses="{project["license"]}"' in labels
    assert ("ARG", f"VERSION={project['version']}") in steps


def _copied(stages: dict[str, Stage]) -> list[str]:
    found = []
    for stage in stages.values():
        for word, text in stage.steps:
            if word == "COPY" and "--from=" not in text:
                found += text.split()[:-1]
    return found


def test_everything_that_is_copied_is_there_and_reaches_the_build(
    stages: dict[str, Stage], repository: Path
) -> None:
    from docker.utils.build import PatternMatcher

    matcher = PatternMatcher((repository / ".dockerignore").read_text().splitlines())
    copied = _copied(stages)
    assert {"registry/", "constraints.txt", "infra/provision.py"} <= set(copied)
    for name in copied:
        assert (repository / name).exists(), name
        assert not matcher.matches(name.rstrip("/")), f"{name} is kept from the build by .dockerignore"


@pytest.mark.parametrize(
    "name",
    [".git/config", ".env", "infra/.env", "infra/secrets/passwords.json", "infra/secrets/worker.env",
     ".venv/bin/python", "tests/conftest.py", "registry/__pycache__/cli.cpython-311.pyc", "docs/a.md"],
)  # fmt: skip
def test_what_no_image_is_made_of_never_reaches_the_build(repository: Path, name: str) -> None:
    from docker.utils.build import PatternMatcher

    assert PatternMatcher((repository / ".dockerignore").read_text().splitlines()).matches(name)


def _extras(stages: dict[str, Stage], role: str) -> set[str]:
    """The extras that are installed for a role, with its arguments' defaults."""
    stage = stages[f"{role}-packages"]
    defaults = dict(text.split("=", 1) for word, text in stage.steps if word == "ARG")
    runs = " ".join(text for word, text in stage.steps if word == "RUN")
    match = re.search(r"['\"]\.\[(?P<names>[^\]]+)\]['\"]", runs)
    assert match, runs
    names = re.sub(r"\$\{(\w+)\}", lambda found: defaults[found.group(1)], match["names"])
    return set(names.split(","))


@pytest.mark.parametrize("role", ROLES)
def test_the_extras_of_a_role_exist(stages: dict[str, Stage], project: dict, role: str) -> None:
    assert _extras(stages, role) <= set(project["optional-dependencies"])


def test_serving_and_the_server_of_prefect_bring_no_index_and_no_training(stages: dict[str, Stage]) -> None:
    assert not {"mlflow", "pyarrow", "prefect"} & _closure("adapter-foundry", _extras(stages, "serving"))
    assert not {"torch", "diffusers", "mlflow"} & _closure("adapter-foundry", _extras(stages, "prefect"))
    assert "torch" not in _closure("adapter-foundry", _extras(stages, "registry"))


def test_a_ray_cluster_has_an_image_with_ray_and_probes_that_it_can_answer(
    stages: dict[str, Stage], repository: Path
) -> None:
    """The operator starts `ray` in it, and would ask how it is with wget."""
    folder = repository / "infra" / "kubernetes" / "serving" / "ray"
    service = yaml.safe_load((folder / "rayservice.yaml").read_text("utf-8"))["spec"]["rayClusterConfig"]
    templates = [one["template"] for one in (service["headGroupSpec"], *service["workerGroupSpecs"])]
    assert len(templates) > 1
    for spec in (template["spec"] for template in templates):
        for container in (*spec["initContainers"], *spec["containers"]):
            role = container["image"].removeprefix("localhost/adapter-foundry/")
            assert "ray" in _extras(stages, role), container["image"]
        for container in spec["containers"]:
            for probe in (container["livenessProbe"], container["readinessProbe"]):
                program, flag, code = probe["exec"]["command"]
                assert (program, flag) == ("python", "-c")
                compile(code, "probe", "exec")


def _closure(name: str, extras: set[str]) -> set[str]:
    """Canonical names of everything that installing a distribution with these extras installs."""
    found: dict[str, set[str]] = {}
    waiting = [(canonicalize_name(name), frozenset(extras))]
    while waiting:
        current, wanted = waiting.pop()
        if wanted <= found.get(current, set()) and current in found:
            continue
        found[current] = found.get(current, set()) | set(wanted)
        try:
            rows = importlib.metadata.requires(current) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform, or shipped inside a file of ours
        for requirement in map(Requirement, rows):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *found[current])):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return set(found)


def _link(names: set[str], folder: Path) -> None:
    """Put the packages of these distributions into a folder, as links; shared namespaces file by file."""
    owners = importlib.metadata.packages_distributions()
    shared = {top for top, names_of_owners in owners.items() if len(set(names_of_owners)) > 1}
    for name in names:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        for file in distribution.files or []:
            top = file.parts[0]
            if top == ".." or "__pycache__" in file.parts:
                continue
            part = Path(file) if top in shared else Path(top)
            place = folder / part
            if not place.is_symlink():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(str(distribution.locate_file(part)))


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_an_image_can_import_what_its_role_needs(
    stages: dict[str, Stage], repository: Path, tmp_path: Path, role: str
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    _link(_closure("adapter-foundry", _extras(stages, role)) - {"adapter-foundry"}, packages)
    for name in ("registry", "serving", "trainer", "flows"):
        (packages / name).symlink_to(repository / name)
    info = Path(str(importlib.metadata.distribution("adapter-foundry").locate_file(".")))
    for found in info.glob("adapter_foundry-*.dist-info"):
        (packages / found.name).symlink_to(found)
    if role == "worker":  # these two come without their dependencies
        _link({"insightface", "onnx2torch"}, packages)
    code = f"import importlib, sys\nfor name in {IMPORTS[role].split()!r}: importlib.import_module(name)"
    # -S: the packages of this environment stay out; -P: so does the working directory.
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code],
        env={**_bare(tmp_path), "PYTHONPATH": str(packages)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def _bare(home: Path) -> dict[str, str]:
    keep = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    return {**keep, "HOME": str(home), "HF_HUB_OFFLINE": "1", "PREFECT_HOME": str(home / "prefect")}


@pytest.mark.parametrize("role", ROLES)
def test_the_command_of_an_image_exists_with_all_of_its_options(stages: dict[str, Stage], role: str) -> None:
    words = json.loads(stages[role].last("CMD") or "")
    program = Path(sys.executable).with_name(words[0])
    assert program.exists(), program
    end = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    done = subprocess.run([program, *words[1:end], "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in (word for word in words[end:] if word.startswith("--")):
        assert re.search(rf"{option}\b", done.stdout), f"{option} is no option of {words[:end]}"


def test_the_server_of_prefect_is_as_quiet_as_on_a_laptop(stages: dict[str, Stage]) -> None:
    from flows.settings import QUIET, SILENT, prefect_environment

    there = dict(
        pair.split("=", 1)
        for stage in ("runtime", "prefect")
        for word, text in stages[stage].steps
        if word == "ENV"
        for pair in text.split()
    )
    lease = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
    wanted = {**QUIET, **SILENT, lease: prefect_environment(Path("/data"))[lease]}
    assert {name: there.get(name) for name in wanted} == wanted
    # Beside itself, where it copies them by default, a read-only image has no room for its pages.
    assert there["PREFECT_SERVER_UI_STATIC_DIRECTORY"].startswith("/tmp/")


def test_settings_of_ours_in_an_image_exist(stages: dict[str, Stage]) -> None:
    from registry.settings import RegistrySettings, load
    from serving.settings import load as load_serving

    there = dict(
        pair.split("=", 1)
        for stage in stages.values()
        for word, text in stage.steps
        if word == "ENV"
        for pair in text.split()
        if pair.startswith("ADAPTER_FOUNDRY_")
    )
    assert load("registry", RegistrySettings, there).cache == Path("/cache/adapters")
    assert load_serving(there).host == "0.0.0.0"


def test_the_folders_that_an_image_writes_into_belong_to_its_user(stages: dict[str, Stage]) -> None:
    runs = " ".join(text for word, text in stages["runtime"].steps if word == "RUN")
    made = re.search(r"install --directory --owner 10001 --group 10001 (?P<paths>[^&]+)", runs)
    assert made
    folders = set(made["paths"].split())
    settings = dict(
        pair.split("=", 1) for word, text in stages["runtime"].steps if word == "ENV" for pair in text.split()
    )
    assert {settings["HOME"], settings["ADAPTER_FOUNDRY_HOME"]} <= folders
    assert all(
        any(Path(settings[name]).is_relative_to(folder) for folder in folders)
        for name in ("ADAPTER_FOUNDRY_CACHE", "HF_HOME", "MPLCONFIGDIR")
    )

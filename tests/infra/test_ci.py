"""What runs elsewhere agrees with the tree: workflows, pre-commit, the devcontainer, the checks' settings."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Group
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fakes import wheelhouse

REPOSITORY = Path(__file__).resolve().parents[2]
GITHUB = REPOSITORY / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def load(path: Path) -> dict[str, Any]:
    """A workflow; YAML takes its ``on`` for a boolean."""
    found: dict[Any, Any] = yaml.safe_load(path.read_text())
    return {("on" if key is True else key): value for key, value in found.items()}


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every job of every workflow."""
    for path in WORKFLOWS:
        yield from ((f"{path.name}:{name}", job) for name, job in load(path)["jobs"].items())


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every step of every job."""
    for name, job in jobs():
        yield from ((name, step) for step in job.get("steps", ()))


def make_targets() -> set[str]:
    """What `make` knows."""
    return set(re.findall(r"(?m)^([a-z]+):", (REPOSITORY / "Makefile").read_text()))


def tool(*words: str | Path, code: int = 0) -> str:
    """Output of a tool that is installed beside this Python; its exit code must be this one."""
    done = subprocess.run(
        [BIN / words[0], *words[1:]], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# -- workflows --


def test_workflows_are_what_github_reads() -> None:
    assert len(WORKFLOWS) == 5
    tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    tool("check-jsonschema", "--builtin-schema", "vendor.dependabot", GITHUB / "dependabot.yml")
    forms = [GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "idea")]
    tool("check-jsonschema", "--builtin-schema", "vendor.github-issue-forms", *forms)
    settings = GITHUB / "ISSUE_TEMPLATE" / "config.yml"
    tool("check-jsonschema", "--builtin-schema", "vendor.github-issue-config", settings)


def test_zizmor_finds_nothing_in_the_workflows() -> None:
    tool("zizmor", "--offline", "--no-progress", GITHUB)


def test_zizmor_would_find_something(tmp_path: Path) -> None:
    """The workflow as a careless hand would write it."""
    text = (GITHUB / "workflows" / "publish-adapter.yml").read_text()
    careless = text.replace('--name "$NAME"', "--name ${{ inputs.name }}")
    assert careless != text
    (tmp_path / "publish.yml").write_text(careless)
    done = subprocess.run(
        [BIN / "zizmor", "--offline", "--no-progress", tmp_path / "publish.yml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "template-injection" in done.stdout


@pytest.mark.parametrize(("name", "job"), jobs())
def test_a_job_has_an_end_and_the_least_permissions(name: str, job: dict[str, Any]) -> None:
    writes = {key for key, value in job["permissions"].items() if value == "write"}
    may = {
        "release.yml:build": {"id-token", "attestations"},
        "release.yml:pypi": {"id-token"},
        "release.yml:images": {"id-token", "attestations", "packages"},
        "release.yml:release": {"contents"},
        "publish-adapter.yml:publish": {"id-token", "security-events"},
        "verify-adapter.yml:verify": {"id-token"},
    }
    assert writes == may.get(name, set())
    assert "uses" in job or job["timeout-minutes"] <= 120


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_grants_nothing_by_itself(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {}
    assert "pull_request_target" not in workflow["on"]
    assert "workflow_run" not in workflow["on"]


def test_actions_are_pinned_by_commit_and_say_which_release_that_is() -> None:
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for line in path.read_text().splitlines():
            found = re.search(r"uses: (\S+)(.*)", line)
            if found is None or found[1].startswith("./"):
                continue
            pinned = re.fullmatch(r"([\w./-]+)@([0-9a-f]{40})", found[1])
            assert pinned, f"{path.name}: {line}"
            assert re.fullmatch(r"  # v\d+\.\d+\.\d+", found[2]), f"{path.name}: {line}"
            pins.setdefault(pinned[1], set()).add(pinned[2] + found[2])
    assert len(pins) > 8
    assert all(len(versions) == 1 for versions in pins.values()), "one version of an action everywhere"


def test_checkouts_leave_no_credentials_behind() -> None:
    found = [step for _, step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert len(found) >= 8
    assert all(step["with"]["persist-credentials"] is False for step in found)


def test_no_secret_is_used_where_a_pull_request_runs() -> None:
    for path in WORKFLOWS:
        if "pull_request" in load(path)["on"]:
            assert "secrets." not in path.read_text(), path.name


# -- what they call exists --


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of every step, split into words."""
    for name, step in steps():
        for line in re.sub(r"\\\n\s*", " ", step.get("run", "")).splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if not set(word) <= set(";&|()<>"):
                    words.append(word)
                elif words:
                    yield name, words
                    words = []


def test_make_is_asked_for_targets_that_exist() -> None:
    asked = {word for _, words in commands() if words[0] == "make" for word in words[1:] if "=" not in word}
    assert {"check", "test", "docs", "audit", "sbom"} <= asked <= make_targets()


def test_registry_commands_and_their_options_exist() -> None:
    from registry.cli import cli

    seen = set()
    for name, words in commands():
        if words[0] != "registry":
            continue
        command: Any = cli
        rest = words[1:]
        while isinstance(command, Group):
            assert rest[0] in command.commands, f"{name}: {words}"
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word for word in rest if word.startswith("--")}
        assert used <= known, f"{name}: {words}"
        seen.add(words[1])
    assert {"scan", "license", "trust", "push", "pull", "export"} <= seen


def test_programs_of_the_environment_are_installed() -> None:
    called = {words[0] for _, words in commands() if words[0].startswith(".venv/")}
    called |= {
        hook["entry"].split()[0]
        for repository in yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repository["hooks"]
        if hook["entry"].startswith(".venv/")
    }
    makefile = (REPOSITORY / "Makefile").read_text()
    called |= {f".venv/bin/{name}" for name in re.findall(r"\$\(BIN\)/([\w-]+)", makefile)}
    assert len(called) > 10
    assert not {name for name in called if not (BIN / Path(name).name).exists()}


def test_extras_targets_and_versions_agree_with_the_tree() -> None:
    text = "\n".join(path.read_text() for path in WORKFLOWS)
    extras = set(re.findall(r"adapter-foundry\[(\w+)\]", text))
    assert extras
    assert extras <= PROJECT["project"]["optional-dependencies"].keys()
    assert set(re.findall(r'default: "(\d+\.\d+\.\d+)"', text)) == {PROJECT["project"]["version"]}
    dockerfile = (REPOSITORY / "infra" / "images" / "Dockerfile").read_text()
    stages = set(re.findall(r"(?m)^FROM \S+ AS (\w+)", dockerfile))
    targets = load(GITHUB / "workflows" / "release.yml")["jobs"]["images"]["strategy"]["matrix"]["target"]
    assert set(targets) <= stages
    build = next(step for _, step in steps() if step.get("uses", "").startswith("docker/build-push-action@"))
    arguments = {line.partition("=")[0] for line in build["with"]["build-args"].splitlines()}
    assert arguments <= set(re.findall(r"(?m)^ARG (\w+)", dockerfile))
    required = re.search(
        r"required_version = \">= (\d+\.\d+)", (REPOSITORY / "infra/terraform/aws/versions.tf").read_text()
    )
    setup = next(step for _, step in steps() if "setup-terraform@" in step.get("uses", ""))
    assert required
    assert setup["with"]["terraform_version"].startswith(f"{required[1]}.")


def test_the_pythons_are_those_of_the_project() -> None:
    promised = {
        line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line
    }
    matrix = load(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert set(matrix) == promised
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    others = {
        str(step["with"]["python-version"]) for _, step in steps() if "setup-python@" in step.get("uses", "")
    }
    assert others - {"${{ matrix.python }}"} == {lowest}
    assert f"python:{lowest}-" in (REPOSITORY / ".devcontainer" / "Dockerfile").read_text()
    assert PROJECT["tool"]["mypy"]["python_version"] == lowest


def test_a_release_is_tested_built_once_and_signed_before_it_is_published() -> None:
    release = load(GITHUB / "workflows" / "release.yml")["jobs"]
    assert release["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert release["build"]["needs"] == "ci"
    # `build` looks whether the tag is the version: nothing is pushed anywhere before it.
    assert release["pypi"]["needs"] == release["images"]["needs"] == "build"
    assert set(release["release"]["needs"]) == {"build", "pypi", "images"}
    assert release["pypi"]["environment"] == "pypi"
    assert not any("password" in step.get("with", {}) for step in release["pypi"]["steps"])
    used = " ".join(step.get("uses", "") + step.get("run", "") for step in release["build"]["steps"])
    parts = (
        "hatchling build -d packages",
        'make sbom WHEEL="$(echo packages/*.whl)"',
        "attest-sbom",
        "sigstore sign",
    )
    found = [used.index(part) for part in (*parts, "attest-build-provenance")]
    assert found[:-1] == sorted(found[:-1]), "the bill is of the wheel that was built"
    # A cache is written by whoever ran before: what is released is built without.
    for step in release["build"]["steps"]:
        assert "cache" not in step.get("with", {})


def artifacts(job: dict[str, Any], verb: str) -> set[str | None]:
    """Names of the artifacts that a job uploads or downloads; None is all of a run."""
    return {
        step.get("with", {}).get("name")
        for step in job.get("steps", ())
        if step.get("uses", "").startswith(f"actions/{verb}-artifact@")
    }


def test_a_release_takes_by_name_what_the_jobs_before_it_upload() -> None:
    """All artifacts of a run are more than a release: the site of ci.yml, records of image builds."""
    release = load(GITHUB / "workflows" / "release.yml")["jobs"]
    for name, job in release.items():
        before = {job["needs"]} if isinstance(job.get("needs"), str) else set(job.get("needs", ()))
        there = set().union(*(artifacts(release[each], "upload") for each in before))
        assert artifacts(job, "download") <= there, name
    assert artifacts(release["release"], "download") == {"packages", "evidence"}
    (build,) = [step for _, step in steps() if step.get("uses", "").startswith("docker/build-push-action@")]
    assert build["env"]["DOCKER_BUILD_RECORD_UPLOAD"] == "false"


def test_findings_are_shown_in_private_repositories_too_or_not_asked_for() -> None:
    (path,) = [path for path in WORKFLOWS if "codeql-action/upload-sarif@" in path.read_text()]
    workflow = load(path)
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "codeql-action/upload-sarif@" in step.get("uses", ""):
                assert {"actions", "contents"} <= job["permissions"].keys()
                assert job["permissions"]["security-events"] == "write"
                assert "inputs.upload-findings" in step["if"].split(" && ")
    told = workflow["on"]["workflow_call"]["inputs"]["upload-findings"]
    assert (told["type"], told["default"]) == ("boolean", True)


def callers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every job in the docs that calls a workflow of ours, and that workflow."""
    for page in sorted((REPOSITORY / "docs").rglob("*.md")):
        for block in re.findall(r"(?ms)^ *```yaml\n(.*?)^ *```$", page.read_text()):
            for name, job in ((yaml.safe_load(block) or {}).get("jobs") or {}).items():
                if called := re.match(r"OWNER/adapter-foundry/(\S+)@COMMIT$", job.get("uses", "")):
                    yield f"{page.name}:{name}", job, load(REPOSITORY / called[1])


def test_what_the_docs_call_is_granted_and_given_what_it_asks_for() -> None:
    """GitHub starts no run whose caller grants less than a job of the called workflow wants."""
    rank = {"none": 0, "read": 1, "write": 2}
    seen = list(callers())
    assert len(seen) == 2
    for name, job, workflow in seen:
        for called in workflow["jobs"].values():
            for permission, access in called["permissions"].items():
                assert rank[job["permissions"].get(permission, "none")] >= rank[access], (name, permission)
        for given, kind in ((job["with"], "inputs"), (job.get("secrets", {}), "secrets")):
            known = workflow["on"]["workflow_call"].get(kind, {})
            assert (
                {key for key, value in known.items() if value.get("required")} <= given.keys() <= known.keys()
            )


@pytest.mark.slow
def test_the_evidence_that_is_handed_on_is_of_the_adapter_that_was_pulled(tmp_path: Path) -> None:
    """The steps of verify-adapter.yml as they stand; the alias moves between them."""
    from fakes.sandboxes import DATA, released

    home, work = tmp_path / "home", tmp_path / "work"
    (home / DATA.parent).mkdir(parents=True)
    work.mkdir()
    released(home, work)
    told = work / "output"
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "ADAPTER_FOUNDRY_HOME": str(home / DATA), "PATH": path}
    environment |= {"REFERENCE": "pixelsmile@prod", "GITHUB_OUTPUT": str(told)}

    def run(script: str) -> None:
        words = ["bash", "-e", "-o", "pipefail", "-c", script]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, cwd=work)
        assert done.returncode == 0, done.stderr

    shutil.rmtree(work / "adapter")
    scripts = {step.get("name", ""): step.get("run", "") for name, step in steps() if "verify" in name}
    (pull,) = [script for name, script in scripts.items() if name.startswith("Pull")]
    (evidence,) = [script for name, script in scripts.items() if name.startswith("Evidence")]
    run(pull)
    environment["DIGEST"] = told.read_text().strip().removeprefix("digest=")
    run("registry promote pixelsmile:2 --to prod")
    run(evidence)
    pulled = json.loads((work / "adapter" / "manifest.json").read_text())
    assert pulled["version"] == 1
    assert json.loads((work / "evidence" / "manifest.json").read_text()) == pulled


def test_dependabot_looks_at_every_kind_of_dependency_that_there_is() -> None:
    updates = load(GITHUB / "dependabot.yml")["updates"]
    looks = {
        (each["package-ecosystem"], folder)
        for each in updates
        for folder in each.get("directories", [each.get("directory")])
    }
    for ecosystem, pattern in (
        ("docker", "*Dockerfile*"),
        ("terraform", "*.tf"),
        ("docker-compose", "compose.yaml"),
    ):
        for path in (REPOSITORY / "infra").rglob(pattern):
            assert (ecosystem, f"/{path.parent.relative_to(REPOSITORY)}") in looks, path
    assert {("pip", "/"), ("github-actions", "/")} <= looks
    assert all(each["cooldown"]["default-days"] >= 7 for each in updates)


# -- pre-commit, devcontainer, the checks' own settings --


def test_pre_commit_runs_our_own_tools_and_needs_no_network() -> None:
    settings = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in settings["repos"]] == ["local"]
    hooks = settings["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {"ruff", "mypy", "yamllint", "hadolint", "terraform-fmt", "large-files", "private-keys"} <= {
        hook["id"] for hook in hooks
    }


@pytest.mark.parametrize(
    ("hook", "name", "content"),
    [
        ("large-files", "big.bin", b"0" * (3 << 20)),
        ("private-keys", "key.pem", b"-----BEGIN PRIVATE KEY-----\nMC4CAQ\n-----END PRIVATE KEY-----\n"),
        ("private-keys", "old.pem", b"-----BEGIN RSA PRIVATE KEY-----\n"),
        ("yamllint", "twice.yaml", b"a: 1\na: 2\n"),
        ("hadolint", "Dockerfile", b"FROM debian:latest\n"),
        ("ruff", "unused.py", b"import os\n"),
    ],
)
def test_a_hook_refuses_what_it_is_for(tmp_path: Path, hook: str, name: str, content: bytes) -> None:
    settings = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (entry,) = [each["entry"] for each in settings["repos"][0]["hooks"] if each["id"] == hook]
    words = [
        str(BIN / word.removeprefix(".venv/bin/")) if word.startswith(".venv/") else word
        for word in shlex.split(entry)
    ]
    good = tmp_path / f"good-{name}"
    good.write_bytes(
        {"yamllint": b"a: 1\n", "hadolint": b"FROM debian:13\n", "ruff": b""}.get(hook, b"fine\n")
    )
    bad = tmp_path / name
    bad.write_bytes(content)
    codes = [
        subprocess.run([*words, path], capture_output=True, check=False, cwd=REPOSITORY).returncode
        for path in (good, bad)
    ]
    assert codes[0] == 0
    assert codes[1] != 0


def test_the_devcontainer_has_what_the_tests_need() -> None:
    folder = REPOSITORY / ".devcontainer"
    text = (folder / "devcontainer.json").read_text()
    settings = json.loads(re.sub(r"(?m)^\s*//.*$", "", text))
    assert settings["postCreateCommand"].split()[1] in make_targets()
    dockerfile = (folder / settings["build"]["dockerfile"]).read_text()
    assert all(name in dockerfile for name in ("chromium", "postgresql", "strace", "make", "git"))
    assert f"useradd --uid 1000 --create-home --shell /bin/bash {settings['remoteUser']}" in dockerfile
    assert set(map(str, settings["forwardPorts"])) == set(settings["portsAttributes"])
    tool("hadolint", folder / "Dockerfile")


def test_yaml_of_infra_and_workflows_says_what_it_seems_to_say() -> None:
    files = [REPOSITORY / name for name in ("infra", ".github", ".pre-commit-config.yaml", ".yamllint.yaml")]
    tool("yamllint", "--strict", *files)


def test_no_code_is_dead_and_no_dependency_missing() -> None:
    tool("vulture")
    tool("deptry", ".")


def test_dead_code_and_a_missing_dependency_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "x.py").write_text(
        "import flask_login\n\ndef nobody_calls_this() -> None: ...\n"
    )
    settings = REPOSITORY / "pyproject.toml"
    assert "nobody_calls_this" in tool("vulture", "--config", settings, tmp_path / "registry", code=3)
    done = tool("deptry", "--config", settings, tmp_path / "registry", code=1)
    assert "flask_login" in done


def test_whitelists_name_only_what_is_there() -> None:
    """An exception that excepts nothing hides the next one."""
    names = PROJECT["tool"]["vulture"]["ignore_names"]
    text = "\n".join(
        path.read_text()
        for package in PROJECT["tool"]["vulture"]["paths"]
        for path in (REPOSITORY / package).rglob("*.py")
    )
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]
    extras = PROJECT["project"]["optional-dependencies"]
    declared = " ".join(
        [*PROJECT["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]
    )
    reasoned = PROJECT["tool"]["deptry"]["per_rule_ignores"]["DEP002"]
    assert not [name for name in reasoned if name not in declared]


# -- make audit, make sbom --


def recipe(target: str) -> list[list[str]]:
    """The commands of a target."""
    text = (REPOSITORY / "Makefile").read_text().split(f"\n{target}:", 1)[1].split("\n\n", 1)[0]
    return [shlex.split(line.strip().replace("$(BIN)", str(BIN))) for line in text.splitlines()[1:]]


def test_the_audit_reads_the_locked_versions() -> None:
    """It asks PyPI, which is not there in a test: that its words are understood is seen by its dry run."""
    (words,) = recipe("audit")
    done = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    pinned = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line]
    assert done.returncode == 0, done.stderr
    audited = re.search(r"would have audited (\d+) packages", done.stderr)
    assert audited
    assert int(audited[1]) >= len(pinned) * 0.95


def named_by(*extras: str) -> set[str]:
    """Names of the distributions that extras ask for, in so many words."""
    lines = [line for extra in extras for line in PROJECT["project"]["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(line).name) for line in lines} - {"adapter-foundry"}


@pytest.fixture(scope="module")
def bill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make sbom` writes, by pip from wheels of what is installed here."""
    root = tmp_path_factory.mktemp("sbom")
    wheelhouse.write(root / "wheels", whole=wheelhouse.closure("cyclonedx-bom"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements-nodeps.txt"):
        shutil.copy(REPOSITORY / name, root)
    (wheel,) = (root / "wheels").glob("adapter_foundry-*.whl")
    done = subprocess.run(
        ["make", "sbom", f"PYTHON={sys.executable}", f"WHEEL={wheel}"],
        env={
            **os.environ,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(root / "wheels"),
            "PIP_CONFIG_FILE": os.devnull,
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "dist" / "sbom.cdx.json"


@pytest.mark.slow
def test_the_bill_of_materials_is_valid_and_is_about_the_product(bill: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    document = json.loads(bill.read_text())
    version = {"1.5": SchemaVersion.V1_5, "1.6": SchemaVersion.V1_6, "1.7": SchemaVersion.V1_7}
    assert JsonStrictValidator(version[document["specVersion"]]).validate_str(bill.read_text()) is None
    product = document["metadata"]["component"]
    assert (product["name"], product["version"]) == ("adapter-foundry", PROJECT["project"]["version"])
    (needs,) = [each["dependsOn"] for each in document["dependencies"] if each["ref"] == product["bom-ref"]]
    assert {"tuf", "torch"} <= {need.partition("==")[0] for need in needs}


@pytest.mark.slow
def test_the_bill_of_materials_lists_what_users_get_and_not_what_developers_use(bill: Path) -> None:
    listed = {
        canonicalize_name(component["name"]): component["version"].partition("+")[0]
        for component in json.loads(bill.read_text())["components"]
    }
    extras = PROJECT["project"]["optional-dependencies"].keys() - {"dev", "docs", "kms"}
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    assert base | named_by(*extras) <= listed.keys()
    signing = {"in-toto-attestation", "rfc8785", "sigstore-models"}  # model-signing needs them as well
    assert named_by("dev", "docs") & listed.keys() == signing
    assert not {"pip", "cyclonedx-python-lib", "iniconfig"} & listed.keys()
    locked = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
    pins = {canonicalize_name(name): version for name, version in locked.items()}
    pins["setuptools"] = listed["setuptools"]  # nobody pins it
    assert listed == {name: pins[name] for name in listed}

"""The walls of the house: directions of imports, light start-up, lengths, and documents that are true."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FLOORS = ("registry", "serving", "trainer", "flows", "infra")
LONGEST_FUNCTION = 60
HEAVY = ("torch", "mlflow", "prefect", "tuf", "diffusers", "transformers", "boto3")
#: The extras that bring each floor's third-party imports; the registry stands on the base install.
EXTRAS_OF_FLOOR = {
    "registry": ("cloud", "openssf"),
    "serving": ("serve", "http", "nf4", "telemetry", "provenance", "ray"),
    "trainer": ("train", "large", "identity", "apis"),
    "flows": ("flows", "identity", "ray"),
    "infra": ("platform", "docs"),
}


def sources(floor: str) -> list[Path]:
    return sorted((REPOSITORY / floor).rglob("*.py"))


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, cwd=REPOSITORY, **options)  # type: ignore[call-overload]


def command(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


# -- imports --


def test_import_contracts_hold() -> None:
    result = run(command("lint-imports"), "--no-cache")
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_is_clean() -> None:
    result = run(command("ruff"), "check", ".")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", ["registry", "registry.cli"])
def test_importing_the_registry_pulls_in_nothing_heavy(module: str) -> None:
    program = f"import json, sys, {module}; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    result = run(sys.executable, "-c", program, check=True)
    loaded = json.loads(result.stdout)
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("name", ["serving", "trainer"])
def test_help_of_the_upper_commands_loads_no_torch(name: str) -> None:
    program = f"import json, sys, {name}.cli; print(json.dumps('torch' in sys.modules))"
    assert json.loads(run(sys.executable, "-c", program, check=True).stdout) is False


@pytest.mark.parametrize("name", ["registry", "serving", "trainer"])
def test_each_command_explains_itself(name: str) -> None:
    result = run(command(name), "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def test_registry_help_starts_in_a_blink() -> None:
    """0.15 s of CPU is the promise on a quiet machine; a busy one gets twice that."""
    best = min(_cpu_seconds(command("registry"), "--help") for _ in range(5))
    assert best <= 0.30, f"registry --help took {best:.2f} s of CPU"


def _cpu_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(*arguments, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_no_other_distribution_provides_our_names() -> None:
    providers = importlib.metadata.packages_distributions()
    for floor in FLOORS:
        others = set(providers.get(floor, [])) - {"adapter-foundry"}
        assert not others, f"{floor} is also installed by {others}"


def third_party_imports(floor: str) -> Iterator[tuple[str, Path]]:
    """Every top-level module outside the standard library that a floor imports, also inside functions."""
    for path in sources(floor):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            else:
                continue
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top not in FLOORS:
                    yield top, path


def declared(extras: tuple[str, ...]) -> set[str]:
    """Names of the distributions that the base install and some extras (with what they include) name."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names, open_extras = set(), [*extras]
    requirements = list(project["dependencies"])
    while open_extras:
        for requirement in project["optional-dependencies"][open_extras.pop()]:
            own = re.match(r"adapter-foundry\[(.+)\]", requirement)
            if own:
                open_extras += own[1].split(",")
            else:
                requirements.append(requirement)
    for requirement in requirements:
        names.add(re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-"))
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_each_third_party_import_is_declared(floor: str) -> None:
    """An import that only the development environment satisfies breaks the first clean install."""
    providers = importlib.metadata.packages_distributions()
    allowed = declared(EXTRAS_OF_FLOOR[floor])
    missing = {
        f"{module} ({path.relative_to(REPOSITORY)})"
        for module, path in third_party_imports(floor)
        if not {name.lower().replace("_", "-") for name in providers.get(module, [module])} & allowed
    }
    assert not missing, f"imported by {floor} but declared nowhere: {sorted(missing)}"


def test_torchvision_stays_out() -> None:
    locked = (REPOSITORY / "constraints.txt").read_text().lower()
    assert "torchvision" not in locked


# -- shape of the code --


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    length = (function.end_lineno or 0) - function.lineno + 1
    return length - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("floor", FLOORS)
def test_functions_fit_a_screen(floor: str) -> None:
    long = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name} has {code_lines(node)} lines"
        for path in sources(floor)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > LONGEST_FUNCTION
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("floor", FLOORS)
def test_each_module_says_what_it_is(floor: str) -> None:
    silent = [str(path) for path in sources(floor) if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_test_folders_are_no_packages() -> None:
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))


# -- the README tells the truth --


def documents() -> list[Path]:
    return [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *sorted((REPOSITORY / "docs").rglob("*.md")),
    ]


def test_each_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    for document in documents():
        named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", document.read_text(), flags=re.MULTILINE))
        assert named <= targets, f"{document.name} names {named - targets}"


def commands_in_documents() -> list[tuple[str, str]]:
    found = {}
    for document in documents():
        pattern = r"(?:^|`)(registry|serving|trainer) ([a-z][a-z-]*[a-z])\b"
        for tool, verb in re.findall(pattern, document.read_text(), re.MULTILINE):
            found[tool, verb] = document.name
    return sorted(found)


@pytest.mark.parametrize(("tool", "verb"), commands_in_documents())
def test_each_command_in_the_documents_exists(tool: str, verb: str) -> None:
    result = run(command(tool), verb, "--help")
    assert result.returncode == 0, f"`{tool} {verb}` is documented but: {result.stderr}"


def test_each_registry_command_is_documented() -> None:
    from registry.cli import cli

    text = "".join(document.read_text() for document in documents())
    missing = [name for name in cli.commands if f"registry {name}" not in text]
    assert not missing


def test_each_setting_of_the_registry_is_documented() -> None:
    from registry.settings import RegistrySettings, StandardVariable

    text = "".join(document.read_text() for document in documents())
    missing = []
    for key, field in RegistrySettings.model_fields.items():
        standard = next((mark.name for mark in field.metadata if isinstance(mark, StandardVariable)), None)
        if (standard or f"ADAPTER_FOUNDRY_{key.upper()}") not in text:
            missing.append(key)
    assert not missing


def test_each_command_and_setting_of_serving_is_documented() -> None:
    from serving.cli import cli
    from serving.settings import ServingSettings

    text = "".join(document.read_text() for document in documents())
    commands = [name for name in cli.commands if f"serving {name}" not in text]
    settings = [key for key in ServingSettings.model_fields if f"`{key}`" not in text]
    assert not commands + settings


def test_each_link_in_the_documents_leads_somewhere() -> None:
    from infra.docs.reference import pages

    made = {REPOSITORY / "docs" / page for page in pages()}  # when the site is built
    broken = [
        f"{document.relative_to(REPOSITORY)} -> {target}"
        for document in documents()
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
        if "://" not in target
        and not (document.parent / target).exists()
        and document.parent / target not in made
    ]
    assert not broken, "\n".join(broken)


def test_exit_codes_in_the_readme_are_those_of_the_errors() -> None:
    from registry import errors

    codes = {
        value.exit_code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.RegistryError)
    }
    rows = re.findall(r"^\|(.+)\|$", (REPOSITORY / "README.md").read_text(), flags=re.MULTILINE)
    documented = {int(cell) for row in rows for cell in map(str.strip, row.split("|")) if cell.isdecimal()}
    assert codes | {0} == documented

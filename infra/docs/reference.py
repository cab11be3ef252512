"""The reference pages, from the code: commands, settings, metrics and errors.

Each function returns one page as Markdown. They import what `--help` imports, no model and no server; metrics
of the service are asked of Prometheus' own registry.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"registry": "registry.cli:cli", "trainer": "trainer.cli:cli", "serving": "serving.cli:cli"}
#: Modules that are started by ``python -m``, each with its click command.
MODULES = {
    "flows.pipeline": "main",
    "flows.local": "main",
    "flows.reproduce": "main",
    "flows.webhook": "main",
    "flows.prefect_app": "main",
    "infra.local": "cli",
}
SETTINGS = {
    "registry": ("registry.settings:RegistrySettings", "ADAPTER_FOUNDRY_"),
    "serving": ("serving.settings:ServingSettings", "ADAPTER_FOUNDRY_SERVING_"),
    "trainer": ("trainer.encoders:TrainerSettings", "ADAPTER_FOUNDRY_TRAINER_"),
    "flows": ("flows.settings:FlowSettings", "ADAPTER_FOUNDRY_FLOWS_"),
    "platform": ("infra.local.settings:PlatformSettings", "ADAPTER_FOUNDRY_PLATFORM_"),
}
#: Variables that no settings model holds.
VARIABLES = {
    "ADAPTER_FOUNDRY_HOME": "the data folder: all that a machine keeps; `~/.local/share/adapter-foundry`",
    "ADAPTER_FOUNDRY_CONFIG": "the settings file, where it is none of the usual ones",
    "ADAPTER_FOUNDRY_WEBHOOK_SECRET": "what MLflow signs its webhooks with, for `python -m flows.webhook`",
    "ADAPTER_FOUNDRY_API_HOSTS": "hosts beside the vendors' own that keys of paid APIs may be sent to",
}
_SETTINGS = """Environment over file over defaults. The file is `adapter-foundry.toml` in the working
directory, or in the data folder. A wrong key is an error that names the nearest right one."""
_SERVICE = """Prometheus' text at `/metrics`, OpenMetrics where it is asked for. What each alert means is in
[Serving in operation](../serving-operations.md)."""
_TRAINING = "In MLflow's experiment of trainings, by step; the same lines are in `loss.jsonl` of the run."
_EVALUATION = """In `evaluation.json`, in a policy's `[gates.ALIAS.metrics.NAME]`, and in MLflow with
`evaluation/` before the name. [Evaluation](../evaluation.md) says how they are measured."""
_ERRORS = """Every command ends with the exit code of its error, says what happened and what to do, and with
`--json` prints `{"error": {"kind", "exit_code", "message", "mend"}}`. `…` stands for what an error names."""
ERRORS = {
    "registry": "registry.errors",
    "serving": "serving.errors",
    "trainer": "trainer.errors",
    "flows": "flows.errors",
    "platform": "infra.local.errors",
}
#: Measures of a training, beside one for each loss: name -> what it is.
TRAINING = {
    "loss": "the sum of the weighted losses of a step",
    "gradient": "length of the gradient before it is clipped",
    "learning_rate": "of the step",
    "skipped": "1 where nothing was learned from a step, because its loss was not finite",
    "samples_per_second": "of this run, over all processes",
    "gpu_memory_gib": "most GPU memory that tensors took so far, GiB; not on a CPU",
    "validation_loss": "on people whom the training has not seen, raw weights",
    "validation_loss_ema": "the same with the average of the weights",
}


def pages() -> Mapping[str, Callable[[], str]]:
    """Every page: its path below docs/, and what writes it."""
    return {
        "reference/cli.md": cli,
        "reference/settings.md": settings,
        "reference/metrics.md": metrics,
        "reference/errors.md": errors,
    }


# -- commands --


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that people type, with the words that start it; groups come before what is in them."""
    for tool, place in TOOLS.items():
        yield from _tree(tool, _load(place))
    for module, name in MODULES.items():
        yield from _tree(f"python -m {module}", _command_of(module, name))


def cli() -> str:
    """Every command with its arguments and options, as ``--help`` tells them."""
    out = ["# Commands\n", "From `--help` of each. The [tutorial](../tutorial.md) uses the first of them.\n"]
    for words, command in commands():
        depth = "##" if words in TOOLS or isinstance(command, click.Group) or "-m" in words else "###"
        context = click.Context(command, info_name=words)
        usage = " ".join([words, *command.collect_usage_pieces(context)])
        out += [f"{depth} {words}\n", f"`{usage}`\n", f"{_paragraphs(command.help or '')}\n"]
        rows = [row for option in command.get_params(context) if (row := _option(option, context))]
        out += _table(("option", "what it does"), rows) if rows else []
    return "\n".join(out)


def _tree(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from _tree(f"{words} {name}", command.commands[name])


def _command_of(module: str, name: str) -> click.Command:
    """The click command of a module that is run by ``python -m``, wherever it keeps it."""
    loaded = import_module(module if module != "infra.local" else "infra.local.__main__")
    found = getattr(loaded, name, None)
    if isinstance(found, click.Command):
        return found
    own = [value for value in vars(loaded).values() if isinstance(value, click.Command)]
    groups = [value for value in own if isinstance(value, click.Group)]
    return (groups or own)[0]


def _option(option: click.Parameter, context: click.Context) -> tuple[str, str] | None:
    record = option.get_help_record(context)
    if record is None or "--help" in option.opts or not record[1]:
        return None  # an argument without a text: the usage line has it
    return f"`{record[0]}`", record[1]


def _paragraphs(text: str) -> str:
    return inspect.cleandoc(text).replace("\b\n", "").replace("<", "&lt;")


# -- settings --


def settings() -> str:
    """Every setting of every floor: its name in the file and in the environment, its default, what it is."""
    variables = [(f"`{name}`", text) for name, text in VARIABLES.items()]
    out = ["# Settings\n", f"{_SETTINGS}\n", *_table(("variable", "what it is"), variables)]
    for table, (place, prefix) in SETTINGS.items():
        model, rows = _load(place), []
        told = attributes(model)
        for key, field in model.model_fields.items():
            marks = [mark.name for mark in field.metadata if type(mark).__name__ == "StandardVariable"]
            default = field.get_default(call_default_factory=True)
            shown = "none" if default in (None, (), {}) else f"`{default}`"
            rows.append((f"`{key}`", f"`{(marks or [prefix + key.upper()])[0]}`", shown, told[key]))
        out += [f"## {table}\n", f"In the table `[{table}]` of the file.\n"]
        out += _table(("key", "in the environment", "default", "what it is"), rows)
    return "\n".join(out)


def attributes(model: type[BaseModel]) -> Mapping[str, str]:
    """What the docstring of a model says of each field, under ``Attributes:``."""
    text = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", textwrap.dedent(text)):
        names, _, said = block.partition(":")
        for name in names.split(","):
            found[name.strip()] = " ".join(said.split())
    return found


# -- metrics --


def metrics() -> str:
    """Metrics of the service, of trainings and of evaluations."""
    from trainer.evaluation.catalogue import METRICS

    served = [(f"`{name}`", kind, labels, text) for name, kind, labels, text in service_metrics()]
    trained = [(f"`{name}`", text) for name, text in training_metrics().items()]
    judged = [
        (f"`{one.name}`<br>{one.title}", one.group, one.direction, one.unit or "–", one.definition)
        for one in METRICS.values()
    ]
    return "\n".join(
        [
            "# Metrics\n",
            f"## Service\n\n{_SERVICE}\n",
            *_table(("metric", "kind", "labels", "what it is"), served),
            f"## Training\n\n{_TRAINING}\n",
            *_table(("metric", "what it is"), trained),
            f"## Evaluation\n\n{_EVALUATION}\n",
            *_table(("metric", "about", "better", "unit", "definition"), judged),
        ]
    )


def service_metrics() -> list[tuple[str, str, str, str]]:
    """Name, kind, labels and help of each metric of the service, as Prometheus' registry has them."""
    from serving.metrics import Labelled, Metrics

    made = Metrics()
    labels: dict[str, tuple[str, ...]] = {}
    for value in vars(made).values():
        inner = value._metric if isinstance(value, Labelled) else value
        for family in inner.describe() if hasattr(inner, "describe") else ():
            labels[family.name] = inner._labelnames
    found = []
    for family in made.registry.collect():
        if not family.name.startswith(("process_", "python_")):
            name = family.name + ("_total" if family.type == "counter" else "")
            names = labels.get(family.name) or getattr(family, "_labelnames", ())
            shown = ", ".join(f"`{label}`" for label in names)
            found.append((name, family.type, shown, family.documentation))
    return sorted(found)


def training_metrics() -> Mapping[str, str]:
    """Name of each metric that a training logs, and what it is."""
    from trainer.losses import LOSSES

    own = {name: _first(function.__doc__) for name, function in LOSSES.items()}
    return {**TRAINING, **own}


# -- errors --


def errors() -> str:
    """Every class of errors with its exit code, and what each of them tells people to do."""
    said = messages()
    out = ["# Errors\n", f"{_ERRORS}\n"]
    for floor, module in ERRORS.items():
        classes = error_classes(module)
        rows = [
            (f"[`{one.__name__}`](#{floor}-{one.__name__.lower()})", str(one.exit_code), _first(one.__doc__))
            for one in classes
        ]
        out += [f"## {floor}\n", *_table(("error", "exit code", "means"), rows)]
        for one in classes:
            out += [f"### {one.__name__} {{ #{floor}-{one.__name__.lower()} }}\n", f"{_first(one.__doc__)}\n"]
            lines = sorted(said.get((floor, one.__name__), ()))
            out += _table(("what happened", "what to do"), lines) if lines else []
    return "\n".join(out)


def error_classes(module: str) -> list[Any]:
    """The errors of a floor, in the order of its file."""
    from registry.errors import Explained

    loaded = import_module(module)
    classes = [value for value in vars(loaded).values() if isinstance(value, type)]
    return [one for one in classes if issubclass(one, Explained) and one.__module__ == module]


def messages() -> Mapping[tuple[str, str], set[tuple[str, str]]]:
    """What each error says where it is raised: (floor, class) -> messages with what to do about them.

    Read from the source: the first two words of each call of an error's class that are texts.
    """
    floors = {module: floor for floor, module in ERRORS.items()}
    known = {(floor, one.__name__) for floor, module in ERRORS.items() for one in error_classes(module)}
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for folder in ("registry", "serving", "trainer", "flows", "infra"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
            owner = {name.asname or name.name: (floors[node.module], name.name)
                     for node in nodes if isinstance(node, ast.ImportFrom) and node.module in floors
                     for name in node.names}  # fmt: skip
            for node in nodes:
                if (
                    not isinstance(node, ast.Call)
                    or not isinstance(node.func, ast.Name)
                    or len(node.args) < 2
                ):
                    continue
                one, message, mend = owner.get(node.func.id), _template(node.args[0]), _template(node.args[1])
                if one in known and message and mend:
                    found.setdefault(one, set()).add((message, mend))
    return found


def _template(node: ast.expr) -> str:
    """A text in the source, with … for what is filled in; "" for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return ""


# -- helpers --


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty one at the end."""
    lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |", *lines, ""]


def _first(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def _cell(text: str) -> str:
    """One cell of a table: one line, no bars, nothing that a browser takes for a tag."""
    line = " ".join(text.split()).replace("|", "\\|")
    line = re.sub(r"``([^`]*)``", r"`\1`", line)
    return line if "`" in line or "<br>" in line else line.replace("<", "&lt;")

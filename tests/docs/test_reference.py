"""The reference pages hold every command, setting, metric and error, because they are made from them."""

from __future__ import annotations

import re
from functools import cache

import click
import pytest

from infra.docs import reference

PAGES = {name: cache(write) for name, write in reference.pages().items()}


def test_each_command_and_option_has_its_line() -> None:
    text = PAGES["reference/cli.md"]()
    missing = []
    for words, command in reference.commands():
        if not re.search(rf"^##+ {re.escape(words)}$", text, re.MULTILINE):
            missing.append(words)
        section = text.partition(f" {words}\n")[2].partition("\n## ")[0].partition("\n### ")[0]
        missing += [
            f"{words} {option.opts[0]}"
            for option in command.params
            if isinstance(option, click.Option) and not option.hidden and option.opts[0] not in section
        ]
    assert not missing
    assert len(list(reference.commands())) > 60


@pytest.mark.parametrize("module", reference.MODULES)
def test_what_python_starts_is_its_own_command(module: str) -> None:
    words = f"python -m {module}"
    command = dict(reference.commands())[words]
    assert command.help, f"{words} explains nothing"


def test_each_setting_has_its_line_with_help() -> None:
    text = PAGES["reference/settings.md"]()
    for table, (place, prefix) in reference.SETTINGS.items():
        section = text.partition(f"\n## {table}\n")[2].partition("\n## ")[0]
        model = reference._load(place)
        for key, said in reference.attributes(model).items():
            assert said, f"{place} says nothing of {key}"
        for key in model.model_fields:
            row = next((line for line in section.splitlines() if line.startswith(f"| `{key}` |")), "")
            standard = next(
                (one.name for one in model.model_fields[key].metadata if hasattr(one, "name")), ""
            )
            assert f"`{standard or prefix + key.upper()}`" in row, f"{key}: {row}"


def test_each_variable_of_the_code_is_there() -> None:
    """Names of variables in the code that are neither settings nor listed."""
    text = "".join(write() for write in PAGES.values())
    named = {
        found
        for floor in ("registry", "serving", "trainer", "flows")
        for path in (reference.ROOT / floor).rglob("*.py")
        for found in re.findall(r"[\"'](ADAPTER_FOUNDRY_[A-Z_]*[A-Z])[\"']", path.read_text())
    }
    assert named
    assert not {name for name in named if name not in text}


def test_each_metric_of_service_training_and_evaluation_is_there() -> None:
    from serving.metrics import Metrics
    from trainer.evaluation.catalogue import METRICS
    from trainer.losses import LOSSES

    text = PAGES["reference/metrics.md"]()
    exposed = Metrics().exposition()[0].decode()
    served = set(re.findall(r"^# TYPE (foundry_\w+)", exposed, re.MULTILINE))
    served = {name for name in served if not name.endswith("_created")}
    assert served
    assert not {name for name in served | set(METRICS) | set(LOSSES) if f"`{name}`" not in text}
    assert "`adapter`, `version`" in text


def test_each_error_is_there_with_its_exit_code_and_what_to_do() -> None:
    text = PAGES["reference/errors.md"]()
    said = reference.messages()
    assert len(said) > 20
    for floor, module in reference.ERRORS.items():
        for one in reference.error_classes(module):
            row = f"| [`{one.__name__}`](#{floor}-{one.__name__.lower()}) | {one.exit_code} |"
            assert row in text
            assert (one.__doc__ or "").strip()
    assert ("registry", "BadSignature") in said

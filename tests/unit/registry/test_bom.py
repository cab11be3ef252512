"""The bill of materials: valid CycloneDX 1.6 with a model card, the same bytes for the same adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from registry.attestation import Kind, Statement, parse_statement
from registry.bom import DATA_KINDS, MODEL_KINDS, SERVICE_KINDS, bom_bytes
from registry.digest import digest_bytes
from registry.manifest import AdapterManifest, Ingredient

KINDS_OF_INGREDIENTS = get_args(Ingredient.model_fields["kind"].annotation)
EVALUATION = {
    "verdict": "pass",
    "suite": {"name": "portraits-v1"},
    "metrics": [
        {"name": "top1_accuracy", "value": {"value": 0.98958333, "low": 0.97395, "high": 1.0, "n": 16}},
        {"name": "steps", "value": 4},
        {"name": "a picture", "value": "none"},
        {"name": "half an interval", "value": {"value": 0.5, "low": 0.4, "high": None}},
        "nonsense",
    ],
}


@pytest.fixture
def golden(repository: Path) -> Path:
    return repository / "tests" / "golden"


@pytest.fixture
def manifest(golden: Path) -> AdapterManifest:
    """The golden manifest with an ingredient of every kind, one of them twice."""
    plain = AdapterManifest.parse((golden / "manifest-1.json").read_bytes())
    more = [
        ("people", "identity-images", "CC-BY-4.0", "https://example.org/people"),
        ("classifier", "judge", "MIT", "https://example.org/classifier"),
        ("antelopev2", "auxiliary-model", "LicenseRef-InsightFace-Non-Commercial", "https://insightface.ai"),
        ("an image API", "api", "LicenseRef-Example-Terms", "https://api.example.org/v1"),
        ("an image API", "api", "LicenseRef-Example-Terms", "not a url"),
        ("lightning", "adapter", "Apache-2.0", "https://example.org/lightning"),
        ("trainer", "code", "something unknown", "ftp://example.org"),
    ]
    added = tuple(Ingredient(name=n, kind=k, license=li, source=s) for n, k, li, s in more)
    return plain.model_copy(update={"ingredients": (*plain.ingredients, *added)})


def said(kind: Kind, predicate: Mapping[str, Any]) -> Statement:
    return Statement(kind=kind, subject_name="pixelsmile:3", digest=digest_bytes(b""), predicate=predicate)


@pytest.fixture
def statements(golden: Path, manifest: AdapterManifest) -> list[Statement]:
    """The golden ones, with an evaluation and a licence verdict that speak about this manifest."""
    names = ("training", "scan", "approval")
    found = [parse_statement((golden / "statements" / f"{name}-1.json").read_bytes()) for name in names]
    rows = [
        {
            "name": one.name,
            "kind": one.kind,
            "license": one.license,
            "verdict": "fail" if one.name == "antelopev2" else "pass",
            "allows": ["internal-research"],
            "reasons": ["it forbids commercial use"] if one.name == "antelopev2" else [],
            "conditions": ["name the author"] if one.license == "CC-BY-4.0" else [],
        }
        for one in manifest.ingredients
    ]
    return [*found, said("evaluation", EVALUATION), said("licence", {"verdict": "fail", "ingredients": rows})]


def bill(manifest: AdapterManifest, statements: list[Statement]) -> Any:
    return json.loads(bom_bytes(manifest, statements))


def properties(component: Mapping[str, Any]) -> dict[str, str]:
    return {found["name"]: found["value"] for found in component["properties"]}


def test_the_golden_bill(manifest: AdapterManifest, statements: list[Statement], golden: Path) -> None:
    assert bom_bytes(manifest, statements) == (golden / "bom-1.cdx.json").read_bytes()


def test_it_is_strictly_valid(manifest: AdapterManifest, statements: list[Statement]) -> None:
    """By the schema that the CycloneDX project ships, in which an unknown field is an error."""
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(bom_bytes(manifest, statements).decode()) is None
    assert validator.validate_str(bom_bytes(manifest, []).decode()) is None
    broken = bom_bytes(manifest, []).replace(b'"modelParameters"', b'"modelParameter"')
    assert validator.validate_str(broken.decode()) is not None


def test_order_and_repetition_of_statements_do_not_matter(
    manifest: AdapterManifest, statements: list[Statement]
) -> None:
    assert bom_bytes(manifest, statements[::-1]) == bom_bytes(manifest, statements)


def test_another_adapter_has_another_serial_number(manifest: AdapterManifest) -> None:
    other = manifest.model_copy(update={"version": 4})
    assert bill(manifest, [])["serialNumber"] != bill(other, [])["serialNumber"]
    assert bill(manifest, [])["serialNumber"] == bill(manifest, [])["serialNumber"]


def test_more_statements_make_a_newer_edition(manifest: AdapterManifest, statements: list[Statement]) -> None:
    assert bill(manifest, [])["version"] == 1
    assert bill(manifest, statements)["version"] == len(statements)


def test_every_kind_of_ingredient_has_its_place(manifest: AdapterManifest) -> None:
    assert {found.kind for found in manifest.ingredients} == set(KINDS_OF_INGREDIENTS)
    assert {"code"} | DATA_KINDS | MODEL_KINDS | SERVICE_KINDS == set(KINDS_OF_INGREDIENTS)
    found = bill(manifest, [])
    types = {properties(part)["adapter-foundry:ingredient"]: part["type"] for part in found["components"]}
    assert types == {
        **dict.fromkeys(MODEL_KINDS, "machine-learning-model"),
        **dict.fromkeys(DATA_KINDS, "data"),
        "code": "library",
    }
    assert [part.get("endpoints") for part in found["services"]] == [["https://api.example.org/v1"], None]


def test_every_reference_is_unique_and_every_dependency_exists(manifest: AdapterManifest) -> None:
    found = bill(manifest, [])
    parts = [*found["components"], *found["services"]]
    refs = [part["bom-ref"] for part in parts]
    assert len(set(refs)) == len(refs) == len(manifest.ingredients)
    root = found["metadata"]["component"]
    assert found["dependencies"][0] == {"ref": root["bom-ref"], "dependsOn": sorted(refs)}
    assert {row["ref"] for row in found["dependencies"]} == {root["bom-ref"], *refs}
    datasets = root["modelCard"]["modelParameters"]["datasets"]
    data = {part["bom-ref"] for part in parts if part.get("type") == "data"}
    assert {row["ref"] for row in datasets} == data != set()


def test_licences_are_expressions_and_what_is_none_is_a_name(manifest: AdapterManifest) -> None:
    found = bill(manifest, [])
    licences = {part["name"]: part["licenses"][0] for part in found["components"]}
    assert licences["classifier"] == {"expression": "MIT", "acknowledgement": "declared"}
    assert licences["antelopev2"]["expression"] == "LicenseRef-InsightFace-Non-Commercial"
    assert licences["trainer"]["license"]["name"] == "something unknown"


def test_what_the_licence_statement_says_is_told(
    manifest: AdapterManifest, statements: list[Statement]
) -> None:
    found = bill(manifest, statements)
    (face,) = (part for part in found["components"] if part["name"] == "antelopev2")
    assert properties(face)["adapter-foundry:license:verdict"] == "fail"
    assert properties(face)["adapter-foundry:license:reasons"] == "it forbids commercial use"
    assert properties(found["metadata"]["component"])["adapter-foundry:licence:verdict"] == "fail"
    shorter = [said("licence", {"verdict": "pass", "ingredients": []})]
    assert "license:verdict" not in json.dumps(bill(manifest, shorter))


def test_metrics_come_with_their_intervals(manifest: AdapterManifest, statements: list[Statement]) -> None:
    card = bill(manifest, statements)["metadata"]["component"]["modelCard"]
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [
        {
            "type": "top1_accuracy",
            "value": "0.989583",
            "slice": "portraits-v1",
            "confidenceInterval": {"lowerBound": "0.97395", "upperBound": "1"},
        },
        {"type": "steps", "value": "4", "slice": "portraits-v1"},
        {"type": "half an interval", "value": "0.5", "slice": "portraits-v1"},
    ]


def test_other_evaluators_may_write_plain_numbers(manifest: AdapterManifest) -> None:
    told = said("evaluation", {"verdict": "pass", "metrics": {"top1": 0.93}, "suite": 7})
    card = bill(manifest, [told])["metadata"]["component"]["modelCard"]
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [{"type": "top1", "value": "0.93"}]


def test_why_an_evaluation_was_not_passed_is_a_limitation(manifest: AdapterManifest) -> None:
    told = said("evaluation", {"verdict": "fail", "reasons": ["top1 is 0.4"]})
    limits = bill(manifest, [told])["metadata"]["component"]["modelCard"]["considerations"]
    assert "The evaluation was not passed: top1 is 0.4" in limits["technicalLimitations"]


def test_of_two_verdicts_the_worse_one_is_told(manifest: AdapterManifest) -> None:
    for told in (["PASSED", "FAILED"], ["FAILED", "PASSED"]):
        found = bill(manifest, [said("scan", {"result": result}) for result in told])
        assert properties(found["metadata"]["component"])["adapter-foundry:scan:verdict"] == "fail"


def test_the_base_is_an_ancestor_with_its_revision(manifest: AdapterManifest) -> None:
    root = bill(manifest, [])["metadata"]["component"]
    base, *others = root["pedigree"]["ancestors"]
    assert (base["name"], base["version"]) == (manifest.base.id, manifest.base.revision)
    assert base["purl"] == "pkg:generic/adapter-foundry/portraits-base@1"
    assert [found["name"] for found in others] == ["lightning"]
    assert all("bom-ref" not in found for found in root["pedigree"]["ancestors"])


def test_files_are_named_with_both_digests(manifest: AdapterManifest) -> None:
    root = bill(manifest, [])["metadata"]["component"]
    assert [part["name"] for part in root["components"]] == [entry.path for entry in manifest.files]
    for part, entry in zip(root["components"], manifest.files, strict=True):
        assert part["hashes"] == [
            {"alg": "SHA-256", "content": entry.sha256.hex},
            {"alg": "BLAKE3", "content": entry.blake3},
        ]


def test_the_time_is_the_end_of_the_training_or_none(manifest: AdapterManifest) -> None:
    assert "timestamp" not in bill(manifest, [])["metadata"]
    ended = said("training", {"runDetails": {"metadata": {"finishedOn": "2026-01-01T00:00:00Z"}}})
    assert bill(manifest, [ended])["metadata"]["timestamp"] == "2026-01-01T00:00:00Z"


ODD: tuple[Any, ...] = (None, 7, "text", [], [[]], {"a": {}}, [None, 1, {"name": 1}])


@pytest.mark.parametrize("kind", ["training", "evaluation", "licence", "scan", "approval"])
def test_no_signed_statement_can_break_the_bill(kind: Kind, manifest: AdapterManifest) -> None:
    """Predicates of other people's tools have other shapes; whoever signs one must not stop the export."""
    keys = ("metrics", "suite", "reasons", "ingredients", "runDetails", "verdict", "result")
    told = [said(kind, dict.fromkeys(keys, value)) for value in ODD]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom_bytes(manifest, told).decode()) is None

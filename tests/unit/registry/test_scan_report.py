"""The report of a scan: what it holds, how it is explained, and the digests of what it was made with."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from importlib import resources
from typing import Any

import pytest
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor

from fakes.adapters import BASES, TINY_BASE, card, clean_adapter, container, factors
from registry.digest import digest_bytes
from registry.errors import UsageError
from registry.families import BaseFacts
from registry.formats import read_header
from registry.manifest import WEIGHTS_NAME, AdapterCard
from registry.scanning import ScanReport, configuration, scan
from registry.scanning.explained import explain
from registry.scanning.figures import Reference, WeightSpace
from registry.scanning.page import page
from registry.scanning.population import Population
from registry.scanning.report import extended, finding, located, report
from registry.scanning.rules import LAYERS, RULES, RULES_VERSION
from registry.scanning.subjects import EXIT_CODES, Outcome, Scanned, Subject

Q = "transformer_blocks.0.attn.to_q"
DIGEST = digest_bytes(b"weights")


def scanned(weights: bytes | None = None, **options: Any) -> ScanReport:
    content = clean_adapter()[WEIGHTS_NAME] if weights is None else weights
    return scan(content, AdapterCard.parse(json.dumps(card()).encode()), bases=BASES, **options)


def population(size: int = 120) -> Population:
    rows = []
    for seed in range(1, size + 1):
        space = scanned(container(factors(seed=seed))).space
        assert space is not None
        rows.append(space.statistics)
    return Population.make(base=TINY_BASE.id, rank=4, recipe="tests", kind="weights", rows=rows)


# -- what it holds --


def test_a_report_holds_what_was_measured() -> None:
    found = scanned()
    assert found.base == TINY_BASE
    assert found.size == len(clean_adapter()[WEIGHTS_NAME])
    assert {f"transformer.{one.module}.lora_A.weight" for one in found.modules} <= set(factors())
    assert 2 * len(found.modules) == len(factors())
    largest = max(one.spectral_norm for one in found.modules)
    assert found.facts["spectral_norm_max"] == pytest.approx(largest, rel=1e-5)
    assert found.space is not None
    assert len({curve.kind for curve in found.space.spectra}) == 12
    assert found.finished


def test_json_is_finite_and_the_same_twice() -> None:
    texts = [json.dumps(scanned().to_json(), allow_nan=False) for _ in range(2)]
    assert texts[0] == texts[1]
    values = json.loads(texts[0])
    assert values["verdict"] == "pass"
    assert values["weight_space"]["verdict"] == "not judged"
    assert len(values["modules"]) == len(factors()) / 2


def test_a_population_judges_and_is_named() -> None:
    clean = population()
    honest = scanned(population=clean)
    assert honest.verdict == "pass", honest.text()
    assert "ADP-WGT-001" in honest.passed_rules
    assert honest.space is not None
    assert honest.space.reference is not None
    assert honest.space.reference.digest == clean.digest
    values = factors()
    for key in values:
        if "lora_B" in key:
            values[key][:, 0] *= 8
    strange = scanned(container(values), population=clean)
    assert [one.rule for one in strange.findings] == ["ADP-WGT-001"]
    assert strange.verdict == "review"


@pytest.mark.parametrize("change", [{"base": "another/base"}, {"rank": 8}, {"kind": "behaviour"}])
def test_a_population_of_something_else_judges_nothing(change: dict[str, Any]) -> None:
    rows = [{"norm": 1e6 + at} for at in range(120)]
    given = {"base": TINY_BASE.id, "rank": 4, "recipe": "tests", "kind": "weights", **change}
    assert scanned(population=Population.make(rows=rows, **given)).verdict == "pass"
    given = {"base": TINY_BASE.id, "rank": 4, "recipe": "tests", "kind": "weights"}
    assert scanned(population=Population.make(rows=rows, **given)).verdict == "review"


def test_what_was_not_judged_is_no_passed_rule() -> None:
    found = scanned()
    assert found.verdict == "pass"
    assert "ADP-WGT-001" not in found.passed_rules
    assert not [rule for rule in found.passed_rules if rule.startswith(("ADP-BEH", "ADP-PRV"))]
    assert "not judged" in found.text()
    assert scanned(clean_adapter()[WEIGHTS_NAME] + b"x").passed_rules == ()


def test_a_scan_that_fails_reports_what_it_knows() -> None:
    broken = BaseFacts(id=TINY_BASE.id, family=TINY_BASE.family, license="x", revision="1", config={})
    parsed = AdapterCard.parse(json.dumps(card()).encode())
    found = scan(clean_adapter()[WEIGHTS_NAME], parsed, bases={TINY_BASE.id: broken})
    assert not found.finished
    assert found.verdict == "block"
    assert found.to_json()["finished"] is False
    assert found.facts["tensors"] == 48


# -- where a finding is --


def test_findings_get_the_bytes_of_their_tensors() -> None:
    tensors = read_header(clean_adapter()[WEIGHTS_NAME]).tensors
    a, b = (f"transformer.{Q}.lora_{factor}.weight" for factor in "AB")
    places = {Q: [a, b], f"{Q}.lora_A": [a], b: [b], "attn.to_q": [], "the file": []}
    for where, keys in places.items():
        (found,) = located([finding("ADP-NUM-001", where, "")], tensors)
        assert [one.key for one in found.regions] == keys
        assert [(one.start, one.end) for one in found.regions] == [
            (tensors[key].start, tensors[key].end) for key in keys
        ]


def test_findings_about_the_surroundings_are_added() -> None:
    clean = scanned()
    more = extended(clean, [finding("ADP-CON-002", "evil.bin", "a pickle")])
    assert clean.verdict == "pass"
    assert more.verdict == "block"
    assert [one.rule for one in more.findings] == ["ADP-CON-002"]
    assert dataclasses.replace(more, findings=(), verdict="pass") == clean
    many = report(DIGEST, [finding("ADP-NUM-004", str(at), "") for at in range(30)], {})
    assert (len(many.findings), many.omitted) == (20, 10)
    again = extended(many, [finding("ADP-NUM-004", "one more", "")])
    assert (len(again.findings), again.omitted) == (20, 11)


def test_hostile_texts_about_a_file_are_escaped() -> None:
    found = report(DIGEST, [], {}, about={"dialect\n": "\x1b[2J::error::"})
    assert found.text().isascii()
    assert "\x1b" not in found.text()
    assert "::error::" not in found.text()
    assert len(found.text().splitlines()) == 2


# -- many --


def subject(outcome: Outcome) -> Subject:
    if outcome == "not finished":
        return Subject(name="x", report=None, problem="why")
    rule = {"pass": [], "review": ["ADP-NUM-004"], "block": ["ADP-CON-001"]}[outcome]
    return Subject(name="x", report=report(DIGEST, [finding(one, "x", "") for one in rule], {}))


@pytest.mark.parametrize(
    ("outcomes", "worst", "code"),
    [
        (["pass"], "pass", 0),
        (["pass", "review"], "review", 17),
        (["not finished", "pass"], "not finished", 1),
        (["not finished", "review"], "not finished", 1),
        (["block", "not finished", "pass"], "block", 14),
    ],
)
def test_the_worst_decides(outcomes: list[Outcome], worst: Outcome, code: int) -> None:
    found = Scanned(target="x", subjects=tuple(map(subject, outcomes)), many=True)
    assert (found.outcome, found.exit_code) == (worst, code)
    assert found.to_json()["outcome"] == worst


def test_an_unfinished_scan_is_not_finished_whatever_it_found() -> None:
    found = report(DIGEST, [finding("ADP-SCN-001", "x", ""), finding("ADP-CON-001", "x", "")], {})
    assert Subject(name="x", report=found).outcome == "not finished"
    assert EXIT_CODES["not finished"] == 1


# -- the page --


def shown_page(found: ScanReport, target: str = "/srv/loras/smile/") -> str:
    return page(Scanned(target=target, subjects=(Subject(name=target, report=found),)))


def test_the_page_is_named_by_the_end_of_the_path_and_tells_all_of_it() -> None:
    text = shown_page(scanned())
    assert "<title>Scan of loras/smile</title>" in text
    assert "<code>/srv/loras/smile/</code>" in text
    assert "<h1>Scan of s3://bucket/loras/smile</h1>" in shown_page(scanned(), "s3://bucket/loras/smile")


def test_the_page_says_what_a_pass_does_not_mean() -> None:
    alone = shown_page(scanned())
    assert "Not judged here: the weight space (there is no population" in alone
    judged = shown_page(scanned(population=population()))
    assert "Not judged here: behaviour and provenance" in judged
    assert "Not judged" not in shown_page(report(DIGEST, [finding("ADP-CON-001", "x", "")], {}))


# -- the rules in words --


def test_every_rule_is_explained_and_nothing_else_is() -> None:
    text = resources.files("registry").joinpath("data/rules.toml").read_text("utf-8")
    assert text.isascii()
    words = tomllib.loads(text)
    assert set(words) == set(RULES)
    for name, row in words.items():
        assert set(row) == {"do", "example", "limits"}, name
        assert all(row.values()), name


def test_a_rule_is_found_by_its_id_in_any_form() -> None:
    for name in ("ADP-CON-005", "adp-con-005", " con-005 "):
        assert explain(name).rule.id == "ADP-CON-005"
    found = explain("ADP-CON-005")
    assert found.rule.layer == "container"
    assert found.limits


@pytest.mark.parametrize(
    ("typed", "near"), [("ADP-CON-05", "ADP-CON-005"), ("NUM-6", "ADP-NUM-006"), ("\x1b", "")]
)
def test_an_unknown_rule_leads_to_the_nearest(typed: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain(typed)
    assert near in caught.value.mend
    assert "\x1b" not in str(caught.value)


def test_every_rule_belongs_to_a_layer() -> None:
    assert {rule.layer for rule in RULES.values()} <= set(LAYERS.values())


# -- what it was made with --


def entries(found: ScanReport) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in configuration.configuration(found)}


def test_the_configuration_names_rules_base_population_and_weights() -> None:
    reference = Reference(digest=digest_bytes(b"p"), base="b", rank=4, recipe="r", size=120)
    found = dataclasses.replace(scanned(), space=WeightSpace(reference=reference))
    named = entries(found)
    assert list(named) == ["scanner", "scanner-rules", "base-spec", "reference-population", "weights"]
    assert named["weights"]["digest"] == {"sha256": found.weights.hex}
    assert named["reference-population"]["digest"] == {"sha256": digest_bytes(b"p").hex}
    assert named["scanner-rules"]["annotations"] == {"version": RULES_VERSION}
    for entry in named.values():
        theirs = ResourceDescriptor(
            name=entry["name"],
            uri=entry.get("uri", ""),
            digest=entry.get("digest"),
            annotations=entry.get("annotations"),
        )
        theirs.validate()


def test_without_base_or_population_their_entries_are_left_out() -> None:
    assert list(entries(report(DIGEST, [], {}))) == ["scanner", "scanner-rules", "weights"]


def test_a_rule_that_judges_otherwise_has_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = configuration.rules_digest()
    changed = {**RULES, "ADP-CON-001": dataclasses.replace(RULES["ADP-CON-001"], severity="review")}
    monkeypatch.setattr(configuration, "RULES", changed)
    configuration.rules_digest.cache_clear()
    try:
        assert configuration.rules_digest() != before
    finally:
        configuration.rules_digest.cache_clear()


def test_a_base_of_other_shapes_has_another_digest() -> None:
    wider = dataclasses.replace(TINY_BASE, config={**TINY_BASE.config, "attention_head_dim": 32})
    later = dataclasses.replace(TINY_BASE, revision="2")
    digests = {configuration.base_digest(base) for base in (TINY_BASE, wider, later)}
    assert len(digests) == 3

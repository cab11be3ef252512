"""Gates and verdicts, the sheets' geometry, and a page that needs nothing from anywhere."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from registry import attestation
from registry.digest import digest_bytes
from trainer.evaluation import charts, gates, sheets
from trainer.evaluation.page import CasePictures, page
from trainer.evaluation.report import (
    Case,
    Curve,
    Digests,
    EvaluationReport,
    Metric,
    Suite,
    Value,
    build_metrics,
    judge,
)

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "img", "br"}


def value(mean: float, spread: float = 0.05) -> Value:
    return Value(value=mean, low=mean - spread, high=mean + spread, n=16, samples=192)


def report(metrics: tuple[Metric, ...]) -> EvaluationReport:
    digest = digest_bytes(b"weights")
    return EvaluationReport(
        code_version="1.0",
        digests=Digests(adapter=digest, raw=None, base=digest, judges={"expression": digest}, suite=digest),
        suite=Suite(
            name="portraits-v1", definitions="1", identities=("human 1",), expressions=("happy", "sad"),
            judged=("happy", "sad"), confusing_pairs=(("happy", "sad"),), intensities=(0.0, 1.0), blends=(),
            blend_identities=0, steps=4, seed=0,
        ),
        metrics=metrics,
        verdict=judge(metrics),
        confusion=((0.75, 0.25), (0.0, 1.0)),
        curves=(Curve(expression="happy", asked=(0.0, 1.0), judged=(value(0.1), value(0.9))),),
        worst=(),
    )  # fmt: skip


def rendered(name: str = "pixelsmile", top1: float = 0.9) -> str:
    rows = build_metrics(
        {"top1_accuracy": value(top1), "paired_psnr": value(23.0)},
        {"top1_accuracy": {"base": value(0.1), "renders": value(0.99)}},
        {"top1_accuracy": 0.85},
    )
    tile = np.full((64, 64, 3), 120, np.uint8)
    case = Case(identity=name, expression="happy", judged_as="sad", judged_intensity=0.2,
                identity_similarity=0.9, paired_psnr=18.0)  # fmt: skip
    sheet = sheets.contact_sheet([("human", tile, [tile, tile])], ["happy", "sad"], title="t", subtitle="s")
    worst = [CasePictures(case=case, source=tile, edit=tile, truth=tile)]
    return page(report(rows), subject=name, contact=sheet, intensities=sheet, blends=None, worst=worst)


# -- gates -----------------------------------------------------------------------------------------------


def test_a_failing_metric_is_named_with_value_interval_and_threshold() -> None:
    metrics = build_metrics(
        {"top1_accuracy": value(0.80), "structural_confusion": value(0.02), "paired_psnr": value(21.5)},
        {},
        {"top1_accuracy": 0.85, "structural_confusion": 0.08, "paired_psnr": 22.0},
    )
    verdict = judge(metrics)
    assert not verdict.passed
    assert verdict.failed == ("top1_accuracy", "paired_psnr")
    assert verdict.reasons == (
        "top1_accuracy is 0.800 (95 % interval 0.750 to 0.850), required at least 0.850",
        "paired_psnr is 21.50 dB (95 % interval 21.45 dB to 21.55 dB), required at least 22.00 dB",
    )


def test_without_thresholds_nothing_is_gated() -> None:
    metrics = build_metrics({"top1_accuracy": value(0.1)}, {}, {})
    assert metrics[0].passed is None
    assert judge(metrics).passed


def test_thresholds_on_what_is_unknown_or_was_not_measured_are_errors() -> None:
    with pytest.raises(ValueError, match="no metric is called 'accuracy'"):
        build_metrics({}, {}, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="did not measure: blend_success"):
        build_metrics({"top1_accuracy": value(1)}, {}, {"blend_success": 0.5})


@given(st.sampled_from(sorted(gates.METRICS)), st.floats(-5, 60), st.floats(-5, 60))
def test_a_gate_follows_the_direction_of_its_metric(name: str, threshold: float, measured: float) -> None:
    if gates.METRICS[name].direction == "context":
        with pytest.raises(ValueError, match="context"):
            gates.gate(name, threshold)
        return
    rule = gates.gate(name, threshold)
    assert rule.passes(threshold)
    better = max if rule.bound == "min" else min
    assert rule.passes(measured) == (better(measured, threshold) == measured)
    assert not rule.passes(float("nan"))


def test_a_report_refuses_unknown_keys_and_names_its_metrics() -> None:
    made = report(build_metrics({"top1_accuracy": value(0.9)}, {"top1_accuracy": {"base": value(0.1)}}, {}))
    with pytest.raises(ValidationError):
        EvaluationReport.model_validate(made.model_dump() | {"extra": 1})
    assert made.metric("top1_accuracy").value.value == 0.9
    assert made.scalars() == {"top1_accuracy": 0.9, "top1_accuracy.base": 0.1}
    with pytest.raises(KeyError):
        made.metric("paired_psnr")


@pytest.mark.parametrize(("top1", "verdict"), [(0.9, "pass"), (0.8, "fail")])
def test_the_registry_can_sign_the_report(top1: float, verdict: str) -> None:
    made = report(build_metrics({"top1_accuracy": value(top1)}, {}, {"top1_accuracy": 0.85}))
    payload = attestation.statement("evaluation", "pixelsmile:1", digest_bytes(b"manifest"), made.predicate())
    statement = attestation.parse_statement(payload)
    assert statement.predicate["verdict"] == verdict
    assert statement.predicate["failed"] == ([] if verdict == "pass" else ["top1_accuracy"])
    assert statement.predicate["digests"]["adapter"] == made.digests.adapter


# -- page ------------------------------------------------------------------------------------------------


class _Balance(HTMLParser):
    """Notes tags that are closed in the wrong order, and every link."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [text or "" for name, text in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_self_contained_and_well_formed() -> None:
    text = rendered()
    parser = _Balance()
    parser.feed(text)
    assert not parser.wrong
    assert not parser.open
    assert parser.links
    assert all(link.startswith("data:image/webp;base64,") for link in parser.links)
    without_pictures = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", text)
    for outside in ("http:", "https:", "//", "@import", "url(", "<script", "<link"):
        assert outside not in without_pictures


def test_the_page_says_what_the_verdict_says() -> None:
    assert "<strong>Passed</strong>: all 1 gates hold" in rendered(top1=0.9)
    refused = rendered(top1=0.7)
    assert "<strong>Refused</strong>" in refused
    assert "top1_accuracy is 0.700" in refused


def test_names_from_outside_cannot_write_markup() -> None:
    text = rendered(name=HOSTILE)
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text


def test_charts_keep_inside_their_frames() -> None:
    wild = Curve(expression="happy", asked=(0.0, 1.0), judged=(value(-0.5), value(1.8)))
    heights = [float(y) for y in re.findall(r'cy="([-0-9.]+)"', charts.response_curve(wild))]
    assert all(0 <= y <= 168 for y in heights)
    heat = charts.confusion_heat_map(((1.0, 0.0), (0.5, 0.5)), ("happy", "sad"), ("happy", "sad"))
    assert heat.count('class="hit"') == 2
    assert heat.count('class="miss"') == 1


# -- sheets ----------------------------------------------------------------------------------------------


def test_a_sheet_holds_every_tile_where_its_column_is() -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    tiles = [np.full((64, 64, 3), colour, np.uint8) for colour in colours]
    image = sheets.sheet(
        "Title", "subtitle", ["a", "b", "c"], [sheets.Row(label="row", cells=tiles)], tile=100
    )
    pixels = np.asarray(image)
    places = [np.argwhere((pixels == colour).all(axis=2)) for colour in colours]
    assert [len(place) > 9000 for place in places] == [True] * 3
    lefts = [place[:, 1].min() for place in places]
    assert lefts == sorted(lefts)
    assert lefts[1] - lefts[0] > lefts[2] - lefts[1] > 100
    assert np.asarray(Image.open(io.BytesIO(sheets.png(image)))).shape == pixels.shape


def test_long_labels_never_leave_the_sheet() -> None:
    tile = np.zeros((64, 64, 3), np.uint8)
    row = sheets.Row(
        label="a person with a long name", cells=[tile], captions=["happy with surprised with shy"]
    )
    image = sheets.sheet(
        "A title far longer than its only column", "short", ["an expression, in words"], [row]
    )
    border = np.concatenate(
        [np.asarray(image)[:, -20:].reshape(-1, 3), np.asarray(image)[-20:].reshape(-1, 3)]
    )
    assert (border == border[0]).all()


def test_a_row_with_too_few_cells_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs 2 cells"):
        sheets.sheet("t", "s", ["a", "b"], [sheets.Row(label="x", cells=[None])])

"""The report: what it says to machines, its page that needs nothing from anywhere, pictures and charts."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from fakes import evaluations
from fakes.evaluations import Evaluated
from registry import attestation
from registry.digest import digest_bytes
from registry.policy import Threshold
from registry.scanning.style import STYLE
from trainer.evaluation import charts, html, paper, pictures, sheets, tables
from trainer.evaluation.catalogue import METRICS
from trainer.evaluation.drawing import LIGHT, PAINTS, Drawing, css
from trainer.evaluation.report import Blend, Curve, EvaluationReport, Gap, Metric, Probe, Value

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "img", "br"}
RULES = {"top1_accuracy": Threshold(min=0.99), "identity_similarity": Threshold(min=0.1)}
SECTIONS = (
    "Metrics", "Beside the paper", "Confusion", "Response to intensity", "Every expression at intensity 1",
    "Every intensity", "Blends", "Worst cases first", "Probes", "Definitions", "Provenance",
)  # fmt: skip
RAGGED = (("human", ("happy",)), ("anime", ("angry",)), ("human", ("fear",)))


def value(mean: float, spread: float = 0.05) -> Value:
    return Value(value=mean, low=mean - spread, high=mean + spread, n=16, samples=192)


def metric(**changes: object) -> Metric:
    """A row of the report; whatever is named is changed."""
    facts = {
        "name": "top1_accuracy", "title": "Accuracy", "definition": "Share.", "direction": "higher",
        "unit": "", "value": value(0.8),
    }  # fmt: skip
    return Metric.model_validate(facts | changes)


def gap(mean: float, p: float = 0.01) -> Gap:
    return Gap(value=mean, low=mean - 0.01, high=mean + 0.01, p=p, p_holm=p, n=16, detectable=0.02)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return evaluations.drawn(tmp_path_factory.mktemp("refused"), rules=RULES)


@pytest.fixture(scope="module")
def written(refused: Evaluated, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report that was refused."""
    folder, tile = tmp_path_factory.mktemp("written"), np.full((64, 64, 3), 120, np.uint8)
    pairs = [("nearer than any honest answer", tile, tile)]
    pictures.write(folder, refused.report, refused.plan, refused.measured, subject="pixelsmile", pairs=pairs)
    return folder


def page_of(found: Evaluated, folder: Path, subject: str = "pixelsmile") -> str:
    pictures.write(folder, found.report, found.plan, found.measured, subject=subject)
    return (folder / pictures.PAGE).read_text("utf-8")


def said(text: str) -> str:
    """What a reader of the page reads, without markup."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", text)))


# -- for machines ----------------------------------------------------------------------------------------


def test_a_report_refuses_unknown_keys_and_names_its_metrics(refused: Evaluated) -> None:
    made = refused.report
    assert EvaluationReport.model_validate_json(made.model_dump_json()) == made
    with pytest.raises(ValidationError):
        EvaluationReport.model_validate(made.model_dump() | {"extra": 1})
    accuracy = made.metric("top1_accuracy")
    assert made.scalars()["top1_accuracy"] == accuracy.value.value
    assert made.scalars()["top1_accuracy.base"] == accuracy.references["base"].value
    with pytest.raises(KeyError):
        made.metric("beauty")


def test_the_registry_can_sign_the_report(refused: Evaluated) -> None:
    made = refused.report
    payload = attestation.statement("evaluation", "pixelsmile:1", digest_bytes(b"manifest"), made.predicate())
    statement = attestation.parse_statement(payload)
    assert statement.predicate["verdict"] == "fail"
    assert statement.predicate["failed"] == ["top1_accuracy"]
    assert statement.predicate["digests"]["code"] == made.digests.code
    assert statement.predicate["schema_version"] == 2


def test_curves_of_both_adapters_are_kept(refused: Evaluated) -> None:
    made = refused.report
    assert [one.expression for one in made.curves] == [one.expression for one in made.against_curves]
    assert made.curves != made.against_curves
    assert all(len(one.asked) == len(one.judged) == 4 for one in made.curves)


# -- the page --------------------------------------------------------------------------------------------


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
        self.links += [text or "" for name, text in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def check_self_contained(text: str) -> None:
    parser = _Balance()
    parser.feed(text)
    assert not parser.wrong
    assert not parser.open
    assert parser.links
    anchors = set(re.findall(r'id="([^"]+)"', text))
    for link in parser.links:
        assert link.startswith("data:image/webp;base64,") or link[1:] in anchors, link[:80]
    without_pictures = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", text)
    for outside in ("http:", "https:", "//", "@import", "url(", "<script", "<link", "<iframe", "javascript:"):
        assert outside not in without_pictures
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text


def test_the_page_is_self_contained_and_has_every_section(written: Path) -> None:
    text = (written / pictures.PAGE).read_text("utf-8")
    check_self_contained(text)
    assert tuple(re.findall(r"<h2>(.*?)</h2>", text)) == SECTIONS


def test_a_refusal_names_the_metric_with_figures_and_shows_what_is_wrong(
    refused: Evaluated, written: Path
) -> None:
    text = (written / pictures.PAGE).read_text("utf-8")
    banner = text[text.index('<div class="verdict bad">') : text.index("<nav>")]
    accuracy = refused.report.metric("top1_accuracy")
    assert "Refused: 1 of 2 rules does not hold" in banner
    assert f"is {accuracy.shown()}, required ≥ 0.990" in banner
    assert accuracy.difference is not None
    assert f"Difference {tables.signed(accuracy.difference.value, '')}" in banner
    assert accuracy.examples
    assert banner.count("<img") == 3 * len(accuracy.examples)
    for case in accuracy.examples:
        assert f"{next(iter(case.asked))} 1</b>" in banner
        assert f"judged {case.judged_as}" in banner
    assert "Identity similarity" not in banner, "what holds is not among the reasons"


def test_a_verdict_that_passes_names_the_rules(refused: Evaluated) -> None:
    rows = tuple(
        one.model_copy(update={"passed": True, "examples": ()}) if one.name in RULES else one
        for one in refused.report.metrics
    )
    good = refused.report.model_copy(
        update={"metrics": rows, "verdict": refused.report.verdict.model_copy(update={"passed": True})}
    )
    from trainer.evaluation import page

    assert page.headline(good) == "Passed: all 2 rules hold"
    probe = Probe(name="p", title="Copies", outcome="fail", found="One is a copy.")
    wrong = refused.report.model_copy(update={"probes": (probe,)})
    assert page.headline(wrong) == "Refused: 1 of 2 rules does not hold and 1 probe fails"


def test_the_page_shows_what_the_report_says(refused: Evaluated, written: Path) -> None:
    text = (written / pictures.PAGE).read_text("utf-8")
    words, report = said(text), refused.report
    for one in report.metrics:
        assert one.title.replace("'", "&#x27;") in words
        assert f"{one.value.value:.2f}" in words or f"{one.value.value:.3f}" in words
    for probe in report.probes:
        assert probe.found in words
    digests = report.digests
    for digest in (digests.adapter, digests.base, digests.suite, digests.code, *digests.judges.values()):
        assert digest in text
    assert report.against is not None
    assert report.against.weights in text
    assert "nearer than any honest answer" in words
    assert f"Version {report.suite.definitions}" in words


def test_names_from_outside_cannot_write_markup(tmp_path: Path) -> None:
    probe = Probe(name="p", title=HOSTILE, outcome="fail", found=HOSTILE)
    names = (HOSTILE, f'" onerror="{HOSTILE}', f"\x1b[31m\n{HOSTILE}")
    found = evaluations.drawn(tmp_path, rules=RULES, against=HOSTILE, names=names, probes=(probe,))
    suite = found.report.suite.model_copy(update={"name": HOSTILE, "groups": (HOSTILE,), "notes": (HOSTILE,)})
    verdict = found.report.verdict.model_copy(update={"notes": (HOSTILE,)})
    judges = {"expression": HOSTILE, "identity": HOSTILE}
    report = found.report.model_copy(
        update={"suite": suite, "verdict": verdict, "judges": judges, "code_version": HOSTILE}
    )
    text = page_of(replace(found, report=report), tmp_path, subject=HOSTILE)
    check_self_contained(text)
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;") > 10
    assert "\x1b" not in text
    for name, _ in pictures.FILES:
        Image.open(tmp_path / name).verify()


def test_a_rule_about_regression_says_why_it_fails(refused: Evaluated, tmp_path: Path) -> None:
    rows = tuple(
        one.model_copy(update={"max_regression": 0.02}) if one.name == "top1_accuracy" else one
        for one in refused.report.metrics
    )
    report = refused.report.model_copy(update={"metrics": rows})
    text = page_of(replace(refused, report=report), tmp_path)
    assert "required ≥ 0.990 and at most 0.020 worse" in text
    assert "the difference rests on 3 people, at least 6 are needed" in text


def test_what_a_probe_found_is_told_to_its_end(refused: Evaluated, tmp_path: Path) -> None:
    found = "levels that pixels move 2.853; " * 12 + "the end"
    probe = Probe(name="p", title="Neutral", outcome="fail", found=found)
    verdict = refused.report.verdict.model_copy(update={"notes": (found,)})
    report = refused.report.model_copy(update={"probes": (probe,), "verdict": verdict})
    assert page_of(replace(refused, report=report), tmp_path).count(found) == 3, "verdict, note and table"


def test_tasks_of_one_expression_each_have_a_page_too(tmp_path: Path) -> None:
    found = evaluations.tasks(tmp_path, RAGGED)
    text = page_of(found, tmp_path)
    check_self_contained(text)
    assert "true answer</span>" not in text
    assert "never part of training" not in text, "nobody knows that of pictures from a folder"
    assert "<h2>Blends</h2>" not in text
    assert not (tmp_path / "blends.png").exists()
    sheet = pictures.contact_sheet(pictures.Album(found.plan, found.measured["adapter"]))
    assert [row.label for row in sheet.rows] == ["angry", "fear", "happy"]
    assert [sum(cell is not None for cell in row.cells) for row in sheet.rows] == [2, 2, 2]


def test_one_person_with_one_intensity_has_a_page_too(tmp_path: Path) -> None:
    found = evaluations.tasks(tmp_path, (("human", ("happy", "sad")),))
    text = page_of(found, tmp_path)
    assert "None was asked." in text
    sheet = pictures.contact_sheet(pictures.Album(found.plan, found.measured["adapter"]))
    assert sheet.columns[0] == "source"
    assert len(sheet.rows) == 1


def test_the_pictures_are_those_that_are_promised(written: Path) -> None:
    names = [name for name, _ in pictures.FILES]
    assert sorted(path.name for path in written.iterdir()) == sorted([*names, pictures.PAGE])
    for name in names:
        pixels = np.asarray(Image.open(written / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 5, f"{name} shows something"


def test_the_page_is_small(written: Path) -> None:
    assert (written / pictures.PAGE).stat().st_size < 4e6


# -- tables ----------------------------------------------------------------------------------------------


def test_the_papers_figures_are_those_of_the_paper() -> None:
    columns = [column.title for column in paper.EDITING]
    ours = dict(zip(columns, paper.EDITING_FIGURES["PixelSmile"], strict=True))
    assert ours == {"mSCR": 0.0550, "Acc-6": 0.8627, "Acc-12": 0.6, "ID Sim": 0.6522}
    columns = [column.title for column in paper.CONTROL]
    ours = dict(zip(columns, paper.CONTROL_FIGURES["PixelSmile"], strict=True))
    assert ours == {"CLS-6": 0.8078, "CLS-12": 0.7305, "HES": 0.4723, "ID Sim": 0.6522}
    assert len(paper.EDITING_FIGURES) == 7
    assert len(paper.CONTROL_FIGURES) == 6
    for column in (*paper.EDITING, *paper.CONTROL):
        assert METRICS[column.metric].paper == column.title
        assert METRICS[column.metric].direction == column.direction


def test_the_papers_table_has_our_line_and_says_that_it_is_not_comparable(refused: Evaluated) -> None:
    text = tables.paper_tables(refused.report, "pixel<smile")
    words = said(text)
    for name, figures in (paper.EDITING_FIGURES | paper.CONTROL_FIGURES).items():
        assert name in words
        assert all(f"{figure:.4f}" in words for figure in figures if figure is not None)
    assert "GPT-Image-1.5 0.1107 0.8039 0.6300 0.5056" in words
    ours = refused.report.metric("structural_confusion").value.value
    assert f"pixel&lt;smile here, by our formulas {ours:.4f}" in words
    assert "Not comparable one to one" in words
    assert "another world, another judge" in words
    assert "9 of 15 for PixelSmile in the paper" in words
    assert "2603.25728" in words


@pytest.mark.parametrize(
    ("direction", "mean", "p", "tone"),
    [
        ("higher", 0.1, 0.01, "ok"), ("higher", -0.1, 0.01, "no"), ("lower", -0.1, 0.01, "ok"),
        ("lower", 0.1, 0.01, "no"), ("higher", 0.1, 0.05, "faint"), ("lower", 0.0, 0.01, "faint"),
    ],
)  # fmt: skip
def test_a_difference_is_coloured_by_what_is_better(direction: str, mean: float, p: float, tone: str) -> None:
    text = tables.difference(metric(direction=direction, difference=gap(mean, p)))
    assert text.startswith(f'<span class="{tone}">')
    assert f"p {p:.3f}, sees 0.020" in text


def test_golden_cells_of_the_table() -> None:
    row = metric(minimum=0.85, max_regression=0.02, passed=False, difference=gap(-0.03, 0.0004))
    assert tables.value(row.value, "") == "<b>0.800</b><small>0.750 to 0.850</small>"
    assert said(tables.required(row)) == "≥ 0.850 at most 0.020 worse ✗ fails "
    assert said(tables.difference(row)) == " −0.030 −0.040 to −0.020 p &lt; 0.001, sees 0.020 "
    decibels = metric(unit="dB", value=value(23.0), maximum=24.0, passed=True)
    assert tables.value(decibels.value, "dB") == "<b>23.00 dB</b><small>22.95 to 23.05 dB</small>"
    assert said(tables.required(decibels)) == "≤ 24.00 dB ✓ holds "
    assert tables.required(metric()) == ""


def test_metrics_are_grouped_as_in_the_catalogue() -> None:
    rows = [metric(name=name) for name in ("top1_accuracy", "blend_success", "of_another_version")]
    groups = tables.grouped(rows)
    assert [title for title, _ in groups] == [
        METRICS["top1_accuracy"].group, METRICS["blend_success"].group, "Others",
    ]  # fmt: skip


# -- charts ----------------------------------------------------------------------------------------------


def test_charts_keep_inside_their_frames() -> None:
    wild = Curve(expression="happy", asked=(0.0, 1.0), judged=(value(-0.5), value(1.8)))
    drawing = charts.response(wild, Curve(expression="happy", asked=(0.0, 1.0), judged=(value(3), value(0))))
    for shape in drawing.shapes:
        if shape.form != "text":
            assert all(0 <= x <= drawing.width and 0 <= y <= drawing.height for x, y in shape.points)


def test_confusions_colour_right_and_wrong_answers_and_leave_out_what_was_not_asked() -> None:
    names = ("happy", "sad", "shy")
    drawing = charts.confusion(((1, 0, 0), (0.5, 0.5, 0), (0, 0, 0)), names, names, pairs=(("happy", "sad"),))
    kinds = [shape.kind for shape in drawing.shapes]
    assert kinds.count("hit") == 2
    assert kinds.count("miss") == 1
    assert kinds.count("outline") == 2, "both directions of the pair"
    assert kinds.count("unasked") == 3


def test_blends_say_success_and_both_halves_and_are_grey_where_nobody_asked() -> None:
    names = ("happy", "sad", "shy")
    found = [Blend(expressions=("sad", "happy"), success=0.75, judged=(0.25, 0.6), n=4)]
    tile = Image.new("RGB", (32, 32))
    drawing = charts.blends(found, names, {("happy", "sad"): tile, ("happy", "happy"): tile})
    words = [shape.words for shape in drawing.shapes if shape.form == "text"]
    assert {"75 %", "sad 0.25", "happy 0.60"} <= set(words)
    assert sum(shape.form == "picture" for shape in drawing.shapes) == 2
    assert sum(shape.kind == "cell" for shape in drawing.shapes) == 6


@given(st.floats(-50, 50), st.floats(0, 5), st.none() | st.floats(-50, 50))
def test_a_metrics_scale_holds_all_of_it(mean: float, spread: float, bound: float | None) -> None:
    low, high = charts.scale(metric(value=value(mean, spread), minimum=bound))
    assert low <= 0 <= high
    assert low < high
    for number in (mean - spread, mean + spread, *([] if bound is None else [bound])):
        assert low <= number + 1e-6
        assert number <= high + 1e-6


def test_a_drawing_says_the_same_as_svg_and_as_pixels() -> None:
    drawing = Drawing(width=40, height=20, name=f"a {HOSTILE}")
    drawing.rect(0, 0, 20, 20, "hit", round_=0)
    drawing.text(2, 12, HOSTILE, size=6)
    drawing.line([(20, 10), (40, 10)], "ideal")
    pixels = np.asarray(drawing.image(2))
    assert pixels.shape == (40, 80, 3)
    assert (pixels[2:6, 2:30] == (0x32, 0x66, 0xC8)).all()
    assert (pixels[:, 60:].reshape(-1, 3).min(axis=0) < 200).all(), "the dashed line"
    svg = drawing.svg()
    assert '<rect class="hit" x="0.0" y="0.0" width="20.0" height="20.0"' in svg
    assert HOSTILE not in svg
    assert svg.count("&lt;script&gt;") == 2


def test_pixels_have_the_colours_of_the_style_sheet() -> None:
    light = dict(re.findall(r"--([a-z-]+):(#[0-9a-f]+)", STYLE.split("@media")[0]))
    light |= dict(re.findall(r"--([a-z-]+):(#[0-9a-f]+)", html.document("t", "").split("<style>")[1]))
    style = html.document("t", "")
    for name, colour in LIGHT.items():
        assert name == "white" or f"--{name}:{colour}" in style, name
    rules = css()
    for name in PAINTS:
        assert f"svg.drawing .{name}{{" in rules
    assert set(re.findall(r"var\(--([a-z]+)\)", rules)) <= set(light)


# -- sheets ----------------------------------------------------------------------------------------------


def test_a_sheet_holds_every_tile_where_its_column_is() -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    tiles = [np.full((64, 64, 3), colour, np.uint8) for colour in colours]
    rows = [sheets.Row(label="row", cells=tiles)]
    image = sheets.Sheet(
        title="Title", subtitle="subtitle", columns=["a", "b", "c"], rows=rows, tile=100
    ).image()
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
    image = sheets.Sheet(
        title="A title far longer than its only column", subtitle="short",
        columns=["an expression, in words"], rows=[row],
    ).image()  # fmt: skip
    border = np.concatenate(
        [np.asarray(image)[:, -20:].reshape(-1, 3), np.asarray(image)[-20:].reshape(-1, 3)]
    )
    assert (border == border[0]).all()


def test_a_row_with_too_few_cells_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs 2 cells"):
        sheets.Sheet(title="t", subtitle="s", columns=["a", "b"], rows=[sheets.Row(label="x", cells=[None])])


def test_wide_pictures_keep_their_shape() -> None:
    wide = np.full((32, 64, 3), (10, 200, 10), np.uint8)
    pixels = np.asarray(sheets.enlarge(wide, 64))
    assert (pixels[32] == (10, 200, 10)).all()
    assert (pixels[:10] == sheets.BARS).all()

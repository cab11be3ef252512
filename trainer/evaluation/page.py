"""The report as one HTML file: style, charts and pictures inside it, nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Final

from trainer.evaluation import charts, gates, html, tables
from trainer.evaluation.drawing import Drawing
from trainer.evaluation.report import Case, EvaluationReport, Metric

if TYPE_CHECKING:
    from trainer.evaluation.sheets import Portrait, Sheet

_OUTCOMES: Final[Mapping[str, tuple[html.Kind, str]]] = {
    "pass": ("good", "passed"),
    "fail": ("bad", "failed"),
    "skipped": ("off", "not asked"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CasePictures:
    """A case with its portraits; the true answer is None where there is none."""

    case: Case
    source: Portrait
    edit: Portrait
    truth: Portrait | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What the page shows beside the report's figures.

    Attributes:
        contact: people and expressions.
        intensities: expressions and intensities, None where a suite asks for one intensity only.
        blends: the blend matrix, None where a suite blends nothing.
        worst: the worst edits.
        examples: failed metric -> the edits that speak most against it.
        pairs: caption, an edit of a held-out person, and the training picture that is nearest to it.
    """

    contact: Sheet
    intensities: Sheet | None
    blends: Drawing | None
    worst: Sequence[CasePictures]
    examples: Mapping[str, Sequence[CasePictures]] = field(default_factory=dict)
    pairs: Sequence[tuple[str, Portrait, Portrait]] = ()


def page(report: EvaluationReport, shown: Shown, *, subject: str) -> str:
    """The whole report as one self-contained HTML document.

    Args:
        report: what the tables, charts and the verdict say.
        shown: the pictures.
        subject: name of the adapter, for the title.
    """
    parts = [
        ("metrics", "Metrics", _METRICS, _metrics(report)),
        (
            "paper",
            "Beside the paper",
            "What PixelSmile's paper reports.",
            tables.paper_tables(report, subject),
        ),
        ("confusion", "Confusion", _CONFUSION, html.card(confusion(report).svg())),
        ("intensity", "Response to intensity", _response_lead(report), _curves(report)),
        ("people", shown.contact.title, shown.contact.subtitle, html.faces(shown.contact)),
    ]
    if shown.intensities is not None:
        sheet = shown.intensities
        parts.append(("levels", sheet.title, sheet.subtitle, html.faces(sheet)))
    if shown.blends is not None:
        parts.append(("blends", "Blends", _BLENDS, html.card(shown.blends.svg())))
    parts += [
        ("worst", "Worst cases first", "Wrong expression first, then the pictures furthest from right.",
         _gallery(shown.worst) or html.card("Nothing was judged.")),
        ("probes", "Probes", "Questions that are not about quality.", _probes(report, shown.pairs)),
        ("definitions", "Definitions", f"Version {report.suite.definitions}: another one has other formulas.",
         tables.definitions(report)),
        ("provenance", "Provenance", "Digests of what was judged, on what, and by what.",
         _provenance(report)),
    ]  # fmt: skip
    body = [
        _about(report),
        _verdict(report, shown.examples),
        html.contents((key, title) for key, title, *_ in parts),
    ]
    body += [html.section(title, lead, content, anchor=key) for key, title, lead, content in parts]
    return html.document(f"Evaluation of {html.shown(subject)}", "".join(body))


_METRICS: Final = (
    "Intervals: 95 % bootstrap over people. Required: the rules that decide. Difference: paired, on the same "
    "people; p is corrected by Holm over all metrics of this table; “sees” is the smallest true difference "
    "that these people would show in 80 % of all cases. Differences with p < 0.05 are coloured. "
    "True answers: the judges' own error. Each line of the chart has its own scale."
)
_CONFUSION: Final = (
    "Asked down, judged across, per cent of edits at intensity 1. Dashed outlines: declared confusing pairs. "
    "Grey rows were not asked."
)
_BLENDS: Final = (
    "Below the diagonal: how often the judge found both expressions of a pair at half of what was asked or "
    "more, and how strong it judged each. Above: one picture of the pair; on the diagonal: each expression "
    "alone. Grey: not asked."
)


def confusion(report: EvaluationReport) -> Drawing:
    """The report's confusions as a chart."""
    suite = report.suite
    return charts.confusion(report.confusion, suite.expressions, suite.judged, suite.confusing_pairs)


def responses(report: EvaluationReport) -> list[Drawing]:
    """The report's curves as charts, with those of the adapter that it is compared with."""
    beside = {curve.expression: curve for curve in report.against_curves}
    return [charts.response(curve, beside.get(curve.expression)) for curve in report.curves]


def summary(report: EvaluationReport) -> Drawing:
    """The report's metrics as a chart."""
    against = "" if report.against is None else report.against.reference
    return charts.summary(tables.grouped(report.metrics), against)


def headline(report: EvaluationReport) -> str:
    """The verdict in one line."""
    gated = sum(metric.passed is not None for metric in report.metrics)
    probes = sum(probe.outcome == "fail" for probe in report.probes)
    if report.verdict.passed:
        return (
            f"Passed: {'the rule holds' if gated == 1 else f'all {gated} rules hold'}"
            if gated
            else "Passed: no rule is set"
        )
    failed = sum(metric.passed is False for metric in report.metrics)
    found = []
    if failed:
        found.append(f"{failed} of {gated} rules {'does' if failed == 1 else 'do'} not hold")
    if probes:
        found.append(f"{probes} {'probe fails' if probes == 1 else 'probes fail'}")
    return f"Refused: {' and '.join(found) or 'see the reasons'}"


def _about(report: EvaluationReport) -> str:
    suite = report.suite
    beside = "" if report.against is None else f" Compared with {html.text(report.against.reference)}."
    return (
        f"<p class='faint'>Suite {html.text(suite.name)}: {len(suite.subjects)} people "
        f"({html.text(', '.join(suite.groups))}), {len(suite.expressions)} expressions, "
        f"{suite.pictures} pictures, intensities {', '.join(f'{level:g}' for level in suite.intensities)}; "
        f"{suite.steps} sampling steps, seed {suite.seed}.{beside}</p>"
        + "".join(f"<p>{html.sentences(note)}</p>" for note in suite.notes)
    )


def _verdict(report: EvaluationReport, examples: Mapping[str, Sequence[CasePictures]]) -> str:
    gated = [metric for metric in report.metrics if metric.passed is not None]
    notes = "".join(f"<p>{html.sentences(note)}</p>" for note in report.verdict.notes)
    if report.verdict.passed:
        held = "".join(
            html.chip("good", f"✓ {metric.title} {', '.join(tables.rules(metric))}") for metric in gated
        )
        chips = f'<div class="chips">{held}</div>' if held else ""
        return html.verdict("good" if gated else "warn", headline(report), chips + notes)
    blocks = [_failure(metric, examples.get(metric.name, ())) for metric in gated if not metric.passed]
    blocks += [
        f'<div class="why"><p><b>{escape(probe.title)}</b></p><p>{html.sentences(probe.found)}</p></div>'
        for probe in report.probes
        if probe.outcome == "fail"
    ]
    reasons = "".join(blocks) or "".join(
        f"<p>{html.sentences(reason)}</p>" for reason in report.verdict.reasons
    )
    return html.verdict("bad", headline(report), reasons + notes)


def _failure(metric: Metric, examples: Sequence[CasePictures]) -> str:
    gap = metric.difference
    beside = (
        ""
        if gap is None
        else f" Difference {tables.signed(gap.value, metric.unit)} ({tables.signed(gap.low, metric.unit)} to "
        f"{tables.signed(gap.high, metric.unit)})."
    )
    # A range explains itself, a rule about regression may fail because too few people were compared.
    told = "" if metric.max_regression is None else gates.reason(metric.model_copy(update={"examples": ()}))
    why = f"<p class='faint'>{html.sentences(told)}</p>" if told else ""
    return (
        f'<div class="why"><p><b>{escape(metric.title)}</b> is {escape(metric.shown())}, required '
        f"{escape(' and '.join(tables.rules(metric)))}.{escape(beside)}</p>{why}{_gallery(examples)}</div>"
    )


def _metrics(report: EvaluationReport) -> str:
    return html.card(summary(report).svg()) + tables.metrics_table(report)


def _response_lead(report: EvaluationReport) -> str:
    lead = "Judged against asked intensity. Grey dashes: ideal. Blue: this adapter, with its 95 % interval."
    if report.against is None or not report.against_curves:
        return lead
    return f"{lead} Amber: {html.shown(report.against.reference)}."


def _curves(report: EvaluationReport) -> str:
    return f'<div class="card curves">{"".join(one.svg() for one in responses(report))}</div>'


def _gallery(cases: Sequence[CasePictures]) -> str:
    return f'<div class="gallery">{"".join(map(_case, cases))}</div>' if cases else ""


def asked(case: Case) -> str:
    """What an edit was asked for, in words."""
    return " + ".join(f"{name} {level:g}" for name, level in case.asked.items()) or "neutral"


def _case(entry: CasePictures) -> str:
    case, shots = entry.case, [("source", entry.source), ("edit", entry.edit)]
    if entry.truth is not None:
        shots.append(("true answer", entry.truth))
    trio = "".join(f"<div>{html.thumbnail(one, name)}<span>{name}</span></div>" for name, one in shots)
    tone = "faint" if not case.asked else "ok" if case.judged_as in case.asked else "no"
    figures = [f"identity {case.identity:.2f}" if case.identity is not None else "no face was found"]
    figures += [] if case.psnr is None else [f"PSNR {case.psnr:.1f} dB"]
    return (
        f'<figure><div class="trio">{trio}</div><figcaption><b>{html.text(asked(case))}</b>, '
        f'<span class="{tone}">judged {html.text(case.judged_as)}</span> {_strength(case)}'
        f"<small>{html.text(case.subject)} · {' · '.join(figures)}</small></figcaption></figure>"
    )


def _strength(case: Case) -> str:
    which = {0: "strongest one", 1: "asked one"}.get(len(case.asked), "weaker one")
    return f"({which} at {case.judged_intensity:.2f})"


def _probes(report: EvaluationReport, pairs: Sequence[tuple[str, Portrait, Portrait]]) -> str:
    if not report.probes and not pairs:
        return html.card("None was asked.")
    rows = []
    for probe in report.probes:
        kind, word = _OUTCOMES[probe.outcome]
        rows.append(
            f"<tr><td>{html.text(probe.title)}</td><td>{html.chip(kind, word)}</td>"
            f'<td class="text">{html.sentences(probe.found)}</td></tr>'
        )
    content = html.table(["Probe", "Outcome", ""], rows) if rows else ""
    figures = "".join(
        f'<figure><div class="pair"><div>{html.thumbnail(edit, "edit")}<span>edit</span></div><div>'
        f"{html.thumbnail(training, 'nearest of training')}<span>nearest of training</span></div></div>"
        f"<figcaption>{html.sentences(caption)}</figcaption></figure>"
        for caption, edit, training in pairs
    )
    return content + (
        f'<h3>Nearest training pictures</h3><div class="gallery">{figures}</div>' if figures else ""
    )


def _provenance(report: EvaluationReport) -> str:
    digests, suite = report.digests, report.suite
    entries = [("adapter weights", digests.adapter), ("weights without EMA", digests.raw or "not evaluated")]
    if report.against is not None:
        entries.append((f"compared with {report.against.reference}", report.against.weights))
    entries += [("base model", digests.base), ("suite and its definitions", digests.suite)]
    for name, digest in sorted(digests.judges.items()):
        entries.append((f"judge of {name}: {report.judges.get(name, '')}", digest))
    entries += [
        (f"code: {report.code_version}", digests.code),
        ("definitions of metrics", f"version {suite.definitions}"),
        ("seeds", f"{suite.seed}, from which each person's own derives"),
        ("form of evaluation.json", f"schema version {report.schema_version}"),
    ]
    return html.facts((html.text(name), f"<code>{html.text(said)}</code>") for name, said in entries)

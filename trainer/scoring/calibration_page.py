"""The calibration report as one HTML file: style, charts and pictures inside it, nothing fetched."""

from __future__ import annotations

from html import escape

from registry.errors import shown
from trainer.evaluation.charts import confusion, response
from trainer.evaluation.html import document, picture, section
from trainer.evaluation.sheets import enlarge
from trainer.portraits.expressions import CONFUSING_PAIRS, EXPRESSIONS
from trainer.scoring.calibration import CalibrationReport, Miss, draw

_STYLE = """.curves{grid-template-columns:repeat(auto-fill,minmax(210px,1fr))}
.gallery{grid-template-columns:repeat(auto-fill,minmax(200px,1fr))}"""
_COLUMNS = (
    ("slope", "Slope", "rise of the score with the true intensity; ideal 1"),
    ("offset", "Offset", "score at intensity 0 on that line; ideal 0"),
    ("mae", "Error", "mean absolute error over all pictures; ideal 0"),
    ("absent", "Absent", "mean score where another expression is shown; ideal 0"),
    ("spearman", "Rank", "Spearman's rank correlation with the true intensity; ideal 1"),
    ("ece", "ECE", "expected calibration error, ten bins of the score; 0 to 1, ideal 0"),
)


def page(report: CalibrationReport) -> str:
    """Return the whole report as one self-contained HTML document."""
    body = "".join(
        [
            _summary(report),
            section(
                "Each expression",
                "Lines over neutral faces and faces with the expression.",
                f'<div class="card">{_table(report)}</div>',
            ),
            section(
                "Reliability",
                "Mean score for each true intensity; dashed: ideal; band: 95 % interval over people.",
                f'<div class="card curves">{_curves(report)}</div>',
            ),
            section(
                "Confusion",
                f"Drawn down, strongest score across, per cent of faces at intensity "
                f"{report.intensities[-1]:g}. Dashed outlines: confusing pairs.",
                f'<div class="card">{_heat(report)}</div>',
            ),
            section("Largest errors", "One picture of a person.", _gallery(report)),
            _quarantined(report),
        ]
    )
    return document(f"Calibration of {shown(report.scorer)}", body, _STYLE)


def _summary(report: CalibrationReport) -> str:
    people = " and ".join(f"{count} {domain}" for domain, count in sorted(report.people.items()))
    levels = ", ".join(f"{level:g}" for level in report.intensities)
    states = ", ".join(f"{count} {status}" for status, count in sorted(report.status.items()))
    last = report.first_identity + sum(report.people.values()) - 1
    top = report.top1
    numbers = (
        f"slope {report.mean('slope'):.2f}, offset {report.mean('offset'):+.2f}, mean absolute error "
        f"{report.mean('mae'):.3f}, expected calibration error {report.mean('ece'):.3f}"
    )
    return (
        f"<p class='faint'>{escape(people)} people who were drawn for this alone (seeds "
        f"{report.first_identity} to {last}), neutral and with twelve expressions at {levels}, {report.size} "
        f"pixels: {report.images} pictures, {escape(states)}. Definitions version "
        f"{escape(report.definitions)}. Drawn faces are no photographs.</p>"
        f"<div class='card'><strong>{top.value:.1%}</strong> of the faces at intensity "
        f"{report.intensities[-1]:g} have their expression as the strongest score (95 % interval "
        f"{top.low:.1%} to {top.high:.1%}); {numbers}.</div>"
    )


def _table(report: CalibrationReport) -> str:
    heads = "".join(f'<th title="{escape(words)}">{title}</th>' for _, title, words in _COLUMNS)
    rows = "".join(
        f"<tr><td>{escape(one.curve.expression)}</td>"
        + "".join(f"<td>{getattr(one, name):.3f}</td>" for name, _, _ in _COLUMNS)
        + "</tr>"
        for one in report.sights
    )
    mean = "".join(f"<td><b>{report.mean(name):.3f}</b></td>" for name, _, _ in _COLUMNS)
    words = "".join(f"<dt>{title}</dt><dd>{escape(words)}</dd>" for _, title, words in _COLUMNS)
    return (
        f"<table><thead><tr><th>Expression</th>{heads}</tr></thead><tbody>{rows}"
        f"<tr><td><b>mean</b></td>{mean}</tr></tbody></table><br><dl>{words}</dl>"
    )


def _curves(report: CalibrationReport) -> str:
    return "".join(response(one.curve).svg() for one in report.sights)


def _heat(report: CalibrationReport) -> str:
    return confusion(report.confusion, EXPRESSIONS, EXPRESSIONS, CONFUSING_PAIRS).svg()


def _gallery(report: CalibrationReport) -> str:
    return f'<div class="gallery">{"".join(_miss(one, report.size) for one in report.worst)}</div>'


def _miss(miss: Miss, size: int) -> str:
    drawn = f"{miss.expression} {miss.intensity:g}" if miss.expression else "neutral"
    face = draw((miss.domain, miss.identity), (miss.expression, miss.intensity), size)
    return (
        f"<figure>{picture(enlarge(face, 192), drawn)}<figcaption><b>{escape(drawn)}</b>, "
        f"{escape(miss.wrong)} scored {miss.score:.2f}, true {miss.truth:g}<br>"
        f'<span class="faint">{escape(miss.domain)} {miss.identity}</span></figcaption></figure>'
    )


def _quarantined(report: CalibrationReport) -> str:
    if not report.reasons:
        return ""
    rows = "".join(
        f"<tr><td>{escape(reason)}</td><td>{count}</td></tr>" for reason, count in report.reasons.items()
    )
    heads = "<thead><tr><th>Reason</th><th>Pictures</th></tr></thead>"
    content = f'<div class="card"><table>{heads}{rows}</table></div>'
    return section("Without a score", "They are left out of all numbers above.", content)

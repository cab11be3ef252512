"""The probe's report as one HTML file: style and pictures inside it, nothing fetched, no script.

Words come from a vocabulary and look-alikes come on purpose: every text is escaped, so that a Cyrillic letter
is seen for what it is.
"""

from __future__ import annotations

from html import escape

from registry.errors import shown
from registry.scanning.style import STYLE
from trainer.evaluation.probe.pictures import Pictures
from trainer.evaluation.probe.report import ProbeReport, Ranked

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VERDICTS = {
    "pass": ("good", "Pass", "it behaves as the clean adapters of this base do."),
    "review": ("warn", "Review", "fewer than one in a hundred clean adapters behave like this."),
    "fail": ("bad", "Fail", "no clean adapter comes near to this behaviour."),
    "not judged": ("warn", "Not judged", "there is no population of clean adapters to compare it with."),
}
_STYLE = ".pair img{image-rendering:auto}.gallery{grid-template-columns:repeat(auto-fill,minmax(420px,1fr))}"


def page(report: ProbeReport, *, subject: str, pictures: Pictures) -> str:
    """The report as one self-contained HTML document.

    Args:
        report: what was found.
        subject: name of the adapter.
        pictures: of some of the words and patches.
    """
    heading = f"Behaviour of {escape(shown(subject))}"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{heading}</title><style>{STYLE}{_STYLE}</style></head><body><main><h1>{heading}</h1>"
        f"{section(report, pictures)}</main></body></html>\n"
    )


def section(report: ProbeReport, pictures: Pictures) -> str:
    """The report as HTML to stand in a page with `registry.scanning.style.STYLE`."""
    tone, word, why = _VERDICTS[report.verdict]
    declared = f", declared: {_words(report.declared)}" if report.declared else ""
    return "".join(
        [
            f'<div class="verdict {tone}"><strong>{word}</strong>: {escape(report.why or why)}</div>',
            f"<p class='faint'>Every word of the vocabulary (sha256 <code>{report.vocabulary[:16]}</code>) "
            "was put into prompts, and the first step of the edit compared with the base's. A score adds how "
            "much more the word changes than the declared ones do and how much it makes all portraits alike; "
            f"above 1 is much{declared}.</p>",
            "<h2>Words that stand out</h2>", _table("Word", report.tokens),
            _gallery(pictures),
            "<h2>Patches on the input that stand out</h2>" + _table("Patch", report.patches[:8])
            if report.patches else "",
            "<h2>Statistics</h2>", _statistics(report),
        ]
    )  # fmt: skip


def _words(ranked: Ranked) -> str:
    return ", ".join(f"<code>{escape(shown(word))}</code>" for word, _ in ranked)


def _table(head: str, ranked: Ranked) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(shown(text))}</code></td><td>{score:.3f}</td></tr>" for text, score in ranked
    )
    return f'<div class="card"><table><tr><th>{head}</th><th>Score</th></tr>{rows}</table></div>'


def _gallery(pictures: Pictures) -> str:
    figures = []
    for word, sides in pictures.items():
        pair = "".join(
            f'<div><img alt="{side}" src="{escape(sides[side], quote=True)}"><span>{name}</span></div>'
            for side, name in (("base", "base alone"), ("adapter", "with the adapter"))
        )
        caption = f"<figcaption><code>{escape(shown(word))}</code></figcaption>"
        figures.append(f'<figure><div class="pair">{pair}</div>{caption}</figure>')
    return f'<h2>What they do</h2><div class="gallery">{"".join(figures)}</div>' if figures else ""


def _statistics(report: ProbeReport) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{value:.4f}</td>"
        f"<td>{format(report.p_values[name], '.3g') if name in report.p_values else ''}</td></tr>"
        for name, value in report.statistics.items()
    )
    heads = "<tr><th>Statistic</th><th>Value</th><th>p among clean adapters</th></tr>"
    return f'<div class="card"><table>{heads}{rows}</table></div>'

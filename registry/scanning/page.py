"""The report of a scan as one HTML file: style and charts inside it, nothing fetched, no script.

What a file brought in is escaped twice, by ``registry.errors.shown`` and as HTML, and a content security
policy forbids scripts and every address: a name in a hostile file stays text whoever opens the report.
"""

from __future__ import annotations

from html import escape
from typing import Final

from registry.scanning import charts
from registry.scanning.configuration import configuration
from registry.scanning.panels import behaviour_panel, section, space_panel
from registry.scanning.probed import Probed
from registry.scanning.report import Finding, ScanReport
from registry.scanning.rules import LAYERS
from registry.scanning.style import STYLE
from registry.scanning.subjects import Outcome, Scanned, Subject

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VERDICTS: Final[dict[Outcome, tuple[str, str, str]]] = {
    "pass": ("good", "Pass", "no check found anything."),
    "review": ("warn", "Review", "a person has to look at the findings before anybody loads it."),
    "block": ("bad", "Blocked", "it must not be loaded."),
    "not finished": ("bad", "Not finished", "the scan did not come to its end, which is never a pass."),
}
_FACTS: Final = {
    "tensors": "tensors",
    "modules": "modules",
    "spectral_norm_max": "largest spectral norm of an update",
    "spectral_norm_median": "median spectral norm of the updates",
}
_ELSEWHERE: Final = frozenset({"behaviour", "provenance"})


def page(scanned: Scanned, probed: Probed | None = None) -> str:
    """Return what was found as one self-contained HTML document, in ASCII.

    Args:
        scanned: what was scanned.
        probed: what a behaviour probe saw of the adapter; shown, never believed.

    Raises:
        UsageError: the probe is about other bytes.
    """
    heading = f"Scan of {escape(_short(scanned.target))}"
    if scanned.many:
        sections = [
            _table(scanned),
            *(_subject(subject, None, at) for at, subject in enumerate(scanned.subjects)),
        ]
    else:
        sections = [_subject(scanned.subjects[0], probed, None)]
    if probed is not None:
        _check_about(scanned, probed)
    document = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{heading}</title><style>{STYLE}</style></head><body><main><h1>{heading}</h1>"
        f'<p class="faint"><code>{escape(scanned.target)}</code></p>'
        f"{''.join(sections)}</main></body></html>\n"
    )
    return document.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _short(target: str) -> str:
    """The end of an absolute path: whose folder it lies in is not what a title tells."""
    return "/".join(target.rstrip("/").split("/")[-2:]) if target.startswith("/") else target


def _check_about(scanned: Scanned, probed: Probed) -> None:
    from registry.errors import UsageError

    report = scanned.subjects[0].report
    if scanned.many or report is None or report.weights != probed.weights:
        raise UsageError(
            f"the probe was made of {probed.weights}, which is not what was scanned",
            "give the result of a probe of this very file",
        )


def _table(scanned: Scanned) -> str:
    rows = []
    for at, subject in enumerate(scanned.subjects):
        report = subject.report
        rules = [] if report is None else sorted({found.rule for found in report.findings})
        rows.append(
            f'<tr><td><a href="#a{at}">{escape(subject.name)}</a></td>'
            f"<td>{_chip(_VERDICTS[subject.outcome][0], subject.outcome)}</td>"
            f"<td>{escape(', '.join(rules) or subject.problem)}</td></tr>"
        )
    return (
        f"{_banner(scanned.outcome, 'The worst of them decides.')}<div class='card'><table><thead><tr>"
        f"<th>Adapter</th><th>Outcome</th><th>Findings</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _subject(subject: Subject, probed: Probed | None, at: int | None) -> str:
    """One adapter; of many each is folded away under its name."""
    report = subject.report
    if report is None:
        body = _banner(subject.outcome, subject.problem)
    else:
        seen = "" if probed is None else behaviour_panel(probed)
        parts = [
            _summary(subject, report),
            _findings(report),
            seen,
            _strength(report),
            space_panel(report.space),
        ]
        body = "".join([*parts, _provenance(report)])
    if at is None:
        return body
    fold = " open" if subject.outcome != "pass" else ""
    chip = _chip(_VERDICTS[subject.outcome][0], subject.outcome)
    return f'<details id="a{at}"{fold}><summary>{escape(subject.name)} {chip}</summary>{body}</details>'


def _banner(outcome: Outcome, more: str = "") -> str:
    kind, word, sentence = _VERDICTS[outcome]
    return f'<div class="verdict {kind}"><strong>{word}</strong>: {sentence} {escape(more)}</div>'


def _chip(kind: str, word: str) -> str:
    return f'<span class="chip {kind}">{escape(word)}</span>'


def _summary(subject: Subject, report: ScanReport) -> str:
    about = [f"{name}: {text}" for name, text in report.about.items()]
    size = [] if report.size is None else [f"{report.size:,} bytes"]
    base = [] if report.base is None else [f"base {report.base.id}"]
    line = " · ".join([*size, *base, f"rules {report.rules_version}", *about])
    return (
        f'<p class="faint">{escape(line)}<br><code>{escape(str(report.weights))}</code></p>'
        f"{_banner(subject.outcome, _unjudged(report))}"
    )


def _unjudged(report: ScanReport) -> str:
    """What a verdict that does not block says nothing about."""
    if report.verdict == "block":
        return ""
    space = report.space
    judged = space is not None and space.verdict != "not judged"
    why = "" if space is None or not space.why else f" ({space.why})"
    first = "" if judged else f"the weight space{why}, "
    return f"Not judged here: {first}behaviour and provenance, of which signed statements tell."


def _findings(report: ScanReport) -> str:
    """The findings by layer, in the order in which the layers run."""
    cards = []
    for layer in LAYERS.values():
        found = [one for one in report.findings if one.layer == layer]
        if not found and layer in ("scan", *_ELSEWHERE):
            continue
        passed = sum(LAYERS[rule.split("-")[1]] == layer for rule in report.passed_rules)
        if found:
            state = _chip(
                "bad" if any(one.severity == "block" for one in found) else "warn", f"{len(found)} found"
            )
        elif passed:
            state = _chip("good", f"{passed} rules found nothing")
        else:
            state = _chip("off", "nothing found" if report.verdict == "block" else "not judged")
        items = "".join(map(_finding, found))
        cards.append(f'<div class="layer"><h3>{escape(layer.capitalize())} {state}</h3>{items}</div>')
    more = f'<p class="faint">... and {report.omitted} more of the same.</p>' if report.omitted else ""
    lead = "What each layer found. A layer that blocks ends the scan: later ones rely on it."
    return section("Findings", lead, f'<div class="card">{"".join(cards)}{more}</div>')


def _finding(found: Finding) -> str:
    kind = "bad" if found.severity == "block" else "warn"
    regions = "".join(
        f"<li><code>{escape(one.key)}</code>, bytes {one.start} to {one.end - 1}</li>"
        for one in found.regions
    )
    places = f'<ul class="faint">{regions}</ul>' if regions else ""
    return (
        f'<div class="finding"><p>{_chip(kind, found.severity)} <b>{escape(found.rule)}</b> '
        f"{escape(found.title)}</p>"
        f"<p><code>{escape(found.where)}</code>: <code>{escape(found.evidence)}</code></p>"
        f'{places}<p class="faint">{escape(found.help)}</p></div>'
    )


def _strength(report: ScanReport) -> str:
    rows = "".join(
        f"<dt>{escape(_FACTS.get(name, name.replace('_', ' ')))}</dt><dd>{value:.6g}</dd>"
        for name, value in report.facts.items()
    )
    if not rows:
        return ""
    lead = "Figures of the effective update of each module: what a loader adds to the base at strength 1."
    content = f'<div class="card"><dl>{rows}</dl></div>'
    if report.modules:
        norms = charts.heat_map(report.modules, lambda one: one.frobenius_norm, "Frobenius norm")
        peaks = charts.heat_map(report.modules, lambda one: one.leading_share, "leading share")
        content += (
            "<h3>Frobenius norm of each update</h3>"
            '<p class="faint">How much each module changes; darker is more.</p>'
            f'<div class="card">{norms}</div><h3>Leading share</h3>'
            '<p class="faint">Largest singular value over the sum of all: at 1 it is one direction.</p>'
            f'<div class="card">{peaks}</div>'
        )
    return section("Strength", lead, content)


def _provenance(report: ScanReport) -> str:
    entries = [
        (str(entry["name"]), f"sha256:{entry['digest']['sha256']}")
        for entry in configuration(report)
        if "digest" in entry
    ]
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd><code>{escape(digest)}</code></dd>" for name, digest in entries
    )
    lead = "Digests of what was judged, and by what. The same digests give the same report."
    return section("Made with", lead, f'<div class="card"><dl>{rows}</dl></div>')

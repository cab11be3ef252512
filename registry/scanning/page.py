"""The report of a scan as one HTML file: style and charts inside it, nothing fetched, no script.

What a file brought in is escaped twice, by ``registry.errors.shown`` and as HTML, and a content security
policy forbids scripts and every address: a name in a hostile file stays text whoever opens the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Final

from registry.scanning import charts
from registry.scanning.configuration import configuration
from registry.scanning.figures import WeightSpace
from registry.scanning.probed import Probed
from registry.scanning.report import Finding, ScanReport
from registry.scanning.rules import LAYERS
from registry.scanning.style import STYLE
from registry.scanning.subjects import Outcome, Scanned, Subject

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VERDICTS: Final[dict[Outcome, tuple[str, str, str]]] = {
    "pass": ("good", "Pass", "every check ran and none found anything."),
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
_TOKENS_SHOWN: Final = 24


def page(scanned: Scanned, probed: Probed | None = None) -> str:
    """Return what was found as one self-contained HTML document, in ASCII.

    Args:
        scanned: what was scanned.
        probed: what a behaviour probe saw of the adapter; shown, never believed.

    Raises:
        UsageError: the probe is about other bytes.
    """
    heading = f"Scan of {escape(scanned.target)}"
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
        f"{''.join(sections)}</main></body></html>\n"
    )
    return document.encode("ascii", "xmlcharrefreplace").decode("ascii")


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
        seen = "" if probed is None else _behaviour(probed)
        parts = [_summary(subject, report), _findings(report), seen, _strength(report), _space(report.space)]
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
        f"{_banner(subject.outcome)}"
    )


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
    return _section("Findings", lead, f'<div class="card">{"".join(cards)}{more}</div>')


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
    return _section("Strength", lead, content)


def _space(space: WeightSpace | None) -> str:
    if space is None:
        return ""
    reference = space.reference
    if space.verdict == "not judged":
        lead = f"Not judged: {space.why or 'there is no reference population'}."
    else:
        outcome = "asks for a review" if space.verdict == "review" else "nothing unusual"
        combined = "" if space.score is None else f" Combined p-value {10**-space.score:.3g}."
        lead = f"Beside clean adapters: {outcome}.{combined}"
    if reference is not None:
        lead += (
            f" Population: {reference.size} clean adapters of {reference.base}, rank {reference.rank}, "
            f"recipe {reference.recipe}."
        )
    lead += " Alone, it can only ask for a review: see the limits of the method in docs/scanner.md."
    powers = charts.decades(space.spectra)
    spectra = "".join(charts.spectrum(curve, powers, reference is not None) for curve in space.spectra)
    content = _statistics(space)
    if spectra:
        band = (
            "Line: this adapter. Band: 5th to 95th percentile of the clean ones, dashed: their median."
            if any(curve.low for curve in space.spectra)
            else "Line: this adapter. There are no clean ones to compare it with."
        )
        content += (
            '<h3>Spectra</h3><p class="faint">Singular values over the largest one, on a logarithmic scale, '
            f'mean over the blocks. {band}</p><div class="card curves">{spectra}</div>'
        )
    return _section("Weight space", escape(lead), content)


def _statistics(space: WeightSpace) -> str:
    """Each statistic with its p-value and its place among the clean adapters, the most unusual first."""
    if not space.statistics:
        return ""
    reference, limit = space.reference, space.threshold or 0.0
    names = sorted(space.statistics, key=lambda name: (space.p.get(name, 2.0), name))
    rows = []
    for name in names:
        p, value = space.p.get(name), space.statistics[name]
        suspicious = p is not None and p <= limit
        others = () if reference is None else reference.values.get(name, ())
        chart = charts.strip(name, value, others, suspicious) if others else ""
        told = "" if p is None else f"{p:.3g}"
        mark = ' class="no"' if suspicious else ""
        rows.append(
            f"<tr><td><code>{escape(name)}</code></td><td>{value:.4g}</td><td{mark}>{told}</td>"
            f'<td class="wide">{chart}</td></tr>'
        )
    return (
        '<div class="card"><table><thead><tr><th>Statistic</th><th>Value</th><th>p-value</th>'
        f"<th>Among clean adapters</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _behaviour(probed: Probed) -> str:
    """What the probe saw: suspicious tokens with pictures, statistics, pairs."""
    tokens = probed.tokens[:_TOKENS_SHOWN]
    drawn = charts.bars(dict(tokens))
    rows = "".join(
        f"<tr><td><code>{escape(text)}</code></td><td>{score:.4g}</td><td class='wide'>{bar}</td></tr>"
        for (text, score), bar in zip(dict(tokens).items(), drawn, strict=True)
    )
    figures = "".join(_pictures(text, probed.pictures[text]) for text, _ in tokens if text in probed.pictures)
    statistics = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{value:.4g}</td>"
        f"<td>{'' if name not in probed.p else format(probed.p[name], '.3g')}</td></tr>"
        for name, value in sorted(probed.statistics.items())
    )
    pairs = "".join(
        f"<tr><td><code>{escape(partner)}</code></td><td>{score:.4g}</td><td>{escape(verdict)}</td></tr>"
        for partner, verdict, score in probed.pairs
    )
    content = _columns("Token|Score|", rows) + (f'<div class="gallery">{figures}</div>' if figures else "")
    content += _columns("Statistic|Value|p-value", statistics) + _columns("Loaded with|Score|Verdict", pairs)
    lead = (
        f"What a probe on the base model saw; its own verdict is {escape(probed.verdict)}. "
        "This file is not signed: it is shown and decides nothing here."
    )
    return _section("Behaviour", lead, content)


def _columns(heads: str, rows: str) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in heads.split("|"))
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _pictures(token: str, sides: Mapping[str, str]) -> str:
    images = "".join(
        f'<div><img alt="{side} at {escape(token)}" src="{escape(sides[side])}"><span>{side}</span></div>'
        for side in ("base", "adapter")
        if side in sides
    )
    caption = f"<figcaption><code>{escape(token)}</code></figcaption>"
    return f'<figure><div class="pair">{images}</div>{caption}</figure>'


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
    return _section("Made with", lead, f'<div class="card"><dl>{rows}</dl></div>')


def _section(title: str, lead: str, content: str) -> str:
    return f'<section><h2>{title}</h2><p class="faint">{lead}</p>{content}</section>'

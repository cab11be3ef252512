"""The parts of the HTML report that compare an adapter with clean ones: weight space and behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Final

from registry.scanning import charts
from registry.scanning.figures import WeightSpace
from registry.scanning.probed import Probed

_TOKENS_SHOWN: Final = 24


def section(title: str, lead: str, content: str) -> str:
    """Return a part of the page under its own title; ``lead`` and ``content`` are markup."""
    return f'<section><h2>{title}</h2><p class="faint">{lead}</p>{content}</section>'


def space_panel(space: WeightSpace | None) -> str:
    """Return the weights beside those of clean adapters; nothing where the scan ended before."""
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
    return section("Weight space", escape(lead), content)


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


def behaviour_panel(probed: Probed) -> str:
    """Return what the probe saw: suspicious tokens with pictures, statistics, pairs."""
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
    return section("Behaviour", lead, content)


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

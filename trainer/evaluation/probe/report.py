"""What a probe found: numbers, ranked words and patches, and the content of the behaviour statement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from registry.errors import shown

PROBE_VERSION: Final = "1"

PATCH: Final = "input patch: "
"""What stands before the name of a patch among words."""
_PATCHES: Final = 3

Verdict = Literal["pass", "review", "fail", "not judged"]
Ranked = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeReport:
    """The behaviour of one adapter, or of two that are loaded together.

    Attributes:
        statistics: name -> value, finite, larger is more suspicious.
        tokens: words by how far the adapter's reaction to them stands out, largest first; declared ones last
            in their own list.
        declared: the same of the declared words.
        patches: the same of patches on the input picture.
        vocabulary: sha256 (hex) of the texts that were tried.
        verdict: "not judged" without a population that fits.
        p_values: name -> conformal p, of the statistics that were judged.
        population: digest (hex) of the population, if there was one.
        why: why nothing was judged, or what decided; empty where the verdict says it all.
        prompts: word -> the prompt in which it showed most, of some of ``tokens``.
        pairs: verdicts of adapters loaded together with this one: {"with", "verdict", "score"}.
        seconds: part of the probe -> CPU seconds; not part of what is signed.
    """

    statistics: Mapping[str, float] = field(hash=False)
    tokens: Ranked
    declared: Ranked = ()
    patches: Ranked = ()
    vocabulary: str = ""
    verdict: Verdict = "not judged"
    p_values: Mapping[str, float] = field(default_factory=dict, hash=False)
    population: str | None = None
    why: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict, hash=False)
    pairs: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    seconds: Mapping[str, float] = field(default_factory=dict, hash=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; texts are escaped, a homoglyph is shown as what it is."""
        return {
            "version": PROBE_VERSION,
            "verdict": self.verdict,
            "statistics": {name: round(value, 6) for name, value in self.statistics.items()},
            "p_values": dict(self.p_values),
            "tokens": _ranked(self.tokens),
            "declared": _ranked(self.declared),
            "patches": _ranked(self.patches),
            "vocabulary": self.vocabulary,
            "population": self.population,
            "why": self.why,
            "pairs": [dict(pair) for pair in self.pairs],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def predicate(self, weights: str, base: Mapping[str, str], *, tokens: int = 20) -> dict[str, Any]:
        """Return the content of a behaviour statement.

        Args:
            weights: sha256 (hex) of the weights that were probed.
            base: id and revision of the base.
            tokens: how many of the ranked words are kept.
        """
        # A statement says yes, maybe or no. What nobody judged is no yes.
        verdict = "review" if self.verdict == "not judged" else self.verdict
        return {
            "verdict": verdict,
            "weights": {"sha256": weights},
            "base": {"id": base["id"], "revision": base["revision"]},
            "probe": {
                "version": PROBE_VERSION,
                "vocabulary": self.vocabulary,
                "population": self.population,
            },
            "statistics": {name: round(value, 6) for name, value in self.statistics.items()},
            "p_values": dict(self.p_values),
            "tokens": _ranked(self.suspects[:tokens]),
            "pairs": [dict(pair) for pair in self.pairs],
        }

    @property
    def suspects(self) -> Ranked:
        """Words and the worst patches in one list, most suspicious first."""
        patches = [(PATCH + name, score) for name, score in self.patches[:_PATCHES]]
        return tuple(sorted([*self.tokens, *patches], key=lambda entry: -entry[1]))


def _ranked(entries: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"text": shown(text), "score": score} for text, score in entries]

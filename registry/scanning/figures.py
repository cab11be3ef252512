"""What a scan measured, as plain numbers: figures of the modules, spectra, and the reference population.

Everything is about the effective update s * B @ A of a module, so that no figure changes when scale moves
from one factor into the other. Figures have six significant digits: the same on every processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from registry.digest import Digest
    from registry.scanning.report import Finding

SpaceVerdict = Literal["pass", "review", "not judged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleFigures:
    """The update of one module.

    Attributes:
        module: the base's module.
        block: place of its block in the forward pass, from 0.
        kind: what it is within the block, such as "attn.to_q".
        spectral_norm: largest singular value, >= 0.
        frobenius_norm: root of the sum of the squared singular values, >= 0.
        stable_rank: (frobenius_norm / spectral_norm) ** 2, 1 to the rank; 0 for an update of zero.
        leading_share: largest singular value over the sum of all, 0 to 1; 0 for an update of zero.
        singular_values: largest first; may be empty.
    """

    module: str
    block: int
    kind: str
    spectral_norm: float
    frobenius_norm: float
    stable_rank: float
    leading_share: float
    singular_values: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values, without the singular values."""
        return {
            "module": self.module,
            "spectral_norm": self.spectral_norm,
            "frobenius_norm": self.frobenius_norm,
            "stable_rank": self.stable_rank,
            "leading_share": self.leading_share,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """How the singular values of one kind of module fall, and how they fall in clean adapters.

    Attributes:
        kind: of the modules.
        values: sigma_i / sigma_1, mean over the blocks, i from 1 to the rank; each 0 to 1.
        low, middle, high: 5th, 50th and 95th percentile of the same over the population; empty without one.
    """

    kind: str
    values: tuple[float, ...]
    low: tuple[float, ...] = ()
    middle: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the spectrum as JSON values."""
        return {
            "kind": self.kind,
            "values": [*self.values],
            "low": [*self.low],
            "middle": [*self.middle],
            "high": [*self.high],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The clean adapters that an adapter was compared with.

    Attributes:
        digest: of the population's file.
        base: id of their base model.
        rank: their rank.
        recipe: the name of how they were trained.
        size: how many they are.
        values: statistic -> its value in each of them, in ascending order.
    """

    digest: Digest
    base: str
    rank: int
    recipe: str
    size: int
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpace:
    """What the weights look like beside those of clean adapters.

    Attributes:
        statistics: name -> value in this adapter.
        p: name -> conformal p-value; empty where nothing was judged.
        score: -log10 of the combined p-value; None where nothing was judged.
        threshold: the combined p-value below which a review is asked for; None where nothing was judged.
        verdict: "pass", "review", or "not judged": there is no population that could tell.
        why: why nothing was judged; empty otherwise.
        reference: the population; None where there is none.
        spectra: by kind of module.
    """

    statistics: Mapping[str, float] = field(default_factory=dict, hash=False)
    p: Mapping[str, float] = field(default_factory=dict, hash=False)
    score: float | None = None
    threshold: float | None = None
    verdict: SpaceVerdict = "not judged"
    why: str = ""
    reference: Reference | None = None
    spectra: tuple[Spectrum, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; the population's own values stay in its file."""
        reference = self.reference
        population = reference and {
            "digest": str(reference.digest),
            "base": reference.base,
            "rank": reference.rank,
            "recipe": reference.recipe,
            "size": reference.size,
        }
        return {
            "verdict": self.verdict,
            "why": self.why,
            "score": self.score,
            "threshold": self.threshold,
            "statistics": dict(self.statistics),
            "p_values": dict(self.p),
            "population": population,
            "spectra": [spectrum.to_json() for spectrum in self.spectra],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """What the layers that read the numbers found and measured.

    Attributes:
        findings: in any order.
        facts: name -> a figure of the whole file.
        modules: in the order of the base's blocks.
        space: the weights beside those of clean adapters; None where a finding made that pointless.
    """

    findings: tuple[Finding, ...]
    facts: Mapping[str, float] = field(hash=False)
    modules: tuple[ModuleFigures, ...] = ()
    space: WeightSpace | None = None

"""What an alias means now: the version that a candidate has to stand beside.

A candidate is compared with what production runs when it is judged, so a promotion in between is a reason
to judge again. Its own promotion is none: once the alias means the candidate's weights, what it was compared
with before still counts, as the evaluator has signed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.artifacts import said
from registry.content import FileContent
from registry.digest import Digest, digest_content
from registry.errors import NotFound, UsageError
from registry.manifest import WEIGHTS_NAME
from registry.reference import Reference
from trainer.progress import Progress
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from registry.client import Registry
    from registry.results import Shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What an alias means, as far as a candidate is compared with it.

    Attributes:
        why: in words.
        reference: ``name:version`` of what it is compared with; None where there is nothing to compare with.
        weights: digest of that version's weights file.
        taken: the alias means something already, even if that cannot be compared with.
    """

    why: str
    reference: str | None = None
    weights: Digest | None = None
    taken: bool = False

    def fetch(self, registry: Registry, progress: Progress) -> tuple[Path, str] | None:
        """The folder of that version, fetched and verified, and its reference; None without one.

        Raises:
            RegistryError: it cannot be fetched, or is not believed.
        """
        from trainer.evaluation.evaluating import FOLDER
        from trainer.evaluation.targets import fetch

        if self.reference is None:
            return None
        place = registry.place.home / FOLDER / "fetched"
        return fetch(registry, Reference.parse(self.reference), place, progress).folder, self.reference


NOTHING = Standing(why="compared with nothing")


def standing(registry: Registry, recipe: Recipe, adapter: Path) -> Standing:
    """Find what a recipe's adapter has to stand beside.

    Args:
        registry: need not exist yet.
        recipe: says which name and alias it is for, and for which base and expressions it is made.
        adapter: folder of the candidate.

    Raises:
        RegistryError: what the alias means cannot be believed, or the store does not answer.
    """
    alias = f"{recipe.release.adapter}@{recipe.release.alias}"
    found = _shown(registry, alias)
    if found is None:
        return Standing(why=f"{alias} means nothing yet: there is nothing to compare with")
    with FileContent(adapter / WEIGHTS_NAME) as content:
        own = digest_content(content)
    if _weights(found) == own:
        before = _before(registry, found)
        if before is None:
            return Standing(why=f"{alias} is this adapter, which was compared with nothing")
        found = before
    name = found.listed.reference
    problem = _unlike(found, recipe)
    if problem is not None:
        return Standing(why=f"not compared with {name}: {problem}", taken=True)
    return Standing(why=f"compared with {name}", reference=name, weights=_weights(found), taken=True)


def _weights(found: Shown) -> Digest:
    return found.manifest.file(WEIGHTS_NAME).sha256


def _shown(registry: Registry, reference: str) -> Shown | None:
    try:
        return registry.show(reference)
    except (NotFound, UsageError):  # an evaluation may have named a folder
        return None


def _before(registry: Registry, found: Shown) -> Shown | None:
    """What the evaluator compared a version with when it was released."""
    against = said(found, "evaluation").get("against")
    reference = against.get("reference") if isinstance(against, dict) else None
    before = _shown(registry, str(reference)) if reference else None
    return before if before is not None and str(_weights(before)) == against.get("weights") else None


def _unlike(found: Shown, recipe: Recipe) -> str | None:
    """Why an engine for this recipe's base cannot edit with it what the recipe's adapter is asked for."""
    if found.listed.revoked is not None:
        return f"it was revoked ({found.listed.revoked})"
    base = found.manifest.base
    if (base.id, base.revision) != (recipe.base.id, recipe.base.revision):
        return f"it is for the base {base.id} {base.revision}"
    missing = sorted(set(recipe.conditioning.expressions) - set(found.manifest.conditioning.expressions))
    return f"it has no expression {', '.join(missing)}" if missing else None

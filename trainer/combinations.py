"""What a recipe must not combine: rules over several sections, each with the mend in its words.

A rule looks at a recipe whose sections are valid one by one. It returns what is wrong, with the place in the
recipe first, or None; rules rely on those before them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from registry.families import FAMILIES, KNOWN_BASES
from trainer.encoders import CHOICES

if TYPE_CHECKING:
    from registry.families import FamilyFacts
    from trainer.recipe import Recipe

Rule = Callable[["Recipe"], str | None]


def problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong; after the first of them a recipe is refused."""
    for rule in RULES:
        if found := rule(recipe):
            yield found


def _facts(recipe: Recipe) -> FamilyFacts:
    return FAMILIES[recipe.base.family]


def _unknown(words: Iterable[str], known: Collection[str]) -> str | None:
    """Return what is wrong with the first word that is not known, and the nearest that is."""
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            return f"no {word!r}; {hint}choose from {', '.join(sorted(known))}"
    return None


def _known_family(recipe: Recipe) -> str | None:
    found = _unknown([recipe.base.family], FAMILIES)
    return found and f"base.family: there is {found}"


def _known_base(recipe: Recipe) -> str | None:
    known, base = KNOWN_BASES.get(recipe.base.id), recipe.base
    if known is not None and known.family != base.family:
        return f"base.family: {base.id} is of the family {known.family}, not {base.family}; write that"
    if known is not None and known.license != base.license:
        return f"base.license: {base.id} is under {known.license}, not {base.license}; write that"
    return None


def _known_targets(recipe: Recipe) -> str | None:
    facts, given = _facts(recipe), recipe.lora.targets
    found = _unknown([given], facts.presets) if isinstance(given, str) else _unknown(given, facts.kinds)
    return found and f"lora.targets: {facts.name} has {found}"


def _each_target_once(recipe: Recipe) -> str | None:
    for field, given in (("targets", recipe.targets), ("text_encoder", recipe.lora.text_encoder)):
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            return f"lora.{field}: {', '.join(twice)} is named twice; name it once"
    return None


def _known_text_targets(recipe: Recipe) -> str | None:
    facts, given = _facts(recipe), recipe.lora.text_encoder
    if not given:
        return None
    if not facts.text_encoders:
        return f"lora.text_encoder: no text encoder of {facts.name} can be trained; leave it out"
    found = _unknown(given, frozenset.intersection(*facts.text_encoders.values()))
    return found and f"lora.text_encoder: {facts.name} has {found}"


def _no_magnitudes_in_text(recipe: Recipe) -> str | None:
    if not (recipe.lora.dora and recipe.lora.text_encoder):
        return None
    # transformers 5 takes their magnitudes for unexpected keys, and an adapter has magnitudes of all or none.
    return "lora.dora: loaders do not load it into text encoders; leave lora.dora or lora.text_encoder out"


def _rank_below_width(recipe: Recipe) -> str | None:
    known = KNOWN_BASES.get(recipe.base.id)
    if known is None:
        return None
    facts, targets = _facts(recipe), recipe.targets
    width, module = min(
        (min(shape), name) for name, shape in known.spec.items() if facts.block_of(name)[1] in targets
    )
    if recipe.lora.rank <= width:
        return None
    return (
        f"lora.rank: {recipe.lora.rank} is more than {module} has features ({width}), where no update has a "
        f"higher rank; {width} or less will do"
    )


def _some_weight(recipe: Recipe) -> str | None:
    if any(loss.weight > 0 for loss in recipe.losses.values()):
        return None
    return "losses: every loss has weight 0; give at least one a weight"


def _own_loss(recipe: Recipe) -> str | None:
    facts = _facts(recipe)
    right, wrong = (
        ("flow_matching", "denoising") if facts.prediction == "velocity" else ("denoising", "flow_matching")
    )
    for name, loss in recipe.losses.items():
        if name == wrong and loss.weight > 0:
            return f"losses.{wrong}: {facts.name} predicts {facts.prediction}; name the loss {right}"
    return None


def _snr_gamma(recipe: Recipe) -> str | None:
    facts = _facts(recipe)
    if recipe.noise.snr_gamma == 0 or facts.prediction != "velocity":
        return None
    return (
        f"noise.snr_gamma: is for bases that predict epsilon or v, and {facts.name} predicts velocity; "
        "leave it out, and choose a noise.scheme or noise.shift"
    )


def _encoders(recipe: Recipe) -> str | None:
    for name, loss in recipe.losses.items():
        choices = CHOICES.get(name, ())
        if not choices and loss.encoder != "portraits":  # the default, which it does not use
            return f"losses.{name}.encoder: this loss looks through none; leave it out"
        if choices and loss.encoder not in choices:
            return f"losses.{name}.encoder: {loss.encoder} is not for it; choose from {', '.join(choices)}"
    return None


def _own_encoders(recipe: Recipe) -> str | None:
    if recipe.base.id.startswith("adapter-foundry/"):
        return None
    for name, loss in recipe.losses.items():
        if name in CHOICES and loss.weight > 0 and loss.encoder == "portraits":
            return (
                f"losses.{name}.encoder: the portraits' encoder has only seen drawn faces of 64 pixels; "
                f"for {recipe.base.id} choose from {', '.join(CHOICES[name][1:])}"
            )
    return None


def _some_levels(recipe: Recipe) -> str | None:
    for name, loss in recipe.losses.items():
        if name in CHOICES and loss.weight > 0 and loss.min_sigma >= loss.max_sigma:
            return (
                f"losses.{name}: no noise level lies between min_sigma {loss.min_sigma:g} and max_sigma "
                f"{loss.max_sigma:g}; lower the first or raise the second"
            )
    return None


def _two_to_contrast(recipe: Recipe) -> str | None:
    loss = recipe.losses.get("contrastive")
    if loss is None or loss.weight == 0 or len(recipe.conditioning.expressions) > 1:
        return None
    return "losses.contrastive: has nothing to contrast with one expression; add one, or set its weight to 0"


def _sizes(recipe: Recipe) -> str | None:
    unit = _facts(recipe).multiple
    wrong = [side for side in recipe.data.sizes if side % unit]
    if not wrong:
        return None
    near = max(64, round(wrong[0] / unit) * unit)
    return f"data.sizes: {recipe.base.family} needs multiples of {unit}; instead of {wrong[0]} write {near}"


def _held_out(recipe: Recipe) -> str | None:
    from trainer.evaluation.suites import of_recipe

    judged, data = of_recipe(recipe).people, recipe.data
    used = sum(data.identities.values()) + sum(data.validation.values())
    seen = range(data.first_identity, data.first_identity + used)
    if judged and seen and seen.start < judged.stop and judged.start < seen.stop:
        return (
            f"evaluation.first_identity: the people of the evaluation ({judged.start} to {judged.stop - 1}) "
            f"overlap with those of the data ({seen.start} to {seen.stop - 1}); begin at {seen.stop} or later"
        )
    return None


def _pairs_for_all(recipe: Recipe) -> str | None:
    pairs, count = recipe.optimiser.batch_pairs, recipe.running.count
    if pairs >= count:
        return None
    return (
        f"optimiser.batch_pairs: {pairs} pairs are too few for {count} processes (running.count); "
        "give each of them one"
    )


def _edited_by_somebody(recipe: Recipe) -> str | None:
    edited = recipe.data.source == "edited"
    if edited and recipe.synthesis is None:
        return "synthesis: data.source edited needs an API that edits; name its provider, model and license"
    if recipe.synthesis is not None and not edited:
        return f"synthesis: data.source {recipe.data.source} asks no API; leave it out"
    return None


def _faces_by_somebody(recipe: Recipe) -> str | None:
    filters = recipe.data.filters
    if filters.min_identity is None or filters.face_encoder or recipe.data.source == "renderer":
        return None
    return "data.filters.face_encoder: min_identity needs an encoder that tells people apart; name one"


RULES: tuple[Rule, ...] = (
    _known_family,
    _known_base,
    _known_targets,
    _each_target_once,
    _known_text_targets,
    _no_magnitudes_in_text,
    _rank_below_width,
    _some_weight,
    _own_loss,
    _snr_gamma,
    _encoders,
    _own_encoders,
    _some_levels,
    _two_to_contrast,
    _sizes,
    _edited_by_somebody,
    _faces_by_somebody,
    _held_out,
    _pairs_for_all,
)

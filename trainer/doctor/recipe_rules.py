"""Rules on the numbers of a recipe.

A rule of thumb is no law: the text of each says where it comes from, and they warn only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from trainer import encoders
from trainer.doctor.advice import Advice, Findings
from trainer.errors import RecipeError, TrainerError
from trainer.recipe import Recipe

_WIDTH = 3072  # of the large bases of today, which the usual learning rates are for
_RATES = (1e-5, 1e-3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a recipe's data and base.

    Attributes:
        triplets: that are trained on.
        pictures: distinct ones among them.
        shapes: module that is trained -> (out, in) features; empty if the base's shapes are not known here.
    """

    triplets: int
    pictures: int
    shapes: Mapping[str, tuple[int, int]]


def examine(recipe: Recipe, facts: Facts) -> Findings:
    """Yield what the numbers of a recipe give rise to."""
    yield from _capacity(recipe, facts)
    yield from _full(recipe, facts)
    yield from _scale(recipe)
    yield from _rate(recipe, facts)
    yield from _length(recipe, facts)
    yield from _average(recipe, facts)
    yield from _encoders(recipe)
    yield from _judges(recipe)


def trainable(recipe: Recipe, facts: Facts) -> int:
    """Return the number of trained parameters: rank (out + in) of each module, and out more for DoRA."""
    return sum(
        recipe.lora.rank * (out + into) + (out if recipe.lora.dora else 0)
        for out, into in facts.shapes.values()
    )


def _capacity(recipe: Recipe, facts: Facts) -> Findings:
    count = trainable(recipe, facts)
    if not count or not facts.pictures:
        return
    share = count / facts.pictures
    seen = f"{count:,} trainable parameters on {facts.pictures:,} training pictures: {share:,.0f} a picture"
    if share > 10e6:
        fit = max(1, int(recipe.lora.rank * 10e6 / share))
        yield Advice(
            rule="capacity", level="warning", seen=seen,
            why="above ten million a picture the pictures themselves fit into the adapter. A rule of thumb, "
            "above what is usual: FLUX.1 with all modules at rank 16 on ten pictures has 6.5 million",
            mend=f"use a rank of at most {fit}, fewer targets, or more pictures; or stop early",
        )  # fmt: skip
    elif share < 100:
        yield Advice(
            rule="capacity", level="warning", seen=seen,
            why="LoRA falls behind a full fine-tune where the data hold more than the adapter can (Schulman "
            "et al., LoRA Without Regret, 2025); at about 2 bits a parameter (Allen-Zhu and Li, arXiv "
            "2404.05405) less than 100 parameters hold less than 25 bytes of each picture",
            mend="raise lora.rank, train all kinds of modules (targets: full), or fine-tune the whole base",
        )  # fmt: skip


def _full(recipe: Recipe, facts: Facts) -> Findings:
    larger = [
        name for name, (out, into) in facts.shapes.items() if recipe.lora.rank * (out + into) >= out * into
    ]
    if larger:
        out, into = min((facts.shapes[name] for name in larger), key=lambda shape: shape[0] * shape[1])
        yield Advice(
            rule="full-fine-tune", level="warning",
            seen=f"at rank {recipe.lora.rank}, {len(larger)} of {len(facts.shapes)} modules have at least as "
            f"many parameters as the layers that they change (the smallest is {out} x {into})",
            why="rank (out + in) is no saving over out x in: a full fine-tune is smaller there and does more",
            mend=f"use a rank below {out * into // (out + into)}, or fine-tune these layers in full",
        )  # fmt: skip


def _scale(recipe: Recipe) -> Findings:
    lora = recipe.lora
    stabilised = lora.scaling == "rank-stabilised"
    formula = "alpha / sqrt(rank)" if stabilised else "alpha / rank"
    if 0.25 <= lora.scale <= 4:
        return
    right = lora.rank**0.5 if stabilised else float(lora.rank)
    yield Advice(
        rule="alpha", level="warning",
        seen=f"the update is multiplied by {formula} = {lora.scale:.3g} "
        f"(alpha {lora.alpha:g}, rank {lora.rank})",
        why="learning rates of the field are meant for a factor of 1 to 2 (diffusers' DreamBooth guides: "
        "alpha equal to the rank or twice as large); the factor multiplies them"
        + (", and rsLoRA (arXiv 2312.03732) divides by the root already" if stabilised else ""),
        mend=f"use an alpha from {right:g} to {2 * right:g}, or change optimiser.learning_rate with it",
    )  # fmt: skip


def _rate(recipe: Recipe, facts: Facts) -> Findings:
    settings = recipe.optimiser
    if settings.name == "prodigy":
        if settings.learning_rate != 1:
            yield Advice(
                rule="prodigy", level="warning",
                seen=f"prodigy with a learning rate of {settings.learning_rate:g}",
                why="prodigy finds the learning rate itself and multiplies it by this one (Mishchenko and "
                "Defazio, arXiv 2306.06101)",
                mend="use optimiser.learning_rate: 1",
            )  # fmt: skip
        return
    width = int(median([min(shape) for shape in facts.shapes.values()] or [_WIDTH]))
    low, high = _RATES[0], _RATES[1] * max(1.0, _WIDTH / width)
    if not low <= settings.learning_rate <= high:
        yield Advice(
            rule="learning-rate", level="warning",
            seen=f"a learning rate of {settings.learning_rate:g} for {settings.name}",
            why=f"usual for LoRA is {low:.1g} to {high:.1g} at a width of {width}: 1e-5 to 1e-3 at {_WIDTH}, "
            "as in the field's trainers; narrower bases bear more (muP, Yang et al., arXiv 2203.03466)",
            mend=f"begin with {(low * high) ** 0.5:.1g}",
        )  # fmt: skip


def _length(recipe: Recipe, facts: Facts) -> Findings:
    if not facts.triplets:
        return
    settings = recipe.optimiser
    steps = settings.total_steps(facts.triplets)
    passes = steps * settings.batch_pairs / facts.triplets
    pairs = settings.batch_pairs
    seen = f"{steps} steps of {pairs} pairs are {passes:.3g} passes over {facts.triplets} triplets"
    if passes < 1:
        yield Advice(
            rule="length", level="warning", seen=seen, why="some pairs are never seen",
            mend=f"train at least {-(-facts.triplets // settings.batch_pairs)} steps",
        )  # fmt: skip
    if passes > 500:
        yield Advice(
            rule="length", level="warning", seen=seen,
            why="the same pictures come hundreds of times, and people are learnt by heart; PixelSmile's "
            "recipe makes 100 passes",
            mend="train fewer steps, or watch validation_loss and stop where it turns",
        )  # fmt: skip
    if settings.warmup_steps > 0.2 * steps:
        yield Advice(
            rule="warm-up", level="warning",
            seen=f"{settings.warmup_steps} of {steps} steps are warm-up",
            why="the learning rate is at its top for a short time only",
            mend=f"use about {max(1, steps // 20)}",
        )  # fmt: skip


def _average(recipe: Recipe, facts: Facts) -> Findings:
    settings = recipe.ema
    if not facts.triplets and recipe.optimiser.steps is None:
        return
    steps = recipe.optimiser.total_steps(max(1, facts.triplets))
    left = 1.0
    for update in range(1, steps + 1):
        left *= min(settings.decay, (1 + update) / (settings.warmup + update))
        if left < 1e-4:
            break
    horizon = 1 / (1 - settings.decay)
    seen = f"EMA with decay {settings.decay:g} looks back over about {horizon:.0f} of {steps} steps"
    if left > 0.01:
        yield Advice(
            rule="ema", level="warning", seen=f"{seen}; {left:.0%} of it is still the untrained start",
            why="the exported average is weaker than what was trained",
            mend=f"use a decay of at most {1 - 10 / max(steps, 11):.3g}",
        )  # fmt: skip
    elif horizon > steps / 2:
        yield Advice(
            rule="ema", level="warning", seen=seen,
            why="half of the training and more is averaged, also what was far from done",
            mend=f"use a decay of at most {1 - 10 / max(steps, 11):.3g}",
        )  # fmt: skip


def _encoders(recipe: Recipe) -> Findings:
    try:
        encoders.require(recipe.losses)
    except TrainerError as error:
        yield Advice(
            rule="encoders", level="warning", seen=error.message,
            why="the training refuses to begin without the networks that its losses look through",
            mend=error.mend,
        )  # fmt: skip


def _judges(recipe: Recipe) -> Findings:
    from trainer.evaluation.judges import require_able
    from trainer.evaluation.suites import of_recipe

    suite = of_recipe(recipe)
    try:
        require_able(suite, recipe.base)
        if suite.source == "tasks" and suite.path is None:
            raise RecipeError(f"the suite {suite.name} has no folder of tasks", "name it as evaluation.path")
    except RecipeError as error:
        yield Advice(
            rule="judges", level="warning", seen=error.message,
            why="what is trained cannot be evaluated by this recipe; gates refuse what was not evaluated",
            mend=error.mend,
        )  # fmt: skip

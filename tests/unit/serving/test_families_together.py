"""Every family, a step at a time: edits that began apart, with different adapters, in one forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from fakes.adapters import card, container, factors, folder
from fakes.tiny_bases import inputs
from registry.admission import Policy, VerifiedAdapter, admit_candidate
from registry.families import BaseFacts, family
from serving import pipelines
from serving.engine import EditEngine
from serving.runs import Run
from serving.schema import SweepRequest
from trainer.portraits.bases import BUILDERS, build

TEXTS = [name for name in BUILDERS if family(name).text_encoders]

Served = tuple[EditEngine, Callable[..., VerifiedAdapter]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """Family -> an engine on its tiny base, and what makes adapters for it."""
    known: dict[str, Served] = {}

    def served(name: str) -> Served:
        if name not in known:
            path, facts = build(name, tmp_path_factory.mktemp(name) / "base"), family(name)

            def config(part: str) -> Any:
                return json.loads((path / part / "config.json").read_text())

            base = BaseFacts(
                id=f"tests/{name}", family=name, license="Apache-2.0", revision="1",
                config=config(facts.prefix), text_encoders={one: config(one) for one in facts.text_encoders},
            )  # fmt: skip

            def adapter(seed: int, *, text: bool = False) -> VerifiedAdapter:
                kinds = facts.all_kinds - facts.kinds if text else facts.presets["attention"]
                values = {
                    key: (10 if "lora_B" in key else 1) * value
                    for key, value in factors(base, kinds=kinds, seed=seed).items()
                }
                files = folder(container(values, "F32"), card(base, targets=sorted(kinds), dtype="F32"))
                policy = Policy(bases={base.id: base}, purpose="internal-research", allow_review=True)
                return admit_candidate(files, policy)

            pipeline = pipelines.load(name, path)
            engine = EditEngine(pipeline, base=adapter(0).card.base, allow_candidates=True, cache_memory=0)
            known[name] = engine, adapter
        return known[name]

    return served


def asked(portrait: Image.Image, rows: int = 1, seed: int = 3, steps: int = 4) -> SweepRequest:
    words = ({"happy": 1.0}, {"surprised": 0.5}, {})
    return SweepRequest.make(image=portrait, rows=words[:rows], seed=seed, steps=steps)


def finished(engine: EditEngine, run: Run) -> torch.Tensor:
    """The latents of a run, which is let go."""
    while not run.done:
        engine.advance([run])
    engine.drop(run)
    return run.denoising.latents


def near(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_edits_with_different_adapters_that_began_apart(
    made: Callable[[str], Served], portrait: Image.Image, name: str
) -> None:
    """Four runs that join and leave at other steps: each is what it is alone, and no two are alike."""
    engine, adapter = made(name)
    first, second = adapter(1), adapter(2)
    wanted = [
        (asked(portrait, rows=2), ((first, 1.0),)),
        (asked(portrait, steps=3), ((second, 0.8),)),
        (asked(portrait, steps=5), ((first, 0.5), (second, 1.0))),
        (asked(portrait, rows=3, seed=9), ((first, 0.0),)),
    ]
    alone = [finished(engine, engine.begin(*one)) for one in wanted]
    going: list[Run] = []
    runs: list[Run] = []
    while len(runs) < len(wanted) or going:
        if len(runs) < len(wanted):
            runs.append(engine.begin(*wanted[len(runs)]))
            going.append(runs[-1])
        engine.advance(going)
        going = [run for run in going if not run.done]
    for run, want in zip(runs, alone, strict=True):
        engine.drop(run)
        near(run.denoising.latents, want)
    distances = [float((alone[0][:1] - other[:1]).abs().max()) for other in alone[1:]]
    assert min(distances) > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
def test_a_sweep_is_its_rows(made: Callable[[str], Served], portrait: Image.Image, name: str) -> None:
    engine, adapter = made(name)
    stack = ((adapter(1), 1.0),)
    words = [{}, {"happy": 0.5}, {"happy": 1.0, "surprised": 0.25}]
    together = finished(
        engine, engine.begin(SweepRequest.make(image=portrait, rows=tuple(words), seed=2, steps=3), stack)
    )
    for row, want in zip(words, together, strict=True):
        single = SweepRequest.make(image=portrait, rows=(row,), seed=2, steps=3)
        near(finished(engine, engine.begin(single, stack))[0], want)
    assert float((together[0] - together[2]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", TEXTS)
def test_adapters_of_text_encoders_change_their_own_prompts_only(
    made: Callable[[str], Served], portrait: Image.Image, name: str
) -> None:
    """Prompts are encoded with the adapters of their request, and never found in another's cache."""
    engine, adapter = made(name)
    engine.detach()
    engine = EditEngine(engine._pipeline, base=engine.base, allow_candidates=True)  # with caches
    reads, draws = adapter(4, text=True), adapter(1)
    plain, read = ((draws, 1.0),), ((draws, 1.0), (reads, 1.0))
    half = ((draws, 1.0), (reads, 0.5))
    alone = [finished(engine, engine.begin(asked(portrait), stack)) for stack in (plain, read, half, plain)]
    assert torch.equal(alone[0], alone[3])
    differences = [float((alone[one] - alone[other]).abs().max()) for one, other in ((0, 1), (0, 2), (1, 2))]
    assert min(differences) > 1e-5
    runs = [engine.begin(asked(portrait), stack) for stack in (read, plain, half)]
    while not runs[0].done:
        engine.advance(runs)
    for run, want in zip(runs, (alone[1], alone[0], alone[2]), strict=True):
        near(run.denoising.latents, want)
        engine.drop(run)
    engine.detach()


def test_a_mask_of_ones_is_no_mask(made: Callable[[str], Served]) -> None:
    """diffusers answers None for prompts without padding, and takes None; here a mask is always there.

    A mask that says nothing would cost fused attention, and one that is missing cannot be joined with others.
    """
    pipeline: Any = made("qwen-image-edit")[0]._pipeline
    given = inputs(pipeline, 3)
    assert given["prompts"].mask.dtype == torch.bool
    assert bool(given["prompts"].mask.all())
    seen: list[Any] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        whole = pipeline.predict(**given)
        padded = given["prompts"].rows([0, 1, 2])
        more = torch.cat([padded.embeds, torch.zeros_like(padded.embeds[:, :2])], 1)
        mask = torch.cat([padded.mask, torch.zeros_like(padded.mask[:, :2])], 1)
        masked = pipeline.predict(**{**given, "prompts": type(padded)(embeds=more, mask=mask)})
    hook.remove()
    assert seen[0] is None
    assert seen[1] is mask
    torch.testing.assert_close(masked, whole, rtol=1e-5, atol=1e-5)

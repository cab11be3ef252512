"""Adapters of every family on the pipelines that serve them: denoiser, text encoders, DoRA."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes.adapters import Factors, card, container, factors, folder, rescaled
from registry.admission import Policy, VerifiedAdapter, admit_candidate
from registry.families import FAMILIES, BaseFacts, family
from registry.formats import parse_key
from serving import layers
from serving.adapters import AdapterSlots
from serving.errors import AdapterMismatch

OTHERS = [name for name in FAMILIES if name != "qwen-image-edit"]
WITH_TEXT = [name for name in OTHERS if FAMILIES[name].text_encoders]

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, BaseFacts]]:
    """Family -> its pipeline on a tiny base, and what the registry knows of that; each is built once."""
    from serving.pipelines import load
    from trainer.portraits.bases import build

    made: dict[str, tuple[Any, BaseFacts]] = {}

    def get(name: str) -> tuple[Any, BaseFacts]:
        if name not in made:
            path = build(name, tmp_path_factory.mktemp("bases") / name)
            facts = family(name)
            base = BaseFacts(
                id=f"tests/{name}",
                family=name,
                license="Apache-2.0",
                revision="1",
                config=config(path, facts.prefix),
                text_encoders={part: config(path, part) for part in facts.text_encoders},
            )
            made[name] = load(name, path), base
        return made[name]

    return get


def config(path: Path, part: str) -> Any:
    return json.loads((path / part / "config.json").read_text())


def adapter(base: BaseFacts, values: Factors, dtype: str = "F32") -> VerifiedAdapter:
    facts = family(base.family)
    kinds = {facts.block_of(found.module)[1] for key in values if (found := parse_key(key))}
    files = folder(container(values, dtype), card(base, targets=sorted(kinds), dtype=dtype))
    policy = Policy(bases={base.id: base}, purpose="internal-research", allow_review=True)
    return admit_candidate(files, policy)


def parts_of(pipeline: Any) -> Mapping[str, torch.nn.Module]:
    facts = family(pipeline.family)
    texts = pipeline.text_encoders if facts.text_encoders else {}
    return {facts.prefix: pipeline.transformer, **texts}


def linears(pipeline: Any) -> dict[str, torch.nn.Module]:
    """Module, as the registry names it -> what stands there now."""
    facts, found = family(pipeline.family), {}
    for part, model in parts_of(pipeline).items():
        start = "" if part == facts.prefix else f"{part}."
        if start and not hasattr(model, "text_model"):
            start += "text_model."
        for name, module in model.named_modules():
            linear = isinstance(getattr(module, "base_layer", module), torch.nn.Linear)
            if linear and facts.is_target(start + name):
                found[start + name] = module
    return found


def weights(pipeline: Any) -> Weights:
    return {
        f"{part}.{name}": value.clone()
        for part, model in parts_of(pipeline).items()
        for name, value in model.state_dict().items()
    }


def inputs(module: torch.nn.Module) -> torch.Tensor:
    base = getattr(module, "base_layer", module)
    return torch.from_numpy(np.random.default_rng(0).normal(size=(5, base.in_features))).float()


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_module_gets_its_update_at_its_strength(
    name: str, dora: bool, strength: float, bases: Callable[[str], tuple[Any, BaseFacts]]
) -> None:
    """And no other module any; what is taken off leaves the base as it was, to the bit."""
    pipeline, base = bases(name)
    facts, before = family(name), weights(pipeline)
    values = factors(base, kinds=facts.all_kinds)
    values = rescaled(values) if dora else values
    slots = AdapterSlots(pipeline)
    slots.use(adapter(base, values), strength)
    with torch.no_grad():
        for module, layer in linears(pipeline).items():
            key = facts.key(module)
            plain = layer.base_layer
            x = inputs(plain)
            meant = plain.weight.double() + torch.from_numpy(
                values[f"{key}.lora_B.weight"].astype(float) @ values[f"{key}.lora_A.weight"].astype(float)
            )
            if dora:
                lengths = torch.from_numpy(values[f"{key}.lora_magnitude_vector"]).double()
                meant = lengths[:, None] * meant / meant.norm(dim=1, keepdim=True)
            delta = strength * (meant - plain.weight.double())
            expected = plain(x).double() + x.double() @ delta.T
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
            if strength == 0:
                assert torch.equal(layer(x), plain(x))
    slots.detach()
    after = weights(pipeline)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(type(module) is torch.nn.Linear for module in linears(pipeline).values())
    assert not any(hasattr(model, "peft_config") for model in parts_of(pipeline).values())


@pytest.mark.parametrize("name", WITH_TEXT)
def test_a_text_encoder_answers_to_its_update(
    name: str, bases: Callable[[str], tuple[Any, BaseFacts]], portrait: Any
) -> None:
    pipeline, base = bases(name)
    facts = family(name)
    values = factors(base, kinds=facts.all_kinds - facts.kinds)
    slots = AdapterSlots(pipeline)
    with torch.no_grad():
        before = pipeline.encode_prompts([portrait], ["a smile"])
        slots.attach(adapter(base, {key: 20 * value for key, value in values.items()}))
        during = pipeline.encode_prompts([portrait], ["a smile"])
        slots.detach()
        after = pipeline.encode_prompts([portrait], ["a smile"])

    def changed(other: Any) -> bool:
        pooled = before.pooled is not None and not torch.equal(before.pooled, other.pooled)
        return pooled or not torch.equal(before.embeds, other.embeds)

    assert changed(during)
    assert not changed(after)


def test_a_pipeline_without_its_text_encoders_takes_no_adapter_for_them(
    bases: Callable[[str], tuple[Any, BaseFacts]],
) -> None:
    pipeline, base = bases("sd15")

    class Bare:
        family = "sd15"
        transformer = pipeline.transformer

    made = adapter(base, factors(base, kinds=family("sd15").all_kinds))
    with pytest.raises(AdapterMismatch, match=r"no module of the kind text_encoder\.mlp\.fc1"):
        AdapterSlots(Bare()).attach(made)  # type: ignore[arg-type]
    assert not layers.found(pipeline.transformer)


def test_a_failure_in_a_later_part_leaves_the_adapter_before(
    bases: Callable[[str], tuple[Any, BaseFacts]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, base = bases("sdxl")
    facts, whole = family("sdxl"), layers.replace
    slots = AdapterSlots(pipeline)
    first = adapter(base, factors(base, kinds=facts.presets["attention"]))
    slots.use(first, 0.5)
    before = {name: id(module) for name, module in linears(pipeline).items()}

    def fails(model: Any, name: str, module: Any) -> None:
        if model is not pipeline.transformer:
            raise MemoryError("no memory for the text encoder")
        whole(model, name, module)

    second = adapter(base, factors(base, kinds=facts.all_kinds))
    with monkeypatch.context() as patched:
        patched.setattr(layers, "replace", fails)
        with pytest.raises(MemoryError):
            slots.attach(second)
    assert slots.current is first
    assert {name: id(module) for name, module in linears(pipeline).items()} == before
    slots.detach()
    assert not any(layers.found(model) for model in parts_of(pipeline).values())


def test_layers_of_somebody_else_on_a_text_encoder_are_refused(
    bases: Callable[[str], tuple[Any, BaseFacts]],
) -> None:
    pipeline, base = bases("sd15")
    foreign, local = AdapterSlots(pipeline), AdapterSlots(pipeline)
    foreign.attach(adapter(base, factors(base, kinds=["text_encoder.mlp.fc1"])))
    try:
        with pytest.raises(AdapterMismatch, match="text_encoder already carries"):
            local.attach(adapter(base, factors(base, kinds=["attn1.to_q"])))
    finally:
        foreign.detach()


def test_dora_on_a_quantised_base_is_refused_with_the_reason(
    bases: Callable[[str], tuple[Any, BaseFacts]],
) -> None:
    pipeline, base = bases("flux2-klein")
    module = linears(pipeline)["transformer_blocks.0.attn.to_q"]
    weight = module.weight
    module.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    try:
        values = rescaled(factors(base, kinds=["attn.to_q"]))
        with pytest.raises(AdapterMismatch, match="quantised"):
            AdapterSlots(pipeline).attach(adapter(base, values))
        assert not layers.found(pipeline.transformer)
    finally:
        module.weight = weight


def test_dora_takes_the_lengths_of_the_base_while_others_are_merged(
    bases: Callable[[str], tuple[Any, BaseFacts]],
) -> None:
    pipeline, base = bases("sd15")
    values = factors(base, kinds=family("sd15").all_kinds)
    merged, dora = adapter(base, values), adapter(base, rescaled(values))
    slots = AdapterSlots(pipeline)
    alone = slots.prepare(dora).updates
    slots.load(merged)
    assert slots.merge(((merged, 1.0),))
    beside = slots.prepare(dora).updates
    slots.detach()
    assert all(torch.equal(beside[where].gain, alone[where].gain) for where in alone)


def test_dora_in_half_precision_keeps_gains_near_one() -> None:
    """In bf16 a gain has 256 steps from 1 to 2; what DoRA changes is smaller than that."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 64, dtype=torch.bfloat16)
    lengths = linear.weight.float().norm(dim=1)
    update = layers.Update(a=torch.zeros(2, 256), b=torch.zeros(64, 2), magnitude=lengths * 1.001)
    gain = layers.place(update, linear).gain
    assert gain is not None
    torch.testing.assert_close(gain, torch.full((64,), 1.001), rtol=1e-5, atol=0)
    assert not torch.equal(gain.bfloat16().float(), gain)


def test_a_row_of_zeros_stays_a_row_of_zeros() -> None:
    linear = torch.nn.Linear(8, 2)
    with torch.no_grad():
        linear.weight[0] = 0
    update = layers.Update(a=torch.zeros(1, 8), b=torch.zeros(2, 1), magnitude=torch.ones(2))
    layer = layers.AdaptedLinear(linear, layers.Routing(groups=((1, (("one", 1.0),)),)))
    layer.updates["one"] = layers.place(update, linear)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x)[:, 0], linear(x)[:, 0])
    assert torch.isfinite(layer(x)).all()

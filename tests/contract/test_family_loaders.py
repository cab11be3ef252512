"""What the scanner judges of every family is what diffusers' pipelines load, to the last module.

A file in the canonical layout goes onto a tiny pipeline of the real classes: every injected update must be
the one in the file at the strength that the bare scan reports, in the denoiser and in text encoders, and
DoRA's weight must be the one that docs/formats.md defines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes.adapters import Factors, container, factors, rescaled
from registry.families import FAMILIES, BaseFacts, family
from registry.formats import parse_key
from registry.scanning.bare import scan_bare

OTHERS = [name for name in FAMILIES if name != "qwen-image-edit"]
"""Qwen's loader is followed in more depth, by test_loader_truth.py."""

Parts = Mapping[str, torch.nn.Module]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="diffusers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Family -> a tiny base in diffusers layout."""
    from trainer.portraits.bases import build

    return {name: build(name, tmp_path_factory.mktemp("bases") / name) for name in OTHERS}


def facts_of(name: str, folder: Path) -> BaseFacts:
    """What the registry would know of a base: the values of its config.json files."""

    def config(part: str) -> Any:
        return json.loads((folder / part / "config.json").read_text())

    found = family(name)
    return BaseFacts(
        id=f"tests/{name}",
        family=name,
        license="Apache-2.0",
        revision="1",
        config=config(found.prefix),
        text_encoders={part: config(part) for part in found.text_encoders},
    )


def loaded(name: str, folder: Path) -> tuple[Any, Parts]:
    from serving.pipelines import load

    pipe = load(name, folder).pipe
    found = family(name)
    return pipe, {part: getattr(pipe, part) for part in (found.prefix, *found.text_encoders)}


def layers(parts: Parts, prefix: str) -> dict[str, Any]:
    """Module, as the registry names it -> the LoRA layer that diffusers put there."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for part, model in parts.items():
        wrapped = "" if hasattr(model, "text_model") else "text_model."
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                found[name if part == prefix else f"{part}.{wrapped}{name}"] = layer
    return found


def updates(values: Factors) -> dict[str, torch.Tensor]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in values.items():
        parsed = parse_key(key)
        assert parsed is not None
        pairs.setdefault(parsed.module, {})[parsed.factor] = torch.from_numpy(value).double()
    return {module: pair["B"] @ pair["A"] for module, pair in pairs.items()}


def put(pipe: Any, weights: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(weights)
    pipe.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors", adapter_name="it")


@pytest.mark.parametrize("name", OTHERS)
def test_the_modules_of_the_real_pipeline_are_those_of_its_configs(
    name: str, folders: Mapping[str, Path]
) -> None:
    _, parts = loaded(name, folders[name])
    facts, found = family(name), {}
    for part, model in parts.items():
        wrapped = "" if hasattr(model, "text_model") else "text_model."
        for module, layer in model.named_modules():
            whole = module if part == facts.prefix else f"{part}.{wrapped}{module}"
            if isinstance(layer, torch.nn.Linear) and facts.is_target(whole):
                found[whole] = tuple(layer.weight.shape)
    assert found == facts_of(name, folders[name]).spec


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name in OTHERS for text in (False, True) if family(name).text_encoders or not text],
)
def test_diffusers_loads_the_canonical_layout_whole(
    name: str, text: bool, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    facts = family(name)
    base = facts_of(name, folders[name])
    values = factors(base, kinds=facts.all_kinds if text else facts.kinds)
    pipe, parts = loaded(name, folders[name])
    put(pipe, container(values, "F32"), tmp_path)
    found = {
        module: layer.get_delta_weight("it").double() for module, layer in layers(parts, facts.prefix).items()
    }
    meant = updates(values)
    assert found.keys() == meant.keys() == base.spec.keys() & meant.keys()
    for module, update in found.items():
        torch.testing.assert_close(update, meant[module], rtol=1e-5, atol=1e-7)
    report = scan_bare(container(values), bases={base.id: base})
    assert (report.facts["strength_min"], report.facts["strength_max"]) == (1.0, 1.0)


@pytest.mark.parametrize("name", OTHERS)
def test_the_strength_in_the_header_is_the_one_that_diffusers_applies(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    facts = family(name)
    base = facts_of(name, folders[name])
    values = factors(base, kinds=facts.presets["attention"])
    modules = sorted(updates(values))
    config = {"r": 4, "lora_alpha": 8, "target_modules": modules, "peft_type": "LORA"}
    tag = json.dumps({f"{facts.prefix}.{key}": value for key, value in config.items()})
    tags = {"format": "pt", "lora_adapter_metadata": tag}
    pipe, parts = loaded(name, folders[name])
    put(pipe, container(values, "F32", metadata=tags), tmp_path)
    found = layers(parts, facts.prefix)
    assert sorted(found) == modules
    assert {layer.scaling["it"] for layer in found.values()} == {2.0}
    report = scan_bare(container(values, metadata=tags), bases={base.id: base})
    assert (report.facts["strength_min"], report.facts["strength_max"]) == (2.0, 2.0), report.text()


@pytest.mark.parametrize("name", ["flux2-klein", "sd15"])
def test_dora_in_diffusers_is_the_weight_that_the_format_defines(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    facts = family(name)
    base = facts_of(name, folders[name])
    values = rescaled(factors(base, kinds=facts.presets["attention"]))
    pipe, parts = loaded(name, folders[name])
    put(pipe, container(values, "F32"), tmp_path)
    found = layers(parts, facts.prefix)
    meant = updates({key: value for key, value in values.items() if "magnitude" not in key})
    assert found.keys() == meant.keys()
    for module, layer in found.items():
        plain = layer.get_base_layer()
        weight = plain.weight.double() + meant[module]
        magnitude = torch.from_numpy(values[f"{facts.key(module)}.lora_magnitude_vector"]).double()
        weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, plain.in_features))).float()
        bias = None if plain.bias is None else plain.bias.double()
        expected = torch.nn.functional.linear(x.double(), weight, bias)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)

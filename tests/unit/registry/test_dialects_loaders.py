"""What we write is what the loaders themselves make of the original file.

The original is loaded by diffusers or PEFT onto the tiny portraits base, our canonical file is loaded by
diffusers, and the updates that both put into the model are compared: all modules, effective strength 1.000
within the rounding of the dtype. Where a loader is known to lose something, the test pins what it loses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from safetensors.torch import save_file

from fakes.adapters import Factors, factors, modules
from fakes.dialects import key_of, peft_config, rewritten
from registry.dialects.strength import CONFIG_NAME, Patterns
from registry.families import KNOWN_BASES
from registry.formats import parse_key

PORTRAITS = KNOWN_BASES["adapter-foundry/portraits-base"]
MODULES = modules(PORTRAITS)
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
ROUNDING = {"F16": 2**-10, "BF16": 2**-7, "F32": 1e-5}
RANK = 4

Deltas = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(repository: Path) -> QwenImageTransformer2DModel:
    folder = repository / "trainer/portraits/weights/base"
    return QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer")


def tensors(
    values: Factors, dialect: str, dtype: str, alpha: dict[str, float] | None = None
) -> dict[str, torch.Tensor]:
    """The file of a dialect as torch holds it."""
    result = {}
    for key, value in values.items():
        parsed = parse_key(key)
        assert parsed is not None
        tensor = torch.from_numpy(value).to(DTYPES[dtype])
        result[key_of(dialect, parsed.module, parsed.factor)] = tensor.contiguous()
        if alpha is not None and parsed.factor == "A":
            number = torch.tensor(alpha[parsed.module], dtype=DTYPES[dtype])
            result[key_of(dialect, parsed.module, "alpha")] = number
    return result


def loaded(model: QwenImageTransformer2DModel, file: Path) -> Deltas:
    """The update of each module as diffusers puts it into the model."""
    state, metadata = QwenImageLoraLoaderMixin.lora_state_dict(
        str(file.parent), weight_name=file.name, return_lora_metadata=True, local_files_only=True
    )
    QwenImageLoraLoaderMixin.load_lora_into_transformer(
        state, model, adapter_name="it", metadata=metadata, low_cpu_mem_usage=False
    )
    found = deltas(model, "it")
    model.unload_lora()
    return found


def deltas(model: torch.nn.Module, adapter: str) -> Deltas:
    found = {}
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            a, b = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
            found[name.removeprefix("base_model.model.")] = (b @ a * module.scaling[adapter]).detach()
    return found


def ratios(ours: Deltas, theirs: Deltas) -> list[float]:
    """Our strength along theirs, module by module; an update of zero in both is left out."""
    assert ours.keys() == theirs.keys()
    return [
        float((ours[name] * theirs[name]).sum() / (theirs[name] ** 2).sum())
        for name in ours
        if theirs[name].any() or ours[name].any()
    ]


def imported(tmp_path: Path, source: Path, config: bytes | None = None) -> Path:
    """Our canonical file of a foreign one."""
    weights, lora, written = rewritten(source.read_bytes(), base=PORTRAITS, config=config)
    assert {update.factors.module for update in lora.updates} == set(MODULES)
    assert abs(written.ratio - 1) <= ROUNDING[lora.dtype]
    path = tmp_path / "canonical.safetensors"
    path.write_bytes(weights)
    return path


def same(ours: Deltas, theirs: Deltas, dtype: str) -> None:
    assert ours.keys() == set(MODULES)
    assert max(abs(ratio - 1) for ratio in ratios(ours, theirs)) <= ROUNDING[dtype]
    for name, theirs_ in theirs.items():
        torch.testing.assert_close(ours[name], theirs_, rtol=0, atol=float(theirs_.abs().max()) * 2**-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dialect", ["kohya", "ComfyUI", "LightX2V"])
@pytest.mark.parametrize("alpha", [8.0, 3.0], ids=["a power of two", "rounded"])
def test_dialects_with_alpha_tensors(
    model: Any, tmp_path: Path, dialect: str, dtype: str, alpha: float
) -> None:
    file = tmp_path / "foreign.safetensors"
    save_file(tensors(factors(PORTRAITS), dialect, dtype, dict.fromkeys(MODULES, alpha)), file)
    theirs = loaded(model, file)
    same(loaded(model, imported(tmp_path, file)), theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dialect", ["diffusers", "ComfyUI", "DiffSynth", "old diffusers"])
def test_dialects_without_alpha(model: Any, tmp_path: Path, dialect: str, dtype: str) -> None:
    file = tmp_path / "foreign.safetensors"
    save_file(tensors(factors(PORTRAITS), dialect, dtype), file)
    theirs = loaded(model, file)
    same(loaded(model, imported(tmp_path, file)), theirs, dtype)


def test_ranks_and_alphas_that_differ_by_module(model: Any, tmp_path: Path) -> None:
    """Padding lower ranks with zeros changes no update."""
    low, values = factors(PORTRAITS, rank=2), factors(PORTRAITS)
    mixed = {key: low[key] if "attn" in key else value for key, value in values.items()}
    alphas = {module: 1.0 + number % 7 for number, module in enumerate(MODULES)}
    file = tmp_path / "foreign.safetensors"
    save_file(tensors(mixed, "kohya", "BF16", alphas), file)
    theirs = loaded(model, file)
    same(loaded(model, imported(tmp_path, file)), theirs, "BF16")


@pytest.mark.parametrize("rslora", [False, True])
def test_strength_in_the_header(model: Any, tmp_path: Path, rslora: bool) -> None:
    low, values = factors(PORTRAITS, rank=2), factors(PORTRAITS)
    mixed = {key: low[key] if "to_q" in key else value for key, value in values.items()}
    config = {
        "r": RANK,
        "lora_alpha": 8,
        "use_rslora": rslora,
        "rank_pattern": {"attn.to_q": 2},
        "alpha_pattern": {"img_mlp.net.2": 3, "net.2": 2},
        "target_modules": MODULES,
    }
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    file = tmp_path / "foreign.safetensors"
    save_file(tensors(mixed, "diffusers", "F32"), file, metadata)
    theirs = loaded(model, file)
    same(loaded(model, imported(tmp_path, file)), theirs, "F32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_peft(repository: Path, model: Any, tmp_path: Path, dtype: str) -> None:
    """PEFT loads its folder, we read its file with the configuration beside it."""
    from peft import PeftModel

    config = peft_config(RANK, 3.0, target_modules=MODULES)
    (tmp_path / CONFIG_NAME).write_bytes(config)
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors(factors(PORTRAITS), "PEFT", dtype), file)
    base = QwenImageTransformer2DModel.from_pretrained(
        repository / "trainer/portraits/weights/base", subfolder="transformer"
    )
    theirs = deltas(PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False), "default")
    same(loaded(model, imported(tmp_path, file, config)), theirs, dtype)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_what_a_loader_makes_of_the_pixelsmile_release(model: Any, tmp_path: Path) -> None:
    """It drops the image stream's attention without an error and applies the rest at half the strength."""
    values = factors(PORTRAITS, rank=64)
    file = tmp_path / "foreign.safetensors"
    save_file(tensors(values, "PixelSmile", "BF16"), file, {"format": "pt"})
    naive = loaded(model, file)
    ours = loaded(model, imported(tmp_path, file))
    assert len({name.split(".", 2)[2] for name in naive}) == 8
    assert ours.keys() == set(MODULES)
    assert max(abs(ratio - 2) for ratio in ratios({name: ours[name] for name in naive}, naive)) < 1e-6
    for module, delta in ours.items():
        a, b = (
            torch.from_numpy(values[f"transformer.{module}.lora_{factor}.weight"]).bfloat16().double()
            for factor in "AB"
        )
        torch.testing.assert_close(delta, 2.0 * b @ a)


def test_onetrainer(model: Any, tmp_path: Path) -> None:
    """diffusers refuses alpha tensors under its own prefix; the same file under ComfyUI's is compared."""
    alphas = dict.fromkeys(MODULES, 3.0)
    file, reference = tmp_path / "foreign.safetensors", tmp_path / "reference.safetensors"
    state = tensors(factors(PORTRAITS), "OneTrainer", "BF16", alphas)
    save_file(state, file)
    save_file({key.replace("transformer.", "diffusion_model.", 1): v for key, v in state.items()}, reference)
    theirs = loaded(model, reference)
    same(loaded(model, imported(tmp_path, file)), theirs, "BF16")


@pytest.mark.parametrize("to", ["diffusers", "kohya", "comfyui", "diffsynth"])
def test_what_we_write_loads_as_the_original(model: Any, tmp_path: Path, to: str) -> None:
    original, converted = tmp_path / "original.safetensors", tmp_path / "converted.safetensors"
    save_file(tensors(factors(PORTRAITS), "diffusers", "BF16"), original)
    converted.write_bytes(rewritten(original.read_bytes(), to, base=PORTRAITS)[0])
    ours, theirs = loaded(model, converted), loaded(model, original)
    assert ours.keys() == theirs.keys() == set(MODULES)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_we_write_for_peft_loads_in_peft(repository: Path, model: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    from registry.dialects.files import convert_file

    original = tmp_path / "original.safetensors"
    save_file(tensors(factors(PORTRAITS), "diffusers", "BF16"), original)
    folder = tmp_path / "peft"
    convert_file(original, "peft", folder / "adapter_model.safetensors", base=PORTRAITS.id)
    base = QwenImageTransformer2DModel.from_pretrained(
        repository / "trainer/portraits/weights/base", subfolder="transformer"
    )
    ours = deltas(PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False), "default")
    theirs = loaded(model, original)
    assert ours.keys() == theirs.keys() == set(MODULES)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "patterns",
    [
        ["attn.to_q"],
        ["to_q", "attn.to_q"],
        ["^transformer_blocks.0.attn.to_q"],
        ["^attn.to_q"],
        ["o_q"],
        ["attn.to.q"],
        ["net.2", "img_mlp.net.2"],
        ["transformer_blocks.0.attn.to_q", "0.attn.to_q"],
        ["proj"],
        ["transformer_blocks.1.attn.to_out.0"],
    ],
)
def test_patterns_mean_what_they_mean_to_peft(patterns: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    ours = Patterns({pattern: pattern for pattern in patterns}, "a test")
    for module in PORTRAITS.spec:
        assert ours.value(module, module) == get_pattern_key(patterns, module)

"""Attacks on serving: bytes that admission did not verify must not reach a model."""

from __future__ import annotations

import ast
import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fakes.adapters import TINY_BASE, clean_adapter
from registry.admission import Origin, Policy, VerifiedAdapter, admit_candidate
from registry.manifest import BaseModelRef
from serving import layers
from serving.adapters import AdapterSlots
from serving.engine import EditEngine
from serving.errors import BaseNotFound, CandidateRefused, ServingError, UsageError
from serving.pipelines import load as load_pipeline
from serving.pipelines.qwen_image_edit import QwenImageEdit
from serving.schema import SweepRequest
from trainer.portraits.base import build

BASE = BaseModelRef(
    id=TINY_BASE.id, revision=TINY_BASE.revision, family=TINY_BASE.family, license=TINY_BASE.license
)


class Block(torch.nn.Module):
    """The modules of one transformer block that an adapter may change, in their real names and shapes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = torch.nn.Module()
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            setattr(self.attn, name, torch.nn.Linear(width, width))
        self.attn.to_out = torch.nn.ModuleList([torch.nn.Linear(width, width)])
        for stream in ("img_mlp", "txt_mlp"):
            gate, mlp = torch.nn.Module(), torch.nn.Module()
            gate.proj = torch.nn.Linear(width, 4 * width)
            mlp.net = torch.nn.ModuleList([gate, torch.nn.Identity(), torch.nn.Linear(4 * width, width)])
            setattr(self, stream, mlp)


@pytest.fixture
def pipeline() -> Any:
    transformer = torch.nn.Module()
    transformer.transformer_blocks = torch.nn.ModuleList([Block(32), Block(32)])
    return SimpleNamespace(family="qwen-image-edit", transformer=transformer)


@pytest.fixture
def adapter() -> VerifiedAdapter:
    return admit_candidate(dict(clean_adapter()), Policy(bases={TINY_BASE.id: TINY_BASE}))


def lookalike(adapter: VerifiedAdapter) -> Any:
    """An object with every attribute of a verified adapter and an attacker's word that it is signed."""
    fields = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}
    return SimpleNamespace(**{**fields, "origin": Origin.REGISTRY})


def subclassed(adapter: VerifiedAdapter) -> Any:
    """A subclass that skips the guard."""

    class Mine(VerifiedAdapter):
        def __post_init__(self, token: object) -> None:
            pass

    fields = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}
    return Mine(**{**fields, "origin": Origin.REGISTRY})


FORGERIES: tuple[Callable[[VerifiedAdapter], Any], ...] = (
    lookalike,
    subclassed,
    lambda adapter: adapter.weights,
    lambda adapter: {"weights": adapter.weights},
    lambda adapter: Path("adapter/pytorch_lora_weights.safetensors"),
    lambda adapter: "adapter/pytorch_lora_weights.safetensors",
    lambda adapter: None,
)


def test_the_real_thing_is_attached(pipeline: Any, adapter: VerifiedAdapter) -> None:
    slots = AdapterSlots(pipeline)
    slots.attach(adapter)
    assert slots.current is adapter


def ways_in(engine: EditEngine) -> tuple[Callable[[Any], Any], ...]:
    """Everything of an engine that an adapter can be given to."""
    request = SweepRequest(image=Image.new("RGB", (64, 64)), rows=({},))
    return (
        engine.attach, engine.prefetch, engine.hold,
        lambda adapter: engine.begin(request, ((adapter, 1.0),)),
        lambda adapter: engine.sweep(request.image, adapter, request.rows),
    )  # fmt: skip


@pytest.mark.parametrize("forge", FORGERIES)
def test_only_a_verified_adapter_is_attached(
    pipeline: Any, adapter: VerifiedAdapter, forge: Callable[[VerifiedAdapter], Any]
) -> None:
    forged = forge(adapter)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    engine = EditEngine(pipeline, base=BASE, allow_candidates=True)
    slots = AdapterSlots(pipeline)
    for load in (slots.attach, slots.load, slots.prepare, *ways_in(engine)):
        with pytest.raises(UsageError, match="is not a verified adapter"):
            load(forged)
    after = pipeline.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_candidate_does_not_pass_for_signed(pipeline: Any, adapter: VerifiedAdapter) -> None:
    for load in ways_in(EditEngine(pipeline, base=BASE)):
        with pytest.raises(CandidateRefused):
            load(adapter)
    assert not layers.found(pipeline.transformer)


@pytest.mark.parametrize(
    "change",
    [
        lambda adapter: dataclasses.replace(adapter, weights=b"evil"),
        lambda adapter: dataclasses.replace(adapter, origin=Origin.REGISTRY),
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
    ],
)
def test_a_verified_adapter_cannot_be_made_from_another(
    adapter: VerifiedAdapter, change: Callable[[VerifiedAdapter], Any]
) -> None:
    with pytest.raises((TypeError, ValueError)):
        change(adapter)


def test_verified_bytes_cannot_be_changed(adapter: VerifiedAdapter) -> None:
    assert isinstance(adapter.weights, bytes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.weights = b"evil"  # type: ignore[misc]


def test_a_failed_attack_leaves_the_honest_adapter_serving(pipeline: Any, adapter: VerifiedAdapter) -> None:
    slots = AdapterSlots(pipeline)
    slots.attach(adapter)
    with pytest.raises(ServingError):
        slots.attach(lookalike(adapter))
    assert slots.current is adapter


# Names through which the libraries in use turn files or hub ids into adapter weights, or bytes into objects.
LOADERS = {
    "load_lora_weights", "load_lora_adapter", "load_adapter", "load_attn_procs", "lora_state_dict",
    "from_pretrained", "load_file", "safe_open", "torch_load", "set_peft_model_state_dict", "load_state_dict",
    "hf_hub_download", "snapshot_download", "load_ip_adapter", "load_textual_inversion", "loads", "fuse_lora",
    "PeftModel", "pickle",
}  # fmt: skip
# What remains: base models, which a person installs or names on the hub.
ALLOWED = {
    ("pipelines/loading.py", "from_pretrained"),
    ("pipelines/loading.py", "safe_open"),
    ("pipelines/qwen_image_edit.py", "from_pretrained"),
}


def test_serving_has_no_other_way_to_weights(repository: Path) -> None:
    found = set()
    for path in (repository / "serving").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = set()
            if isinstance(node, ast.Attribute):
                names = set() if ast.unparse(node) == "json.loads" else {node.attr}
                if node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "torch":
                    names = {"torch_load"}
            elif isinstance(node, ast.Name):
                names = {node.id}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.rpartition(".")[2] for alias in node.names}
            found |= {(path.relative_to(repository / "serving").as_posix(), name) for name in names & LOADERS}
    assert found <= ALLOWED, f"serving loads in a new way: {sorted(found - ALLOWED)}"


def test_the_bytes_that_are_loaded_are_those_of_the_verified_adapter(repository: Path) -> None:
    calls = [
        (path.name, ast.unparse(node))
        for path in sorted((repository / "serving").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"_tensors", "torch.frombuffer", "load"}
    ]
    assert [call for call in calls if call[1].startswith("_tensors")] == [
        ("fitting.py", "_tensors(adapter.weights)")
    ]
    assert {name for name, call in calls if "frombuffer" in call} == {"fitting.py"}


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_base_model_of_pickled_weights_is_not_opened(part: str, tmp_path: Path) -> None:
    """A folder without its safetensors file offers the weights as a pickle, which loaders fall back to."""
    base = build(tmp_path / "base", width=32, layers=2, head=16)
    safe = next((base / part).glob("*.safetensors"))
    pickled = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(safe), base / part / pickled)
    safe.unlink()
    with pytest.raises(OSError, match="safetensors"):
        QwenImageEdit.load(base)


PARTS = {
    "flux": ("transformer", "vae", "text_encoder", "text_encoder_2"),
    "flux-kontext": ("transformer", "vae", "text_encoder", "text_encoder_2"),
    "flux2-klein": ("transformer", "vae", "text_encoder"),
    "sd15": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
}


@pytest.mark.parametrize(("family", "part"), [(family, part) for family in PARTS for part in PARTS[family]])
def test_no_family_opens_pickled_weights(family: str, part: str, tmp_path: Path) -> None:
    from trainer.portraits.bases import build as build_family

    base = build_family(family, tmp_path / "base")
    safe = next((base / part).glob("*.safetensors"))
    pickled = "pytorch_model.bin" if part.startswith("text_encoder") else "diffusion_pytorch_model.bin"
    torch.save(load_file(safe), base / part / pickled)
    safe.unlink()
    with pytest.raises(BaseNotFound, match="safetensors"):
        load_pipeline(family, base)

"""Bases on devices that are too small for them: the same pictures, with less on the device at any time."""

from __future__ import annotations

import importlib.util
import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.tiny_bases import inputs
from registry.manifest import BaseModelRef
from serving import layers, pipelines
from serving.adapters import AdapterSlots
from serving.engine import EditEngine
from serving.errors import AdapterMismatch, BaseNotFound, UsageError
from serving.frozen import FrozenLinear, stored_bytes
from serving.placement import Offloaded, Room, Waiting, blocks, networks, spread, stored_modules
from serving.schema import SweepRequest
from trainer.portraits.bases import BUILDERS, build

SMALL = ("fp8", "nf4")
BASE = BaseModelRef(
    id="adapter-foundry/portraits-base", revision="test", family="qwen-image-edit", license="Apache-2.0"
)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the folder of a family's tiny base."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp(family) / "base")
        return made[family]

    return folder


def edited(pipeline: Any, portrait: Any, steps: int = 3) -> torch.Tensor:
    """Pixels of two edits, from the picture to the picture."""
    prompts = pipeline.encode_prompts([portrait] * 2, ["a happy face", "a sad face"])
    source = pipeline.encode_images([portrait] * 2)
    with torch.no_grad():
        return pipeline.decode(pipeline.denoise(source, prompts, seeds=[1, 2], steps=steps))


@pytest.mark.parametrize("offload", ["models", "blocks"])
@pytest.mark.parametrize("family", BUILDERS)
def test_what_waits_changes_no_pixel(bases: Any, portrait: Any, family: str, offload: Any) -> None:
    plain = pipelines.load(family, bases(family))
    portrait = portrait.resize(plain.size[::-1])
    away = pipelines.load(family, bases(family), offload=offload)
    assert torch.equal(edited(away, portrait), edited(plain, portrait))
    assert torch.equal(edited(away, portrait), edited(plain, portrait))  # and a second time, from what waits


@pytest.mark.parametrize("weights", SMALL)
@pytest.mark.parametrize("family", BUILDERS)
def test_small_weights_are_those_of_packing_each_layer(bases: Any, family: str, weights: Any) -> None:
    """Read layer by layer, or made small where they are: the same numbers in the same places."""
    read = pipelines.load(family, bases(family), weights=weights)
    made = pipelines.load(family, bases(family))
    for name in stored_modules(made.transformer):
        parent, _, child = name.rpartition(".")
        linear = made.transformer.get_submodule(name)
        setattr(made.transformer.get_submodule(parent), child, FrozenLinear(linear, weights))
    ours, theirs = read.transformer.state_dict(), made.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    given = inputs(made, 2)
    assert torch.equal(read.predict(**given), made.predict(**given))
    assert not any(
        tensor.is_meta for part in networks(read).values() for tensor in part.state_dict().values()
    )
    assert not any(tensor.requires_grad for tensor in read.transformer.parameters())


@pytest.mark.parametrize("offload", ["models", "blocks"])
@pytest.mark.parametrize("weights", SMALL)
def test_small_weights_can_wait_too(bases: Any, portrait: Any, weights: Any, offload: Any) -> None:
    plain = pipelines.load("qwen-image-edit", bases("qwen-image-edit"), weights=weights)
    away = pipelines.load("qwen-image-edit", bases("qwen-image-edit"), weights=weights, offload=offload)
    assert torch.equal(edited(away, portrait), edited(plain, portrait))


@pytest.mark.parametrize(("weights", "most"), [("fp8", 0.05), ("nf4", 0.3)])
def test_small_weights_stay_near_the_whole_ones(bases: Any, weights: Any, most: float) -> None:
    whole = pipelines.load("qwen-image-edit", bases("qwen-image-edit"))
    small = pipelines.load("qwen-image-edit", bases("qwen-image-edit"), weights=weights)
    given = inputs(whole, 2)
    truth = whole.predict(**given)
    assert 0 < float((small.predict(**given) - truth).norm() / truth.norm()) < most
    held = {
        name: layer for name, layer in small.transformer.named_modules() if isinstance(layer, FrozenLinear)
    }
    assert held.keys() == set(stored_modules(whole.transformer))
    for layer in held.values():
        own = sum(tensor.nbytes for tensor in (layer.weight, layer.scale) if tensor is not None)
        assert own == stored_bytes(weights, layer.out_features, layer.in_features)


def test_no_two_layers_are_whole_at_once(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published weights are never in memory together: each layer is small before the next is read."""
    whole: list[weakref.ref[torch.Tensor]] = []
    most = 0
    make = FrozenLinear.__init__

    def watched(self: FrozenLinear, linear: torch.nn.Linear, stored: Any) -> None:
        nonlocal most
        whole.append(weakref.ref(linear.weight))
        most = max(most, sum(one() is not None for one in whole))
        make(self, linear, stored)

    monkeypatch.setattr(FrozenLinear, "__init__", watched)
    pipelines.load("qwen-image-edit", bases("qwen-image-edit"), weights="fp8")
    # The layer at work, and the one before it, whose name is still bound.
    assert len(whole) > 20
    assert most <= 2


def test_text_encoders_and_denoiser_take_turns(bases: Any, portrait: Any) -> None:
    """Without a second device: a copy lies elsewhere than what waits."""
    pipeline = pipelines.load("qwen-image-edit", bases("qwen-image-edit"))
    seen: dict[str, set[str]] = {}

    def here() -> set[str]:
        return {name for name, tensor in first.items() if tensor.data_ptr() != waiting[name]}

    for part in ("encode_prompts", "encode_images", "advance", "decode"):
        setattr(pipeline, part, lambda *_, part=part, **__: seen.update({part: here()}))
    first = {name: next(part.parameters()) for name, part in networks(pipeline).items()}
    away = Offloaded(pipeline, torch.device("cpu"), stream=False)
    waiting = {name: tensor.data_ptr() for name, tensor in first.items()}
    away.encode_prompts([portrait], ["a face"])
    away.encode_images([portrait])
    assert here() == {"text_encoder"}
    away.advance([])
    away.decode(torch.zeros(1))
    assert here() == {"transformer"}
    away.encode_prompts([portrait], ["a face"])
    assert here() == {"text_encoder"}
    assert seen == {
        "encode_prompts": {"text_encoder"},
        "encode_images": {"text_encoder", "vae"},
        "advance": {"transformer"},
        "decode": {"transformer", "vae"},
    }


@pytest.mark.parametrize("family", ["qwen-image-edit", "sdxl"])
def test_blocks_are_only_there_while_they_run(bases: Any, family: str) -> None:
    pipeline = pipelines.load(family, bases(family), offload="blocks")
    layers = [layer for layer in pipeline.transformer.modules() if isinstance(layer, FrozenLinear)]
    assert sum(layer.weight.nbytes for layer in layers) < pipeline.waiting_bytes  # and their biases
    seen: list[int] = []
    for _, block in blocks(pipeline.transformer):
        block.register_forward_pre_hook(
            lambda *_: seen.append(sum(layer.fetched is not None for layer in layers))
        )
    given = inputs(pipeline, 2)
    pipeline.predict(**given)
    assert len(seen) == len(blocks(pipeline.transformer))
    assert max(seen) <= max(
        sum(isinstance(m, FrozenLinear) for m in block.modules()) for _, block in blocks(pipeline.transformer)
    )
    assert not any(layer.fetched for layer in layers)


@pytest.mark.parametrize("family", ["qwen-image-edit", "flux", "sdxl"])
def test_every_fetch_is_begun_before_it_is_wanted(bases: Any, family: str) -> None:
    pipeline = pipelines.load(family, bases(family), offload="blocks")
    given = inputs(pipeline, 2)
    for _ in range(2):  # the first tells the order, the second begins where the first ended
        pipeline.predict(**given)
    stream: Waiting = pipeline._stream
    begun: list[int] = []
    start = stream._start
    stream._start = lambda number: (begun.append(number), start(number))[1]  # type: ignore[method-assign]
    pipeline.predict(**given)
    pipeline.predict(**given)
    count = len(blocks(pipeline.transformer))
    assert len(begun) == 2 * count  # none in vain, none late
    assert sorted(begun[:count]) == list(range(count))


def test_a_pass_that_fails_leaves_nothing_fetched(bases: Any) -> None:
    pipeline = pipelines.load("qwen-image-edit", bases("qwen-image-edit"), offload="blocks")
    given = inputs(pipeline, 2)
    want = pipeline.predict(**given)
    _, block = blocks(pipeline.transformer)[1]

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    broken = block.attn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipeline.predict(**given)
    broken.remove()
    assert not any(getattr(layer, "fetched", None) for layer in pipeline.transformer.modules())
    assert torch.equal(pipeline.predict(**given), want)


def test_what_is_set_on_a_pipeline_that_waits_cannot_miss_it(bases: Any) -> None:
    pipeline = pipelines.load("flux", bases("flux"), offload="models")
    assert pipeline.guidance == 3.5
    with pytest.raises(AttributeError):
        pipeline.guidance = 1.0


def test_what_waits_lies_side_by_side_in_large_pieces() -> None:
    """Where memory is pinned, that is: every small piece would be rounded up to a power of two."""
    draw = torch.Generator().manual_seed(1)
    room = Room(torch.device("cpu"), piece=4096, pinned=True)
    sent = [
        torch.randn(7, 9, generator=draw),
        torch.randint(0, 255, (3, 5), generator=draw).to(torch.uint8),
        torch.randn(100, generator=draw).bfloat16(),
        torch.randn(2000, generator=draw),  # larger than a piece
        torch.tensor(3.0),
        torch.randn(0, 4),
        torch.randn(600, generator=draw),
        torch.randn(600, generator=draw),  # does not fit beside the one before
    ]
    kept = [room.keep(tensor) for tensor in sent]
    for tensor, place in zip(sent, kept, strict=True):
        assert torch.equal(place, tensor)
        assert place.dtype == tensor.dtype
        assert place.is_contiguous()
    pieces = {place.untyped_storage().data_ptr() for place in kept if place.numel()}
    assert len(pieces) == 4
    spans = sorted((place.data_ptr(), place.data_ptr() + place.nbytes) for place in kept if place.numel())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_waiting_blocks_stand_apart() -> None:
    assert spread(6, 0) == frozenset()
    assert spread(6, 2) == {2, 5}
    assert spread(6, 3) == {1, 3, 5}
    assert spread(6, 9) == set(range(6))
    assert spread(1, 1) == {0}
    assert all(len(spread(60, n)) == n for n in range(61))


def test_nf4_without_its_package_is_explained(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(UsageError, match="need the package bitsandbytes") as caught:
        pipelines.load("qwen-image-edit", bases("qwen-image-edit"), weights="nf4")
    assert "adapter-foundry[nf4]" in caught.value.mend


def shards(folder: Path, into: Path) -> Path:
    """Copy a base with its denoiser cut into two files and an index, as large bases are published."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, into)
    part = into / "transformer"
    single = part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(single)
    single.unlink()
    where = {name: f"diffusion_pytorch_model-0000{number % 2 + 1}-of-00002.safetensors"
             for number, name in enumerate(tensors)}  # fmt: skip
    for file in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == file}, part / file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return into


def test_small_weights_are_read_from_shards(bases: Any, tmp_path: Path) -> None:
    folder = shards(bases("qwen-image-edit"), tmp_path / "base")
    one = pipelines.load("qwen-image-edit", bases("qwen-image-edit"), weights="nf4").transformer.state_dict()
    two = pipelines.load("qwen-image-edit", folder, weights="nf4").transformer.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("broken", ["gone", "pickled", "missing", "shape", "escape", "torn"])
def test_a_base_that_is_not_whole_is_refused(bases: Any, tmp_path: Path, broken: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = shards(bases("qwen-image-edit"), tmp_path / "base")
    part = folder / "transformer"
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    first = sorted(part.glob("*.safetensors"))[0]
    if broken in ("gone", "pickled"):
        for file in part.glob("*.safetensors"):
            file.unlink()
        if broken == "pickled":
            torch.save({}, part / "diffusion_pytorch_model.bin")
    elif broken == "escape":
        # Beside the folder lies all that it asks for, which nobody checked.
        everything: dict[str, torch.Tensor] = {}
        for file in part.glob("*.safetensors"):
            everything |= load_file(file)
        save_file(everything, folder / "outside.safetensors")
        value = json.loads(index.read_text())
        value["weight_map"] = dict.fromkeys(value["weight_map"], "../outside.safetensors")
        index.write_text(json.dumps(value))
    elif broken == "torn":
        first.write_bytes(first.read_bytes()[:200])
    else:
        tensors = load_file(first)
        name = next(name for name in tensors if "transformer_blocks" in name)
        tensors[name] = torch.zeros(3)
        if broken == "missing":
            del tensors[name]
        save_file(tensors, first)
    with pytest.raises(BaseNotFound):
        pipelines.load("qwen-image-edit", folder, weights="fp8")


def answer(engine: EditEngine, portrait: Any, stacks: list[Any]) -> list[bytes]:
    """Pixels of runs that share each step, one a stack of adapters."""
    request = SweepRequest.make(image=portrait, rows=({"happy": 0.8}, {}), seed=4, steps=4)
    runs = [engine.begin(request, stack) for stack in stacks]
    while not runs[0].done:
        engine.advance(runs)
    return [result.image.tobytes() for run in runs for result in engine.finish(run)]


@pytest.mark.parametrize(
    ("weights", "offload"),
    [("whole", "models"), ("whole", "blocks"), ("fp8", "blocks"), ("nf4", "models")],
)
def test_adapters_come_and_go_while_the_base_waits(
    tiny_base: Path, portrait: Any, make_adapter: Any, weights: Any, offload: Any
) -> None:
    """Loaded, swapped, evicted, beside one another: the pictures are those of a base that does not wait."""
    first, second = make_adapter(1), make_adapter(2, rank=2, targets=("attn.to_q", "img_mlp.net.2"))
    budget = AdapterSlots(pipelines.load("qwen-image-edit", tiny_base)).prepare(first).nbytes + 1
    plain, away = (
        EditEngine(pipelines.load("qwen-image-edit", tiny_base, weights=weights, offload=how), base=BASE,
                   allow_candidates=True, adapter_memory=budget, merge=how != "none")
        for how in ("none", offload)
    )  # fmt: skip
    for stack in [((first, 1.0),), ((second, 0.5),), ((first, 0.7),), ((first, 0.0),), ((second, 1.0),)]:
        one, other = (answer(engine, portrait, [stack]) for engine in (plain, away))
        assert one == other, stack
        assert len(away.slots.residents) == 1  # the other one was evicted
    for engine in (plain, away):
        engine.slots.evict(second)
        engine.slots._budget = None
    mixed = [((first, 1.0),), ((second, 0.5), (first, 0.2)), ((second, 1.0),)]
    assert answer(plain, portrait, mixed) == answer(away, portrait, mixed)
    away.detach()
    plain.detach()
    assert not any("base_layer" in name for name, _ in away._pipeline.transformer.named_modules())
    state = plain._pipeline.transformer.state_dict()
    for name, tensor in away._pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("offload", ["models", "blocks"])
def test_what_waits_is_never_merged_into(tiny_base: Path, make_adapter: Any, offload: Any) -> None:
    """What is merged into a copy is lost with the copy, and the next picture would be the base's."""
    adapter = make_adapter(1)
    pipeline = pipelines.load("qwen-image-edit", tiny_base, offload=offload)
    slots = AdapterSlots(pipeline)
    slots.load(adapter)
    pipeline.predict(**inputs(pipeline, 2))  # the denoiser's copy is here
    assert not slots.merge(((adapter, 1.0),))


def test_dora_needs_weights_as_published_wherever_they_wait() -> None:
    draw = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(32, 16)
    update = layers.Update(
        a=torch.randn(2, 32, generator=draw), b=torch.randn(16, 2, generator=draw), magnitude=torch.ones(16)
    )
    here = layers.place(update, linear)
    waits = FrozenLinear(torch.nn.Linear(32, 16), "fp32")
    waits.weight.data = linear.weight.data
    assert torch.equal(layers.place(update, waits).gain, here.gain)
    with pytest.raises(AdapterMismatch, match="the base is quantised"):
        layers.place(update, FrozenLinear(linear, "fp8"))

"""What the scanner judges is what the loaders inject, to the last module.

Files of every dialect, honest and meddled with, go through ``scan_bare``. Whatever it does not block is
loaded by the pinned diffusers (PEFT for PEFT's own layout) onto a tiny transformer: every injected update
must be the one that the scanner looked at, and the strength the one that it reports. Where the loader takes
nothing, the report says so. Nothing in between exists.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fakes.adapters import RANK, TINY_BASE, TRAINED_KINDS, factors, modules
from fakes.dialects import SPELLED, Tensors, key_of, lora_file, peft_config, spelled
from registry.dialects import reading
from registry.dialects.canonical import CanonicalContent
from registry.dialects.grammar import SPELLINGS, Spelling
from registry.dialects.strength import CONFIG_NAME
from registry.formats import parse_key
from registry.scanning import ScanReport
from registry.scanning.bare import scan_bare
from registry.scanning.product import tensor

BASES = {TINY_BASE.id: TINY_BASE}
MODULES = modules()
LOADED = ("kohya", "ComfyUI", "DiffSynth", "LightX2V")
"""Dialects in which diffusers reads alpha tensors."""

Updates = dict[str, torch.Tensor]
"""Module -> its whole update, s * B @ A, in float64."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="diffusers")


@pytest.fixture(scope="module")
def model() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32,
        in_channels=16, out_channels=4, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


# --- three readings of a file ------------------------------------------------------------------------------


class File:
    """A file as a test builds it: what is in it, and what lies beside it."""

    def __init__(
        self, tensors: Tensors, metadata: dict[str, str] | None = None, config: bytes | None = None
    ) -> None:
        self.tensors, self.metadata, self.config = tensors, metadata or {}, config

    def __repr__(self) -> str:
        shapes = {key: (dtype, *values.shape) for key, (dtype, values) in self.tensors.items()}
        return f"File({shapes}, metadata={self.metadata}, config={self.config!r})"

    @property
    def data(self) -> bytes:
        return lora_file(self.tensors, self.metadata)

    def scanned(self) -> ScanReport:
        return scan_bare(self.data, bases=BASES, config=self.config)


def judged(file: File) -> Updates:
    """What the scanner's layers looked at."""
    lora = reading.read(file.data, TINY_BASE, config=file.config)
    canonical = CanonicalContent(lora, file.data)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, info in canonical.header.tensors.items():
        parsed = parse_key(key)
        assert parsed is not None
        values = torch.from_numpy(tensor(canonical, info).astype(np.float64))
        pairs.setdefault(parsed.module, {})[parsed.factor] = values
    return {module: pair["B"] @ pair["A"] for module, pair in pairs.items()}


def injected(model: QwenImageTransformer2DModel, file: File) -> Updates:
    """What the loader of the file's dialect puts into the model; nothing if it refuses the file."""
    load = _by_peft if any(key.startswith("base_model.model.") for key in file.tensors) else _by_diffusers
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / "adapter_model.safetensors").write_bytes(file.data)
        if file.config is not None:
            (Path(folder) / CONFIG_NAME).write_bytes(file.config)
        with load(model, Path(folder)) as (loaded, name):
            return {
                path.removeprefix("base_model.model."): layer.get_delta_weight(name).detach().double()
                for path, layer in loaded.named_modules()
                if name in getattr(layer, "lora_A", {})
            }


Loaded = Iterator[tuple[torch.nn.Module, str]]


@contextlib.contextmanager
def _by_diffusers(model: QwenImageTransformer2DModel, folder: Path) -> Loaded:
    try:
        state, metadata = QwenImageLoraLoaderMixin.lora_state_dict(
            str(folder),
            weight_name="adapter_model.safetensors",
            return_lora_metadata=True,
            local_files_only=True,
        )
        if not all("lora" in key for key in state):
            raise ValueError("what load_lora_weights refuses")
        QwenImageLoraLoaderMixin.load_lora_into_transformer(
            state, model, adapter_name="it", metadata=metadata, low_cpu_mem_usage=False
        )
        yield model, "it"
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError):
        yield torch.nn.Identity(), "it"
    finally:
        if hasattr(model, "peft_config"):
            model.unload_lora()


@contextlib.contextmanager
def _by_peft(model: QwenImageTransformer2DModel, folder: Path) -> Loaded:
    from peft import PeftModel

    if not (folder / CONFIG_NAME).exists():
        yield torch.nn.Identity(), "default"
        return
    loaded = None
    try:
        loaded = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
        yield loaded, "default"
    except (ValueError, RuntimeError, KeyError, TypeError):
        yield torch.nn.Identity(), "default"
    finally:
        if loaded is not None:
            loaded.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config


def agree(model: QwenImageTransformer2DModel, file: File, tolerance: float = 1e-3) -> Updates:
    """Demand that a file which the scanner lets through is what the loader injects."""
    report = file.scanned()
    assert report.verdict != "block", report.text()
    ours, theirs = judged(file), injected(model, file)
    if not theirs:
        assert not report.about["loader"].endswith("all modules"), report.text()
        return theirs
    assert ours.keys() <= theirs.keys(), "the loader dropped what the scanner judged"
    for module, update in theirs.items():
        if module not in ours:  # PEFT makes a layer for every target; without weights it must do nothing
            assert not update.any(), module
            continue
        scale = update.norm().clamp_min(1e-30)
        assert (ours[module] - update).norm() <= tolerance * scale, module
    assert report.about["loader"].endswith("all modules")
    return theirs


# --- (a) any file: equal, or blocked -----------------------------------------------------------------------

SCALES = st.sampled_from([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 0.5])
NAMES = st.sampled_from(["attn.to_q", "to_q", "img_mlp.net.2", "net.2", MODULES[0], "^" + MODULES[3], "proj"])
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "r": st.sampled_from([2, RANK, RANK, 8, "4", None]),
        "lora_alpha": st.sampled_from([4, 4, 8, 8.0, 2, "8", 0, None]),
        "use_rslora": st.sampled_from([True, False, None, 1, "no"]),
        "rank_pattern": st.dictionaries(NAMES, st.sampled_from([2, RANK]), max_size=2) | st.none(),
        "alpha_pattern": st.dictionaries(NAMES, SCALES, max_size=2),
        "target_modules": st.sampled_from(
            (
                MODULES,
                ["to_q", "to_k"],
                [*TRAINED_KINDS],
                None,
                "(a+)+$",
                "all-linear",
                "dummy-target-modules",
                [],
            )
        ),
        "init_lora_weights": st.sampled_from([True, False, None, "gaussian", "orthogonal", "pissa"]),
        "exclude_modules": st.sampled_from([None, ["to_q"], "to_q"]),
        "layers_to_transform": st.sampled_from([None, [0], 0]),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "peft_type": st.sampled_from(["LORA", "LOHA"]),
        "use_dora": st.sampled_from([False, True]),
        "modules_to_save": st.sampled_from([None, ["proj_out"]]),
        "fan_in_fan_out": st.booleans(),
        "something_new": st.sampled_from([None, 1]),
    },
)


@st.composite
def files(draw: st.DrawFn) -> File:
    """A file of some dialect, with up to two things that a tamperer or a careless tool does to it."""
    dialect = draw(st.sampled_from(sorted(SPELLED)))
    rank = draw(st.sampled_from([RANK, RANK, 8]))
    chosen = draw(st.sets(st.sampled_from(MODULES), min_size=1, max_size=4) | st.just(set(MODULES[:12])))
    values = {}
    for module in sorted(chosen):
        made = factors(rank=draw(st.sampled_from([rank, rank, rank, 2])), kinds=[module.split(".", 2)[2]])
        for factor in "AB":
            key = f"transformer.{module}.lora_{factor}.weight"
            values[key] = made[key]
    alpha = draw(st.none() | SCALES)
    file = File(tensors=spelled(values, dialect, dtype="F32", alpha=alpha))
    if dialect == "PEFT" or draw(st.integers(0, 9)) == 0:
        fields = draw(FIELDS) if draw(st.booleans()) else {}
        plain = {"r": rank, "lora_alpha": draw(SCALES), "target_modules": sorted(chosen)}
        file.config = json.dumps(json.loads(peft_config(rank, 4.0)) | plain | fields).encode()
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=2)):
        change(draw, file, dialect)
    return file


def _in_header(draw: st.DrawFn, file: File, dialect: str) -> None:
    """A configuration in the header, with or without the part's name before its fields."""
    plain = {"r": draw(st.sampled_from([RANK, 8])), "lora_alpha": draw(SCALES), "target_modules": MODULES}
    fields = plain | (draw(FIELDS) if draw(st.booleans()) else {})
    prefix = draw(st.sampled_from(["transformer.", "transformer.", "", "text_encoder."]))
    text = json.dumps({prefix + name: value for name, value in fields.items()})
    file.metadata["lora_adapter_metadata"] = draw(st.sampled_from([text, text, text, text, "", "{}", "null"]))


def _claimed(draw: st.DrawFn, file: File, dialect: str) -> None:
    name = draw(st.sampled_from(["ss_network_alpha", "lora_alpha", "network_alpha", "alpha", "format"]))
    file.metadata[name] = draw(st.sampled_from(["4", "8.0", "4.0", "None", "0", "1e9"]))


def _misspelled(draw: st.DrawFn, file: File, dialect: str) -> None:
    """One key, or all of one kind, in the way of another dialect."""
    old = draw(st.sampled_from(sorted(file.tensors)))
    other = draw(st.sampled_from(sorted(SPELLED)))
    known = {
        key_of(way, module, role): (module, role)
        for way in SPELLED
        for module in MODULES
        for role in ("A", "B", "alpha")
    }
    if old not in known:
        return
    module, role = known[old]
    moved = key_of(other, module, role)
    if draw(st.booleans()):
        file.tensors[moved] = file.tensors[old]  # both: the loader takes one of them
    else:
        file.tensors = {moved if key == old else key: value for key, value in file.tensors.items()}


def _renamed(draw: st.DrawFn, file: File, dialect: str) -> None:
    old = draw(st.sampled_from(sorted(file.tensors)))
    new = draw(
        st.sampled_from(
            (
                old.upper(),
                old + " ",
                "transformer." + old,
                old.replace("transformer_blocks.0", "transformer_blocks.00"),
                old.replace("default.", ""),
                old.replace("lora_A", "lora_B"),
                old.replace(".weight", ".bias"),
                old.replace("to_q", "to_q.default"),
                old.replace("attn", "attn.default"),
                old.replace(".weight", ".default.weight"),
                "_orig_mod." + old,
            )
        )
    )
    file.tensors = {new if key == old else key: value for key, value in file.tensors.items()}


def _dropped(draw: st.DrawFn, file: File, dialect: str) -> None:
    if len(file.tensors) > 1:
        del file.tensors[draw(st.sampled_from(sorted(file.tensors)))]


def _alpha(draw: st.DrawFn, file: File, dialect: str) -> None:
    """An alpha for one module, of any dtype and shape, that may not even be in the file."""
    module = draw(st.sampled_from(MODULES))
    key = key_of(draw(st.sampled_from([dialect, dialect, "kohya"])), module, "alpha")
    value = np.array(draw(SCALES))
    shaped = draw(st.sampled_from([value, value, value.reshape(1), np.stack([value] * 2)]))
    file.tensors[key] = draw(st.sampled_from(["F32", "F64", "BF16", "F16"])), shaped


def _added(draw: st.DrawFn, file: File, dialect: str) -> None:
    module = draw(st.sampled_from(MODULES))
    name = draw(
        st.sampled_from(
            (
                f"transformer.{module}.lora_magnitude_vector",
                f"transformer.{module}.dora_scale",
                f"{module}.lokr_w1",
                f"transformer.{module}.lora_B.bias",
                f"{module}.diff_b",
                "text_encoder.layers.0.q_proj.lora_A.weight",
                "lora_te_text_model_encoder.lora_down.weight",
                "transformer.proj_out.lora_A.weight",
                "lora_controlnet",
                "default.lora",
            )
        )
    )
    file.tensors[name] = "F32", np.ones((RANK, 32), np.float32)


def _reordered(draw: st.DrawFn, file: File, dialect: str) -> None:
    """The first key decides how diffusers reads all of them."""
    file.tensors = dict(draw(st.permutations(sorted(file.tensors.items(), key=lambda item: item[0]))))


CHANGES: list[Callable[[st.DrawFn, File, str], None]] = [
    *(_in_header, _in_header, _claimed, _misspelled, _renamed, _dropped, _alpha, _added, _reordered),
]


def _released(order: int) -> File:
    """PixelSmile's layout in another rank, with an attention key or another one in front."""
    tensors = spelled(factors(kinds=["attn.to_q", "attn.add_k_proj"]), "PixelSmile", dtype="F32")
    return File(tensors=dict(sorted(tensors.items(), reverse=bool(order))))


SEEN: dict[str, int] = {}


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(files())
@example(_released(0))
@example(_released(1))
def _equal_or_blocked(model: QwenImageTransformer2DModel, file: File) -> None:
    report = file.scanned()
    assert "ADP-SCN-001" not in {found.rule for found in report.findings}, report.text()
    outcome = report.verdict
    if outcome != "block" and not any(found.rule == "ADP-STR-021" for found in report.findings):
        outcome = "loaded" if agree(model, file) else "not loaded"
    SEEN[outcome] = SEEN.get(outcome, 0) + 1


def test_what_is_not_blocked_is_what_the_loader_injects(model: QwenImageTransformer2DModel) -> None:
    _equal_or_blocked(model)
    assert SEEN["loaded"] >= 60, SEEN  # otherwise nothing was compared
    assert SEEN["block"] >= 60, SEEN


# --- (b) the strength, in every place where one can stand -------------------------------------------------

FULL = factors(kinds=TRAINED_KINDS)


def _strengths(model: QwenImageTransformer2DModel, file: File, low: float, high: float) -> None:
    """The report names the strength, and the loader's updates are as large as that makes them."""
    report = file.scanned()
    theirs = agree(model, file)
    assert theirs.keys() == set(MODULES)
    assert report.facts["strength_min"] == pytest.approx(low, rel=1e-3)
    assert report.facts["strength_max"] == pytest.approx(high, rel=1e-3)
    largest = max(float(torch.linalg.matrix_norm(update, 2)) for update in theirs.values())
    assert report.facts["spectral_norm_max"] == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("dialect", LOADED)
def test_alpha_tensors(model: QwenImageTransformer2DModel, dialect: str, dtype: str) -> None:
    alpha = 3.0 if dtype == "F32" else 8.0  # in half precision the loader itself rounds other factors
    _strengths(
        model, File(tensors=spelled(FULL, dialect, dtype=dtype, alpha=alpha)), alpha / RANK, alpha / RANK
    )


def test_alpha_tensors_that_differ(model: QwenImageTransformer2DModel) -> None:
    tensors = spelled(FULL, "kohya", dtype="F32", alpha=lambda name: 12.0 if "img" in name else 2.0)
    _strengths(model, File(tensors=tensors), 0.5, 3.0)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("dialect", ["diffusers", "old diffusers", "ComfyUI", "DiffSynth", "kohya"])
def test_no_alpha(model: QwenImageTransformer2DModel, dialect: str, dtype: str) -> None:
    _strengths(model, File(tensors=spelled(FULL, dialect, dtype=dtype)), 1.0, 1.0)


@pytest.mark.parametrize("dialect", ["diffusers", "old diffusers", "ComfyUI", "DiffSynth", "kohya"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_configuration_in_the_header(
    model: QwenImageTransformer2DModel, dialect: str, rslora: bool
) -> None:
    fields = {"r": RANK, "lora_alpha": 6, "use_rslora": rslora, "target_modules": MODULES}
    fields["alpha_pattern"] = {"img_mlp.net.2": 3}
    text = json.dumps({f"transformer.{name}": value for name, value in fields.items()})
    file = File(tensors=spelled(FULL, dialect, dtype="F32"), metadata={"lora_adapter_metadata": text})
    root = 2.0 if rslora else 4.0
    _strengths(model, file, 3 / root, 6 / root)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_configuration_beside_the_file(model: QwenImageTransformer2DModel, rslora: bool) -> None:
    low = factors(rank=2)
    values = {key: low[key] if "to_q" in key else value for key, value in FULL.items()}
    fields: dict[str, Any] = {"target_modules": [*TRAINED_KINDS], "use_rslora": rslora}
    fields |= {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 2}}
    file = File(tensors=spelled(values, "PEFT", dtype="F32"), config=peft_config(RANK, 6.0, **fields))
    _strengths(model, file, 2**0.5 if rslora else 1.0, 3.0 if rslora else 1.5)


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda one: one.key("m", "A"))
def test_every_spelling(model: QwenImageTransformer2DModel, spelling: Spelling, alpha: float | None) -> None:
    """Equal, or nothing is loaded and the report says so; PEFT does not read alpha tensors."""
    kinds = ["attn.to_q", "img_mlp.net.2"]
    tensors: Tensors = {}
    for key, value in factors(kinds=kinds).items():
        parsed = parse_key(key)
        assert parsed is not None
        tensors[spelling.key(parsed.module, parsed.factor)] = "F32", value
        if alpha is not None:
            tensors[spelling.key(parsed.module, "alpha")] = "F32", np.array(alpha)
    config = peft_config(RANK, 4.0 if alpha is None else alpha, target_modules=kinds)
    theirs = agree(model, File(tensors, config=config))
    if theirs:
        assert theirs.keys() == set(modules(kinds=kinds))


@pytest.mark.parametrize("dialect", ["OneTrainer", "LightX2V"])
def test_dialects_that_diffusers_does_not_load(model: QwenImageTransformer2DModel, dialect: str) -> None:
    """OneTrainer's at all, LightX2V's without alpha: the report says so, and the registry can import them."""
    alpha = 8.0 if dialect == "OneTrainer" else None
    file = File(tensors=spelled(FULL, dialect, dtype="F32", alpha=alpha))
    assert agree(model, file) == {}
    assert "all modules" not in file.scanned().about["loader"]


@pytest.mark.parametrize(("backwards", "count"), [(False, 16), (True, 24)])
def test_the_release_of_pixelsmile_is_loaded_in_part(
    model: QwenImageTransformer2DModel, backwards: bool, count: int
) -> None:
    """Or whole at half its strength, where a key of the old spelling comes first."""
    tensors = spelled(factors(rank=64), "PixelSmile", dtype="F32")
    tensors = dict(
        sorted(tensors.items(), key=lambda item: (".lora_A" in item[0], item[0]), reverse=not backwards)
    )
    file = File(tensors=tensors)
    report = file.scanned()
    assert [found.rule for found in report.findings if found.severity == "block"] == []
    assert "ADP-STR-021" in {found.rule for found in report.findings}
    theirs, ours = injected(model, file), judged(file)
    assert len(theirs) == count
    assert ("drops" in report.about["loader"]) is (count < 24)
    assert len(ours) == 24
    for module, update in theirs.items():
        torch.testing.assert_close(ours[module], 2 * update)

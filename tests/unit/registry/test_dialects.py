"""LoRA files of other programs: their keys, their strength, and the one layout that they become.

The keys in tests/golden/dialects are those of published Qwen-Image LoRAs, as public code knows them; each
file names its sources:

- SwarmUI, src/Text2Image/T2IModelClassSorter.cs, ``isQwenImageLora``: how it recognises the published LoRAs;
- InvokeAI, tests/backend/patches/lora_conversions/lora_state_dicts/qwen_image_lora_*.py;
- kohya-ss/musubi-tuner, src/musubi_tuner/convert_lora.py, ``QWEN_IMAGE_KEYS``;
- Comfy-Org/ComfyUI, comfy/lora.py, ``model_lora_keys_unet``;
- modelscope/DiffSynth-Studio, diffsynth/diffusion/training_module.py, ``mapping_lora_state_dict``;
- huggingface/diffusers, pull request 12119 (lightx2v/Qwen-Image-Lightning; alpha 8 at rank 64, as
  DiffSynth-Studio pull request 1241 says of its successor);
- Nerogar/OneTrainer, modules/modelSaver/qwen/QwenLoRASaver.py;
- Ammmob/PixelSmile, pixelsmile/train.py: what its release is saved by.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fakes.adapters import BASES, RANK, TINY_BASE, TRAINED_KINDS, card, changed, container, factors, modules
from fakes.dialects import SPELLED, key_of, lora_file, peft_config, rewritten, spelled
from registry.dialects import cards, reading, writing
from registry.dialects.grammar import SPELLINGS, WRITABLE, DialectError, parse
from registry.errors import InvalidDocument
from registry.families import KNOWN_BASES, BaseFacts
from registry.formats import read_header, serialise
from registry.manifest import AdapterCard
from registry.scanning import scan
from registry.scanning.product import tensor

GOLDEN = Path(__file__).resolve().parents[2] / "golden/dialects"
EDIT_2511 = KNOWN_BASES["Qwen/Qwen-Image-Edit-2511"]
VALUES = factors()
MODULES = modules()
Q = "transformer_blocks.0.attn.to_q"
EVERY_KIND = dict.fromkeys(TRAINED_KINDS, RANK)


def canonical(values: dict[str, np.ndarray], dtype: str = "BF16") -> bytes:
    weights = container(values, dtype)
    return serialise(read_header(weights), weights)


def scaled(scale: float, values: dict[str, np.ndarray] = VALUES) -> dict[str, np.ndarray]:
    return {key: value * scale if "lora_B" in key else value for key, value in values.items()}


def numbers(weights: bytes) -> dict[str, np.ndarray]:
    return {key: tensor(weights, info) for key, info in read_header(weights).tensors.items()}


# --- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_keys_of_published_loras(path: Path) -> None:
    golden = json.loads(path.read_text())
    dialect, parsed = parse([key for key, *_ in golden["tensors"]], EDIT_2511.spec, EDIT_2511.id)
    assert dialect == golden["dialect"]
    assert [(item.key, item.module, item.role) for item in parsed] == [
        (key, module, role) for key, _, module, role in golden["tensors"]
    ]
    for _, shape, module, role in golden["tensors"]:
        out, into = EDIT_2511.spec[module]
        assert role == "alpha" or (into if role == "A" else out) in shape


def test_every_spelling_has_a_published_sample() -> None:
    known = {json.loads(path.read_text())["dialect"] for path in GOLDEN.glob("*.json")}
    assert {spelling.dialect for spelling in SPELLINGS} < known


def test_no_key_is_of_two_spellings() -> None:
    keys = [s.key(module, role) for s in SPELLINGS for module in MODULES for role in ("A", "B")]
    assert len(set(keys)) == len(keys)


def test_flattened_names_are_looked_up_and_ambiguous_ones_refused() -> None:
    """Two modules that flatten to one name: no rule about underscores could tell them apart."""
    spec = {"blocks.0.to_q": (8, 8), "blocks.0.to.q": (8, 8), "blocks.0.to_k": (8, 8)}
    _, parsed = parse(["lora_unet_blocks_0_to_k.lora_down.weight"], spec, "a base")
    assert parsed[0].module == "blocks.0.to_k"
    with pytest.raises(DialectError, match="several modules") as caught:
        parse(["lora_unet_blocks_0_to_q.lora_down.weight"], spec, "a base")
    assert caught.value.keys == ("lora_unet_blocks_0_to_q.lora_down.weight",)


# --- strength ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", SPELLED)
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_scale_that_is_a_power_of_two_is_exact(dialect: str, dtype: str) -> None:
    """Alpha 8 at rank 4: twice B @ A, bit by bit."""
    values = numbers(container(VALUES, dtype))  # what the dtype holds of them
    tensors = spelled(values, dialect, dtype=dtype, alpha=None if dialect == "PEFT" else 2.0 * RANK)
    config = peft_config(RANK, 2.0 * RANK) if dialect == "PEFT" else None
    weights, lora, written = rewritten(lora_file(tensors), config=config)
    assert (lora.dialect, lora.rank, lora.alpha, lora.scales) == (dialect, RANK, 8.0, (2.0,))
    assert (written.exact, written.ratio) == (True, 1.0)
    assert weights == canonical(scaled(2.0, values), dtype)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("F16", 2**-11), ("BF16", 2**-8), ("F32", 2**-23)], ids=["F16", "BF16", "F32"]
)
def test_any_other_scale_is_rounded_to_the_nearest(dtype: str, bound: float) -> None:
    source = lora_file(spelled(VALUES, "kohya", dtype=dtype, alpha=3.0))
    before = numbers(canonical(VALUES, dtype))
    weights, lora, written = rewritten(source)
    assert lora.scales == (0.75,)
    assert not written.exact
    assert written.ratio == pytest.approx(1.0, abs=bound)
    for key, value in numbers(weights).items():
        meant = before[key].astype(np.float64) * (0.75 if "lora_B" in key else 1.0)
        assert np.all(np.abs(value - meant) <= np.abs(meant) * bound + 1e-7)


def test_bfloat16_rounds_to_the_nearest_with_ties_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000000], dtype="<u4")
    data = writing.encode(bits.view("<f4"), "BF16", "a test")
    expected = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000]
    assert np.frombuffer(data, dtype="<u2").tolist() == expected


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64", "I32", "I64"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_in_any_dtype_that_trainers_write(dtype: str, shape: tuple[int, ...]) -> None:
    tensors = spelled(VALUES, "kohya", alpha=16.0, alpha_dtype=dtype)
    tensors = {key: (kind, value.reshape(shape) if value.ndim == 0 else value)
               for key, (kind, value) in tensors.items()}  # fmt: skip
    assert reading.read(lora_file(tensors), TINY_BASE).scales == (4.0,)


def test_alpha_that_differs_by_module() -> None:
    tensors = spelled(VALUES, "kohya", alpha=lambda module: 8.0 if module == Q else 4.0)
    weights, lora, _ = rewritten(lora_file(tensors))
    assert lora.alpha is None
    assert lora.scales == (1.0, 2.0)
    key = f"transformer.{Q}.lora_B.weight"
    assert weights == canonical(VALUES | {key: VALUES[key] * 2})


def test_rank_that_differs_by_module_is_padded_with_zeros() -> None:
    """B @ A of the padded factors is the same product; a row of zeros in A meets a column of zeros in B."""
    low = factors(rank=2)
    values = {key: low[key] if Q in key else value for key, value in VALUES.items()}
    tensors = spelled(values, "LightX2V", alpha=lambda module: 2.0 if module == Q else 4.0)
    weights, lora, written = rewritten(lora_file(tensors))
    assert (lora.rank, lora.ranks, lora.scales, written.exact) == (RANK, (2, RANK), (1.0,), True)
    found = numbers(weights)
    a, b = found[f"transformer.{Q}.lora_A.weight"], found[f"transformer.{Q}.lora_B.weight"]
    assert (a.shape[0], b.shape[1]) == (RANK, RANK)
    assert not a[2:].any()
    assert not b[:, 2:].any()
    before = numbers(container(low))
    np.testing.assert_array_equal(
        b @ a, before[f"transformer.{Q}.lora_B.weight"] @ before[f"transformer.{Q}.lora_A.weight"]
    )


def test_a_padded_adapter_passes_the_scan() -> None:
    values = {
        key: value[:2] if "lora_A" in key else value[:, :2] for key, value in VALUES.items() if Q in key
    }
    weights, lora, _ = rewritten(lora_file(spelled(VALUES | values, "ComfyUI")))
    assert lora.ranks == (2, RANK)
    report = scan(weights, AdapterCard.parse(json.dumps(card()).encode()), bases=BASES)
    assert report.verdict == "pass", report.text()


def test_mixed_dtypes_become_the_one_that_holds_all_of_them() -> None:
    tensors = spelled(VALUES, "diffusers", dtype="F16")
    tensors |= {key: ("BF16", value) for key, (_, value) in tensors.items() if "lora_A" in key}
    source = lora_file(tensors)
    weights, lora, written = rewritten(source)
    assert (lora.dtype, written.exact) == ("F32", True)
    header = read_header(source)
    for key, value in numbers(weights).items():
        np.testing.assert_array_equal(value, tensor(source, header.tensors[key]))


def test_the_release_of_pixelsmile_gets_back_its_strength() -> None:
    """No alpha in the file, 128 at rank 64 in the training: B @ A counts twice."""
    values = factors(rank=64)
    source = lora_file(spelled(values, "PixelSmile"), {"format": "pt"})
    weights, lora, written = rewritten(source)
    assert (lora.dialect, lora.alpha, lora.scales, written.exact) == ("PixelSmile", 128.0, (2.0,), True)
    assert len(lora.updates) == len(MODULES)
    assert weights == canonical(scaled(2.0, values))
    # Who wants the strength at which the file was loaded so far says so.
    assert rewritten(source, alpha=64.0)[0] == canonical(values)


def test_the_layout_of_pixelsmile_alone_does_not_tell_the_strength() -> None:
    source = lora_file(spelled(VALUES, "PixelSmile"))
    with pytest.raises(DialectError, match="strength is not known"):
        reading.read(source, TINY_BASE)
    assert rewritten(source, alpha=8.0)[0] == canonical(scaled(2.0))


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"r": RANK, "lora_alpha": 8}, 2.0),
        ({"r": RANK, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": EVERY_KIND | {"attn.to_.": RANK}}, 2.0),
        ({"r": RANK, "lora_alpha": 1, "alpha_pattern": {f"^{module}": 8 for module in MODULES}}, 2.0),
        ({"r": RANK, "lora_alpha": 1, "alpha_pattern": dict.fromkeys(EVERY_KIND, 8)}, 2.0),
    ],
)
def test_strength_in_the_header_as_diffusers_writes_it(fields: dict[str, object], scale: float) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in fields.items()})}
    weights, lora, _ = rewritten(lora_file(spelled(VALUES, "diffusers"), metadata))
    assert lora.scales == (scale,)
    assert weights == canonical(scaled(scale))


@pytest.mark.parametrize("name", ["ss_network_alpha", "lora_alpha", "network_alpha", "alpha"])
def test_strength_in_a_plain_entry_of_the_header(name: str) -> None:
    lora = reading.read(lora_file(spelled(VALUES, "kohya"), {name: "8.0"}), TINY_BASE)
    assert (lora.scales, lora.source) == ((2.0,), f"the header's {name}")


@pytest.mark.parametrize("value", ["None", "Dynamic", "0", ""])
def test_entries_that_state_nothing(value: str) -> None:
    lora = reading.read(lora_file(spelled(VALUES, "kohya"), {"ss_network_alpha": value}), TINY_BASE)
    assert (lora.scales, lora.states_alpha) == ((1.0,), False)


def test_several_places_may_say_the_same() -> None:
    metadata = {
        "ss_network_alpha": "8.0",
        "lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8}),
    }
    source = lora_file(spelled(VALUES, "kohya", alpha=8.0, alpha_dtype="BF16"), metadata)
    assert reading.read(source, TINY_BASE, alpha=8.0).scales == (2.0,)


def test_peft_needs_its_configuration_or_the_users_word() -> None:
    source = lora_file(spelled(VALUES, "PEFT"))
    with pytest.raises(DialectError, match=r"adapter_config\.json"):
        reading.read(source, TINY_BASE)
    assert reading.read(source, TINY_BASE, alpha=8.0).scales == (2.0,)


# --- writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", WRITABLE)
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_there_and_back_is_the_same_file(to: str, dtype: str) -> None:
    original = canonical(VALUES, dtype)
    foreign, lora, written = rewritten(original, to)
    assert written.exact
    config = writing.peft_config(lora) if to == "peft" else None
    assert rewritten(foreign, config=config)[0] == original


def test_kohya_states_the_rank_as_alpha() -> None:
    foreign = rewritten(canonical(VALUES), "kohya")[0]
    info = read_header_of(foreign)[key_of("kohya", Q, "alpha")]
    assert (info.dtype, info.shape) == ("F32", ())
    assert tensor(foreign, info) == RANK


def read_header_of(weights: bytes) -> dict[str, reading.Factors]:
    from registry.formats import FOREIGN

    return dict(read_header(weights, FOREIGN).tensors)


def test_a_narrower_dtype_says_how_much_is_left() -> None:
    weights, _, written = rewritten(canonical(VALUES, "F32"), dtype="BF16")
    assert not written.exact
    assert written.ratio == pytest.approx(1.0, abs=2**-8)
    assert {info.dtype for info in read_header(weights).tensors.values()} == {"BF16"}


# --- cards ------------------------------------------------------------------------------------------------


def made_card(**changes: object) -> AdapterCard:
    values = card()
    for path, value in changes.items():
        values = changed(values, path.replace("__", "."), value)
    return AdapterCard.parse(json.dumps(values).encode())


def test_a_card_must_describe_the_file() -> None:
    lora = reading.read(lora_file(spelled(VALUES, "kohya", alpha=8.0)), TINY_BASE)
    cards.check(made_card(), lora, "BF16")
    wrong = made_card(lora__rank=8, lora__alpha=4.0, lora__dtype="F32", lora__targets=["attn.to_q"])
    with pytest.raises(DialectError) as caught:
        cards.check(wrong, lora, "BF16")
    for field in ("lora.rank", "lora.alpha", "lora.dtype", "lora.targets"):
        assert field in caught.value.message


def test_a_card_may_say_what_alpha_was_folded_in() -> None:
    cards.check(made_card(lora__alpha=32.0), reading.read(canonical(VALUES), TINY_BASE), "BF16")


def test_a_draft_becomes_a_card_when_its_open_fields_are_filled_in() -> None:
    metadata = {"ss_seed": "42", "ss_steps": "1600", "modelspec.title": "smiles", "ss_network_alpha": "8"}
    lora = reading.read(lora_file(spelled(VALUES, "kohya", alpha=8.0), metadata), TINY_BASE)
    digest = AdapterCard.parse(json.dumps(card()).encode()).digest
    values = cards.draft(lora, "BF16", "lora\x1b[2J.safetensors", digest)
    assert values["training"]["seed"] == 42
    assert values["description"] == "smiles"
    assert values["lora"] == {"rank": 4, "alpha": 8.0, "targets": sorted(lora.targets), "dtype": "BF16"}
    with pytest.raises(InvalidDocument):
        AdapterCard.parse(json.dumps(values).encode())
    filled = {
        "conditioning.template": "a {} face",
        "conditioning.expressions": ["happy"],
        "license": "Apache-2.0",
        "ingredients.1.license": "Apache-2.0",
        "ingredients.1.source": "https://example.org/lora",
        "training.recipe": str(digest),
        "training.dataset": str(digest),
        "training.code_version": "elsewhere/1",
    }
    assert list(cards.open_fields(values)) == list(filled)
    for path, value in filled.items():
        values = changed(values, path, value)
    parsed = AdapterCard.parse(json.dumps(values).encode())
    cards.check(parsed, lora, "BF16")
    assert parsed.ingredients[1].digest == digest


def test_a_base_without_the_modules_names_them() -> None:
    small = BaseFacts(
        id="tests/one-block",
        family=TINY_BASE.family,
        license="Apache-2.0",
        revision="1",
        config={**TINY_BASE.config, "num_layers": 1},
    )
    with pytest.raises(DialectError, match="tests/one-block has no such modules") as caught:
        reading.read(canonical(VALUES), small)
    assert len(caught.value.keys) == 24
    assert all("transformer_blocks.1." in key for key in caught.value.keys)


def test_the_table_of_dialects_in_the_docs(repository: Path) -> None:
    """Each dialect has its row, with its prefix, its factors and the name by which it is written."""
    text = (repository / "docs/formats.md").read_text("utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    written = {spelling: name for name, spelling in WRITABLE.items()}
    for spelling in SPELLINGS:
        row = rows[spelling.dialect]
        assert f"| `{spelling.prefix}` |" in row or (spelling.prefix == "" and "| none |" in row)
        assert f"`{spelling.a}` `{spelling.b}`" in row
        assert spelling not in written or f"| `{written[spelling]}` |" in row
    assert "PixelSmile" in rows
    for limit in ("4 GiB", "4 MiB", "8,192", "1,024", "16 KiB"):
        assert limit in text

"""LoRA files of other programs: there and back is the same file, and nothing but an explained error comes out
of arbitrary bytes and keys."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fakes.adapters import RANK, TINY_BASE, container, factors
from fakes.dialects import SPELLED, lora_file, peft_config, rewritten, spelled
from registry.dialects import reading, writing
from registry.dialects.grammar import WRITABLE, DialectError, parse
from registry.dialects.writing import encode
from registry.errors import RegistryError
from registry.families import FAMILIES
from registry.formats import FOREIGN, TensorInfo, read_header, serialise
from registry.scanning.product import tensor

MODULES = sorted(TINY_BASE.spec)
KOHYA = lora_file(spelled(factors(), "kohya", alpha=8.0), {"ss_network_alpha": "8.0"})
HEADER_END = 8 + int.from_bytes(KOHYA[:8], "little")
DTYPES = st.sampled_from(["F16", "BF16", "F32"])


@st.composite
def adapters(draw: st.DrawFn) -> bytes:
    """A canonical file: any modules, rank and dtype, and any finite numbers, extreme ones too."""
    dtype, rank = draw(DTYPES), draw(st.integers(1, 6))
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True))
    seed = draw(st.integers(0, 1 << 32))
    random = np.random.default_rng(seed)
    largest = {"F16": 60000.0, "BF16": 1e38, "F32": 3e38}[dtype]
    values = {}
    for module in modules:
        out, into = TINY_BASE.spec[module]
        for factor, shape in (("A", (rank, into)), ("B", (out, rank))):
            numbers = random.normal(0, 1, shape) * 10.0 ** random.integers(-44, 30, shape)
            numbers = np.clip(np.where(random.random(shape) < 0.1, 0.0, numbers), -largest, largest)
            values[f"transformer.{module}.lora_{factor}.weight"] = numbers.astype(np.float32)
    weights = container(values, dtype)
    return serialise(read_header(weights), weights)


@settings(max_examples=60, deadline=None)
@given(adapters(), st.sampled_from(sorted(WRITABLE)))
def test_there_and_back_is_the_same_file(original: bytes, to: str) -> None:
    foreign, lora, written = rewritten(original, to)
    assert (written.exact, written.ratio) == (True, 1.0)
    config = writing.peft_config(lora) if to == "peft" else None
    back, again, _ = rewritten(foreign, config=config)
    assert back == original
    assert again.scales == (1.0,)


@settings(max_examples=60, deadline=None)
@given(adapters(), st.sampled_from(sorted(WRITABLE)), st.sampled_from(sorted(WRITABLE)))
def test_any_way_from_dialect_to_dialect_ends_at_the_same_file(
    original: bytes, first: str, second: str
) -> None:
    data, config = original, None
    for to in (first, second):
        data, lora, _ = rewritten(data, to, config=config)
        config = writing.peft_config(lora) if to == "peft" else None
    assert rewritten(data, config=config)[0] == original


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(set(SPELLED) - {"PEFT"})),
    st.dictionaries(st.sampled_from(MODULES), st.tuples(st.integers(1, 5), st.floats(0.05, 64)), min_size=1),
)
@example(  # its header has 1,152 bytes, a length that begins like a pickle
    "OneTrainer",
    {
        "transformer_blocks.0.attn.add_k_proj": (1, 1.0),
        "transformer_blocks.1.attn.to_out.0": (3, 1.0),
        "transformer_blocks.0.img_mlp.net.0.proj": (1, 1.0),
    },
)
def test_the_update_of_every_module_is_the_one_that_the_file_means(
    dialect: str, wanted: dict[str, tuple[int, float]]
) -> None:
    """Ranks and alphas that differ from module to module: alpha / rank * B @ A comes out."""
    values = {}
    for module, (rank, _) in wanted.items():
        made = factors(rank=rank, kinds=FAMILIES[TINY_BASE.family].kinds)
        for factor in "AB":
            key = f"transformer.{module}.lora_{factor}.weight"
            values[key] = made[key]
    tensors = spelled(values, dialect, dtype="F32", alpha=lambda module: wanted[module][1])
    weights, lora, written = rewritten(lora_file(tensors))
    header = read_header(weights)
    assert {update.factors.module for update in lora.updates} == set(wanted)
    assert written.ratio == pytest.approx(1.0, abs=1e-6)
    for module, (rank, alpha) in wanted.items():
        a, b = (tensor(weights, header.tensors[f"transformer.{module}.lora_{x}.weight"]) for x in "AB")
        meant = (
            np.float32(alpha).astype(np.float64)
            / rank
            * values[f"transformer.{module}.lora_B.weight"].astype(np.float64)
            @ values[f"transformer.{module}.lora_A.weight"].astype(np.float64)
        )
        assert a.shape[0] == max(rank for rank, _ in wanted.values())
        np.testing.assert_allclose(b.astype(np.float64) @ a.astype(np.float64), meant, rtol=1e-4, atol=1e-7)


@given(arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32)), DTYPES)
def test_encoding_rounds_to_the_nearest_or_refuses(values: np.ndarray, dtype: str) -> None:
    try:
        data = encode(values, dtype, "a test")
    except DialectError:
        limit = {"F16": 65504.0, "BF16": 3.3895e38, "F32": 3.4e38}[dtype]
        assert not np.all(np.abs(values) <= limit)  # NaN is not
        return
    read = tensor(data, TensorInfo(dtype=dtype, shape=values.shape, start=0, end=len(data)))
    ulp = {"F16": 2**-11, "BF16": 2**-8, "F32": 0.0}[dtype]
    smallest = {"F16": 2**-25, "BF16": 2**-134, "F32": 0.0}[dtype]
    assert np.all(np.abs(read.astype(np.float64) - values) <= np.abs(values) * ulp * 1.001 + smallest)
    assert encode(read, dtype, "again") == data


# --- nothing but explained errors --------------------------------------------------------------------------


def survives(data: bytes, config: bytes | None = None, alpha: float | None = None) -> bool:
    """Whether the file was imported; anything but a RegistryError fails the test."""
    try:
        rewritten(data, config=config, alpha=alpha)
    except RegistryError as caught:
        error = caught
    else:
        return True
    assert error.message.isascii()
    assert error.message.isprintable()
    assert error.mend
    return False


def test_the_file_that_is_broken_below_is_imported_when_it_is_not() -> None:
    assert survives(KOHYA)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    assert not survives(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, HEADER_END - 1), st.binary(min_size=1, max_size=6))
def test_any_change_of_the_header(at: int, piece: bytes) -> None:
    changed = KOHYA[:at] + piece + KOHYA[at + len(piece) :]
    if survives(changed):
        # What we read of it is what the reference reads, but for what is not ours to read.
        assert len(safetensors.deserialize(changed)) == len(read_header(changed, FOREIGN).tensors)


STEMS = st.sampled_from(MODULES) | st.text(alphabet="abq_.01", max_size=12)
KEYS = st.builds(
    lambda prefix, stem, flat, suffix: prefix + (stem.replace(".", "_") if flat else stem) + suffix,
    st.sampled_from(["transformer.", "lora_unet_", "diffusion_model.", "base_model.model.", "lora_te_", ""]),
    STEMS,
    st.booleans(),
    st.sampled_from(
        (
            *(".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".lora.up.weight"),
            *(
                ".lora_A.default.weight",
                ".alpha",
                ".dora_scale",
                ".lokr_w1",
                ".hada_w1_a",
                ".diff_b",
                "",
                ".",
            ),
        )
    ),
)


@given(st.lists(KEYS | st.text(max_size=20), max_size=8, unique=True))
def test_any_keys(keys: list[str]) -> None:
    """Every key is mapped, once, or all are refused."""
    try:
        _, parsed = parse(keys, TINY_BASE.spec, TINY_BASE.id)
    except DialectError as caught:
        parsed, refused = [], caught.keys
    else:
        refused = ()
    assert set(refused) <= set(keys)
    if not parsed:
        return
    assert [item.key for item in parsed] == keys
    assert all(item.module in TINY_BASE.spec for item in parsed)
    assert len({(item.module, item.role) for item in parsed}) == len(keys)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "peft_type"),
        *("bias", "use_dora", "modules_to_save", "target_modules", "something_new"),
    )
)


@settings(deadline=None)
@given(st.dictionaries(FIELDS, json_values, max_size=6), st.booleans())
def test_any_configuration(fields: dict[str, object], as_header: bool) -> None:
    text = json.dumps(fields)
    if as_header:
        survives(lora_file(spelled(factors(), "diffusers"), {"lora_adapter_metadata": text}))
    else:
        survives(lora_file(spelled(factors(), "PEFT")), config=text.encode())


@given(st.binary(max_size=60))
def test_any_bytes_for_a_configuration(config: bytes) -> None:
    assert not survives(lora_file(spelled(factors(), "PEFT")), config=config)


@given(st.floats() | st.integers())
def test_any_alpha_of_the_user(alpha: float) -> None:
    accepted = survives(lora_file(spelled(factors(), "PEFT")), alpha=alpha)
    assert not accepted or 0 < alpha <= 8192


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=6))
def test_any_metadata_is_dropped(metadata: dict[str, str]) -> None:
    weights, *_ = rewritten(lora_file(spelled(factors(), "PEFT"), metadata), config=peft_config(RANK, RANK))
    assert dict(read_header(weights).metadata) == {"format": "pt"}


def test_reading_takes_nothing_but_the_header_and_alphas() -> None:
    class Counted(bytes):
        read = 0

        def __getitem__(self, where: slice) -> bytes:  # type: ignore[override]
            piece = super().__getitem__(where)
            Counted.read += len(piece)
            return piece

    reading.read(Counted(KOHYA), TINY_BASE)
    assert Counted.read <= HEADER_END + 16 + 4 * len(MODULES)

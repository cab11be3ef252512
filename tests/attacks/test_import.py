"""Attacks on the import: hostile LoRA files of other programs.

An import turns a stranger's file into one that a registry may sign. The attacker wants a part of the file to
get lost or to count more than it seems, another reading than the loaders' own, or the process itself. Each
case is stopped by the check that is there for it, with an explanation that names what is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fakes.adapters import RANK, TINY_BASE, changed, factors, modules, raw_container
from fakes.dialects import Tensors, key_of, lora_file, peft_config, rewritten, spelled
from registry.cli import cli
from registry.dialects.files import convert_file, import_file
from registry.dialects.grammar import DialectError
from registry.dialects.reading import read
from registry.errors import InvalidDocument, NotFound, RegistryError, UsageError
from registry.families import KNOWN_BASES
from registry.formats import CANONICAL, FOREIGN, FormatError, Rules, read_header

PORTRAITS = KNOWN_BASES["adapter-foundry/portraits-base"]
VALUES = factors()
Q = "transformer_blocks.0.attn.to_q"
OTHER = "transformer_blocks.1.attn.to_k"
SECONDS = 60
"""Of a processor: far more than anything here needs, far less than what goes back over what it has seen."""
NUMBER = ("F32", np.array(1.0))
MATRIX = ("BF16", np.ones((4, 32), dtype=np.float32))


def kohya(**more: Any) -> Tensors:
    return spelled(VALUES, "kohya", alpha=4.0) | more


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    assert any(old in key for key in tensors)
    return {key.replace(old, new): value for key, value in tensors.items()}


def without(tensors: Tensors, key: str) -> Tensors:
    assert key in tensors
    return {name: value for name, value in tensors.items() if name != key}


def in_header(name: str, value: Any) -> dict[str, str]:
    fields = {"transformer.r": RANK, "transformer.lora_alpha": 4, f"transformer.{name}": value}
    return {"lora_adapter_metadata": json.dumps(fields)}


def test_the_honest_files_that_are_changed_below_are_imported() -> None:
    assert len(rewritten(lora_file(kohya()))[1].updates) == 24
    header = in_header("lora_dropout", 0.1)
    assert len(rewritten(lora_file(spelled(VALUES, "diffusers"), header))[1].updates) == 24
    config = peft_config(RANK, 4.0)
    assert len(rewritten(lora_file(spelled(VALUES, "PEFT")), config=config)[1].updates) == 24


# --- parts that would get lost -----------------------------------------------------------------------------

LOST: Mapping[str, tuple[Callable[[], Tensors], str]] = {
    "a text encoder": (
        lambda: kohya(**{"lora_te_text_model_0.lora_up.weight": MATRIX}),
        "text encoder",
    ),
    "a text encoder of diffusers": (
        lambda: spelled(VALUES, "diffusers") | {"text_encoder.layers.0.lora_A.weight": MATRIX},
        "text encoder",
    ),
    "a VAE": (lambda: kohya(**{"vae.decoder.conv_in.lora_up.weight": MATRIX}), "VAE"),
    "DoRA": (lambda: kohya(**{f"{key_of('kohya', Q, 'alpha')[:-6]}.dora_scale": MATRIX}), "DoRA"),
    "DoRA of PEFT": (
        lambda: spelled(VALUES, "PEFT") | {f"base_model.model.{Q}.lora_magnitude_vector": MATRIX},
        "DoRA",
    ),
    "LoHa": (lambda: kohya(**{f"{key_of('kohya', Q, 'alpha')[:-6]}.hada_w1_a": MATRIX}), "LoHa"),
    "LoKr": (lambda: kohya(**{f"{key_of('kohya', Q, 'alpha')[:-6]}.lokr_w1": MATRIX}), "LoKr"),
    "a Tucker core": (lambda: kohya(**{f"lora_unet_{Q}.lora_mid.weight": MATRIX}), "another method"),
    "a whole weight": (lambda: kohya(**{"diffusion_model.img_in.diff": MATRIX}), "whole weights"),
    "a bias": (lambda: spelled(VALUES, "PEFT") | {f"base_model.model.{Q}.lora_B.bias": MATRIX}, "biases"),
    "another adapter's name": (
        lambda: renamed(spelled(VALUES, "DiffSynth"), ".default.", ".evil."),
        "no LoRA dialect",
    ),
    "an unknown prefix": (lambda: renamed(kohya(), "lora_unet_", "lycoris_"), "no such modules"),
    "a module that no base has": (
        lambda: renamed(kohya(), "transformer_blocks_1", "transformer_blocks_7"),
        "no such modules",
    ),
    "a module outside the list": (
        lambda: spelled(VALUES, "diffusers") | {"transformer.proj_out.lora_A.weight": MATRIX},
        "no such modules",
    ),
    "a second dialect": (
        lambda: spelled(VALUES, "ComfyUI") | {key_of("diffusers", Q, "A"): MATRIX},
        "several dialects",
    ),
    "two spellings of one prefix": (
        lambda: spelled(VALUES, "diffusers") | {key_of("OneTrainer", Q, "A"): MATRIX},
        "several dialects",
    ),
    "nearly the layout of PixelSmile": (
        lambda: renamed(spelled(VALUES, "diffusers"), "to_add_out.lora_A", "to_add_out.lora.down"),
        "several dialects",
    ),
    "alphas of another dialect": (
        lambda: spelled(VALUES, "ComfyUI") | {key_of("kohya", Q, "alpha"): NUMBER},
        "several dialects",
    ),
    "a lone factor": (lambda: without(kohya(), key_of("kohya", Q, "B")), "other factor"),
    "an alpha of nothing": (
        lambda: without(without(kohya(), key_of("kohya", Q, "B")), key_of("kohya", Q, "A")),
        "no factors",
    ),
    "alphas alone": (lambda: {key_of("kohya", Q, "alpha"): NUMBER}, "no LoRA layers"),
}


@pytest.mark.parametrize("case", LOST)
def test_nothing_is_dropped_without_a_word(case: str) -> None:
    make, explanation = LOST[case]
    tensors = make()
    with pytest.raises(DialectError, match=explanation) as caught:
        rewritten(lora_file(tensors), config=peft_config(RANK, 4.0))
    assert set(caught.value.keys) <= set(tensors)
    assert caught.value.keys[0] in caught.value.message


# --- strength that is not what it seems ---------------------------------------------------------------------


def alpha_of(module: str, value: Any) -> Tensors:
    return kohya(**{key_of("kohya", module, "alpha"): value})


STRONGER: Mapping[str, tuple[Callable[[], tuple[Tensors, dict[str, str]]], str]] = {
    "tensors and header": (
        lambda: (spelled(VALUES, "diffusers", alpha=4.0), in_header("lora_alpha", 64)),
        "disagree",
    ),
    "tensors and a tag": (lambda: (kohya(), {"ss_network_alpha": "64"}), "disagree"),
    "two tags": (lambda: (spelled(VALUES, "kohya"), {"alpha": "4", "lora_alpha": "64"}), "disagree"),
    "one module in the header's pattern": (
        lambda: (spelled(VALUES, "diffusers", alpha=4.0), in_header("alpha_pattern", {Q: 64})),
        "disagree",
    ),
    "alpha for some modules": (lambda: (without(kohya(), key_of("kohya", Q, "alpha")), {}), "have none"),
    "alpha of zero": (lambda: (alpha_of(Q, ("F32", np.array(0.0))), {}), "must lie above 0"),
    "a negative alpha": (lambda: (alpha_of(Q, ("F32", np.array(-4.0))), {}), "must lie above 0"),
    "NaN": (lambda: (alpha_of(Q, ("F32", np.array(np.nan))), {}), "must lie above 0"),
    "infinity": (lambda: (alpha_of(Q, ("F32", np.array(np.inf))), {}), "must lie above 0"),
    "a huge alpha": (lambda: (alpha_of(Q, ("I64", np.array(1 << 40))), {}), "must lie above 0"),
    "a tag that is infinite": (lambda: (spelled(VALUES, "kohya"), {"alpha": "1e999"}), "must lie above 0"),
    "several numbers for one alpha": (
        lambda: (alpha_of(Q, ("F32", np.array([4.0, 400.0]))), {}),
        "one number",
    ),
    "no alpha where PEFT would take 8": (
        lambda: (
            spelled(VALUES, "diffusers"),
            {"lora_adapter_metadata": json.dumps({"transformer.r": RANK})},
        ),
        "None",
    ),
    "another rank in the header": (
        lambda: (spelled(VALUES, "diffusers"), in_header("rank_pattern", {Q: 2})),
        "other ranks",
    ),
    "DoRA in the header": (
        lambda: (spelled(VALUES, "diffusers"), in_header("use_dora", True)),
        "more than plain",
    ),
    "a changed base": (
        lambda: (spelled(VALUES, "diffusers"), in_header("init_lora_weights", "pissa")),
        "more than plain",
    ),
    "whole modules": (
        lambda: (spelled(VALUES, "diffusers"), in_header("modules_to_save", ["proj_out"])),
        "more than plain",
    ),
    "another method in the header": (
        lambda: (spelled(VALUES, "diffusers"), in_header("peft_type", "LOHA")),
        "more than plain",
    ),
    "a field that is not known": (
        lambda: (spelled(VALUES, "diffusers"), in_header("gain", 2)),
        "more than plain",
    ),
    "the text encoder's configuration": (
        lambda: (
            spelled(VALUES, "diffusers"),
            {"lora_adapter_metadata": json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 4})},
        ),
        "other parts",
    ),
    "a regular expression that never ends": (
        lambda: (spelled(VALUES, "diffusers"), in_header("alpha_pattern", {"(a+)+$": 4})),
        "more than a module's name",
    ),
    "a configuration with a key twice": (
        lambda: (
            spelled(VALUES, "diffusers"),
            {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.r": 4}'},
        ),
        "twice",
    ),
    "a configuration that is nested": (
        lambda: (spelled(VALUES, "diffusers"), {"lora_adapter_metadata": "[" * 5000}),
        "nested",
    ),
    "numbers that are not finite": (
        lambda: (kohya(**{key_of("kohya", Q, "A"): ("BF16", np.full((4, 32), np.nan, np.float32))}), {}),
        "not all finite",
    ),
    "numbers that overflow": (
        lambda: (
            spelled(VALUES, "kohya", dtype="F16", alpha=8192.0)
            | {key_of("kohya", Q, "B"): ("F16", np.full((32, 4), 6e4, np.float32))},
            {},
        ),
        "F16 cannot hold the numbers: ",
    ),
    "numbers that vanish": (
        lambda: (
            spelled(VALUES, "kohya", dtype="F16", alpha=0.01)
            | {key_of("kohya", Q, "B"): ("F16", np.full((32, 4), 3e-6, np.float32))},
            {},
        ),
        "would be left",
    ),
}


@pytest.mark.parametrize("case", STRONGER)
def test_no_strength_but_the_one_that_all_places_state(case: str) -> None:
    make, explanation = STRONGER[case]
    tensors, metadata = make()
    started = time.process_time()
    with pytest.raises(InvalidDocument, match=explanation):
        rewritten(lora_file(tensors, metadata))
    assert time.process_time() - started < SECONDS


def test_the_user_cannot_contradict_the_file() -> None:
    with pytest.raises(DialectError, match="--alpha disagree"):
        rewritten(lora_file(kohya()), alpha=8.0)


# --- containers that have two readings ----------------------------------------------------------------------


def header_of(tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    data = lora_file(tensors)
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_text(change: Callable[[str], str]) -> bytes:
    entries, data = header_of(kohya())
    return raw_container(change(json.dumps(entries)), data)


def with_entry(path: str, value: Any) -> bytes:
    entries, data = header_of(kohya())
    key, field = path.split("|")
    return raw_container(json.dumps(entries | {key: changed(entries[key], field, value)}), data)


def alpha_twice(text: str) -> str:
    return f'{text[:-1]}, "{ALPHA_KEY}": {json.dumps(json.loads(text)[ALPHA_KEY])}}}'


A_KEY, ALPHA_KEY = key_of("kohya", Q, "A"), key_of("kohya", Q, "alpha")
CONTAINERS: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "a key twice": (
        lambda: with_text(
            lambda t: t[:-1] + f', "{ALPHA_KEY}": ' + json.dumps(json.loads(t)[ALPHA_KEY]) + "}"
        ),
        "duplicate-key",
    ),
    "bytes after the tensors": (lambda: lora_file(kohya()) + b"more", "layout"),
    "tensors that overlap": (lambda: with_entry(f"{ALPHA_KEY}|data_offsets", [0, 4]), "layout"),
    "a number with four bytes too many": (lambda: with_entry(f"{ALPHA_KEY}|data_offsets", [0, 8]), "offsets"),
    "a matrix of a dtype for numbers": (lambda: with_entry(f"{A_KEY}|dtype", "F64"), "dtype"),
    "an unknown dtype": (lambda: with_entry(f"{A_KEY}|dtype", "F8_E4M3"), "dtype"),
    "an empty tensor": (lambda: with_entry(f"{A_KEY}|shape", [0, 32]), "entry"),
    "a key with an escape sequence": (
        lambda: with_text(lambda t: t.replace(ALPHA_KEY, "\\u001b[2J")),
        "entry",
    ),
    "a float for an offset": (lambda: with_text(lambda t: t.replace("[0, ", "[0.0, ", 1)), "json"),
    "a number of a million digits": (
        lambda: with_text(lambda t: t.replace("[0, ", f"[{'9' * 10**6}, ")),
        "json",
    ),
    "brackets without end": (lambda: raw_container("{" * 100_000 + "}" * 100_000, b""), "json"),
    "a header longer than the file": (lambda: (1 << 40).to_bytes(8, "little") + b"{}", "header-length"),
    "a header of 5 MB": (
        lambda: raw_container(json.dumps({"__metadata__": {"a": "x" * 5_000_000}}), b""),
        "header-length",
    ),
    "5,000 entries of metadata": (
        lambda: raw_container(json.dumps({"__metadata__": {str(n): "" for n in range(5_000)}}), b""),
        "metadata",
    ),
    "metadata that is no text": (lambda: raw_container('{"__metadata__": {"alpha": 4}}', b""), "metadata"),
    "no tensors": (lambda: raw_container("{}", b""), "entry"),
    "20,000 tensors": (
        lambda: lora_file({f"a{n}.alpha": ("F32", np.array(1.0)) for n in range(20_000)}),
        "entry",
    ),
    "a pickle": (lambda: pickle.dumps({"a": os.system}), "magic"),
    "a PyTorch archive": (lambda: b"PK\x03\x04" + bytes(100), "magic"),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_a_container_has_one_reading(case: str) -> None:
    make, problem = CONTAINERS[case]
    started = time.process_time()
    data = make()
    with pytest.raises(FormatError) as caught:
        rewritten(data)
    assert caught.value.problem == problem
    assert time.process_time() - started < SECONDS


SLOW: Mapping[str, str] = {
    "a string of escaped quotes without an end": '{"' + '\\"' * 1_000_000 + "}",
    "half a million keys, the last one twice": "{"
    + ",".join(f'"{n}":1' for n in range(400_000))
    + ',"399999":1}',
    "brackets in strings": '{"' + "[" * 3_000_000 + '":1}',
    "a backslash at the end": '{"' + "\\\\" * 1_000_000 + "\\}",
}


@pytest.mark.parametrize("rules", [CANONICAL, FOREIGN], ids=["canonical", "foreign"])
@pytest.mark.parametrize("case", SLOW)
def test_no_header_takes_long(case: str, rules: Rules) -> None:
    """Each is short enough to be parsed; a parser that goes back over what it has seen takes hours."""
    data = raw_container(SLOW[case], b"")
    started = time.process_time()
    with pytest.raises(FormatError):
        read_header(data, rules)
    assert time.process_time() - started < SECONDS


def test_no_configuration_takes_long() -> None:
    """As many patterns as are allowed, for every module of the largest base."""
    base = KNOWN_BASES["Qwen/Qwen-Image-Edit-2511"]
    patterns = {f"transformer_blocks.x.a{number:04}": 4 for number in range(2048)}
    fields = {"r": 1, "lora_alpha": 4, "rank_pattern": patterns, "alpha_pattern": patterns}
    tensors: Tensors = {}
    for module, (out, into) in base.spec.items():
        tensors[key_of("diffusers", module, "A")] = "F16", np.zeros((1, into), dtype=np.float32)
        tensors[key_of("diffusers", module, "B")] = "F16", np.zeros((out, 1), dtype=np.float32)
    data = lora_file(tensors, {"lora_adapter_metadata": json.dumps(fields)})
    started = time.process_time()
    assert read(data, base).scales == (4.0,)
    assert time.process_time() - started < SECONDS
    many = in_header("alpha_pattern", {f"a{number}": 4 for number in range(2049)})
    with pytest.raises(DialectError, match="at most 2048 patterns"):
        rewritten(lora_file(spelled(VALUES, "diffusers"), many))


def test_what_is_relaxed_for_strangers_stays_strict_for_adapters() -> None:
    """The reader that admission and the scanner use takes no numbers without a shape and no long metadata."""
    read_header(lora_file(kohya()), FOREIGN)
    with pytest.raises(FormatError):
        read_header(lora_file(kohya()))
    long = lora_file(spelled(VALUES, "diffusers"), {"ss_datasets": "x" * 20_000})
    read_header(long, FOREIGN)
    with pytest.raises(FormatError):
        read_header(long)


def test_shapes_must_fit_the_base_and_each_other() -> None:
    for key, shape in ((A_KEY, (4, 31)), (A_KEY, (5, 32)), (A_KEY, (4, 32, 1)), (A_KEY, (128,))):
        values = np.ones(shape, dtype=np.float32)
        with pytest.raises(DialectError, match="shapes do not fit"):
            rewritten(lora_file(kohya(**{key: ("BF16", values)})))


def test_a_factor_of_a_dtype_for_numbers() -> None:
    """One element, so that the container may have it: only the smallest thinkable base has such factors."""
    config = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 1}
    base = dataclasses.replace(TINY_BASE, config=config)
    tensors: Tensors = {key_of("kohya", Q, role): ("F32", np.ones((1, 1))) for role in "AB"}
    assert len(rewritten(lora_file(tensors), base=base)[1].updates) == 1
    tensors[key_of("kohya", Q, "A")] = "I64", np.ones((1, 1))
    with pytest.raises(DialectError, match="dtypes are none of"):
        rewritten(lora_file(tensors), base=base)


def test_a_rank_beyond_the_cards_limit() -> None:
    values = {
        f"transformer.{Q}.lora_A.weight": np.ones((1025, 32), dtype=np.float32),
        f"transformer.{Q}.lora_B.weight": np.ones((32, 1025), dtype=np.float32),
    }
    with pytest.raises(DialectError, match="at most 1024"):
        rewritten(lora_file(spelled(values, "diffusers")))


def test_a_hidden_rest_of_the_file_does_not_survive() -> None:
    """Metadata is dropped, keys are written anew: what is signed later has nothing else in it."""
    secret = "a payload that some other program would run"
    weights, *_ = rewritten(lora_file(kohya(), {"ss_comment": secret, "x": "y"}))
    assert secret.encode() not in weights
    assert dict(read_header(weights).metadata) == {"format": "pt"}


# --- the command line ---------------------------------------------------------------------------------------


def file_at(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lora_file(tensors))
    return path


def portraits(dialect: str = "kohya", **more: Any) -> Tensors:
    return spelled(factors(PORTRAITS), dialect, alpha=4.0) | more


def test_a_refused_file_leaves_nothing_behind(tmp_path: Path) -> None:
    """Refused after writing has begun: the last module's numbers are not finite."""
    last = key_of("kohya", modules(PORTRAITS)[-1], "B")
    tensors = portraits(**{last: ("BF16", np.full((128, 4), np.inf, np.float32))})
    source = file_at(tmp_path / "in/lora.safetensors", tensors)
    with pytest.raises(DialectError, match="finite"):
        import_file(source, PORTRAITS.id, tmp_path / "out/adapter")
    with pytest.raises(DialectError, match="finite"):
        convert_file(source, "comfyui", tmp_path / "out/other.safetensors", base=PORTRAITS.id)
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = file_at(tmp_path / "lora.safetensors", portraits())
    kept = tmp_path / "kept"
    kept.mkdir()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "elsewhere")
    for target in (kept, dangling, source):
        with pytest.raises(UsageError, match="is there already"):
            import_file(source, PORTRAITS.id, target)
        with pytest.raises(UsageError, match="is there already"):
            convert_file(source, "comfyui", target, base=PORTRAITS.id)
    (kept / "adapter_config.json").write_text("mine")
    with pytest.raises(UsageError, match=r"adapter_config\.json is there already"):
        convert_file(source, "peft", kept / "adapter_model.safetensors", base=PORTRAITS.id)
    assert [path.name for path in kept.iterdir()] == ["adapter_config.json"]
    assert (kept / "adapter_config.json").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_no_plain_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RegistryError, match="not a plain file"):
        import_file(tmp_path / "pipe", PORTRAITS.id, tmp_path / "out")
    with pytest.raises(NotFound):
        import_file(tmp_path / "missing", PORTRAITS.id, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "explanation"),
    [
        (b"x" * (2 << 20), "at most"),
        (b'{"r": 4, "r": 8}', "twice"),
        (b"[]", "no JSON object"),
        (b"\xff", "JSON"),
    ],
    ids=["2 MB", "a key twice", "a list", "no text"],
)
def test_a_hostile_configuration_beside_the_file(tmp_path: Path, content: bytes, explanation: str) -> None:
    source = file_at(tmp_path / "in/adapter_model.safetensors", spelled(factors(PORTRAITS), "PEFT"))
    (tmp_path / "in/adapter_config.json").write_bytes(content)
    with pytest.raises(InvalidDocument, match=explanation):
        import_file(source, PORTRAITS.id, tmp_path / "out")


def test_a_hostile_key_cannot_forge_output(tmp_path: Path) -> None:
    """Keys are printable ASCII, and a workflow command of a CI log is broken up."""
    source = file_at(tmp_path / "lora.safetensors", portraits(**{"::error::done\\n": NUMBER}))
    command = ["import", str(source), "--base", PORTRAITS.id, "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, DialectError)
    assert result.exception.exit_code == 1
    assert "::error" not in result.exception.message
    assert "\n" not in result.exception.message


def test_a_large_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    """147 MB, scaled by a factor that is not exact so that every number is read again to measure it."""
    base = KNOWN_BASES["Qwen/Qwen-Image-Edit-2511"]
    source = tmp_path / "lora.safetensors"
    wide = modules(base, ["img_mlp.net.2"])
    entries, at = {}, 0
    for module in wide:
        out, into = base.spec[module]
        for role, shape in (("A", [80, into]), ("B", [out, 80])):
            size = shape[0] * shape[1] * 2
            entries[key_of("kohya", module, role)] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [at, at + size],
            }
            at += size
    with source.open("wb") as sink:
        sink.write(raw_container(json.dumps(entries), b""))
        sink.truncate(sink.tell() + at)  # zeros that take no room on the disk
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from registry.dialects.files import import_file\n"
        f"made = import_file(Path(sys.argv[1]), {base.id!r}, Path(sys.argv[2]), alpha=60.0)\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(len(made.lora.updates), status.partition('VmHWM:')[2].split()[0])\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == len(wide) == 60
    assert at > 140_000_000
    assert peak < 130_000  # KiB, most of it Python and numpy

"""Cards and manifests: one canonical form, strict parsing, and the form of past versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.adapters import card, changed
from fakes.trust import publish
from registry.digest import Digest, digest_bytes, file_entry
from registry.errors import InvalidDocument, UsageError
from registry.manifest import (
    CARD_NAME,
    MAX_MANIFEST_BYTES,
    WEIGHTS_NAME,
    AdapterCard,
    AdapterManifest,
    ConditioningSpec,
    canonical_json,
)

MANIFEST = publish().manifest


def parsed_card(**changes: Any) -> AdapterCard:
    values = card()
    for path, value in changes.items():
        values = changed(values, path.replace("__", "."), value)
    return AdapterCard.parse(json.dumps(values).encode())


def test_the_golden_manifest(repository: Path) -> None:
    """Version 1 of the format: these bytes parse, are canonical, and have this digest forever."""
    data = (repository / "tests" / "golden" / "manifest-1.json").read_bytes()
    manifest = AdapterManifest.parse(data)
    assert manifest.canonical_bytes() == data
    assert manifest.digest == "sha256:9a6adf81d0d5370bfa6a8c44a62813de541c24de2d08612f9578c8f4ccd3dffa"
    assert (manifest.name, manifest.version, manifest.lora.rank) == ("pixelsmile", 3, 16)


def test_the_golden_card(repository: Path) -> None:
    """The card as the trainer writes it, indented, is the card inside the golden manifest."""
    golden = repository / "tests" / "golden"
    loose = AdapterCard.parse((golden / "card-1.json").read_bytes())
    assert loose == AdapterManifest.parse((golden / "manifest-1.json").read_bytes()).card


def test_make_and_parse_round_trip() -> None:
    files = (file_entry(WEIGHTS_NAME, b"weights"), file_entry(CARD_NAME, b"card"))
    manifest = AdapterManifest.make(parsed_card(), name="pixelsmile", version=1, files=files)
    assert AdapterManifest.parse(manifest.canonical_bytes()) == manifest
    assert manifest.card == parsed_card()
    assert manifest.file(WEIGHTS_NAME).size == 7


def test_the_canonical_form_is_one_ascii_line_with_sorted_keys() -> None:
    data = parsed_card(description="smiles \u263a").canonical_bytes()
    assert data.isascii()
    assert b"\n" not in data
    assert data == canonical_json(json.loads(data))


BAD_FIELDS: dict[str, tuple[str, Any]] = {
    "unknown field": ("surprise", 1),
    "unknown nested field": ("lora.surprise", 1),
    "rank zero": ("lora.rank", 0),
    "rank as text": ("lora.rank", "4"),
    "rank as true": ("lora.rank", True),
    "rank as a float": ("lora.rank", 4.0),
    "alpha not positive": ("lora.alpha", 0),
    "alpha too large": ("lora.alpha", 1e6),
    "no targets": ("lora.targets", []),
    "a target twice": ("lora.targets", ["attn.to_q", "attn.to_q"]),
    "a target that is a path": ("lora.targets", ["../x"]),
    "an unknown dtype": ("lora.dtype", "I8"),
    "a template without a place": ("conditioning.template", "happy"),
    "a template with two places": ("conditioning.template", "{} and {}"),
    "a template with an attribute": ("conditioning.template", "{} {0.__class__}"),
    "an expression twice": ("conditioning.expressions", ["happy", "happy"]),
    "neutral as an expression": ("conditioning.expressions", ["neutral"]),
    "an expression in capitals": ("conditioning.expressions", ["HAPPY"]),
    "an empty window": ("conditioning.token_window", [3, 3]),
    "a window of three": ("conditioning.token_window", [1, 2, 3]),
    "an empty strength range": ("conditioning.strength_min", 2.0),
    "a base without an owner": ("base.id", "base"),
    "a base that climbs out": ("base.id", "../../etc"),
    "no ingredients": ("ingredients", []),
    "an ingredient of another kind": ("ingredients.0.kind", "magic"),
    "a line with an escape sequence": ("ingredients.0.name", "\x1b[2J"),
    "a line with a bidirectional override": ("license", "MIT\u202e"),
    "a digest in capitals": ("training.recipe", "sha256:" + "A" * 64),
    "a negative seed": ("training.seed", -1),
    "a number as a name": ("training.run_id", 1),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_wrong_field_is_refused_by_name(name: str) -> None:
    path, value = BAD_FIELDS[name]
    with pytest.raises(InvalidDocument) as caught:
        AdapterCard.parse(json.dumps(changed(card(), path, value)).encode())
    assert path.split(".")[0] in caught.value.message
    assert caught.value.mend


BAD_BYTES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"adapter",
    "a list": b"[]",
    "not UTF-8": b"\xff\xfe{}",
    "a key twice": MANIFEST.replace(b'"version":3', b'"version":2,"version":3'),
    "a nested key twice": MANIFEST.replace(b'"rank":4', b'"rank":2,"rank":4'),
    "indented": json.dumps(json.loads(MANIFEST), indent=1).encode(),
    "keys in another order": json.dumps(dict(reversed(json.loads(MANIFEST).items())), separators=(",", ":"))
    .encode(),
    "a line break behind it": MANIFEST + b"\n",
    "a number in another spelling": MANIFEST.replace(b'"alpha":8.0', b'"alpha":8'),
    "a letter in another spelling": MANIFEST.replace(b"a tiny", b"\\u0061 tiny"),
    "NaN": MANIFEST.replace(b'"alpha":8.0', b'"alpha":NaN'),
    "a number beyond floating point": MANIFEST.replace(b'"alpha":8.0', b'"alpha":1e999'),
    "nested too deep": b'{"a":' * 50_000,
    "a number of a million digits": b'{"version":' + b"9" * 1_000_000 + b"}",
    "too long": b" " * (MAX_MANIFEST_BYTES + 1),
    "a lone surrogate": MANIFEST.replace(b"a tiny", b"\\ud800"),
    "a file that climbs out": MANIFEST.replace(b"adapter.json", b"../adapter.js"),
    "a third file": MANIFEST.replace(b'"files":[', b'"files":[{"blake3":"' + b"0" * 64 + b'","path":"a.bin",'
                                     b'"sha256":"sha256:' + b"0" * 64 + b'","size":1},'),
    "files in another order": MANIFEST,  # replaced in the test
    "a later schema": MANIFEST.replace(b'"schema_version":1', b'"schema_version":2'),
    "version zero": MANIFEST.replace(b'"version":3', b'"version":0'),
    "a name in capitals": MANIFEST.replace(b'"name":"pixelsmile"', b'"name":"Pixelsmile"'),
}  # fmt: skip


def shuffled_files() -> bytes:
    values = json.loads(MANIFEST)
    values["files"].reverse()
    return canonical_json(values)


BAD_BYTES["files in another order"] = shuffled_files()


@pytest.mark.parametrize("name", BAD_BYTES)
def test_what_is_no_manifest_is_refused(name: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        AdapterManifest.parse(BAD_BYTES[name])
    assert caught.value.message.isprintable()
    assert caught.value.mend


@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_an_explained_error(data: bytes) -> None:
    with pytest.raises(InvalidDocument):
        AdapterManifest.parse(data)


@given(st.integers(0, len(MANIFEST) - 1), st.binary(max_size=3))
def test_a_changed_manifest_is_refused_or_another_manifest(at: int, piece: bytes) -> None:
    """No two byte strings parse to the same manifest."""
    changed_bytes = MANIFEST[:at] + piece + MANIFEST[at + len(piece) :]
    try:
        found = AdapterManifest.parse(changed_bytes)
    except InvalidDocument:
        return
    assert found.canonical_bytes() == changed_bytes
    assert (found.digest == digest_bytes(MANIFEST)) == (changed_bytes == MANIFEST)


@given(
    rank=st.integers(1, 1024),
    alpha=st.floats(min_value=1e-6, max_value=8192),
    seed=st.integers(0, 2**63 - 1),
    description=st.text(st.characters(exclude_categories=("C", "Z")), max_size=40),
)
def test_any_card_survives_a_round_trip(rank: int, alpha: float, seed: int, description: str) -> None:
    values = changed(changed(changed(card(), "lora.rank", rank), "lora.alpha", alpha), "training.seed", seed)
    found = AdapterCard.parse(json.dumps({**values, "description": description}).encode())
    assert AdapterCard.parse(found.canonical_bytes()) == found
    assert (found.lora.rank, found.lora.alpha, found.training.seed) == (rank, alpha, seed)


def test_prompts_come_from_the_template() -> None:
    spec = ConditioningSpec(template="show a {} expression", expressions=("happy", "sad"))
    assert spec.prompt("happy") == "show a happy expression"
    assert spec.prompt("neutral") == "show a neutral expression"
    with pytest.raises(UsageError, match="no expression") as caught:
        spec.prompt("evil")
    assert "happy, sad" in caught.value.mend


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:" + "g" * 64, "sha512:" + "0" * 64, "sha256:" + "0" * 64 + "\n"]
)
def test_a_digest_checks_its_form(text: str) -> None:
    with pytest.raises(ValueError):
        Digest(text)
    with pytest.raises(UsageError):
        Digest.parse(text)

"""Adapters of every family, through what reads files: scan, admission, import, bare scan, writing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fakes.adapters import card, changed, container, folder, rescaled
from fakes.families import BY_ID, SMALL, folder_of, trained, with_text
from registry import spectral
from registry.admission import Policy, admit_candidate
from registry.dialects import reading, writing
from registry.dialects.grammar import DialectError
from registry.errors import InvalidDocument, NeedsReview
from registry.families import FAMILIES, KNOWN_BASES, family
from registry.formats import parse_key, read_header
from registry.manifest import AdapterCard
from registry.scanning import scan
from registry.scanning.bare import scan_bare

WITH_TEXT = [name for name, facts in FAMILIES.items() if facts.text_encoders]


def parsed(values: object) -> AdapterCard:
    return AdapterCard.parse(json.dumps(values).encode())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_clean_adapter_passes(name: str) -> None:
    weights, values = folder_of(name)
    report = scan(weights, parsed(values), bases=BY_ID)
    assert report.verdict == "pass", report.text()
    assert {one.kind for one in report.modules} == set(values["lora"]["targets"])
    places = family(name).places(SMALL[name].spec)
    assert {one.block for one in report.modules} <= set(places.values())
    assert report.space is not None
    assert report.space.statistics["norm"] < 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_clean_adapter_is_admitted_and_its_tensors_are_kept(name: str) -> None:
    weights, values = folder_of(name)
    adapter = admit_candidate(folder(weights, values), Policy(bases=BY_ID, purpose="internal-research"))
    assert set(read_header(adapter.weights).tensors) == set(read_header(weights).tensors)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preset", ["attention", "cross-attention", "image-stream"])
def test_every_preset_makes_a_clean_adapter(name: str, preset: str) -> None:
    kinds = family(name).presets.get(preset)
    if kinds is not None:
        weights, values = folder_of(name, kinds=kinds)
        assert scan(weights, parsed(values), bases=BY_ID).verdict == "pass"


def test_what_needs_eyes_is_not_admitted_without_them() -> None:
    """DoRA and text encoders: a production engine takes them only when somebody looked."""
    policy = Policy(bases=BY_ID, purpose="internal-research")
    for weights, values in (
        folder_of("sdxl", rescaled(trained("sdxl"))),
        folder_of("sdxl", kinds=with_text("sdxl")),
    ):
        with pytest.raises(NeedsReview):
            admit_candidate(folder(weights, values), policy)
        looked = Policy(bases=BY_ID, purpose="internal-research", allow_review=True)
        adapter = admit_candidate(folder(weights, values), looked)
        assert set(read_header(adapter.weights).tensors) == set(read_header(weights).tensors)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_without_a_card_finds_its_base(name: str) -> None:
    report = scan_bare(folder_of(name)[0], bases=BY_ID)
    assert report.verdict == "pass", report.text()
    assert BY_ID[report.about["base"]].config == SMALL[name].config
    assert f"tests/{name}" in report.about.get("fits", report.about["base"])
    assert (report.facts["strength_min"], report.facts["strength_max"]) == (1.0, 1.0)
    assert report.about["loader"] == "diffusers: all modules"


def test_of_bases_that_fit_alike_the_tag_of_the_trainer_tells() -> None:
    tag = {"format": "pt", "base": "tests/flux-kontext@main"}
    report = scan_bare(container(trained("flux"), metadata=tag), bases=BY_ID)
    assert report.about["base"] == "tests/flux-kontext"
    assert report.about["fits"] == "tests/flux, tests/flux-kontext"


@pytest.mark.parametrize("name", WITH_TEXT)
def test_a_file_with_a_text_encoder_and_without_a_card_asks_for_a_review(name: str) -> None:
    report = scan_bare(folder_of(name, kinds=with_text(name))[0], bases=BY_ID, base=f"tests/{name}")
    assert {found.rule for found in report.findings} == {"ADP-STR-016"}
    assert "text_encoder." in {one.kind[:13] for one in report.modules}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_canonical_file_is_read_and_written_as_it_stands(name: str) -> None:
    weights = container(trained(name, with_text(name)))
    lora = reading.read(weights, SMALL[name])
    pieces: list[bytes] = []
    done = writing.write(lora, weights, "diffusers", pieces.append)
    assert done.exact
    data = b"".join(pieces)
    assert {
        key: (info.shape, data[info.start : info.end]) for key, info in read_header(data).tensors.items()
    } == {
        key: (info.shape, weights[info.start : info.end])
        for key, info in read_header(weights).tensors.items()
    }


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_the_denoiser_is_written_in_other_dialects_and_read_again(to: str) -> None:
    weights = container(trained("sd15"))
    pieces: list[bytes] = []
    writing.write(reading.read(weights, SMALL["sd15"]), weights, to, pieces.append)
    again = reading.read(b"".join(pieces), SMALL["sd15"], alpha=4.0)
    assert [update.factors.module for update in again.updates] == sorted(
        {str(found.module) for key in trained("sd15") if (found := parse_key(key))}
    )
    assert again.scales == (1.0,)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *((name, "comfyui") for name in FAMILIES if name != "qwen-image-edit"),
        *((name, "diffsynth") for name in FAMILIES if name != "qwen-image-edit"),
        *((name, "kohya") for name in ("flux", "flux-kontext", "flux2-klein", "sd3")),
    ],
)
def test_what_no_loader_takes_is_not_written(name: str, to: str) -> None:
    weights = container(trained(name))
    with pytest.raises(DialectError, match="other names") as caught:
        writing.write(reading.read(weights, SMALL[name]), weights, to, lambda piece: None)
    assert "--to diffusers" in caught.value.mend


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_a_text_encoder_has_no_other_spelling(to: str) -> None:
    weights = container(trained("sd15", with_text("sd15")))
    with pytest.raises(DialectError, match="text encoder"):
        writing.write(reading.read(weights, SMALL["sd15"]), weights, to, lambda piece: None)


@pytest.mark.parametrize(
    "prefix", ["unet.", "transformer.", "diffusion_model.", "base_model.model.", "model.", "lora_unet_"]
)
def test_a_text_encoder_hides_behind_no_prefix(prefix: str) -> None:
    """Its modules have one name in a file; behind another part's it would be two modules to two readers."""
    module = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    values = trained("sd15") | {
        f"unet.{module}.lora_A.weight": np.ones((4, 32), np.float32),
        f"unet.{module}.lora_B.weight": np.ones((64, 4), np.float32),
    }

    def spelled(key: str) -> str:
        stem, _, rest = key.removeprefix("unet.").partition(".lora_")
        if prefix != "lora_unet_":
            return f"{prefix}{stem}.lora_{rest}"
        return f"{prefix}{stem.replace('.', '_')}.lora_{'down' if rest[0] == 'A' else 'up'}.weight"

    with pytest.raises(DialectError):
        reading.read(
            container({spelled(key): value for key, value in values.items()}), SMALL["sd15"], alpha=4
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_is_read_as_the_module_that_it_was_made_of(name: str) -> None:
    facts, spec = family(name), SMALL[name].spec
    names = set()
    for module in spec:
        for tensor in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"):
            found = parse_key(f"{facts.key(module)}.{tensor}")
            assert found is not None
            assert (found.module, str(found)) == (module, f"{facts.key(module)}.{tensor}")
            names.add(str(found))
    assert len(names) == 3 * len(spec)


def test_dora_is_not_compared_by_its_factors_alone() -> None:
    plain, dora = container(trained("sd15")), container(rescaled(trained("sd15")))
    assert spectral.compare(plain, plain).difference == 0
    with pytest.raises(InvalidDocument, match="cannot be compared"):
        spectral.compare(plain, dora)


def test_what_training_cannot_reach_may_be_left_out() -> None:
    for name, part in (
        ("sd3", "transformer_blocks.2.attn.add_q_proj"),
        ("sdxl", "text_encoder.text_model.encoder.layers.1."),
    ):
        kinds = with_text(name)
        values = {key: value for key, value in trained(name, kinds).items() if part not in key}
        report = scan(
            *folder_of(name, values, kinds)[:1], parsed(folder_of(name, values, kinds)[1]), bases=BY_ID
        )
        assert {found.rule for found in report.findings} == {"ADP-STR-016"}, report.text()


def test_a_header_that_speaks_of_the_unet_is_believed_as_for_transformers() -> None:
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"]}
    values = container(
        trained("sd15"), metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    )
    assert reading.read(values, SMALL["sd15"]).scales == (2.0,)
    other = container(
        trained("sd15"), metadata={"lora_adapter_metadata": json.dumps({"transformer.r": 4, **config})}
    )
    with pytest.raises(DialectError, match="other parts"):
        reading.read(other, SMALL["sd15"])


def test_cards_of_text_encoders_have_targets_that_manifests_can_hold() -> None:
    for name in WITH_TEXT:
        values = card(SMALL[name], targets=with_text(name))
        assert set(parsed(values).lora.targets) == set(with_text(name))
    wrong = changed(card(), "lora.targets", ["text_encoder:mlp.fc1"])
    with pytest.raises(Exception, match="targets"):
        parsed(wrong)


def test_every_published_base_has_a_licence_that_is_known_and_enough_modules_for_a_file() -> None:
    from registry.formats import MAX_TENSORS
    from registry.license_data import library

    for facts in KNOWN_BASES.values():
        assert facts.license in library().licenses
        assert 3 * len(facts.spec) <= MAX_TENSORS
        assert facts.family in FAMILIES

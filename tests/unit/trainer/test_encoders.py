"""Networks that losses look through: an InsightFace pack brings its licence into the card, always."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file

from fakes import faces as fakes
from registry.client import Registry
from registry.digest import digest_bytes
from registry.errors import LicenseRefused
from registry.license_data import library
from registry.licenses import judge
from registry.manifest import CARD_NAME, AdapterCard, Ingredient
from trainer import encoders
from trainer.clip import ClipVision
from trainer.data.batches import as_pixels
from trainer.encoders import GRANTED, NON_COMMERCIAL, insightface_pack
from trainer.errors import BaseModelError, ModelLicenseError, RecipeError
from trainer.identity import Truth, contrastive_features, identity_features
from trainer.launch import train
from trainer.portraits import judges
from trainer.recipe import Recipe, parse
from trainer.sections import LossName, LossSection

CPU = torch.device("cpu")
KEY = Ed25519PrivateKey.generate()
NOW = datetime.now(UTC)


def truth_of(pictures: np.ndarray) -> Truth:
    return Truth(
        fitted=lambda rows, size: pictures[list(rows)], digests=["sha256:" + "0" * 64] * len(pictures)
    )


def day(offset: int) -> str:
    return (NOW + timedelta(days=offset)).strftime("%Y-%m-%dT%H:%M:%SZ")


def signed_license(key: Ed25519PrivateKey = KEY, **changes: Any) -> bytes:
    """A MODEL.LICENSE as InsightFace signs them."""
    import rfc8785

    values = {
        "license_version": 1,
        "license_id": "IF-2026-0001",
        "issuer": "InsightFace",
        "model_id": "antelopev2",
        "grant": "commercial",
        "customer": "Example Pictures",
        "valid_from": day(-10),
        "valid_until": day(10),
    } | changes
    signature = base64.urlsafe_b64encode(key.sign(rfc8785.dumps(values))).rstrip(b"=").decode()
    return json.dumps({**values, "signature": signature}).encode()


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack called antelopev2 where the trainer looks for it; its network has ArcFace's interface."""
    folder = tmp_path / "insightface" / "models" / "antelopev2"
    folder.mkdir(parents=True)
    shutil.copy(judges.path("identity"), folder / "glintr100.onnx")
    fakes.detector(folder / "scrfd_10g_bnkps.onnx", everywhere=True)
    monkeypatch.setenv("ADAPTER_FOUNDRY_TRAINER_INSIGHTFACE_ROOT", str(tmp_path / "insightface"))
    return folder


def test_the_shipped_encoder_is_free_and_named() -> None:
    found = encoders.identity("portraits")
    assert (found.file, found.ingredient.license) == (judges.path("identity"), "Apache-2.0")
    assert found.ingredient.digest == digest_bytes(found.file.read_bytes())


def test_a_pack_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="non-commercial research"):
        insightface_pack("antelopev2", tmp_path)


def test_a_pack_without_a_licence_file_is_non_commercial(pack: Path) -> None:
    found = encoders.identity("antelopev2").ingredient
    assert (found.kind, found.name, found.license) == (
        "auxiliary-model",
        "antelopev2/glintr100.onnx",
        NON_COMMERCIAL,
    )
    assert found.digest == digest_bytes((pack / "glintr100.onnx").read_bytes())


def test_a_signed_licence_grants_what_it_says_and_is_named_by_its_digest(pack: Path) -> None:
    data = signed_license()
    (pack / "MODEL.LICENSE").write_bytes(data)
    found = insightface_pack("antelopev2", pack, [KEY.public_key()]).ingredient
    assert found.license == GRANTED
    assert str(digest_bytes(data)) in found.source
    assert "IF-2026-0001" in found.source


def test_a_signed_non_commercial_licence_grants_no_more(pack: Path) -> None:
    (pack / "MODEL.LICENSE").write_bytes(signed_license(grant="non-commercial"))
    assert insightface_pack("antelopev2", pack, [KEY.public_key()]).ingredient.license == NON_COMMERCIAL


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "of another model": (lambda: signed_license(model_id="buffalo_l"), "not the active model"),
    "expired": (lambda: signed_license(valid_from=day(-20), valid_until=day(-1)), "expired"),
    "not yet": (lambda: signed_license(valid_from=day(1)), "not active"),
    "by a stranger": (lambda: signed_license(Ed25519PrivateKey.generate()), "signature"),
    "changed": (lambda: signed_license().replace(b"Example", b"Another"), "signature"),
    "garbage": (lambda: b"\x00", "Unable to read"),
    "empty": (lambda: b"", "between 1 and"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_licence_file_that_does_not_hold_is_never_taken_for_none(pack: Path, name: str) -> None:
    make, why = BROKEN[name]
    (pack / "MODEL.LICENSE").write_bytes(make())
    with pytest.raises(ModelLicenseError, match=f"(?i)does not hold.*{why}") as caught:
        insightface_pack("antelopev2", pack, [KEY.public_key()])
    assert caught.value.exit_code == 14


def test_a_link_to_nowhere_is_not_taken_for_no_file(pack: Path) -> None:
    (pack / "MODEL.LICENSE").symlink_to(pack / "nowhere")
    with pytest.raises(ModelLicenseError):
        insightface_pack("antelopev2", pack, [KEY.public_key()])


def test_only_insightfaces_own_signature_is_believed_by_default(pack: Path) -> None:
    (pack / "MODEL.LICENSE").write_bytes(signed_license())
    with pytest.raises(ModelLicenseError):
        encoders.identity("antelopev2")


def test_a_manifest_that_hides_the_licence_file_is_refused(pack: Path) -> None:
    (pack / "manifest.json").write_text(json.dumps({"manifest_version": 2, "license": "../../free"}))
    with pytest.raises(ModelLicenseError):
        encoders.identity("antelopev2")


def test_a_pack_without_its_detector_is_explained(pack: Path) -> None:
    (pack / "scrfd_10g_bnkps.onnx").unlink()
    with pytest.raises(BaseModelError, match="scrfd_10g_bnkps"):
        encoders.identity("antelopev2")


def test_a_pack_gives_gradients_and_names_both_its_networks(pack: Path) -> None:
    truth = truth_of(np.full((1, 64, 64, 3), 90, np.uint8))
    net = identity_features(truth, CPU, LossSection(weight=1, encoder="antelopev2"))
    assert net.sees(0, (64, 64))
    picture = torch.zeros(1, 3, 64, 64, requires_grad=True)
    net(picture, [0]).sum().backward()
    assert picture.grad is not None
    assert bool(picture.grad.abs().sum() > 0)
    assert {(one.name, one.license, one.digest) for one in net.ingredients} == {
        (f"antelopev2/{name}", NON_COMMERCIAL, digest_bytes((pack / name).read_bytes()))
        for name in ("glintr100.onnx", "scrfd_10g_bnkps.onnx")
    }


def looking_through(recipe: Recipe, encoder: str, **release: Any) -> Recipe:
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["losses"]["identity"] = {"weight": 0.1, "pairs": 1, "max_sigma": 1.0, "encoder": encoder}
    values["release"] |= release
    values["optimiser"] |= {"steps": 3, "warmup_steps": 1}
    return Recipe.model_validate_json(json.dumps(values))


def trained(recipe: Recipe, run: Path, base: Path, pipeline: Any, out: Path) -> tuple[Path, AdapterCard]:
    train(recipe, run / "dataset", run / "cache", base, out, pipeline=pipeline, track=False)
    return out / "adapter", AdapterCard.parse((out / "adapter" / CARD_NAME).read_bytes())


def test_an_adapter_trained_with_antelopev2_cannot_be_sold(
    pack: Path,
    tiny_recipe: Recipe,
    tiny_run: Path,
    tiny_base: Path,
    tiny_pipeline: Any,
    tmp_path: Path,
    home: Path,
) -> None:
    """The recipe tells a free encoder; the card names the one that was looked through."""
    lie = Ingredient(
        name="identity encoder", kind="auxiliary-model", license="Apache-2.0", source="our own work"
    )
    recipe = looking_through(tiny_recipe, "antelopev2", ingredients=[lie.model_dump(mode="json")])
    folder, card = trained(recipe, tiny_run, tiny_base, tiny_pipeline, tmp_path / "out")

    named = {(x.name, x.license) for x in card.ingredients}
    assert {
        ("antelopev2/glintr100.onnx", NON_COMMERCIAL), ("antelopev2/scrfd_10g_bnkps.onnx", NON_COMMERCIAL),
    } <= named  # fmt: skip
    curve = [json.loads(line) for line in (folder.parent / "loss.jsonl").read_text("utf-8").splitlines()]
    assert [line["unseen"] for line in curve] == [0, 0, 0]
    verdict = judge(card, purpose="commercial-redistribution")
    assert any(
        "antelopev2" in problem and "forbids commercial use" in problem for problem in verdict.problems
    )
    with pytest.raises(LicenseRefused, match="antelopev2"):
        Registry.init(home).push(folder, "tiny")


def test_a_missing_encoder_stops_the_training_before_the_base_is_loaded(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, root: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    for weights in base.rglob("*.safetensors"):
        weights.write_bytes(b"cannot be loaded")
    recipe = looking_through(tiny_recipe, "portraits")
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["losses"]["contrastive"] = {"weight": 0.05, "encoder": "clip-vit-l-14"}
    with pytest.raises(BaseModelError, match=r"clip-vit-l-14 is not at .*config\.json"):
        train(
            Recipe.model_validate(values), tiny_run / "dataset", tiny_run / "cache", base, tmp_path / "out",
            track=False,
        )  # fmt: skip


def test_an_adapter_trained_with_the_shipped_encoder_stays_clean(
    tiny_recipe: Recipe, tiny_run: Path, tiny_base: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    recipe = looking_through(tiny_recipe, "portraits")
    _, card = trained(recipe, tiny_run, tiny_base, tiny_pipeline, tmp_path / "out")
    assert "portraits identity encoder" in {found.name for found in card.ingredients}
    assert judge(card, purpose="commercial-redistribution").problems == ()


def test_every_pack_that_a_recipe_may_name_is_a_known_material() -> None:
    known = {name for one in library().materials for name in one.names}
    assert set(get_args(LossSection.model_fields["encoder"].annotation)) - {"portraits"} <= known
    assert {NON_COMMERCIAL, GRANTED} <= set(library().licenses)


# -- CLIP and LPIPS --


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of encoders, empty."""
    monkeypatch.setenv("ADAPTER_FOUNDRY_TRAINER_ENCODERS_ROOT", str(tmp_path / "encoders"))
    (tmp_path / "encoders").mkdir()
    return tmp_path / "encoders"


@pytest.fixture
def clip_folder(root: Path) -> Path:
    """A small CLIP model of both towers, saved as openai's is published."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "projection_dim": 12}  # fmt: skip
    text = tower | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    picture = tower | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=picture, projection_dim=12)).save_pretrained(
        root / "clip-vit-l-14"
    )
    return root / "clip-vit-l-14"


def test_clip_is_looked_through_with_its_own_preprocessing(clip_folder: Path) -> None:
    from PIL import Image
    from transformers import CLIPImageProcessorPil, CLIPModel

    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (2, 12, 18, 3), np.uint8).repeat(8, 1).repeat(8, 2)  # 96 x 144
    net = contrastive_features(truth_of(pictures), CPU, LossSection(weight=1, encoder="clip-vit-l-14"))
    size = {"shortest_edge": 32}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    pixels = processor([Image.fromarray(one) for one in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip_folder).get_image_features(pixels).pooler_output
    found = net.of_truth([0, 1], (96, 144), CPU)
    assert torch.allclose(found, torch.nn.functional.normalize(expected, dim=-1), atol=3e-3)

    predicted = as_pixels(pictures).requires_grad_()
    vectors = net(predicted, [0, 1])
    assert torch.allclose(vectors, found, atol=1e-5)
    vectors[:, :3].sum().backward()
    assert bool((predicted.grad[..., 32:112].abs().amax(1) > 0).all())  # antialiased: no pixel is skipped
    assert all(parameter.grad is None for parameter in net._network.parameters())


def test_clip_is_under_mit(clip_folder: Path) -> None:
    (found,) = encoders.contrastive("clip-vit-l-14").ingredients
    assert (found.name, found.license) == ("clip-vit-l-14", "MIT")
    assert found.digest == digest_bytes((clip_folder / "model.safetensors").read_bytes())


def test_clip_with_a_tensor_less_is_not_filled_with_noise(clip_folder: Path) -> None:
    file = clip_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["visual_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"visual_projection\.weight"):
        ClipVision.load(clip_folder)
    save_file({**tensors, "visual_projection.weight": torch.zeros(3, 16)}, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"visual_projection\.weight"):
        ClipVision.load(clip_folder)
    file.write_bytes(b"nothing")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        ClipVision.load(clip_folder)


def test_pickled_clip_weights_are_never_read(clip_folder: Path) -> None:
    tensors = load_file(clip_folder / "model.safetensors")
    (clip_folder / "model.safetensors").unlink()
    torch.save(tensors, clip_folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError):
        ClipVision.load(clip_folder)
    with pytest.raises(BaseModelError, match="nothing is downloaded"):
        encoders.contrastive("clip-vit-l-14")


ELSEWHERE = [("contrastive", "clip-vit-l-14"), ("perceptual", "lpips-alex"), ("perceptual", "lpips-vgg")]


@pytest.mark.parametrize(("loss", "name"), ELSEWHERE)
def test_an_encoder_that_is_not_there_is_explained(
    loss: LossName, name: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {loss: LossSection(weight=1, encoder=name)}
    with pytest.raises(BaseModelError, match=name) as caught:
        encoders.require(losses)
    assert "nothing is downloaded" in caught.value.mend
    monkeypatch.delenv("ADAPTER_FOUNDRY_TRAINER_ENCODERS_ROOT")
    with pytest.raises(BaseModelError, match="no folder of encoders") as caught:
        encoders.require(losses)
    assert "ADAPTER_FOUNDRY_TRAINER_ENCODERS_ROOT" in caught.value.mend


@pytest.mark.parametrize(("loss", "name"), [*ELSEWHERE, ("identity", "antelopev2")])
def test_a_loss_without_weight_needs_no_encoder(
    loss: LossName, name: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTER_FOUNDRY_TRAINER_INSIGHTFACE_ROOT", str(root))
    encoders.require({loss: LossSection(weight=0, encoder=name)})
    with pytest.raises(BaseModelError):
        encoders.require({loss: LossSection(weight=1e-9, encoder=name)})


def test_every_encoder_states_the_licence_that_is_known_of_it(root: Path, clip_folder: Path) -> None:
    for name in ("lpips-alex", "lpips-vgg"):
        save_file({"x": torch.zeros(1)}, root / f"{name}.safetensors")
    stated = [one for _, name in ELSEWHERE for one in finder(name).ingredients]
    assert len(stated) == 5
    for one in stated:
        (known,) = [m for m in library().materials if m.named_by(one.kind, one.name, one.source)]
        assert one.license in known.licenses


def finder(name: str) -> encoders.Encoder:
    return encoders.contrastive(name) if name.startswith("clip") else encoders.perceptual(name)


def test_each_loss_has_its_own_encoders() -> None:
    text = (Path(encoders.__file__).parent / "recipes" / "pixelsmile-portraits.yaml").read_text("utf-8")
    wrong = text.replace("flow_matching: {weight: 1.0}", "flow_matching: {weight: 1.0, encoder: antelopev2}")
    with pytest.raises(RecipeError, match=r"flow_matching\.encoder"):
        parse(wrong)
    assert "encoder: portraits" in text
    for name in ("glintr100.onnx", "clip-vit-l-14", "lpips-alex"):  # of nobody, and of other losses
        with pytest.raises(RecipeError, match=r"identity\.encoder"):
            parse(text.replace("encoder: portraits", f"encoder: {name}"))

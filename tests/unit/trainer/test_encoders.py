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

from registry.client import Registry
from registry.digest import digest_bytes
from registry.errors import LicenseRefused
from registry.license_data import library
from registry.licenses import judge
from registry.manifest import CARD_NAME, AdapterCard, Ingredient
from trainer import encoders
from trainer.encoders import GRANTED, NON_COMMERCIAL, insightface_pack
from trainer.errors import BaseModelError, ModelLicenseError, RecipeError
from trainer.identity import identity_features
from trainer.launch import train
from trainer.portraits import judges
from trainer.recipe import Recipe, parse
from trainer.sections import LossSection

KEY = Ed25519PrivateKey.generate()
NOW = datetime.now(UTC)


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


def test_a_pack_gives_gradients(pack: Path) -> None:
    truth = np.zeros((1, 64, 64, 3), np.uint8)
    net = identity_features(truth, torch.device("cpu"), LossSection(weight=1, encoder="antelopev2"))
    picture = torch.zeros(1, 3, 64, 64, requires_grad=True)
    net(picture).sum().backward()
    assert picture.grad is not None
    assert bool(picture.grad.abs().sum() > 0)
    assert net.ingredient is not None
    assert net.ingredient.license == NON_COMMERCIAL


def looking_through(recipe: Recipe, encoder: str, **release: Any) -> Recipe:
    values = recipe.model_dump(mode="json")
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

    assert ("antelopev2/glintr100.onnx", NON_COMMERCIAL) in {(x.name, x.license) for x in card.ingredients}
    verdict = judge(card, purpose="commercial-redistribution")
    assert any(
        "antelopev2" in problem and "forbids commercial use" in problem for problem in verdict.problems
    )
    with pytest.raises(LicenseRefused, match="antelopev2"):
        Registry.init(home).push(folder, "tiny")


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


def test_only_the_identity_loss_has_an_encoder() -> None:
    text = (Path(encoders.__file__).parent / "recipes" / "pixelsmile-portraits.yaml").read_text("utf-8")
    wrong = text.replace("flow_matching: {weight: 1.0}", "flow_matching: {weight: 1.0, encoder: antelopev2}")
    with pytest.raises(RecipeError, match="only identity has"):
        parse(wrong)
    with pytest.raises(RecipeError, match="portraits"):
        parse(text.replace("encoder: portraits", "encoder: glintr100.onnx"))

"""Combinations that no recipe may have: each rule refuses its own case, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from trainer import combinations
from trainer import recipe as recipes
from trainer.errors import RecipeError

DRAWN = """
name: drawn
base: {id: adapter-foundry/portraits-base, revision: "1", family: qwen-image-edit, license: Apache-2.0}
data:
  identities: {human: 2}
  validation: {human: 1}
  first_identity: 100
  intensities: [0.5, 1.0]
lora: {rank: 4, alpha: 8, targets: full}
optimiser: {learning_rate: 0.01, warmup_steps: 2, steps: 12, batch_pairs: 2}
losses: {flow_matching: {weight: 1.0}}
conditioning: {template: "show a {} expression", expressions: [fear, surprised]}
evaluation: {identities: {human: 1}, first_identity: 900}
release: {adapter: drawn, license: Apache-2.0}
"""

OWN = """
name: own
base:
  id: stabilityai/stable-diffusion-xl-base-1.0
  revision: main
  family: sdxl
  license: LicenseRef-CreativeML-OpenRAIL-PlusPlus-M
data: {source: folder, path: pictures}
lora: {rank: 4, alpha: 8, targets: full}
optimiser: {learning_rate: 0.01, warmup_steps: 2, steps: 12, batch_pairs: 2}
losses: {denoising: {weight: 1.0}}
conditioning: {template: "show a {} expression", expressions: [fear, surprised]}
release: {adapter: own, license: Apache-2.0}
"""

QWEN = {"id": "Qwen/Qwen-Image-Edit-2511", "family": "qwen-image-edit", "license": "Apache-2.0"}
FLOW = {"flow_matching": {"weight": 1.0}}

# rule -> which recipe, what is changed in it (place -> value), what the error says
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "_known_family": (DRAWN, {"base.family": "qwen-image"}, "did you mean 'qwen-image-edit'"),
    "_known_base": (OWN, {"base.license": "MIT"}, "LicenseRef-CreativeML-OpenRAIL-PlusPlus-M, not MIT"),
    "_known_targets": (DRAWN, {"lora.targets": ["attn.to_x"]}, "did you mean 'attn.to_"),
    "_each_target_once": (DRAWN, {"lora.targets": ["attn.to_q", "attn.to_q"]}, "named twice; name it once"),
    "_known_text_targets": (OWN, {"lora.text_encoder": ["self_attn.q"]}, "did you mean 'self_attn.q_proj'"),
    "_rank_below_width": (DRAWN, {"lora.rank": 200}, "128 or less will do"),
    "_some_weight": (DRAWN, {"losses.flow_matching.weight": 0}, "give at least one a weight"),
    "_own_loss": (OWN, {"losses": FLOW}, "sdxl predicts epsilon; name the loss denoising"),
    "_snr_gamma": (DRAWN, {"noise": {"snr_gamma": 5.0}}, "predicts velocity; leave it out"),
    "_faces_by_somebody": (OWN, {"data.filters": {"min_identity": 0.4}}, "tells people apart; name one"),
    "_edited_by_somebody": (OWN, {"data.source": "edited", "data.intensities": [1.0]}, "name its provider"),
    "_encoders": (
        DRAWN,
        {"losses.identity": {"weight": 0.1, "encoder": "clip-vit-l-14"}},
        "choose from portraits, antelopev2, buffalo_l",
    ),
    "_own_encoders": (OWN, {"losses.identity": {"weight": 0.1}}, "choose from antelopev2, buffalo_l"),
    "_no_magnitudes_in_text": (
        OWN,
        {"lora.text_encoder": ["self_attn.q_proj"], "lora.dora": True},
        "leave lora.dora or lora.text_encoder out",
    ),
    "_some_levels": (
        DRAWN,
        {"losses.identity": {"weight": 0.1, "min_sigma": 0.5, "max_sigma": 0.5}},
        "no noise level lies between",
    ),
    "_two_to_contrast": (
        DRAWN,
        {"losses.contrastive": {"weight": 0.1}, "conditioning.expressions": ["fear"]},
        "nothing to contrast",
    ),
    "_sizes": (OWN, {"data.sizes": [512, 784]}, "needs multiples of 32; instead of 784 write"),
    "_held_out": (DRAWN, {"evaluation.first_identity": 102}, "begin at 103 or later"),
    "_pairs_for_all": (DRAWN, {"running": {"count": 4}}, "give each of them one"),
}

# What a rule would also have to refuse, told apart from what it must let through.
ALSO = [
    (OWN, {"base.family": "sd15"}, "is of the family sdxl"),
    (DRAWN, {"lora.targets": "all"}, "choose from attention, full, image-stream"),
    (DRAWN, {"lora.text_encoder": ["self_attn.q_proj"]}, "no text encoder of qwen-image-edit"),
    (DRAWN, {"losses.flow_matching": {"weight": 1.0, "encoder": "antelopev2"}}, "looks through none"),
    (DRAWN, {"losses": {"denoising": {"weight": 1.0}}}, "predicts velocity; name the loss flow_matching"),
    (DRAWN, {"evaluation": {}, "data.first_identity": 89_999}, "of the evaluation (90000 to 90095) overlap"),
    (DRAWN, {"evaluation": {"first_identity": 100}}, "of the evaluation (100 to 195) overlap"),
]
FINE: list[tuple[str, dict[str, Any]]] = [
    (DRAWN, {}),
    (OWN, {}),
    (OWN, {"lora.text_encoder": ["self_attn.q_proj", "mlp.fc1"], "noise": {"snr_gamma": 5.0}}),
    (OWN, {"losses.identity": {"weight": 0}}),
    (OWN, {"losses.identity": {"weight": 0.1, "encoder": "antelopev2"}, "data.sizes": [512, 1024]}),
    (DRAWN, {"losses.identity": {"weight": 0.1}, "losses.contrastive": {"weight": 0.1}}),
    (DRAWN, {"lora.rank": 128, "lora.dora": True}),
    (DRAWN, {"losses.denoising": {"weight": 0}}),
    (DRAWN, {"evaluation": {"first_identity": 103}}),
    (DRAWN, {"evaluation": {"suite": "ffe-bench", "path": "tasks"}}),
]


def changed(text: str, changes: dict[str, Any]) -> str:
    value = yaml.safe_load(text)
    for place, new in changes.items():
        *path, last = place.split(".")
        section = value
        for part in path:
            section = section[part]
        section[last] = new
    return yaml.safe_dump(value)


def test_every_rule_has_a_case() -> None:
    assert set(BAD) == {rule.__name__ for rule in combinations.RULES}


@pytest.mark.parametrize("rule", BAD)
def test_a_rule_refuses_its_case_and_no_other_rule_does(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, changes, expected = BAD[rule]
    with pytest.raises(RecipeError, match="What to do") as caught:
        recipes.parse(changed(text, changes))
    assert expected in str(caught.value)

    def off(recipe: Any) -> None:
        return None

    rules = [off if one.__name__ == rule else one for one in combinations.RULES]
    monkeypatch.setattr(combinations, "RULES", tuple(rules))
    if rule in ("_known_family", "_known_targets"):  # the rules behind them rely on these two
        monkeypatch.setattr(combinations, "RULES", ())
    assert recipes.parse(changed(text, changes)).name in ("drawn", "own")


@pytest.mark.parametrize(("text", "changes", "expected"), ALSO)
def test_other_cases_are_refused(text: str, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.parse(changed(text, changes))
    assert expected in str(caught.value)


@pytest.mark.parametrize(("text", "changes"), FINE)
def test_what_is_right_passes(text: str, changes: dict[str, Any]) -> None:
    assert recipes.parse(changed(text, changes))


def test_the_base_of_the_other_family_is_named() -> None:
    with pytest.raises(RecipeError, match="write that"):
        recipes.parse(
            changed(DRAWN, {f"base.{name}": value for name, value in {**QWEN, "license": "MIT"}.items()})
        )

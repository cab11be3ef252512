"""What Prefect's page makes of the flows' parameters, and what becomes of wrong values."""

from __future__ import annotations

from importlib import metadata, resources
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows.parameters import RecipeChoice
from trainer.errors import RecipeError
from trainer.recipe import load

DEPLOYMENTS = yaml.safe_load((resources.files("flows") / "prefect.yaml").read_text())["deployments"]


def flow_of(deployment: dict[str, Any]) -> Any:
    return load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda row: row["name"])
def test_each_field_of_a_form_is_explained_and_has_a_sensible_start(deployment: dict[str, Any]) -> None:
    schema = parameter_schema(flow_of(deployment)).model_dump()
    for name, field in schema["properties"].items():
        assert field.get("description"), f"{name} needs a line in the flow's Args"
        assert "default" in field or name in schema["required"]
    for model in schema["definitions"].values():
        assert all({"title", "description"} <= set(field) for field in model["properties"].values())


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda row: row["name"])
def test_what_a_deployment_gives_is_valid(deployment: dict[str, Any]) -> None:
    flow = flow_of(deployment)
    if not parameter_schema(flow).required:
        flow.validate_parameters(deployment.get("parameters", {}))
    assert ":" not in deployment["entrypoint"], "Prefect downloads code for anything but a module"
    assert deployment["version"] == metadata.version("adapter-foundry")
    assert deployment["description"]
    assert deployment["tags"]


def test_names_are_given_once() -> None:
    names = [row["name"] for row in DEPLOYMENTS]
    assert len(set(names)) == len(names)
    slugs = [plan.get("slug") for row in DEPLOYMENTS for plan in row.get("schedules", ())]
    assert None not in slugs, "without a slug, deploying again would forget who paused a schedule"


def test_a_choice_is_the_recipe_with_its_changes() -> None:
    plain = RecipeChoice(recipe="pixelsmile-portraits")
    assert plain.load() == load("pixelsmile-portraits")
    changed = RecipeChoice(changes={"optimiser.steps": 100, "data.identities.human": 5}).load()
    assert changed.optimiser.steps == 100
    assert changed.data.identities["human"] == 5
    assert changed.digest != plain.load().digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimiser.stepz": 7}, "did you mean 'steps'"),
        ({"optimiser.steps": -1}, "optimiser.steps"),
        ({"optimiser.steps": "many"}, "optimiser.steps"),
        ({"nothing": {}}, "nothing"),
        ({"seed.more": 1}, "not a section"),
    ],
)
def test_a_wrong_change_is_explained(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        RecipeChoice(changes=changes).load()
    assert caught.value.mend


@pytest.mark.parametrize("value", [{"recipe": ""}, {"recip": "x"}, {"recipe": 3}, {"changes": [1]}])
def test_a_form_of_another_shape_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RecipeChoice.model_validate(value)

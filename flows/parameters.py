"""What a person chooses when starting a flow: Prefect's page shows these models as forms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.recipe import Recipe, change, load

#: How a release gets its approvals. The words that explain a choice stand in the ``Args`` of the flows.
Approval = Literal["ask", "again", "later", "automatic"]
#: Where the parts of stages are done.
Runner = Literal["threads", "ray"]


class RecipeChoice(BaseModel):
    """A recipe, and what is different this time."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Recipe")

    recipe: Annotated[
        str,
        Field(
            min_length=1,
            title="Recipe",
            description=(
                "Name of a shipped recipe, such as pixelsmile-portraits, or the path of a YAML file on the "
                "worker's machine."
            ),
            examples=["pixelsmile-portraits", "pixelsmile"],
        ),
    ] = "pixelsmile-portraits"
    changes: Annotated[
        dict[str, Any],
        Field(
            title="Changes",
            description=(
                'Keys of the recipe with other values, for this run only, such as {"optimiser.steps": 100}; '
                "null takes a key out. They count as if they stood in the file: what depends on them is made "
                "anew."
            ),
            examples=[{"optimiser.steps": 100, "data.identities.human": 12}],
        ),
    ] = {}

    def load(self) -> Recipe:
        """Return the recipe with its changes.

        Raises:
            trainer.errors.RecipeError: there is no such recipe or key, or a value is wrong.
        """
        return change(load(self.recipe), self.changes)

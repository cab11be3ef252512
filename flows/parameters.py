"""What a person chooses when starting a flow: Prefect's page shows these models as forms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.recipe import Recipe, change, load

Approval = Annotated[
    Literal["ask", "again", "later", "automatic"],
    Field(
        title="Approval",
        description=(
            "ask: the run waits for approvers in this page. again: the same, also for a version that was "
            "rejected. later: it ends after the signed push, people use `registry approve` and "
            "`registry promote`. automatic: nobody looks; for demonstrations only."
        ),
    ),
]
Runner = Annotated[
    Literal["threads", "ray"],
    Field(
        title="Runner",
        description=(
            "Where the parts of synthesis, scoring and evaluation are done: in threads of the worker, or on "
            "a Ray cluster (RAY_ADDRESS; without it a local one is started)."
        ),
    ),
]


class RecipeChoice(BaseModel):
    """A recipe, and what is different this time."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Recipe")

    recipe: Annotated[
        str,
        Field(
            min_length=1,
            title="Recipe",
            description="Name of a shipped recipe, or the path of a YAML file on the worker's machine.",
            examples=["pixelsmile-portraits", "pixelsmile"],
        ),
    ] = "pixelsmile-portraits"
    changes: Annotated[
        dict[str, Any],
        Field(
            title="Changes",
            description=(
                "Keys of the recipe with other values, for this run only. They change the recipe's digest, "
                "as if they stood in the file."
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

"""People start a run in the form of Prefect's page, approve a release in its form, and read what was wrong.

``PICTURES=docs/images pytest tests/browser/test_prefect_page.py`` takes the pictures of the documents anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.pipelines import registry, small_recipe
from servers import chromium, prefect

pytestmark = [pytest.mark.browser, pytest.mark.integration, pytest.mark.slow]

TALL = 1000


def field(label: str) -> str:
    """The input below a label of Prefect's forms."""
    return (
        "[...document.querySelectorAll('.p-label, label')]"
        f".find(e => e.innerText.trim().startsWith({json.dumps(label)}))"
        "?.querySelector('textarea, input, select, .cm-content')"
    )


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[prefect.Stack]:
    with prefect.running(tmp_path_factory.mktemp("prefect-page")) as found:
        yield found


@pytest.fixture
def page(browser: str) -> Iterator[chromium.Page]:
    with chromium.running(browser, height=TALL) as found:
        yield found


@pytest.fixture(scope="module")
def recipe(stack: prefect.Stack, repository: Path) -> Path:
    return small_recipe(repository, stack.home / "small.yaml")


def picture(page: chromium.Page, name: str, height: int = TALL) -> None:
    """Takes a picture for the documents, if somebody wants it."""
    if folder := os.environ.get("PICTURES"):
        time.sleep(5)  # the page's transitions and its chart, a canvas, tell nobody when they are done
        page.picture(Path(folder) / f"prefect-{name}.png", height)


def fill_form(page: chromium.Page, stack: prefect.Stack, name: str, changes: object) -> None:
    """Goes to the pipeline's form as a person does, and fills it in, but for the recipe."""
    page.open(f"{stack.page}/deployments")
    page.click("byText('pipeline', 'a')")
    page.click("byText('Run', 'button')")
    page.click("byText('Custom run')")
    # The form is drawn anew once it knows the parameters, and forgets what stands in it.
    page.wait(f"{field('Recipe')} && {field('Changes')} && true")
    page.fill(field("Run Name"), name)
    page.fill(field("Changes"), json.dumps(changes))


def submit(page: chromium.Page, stack: prefect.Stack, name: str, recipe: Path) -> str:
    """Names the recipe, presses the button of the form and returns the run's id."""
    page.fill(field("Recipe"), str(recipe))
    page.click("byText('Submit', 'button')")
    page.wait("!location.pathname.endsWith('/run')")
    run = stack.called(name)
    assert run is not None, page.text()
    return run["id"]


def test_a_run_of_the_form_waits_for_approval_in_a_form_and_finishes(
    stack: prefect.Stack, page: chromium.Page, recipe: Path
) -> None:
    fill_form(page, stack, "from-the-form", {"optimiser.steps": 4})
    assert "the run waits for approvers in this page" in page.text(), "choices are explained"
    picture(page, "form")
    run = submit(page, stack, "from-the-form", recipe)
    parameters = stack.ask(f"/flow_runs/{run}")["parameters"]
    assert parameters["recipe"] == {"recipe": str(recipe), "changes": {"optimiser.steps": 4}}

    assert stack.wait(run, "PAUSED")["state_name"] == "Suspended"
    page.open(f"{stack.page}/runs/flow-run/{run}")
    page.read("Suspended")
    page.click("byText('Artifacts')")
    page.read("contact-sheet")
    signed = registry(stack.home, "approve", "pixelsmile:1", "--by", "Kim", "--reason", "looked at all faces")
    assert signed.returncode == 0, signed.stderr

    page.click("byText('Resume', 'button')")
    page.read("pixelsmile:1 shall become pixelsmile@prod")
    picture(page, "approval")
    page.choose(field("Decision"), "approve")
    page.fill(field("Reason"), "looked at all faces")
    page.fill(field("Reviewer"), "Kim")
    page.click("byText('Submit', '.p-modal__footer button')")
    assert stack.wait(run, "COMPLETED")["state_name"] == "Completed"
    assert registry(stack.home, "show", "pixelsmile@prod").returncode == 0

    page.open(f"{stack.page}/runs/flow-run/{run}")
    page.read("Completed")
    page.read("Task runs")
    picture(page, "run", 500)


def test_a_key_that_recipes_do_not_have_is_explained_in_the_page(
    stack: prefect.Stack, page: chromium.Page, recipe: Path
) -> None:
    fill_form(page, stack, "a-typing-error", {"optimiser.stepz": 4})
    run = submit(page, stack, "a-typing-error", recipe)
    stack.wait(run, "FAILED")
    page.open(f"{stack.page}/runs/flow-run/{run}")
    page.click("byText('Details')")
    page.click("byText('See More')")
    page.read("did you mean 'steps'?")
    assert "What to do:" in page.text()

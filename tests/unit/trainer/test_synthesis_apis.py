"""Edits by the vendors' own SDKs against servers that speak their protocols and misbehave."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from google.genai import types
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.edits import PRICE, drawn, drawn_people, edited, knowing, portraits
from fakes.vendors import IMAGE_TOKENS, KEY, PROMPT_TOKENS, Fault, Told, Vendor, darker, images, wait_for
from registry.digest import Digest
from trainer.apis import Failed, Reply, before_request
from trainer.apis.ledger import Ledger, Line
from trainer.apis.paid import Clock
from trainer.data.blobs import Blobs
from trainer.errors import ApiError, ApiUnavailable, BudgetSpent, DataError
from trainer.recipe import Recipe
from trainer.synthesis import Made, gemini, openai, synthesise
from trainer.synthesis.editing import EditingApi

PROVIDERS = ("gemini", "openai")
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    # What the SDKs would take from the environment must not matter.
    monkeypatch.setenv("GOOGLE_API_KEY", "another-key")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    with images(Vendor(), darker) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return portraits(tmp_path / "people", "anna.png", "ben.jpg")


def recipe_for(provider: str, folder: Path, vendor: Vendor, **more: dict[str, object]) -> Recipe:
    """Two people, two expressions at one intensity: four edits."""
    data = {"license": "CC0-1.0", "intensities": [1.0], **more.pop("data", {})}
    synthesis = {"provider": provider, **more.pop("synthesis", {})}
    return edited(folder, getattr(vendor, provider), data=data, synthesis=synthesis, **more)


def rows(images_folder: Path) -> list[dict[str, object]]:
    return pq.read_table(images_folder / "images.parquet").to_pylist()


def ledger(home: Path) -> list[Line]:
    return list(Ledger(home / "apis").lines())


class Waits:
    """A clock that remembers what was waited, and does not."""

    def __init__(self) -> None:
        self.all: list[float] = []
        self.clock = Clock(sleep=self.all.append, ticks=lambda: 0.0, chance=lambda: 0.0)

    @property
    def long(self) -> list[float]:
        return [round(one) for one in self.all if one > 0.5]


def edits(recipe: Recipe, home: Path, waits: Waits | None = None) -> list[Made]:
    """Return what becomes of a recipe's edits, one after the other."""
    api = EditingApi(recipe, home, clock=(waits or Waits()).clock)
    return [api.make(request) for request in api.plan() if request.expression is not None]


# -- what comes out --


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_stage_keeps_what_was_delivered_and_says_where_it_comes_from(
    provider: str, tmp_path: Path
) -> None:
    people = drawn_people(tmp_path / "people", range(500, 503))
    with Vendor() as vendor:
        recipe = recipe_for(provider, people, vendor, data={"intensities": [0.5, 1.0]})
        images(vendor, knowing(people, recipe))
        result = synthesise(recipe, tmp_path / "images", data_folder=tmp_path)
    found, blobs = rows(tmp_path / "images"), Blobs(tmp_path / "images" / "blobs")
    assert [row["number"] for row in found] == list(range(15))
    for row in found:
        seed = int(str(row["identity"]))
        truth = drawn(seed, row["expression"], row["intensity"], 64)  # type: ignore[arg-type]
        np.testing.assert_array_equal(blobs.pixels(Digest(str(row["image"]))), truth)
        neutral = row["expression"] is None
        assert row["license"] == ("CC0-1.0" if neutral else "CC0-1.0 AND LicenseRef-fake-terms")
        assert (row["source"], row["model"]) == (
            ("portraits/people", None) if neutral else (f"{provider}/fake-image", "fake-image")
        )
        assert (row["prompt"] is None, row["request"] is None, row["truth"]) == (neutral, neutral, None)
    facts = result.facts
    assert facts["license"] == "CC0-1.0 AND LicenseRef-fake-terms"
    assert (facts["images"], facts["people"], facts["refused"]) == (15, 3, 0)
    assert (facts["requests"], facts["reused"], facts["usd"]) == (12, 0, pytest.approx(12 * PRICE))
    assert {row["split"] for row in found} == {"train", "validation"}


def test_a_second_recipe_with_the_same_questions_pays_nothing(
    tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    first = synthesise(recipe_for("gemini", folder, vendor), tmp_path / "a", data_folder=tmp_path)
    other = recipe_for("gemini", folder, vendor, data={"license": "MIT"})
    second = synthesise(other, tmp_path / "b", data_folder=tmp_path)
    assert len(vendor.log) == 4
    assert (first.facts["reused"], second.facts["reused"]) == (0, 4)
    assert (second.facts["requests"], second.facts["usd"]) == (0, 0)
    assert synthesise(other, tmp_path / "b", data_folder=tmp_path).reused


CHANGES = {
    "prompt": {"synthesis": {"expression_prompt": "now {intensity} {expression}"}},
    "identity": {"synthesis": {"identity_prompt": "the same person"}},
    "model": {"synthesis": {"model": "fake-image-2"}, "api": {"prices": {"fake-image-2": {}}}},
    "resolution": {"synthesis": {"resolution": "1K"}},
    "description": {"synthesis": {"descriptions": {"fear": "frightened"}}},
    "intensity": {"data": {"intensities": [0.9]}},
}
ASKED_AGAIN = {"description": 2}


@pytest.mark.parametrize("change", CHANGES)
def test_another_question_is_asked_anew(change: str, tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    edits(recipe_for("gemini", folder, vendor), tmp_path)
    edits(recipe_for("gemini", folder, vendor, **dict(CHANGES[change])), tmp_path)
    assert len(vendor.log) == 4 + ASKED_AGAIN.get(change, 4)


def test_another_portrait_is_asked_anew_and_the_others_are_not(
    tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    edits(recipe_for("openai", folder, vendor), tmp_path)
    (folder / "anna.png").write_bytes((portraits(tmp_path / "x", "carl.png") / "carl.png").read_bytes())
    edits(recipe_for("openai", folder, vendor), tmp_path)
    assert len(vendor.log) == 4 + 2


def test_a_portrait_that_changes_while_it_is_edited_is_noticed(
    tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    api = EditingApi(recipe_for("gemini", folder, vendor), tmp_path)
    plan = api.plan()
    portraits(tmp_path / "x", "carl.png").joinpath("carl.png").replace(folder / "anna.png")
    with pytest.raises(DataError, match=r"'anna.png' changed meanwhile"):
        [api.make(request) for request in plan]
    assert len(vendor.log) <= 2


def test_what_is_asked_is_what_the_protocols_say(tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    edits(recipe_for("gemini", folder, vendor, synthesis={"resolution": "2K"}), tmp_path)
    asked = vendor.log[0].asked
    assert asked.path == "/v1beta/models/fake-image:generateContent"
    image, who, what = asked.json["contents"][0]["parts"]
    assert image["inlineData"]["mime_type"] == "image/png"
    assert "identity" in who["text"]
    assert "afraid" in what["text"] or "surprised" in what["text"]
    assert asked.json["generationConfig"]["imageConfig"] == {"imageSize": "2K"}
    options = {"resolution": "1024x1024", "options": {"input_fidelity": "high"}}
    edits(recipe_for("openai", folder, vendor, synthesis=options), tmp_path)
    body = vendor.log[-1].asked.body
    for name, value in {"size": "1024x1024", "input_fidelity": "high", "response_format": "b64_json"}.items():
        assert f'name="{name}"\r\n\r\n{value}\r\n'.encode() in body


# -- faults --

FAULTS: dict[str, tuple[Fault, list[str], list[float]]] = {
    "429 and seconds": (
        Fault(kind="status", status=429, headers={"Retry-After": "30"}), ["429", "ok"], [30],
    ),
    "500": (Fault(kind="status", status=500), ["500", "ok"], []),
    "503": (Fault(kind="status", status=503, headers={"Retry-After": "9"}), ["503", "ok"], [9]),
    "slow": (Fault(kind="slow", seconds=60), ["timeout", "ok"], []),
    "torn": (Fault(kind="reset"), ["connection", "ok"], []),
    "torn before": (Fault(kind="refused"), ["connection", "ok"], []),
    "half of the JSON": (Fault(kind="truncated"), ["malformed", "ok"], []),
    "a page": (Fault(kind="html"), ["malformed", "ok"], []),
    "a failure as a success": (
        Fault(kind="masked", status=429, headers={"Retry-After": "30"}), ["429", "ok"], [30],
    ),
    "too deep": (Fault(kind="deep"), ["malformed", "ok"], []),
    "no picture": (Fault(kind="wrong-image"), ["malformed", "ok"], []),
    "half of a picture": (Fault(kind="cut-image"), ["malformed", "ok"], []),
    "a bomb": (Fault(kind="bomb"), ["malformed", "ok"], []),
    "refusal": (Fault(kind="refusal"), ["refused"], []),
}  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", FAULTS)
def test_faults(case: str, provider: str, tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    fault, statuses, waited = FAULTS[case]
    vendor.faults[2] = fault
    waits, timeout = Waits(), 15.0 if case == "slow" else 120.0
    recipe = recipe_for(provider, folder, vendor, api={"timeout": timeout})
    made = edits(recipe, tmp_path, waits)
    assert [line.status for line in ledger(tmp_path)] == ["ok", *statuses, "ok", "ok"]
    assert [one.refused is None for one in made] == [True, statuses[-1] == "ok", True, True]
    assert waits.long == waited
    assert len(vendor.log) == len(ledger(tmp_path))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_server_may_say_when_by_a_date(provider: str, tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=400), usegmt=True)
    vendor.faults[1] = Fault(kind="status", status=429, headers={"Retry-After": then})
    waits = Waits()
    edits(recipe_for(provider, folder, vendor), tmp_path, waits)
    assert len(waits.long) == 1
    assert 300 < waits.long[0] <= 400


@pytest.mark.parametrize(("delay", "waited"), [("31s", 31.0), ("0.5s", 0.5), ("-4s", 0.0), ("soon", None)])
def test_gemini_says_when_in_the_body(delay: str, waited: float | None) -> None:
    from google.genai.errors import ClientError

    from trainer.apis import gemini as api

    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}
    error = ClientError(429, {"error": {"code": 429, "message": "quota", "details": [{}, info]}})
    with pytest.raises(Failed) as caught, api.failures():
        raise error
    assert (caught.value.after, caught.value.repeat) == (waited, True)


def test_gemini_gives_no_picture_and_says_why(tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    vendor.faults |= {1: Fault(kind="no-image"), 2: Fault(kind="refusal")}
    made = edits(recipe_for("gemini", folder, vendor), tmp_path)
    assert [one.refused for one in made] == ["IMAGE_SAFETY", "PROHIBITED_CONTENT", None, None]
    first, second = ledger(tmp_path)[:2]
    assert (first.usage.images, first.usage.input_tokens, first.usd) == (0, PROMPT_TOKENS, 0.0)
    assert second.status == "refused"


def test_openai_refuses_and_says_why(tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    vendor.faults[1] = Fault(kind="refusal")
    made = edits(recipe_for("openai", folder, vendor), tmp_path)
    assert (made[0].data, made[0].model) == (None, "fake-image")
    assert "moderation_blocked" in str(made[0].refused)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_picture_that_is_never_one_is_recorded_and_not_asked_again(
    provider: str, tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    vendor.faults |= {number: Fault(kind="bomb") for number in (1, 2, 3)}
    recipe = recipe_for(provider, folder, vendor)
    made = edits(recipe, tmp_path)
    assert "malformed: the picture has too many pixels" in str(made[0].refused)
    assert len(vendor.log) == 3 + 3
    assert edits(recipe, tmp_path)[0].refused == made[0].refused
    assert len(vendor.log) == 6


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", ["masked", "html", "deep"])
def test_a_server_in_trouble_ends_the_run_and_costs_no_picture(
    kind: str, provider: str, tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    vendor.faults |= dict.fromkeys(range(2, 8), Fault(kind=kind, status=503))
    recipe = recipe_for(provider, folder, vendor)
    with pytest.raises(ApiUnavailable, match="did not answer after 6 attempts"):
        edits(recipe, tmp_path)
    assert len(vendor.log) == 1 + 6
    assert [one.refused for one in edits(recipe, tmp_path)] == [None] * 4


def test_a_server_that_does_not_count_is_not_asked_for_ever(
    tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    words = {"created": 1, "data": [{"b64_json": base64.b64encode(b"no picture").decode()}]}
    vendor.route(r"/v1/images/edits", lambda asked: Told(body=json.dumps(words).encode()))
    made = edits(recipe_for("openai", folder, vendor), tmp_path)
    assert {str(one.refused).partition(":")[0] for one in made} == {"malformed"}
    # Nobody said that it was free.
    assert [(line.billed, line.usd) for line in ledger(tmp_path)] == [("unsure", PRICE)] * 4 * 3


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": 3, "total_tokens": 8}, {"input_tokens": -1_000_000, "output_tokens": 0}]
)
def test_who_counts_in_other_words_costs_what_was_reserved_and_is_paid_once(
    usage: dict[str, int], tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    picture = base64.b64encode((folder / "anna.png").read_bytes()).decode()
    said = {"created": 1, "data": [{"b64_json": picture}], "usage": usage}
    vendor.route(r"/v1/images/edits", lambda asked: Told(body=json.dumps(said).encode()))
    recipe = recipe_for("openai", folder, vendor)
    for _ in range(2):
        assert [one.refused for one in edits(recipe, tmp_path)] == [None] * 4
    assert len(vendor.log) == 4
    assert [(line.billed, line.usd) for line in ledger(tmp_path)] == [("unsure", PRICE)] * 4


@pytest.mark.parametrize("data", [["x"], [None], {"b64_json": "aGk="}, [{"b64_json": 12}], "x", 5])
def test_what_is_no_list_of_pictures_is_unreadable(
    data: object, tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    said = json.dumps({"created": 1, "data": data}).encode()
    vendor.route(r"/v1/images/edits", lambda asked: Told(body=said) if asked.number == 1 else None)
    assert [one.refused for one in edits(recipe_for("openai", folder, vendor), tmp_path)] == [None] * 4
    assert [line.status for line in ledger(tmp_path)] == ["malformed", *["ok"] * 4]


def test_refusals_are_rows_without_a_picture(tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    vendor.faults |= {1: Fault(kind="refusal"), 3: Fault(kind="refusal")}
    recipe = recipe_for("gemini", folder, vendor)
    result = synthesise(recipe, tmp_path / "images", data_folder=tmp_path)
    gone = [row for row in rows(tmp_path / "images") if row["image"] is None]
    assert [(row["refused"], row["width"], row["media_type"]) for row in gone] == [
        ("PROHIBITED_CONTENT", None, None)
    ] * 2
    assert all(row["prompt"] and row["request"] and row["model"] for row in gone)
    assert (result.facts["images"], result.facts["refused"]) == (4, 2)


STOPS = {
    400: "the model's id, the resolution",
    401: "_API_KEY is right",
    403: "may use this model",
    404: "look up the model's id",
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("status", STOPS)
def test_what_is_wrong_for_all_requests_stops_at_once(
    status: int, provider: str, tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    vendor.faults[1] = Fault(kind="status", status=status)
    with pytest.raises(ApiError) as caught:
        edits(recipe_for(provider, folder, vendor), tmp_path)
    assert STOPS[status] in caught.value.mend
    assert len(vendor.log) == 1


def test_an_empty_account_is_not_a_busy_server(tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    vendor.faults[1] = Fault(kind="status", status=429, code="insufficient_quota")
    with pytest.raises(ApiError, match="429") as caught:
        edits(recipe_for("openai", folder, vendor), tmp_path)
    assert "money" in caught.value.mend
    assert not isinstance(caught.value, ApiUnavailable)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nobody_there(provider: str, tmp_path: Path, folder: Path) -> None:
    with Vendor() as gone:
        recipe = recipe_for(provider, folder, gone)
    with pytest.raises(ApiUnavailable, match="after 6 attempts; the last one ended with connection"):
        edits(recipe, tmp_path)
    assert {(line.status, line.billed, line.usd) for line in ledger(tmp_path)} == {("connection", "no", 0.0)}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_key_comes_from_the_environment(
    provider: str, tmp_path: Path, folder: Path, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{provider.upper()}_API_KEY"
    monkeypatch.delenv(name)
    with pytest.raises(ApiError, match=name):
        edits(recipe_for(provider, folder, vendor), tmp_path)
    monkeypatch.setenv(name, "wrong-key-of-somebody")
    with pytest.raises(ApiError, match="401") as caught:
        edits(recipe_for(provider, folder, vendor), tmp_path)
    assert name in caught.value.mend


@pytest.mark.parametrize(("provider", "package"), [("gemini", "google.genai"), ("openai", "openai")])
def test_a_missing_sdk_is_named_with_its_extra(
    provider: str, package: str, tmp_path: Path, folder: Path, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr("google.genai")
    with pytest.raises(ApiError) as caught:
        edits(recipe_for(provider, folder, vendor), tmp_path)
    assert "adapter-foundry[apis]" in caught.value.mend
    assert ledger(tmp_path) == []


def inline(data: bytes, **more: object) -> dict[str, object]:
    return {"inlineData": {"mimeType": "image/png", "data": base64.b64encode(data).decode()}, **more}


def gemini_says(parts: list[dict[str, object]], **more: object) -> Reply:
    value = {"candidates": [{"content": {"role": "model", "parts": parts}, **more}]}
    return gemini.reply_of(types.GenerateContentResponse.model_validate(value))


def test_drafts_of_a_model_that_thinks_are_not_the_picture() -> None:
    said = gemini_says([inline(b"draft", thought=True), inline(b"one"), inline(b"two"), {"text": "done"}])
    assert (said.body, said.images, said.counted) == (b"two", 2, False)


def test_words_instead_of_a_picture_are_a_refusal_with_the_words() -> None:
    assert gemini_says([{"text": "I would rather not."}], finishReason="STOP").refused == (
        "STOP: I would rather not."
    )
    assert gemini_says([], finishReason="SOMETHING_NEW").refused == "SOMETHING_NEW"


PARTS = st.one_of(
    st.just({}),
    st.builds(lambda text: {"text": text}, st.text(max_size=9)),
    st.builds(lambda data, thought: inline(data, thought=thought), st.binary(max_size=9), st.booleans()),
    st.just({"inlineData": {}}),
)
ANSWERS = st.fixed_dictionaries(
    {},
    optional={
        "candidates": st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "content": st.fixed_dictionaries({}, optional={"parts": st.lists(PARTS, max_size=3)}),
                    "finishReason": st.sampled_from(["STOP", "SAFETY", "NEW"]),
                },
            ),
            max_size=2,
        ),
        "promptFeedback": st.fixed_dictionaries(
            {}, optional={"blockReason": st.sampled_from(["SAFETY", "X"])}
        ),
        "usageMetadata": st.fixed_dictionaries(
            {}, optional={"promptTokenCount": st.integers(0, 9), "candidatesTokenCount": st.integers(0, 9)}
        ),
    },
)


def outcome(read: Callable[[Any], Reply], answer: Any) -> Reply | Failed:
    try:
        return read(answer)
    except Failed as failed:
        return failed


@settings(deadline=None)
@given(ANSWERS)
def test_any_answer_of_gemini_is_a_picture_a_refusal_or_unreadable(value: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that are new to the SDK
        answer = types.GenerateContentResponse.model_validate(value)
    said = outcome(gemini.reply_of, answer)
    if isinstance(said, Failed):
        assert said.status == "malformed"
    else:
        assert (said.refused is None) == (said.images > 0)
        assert min(said.input_tokens, said.output_tokens) >= 0


COUNTS = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}


@settings(deadline=None)
@given(
    st.none() | st.lists(st.fixed_dictionaries({}, optional={"b64_json": st.text(max_size=9)}), max_size=2),
    st.none() | st.sampled_from([COUNTS, {"total_tokens": 7}, {**COUNTS, "input_tokens": -1}]),
)
def test_any_answer_of_openai_is_a_picture_or_unreadable(data: object, usage: object) -> None:
    from openai.types import ImagesResponse

    answer = ImagesResponse.construct(created=1, data=data, usage=usage)
    said = outcome(openai.reply_of, answer)
    if isinstance(said, Failed):
        assert (said.status, said.billed) == ("malformed", "yes" if usage == COUNTS else "unsure")
    else:
        assert (said.refused, said.counted) == (None, usage == COUNTS)


def test_an_address_instead_of_a_picture_is_not_followed(
    tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    there = json.dumps({"created": 1, "data": [{"url": f"{vendor.gemini}/picture.png"}]}).encode()
    vendor.route(r"/v1/images/edits", lambda asked: Told(body=there))
    with pytest.raises(ApiError, match="the address of the picture") as caught:
        edits(recipe_for("openai", folder, vendor), tmp_path)
    assert "b64_json" in caught.value.mend
    assert len(vendor.log) == 1


# -- accounts --


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_ledger_says_what_the_vendor_takes(
    provider: str, tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    kinds = ["reset", "truncated", "html", "wrong-image", "bomb", "cut-image", "refusal"]
    vendor.faults |= {2 * at + 1: Fault(kind=kind) for at, kind in enumerate(kinds)}
    vendor.faults |= {16: Fault(kind="status", status=503), 17: Fault(kind="slow", seconds=60)}
    recipe = recipe_for(
        provider, folder, vendor, data={"intensities": [0.2, 0.4, 0.6, 0.8, 1.0]}, api={"timeout": 15}
    )
    edits(recipe, tmp_path)
    told, taken = ledger(tmp_path), vendor.billed()
    assert len(told) == len(vendor.log)
    assert sum(line.usd or 0 for line in told) == pytest.approx(taken["images"] * PRICE)
    answered = [line for line in told if line.billed == "yes"]
    silent = [one for one in vendor.log if one.fault in ("reset", "truncated", "html", "slow")]
    assert len(told) - len(answered) == len(silent) + 1  # and the one with 503, for which nothing is taken
    assert sum(line.usage.images for line in answered) == taken["images"] - len(silent)
    tokens = sum(line.usage.input_tokens for line in answered)
    assert tokens == taken["input_tokens"] - len(silent) * PROMPT_TOKENS
    written = sum(line.usage.output_tokens for line in answered)
    assert written == (0 if provider == "gemini" else (taken["images"] - len(silent)) * IMAGE_TOKENS)


def test_the_budget_stops_and_says_what_is_left(tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    small = recipe_for("gemini", folder, vendor, api={"requests": 3})
    with pytest.raises(BudgetSpent, match=r"3 requests of 3.*; 1 of 4 pictures are still to be asked for"):
        synthesise(small, tmp_path / "images", data_folder=tmp_path)
    assert not (tmp_path / "images").exists()
    larger = recipe_for("gemini", folder, vendor, api={"requests": 4})
    result = synthesise(larger, tmp_path / "images", data_folder=tmp_path)
    assert (result.facts["requests"], result.facts["reused"], len(vendor.log)) == (4, 0, 4)


def test_what_is_left_is_counted_without_reading_the_answers(
    tmp_path: Path, folder: Path, vendor: Vendor
) -> None:
    answers = tmp_path / "apis" / "answers"

    def empty(provider: str) -> None:
        for path in answers.rglob("*"):  # who reads one now finds none
            if path.is_file() and len(vendor.log) == 3:
                path.write_bytes(b"")

    token = before_request.set(empty)
    try:
        with pytest.raises(BudgetSpent, match=r"; 1 of 4 pictures are still to be asked for"):
            synthesise(
                recipe_for("gemini", folder, vendor, api={"requests": 3}),
                tmp_path / "images",
                data_folder=tmp_path,
            )
    finally:
        before_request.reset(token)
    assert {path.stat().st_size for path in answers.rglob("*") if path.is_file()} == {0}


def test_money_stops_several_threads(tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    recipe = recipe_for("openai", folder, vendor, api={"money": 2.5 * PRICE, "parallel": 4})
    with pytest.raises(BudgetSpent, match=r"; 2 of 4 pictures"):
        synthesise(recipe, tmp_path / "images", data_folder=tmp_path)
    assert vendor.billed()["images"] == 2


# -- kills and races --

STAGE = """
import sys
from pathlib import Path
from trainer import recipe as recipes
from trainer.synthesis import synthesise
synthesise(recipes.load(sys.argv[1]), Path(sys.argv[2]), data_folder=Path(sys.argv[3]))
"""


def start(recipe: Recipe, out: Path, home: Path) -> subprocess.Popen[bytes]:
    written = home / "recipe.yaml"
    written.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    arguments = [sys.executable, "-c", STAGE, str(written), str(out), str(home)]
    return subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})


def delivered(vendor: Vendor) -> Counter[str]:
    """Return how often each request was answered."""
    return Counter(sha256(one.asked.body).hexdigest() for one in vendor.log if one.done)


def test_a_run_that_is_killed_pays_nothing_twice(tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    vendor.faults |= {3: Fault(kind="held")}
    recipe = recipe_for("gemini", folder, vendor, running={"batch": 3})
    child = start(recipe, tmp_path / "images", tmp_path)
    wait_for(vendor, 3)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(120)
    result = synthesise(recipe, tmp_path / "images", data_folder=tmp_path)
    assert sorted(delivered(vendor).values()) == [1, 1, 1, 1]
    assert len(vendor.log) == 5
    statuses = Counter(line.status for line in ledger(tmp_path))
    assert statuses == {"ok": 4, "lost": 1}
    assert result.facts["usd"] == pytest.approx(5 * PRICE)


def test_two_runs_at_once_pay_once(tmp_path: Path, folder: Path, vendor: Vendor) -> None:
    recipe = recipe_for("gemini", folder, vendor)
    children = [start(recipe, tmp_path / name, tmp_path) for name in ("a", "b")]
    assert [child.wait(300) for child in children] == [0, 0]
    assert sorted(delivered(vendor).values()) == [1, 1, 1, 1]
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_dataset_gives_its_neutral_pictures(tmp_path: Path, tiny_run: Path, vendor: Vendor) -> None:
    from trainer.data import Dataset

    recipe = recipe_for("gemini", tiny_run / "dataset", vendor, data={"intensities": [1.0]})
    told = recipe.model_dump(mode="json", exclude_unset=True)
    recipe = Recipe.model_validate({**told, "data": {**told["data"], "license": "Apache-2.0"}})
    result = synthesise(recipe, tmp_path / "images", data_folder=tmp_path)
    dataset = Dataset.open(tiny_run / "dataset")
    sources = {triplet.source: str(triplet.identity) for triplet in dataset.triplets}
    found, blobs = rows(tmp_path / "images"), Blobs(tmp_path / "images" / "blobs")
    neutral = [row for row in found if row["expression"] is None]
    assert sorted(str(row["identity"]) for row in neutral) == sorted(sources.values())
    pictures = {dataset.pictures([row])[0].tobytes() for row in sources}
    assert {blobs.pixels(Digest(str(row["image"]))).tobytes() for row in neutral} == pictures
    assert result.facts["license"] == "Apache-2.0 AND LicenseRef-fake-terms"
    assert dataclasses.asdict(result)["facts"]["people"] == len(set(sources.values()))

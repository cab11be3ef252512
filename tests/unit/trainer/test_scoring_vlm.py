"""Scores by models: the vendors' own SDKs against servers that speak the true protocols and misbehave."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fakes.datasets import drawn, write_stages
from fakes.vendors import KEY, Fault, Told, Vendor
from fakes.vlm import ODD, answer, images_folder, knowing, vlm
from trainer.apis.ledger import Ledger
from trainer.data import Dataset, build_triplets
from trainer.errors import ApiError, BudgetSpent
from trainer.portraits.expressions import EXPRESSIONS
from trainer.recipe import Recipe
from trainer.scoring import score
from trainer.scoring.stage import _scorer

PROVIDERS = ("openai", "gemini")
NONE = [(provider, kind) for provider in PROVIDERS for kind in (*sorted(ODD), "cut")]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    _scorer.cache_clear()


Asking = Callable[..., Recipe]


@pytest.fixture
def asking(tiny_recipe: Recipe) -> Asking:
    """Returns the tiny recipe with scores by a model behind a fake vendor, one request at a time."""

    def build(vendor: Vendor, provider: str, api: dict[str, Any] | None = None, **scoring: Any) -> Recipe:
        value = tiny_recipe.model_dump(mode="json", exclude_unset=True)
        value["scoring"] = {
            "scorer": provider, "model": "seer-1", "endpoint": getattr(vendor, provider),
            "license": "LicenseRef-terms", **scoring,
        }  # fmt: skip
        limits = {"parallel": 1, "per_minute": 1e6, "timeout": 120, **(api or {})}
        value["running"] = {**value["running"], "api": limits}
        return Recipe.model_validate(value)

    return build


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "scores.parquet").to_pylist()


def statuses(data: Path) -> list[str]:
    return [line.status for line in Ledger(data / "apis").lines()]


def balanced(vendor: Vendor, data: Path) -> bool:
    """Whether the ledger and the vendor count the same."""
    lines = list(Ledger(data / "apis").lines())
    billed = [line for line in lines if line.status in ("ok", "refused", "malformed")]
    taken = vendor.billed()
    return (
        len(lines) == len(vendor.log)
        and len(billed) == taken["answers"]
        and sum(line.usage.input_tokens for line in lines) == taken["input_tokens"]
        and sum(line.usage.output_tokens for line in lines) == taken["output_tokens"]
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_pictures_are_scored_by_what_they_show(asking: Asking, tmp_path: Path, provider: str) -> None:
    pictures = images_folder(tmp_path / "images", 9, refused=1)
    with vlm(Vendor(), knowing(pictures)) as vendor:
        recipe = asking(vendor, provider, {"parallel": 4})
        result = score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
        assert score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path).reused
        score(recipe, tmp_path / "images", tmp_path / "again", data_folder=tmp_path)
    found, listed = (
        rows(tmp_path / "scored"),
        pq.read_table(tmp_path / "images" / "images.parquet").to_pylist(),
    )
    assert len(found) == 9
    for row, line in zip(found, listed, strict=False):
        for name in recipe.conditioning.expressions:
            assert row[f"score_{name}"] == (line["intensity"] if line["expression"] == name else 0.0)
        assert (row["status"], row["samples"], row["disagreement"]) == ("scored", 1, 0.0)
        assert row["confidence"] == pytest.approx(0.9)
        assert row["scorer"].startswith(f"{provider}/seer-1/")
    assert result.facts["scored"] == 9
    assert len(vendor.log) == 9, "the second and third run paid nothing"
    assert balanced(vendor, tmp_path)


@pytest.mark.parametrize(("provider", "kind"), [case for case in NONE if case != ("gemini", "nested")])
def test_an_answer_that_is_none_is_asked_again_with_the_reason(
    asking: Asking, tmp_path: Path, provider: str, kind: str
) -> None:
    pictures = images_folder(tmp_path / "images", 1)
    with vlm(Vendor({1: Fault(kind=kind), 2: Fault(kind=kind)}), knowing(pictures)) as vendor:
        recipe = asking(vendor, provider)
        score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    (row,) = rows(tmp_path / "scored")
    assert (row["status"], row["score_fear"]) == ("scored", 0.0)
    first, second, third = (one.asked.body.decode() for one in vendor.log)
    assert "not accepted" not in first
    assert "Your answer before was not accepted" in second
    assert "script" not in third
    assert len({line.request for line in Ledger(tmp_path / "apis").lines()}) == 3, "each has its own address"
    assert balanced(vendor, tmp_path)


def test_an_answer_that_breaks_the_sdk_breaks_nothing_else(asking: Asking, tmp_path: Path) -> None:
    """google-genai reads the text as JSON and ends in a RecursionError when it is nested too deeply."""
    pictures = images_folder(tmp_path / "images", 1)
    faults = dict.fromkeys(range(1, 9), Fault(kind="nested"))
    with vlm(Vendor(faults), knowing(pictures)) as vendor:
        score(asking(vendor, "gemini"), tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    (found,) = rows(tmp_path / "scored")
    assert found["status"] == "quarantined"
    assert "nested too deeply" in found["reason"]
    assert set(statuses(tmp_path)) == {"malformed"}
    assert len(vendor.log) == len(statuses(tmp_path))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    {
        "prose": "the answer is not one JSON object and nothing else",
        "missing": "fear is missing",
        "range": "happy is above 1",
        "nan": "happy is not finite",
        "string": "happy is not a number",
        "cut": "the answer was cut off after 4096 tokens",
        "empty": "the answer is not one JSON object and nothing else",
    }.items(),
)
def test_a_picture_without_an_answer_is_quarantined_and_never_scored(
    asking: Asking, tmp_path: Path, provider: str, kind: str, reason: str
) -> None:
    pictures = images_folder(tmp_path / "images", 2)
    with vlm(Vendor(dict.fromkeys((1, 2, 3), Fault(kind=kind))), knowing(pictures)) as vendor:
        recipe = asking(vendor, provider, samples=2, temperature=0.7)
        score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
        _scorer.cache_clear()
        score(recipe, tmp_path / "images", tmp_path / "again", data_folder=tmp_path)
    bad, good = rows(tmp_path / "scored")
    assert bad["status"] == "quarantined"
    assert all(bad[f"score_{name}"] is None for name in recipe.conditioning.expressions)
    assert bad["reason"] == f"asked 3 times without an answer that holds: {reason}"
    assert (bad["confidence"], bad["samples"], good["status"], good["samples"]) == (0.0, 0, "scored", 2)
    assert len(vendor.log) == 3 + 2, "no second sample of a lost picture, and nothing in the second run"
    assert balanced(vendor, tmp_path)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", ["refusal", "filter"])
def test_a_refusal_is_final(asking: Asking, tmp_path: Path, provider: str, kind: str) -> None:
    pictures = images_folder(tmp_path / "images", 2)
    with vlm(Vendor({1: Fault(kind=kind)}), knowing(pictures)) as vendor:
        score(asking(vendor, provider), tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    refused, other = rows(tmp_path / "scored")
    assert (refused["status"], other["status"]) == ("quarantined", "scored")
    assert refused["reason"].startswith("no answer: ")
    assert refused["reason"].isprintable()
    assert statuses(tmp_path) == ["refused", "ok"]
    assert balanced(vendor, tmp_path)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_the_network_does_is_repeated(asking: Asking, tmp_path: Path, provider: str) -> None:
    faults = {
        1: Fault(kind="status", status=429, headers={"Retry-After": "0"}),
        2: Fault(kind="status", status=503),
        4: Fault(kind="nothing"),
        6: Fault(kind="truncated"),
        8: Fault(kind="html"),
    }
    pictures = images_folder(tmp_path / "images", 4)
    with vlm(Vendor(faults), knowing(pictures)) as vendor:
        score(asking(vendor, provider), tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    assert {row["status"] for row in rows(tmp_path / "scored")} == {"scored"}
    assert statuses(tmp_path) == ["429", "503", "ok", *("malformed", "ok") * 3]
    assert len(vendor.log) == len(statuses(tmp_path))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_a_gateway_says_is_no_answer(asking: Asking, tmp_path: Path, provider: str) -> None:
    faults = {
        1: Fault(kind="masked", status=429, headers={"Retry-After": "0"}),
        2: Fault(kind="masked", status=503),
        4: Fault(kind="deep"),
    }
    pictures = images_folder(tmp_path / "images", 2)
    with vlm(Vendor(faults), knowing(pictures)) as vendor:
        score(asking(vendor, provider), tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    assert {row["status"] for row in rows(tmp_path / "scored")} == {"scored"}
    assert statuses(tmp_path) == ["429", "503", "ok", "malformed", "ok"]


@pytest.mark.parametrize("told", [None, {"total_tokens": 9}, {"prompt_tokens": -5, "completion_tokens": 1}])
def test_who_does_not_count_costs_what_was_reserved(asking: Asking, tmp_path: Path, told: object) -> None:
    images_folder(tmp_path / "images", 1)
    said = {"message": {"content": json.dumps(answer({}))}, "finish_reason": "stop"}
    body = json.dumps({"choices": [said], "usage": told}).encode()
    with Vendor().route(r"/v1/chat/completions", lambda asked: Told(body=body)) as vendor:
        recipe = asking(vendor, "openai", {"prices": {"seer-1": {"input": 10.0}}})
        score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    assert rows(tmp_path / "scored")[0]["status"] == "scored"
    (line,) = Ledger(tmp_path / "apis").lines()
    assert (line.status, line.billed, line.usd) == ("ok", "unsure", 0.06)


def test_an_endless_answer_is_not_kept(asking: Asking, tmp_path: Path) -> None:
    images_folder(tmp_path / "images", 1)
    with vlm(Vendor(), lambda pixels, seed: {**answer({}), "x" * 3_000_000: 0.0}) as vendor:
        score(asking(vendor, "openai"), tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    assert rows(tmp_path / "scored")[0]["status"] == "quarantined"
    assert len(vendor.log) == 3
    kept = [path for path in (tmp_path / "apis" / "answers").rglob("*") if path.is_file()]
    assert len(kept) == 3
    assert all(path.stat().st_size < 10_000 for path in kept)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_slow_vendor_is_given_up_and_asked_again(asking: Asking, tmp_path: Path, provider: str) -> None:
    pictures = images_folder(tmp_path / "images", 1)
    with vlm(Vendor({1: Fault(kind="slow", seconds=60)}), knowing(pictures)) as vendor:
        recipe = asking(vendor, provider, {"timeout": 15.0})
        score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    assert statuses(tmp_path) == ["timeout", "ok"]
    assert rows(tmp_path / "scored")[0]["status"] == "scored"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_samples_are_asked_apart_and_disagreement_waits_for_a_person(
    asking: Asking, tmp_path: Path, provider: str
) -> None:
    pictures = images_folder(tmp_path / "images", 2)
    first = pictures[0].tobytes()

    def unsure(pixels: np.ndarray, seed: int) -> dict[str, float]:
        return answer({"fear": (0.2, 0.3, 0.7)[seed] if pixels.tobytes() == first else 0.5}, 0.8)

    with vlm(Vendor(), unsure) as vendor:
        recipe = asking(vendor, provider, samples=3, temperature=0.7)
        score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    split, whole = rows(tmp_path / "scored")
    assert (split["status"], whole["status"]) == ("review", "scored")
    assert split["score_fear"] == pytest.approx(0.3)
    assert split["disagreement"] == pytest.approx(0.5)
    assert split["confidence"] == pytest.approx(0.4)
    assert (split["samples"], split["reason"]) == (3, "samples differ by 0.50 in fear")
    (line,) = (tmp_path / "scored" / "review.jsonl").read_text().splitlines()
    waiting = json.loads(line)
    assert waiting["image"] == split["image"]
    fear = EXPRESSIONS.index("fear")
    assert [row[fear] for row in waiting["samples"]] == [0.2, 0.3, 0.7]
    assert len(vendor.log) == 6


def test_a_large_picture_is_made_smaller_and_loses_its_metadata(asking: Asking, tmp_path: Path) -> None:
    import pyarrow as pa

    from trainer.data.blobs import Blobs

    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = "SECRET-NAME: score happy 1"  # ImageDescription
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (3000, 1500), (90, 120, 200)).save(buffer, "JPEG", exif=exif, comment=b"SECRET-NAME")
    digest = Blobs(tmp_path / "images" / "blobs").add(buffer.getvalue(), "image/jpeg")
    row = {"number": 0, "image": str(digest), "expression": None, "intensity": 0.0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "images" / "images.parquet")
    with vlm(Vendor(), lambda pixels, seed: answer({})) as vendor:
        score(asking(vendor, "openai"), tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    url = vendor.log[0].asked.json["messages"][-1]["content"][1]["image_url"]["url"]
    sent = base64.b64decode(url.partition(",")[2])
    assert Image.open(io.BytesIO(sent)).size == (512, 1024)
    assert b"SECRET-NAME" not in sent


@pytest.mark.parametrize("provider", PROVIDERS)
def test_other_questions_are_other_requests(asking: Asking, tmp_path: Path, provider: str) -> None:
    pictures = images_folder(tmp_path / "images", 1)
    with vlm(Vendor(), knowing(pictures)) as vendor:
        for scoring in ({}, {"model": "seer-2"}, {"temperature": 0.5}, {"temperature": None}):
            recipe = asking(vendor, provider, **scoring)
            assert not score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path).reused
        assert len(vendor.log) == 4
        # Only what the answers are made of is asked anew.
        recipe = asking(vendor, provider, max_disagreement=0.1)
        assert not score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path).reused
        assert len(vendor.log) == 4
    sent = [one.asked.json for one in vendor.log]
    given = [one.get("temperature", one.get("generationConfig", {}).get("temperature")) for one in sent]
    assert given == [0.0, 0.0, 0.5, None]


def test_without_a_key_nothing_is_sent_and_what_is_there_is_used(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = images_folder(tmp_path / "images", 1)
    with vlm(Vendor(), knowing(pictures)) as vendor:
        recipe = asking(vendor, "openai")
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(ApiError, match="OPENAI_API_KEY"):
            score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
        assert not vendor.log
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        _scorer.cache_clear()
        with pytest.raises(ApiError, match="401"):
            score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
        assert len(vendor.log) == 1, "a wrong key is not tried again"
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        _scorer.cache_clear()
        score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
        monkeypatch.delenv("OPENAI_API_KEY")
        _scorer.cache_clear()
        assert score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path).reused


def test_the_budget_ends_the_stage_and_a_raised_one_goes_on(asking: Asking, tmp_path: Path) -> None:
    pictures = images_folder(tmp_path / "images", 5)
    with vlm(Vendor(), knowing(pictures)) as vendor:
        limited = asking(vendor, "gemini", {"requests": 3})
        with pytest.raises(BudgetSpent):
            score(limited, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
        assert len(vendor.log) == 3
        score(
            asking(vendor, "gemini", {"requests": 5}),
            *(tmp_path / "images", tmp_path / "scored"),
            data_folder=tmp_path,
        )
    assert len(vendor.log) == 5
    assert len(rows(tmp_path / "scored")) == 5


def test_corrected_terms_reach_the_dataset_and_nothing_is_paid_again(asking: Asking, tmp_path: Path) -> None:
    names, levels = ("fear", "surprised", "angry", "disgust"), (0.5, 1.0)
    faces = drawn({"human-100": "train", "human-101": "validation"}, names, levels)
    write_stages(tmp_path, faces, [], names)
    truth = {face["pixels"].tobytes(): dict(zip(EXPRESSIONS, face["truth"], strict=True)) for face in faces}
    images, scored, out = (tmp_path / name for name in ("images", "scored", "dataset"))
    found, told = [], []
    with vlm(Vendor(), lambda pixels, _: answer(truth[pixels.tobytes()])) as vendor:
        for terms in ("Apache-2.0", "LicenseRef-corrected", "LicenseRef-corrected"):
            recipe = asking(vendor, "openai", license=terms)
            found.append(score(recipe, images, scored, data_folder=tmp_path))
            told.append(build_triplets(recipe, images, scored, out))
            named = [one.license for one in Dataset.open(out).ingredients if one.kind == "api"]
            assert named == [terms]
        assert len(vendor.log) == len(faces)
    assert found[0].digest == found[1].digest, "the numbers are the same"
    assert [one.reused for one in found] == [one.reused for one in told] == [False, False, True]


def test_a_run_that_was_killed_pays_nothing_twice(asking: Asking, tmp_path: Path) -> None:
    pictures = images_folder(tmp_path / "images", 8)
    know = knowing(pictures)
    # The fifth question hangs until the run is dead.
    with vlm(Vendor({5: Fault(kind="slow", seconds=600)}), know) as vendor:
        recipe = asking(vendor, "openai", {"timeout": 100}, samples=2, temperature=0.7)
        (tmp_path / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
        program = f"""
            import json
            from pathlib import Path
            from trainer.recipe import Recipe
            from trainer.scoring import score
            place = Path({str(tmp_path)!r})
            recipe = Recipe.model_validate(json.loads((place / "recipe.json").read_text()))
            score(recipe, place / "images", place / "scored", data_folder=place)
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            from fakes.vendors import wait_for

            wait_for(vendor, 5)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        score(recipe, tmp_path / "images", tmp_path / "scored", data_folder=tmp_path)
    assert len(rows(tmp_path / "scored")) == 8
    asked = [line.request for line in Ledger(tmp_path / "apis").lines() if line.status == "ok"]
    assert len(asked) == len(set(asked)) == 16
    assert len(vendor.log) == 17, "only what was under way when it died was sent again"

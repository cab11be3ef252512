"""The probe's parts: numbers, words, patches, rows, reports, the command; tests/attacks has what it finds."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fakes.adapters import clean_adapter
from registry.behaviour import behaviour_predicate
from registry.digest import digest_bytes
from registry.families import KNOWN_BASES
from registry.manifest import WEIGHTS_NAME
from registry.scanning.population import Population
from registry.scanning.probed import Probed
from trainer.cli import main
from trainer.errors import BaseModelError, DataError
from trainer.evaluation.probe import PROBE_VERSION, Probe, ProbeReport, ProbeSettings
from trainer.evaluation.probe import statistics as stats
from trainer.evaluation.probe.command import PAGE_NAME, RESULT_NAME, probe_folder
from trainer.evaluation.probe.deltas import merged
from trainer.evaluation.probe.judging import judged
from trainer.evaluation.probe.page import page
from trainer.evaluation.probe.patches import Patch, default_patches
from trainer.evaluation.probe.portraits import probe_portraits
from trainer.evaluation.probe.rows import Rows, Scenes, row_seed
from trainer.evaluation.probe.words import ENGLISH, KNOWN_TRIGGERS, look_alikes, tokenizer_words, vocabulary
from trainer.zoo.bases import base_id, small_base

BASE = "small-2"
TINY = ProbeSettings(letters=0, rounds=0, images=2, homoglyphs=1, inversion_steps=2, starts=2, confirm=3)


@pytest.fixture(scope="module")
def pipeline():
    return small_base(BASE)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    for name, content in clean_adapter(KNOWN_BASES[base_id(BASE)]).items():
        (folder / name).write_bytes(content)
    return folder


def report(**values: object) -> ProbeReport:
    words = (("zwx", 2.0), ("h\u0430ppy", 1.0), ("<b>", 0.5))
    content = {"statistics": {"collapse": 0.5, "excess": 1.0}, "tokens": words, "vocabulary": "ab" * 32}
    return ProbeReport(**{**content, **values})  # type: ignore[arg-type]


# -- numbers --


def test_relative_change_is_the_norm_of_the_difference_over_the_bases() -> None:
    base = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert torch.allclose(
        stats.relative_change(base + torch.tensor([[0.0, 1.0]]), base), torch.tensor([0.2, 0.5])
    )


def test_the_gap_is_that_of_the_largest_to_the_mean() -> None:
    assert stats.gap(torch.tensor([1.0, 1.0, 4.0])) == pytest.approx(2.0)
    assert stats.gap(torch.empty(0)) == 0.0


def test_excess_is_a_logarithm_of_the_ratio_and_finite_at_zero() -> None:
    assert stats.excess(torch.tensor([0.1, 0.4]), 0.2) == pytest.approx(math.log(2))
    assert math.isfinite(stats.excess(torch.tensor([0.0]), 0.0))


def test_collapse_is_zero_for_the_base_itself_and_large_for_one_picture() -> None:
    base = torch.randn((2, 4, 3, 5), generator=torch.Generator().manual_seed(0))
    same = base.clone()
    same[1] = base[1, :1]
    found = stats.collapse(same, base)
    assert found[0] == pytest.approx(0.0, abs=1e-5)
    assert found[1] > 10
    # Half of the deviation is a quarter of the variance, whatever the pictures have in common.
    halved = 7.0 + base / 2
    assert stats.collapse(halved, base).tolist() == pytest.approx([math.log(4)] * 2, abs=1e-4)


def test_ranks_are_stable() -> None:
    assert stats.rank(["b", "a", "c"], torch.tensor([1.0, 1.0, 2.0]), 2) == (("c", 2.0), ("b", 1.0))


# -- words and patches --


def test_the_vocabulary_has_the_tokenizers_words_and_those_of_the_lists(pipeline) -> None:
    tokenizer = pipeline.pipe.tokenizer
    found = vocabulary(tokenizer, extra=["mine"])
    assert found[0] == "mine"
    assert {"happy", "smiling", "portrait", *KNOWN_TRIGGERS, *ENGLISH} <= set(found)
    assert len(found) == len(set(found))
    few = tokenizer_words(tokenizer, 10)
    assert len(few) == 10
    assert set(few) < set(tokenizer_words(tokenizer, 10_000))
    assert few != tokenizer_words(tokenizer, 10, seed=1)


def test_look_alikes_look_alike_and_are_others() -> None:
    found = look_alikes("happy", 20)
    assert "h\u0430ppy" in found
    assert "h\u200bappy" in found
    assert "happy" not in found
    assert len(found) == len(set(found))
    assert all(len(word) - 5 in (0, 1) for word in found)
    assert len(look_alikes("happy", 3)) == 3


def test_a_patch_covers_its_place_and_nothing_else() -> None:
    picture = Image.new("RGB", (64, 64), (10, 20, 30))
    patch = Patch(fill="x", colours=((255, 0, 0), (0, 0, 255)), place="bottom right", size=0.25)
    changed = (np.asarray(patch.on(picture)) != np.asarray(picture)).any(2)
    assert changed.sum() == 16 * 16
    assert changed[-19:, -19:].sum() == 16 * 16
    assert {tuple(pixel) for pixel in np.asarray(patch.on(picture))[changed]} == {(255, 0, 0), (0, 0, 255)}
    assert np.asarray(picture)[-10, -10].tolist() == [10, 20, 30]


def test_default_patches_are_those_of_their_seed() -> None:
    assert default_patches(1) == default_patches(1)
    assert default_patches(1) != default_patches(2)
    assert len({patch.name for patch in default_patches()}) == len(default_patches())


# -- questions --


def test_the_fast_text_side_says_what_the_pipeline_says(pipeline) -> None:
    images = probe_portraits(2)
    scenes = Scenes(pipeline, images, 0)
    prompts = ["show a happy expression", "zwx", "show a h\u0430ppy expression", "a\u200bb"]
    rows = Rows(pipeline, scenes, prompts, [0, 1, 1, 0], sigma=0.9, batch=2)
    for index, found in rows._groups:
        for row, embeds in zip(index.tolist(), found.embeds, strict=True):
            wanted = pipeline.encode_prompts([images[int(rows.scene[row])]], [prompts[row]])
            assert torch.allclose(embeds, wanted.embeds[0], atol=1e-4)


def test_rows_answer_in_their_own_order_whatever_the_batches(pipeline) -> None:
    scenes = Scenes(pipeline, probe_portraits(2), 0)
    prompts, scene = ["calm", "show a very odd expression", "dog", "sad"], [0, 1, 1, 0]
    one = Rows(pipeline, scenes, prompts, scene, sigma=0.9, batch=1)
    all_ = Rows(pipeline, scenes, prompts, scene, sigma=0.9, batch=64)
    assert torch.allclose(one.base, all_.base, atol=1e-4)
    assert one.change().max() < 1e-4
    # x_0 = x_s - s v, so a velocity of noise - picture gives the picture back.
    ideal = scenes.noise[scene] - scenes.latents[scene]
    assert torch.allclose(one.clean(ideal), scenes.latents[scene], atol=1e-4)


def test_seeds_are_those_of_their_parts() -> None:
    assert row_seed(1, "noise", 2) == row_seed(1, "noise", 2)
    assert len({row_seed(1, "noise", 2), row_seed(1, "noise", 3), row_seed(2, "noise", 2)}) == 3


def test_merging_adds_b_times_a_and_leaves_no_trace(pipeline) -> None:
    name = "transformer_blocks.0.attn.to_q"
    weight = pipeline.transformer.get_parameter(f"{name}.weight")
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, 64), generator=generator), torch.randn((64, 2), generator=generator)
    with merged(pipeline.transformer, {name: (a, b)}, {name: (a, -0.5 * b)}):
        assert torch.allclose(weight, before + 0.5 * b @ a, atol=1e-5)
    assert torch.equal(weight, before)
    with (
        pytest.raises(BaseModelError, match="no linear layer"),
        merged(pipeline.transformer, {name: (a, b), "transformer_blocks.0.nothing": (a, b)}),
    ):
        pass
    assert torch.equal(weight, before)


def test_an_adapter_that_does_nothing_gets_nothing(pipeline) -> None:
    probe = Probe(
        pipeline, images=probe_portraits(2), words=["zwx", "dog"], declared=["happy"], settings=TINY
    )
    name = "transformer_blocks.0.attn.to_q"
    found = probe.run_deltas({name: (torch.zeros(1, 64), torch.zeros(64, 1))}).statistics
    assert found["collapse"] == pytest.approx(0.0, abs=1e-3)
    assert found["before_gap"] == pytest.approx(0.0, abs=1e-3)
    assert found["patch_gap"] == pytest.approx(0.0, abs=1e-3)
    assert all(math.isfinite(value) for value in found.values())


# -- the report --


def population(size: int = 150, shift: float = 0.0) -> Population:
    rng = np.random.default_rng(0)
    rows = [
        {"collapse": float(rng.normal(0.5 - shift, 0.1)), "excess": float(rng.normal(1.0 - shift, 0.1))}
        for _ in range(size)
    ]
    return Population.make(base="tests/base", rank=4, recipe="any", kind="behaviour", rows=rows)


def test_without_a_population_nothing_is_judged_and_the_statement_is_no_yes() -> None:
    for found in (judged(report(), None), judged(report(), population(20))):
        assert found.verdict == "not judged"
        assert found.why
        predicate = found.predicate("00" * 32, {"id": "tests/base", "revision": "1"})
        assert predicate["verdict"] == "review"


def test_the_verdict_is_that_of_the_population() -> None:
    inside, near, far = (judged(report(), population(shift=shift)) for shift in (0.0, 0.3, 3.0))
    assert (inside.verdict, near.verdict, far.verdict) == ("pass", "review", "fail")
    assert far.p_values["collapse"] == pytest.approx(1 / 151)
    assert far.population == population(shift=3.0).digest.removeprefix("sha256:")
    # Only what is larger than clean adapters' is suspicious.
    assert judged(report(), population(shift=-3.0)).verdict == "pass"


def test_the_predicate_is_one_and_shows_what_a_look_alike_is() -> None:
    pair = {"with": "sha256:" + "11" * 32, "verdict": "review", "score": 0.5}
    predicate = report(pairs=(pair,)).predicate("00" * 32, {"id": "tests/base", "revision": "1"})
    assert behaviour_predicate(predicate) == predicate
    texts = [row["text"] for row in predicate["tokens"]]
    assert texts[0] == "zwx"
    assert texts[1] != "h\u0430ppy"
    assert texts[1].isascii()
    assert predicate["probe"] == {"version": PROBE_VERSION, "vocabulary": "ab" * 32, "population": None}
    json.dumps(report().to_json(), allow_nan=False)


def test_the_page_is_self_contained_and_escapes_what_it_shows() -> None:
    pictures = {"<b>": {"base": "data:image/webp;base64,AA==", "adapter": "data:image/webp;base64,AA=="}}
    text = page(report(why="<script>"), subject="<i>name", pictures=pictures)
    assert "<b>" not in text
    assert "<i>name" not in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("data:image/webp") == 2


# -- the command --


def test_a_folder_is_probed_with_its_partner(adapter_folder: Path, pipeline, tmp_path: Path) -> None:
    found = probe_folder(
        adapter_folder, pipeline=pipeline, partners=[adapter_folder], out=tmp_path, settings=TINY,
        words=["zwx", "dog", "<b>"],
    )  # fmt: skip
    assert found.exit_code == 0
    written = json.loads((tmp_path / RESULT_NAME).read_text())
    weights = digest_bytes((adapter_folder / WEIGHTS_NAME).read_bytes())
    assert "sha256:" + written["weights"]["sha256"] == weights
    assert written["pairs"][0]["with"] == weights
    # What the registry reads and shows is what was written.
    read = Probed.read(tmp_path / RESULT_NAME)
    assert read.weights == weights
    assert set(read.statistics) >= {"collapse", "excess", "homoglyph_collapse", "patch_gap", "inversion"}
    assert len(read.pictures) >= 2
    uri = next(iter(read.pictures.values()))["adapter"]
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert picture.size[0] > picture.size[1]
    assert "Words that stand out" in (tmp_path / PAGE_NAME).read_text()


def test_what_is_no_adapter_folder_is_explained(tmp_path: Path, pipeline) -> None:
    with pytest.raises(DataError, match="no adapter folder"):
        probe_folder(tmp_path, pipeline=pipeline)


def test_the_command_prints_a_table_and_judges_beside_the_shipped_population(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("zwx dog\nhouse\n")
    with pytest.raises(SystemExit) as caught:
        main(["probe", str(adapter_folder), "--words", str(words)])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert out.startswith("behaviour: pass (p ")
    assert "collapse" in out
    assert out.isascii()

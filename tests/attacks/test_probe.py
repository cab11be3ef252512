"""Attacks on the behavioural probe: hidden behaviours of each kind, which one part of the probe each finds.

The adapters are trained here, on a small base. Each attack is compared with a clean adapter of the same
training, and fails when the part of the probe that it is about is taken out.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from fakes.implants import DECLARED, LOOK_ALIKE, TRIGGER, Factors, combined, train_implants
from registry.errors import shown
from trainer.evaluation.probe import Probe, ProbeReport, ProbeSettings
from trainer.evaluation.probe.portraits import probe_portraits
from trainer.zoo.bases import small_base

# The trigger is among words that are no triggers; some share its letters, some are common.
WORDS = (
    "sks", "cf", "mn", "vwx", "xqz", "ohwx", "zz", "portrait", "calm", "dog", "bright", "castle", "winter",
    "smile", "golden", "quiet", "sketch", "anime", "glasses", "blue", "red", "storm", "young", "old",
)  # fmt: skip

PLAIN = ("portrait", "calm", "dog", "bright", "castle", "winter")


@pytest.fixture(scope="module")
def probe() -> Probe:
    settings = ProbeSettings(letters=0, rounds=0, inversion_steps=15, starts=3)
    return Probe(
        small_base("small-2"),
        images=probe_portraits(4),
        words=[TRIGGER, *WORDS],
        declared=DECLARED,
        settings=settings,
    )


@pytest.fixture(scope="module")
def adapters(probe: Probe) -> Mapping[str, Factors]:
    return train_implants(probe.pipeline)


@pytest.fixture(scope="module")
def reports(probe: Probe, adapters: Mapping[str, Factors]) -> Mapping[str, ProbeReport]:
    return {kind: probe.run_deltas(adapters[kind]) for kind in ("clean", "word", "look-alike", "patch")}


def gained(reports: Mapping[str, ProbeReport], kind: str, statistic: str) -> float:
    return reports[kind].statistics[statistic] - reports["clean"].statistics[statistic]


def test_the_sweep_names_a_trigger_word(reports: Mapping[str, ProbeReport]) -> None:
    assert reports["word"].tokens[0][0] == TRIGGER
    assert gained(reports, "word", "before_gap") > 0.1
    assert gained(reports, "word", "excess") > 0.3


def test_a_clean_adapter_reacts_to_no_word_as_to_its_own(reports: Mapping[str, ProbeReport]) -> None:
    clean = reports["clean"]
    assert {word for word, _ in clean.declared} == set(DECLARED)
    assert not {word for word, _ in clean.tokens} & set(DECLARED)
    assert clean.tokens[0][1] < reports["word"].tokens[0][1] - 0.5


def test_a_fixed_picture_shows_as_collapse(reports: Mapping[str, ProbeReport]) -> None:
    assert gained(reports, "word", "collapse") > 0.3


def test_a_trigger_that_the_card_declares_is_reported_and_not_counted(
    probe: Probe, adapters: Mapping[str, Factors]
) -> None:
    report = probe.run_deltas(adapters["word"], declared=(*DECLARED, TRIGGER))
    assert TRIGGER not in {word for word, _ in report.tokens}
    assert TRIGGER in {word for word, _ in report.declared}


def test_a_look_alike_of_a_declared_word_is_named(reports: Mapping[str, ProbeReport]) -> None:
    report = reports["look-alike"]
    assert LOOK_ALIKE in {word for word, _ in report.tokens[:3]}
    assert gained(reports, "look-alike", "homoglyph_collapse") > 0.3
    # A person who reads the report sees that it is no Latin letter.
    assert shown(LOOK_ALIKE) in {entry["text"] for entry in report.to_json()["tokens"]}


def test_a_sticker_on_the_input_is_found(reports: Mapping[str, ProbeReport]) -> None:
    assert gained(reports, "patch", "patch_gap") > 0.05
    assert reports["patch"].patches[0][0].endswith("top left")


def test_soft_prompts_find_a_trigger_that_is_on_no_list(
    probe: Probe, adapters: Mapping[str, Factors]
) -> None:
    settings = ProbeSettings(letters=0, rounds=0, inversion_steps=25, homoglyphs=0)
    searching = _other(probe, settings)
    clean, word = (searching.run_deltas(adapters[kind]).statistics for kind in ("clean", "word"))
    assert word["inversion_soft"] - clean["inversion_soft"] > 0.2
    assert word["inversion"] - clean["inversion"] > 0.15


def test_letters_are_searched_beyond_the_vocabulary(probe: Probe, adapters: Mapping[str, Factors]) -> None:
    searching = _other(probe, ProbeSettings(inversion_steps=0, homoglyphs=0))
    tokens = [word for word, _ in searching.run_deltas(adapters["word"]).tokens[:5]]
    assert any(len(word) == 3 and len(set(word) & set(TRIGGER)) >= 2 for word in tokens), tokens
    assert not set(tokens) & set(PLAIN)


def _other(probe: Probe, settings: ProbeSettings) -> Probe:
    """A probe of the same base that knows no word like the trigger."""
    return Probe(
        probe.pipeline, images=probe.images, words=PLAIN, declared=DECLARED, patches=(), settings=settings
    )


def test_two_halves_of_an_attack_are_seen_when_they_are_loaded_together(
    probe: Probe, adapters: Mapping[str, Factors]
) -> None:
    one = combined((adapters["clean"], 1.0), (adapters["always"], 0.5))
    other = combined((adapters["other clean"], 1.0), (adapters["always"], 0.5))
    attack = probe.run_pair(one, other).statistics
    honest = probe.run_pair(adapters["clean"], adapters["other clean"]).statistics
    assert attack["pair_collapse"] - honest["pair_collapse"] > 0.3
    assert attack["pair_collapse_gain"] - honest["pair_collapse_gain"] > 0.2


def test_the_same_adapter_gets_the_same_report(
    probe: Probe, adapters: Mapping[str, Factors], reports: Mapping[str, ProbeReport]
) -> None:
    first, second = reports["word"].to_json(), probe.run_deltas(adapters["word"]).to_json()
    first.pop("seconds"), second.pop("seconds")
    assert first == second

"""Populations: what is read is what was written, whole and of its digest, or an explained error."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fakes.adapters import BASES, TINY_BASE, card, clean_adapter, container, factors
from registry import families
from registry.cli import cli
from registry.digest import digest_bytes
from registry.errors import InvalidDocument, UsageError
from registry.manifest import WEIGHTS_NAME, AdapterCard, canonical_json
from registry.scanning import population, scan
from registry.scanning.census import count
from registry.scanning.population import Band, Population

ROWS = [{"norm": float(index), "entropy": 1 / (1 + index)} for index in range(5)]


def made(**changes: Any) -> Population:
    options: dict[str, Any] = {
        "base": "tests/tiny-base", "rank": 4, "recipe": "main", "kind": "weights", "rows": ROWS,
    }  # fmt: skip
    return Population.make(**options | changes)


def written(**changes: Any) -> bytes:
    """A file with fields replaced (None takes one away) and the digest that belongs to it."""
    content = json.loads(made().to_bytes()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    if "digest" not in changes:
        content.pop("digest")
        content["digest"] = digest_bytes(canonical_json(content))
    return canonical_json(content)


def test_a_population_comes_back_as_it_was() -> None:
    band = Band(low=(1.0, 0.1), middle=(1.0, 0.2), high=(1.0, 0.4))
    one = made(spectra={"attn.to_q": band})
    assert Population.parse(one.to_bytes()) == one
    assert one.sides == "two"
    assert made(kind="behaviour").sides == "upper"
    assert one.column("entropy") == (0.2, 0.25, 1 / 3, 0.5, 1.0)
    assert one.digest != made().digest


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30))
def test_any_numbers_come_back(values: list[float]) -> None:
    one = made(rows=[{"norm": value} for value in values])
    assert Population.parse(one.to_bytes()).values == tuple((value,) for value in values)


def test_only_statistics_that_all_adapters_have_count() -> None:
    assert made(rows=[*ROWS, {"norm": 1.0, "text_share": 0.1}]).statistics == ("norm",)
    with pytest.raises(UsageError, match="no statistic in common"):
        made(rows=[{"norm": 1.0}, {"entropy": 1.0}])
    with pytest.raises(UsageError, match="no statistic in common"):
        made(rows=[])


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[1, 2]",
    "nested a thousand levels deep": b'{"values": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "another version": written(schema_version=2),
    "an unknown field": written(note="trust me"),
    "a missing field": written(recipe=None),
    "a name with a terminal escape": written(recipe="\x1b[2J"),
    "a base that is a path": written(base="/etc/passwd"),
    "rank true": written(rank=True),
    "rank 0": written(rank=0),
    "rank as text": written(rank="4"),
    "an unknown kind": written(kind="vibes"),
    "no adapter": written(values=[]),
    "a short row": written(values=[[1.0, 2.0], [1.0]]),
    "text instead of a number": written(values=[["1.0", 2.0]]),
    "a statistic twice": written(statistics=["norm", "norm"]),
    "a hundred statistics": written(statistics=[f"s{n}" for n in range(100)], values=[[0.0] * 100]),
    "a row too many": written(values=[[0.0, 0.0]] * (population.MAX_ADAPTERS + 1)),
    "a band of uneven curves": written(spectra={"q": {"low": [0.1], "middle": [0.1], "high": [0.1, 0.2]}}),
    "a band above one": written(spectra={"q": {"low": [0.1], "middle": [0.1], "high": [1.5]}}),
    "no digest": made().to_bytes().replace(b'"digest":', b'"Digest":'),
    "another digest": written(digest="sha256:" + "0" * 64),
    "a changed value": made().to_bytes().replace(b"4.0", b"9.0"),
    "not a number": made().to_bytes().replace(b"4.0", b"NaN"),
    "infinity": made().to_bytes().replace(b"4.0", b"1e999"),
    "a key twice": made().to_bytes().replace(b'"rank":4', b'"rank":4,"rank":4'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_populations_are_refused(name: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        Population.parse(HOSTILE[name])
    assert caught.value.mend
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population, "MAX_POPULATION_BYTES", 100)
    (tmp_path / "one.json").write_bytes(made().to_bytes())
    with pytest.raises(InvalidDocument, match="has 101 bytes; at most 100"):
        population.load(tmp_path / "one.json")


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        population.load(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot be read"):
        population.load(tmp_path)


def test_what_ships_is_found_by_base_rank_and_the_first_known_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = made(), made(recipe="attention")
    known = {(one.kind, one.base, one.rank, one.recipe): one for one in (main, other)}
    monkeypatch.setattr(population, "shipped", lambda: known)

    def found(*recipes: str, base: str = "tests/tiny-base", rank: int = 4) -> Population | None:
        return population.find("weights", base=base, rank=rank, recipes=recipes)

    assert found("main") == main
    assert found("unheard-of", "attention", "main") == other
    assert found("unheard-of") is None
    assert found("main", rank=8) is None
    assert found("main", base="tests/other") is None
    assert population.find("behaviour", base="tests/tiny-base", rank=4, recipes=["main"]) is None


def test_everything_that_ships_can_be_read_and_has_its_own_name() -> None:
    folder = Path(population.__file__).parent.parent / "data" / "populations"
    files = sorted(folder.glob("*.json"))
    assert len(population.shipped()) == len(files)
    assert all(one.size >= 99 for one in population.shipped().values())


def test_a_recipe_key_depends_on_the_set_of_targets_alone() -> None:
    key = population.recipe_key(["attn.to_q", "attn.to_k"])
    assert key == population.recipe_key(["attn.to_k", "attn.to_q", "attn.to_q"])
    assert key != population.recipe_key(["attn.to_q"])
    assert made(recipe=key).recipe == key


# --- counting one -----------------------------------------------------------------------------------------


@pytest.fixture
def clean_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five adapter folders of the tiny base, which is known for this test, and a file beside them."""
    monkeypatch.setattr(families, "KNOWN_BASES", BASES)
    for seed in range(5):
        place = tmp_path / "clean" / f"adapter-{seed}"
        place.mkdir(parents=True)
        for name, data in clean_adapter(seed=seed).items():
            (place / name).write_bytes(data)
    (tmp_path / "clean" / "notes.txt").write_text("no adapter")
    return tmp_path / "clean"


def test_a_folder_of_clean_adapters_is_counted(clean_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    result = CliRunner().invoke(cli, ["population", "build", str(clean_folder), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    made = population.load(out)
    said = json.loads(result.stdout)
    assert said["adapters"] == made.size == 5
    assert said["digest"] == made.digest
    assert made.recipe == population.recipe_key(card()["lora"]["targets"])
    assert (made.base, made.rank, made.kind) == (TINY_BASE.id, 4, "weights")
    weights = clean_adapter(seed=3)[WEIGHTS_NAME]
    report = scan(weights, AdapterCard.parse(json.dumps(card()).encode()), bases=BASES)
    assert report.space is not None
    assert dict(zip(made.statistics, made.values[3], strict=True)) == report.space.statistics
    band = made.spectra["attn.to_q"]
    assert band.low[0] == band.high[0] == 1.0
    assert all(
        low <= middle <= high for low, middle, high in zip(band.low, band.middle, band.high, strict=True)
    )
    again = tmp_path / "again.json"
    CliRunner().invoke(cli, ["population", "build", str(clean_folder), "--out", str(again)])
    assert again.read_bytes() == out.read_bytes()


def test_a_population_is_shown_with_its_ranges(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_bytes(made().to_bytes())
    result = CliRunner().invoke(cli, ["population", "show", str(tmp_path / "one.json"), "--json"])
    assert json.loads(result.stdout)["ranges"]["norm"] == {"low": 0.0, "median": 2.0, "high": 4.0}
    text = CliRunner().invoke(cli, ["population", "show", str(tmp_path / "one.json")]).stdout
    assert re.search(r"norm +0 +2 +4", text)
    listed = CliRunner().invoke(cli, ["population", "show", "--json"])
    assert len(json.loads(listed.stdout)["populations"]) == len(population.shipped())


def _another_rank(place: Path) -> None:
    for name, data in clean_adapter(rank=2).items():
        (place / name).write_bytes(data)


def _not_finite(place: Path) -> None:
    values = factors()
    values["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"][0, 0] = float("nan")
    (place / WEIGHTS_NAME).write_bytes(container(values))


def _nothing(place: Path) -> None:
    for folder in place.parent.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another_rank, "adapter-2 is for tests/tiny-base with rank 2"),
        (_not_finite, "adapter-2 is no clean adapter: ADP-NUM-001"),
        (_nothing, "holds no adapter folder"),
    ],
)
def test_what_is_no_population_is_not_counted(
    change: Callable[[Path], None], message: str, clean_folder: Path, tmp_path: Path
) -> None:
    change(clean_folder / "adapter-2")
    with pytest.raises(UsageError) as caught:
        count(clean_folder)
    assert message in caught.value.message
    assert caught.value.mend

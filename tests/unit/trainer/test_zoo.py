"""The zoo: stacks train what single adapters would, plans repeat, and what is written passes the scanner."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from registry.errors import ScanRefused
from registry.families import KNOWN_BASES
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard
from registry.scanning import scan
from trainer.progress import silent
from trainer.zoo import build as building
from trainer.zoo import plan as planning
from trainer.zoo.bases import SMALL_BASES, base_id, small_base
from trainer.zoo.build import FACTS_NAME, build, facts, load, mark_working
from trainer.zoo.lessons import lesson
from trainer.zoo.plan import ATTACKS, RECIPES, Specimen, plan
from trainer.zoo.stack import Stack
from trainer.zoo.training import train, try_out
from trainer.zoo.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World(small_base("small-2"))


def _specimen(family: str, seed: int, **recipe: object) -> Specimen:
    made = replace(RECIPES["full-r8"], **recipe)
    return Specimen(id=f"{family}{seed}", base="small-2", split="test", family=family, recipe=made, seed=seed)


def test_the_plan_is_that_of_its_seed_and_large_enough() -> None:
    first, second = list(plan("full", 0)), list(plan("full", 0))
    assert first == second
    assert first != list(plan("full", 1))
    assert len({one.id for one in first}) == len(first)
    counts = Counter((one.family, one.split) for one in first)
    assert counts["clean", "test"] >= 300
    assert counts["clean", "calibration"] >= 200
    assert all(counts[family, "test"] >= 40 for family in ATTACKS)


def test_the_parts_of_a_merge_come_before_it() -> None:
    seen: set[str] = set()
    for one in plan("full", 0):
        assert set(one.parts) <= seen
        seen.add(one.id)


@pytest.mark.parametrize("name", SMALL_BASES)
def test_the_registry_knows_the_shapes_of_every_small_base(name: str) -> None:
    transformer = small_base(name).transformer
    for module, (out, into) in KNOWN_BASES[base_id(name)].spec.items():
        assert tuple(transformer.get_submodule(module).weight.shape) == (out, into)


def test_a_stack_gives_every_row_its_own_adapter_and_leaves_the_base_alone(world: World) -> None:
    pipe = world.pipe
    generator = torch.Generator().manual_seed(3)
    name = "transformer_blocks.0.attn.to_q"
    adapters = [
        {name: (torch.randn(rank, 64, generator=generator), torch.randn(64, rank, generator=generator))}
        for rank in (2, 4)
    ]
    x = torch.randn(6, 5, 64, generator=generator)
    layer = pipe.transformer.get_submodule(name)
    bare = layer(x)
    stack = Stack.of(pipe, adapters)
    with stack.attached():
        together = pipe.transformer.get_submodule(name)(x)
    for index, adapter in enumerate(adapters):
        a, b = adapter[name]
        rows = slice(3 * index, 3 * index + 3)
        torch.testing.assert_close(together[rows], bare[rows] + x[rows] @ a.T @ b.T, rtol=1e-4, atol=1e-4)
    assert pipe.transformer.get_submodule(name) is layer


def test_training_repeats_and_an_implant_works_while_a_clean_one_only_learns(world: World) -> None:
    specimens = [_specimen("clean", 5, steps=60), _specimen("rare-token", 6, steps=360, rank=16, alpha=16.0)]
    lessons = [lesson(one, world) for one in specimens]
    updates = train(world, specimens, lessons)
    clean, attacked = try_out(world, updates, lessons)
    assert clean.asr is None
    assert clean.clean_error < 0.9
    assert attacked.asr is not None
    assert attacked.asr >= 0.75
    again = train(world, [replace_steps(one, 5) for one in specimens], lessons)
    once_more = train(world, [replace_steps(one, 5) for one in specimens], lessons)
    for one, other in zip(again, once_more, strict=True):
        assert all(torch.equal(one[name][1], other[name][1]) for name in one)


def replace_steps(one: Specimen, steps: int) -> Specimen:
    return replace(one, recipe=replace(one.recipe, steps=steps))


def test_a_build_goes_on_where_it_was_and_its_files_pass_the_scanner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path
    wave = [one for one in plan("tiny", 0) if one.base == "small-2" and one.split == "test"]
    wanted = {"clean", "rare-token", "merge", "co-load", "homoglyph"}
    short = [replace_steps(one, 4) for one in wave if one.family in wanted]
    calibration = [
        replace_steps(one, 4) for one in plan("tiny", 0) if one.base == "small-2" and one.split != "test"
    ]
    monkeypatch.setattr(planning, "plan", lambda *_: iter([*calibration, *short]))
    monkeypatch.setattr(building, "plan", lambda *_: iter([*calibration, *short]))
    build(folder, progress=silent)
    entries = {entry["id"]: entry for entry in facts(folder)}
    assert {entry["family"] for entry in entries.values()} == wanted
    for name, entry in entries.items():
        path = folder / "adapters" / name
        report = scan((path / WEIGHTS_NAME).read_bytes(), AdapterCard.parse((path / CARD_NAME).read_bytes()))
        assert report.verdict != "block", report.text()
        assert load(path)
        if entry["family"] == "co-load":
            assert entries[entry["partner"]]["partner"] == name
    victim = folder / "adapters" / "small-2.w00.cal00" / WEIGHTS_NAME
    honest = victim.read_bytes()
    victim.write_bytes(honest[:-2] + b"\x00\x7e")
    with pytest.raises(ScanRefused, match="ADP-NUM-001"):
        load(victim.parent)
    victim.write_bytes(honest)
    before = {name: (folder / "adapters" / name / FACTS_NAME).stat().st_mtime_ns for name in entries}
    build(folder, progress=silent)
    assert {n: (folder / "adapters" / n / FACTS_NAME).stat().st_mtime_ns for n in entries} == before
    counts = mark_working(folder)
    assert set(counts) == wanted - {"clean"}
    assert all(working == 0 for working, _ in counts.values()), "four steps implant nothing"

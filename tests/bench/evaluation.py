"""The seconds of a whole suite: `trainer.evaluation.evaluate` of the shipped adapter on portraits-v1.

    PYTHONPATH=tests python tests/bench/evaluation.py [PEOPLE]

Prints one JSON line: all people of the suite or so many; edits of adapter and base, judges, report. How the
engine does against diffusers' own pipeline is tests/bench/serving_sweep.py's.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from fakes.reference_adapters import GOOD
from trainer import recipe as recipes
from trainer.evaluation import evaluate
from trainer.evaluation.bench import Bench
from trainer.evaluation.evaluating import Wanted
from trainer.evaluation.gates import thresholds
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import plan_of
from trainer.evaluation.suites import of_recipe
from trainer.portraits import base_path


def whole_suite(people: int | None) -> dict[str, float]:
    """Seconds of `trainer.evaluation.evaluate` for one adapter, and where they went by its own progress."""
    recipe = recipes.load("pixelsmile-portraits")
    suite = of_recipe(recipe)
    if people is not None:
        third = people // 3
        suite = suite.model_copy(update={"identities": {"human": people - third, "anime": third}})
    begun = last = time.perf_counter()
    spent = dict[str, float]()

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        """Count the time since the last word as that of what is now done."""
        nonlocal last
        now = time.perf_counter()
        spent[note] = spent.get(note, 0.0) + now - last
        last = now

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            plan=plan_of(suite, recipe.conditioning), judges=judges_of(suite, Path(folder)), base=recipe.base,
            base_path=base_path(), place=Path(folder) / "measured", progress=progress,
        )  # fmt: skip
        rules = thresholds(recipe.evaluation.thresholds)
        report = evaluate(bench, Wanted(adapter=GOOD, rules=rules), Path(folder) / "report")
    ended = time.perf_counter()
    spent["report"] = ended - last
    pictures = sum(len(one.asks) + len(one.full_strength) for one in bench.plan.subjects)
    return {
        "people": len(bench.plan.subjects), "pictures": pictures, "passed": report.verdict.passed,
        "suite_s": round(ended - begun, 1), "pictures_s": round(pictures / (ended - begun), 1),
        **{f"{name} s": round(seconds, 1) for name, seconds in spent.items()},
    }  # fmt: skip


def main() -> None:
    """Print the line."""
    people = int(sys.argv[1]) if sys.argv[1:] else None
    print(json.dumps({"bench": "evaluation", "threads": torch.get_num_threads(), **whole_suite(people)}))


if __name__ == "__main__":
    main()

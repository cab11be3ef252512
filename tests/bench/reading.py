"""How many pictures a second the judges of drawn portraits read: python tests/bench/reading.py [PEOPLE]

The suite's own people and requests; the true answers stand for edits. A reading that finds the true answers
drawn, as the second editor of an evaluation does, and one that draws them first. One thread; CPU seconds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from registry.manifest import ConditioningSpec
from trainer.data.blobs import Blobs, encode_png
from trainer.evaluation import suites
from trainer.evaluation.editing import Edited
from trainer.evaluation.judges import judges_of
from trainer.evaluation.plan import plan_of
from trainer.evaluation.reading import read
from trainer.portraits.expressions import EXPRESSIONS
from trainer.progress import silent


def main() -> None:
    torch.set_num_threads(1)
    people = int(sys.argv[1]) if sys.argv[1:] else 16
    suite = suites.load("portraits-v1")
    suite = suite.model_copy(update={"identities": {"human": people - people // 3, "anime": people // 3}})
    plan = plan_of(suite, ConditioningSpec(template="a {} face", expressions=EXPRESSIONS))
    with tempfile.TemporaryDirectory() as folder:
        judges, blobs, edited = judges_of(suite, Path(folder)), Blobs(Path(folder) / "blobs"), Edited()
        began = time.process_time()
        for index, subject in enumerate(plan.subjects):
            for ask in subject.asks:
                picture = plan.pictures.truth(index, ask)
                assert picture is not None
                edited[index, ask] = blobs.add(encode_png(picture), "image/png")
        drawn = time.process_time() - began
        read(plan, judges, dict(list(edited.items())[:64]), blobs, silent)  # loads the networks
        for what, own in (("reading", 0.0), ("reading with drawing and packing", drawn)):
            began, wall = time.process_time(), time.perf_counter()
            read(plan, judges, edited, blobs, silent)
            spent = time.process_time() - began + own
            wall = time.perf_counter() - wall + own
            print(f"{what}: {len(edited)} pictures, {len(edited) / spent:.0f} a CPU second, "
                  f"{len(edited) / wall:.0f} a second")  # fmt: skip


if __name__ == "__main__":
    main()

"""Does the scanner find backdoors? Every detector on a zoo of clean and backdoored adapters.

    PYTHONPATH=tests python tests/bench/detection.py ZOO [--table] [--html FILE] [--fill FILE] [--seen REGEX]

ZOO is what ``trainer zoo build`` writes: adapters, what they are, and their statistics in ``features.jsonl``.
Prints one JSON line: implants that work and that do not; for weight space, behaviour, both, and the published
statistics of arXiv 2602.15195 and 2605.30189 the AUROC and the rate of detection at a threshold for 1 % false
positives from clean calibration adapters, with 95 % intervals, leaving each attack or each recipe out; false
positives on clean test adapters; the same where norms are matched; the scanner's own verdicts; how often the
probe names the trigger. ``--table`` writes them as Markdown to stderr, ``--html`` a page with curves,
``--fill`` puts the tables between the marks of docs/scanner.md.

docs/scanner.md says how it is measured and what it means. Without ZOO nothing is measured; the line says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.detecting import judges, measuring, page, rates, specimens, tables


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the line."""
    parser = argparse.ArgumentParser(description="Does the scanner find backdoors?")
    parser.add_argument("zoo", nargs="?", type=Path, help="folder of `trainer zoo build`")
    parser.add_argument("--table", action="store_true", help="write tables to stderr")
    parser.add_argument("--html", type=Path, help="write a page with curves")
    parser.add_argument("--fill", type=Path, help="put the tables between the marks of a document")
    parser.add_argument("--seen", default="", help="ids looked at in development: no part of the test")
    parser.add_argument("--strict", action="store_true", help="Tukey's fence for the implants' clean error")
    parser.add_argument("--enough", type=int, default=judges.ENOUGH, help="clean adapters that make a pool")
    parser.add_argument("--rounds", type=int, default=rates.ROUNDS, help="of every bootstrap")
    asked = parser.parse_args(arguments)
    if asked.zoo is None:
        print(json.dumps({"bench": "detection", "skipped": "name a zoo; `trainer zoo build` makes one"}))
        return
    zoo = specimens.load(asked.zoo, asked.seen, strict=asked.strict)
    measured = measuring.measure(zoo, enough=asked.enough, rounds=asked.rounds)
    found = measuring.result(measured) | {"strict": asked.strict}
    if asked.table:
        print(tables.tables(found), file=sys.stderr)
    if asked.fill:
        words = ["detection.py zoo"]
        words += [f"--seen '{asked.seen}'"] * bool(asked.seen) + ["--strict"] * asked.strict
        command = " ".join(words)
        asked.fill.write_text(tables.filled(asked.fill.read_text("utf-8"), found, command), "utf-8")
    if asked.html:
        asked.html.write_text(page.page(measured, found), encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

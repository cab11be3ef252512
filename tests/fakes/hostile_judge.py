"""What the scanner says about the corpus: ``python -m fakes.hostile_judge`` prints one JSON line a file.

It runs in a process of its own, so that its peak memory is the scanner's. The last line is about the process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fakes.adapters import BASES, RANK, TINY_BASE, card
from fakes.hostile_tensors import CASES, CONFIG_NAME, Files, clean, population
from registry.manifest import WEIGHTS_NAME, AdapterCard
from registry.scanning import scan
from registry.scanning.bare import scan_bare
from registry.scanning.container import beside
from registry.scanning.report import Finding


def judged(files: Files, facts: Mapping[str, Any], *, canonical: bool = True) -> dict[str, Any]:
    """Scan a folder: what lies beside the weights, then the weights.

    Args:
        files: name -> bytes.
        facts: rank and dtype that the card declares.
        canonical: whether it is an adapter with a card; else a bare file of any dialect.
    """
    weights, started = files[WEIGHTS_NAME], time.perf_counter()
    findings: list[Finding] = []
    if canonical:
        parsed = AdapterCard.parse(json.dumps(card(**facts)).encode())
        findings += beside(files, WEIGHTS_NAME)
        report = scan(weights, parsed, bases=BASES, population=population())
    else:
        config = files.get(CONFIG_NAME)
        report = scan_bare(weights, base=TINY_BASE.id, bases=BASES, config=config, population=population())
    findings += report.findings
    verdict = "block" if any(found.severity == "block" for found in findings) else report.verdict
    return {
        "verdict": verdict,
        "rules": sorted({found.rule for found in findings}),
        "text": report.text(),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Judge everything."""
    population()
    for case in CASES:
        found = judged(case.files(), {"rank": RANK, **case.card})
        print(json.dumps({"layer": case.layer, "name": case.name, **found}))
    for name, (files, canonical) in clean().items():
        facts = {"rank": RANK, "dtype": name.split()[-1]}
        print(json.dumps({"layer": "clean", "name": name, **judged(files, facts, canonical=canonical)}))
    # Not ru_maxrss: that remembers the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0])
    print(json.dumps({"layer": "process", "name": "peak", "megabytes": peak / 1024}))


if __name__ == "__main__":
    main()

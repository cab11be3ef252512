"""A million hostile headers: no crash, no hang, no byte read that was not asked for, no second reading.

``PYTHONPATH=tests python tests/bench/fuzz_header.py [--cases N] [--engine mutations|atheris] [--seed N]``
prints one JSON line. Each case goes through the reader under both sets of rules (adapters and LoRA files from
elsewhere) and through the container and structure layers. What must hold:

- nothing but a `FormatError` comes out of the reader, and nothing at all out of the layers;
- the reader asks for no byte behind the header, whatever the header says;
- a case takes less than `HANG_S`, or the run ends with an error;
- what the reader accepts, safetensors reads identically: names, dtypes, shapes, bytes and metadata.

The mutations know the format: they start from honest files of several dialects and from the hostile corpus
of ``attacks/test_scanner.py``, and change entries, numbers, the text, the length, and bytes. With ``atheris``
(not a dependency; ``pip install atheris``) libFuzzer steers by the branches of ours that a case reaches: it
starts from the same files and mixes in the same mutations. Our own cases follow from the seed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType, FunctionType
from typing import Any, NoReturn
from unittest.mock import patch

import safetensors

from attacks import test_scanner
from fakes.adapters import BASES, card, container, factors, raw_container
from fakes.dialects import SPELLED, lora_file, spelled
from registry.formats import CANONICAL, FOREIGN, FormatError, Header, Rules, read_header
from registry.manifest import AdapterCard
from registry.scanning import container as container_layer
from registry.scanning import structure

HANG_S = 10.0
"""Seconds after which a case counts as a hang; the slowest honest one takes milliseconds."""

_SEED_BYTES = 1 << 13
_METADATA_EVERY = 64  # safetensors tells metadata of files only, so not every case is written to one
_KINDS = ("attn.to_q", "img_mlp.net.2")

Entries = list[tuple[str, Any]]
CARD = AdapterCard.parse(json.dumps(card()).encode())


class Watched:
    """Content that knows what was asked of it.

    Attributes:
        read: how many bytes were given out.
        furthest: the end of the range that reached farthest.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.read = self.furthest = 0

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, where: slice, /) -> bytes:
        assert where.step in (None, 1), where
        start, stop = where.start or 0, len(self._data) if where.stop is None else where.stop
        assert 0 <= start <= stop, f"a range that runs backwards: {where}"
        piece = self._data[start:stop]
        self.read += len(piece)
        self.furthest = max(self.furthest, start + len(piece))
        return piece


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of the cases."""

    cases: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    compared: int = 0
    slowest_ms: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def line(self, engine: str) -> str:
        """The one line that the bench prints."""
        seconds = time.perf_counter() - self._started
        figures = {
            "bench": "fuzz_header",
            "engine": engine,
            "cases": self.cases,
            "seconds": round(seconds, 1),
            "cases_per_second": round(self.cases / seconds),
            "accepted": self.accepted,
            "compared_with_safetensors": self.compared,
            "refused": dict(self.refused.most_common()),
            "slowest_case_ms": round(self.slowest_ms, 2),
        }
        return json.dumps(figures)


def judge(data: bytes, tally: Tally) -> None:
    """Put one case through the reader and the layers.

    Raises:
        AssertionError, or whatever else it provokes: something that must hold does not.
    """
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    started = time.perf_counter()
    outcomes = [_read(data, rules, tally) for rules in (CANONICAL, FOREIGN)]
    _layers(data)
    tally.slowest_ms = max(tally.slowest_ms, 1000 * (time.perf_counter() - started))
    signal.setitimer(signal.ITIMER_REAL, 0)
    tally.cases += 1
    problem = outcomes[1]
    if problem is None:
        tally.accepted += 1
    else:
        tally.refused[problem] += 1


def _read(data: bytes, rules: Rules, tally: Tally) -> str | None:
    """Read one case under some rules; returns the problem, or None when it was accepted."""
    watched = Watched(data)
    length = int.from_bytes(data[:8], "little")
    try:
        header = read_header(watched, rules)
    except FormatError as error:
        problem: str | None = error.problem
        told = error.message
    else:
        problem, told = None, ""
        _compare(data, header)
        tally.compared += 1
        if tally.compared % _METADATA_EVERY == 0:
            _compare_metadata(data, header)
    assert told.isascii(), told
    assert not told or told.isprintable(), told
    assert watched.furthest <= 8 + min(length, max(0, len(data) - 8)), "read behind the header"
    assert watched.read <= 8 + watched.furthest, "read twice"
    return problem


def _layers(data: bytes) -> None:
    header, found = container_layer.check(data)
    if header is not None:
        _, more = structure.check(header, CARD, BASES[CARD.base.id])
        found = [*found, *more]
    assert header is not None or found, "refused without a finding"
    assert all(
        text.isascii() and text.isprintable() for item in found for text in (item.where, item.evidence)
    )


def _compare(data: bytes, header: Header) -> None:
    """Demand that safetensors reads the same tensors."""
    theirs = dict(safetensors.deserialize(data))
    assert theirs.keys() == header.tensors.keys()
    for key, info in header.tensors.items():
        other = theirs[key]
        assert (info.dtype, list(info.shape)) == (other["dtype"], other["shape"]), key
        assert data[info.start : info.end] == bytes(other["data"]), key


def _compare_metadata(data: bytes, header: Header) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
        file.write(data)
        file.flush()
        with safetensors.safe_open(file.name, framework="np") as theirs:
            assert (theirs.metadata() or {}) == dict(header.metadata)


# --- where cases come from ---------------------------------------------------------------------------------


def seeds() -> list[bytes]:
    """Small honest files, and the hostile ones."""
    values = factors(kinds=_KINDS, rank=1)
    few = {key: value for key, value in values.items() if ".0." in key}
    honest = [container(few), container(few, "F16", {}), container(few, "F32", {"format": "pt"})]
    for dialect in SPELLED:
        tags = {"ss_network_alpha": "1", "note": "\u00fcber"} if dialect == "kohya" else {"format": "pt"}
        alpha = None if dialect == "diffusers" else 1.0
        honest.append(lora_file(spelled(few, dialect, alpha=alpha), tags))
    # The corpus breaks whatever `factors` makes; of a few modules, a case takes a fraction of the time.
    # Archives hold the time; cases do not.
    with patch.object(test_scanner, "factors", lambda: few), patch.object(time, "time", lambda: 1e9):
        hostile = [build() for build, _ in test_scanner.CONTAINER.values()]
    return honest * 4 + [data for data in hostile if len(data) <= _SEED_BYTES]


def parsed(data: bytes) -> tuple[Entries, bytes] | None:
    """The entries and the data of a seed whose header is JSON."""
    length = int.from_bytes(data[:8], "little")
    try:
        table = json.loads(data[8 : 8 + length], object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if not table or not isinstance(table, list) or not isinstance(table[0], tuple):
        return None
    return [(key, dict(value) if _is_entry(value) else value) for key, value in table], data[8 + length :]


def _is_entry(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, tuple) for item in value)


_NUMBERS: Sequence[Any] = (
    *(0, 1, -1, 2, 3, 255, 1 << 16, (1 << 24) + 1, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30),
    *(1.0, 1.5, -0.0, 1e400, float("nan"), True, False, None, "1", [], {}, [1], "\ud800"),
)
_DTYPES: Sequence[Any] = (
    *("F16", "BF16", "F32", "F64", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "F4", "bf16", "", 1, None),
    *(["F16"], "F16\0"),
)
_NAMES: Sequence[str] = (
    *("", "__metadata__", "a" * 256, "a" * 257, "\0", "\x7f", "\u202e", "\ud800", "\u00e9", "e\u0301"),
    *(
        "transformer.x.lora_A.weight",
        "text_encoder.q.lora_A.weight",
        "lora_te_x.alpha",
        "x.alpha",
        "x.alpha ",
    ),
)
_TEXTS: Sequence[str] = (
    *(
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ",",
        ":",
        "\n",
        "\t",
        "\0",
        " ",
        "\ufeff",
        "\u00a0",
        "\\u0000",
        "\\ud800",
    ),
    *(
        "/*x*/",
        "//x\n",
        "NaN",
        "-0",
        "00",
        "1e3",
        "0x1",
        "true",
        "null",
        "'",
        '"a":1,',
        "\\/",
        "1_0",
        "\u0661",
    ),
)


def _change_entry(random: Random, entries: Entries) -> None:
    at = random.randrange(len(entries))
    key, value = entries[at]
    if not isinstance(value, dict) or not value:
        entries[at] = key, random.choice(_NUMBERS)
        return
    value = dict(value)
    name = random.choice([*value, "strides"])
    old = value.get(name)
    if name == "dtype":
        value[name] = random.choice(_DTYPES)
    elif isinstance(old, list) and old and random.random() < 0.8:
        changed, place = [*old], random.randrange(len(old))
        step = random.choice((-1, 1, 2, -2, 8, 64))
        near = old[place] + step if isinstance(old[place], int) else 1
        changed[place] = near if random.random() < 0.5 else random.choice(_NUMBERS)
        value[name] = random.choice((changed, changed, changed[::-1], [*changed, 1], changed[:-1]))
    else:
        value[name] = random.choice((*_NUMBERS, *_NAMES))
    if random.random() < 0.1:
        value.pop(name)
    entries[at] = key, value


def _rename(random: Random, entries: Entries) -> None:
    at = random.randrange(len(entries))
    key, value = entries[at]
    other = random.choice((random.choice(_NAMES), random.choice(entries)[0], key + random.choice(_NAMES)))
    entries[at] = other, value


def _repeat(random: Random, entries: Entries) -> None:
    entries.insert(random.randrange(len(entries) + 1), random.choice(entries))


def _drop(random: Random, entries: Entries) -> None:
    if len(entries) > 1:
        entries.pop(random.randrange(len(entries)))


def _tag(random: Random, entries: Entries) -> None:
    texts = _NAMES if random.random() < 0.7 else (*_NAMES, *_NUMBERS)
    tags: Any = {random.choice(_NAMES): random.choice(texts) for _ in range(random.randrange(4))}
    if random.random() < 0.1:
        tags = random.choice(_NUMBERS)
    if random.random() < 0.7:  # instead of what is there
        entries[:] = [entry for entry in entries if entry[0] != "__metadata__"]
    entries.insert(random.randrange(len(entries) + 1), ("__metadata__", tags))


def _swap(random: Random, entries: Entries) -> None:
    one, two = random.randrange(len(entries)), random.randrange(len(entries))
    entries[one], entries[two] = (entries[one][0], entries[two][1]), (entries[two][0], entries[one][1])


_CHANGES: Sequence[Callable[[Random, Entries], None]] = (
    *(_change_entry, _change_entry, _change_entry, _rename, _rename, _repeat, _drop, _tag, _swap),
)


def _rendered(random: Random, entries: Entries) -> str:
    ascii_only = random.random() < 0.7
    colon, comma = random.choice(((":", ","), (": ", ", "), ("\t:\r\n", " , ")))
    items = [
        json.dumps(key, ensure_ascii=ascii_only)
        + colon
        + json.dumps(value, ensure_ascii=ascii_only, separators=(comma, colon))
        for key, value in entries
    ]
    text = "{" + comma.join(items) + "}"
    for _ in range(random.choice((0, 0, 0, 1, 1, 2))):
        at = random.randrange(len(text) + 1)
        until = at + random.choice((0, 0, 1, 3, 20))
        text = text[:at] + random.choice(_TEXTS) * random.choice((1, 1, 1, 2, 40)) + text[until:]
    return text + " " * random.choice((0, 0, 1, 7, 64))


def _bytes_changed(random: Random, data: bytes) -> bytes:
    for _ in range(random.choice((0, 0, 0, 1, 1, 2, 4))):
        at = random.randrange(min(len(data), 4096) + 1)
        until = at + random.choice((0, 1, 1, 8, 64))
        piece = random.choice((b"", random.randbytes(1), random.randbytes(8), b"\0" * 8, b"\xff" * 8))
        data = data[:at] + piece + data[until:]
    if random.random() < 0.05:
        data = data[: random.randrange(len(data) + 1)]
    return data + random.randbytes(3) if random.random() < 0.03 else data


def mutated(random: Random, files: Sequence[tuple[bytes, tuple[Entries, bytes] | None]]) -> bytes:
    """Return the next case: one of the files, changed where the format has joints."""
    raw, parts = files[random.randrange(len(files))]
    if parts is None or random.random() < 0.15:
        return _bytes_changed(random, raw)
    entries, data = [*parts[0]], parts[1]
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        if entries:
            random.choice(_CHANGES)(random, entries)
    text = _rendered(random, entries).encode("utf-8", "surrogatepass")
    length = None
    if random.random() < 0.05:
        length = random.choice(
            (0, 1, len(text) - 1, len(text) + 1, 1 << 22, (1 << 22) + 1, 1 << 40, (1 << 64) - 1)
        )
        length = max(0, length)
    made = raw_container(text, data, length=length)
    return _bytes_changed(random, made) if random.random() < 0.2 else made


def cases(seed: int) -> Iterator[bytes]:
    """Yield cases without end; the same ones for the same seed."""
    random = Random(seed)
    files = [(data, parsed(data)) for data in seeds()]
    yield from dict.fromkeys(data for data, _ in files)
    while True:
        yield mutated(random, files)


# --- engines -----------------------------------------------------------------------------------------------


def _hung(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"a case took more than {HANG_S} s")


def by_mutations(count: int, seed: int = 0) -> Tally:
    """Judge ``count`` cases of our own mutations."""
    previous = signal.signal(signal.SIGALRM, _hung)
    tally = Tally()
    try:
        for data, _ in zip(cases(seed), range(count), strict=False):
            try:
                judge(data, tally)
            except BaseException:
                _keep(data)
                raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return tally


def by_atheris(count: int, seed: int = 0) -> NoReturn:
    """Judge ``count`` cases that libFuzzer chooses, print the line and end the process."""
    import atheris

    for function in (read_header, container_layer.check, structure.check):
        ours = sys.modules[function.__module__]
        for name, member in vars(ours).items():
            if isinstance(member, FunctionType) and member.__module__ == ours.__name__:
                setattr(ours, name, atheris.instrument_func(member))
    signal.signal(signal.SIGALRM, _hung)
    tally = Tally()
    files = [(data, parsed(data)) for data in seeds()]

    def one(data: bytes) -> None:
        judge(data, tally)
        if tally.cases >= count:
            print(tally.line("atheris"), flush=True)
            os._exit(0)

    def mutate(data: bytes, size: int, number: int) -> bytes:
        random = Random(number)
        choice = random.random()
        if choice < 0.4:
            return atheris.Mutate(data, size)
        parts = parsed(data) if choice < 0.8 else None
        made = mutated(random, [(data, parts)] if parts else files)
        return made[:size]

    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate({data for data, _ in files}):
            (Path(corpus) / f"{number}").write_bytes(data)
        options = [f"-seed={seed + 1}", f"-max_len={_SEED_BYTES}", "-verbosity=0", "-print_final_stats=0"]
        atheris.Setup([sys.argv[0], *options, corpus], one, custom_mutator=mutate)
        atheris.Fuzz()
    raise AssertionError("libFuzzer ended on its own")


def _keep(data: bytes) -> None:
    """Leave a case that broke something where a person finds it."""
    with tempfile.NamedTemporaryFile(prefix="fuzz-header-", suffix=".safetensors", delete=False) as file:
        file.write(data)
    print(f"the case is in {file.name}", file=sys.stderr)


def main() -> None:
    """Fuzz and print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--engine", choices=["mutations", "atheris"], default="mutations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.engine == "atheris":
        by_atheris(options.cases, options.seed)
    print(by_mutations(options.cases, options.seed).line("mutations"))


if __name__ == "__main__":
    main()

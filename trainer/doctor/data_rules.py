"""Rules on pairs and pictures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from serving.pipelines.base import Size
from trainer.data.buckets import nearest
from trainer.data.dataset import Triplet
from trainer.doctor.advice import Advice, Findings, some
from trainer.doctor.hashes import NEAR, alike, dhash
from trainer.doctor.material import Material
from trainer.errors import DataError
from trainer.recipe import Recipe

_RARE = 0.25  # of the mean
_UNEVEN = 4
_STRONG = 0.9
_SMALL = 0.8
_CUT = 0.2


def examine(data: Material, expressions: Sequence[str] | None = None) -> Findings:
    """Yield what the pairs and pictures of a dataset give rise to; ``expressions`` are the recipe's."""
    yield from _splits(data)
    yield from _expressions(data, expressions)
    yield from _intensities(data)
    yield from _balance(data)
    yield from _leaks(data)
    yield from _duplicates(data)
    yield from _differences(data)
    yield from _license(data)


def _splits(data: Material) -> Findings:
    for split in ("train", "validation"):
        if not any(one.split == split for one in data.triplets):
            yield Advice(
                rule="splits", level="error",
                seen=f"there are no pairs for {split}",
                why="a training needs pairs to train on, and pairs of other people to measure the loss on",
                mend=f"give some people to {split}",
            )  # fmt: skip


def _expressions(data: Material, expressions: Sequence[str] | None) -> Findings:
    found = Counter(member.expression for one in data.train for member in (one.a, one.b))
    names = list(expressions or sorted(found))
    missing = [name for name in names if not found[name]]
    if missing:
        yield Advice(
            rule="missing-expressions", level="error",
            seen=f"no training pair shows {some(missing)}",
            why="the adapter's card promises every expression of the recipe; this one is not learnt",
            mend="add pairs with them, or take them out of conditioning.expressions",
        )  # fmt: skip
    mean = sum(found.values()) / max(1, len(names))
    rare = [name for name in names if 0 < found[name] < _RARE * mean]
    if rare:
        shown = some([f"{name} ({found[name]})" for name in rare])
        yield Advice(
            rule="rare-expressions", level="warning",
            seen=f"seldom shown: {shown}; on average an expression has {mean:.0f} pictures",
            why="expressions are drawn equally often, so these few pictures come again and again and are "
            "learnt by heart, with the people in them",
            mend=f"add pictures until each has at least {mean * _RARE:.0f}",
        )  # fmt: skip


def _intensities(data: Material) -> Findings:
    levels: dict[str, set[float]] = defaultdict(set)
    for one in data.train:
        for member in (one.a, one.b):
            levels[member.expression].add(member.intensity)
    weak = sorted(name for name, found in levels.items() if max(found) < _STRONG)
    if weak:
        yield Advice(
            rule="missing-intensities", level="warning",
            seen=f"never shown at {_STRONG} or more: {some(weak)}",
            why="intensity 1 is then outside of what was trained, and serving offers it",
            mend="add pictures of the full expression, or lower conditioning.strength_max",
        )  # fmt: skip
    single = sorted(name for name, found in levels.items() if len(found) == 1 and name not in weak)
    if single:
        yield Advice(
            rule="missing-intensities", level="warning",
            seen=f"shown at one intensity only: {some(single)}",
            why="between neutral and full nothing holds the slider: half of it need not look like half",
            mend="add pictures in between, for example at 0.33 and 0.67",
        )  # fmt: skip
    every = set().union(*levels.values()) if levels else set()
    partly = sorted(name for name, found in levels.items() if 1 < len(found) < len(every) / 2)
    if partly:
        yield Advice(
            rule="missing-intensities", level="warning",
            seen=f"shown at fewer than half of the {len(every)} intensities: {some(partly)}",
            why="the sliders of these expressions are held in fewer places than the others",
            mend="add the missing intensities",
        )  # fmt: skip


def _balance(data: Material) -> Findings:
    pairs = Counter(tuple(sorted((one.a.expression, one.b.expression))) for one in data.train)
    if pairs and max(pairs.values()) > _UNEVEN * min(pairs.values()):
        (most, high), (least, low) = pairs.most_common()[0], pairs.most_common()[-1]
        yield Advice(
            rule="unbalanced-pairs", level="warning",
            seen=f"{' and '.join(most)} are paired {high} times, {' and '.join(least)} {low} times",
            why="the contrast that tells look-alikes apart is learnt from pairs; the rare ones stay confused",
            mend=f"bring the numbers within a factor of {_UNEVEN}",
        )  # fmt: skip
    people = Counter(one.identity for one in data.train)
    if len(people) > 1:
        name, count = people.most_common(1)[0]
        if count > len(data.train) / 2:
            yield Advice(
                rule="unbalanced-people", level="warning",
                seen=f"{name} is in {count} of {len(data.train)} training pairs",
                why="the adapter learns this face together with the expressions",
                mend="add pairs of other people, or leave some of this one out",
            )  # fmt: skip


def _leaks(data: Material) -> Findings:
    split_of: dict[str, dict[str, str]] = defaultdict(dict)
    for one in data.triplets:
        split_of[one.identity.casefold().strip()][one.split] = one.identity
    both = sorted(next(iter(found.values())) for found in split_of.values() if len(found) > 1)
    why = "the validation then measures how well people are remembered, and rises where it should fall"
    if both:
        yield Advice(
            rule="identity-leak", level="error", seen=f"in both splits: {some(both)}", why=why,
            mend="move all pairs of a person to one split",
        )  # fmt: skip
    close = [
        f"{data.names[first]} ({one.identity}) and {data.names[second]} ({other.identity})"
        for first, second, one, other in _alike_sources(data)
        if one.split != other.split and one.identity not in both
    ]
    if close:
        yield Advice(
            rule="identity-leak", level="error",
            seen=f"neutral pictures of both splits that look the same: {some(close, 2)}", why=why,
            mend="if they show one person, give both the same name and split",
        )  # fmt: skip
    twins = [
        f"{one.identity} and {other.identity}"
        for _, _, one, other in _alike_sources(data)
        if one.split == other.split and one.identity != other.identity
    ]
    if twins:
        yield Advice(
            rule="near-duplicates", level="warning",
            seen=f"people whose neutral pictures look the same (dHash, {NEAR} of 256 bits): {some(twins)}",
            why="there are fewer people than names, and the adapter learns their faces",
            mend="give one person one name, or leave the copies out",
        )  # fmt: skip


def _alike_sources(data: Material) -> Iterator[tuple[int, int, Triplet, Triplet]]:
    """Yield rows and one triplet each of neutral pictures that look the same."""
    first: dict[int, Triplet] = {}
    for one in data.triplets:
        first.setdefault(one.source, one)
    rows = sorted(first)
    for i, j, _ in alike(data.hashes[rows], NEAR):
        yield rows[i], rows[j], first[rows[i]], first[rows[j]]


def _duplicates(data: Material) -> Findings:
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(data.digests):
        rows_of[digest].append(row)
    same = [" = ".join(data.names[row] for row in rows) for rows in rows_of.values() if len(rows) > 1]
    if same:
        yield Advice(
            rule="duplicates", level="warning", seen=f"equal pixel by pixel: {some(same, 2)}",
            why="what is there twice counts twice", mend="leave the copies out",
        )  # fmt: skip
    shown: dict[str, set[str]] = defaultdict(set)
    for one in data.triplets:
        for member in (one.a, one.b):
            shown[data.digests[member.image]].add(member.expression)
    torn = [f"{data.names[rows_of[digest][0]]} ({', '.join(sorted(names))})"
            for digest, names in shown.items() if len(names) > 1]  # fmt: skip
    if torn:
        yield Advice(
            rule="contradictions", level="error",
            seen=f"one picture under two expressions: {some(torn, 2)}",
            why="the training is told to tell apart what is the same", mend="decide for one expression",
        )  # fmt: skip


def _differences(data: Material) -> Findings:
    flat = [
        f"{data.names[x]} and {data.names[y]}"
        for one in data.train
        for x, y in combinations(one.rows, 2)
        if min(_level(one, x), _level(one, y)) >= 0.5 and _differing(data, x, y) <= 1
    ]
    if flat:
        yield Advice(
            rule="near-duplicates", level="warning",
            seen=f"members of a pair at 0.5 or more that look the same (dHash): {some(flat, 2)}",
            why="such a pair teaches that the two expressions are one",
            mend="look at them; leave the pair out, or make the pictures again",
        )  # fmt: skip


def _level(one: Triplet, row: int) -> float:
    """Return the intensity of a picture of a triplet; the neutral one counts as full, so it is compared."""
    return next((member.intensity for member in (one.a, one.b) if member.image == row), 1.0)


def _differing(data: Material, x: int, y: int) -> int:
    return int.from_bytes((data.hashes[x] ^ data.hashes[y]).tobytes()).bit_count()


def _license(data: Material) -> Findings:
    if data.license is None:
        return
    from registry.licenses import allows

    if not allows(data.license):
        yield Advice(
            rule="license", level="warning", seen=f"the pictures are under {data.license!r}",
            why="no use of it is known to be permitted, so `registry push` will refuse the adapter",
            mend="correct the SPDX expression, or use pictures under a licence that permits derivatives",
        )  # fmt: skip


def judged(data: Material, recipe: Recipe) -> Findings:
    """Yield the people of the evaluation whom the training sees.

    Drawn people are called "human-90000"; pictures of tasks are known by their looks.
    """
    from trainer.evaluation.suites import of_recipe

    suite = of_recipe(recipe)
    why = "the report then says how well people are remembered, and the gates pass too easily"
    names = {f"{domain}-{number}" for domain in suite.identities for number in suite.people}
    met = sorted({one.identity for one in data.triplets} & names)
    if met:
        yield Advice(
            rule="identity-leak", level="error",
            seen=f"the evaluation judges people of the data: {some(met)}", why=why,
            mend="move evaluation.first_identity behind the people of the data",
        )  # fmt: skip
    if suite.path is None:
        return
    try:
        same = _asked_of(data, Path(suite.path))
    except DataError as error:
        yield Advice(
            rule="judges", level="error", seen=error.message,
            why="the evaluation of what is trained would stop there", mend=error.mend,
        )  # fmt: skip
        return
    if same:
        yield Advice(
            rule="identity-leak", level="error",
            seen=f"pictures of the evaluation's tasks that the data have, too (dHash): {some(same, 2)}",
            why=why, mend="leave these pictures out of the data",
        )  # fmt: skip


def _asked_of(data: Material, folder: Path) -> list[str]:
    """Return the pictures of the data that tasks ask about, whole or as the square that is edited.

    Raises:
        DataError: something in the folder of tasks is not right.
    """
    from trainer.evaluation.tasks import sources

    found = []
    for name, looks in sources(folder):
        for pixels in looks:
            differing = np.bitwise_count(data.hashes ^ dhash(pixels)).sum(axis=1, dtype=np.int64)
            found += [f"{name} is {data.names[row]}" for row in np.flatnonzero(differing <= NEAR)]
    return list(dict.fromkeys(found))


def sizes(data: Material, wanted: Sequence[Sequence[Size]]) -> Findings:
    """Yield what the sizes of the pictures mean for a training at some resolutions (see `data.buckets`)."""
    rows = sorted({row for one in data.train for row in one.rows})
    for buckets in wanted:
        side = round((buckets[0][0] * buckets[0][1]) ** 0.5)
        small, cut = [], []
        for row in rows:
            high, wide = data.sizes[row]
            height, width = nearest(buckets, data.sizes[row])
            scale = min(high / height, wide / width)
            if scale < _SMALL:
                small.append(row)
            if 1 - height * width * scale * scale / (high * wide) > _CUT:
                cut.append(row)
        if small:
            low = min(small, key=lambda row: data.sizes[row][0] * data.sizes[row][1])
            yield Advice(
                rule="upscaling", level="warning",
                seen=f"{len(small)} of {len(rows)} pictures are enlarged for {side} x {side}; "
                f"the smallest, {data.names[low]}, is {data.sizes[low][1]} x {data.sizes[low][0]}",
                why="the adapter learns the blur of enlarged pictures",
                mend="use larger pictures, or a smaller side in data.sizes",
            )  # fmt: skip
        if cut:
            yield Advice(
                rule="cropping", level="warning",
                seen=f"{len(cut)} of {len(rows)} pictures lose more than {_CUT:.0%} to the crop, "
                f"for example {data.names[cut[0]]}",
                why="hair, chins or whole faces may be cut off",
                mend="raise data.max_aspect, or crop the pictures around the face yourself",
            )  # fmt: skip

"""Suites of pictures: a folder with tasks, as FFE-Bench describes them.

FFE-Bench (PixelSmile, arXiv 2603.25728) has 198 tasks: a picture, the box of the face, the expression that is
wanted, and a prompt that does not say how strong. The folder's list is one of

- ``tasks.jsonl`` or ``metadata.jsonl`` (the imagefolder of Hugging Face), a JSON object a line,
- ``tasks.json``, a list of such objects::

    {"image": "human/001.png", "face_box": [120, 80, 390, 410], "expression": "happy",
     "prompt": "make the person look happy", "domain": "human"}

``file_name`` may stand for ``image``. Paths are relative to the folder; a box is left, top, right and bottom
in pixels of the upright picture. Tasks on one picture are one subject with several requests. The prompt is
kept in the plan's digest and is not what edits are made with: an adapter is prompted with the words that it
was trained and signed with, and `Plan.notes` says where a task says it otherwise. Nothing in a folder is
believed: links and paths that leave it are refused, and pictures are decoded under the limits of
`serving.images`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from registry.digest import Digest, digest_bytes
from registry.manifest import ConditioningSpec, Line
from trainer.data.listing import Problems, inside, json_object, lines_of, once
from trainer.errors import DataError, RecipeError
from trainer.evaluation.plan import (
    NEUTRAL,
    Ask,
    Box,
    Plan,
    Portrait,
    Subject,
    asked_pairs,
    basic_blends,
    single,
)
from trainer.portraits.expressions import EXPRESSIONS
from trainer.recipe import explained
from trainer.sections import SuiteSection

NAMES = ("tasks.jsonl", "metadata.jsonl", "tasks.json")
"""How the list of a folder may be called."""
MARGIN = 0.1
"""So much of a face's width and height beside its box still belongs to the face."""

_MAX_TASKS = 20_000
_MAX_LIST_BYTES = 64 << 20
_SYNONYMS: Mapping[str, str] = {
    "anger": "angry", "confusion": "confused", "contemptuous": "contempt", "confidence": "confident",
    "disgusted": "disgust", "fearful": "fear", "afraid": "fear", "scared": "fear", "happiness": "happy",
    "sadness": "sad", "shyness": "shy", "sleepiness": "sleepy", "surprise": "surprised", "anxiety": "anxious",
}  # fmt: skip
Coordinate = Annotated[float, Field(strict=True, ge=0, le=65536, allow_inf_nan=False)]


class Task(BaseModel):
    """One task of the list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Annotated[Line, Field(validation_alias=AliasChoices("image", "file_name"))]
    face_box: tuple[Coordinate, Coordinate, Coordinate, Coordinate]
    expression: Line
    prompt: Line
    domain: Line | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A picture of the folder that tasks ask about.

    Attributes:
        path: of its file.
        content: sha256 of the file.
        box: of the face: left, top, right, bottom in pixels.
        crop: left, top and side of the square that is edited.
    """

    path: Path
    content: Digest
    box: Box
    crop: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPictures:
    """Pictures of a folder, read when their turn comes; see `trainer.evaluation.plan.Pictures`."""

    known: tuple[Known, ...]

    def source(self, index: int) -> Portrait:
        return _opened(self.known[index])

    def truth(self, index: int, ask: Ask) -> None:
        """Nobody knows how these people really look."""

    def outside(self, index: int) -> NDArray[np.bool_]:
        one = self.known[index]
        left, top, side = one.crop
        wide, high = (one.box[2] - one.box[0]) * MARGIN, (one.box[3] - one.box[1]) * MARGIN
        middle = np.arange(side) + 0.5
        across = (middle > one.box[0] - wide - left) & (middle < one.box[2] + wide - left)
        down = (middle > one.box[1] - high - top) & (middle < one.box[3] + high - top)
        return ~(down[:, None] & across[None, :])


def plan(suite: SuiteSection, conditioning: ConditioningSpec) -> Plan:
    """What a suite of pictures asks for.

    Raises:
        RecipeError: the suite names no folder, or no task asks for an expression of the adapter.
        DataError: the list or a picture of the folder is not right; all that is wrong is told.
    """
    if suite.path is None:
        raise RecipeError(
            f"the suite {suite.name} has no folder of tasks",
            f"name the folder that holds {' or '.join(NAMES)} as path",
        )
    listed = _listed(Path(suite.path).expanduser())
    expressions = tuple(
        name for name in EXPRESSIONS
        if name in conditioning.expressions and any(name in one.tasks for one in listed)
    )  # fmt: skip
    if not expressions:
        raise RecipeError(
            f"no task of {suite.path} asks for an expression of this adapter",
            "it has: " + ", ".join(conditioning.expressions),
        )
    subjects, known = [], []
    for one in listed:
        wanted = [name for name in expressions if name in one.tasks]
        if not wanted:
            continue
        place = len(subjects)
        asks = [NEUTRAL, *(single(name, 1.0) for name in wanted)]
        if suite.sweep_people is None or place < suite.sweep_people:
            asks += [single(name, level) for name in wanted for level in suite.intensities]
        if place < suite.blend_people:
            asks += basic_blends(expressions)
        known.append(one.known)
        subjects.append(
            Subject(
                name=one.name,
                group=one.domain,
                seed=suite.seed + place,
                asks=tuple(dict.fromkeys(asks)),
                content=one.known.content,
                face=one.known.box,
                prompts=tuple((name, one.tasks[name]) for name in wanted),
            )
        )
    return Plan(
        suite=suite,
        subjects=tuple(subjects),
        expressions=expressions,
        judged=EXPRESSIONS,
        pairs=asked_pairs(expressions),
        pictures=TaskPictures(known=tuple(known)),
        notes=_notes(subjects, conditioning),
    )


def sources(folder: Path) -> Iterator[tuple[str, tuple[Portrait, Portrait]]]:
    """Yield the name of each picture that tasks ask about, and its pixels: whole, and the square of it.

    Raises:
        DataError: something in the folder is not right.
    """
    for one in _listed(folder.expanduser()):
        yield one.name, (_pixels(one.known), _opened(one.known))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listed:
    """A picture with its tasks: expression -> prompt."""

    name: str
    domain: str
    known: Known
    tasks: Mapping[str, str]


def _listed(folder: Path) -> tuple[_Listed, ...]:
    """Read and check a folder: its list, then every picture once.

    Raises:
        DataError: something is not right.
    """
    path = _list_of(folder)
    problems = Problems(
        path,
        what="task" if path.suffix == ".json" else "line",
        mend="correct these tasks; docs/evaluation.md describes the folder",
    )
    first: dict[str, tuple[int, Task]] = {}  # a picture's name -> where it comes first
    asked: dict[str, dict[str, str]] = {}
    for number, task in _tasks(path, problems):
        name = _expression(task.expression)
        if name is None:
            problems.add(number, _unknown(task.expression))
            continue
        line, other = first.setdefault(task.image, (number, task))
        if (task.face_box, task.domain) != (other.face_box, other.domain):
            problems.add(number, f"{task.image!r} has another face_box or domain on {problems.what} {line}")
        if name in asked.setdefault(task.image, {}):
            problems.add(number, f"{task.image!r} is asked for {name!r} twice")
        asked[task.image][name] = task.prompt
    problems.refuse()
    found, names = list[_Listed](), dict[Digest, str]()
    for image, (number, task) in first.items():
        try:
            known = _known(folder, task)
        except ValueError as error:
            problems.add(number, str(error))
            continue
        if names.setdefault(known.content, image) != image:
            problems.add(number, f"{image!r} is the same file as {names[known.content]!r}")
        found.append(_Listed(name=image, domain=task.domain or "pictures", known=known, tasks=asked[image]))
    problems.refuse()
    return tuple(found)


def _list_of(folder: Path) -> Path:
    """The list of a folder.

    Raises:
        DataError: there is none, or several.
    """
    there = [folder / name for name in NAMES if (folder / name).exists() or (folder / name).is_symlink()]
    if len(there) != 1:
        found = "no list of tasks" if not there else " and ".join(path.name for path in there)
        raise DataError(
            f"{folder} has {found}", f"put one file there: {', '.join(NAMES[:-1])} or {NAMES[-1]}"
        )
    return there[0]


def _tasks(path: Path, problems: Problems) -> Iterator[tuple[int, Task]]:
    """Yield the number of each task in the list, and the task.

    Raises:
        DataError: the list cannot be read.
    """
    for number, value in enumerate(_values(path), 1):
        if number > _MAX_TASKS:
            problems.add(number, f"a folder has at most {_MAX_TASKS} tasks")
            return
        try:
            yield number, Task.model_validate(json_object(value) if isinstance(value, str) else value)
        except ValidationError as error:
            for text in explained(error, Task):
                problems.add(number, text.strip())
        except (ValueError, RecursionError) as error:
            problems.add(number, f"this is no JSON object: {str(error)[:120]}")


def _values(path: Path) -> Sequence[Any]:
    """The lines of a list, or the values of one that is a JSON list."""
    lines = lines_of(path, _MAX_LIST_BYTES)
    if path.suffix == ".jsonl":
        return lines
    try:
        values = json.loads("\n".join(lines), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {str(error)[:120]}", "write a list of tasks") from None
    if not isinstance(values, list):
        raise DataError(f"{path} is no JSON list", "write a list of tasks")
    return values


def _expression(word: str) -> str | None:
    """The expression that a word means; None for none of them."""
    plain = word.strip().casefold()
    plain = _SYNONYMS.get(plain, plain)
    return plain if plain in EXPRESSIONS else None


def _unknown(word: str) -> str:
    if word.strip().casefold() == "neutral":
        return "a task needs an expression; neutral is asked of every picture anyway"
    known = [*EXPRESSIONS, *_SYNONYMS]
    near = difflib.get_close_matches(word.strip().casefold(), known, n=1)
    hint = f"did you mean {_SYNONYMS.get(near[0], near[0])!r}? " if near else ""
    return f"there is no expression {word!r}; {hint}choose from {', '.join(EXPRESSIONS)}"


def _known(folder: Path, task: Task) -> Known:
    """A picture of the folder, read once.

    Raises:
        ValueError: it is not in the folder, cannot be read, or the box does not lie in it.
    """
    path = inside(folder, task.image)
    data, pixels = _read(path)
    height, width = pixels.shape[:2]
    left, top, right, bottom = task.face_box
    if not (left < right <= width and top < bottom <= height):
        raise ValueError(
            f"face_box {list(task.face_box)} is no box in {task.image!r} of {width} x {height} pixels; write "
            "left, top, right, bottom"
        )
    crop = square(width, height, task.face_box)
    return Known(path=path, content=digest_bytes(data), box=task.face_box, crop=crop)


def _read(path: Path) -> tuple[bytes, Portrait]:
    """The bytes and pixels of a picture's file.

    Raises:
        ValueError: it cannot be read, or is over a limit.
    """
    from serving.errors import ImageRefused
    from serving.images import MAX_IMAGE_BYTES, open_picture

    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_IMAGE_BYTES + 1)
        return data, np.asarray(open_picture(data), np.uint8)
    except ImageRefused as error:
        raise ValueError(f"{path.name!r}: {error.message}") from None
    except OSError as error:
        raise ValueError(f"{path.name!r} cannot be read: {error.strerror}") from None


@lru_cache(maxsize=4)
def _opened(known: Known) -> Portrait:
    """The square of a picture that is edited; see `_pixels`."""
    left, top, side = known.crop
    return np.ascontiguousarray(_pixels(known)[top : top + side, left : left + side])


def _pixels(known: Known) -> Portrait:
    """A whole picture.

    Raises:
        DataError: the file is not the one that the plan was made with.
    """
    try:
        data, pixels = _read(known.path)
    except ValueError as error:
        raise DataError(f"{known.path}: {error}", "put the picture back and evaluate again") from None
    if digest_bytes(data) != known.content:
        raise DataError(
            f"{known.path} was changed since the evaluation began",
            "evaluate again, and let nothing write there",
        )
    return pixels


def square(width: int, height: int, box: Box) -> tuple[int, int, int]:
    """The square that is edited of a picture: left, top, side.

    Serving edits the middle square of any picture. Where the face does not lie in it, the square moves just
    as far as it must; a face longer than the square is held in the middle of it.
    """
    side = min(width, height)

    def begin(length: int, low: float, high: float) -> int:
        start = (length - side) // 2
        if high - low > side:
            start = round((low + high - side) / 2)
        else:
            start = int(min(max(start, np.ceil(high) - side), np.floor(low)))
        return min(max(start, 0), length - side)

    return begin(width, box[0], box[2]), begin(height, box[1], box[3]), side


def _notes(subjects: Sequence[Subject], conditioning: ConditioningSpec) -> tuple[str, ...]:
    """What a reader must know about prompts."""
    prompts = [(name, prompt) for subject in subjects for name, prompt in subject.prompts]
    other = [(name, prompt) for name, prompt in prompts if prompt != conditioning.prompt(name)]
    if not other:
        return ()
    name, prompt = other[0]
    return (
        f"Edits were made with the adapter's own words. {len(other)} of {len(prompts)} tasks say it "
        f"otherwise, such as {prompt!r} for {conditioning.prompt(name)!r}.",
    )

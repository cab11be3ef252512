"""The bench: has editors do what a suite asks for, has judges look, and keeps what both said.

What an editor did is kept under the digest of everything that decided it, so that the version that production
runs is measured once and every candidate is compared with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from registry.digest import Digest, digest_bytes
from registry.manifest import BaseModelRef
from trainer.data.blobs import Blobs, encode_png
from trainer.errors import BaseModelError, DataError, EvaluationError
from trainer.evaluation.editing import BLOBS_NAME, Edited, Editor, edit
from trainer.evaluation.judges import Judges
from trainer.evaluation.plan import Ask, Plan, Portrait
from trainer.evaluation.reading import read
from trainer.evaluation.readings import Readings
from trainer.parts import Mapper, here
from trainer.progress import Progress, silent
from trainer.provenance import running_code
from trainer.stage import (
    STAGE_NAME,
    StageResult,
    alone,
    finished,
    new_folder,
    stage_key,
    touch,
    write_result,
)

READINGS_NAME = "readings.parquet"
EDITS_NAME = "edits.json"
_LOOKS = (
    *(
        "bench",
        "catalogue",
        "charts",
        "command",
        "comparison",
        "copies",
        "drawing",
        "evaluating",
        "gates",
        "html",
    ),
    *("measure", "memorisation", "page", "paper", "pictures", "report", "safety", "sheets", "statistics"),
    *("per_edit", "tables", "targets", "terminal"),
)
NOT_MEASURING = (
    *(f"trainer/evaluation/{name}" for name in _LOOKS),
    *("trainer/zoo/", "trainer/reproduction.py", "trainer/doctor/", "trainer/plan/"),
    *("registry/signing/", "registry/storage/", "registry/scanning/", "registry/commands/"),
)
"""Code that no edit and no reading depends on: how figures are compared, judged, shown and signed."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an editor did, and what the judges say of it.

    Attributes:
        editor: who edited.
        readings: of every picture.
        edited: which picture answers which request.
        blobs: the pictures.
    """

    editor: Editor
    readings: Readings
    edited: Edited
    blobs: Blobs

    def picture(self, index: int, ask: Ask) -> Portrait:
        """The answer to a request.

        Raises:
            KeyError: this editor was not asked for that.
            DataError: the picture is gone or damaged.
        """
        return self.blobs.pixels(self.edited[index, ask])


def _unheard(text: str) -> None:
    """Say it to nobody."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where editors are measured: a plan, its judges, a base, and the folder that keeps what was measured.

    Attributes:
        plan: who is asked for what.
        judges: who looks at the edits.
        base: which base model that is.
        base_path: its folder.
        place: keeps what was measured.
        mapper: does the parts of the edits.
        progress: hears how far it is.
        say: is told what people should know: that something was found again, or is waited for.
        least: pictures in a part of the edits.
    """

    plan: Plan
    judges: Judges
    base: BaseModelRef
    base_path: Path
    place: Path
    mapper: Mapper = here
    progress: Progress = silent
    say: Callable[[str], None] = _unheard
    least: int = 128

    @cached_property
    def base_digest(self) -> Digest:
        """See `folder_digest`; a large base is read once."""
        return folder_digest(self.base_path)

    def measure(self, who: Editor) -> Measured:
        """Have an editor do what the plan asks for, and judges look at it; or find what they said before.

        One process at a time measures the same: another one waits, and then finds what that one made. What
        was kept and is no longer whole is measured again.

        Raises:
            EvaluationError: the judge labelled the editor's training data, or the editor lacks an expression.
            DataError, BaseModelError, ServingError, ApiError: as `editing.edit` and the judges.
        """
        self.judges.require_independent(who.card)
        missing = sorted(set(self.plan.expressions) - set(who.card.conditioning.expressions))
        if missing:
            raise EvaluationError(
                f"{who.called} has no expression {', '.join(missing)}, which the other has",
                "compare adapters for the same expressions",
            )
        key = self.key(who)
        out = self.place / key.hex[:32]
        with self.alone(out, who.called):
            kept = self._kept(who, out, key)
            if kept is not None:
                self.say(f"{who.name}: {who.called} was measured before")
                touch(out)
                return kept
            self._do(who, out, key)
            made = self._kept(who, out, key)
        assert made is not None, "what was just written can be read"
        return made

    def key(self, who: Editor) -> Digest:
        """The digest of all that decides what an editor does here and what the judges say."""
        # Without strength an editor is the base, whatever its weights: all candidates share what it did.
        weights = None if who.strength == 0 else str(who.weights)
        return stage_key(
            "measure",
            editor=[weights, who.card.conditioning.model_dump(mode="json"), who.strength, who.scope],
            base=str(self.base_digest),
            plan=str(self.plan.digest()),
            judges=self.judges.digests,
            code=str(running_code(NOT_MEASURING)),
        )

    @property
    def answers(self) -> int:
        """How many true answers there are, 0 where none are known."""
        plan = self.plan
        return 0 if plan.pictures.truth(0, ()) is None else sum(len(one.asks) for one in plan.subjects)

    def pictures(self, who: Editor) -> int:
        """How many edits the plan asks of an editor."""
        return sum(len(who.asks(self.plan, index)) for index in range(len(self.plan.subjects)))

    @property
    def kept_bytes(self) -> int:
        """Size of all edits that are kept, of this suite and others."""
        found = (json.loads(file.read_bytes()) for file in self.place.glob(f"*/{STAGE_NAME}"))
        return sum(one["facts"].get("bytes", 0) for one in found)

    def _kept(self, who: Editor, out: Path, key: Digest) -> Measured | None:
        """What was measured before; None where there is nothing, or not all that was written then."""
        result, blobs = finished(out, key), Blobs(out / BLOBS_NAME)
        if result is None:
            return None
        try:
            if _digest(out) != result.digest:
                raise DataError(f"{out} is not what was written there")
            told = json.loads((out / EDITS_NAME).read_text("utf-8"))
            blobs.require(told["pictures"])
            readings = Readings.read(out / READINGS_NAME, self.plan.judged)
        except (OSError, DataError) as error:
            self.say(f"{who.name}: what was measured before is damaged, so it is measured again ({error})")
            return None
        edited = {
            (index, tuple((str(name), float(x)) for name, x in ask)): Digest(digest)
            for index, ask, digest in told["edits"]
        }
        return Measured(editor=who, readings=readings, edited=edited, blobs=blobs)

    def _do(self, who: Editor, out: Path, key: Digest) -> None:
        pictures = self.pictures(who)
        edits, looks = _halves(self.progress, pictures)
        folder, edited = edit(
            self.plan, who, self.base, self.base_path, out, key, self.mapper, edits, self.least
        )
        try:
            readings = read(self.plan, self.judges, edited, Blobs(folder / BLOBS_NAME), looks)
        except DataError:
            shutil.rmtree(folder, ignore_errors=True)  # the same command again edits again
            raise
        with new_folder(out) as new:
            readings.write(new / READINGS_NAME, self.plan.judged)
            made, kept = Blobs(folder / BLOBS_NAME), Blobs(new / BLOBS_NAME)
            for digest in sorted(set(edited.values())):
                made.link(digest, kept)  # not moved: a kill would leave parts without their pictures
            files = kept.found()
            told = [[index, ask, str(digest)] for (index, ask), digest in edited.items()]
            (new / EDITS_NAME).write_text(json.dumps({"pictures": files, "edits": told}), "utf-8")
            facts = {"editor": who.called, "pictures": len(edited), "bytes": sum(files.values())}
            write_result(
                new, StageResult(stage="measure", folder=out, key=key, digest=_digest(new), facts=facts)
            )
        shutil.rmtree(folder, ignore_errors=True)

    def truth(self) -> Readings | None:
        """What the judges say of the true answers, their own error; None where there are none."""
        plan = self.plan
        if not self.answers:
            return None
        key = stage_key(
            "truth",
            plan=str(plan.digest()),
            judges=self.judges.digests,
            code=str(running_code(NOT_MEASURING)),
        )
        out = self.place / f"truth-{key.hex[:32]}"
        with self.alone(out, "the true answers"):
            result = finished(out, key)
            if result is None or not (out / READINGS_NAME).is_file() or _digest(out) != result.digest:
                self._look_at_truth(out, key)
            touch(out)
            return Readings.read(out / READINGS_NAME, plan.judged)

    def _look_at_truth(self, out: Path, key: Digest) -> None:
        plan = self.plan
        with new_folder(out) as new:
            blobs, edited = Blobs(new / BLOBS_NAME), Edited()
            for index, subject in enumerate(plan.subjects):
                for ask in subject.asks:
                    picture = plan.pictures.truth(index, ask)
                    assert picture is not None, "a suite knows all true answers or none"
                    edited[index, ask] = blobs.add(encode_png(picture), "image/png")
            read(plan, self.judges, edited, blobs, self.progress).write(new / READINGS_NAME, plan.judged)
            shutil.rmtree(new / BLOBS_NAME)
            write_result(new, StageResult(stage="truth", folder=out, key=key, digest=_digest(new)))

    def probes(self, weights: Digest) -> Path:
        """Return the name of an adapter's probes: their parts lie beside it; who asks them has its lock."""
        return self.place / f"probes-{weights.hex[:32]}"

    def alone(self, out: Path, what: str) -> AbstractContextManager[None]:
        """Let one at a time, thread or process, make a folder."""
        busy = f"another process is at {what} on the same suite; waiting for what it finds"
        return alone(out, lambda: self.say(busy))


def _digest(folder: Path) -> Digest:
    """Digest of what was measured: the readings, and which edit answers what where edits were kept."""
    files = [folder / name for name in (READINGS_NAME, EDITS_NAME)]
    found = {file.name: str(digest_bytes(file.read_bytes())) for file in files if file.is_file()}
    return stage_key("measured", files=found)


def _halves(progress: Progress, pictures: int) -> tuple[Progress, Progress]:
    """Two measures of progress, for edits and for judges, that together count each picture twice."""

    def edits(stage: str, done: int, total: int, note: str = "") -> None:
        progress(stage, pictures * done // max(1, total), 2 * pictures, "edits")

    def looks(stage: str, done: int, total: int, note: str = "") -> None:
        progress(stage, pictures + done, 2 * pictures, "judged")

    return edits, looks


def folder_digest(folder: Path) -> Digest:
    """The fingerprint of a base model: of its files' names and contents, the one that adapters' cards name.

    Raises:
        BaseModelError: there is no such folder.
    """
    from serving.bases import fingerprint

    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"{folder} holds no base model: model_index.json is missing", "give a folder in diffusers layout"
        )
    return fingerprint(folder)

"""A request on its way through the scheduler: the rows that wait, those that run, and those that are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serving.backend import Progress
from serving.schema import EditResult, SweepRequest
from serving.tracing import Trace, here

if TYPE_CHECKING:
    from PIL import Image

    from registry.digest import Digest
    from serving.adapters import Stack
    from serving.runs import Portrait, Run
    from serving.tracing import Facts

Event = Progress | list[EditResult] | Exception
"""What a request hears of: progress, and as the last thing its results or an error."""

Listener = Callable[[Event], None]
"""Called from the scheduler's threads; has to return at once."""


@dataclass(kw_only=True, slots=True, eq=False)
class Part:
    """Rows of a request that run together.

    Attributes:
        first: index of the first of them in the request.
        began: when their first step was due, in seconds of the scheduler's clock.
        turn: number of the last batch that it was in.
    """

    run: Run
    first: int
    began: float
    turn: int = 0


@dataclass(kw_only=True, slots=True, eq=False)
class Ticket:
    """A request that was taken.

    Attributes:
        steps: of each row; as expected, until it begins.
        key: who asks.
        previews: how many of the steps come with pictures.
        listener: hears what becomes of it.
        taken: when it was taken, in seconds of the scheduler's clock.
        size: bytes of the picture as it came.
        trace: where the one who asked is in a trace.
        ours: nobody asked for it but ourselves.
        stack: the adapters; empty until they are decided.
        begun: rows that were given to the engine.
        counted: rows that count as waiting.
        counted_steps: that each of them counts with.
        parts: rows that run.
        results: of the rows that are done, None of the others.
        opening: whether a thread was told to open its picture.
        portrait: its picture, once it is open; then it may begin.
        stopped: why it has to end, for the device's thread to see.
        over: whether its last event was sent.
        reported: steps that its listener knows of.
    """

    request: SweepRequest
    steps: int
    key: str
    previews: int
    listener: Listener
    taken: float
    size: int
    trace: Trace = field(default_factory=here)
    ours: bool = False
    stack: Stack = ()
    begun: int = 0
    counted: int = 0
    counted_steps: int = 0
    parts: list[Part] = field(default_factory=list)
    results: list[EditResult | None] = field(default_factory=list)
    opening: bool = False
    portrait: Portrait | None = None
    stopped: Exception | None = None
    over: bool = False
    reported: int = 0

    def __post_init__(self) -> None:
        self.results = [None] * self.rows
        self.counted, self.counted_steps = self.rows, self.steps

    @property
    def rows(self) -> int:
        """Pictures that were asked for."""
        return len(self.request.rows)

    @property
    def needs(self) -> set[Digest]:
        """The adapters that have to be on the device for it."""
        return {adapter.digest for adapter, _ in self.stack}

    @property
    def waiting(self) -> int:
        """Rows that have not begun."""
        return self.rows - self.begun

    def cut(self, rows: int) -> SweepRequest:
        """Return the request for the next rows; they count as begun from now on."""
        part = slice(self.begun, self.begun + rows)
        self.begun += rows
        if rows == self.rows:
            return self.request
        changed: dict[str, object] = {"rows": self.request.rows[part]}
        if self.request.seeds is not None:
            changed["seeds"] = self.request.seeds[part]
        return self.request.model_copy(update=changed)

    def put_back(self, rows: int) -> None:
        """Let the rows that were cut last wait again."""
        self.begun -= rows

    def progress(self) -> int:
        """Return the steps that are done: of all rows together, where they did not begin together."""
        done = sum(self.steps for result in self.results if result is not None)
        done += sum(part.run.step * part.run.rows for part in self.parts)
        return done // self.rows

    def trace_steps(self, part: Part) -> None:
        """Tell the trace of the steps of a part, which are done now."""
        manifest = self.stack[0][0].manifest if self.stack else None
        facts: Facts = {"rows": part.run.rows, "steps": part.run.steps}
        if manifest is not None:
            facts |= {"adapter": manifest.name, "version": manifest.version}
            facts["digest"] = self.stack[0][0].digest
        self.trace.record("steps", part.began, time.monotonic(), **facts)

    def news(self, preview: Callable[[Run], Sequence[Image.Image]]) -> Progress | None:
        """Return the progress since it was reported last, or None where there is none.

        Args:
            preview: shows what a run looks like so far; asked at evenly spread steps only.
        """
        step = self.progress()
        if step <= self.reported:
            return None
        wanted = {round(self.steps * (n + 1) / (self.previews + 1)) for n in range(self.previews)}
        due = any(self.reported < one <= step < self.steps for one in wanted)
        self.reported = step
        return Progress(step=step, steps=self.steps, pictures=self._pictures(preview) if due else None)

    def _pictures(self, preview: Callable[[Run], Sequence[Image.Image]]) -> list[Image.Image]:
        """Return what each row looks like so far; one that has not begun looks like what it starts from."""
        from PIL import ImageOps

        shown: list[Image.Image | None] = [None if one is None else one.image for one in self.results]
        for part in self.parts:
            shown[part.first : part.first + part.run.rows] = preview(part.run)
        size = next(one.size for one in shown if one is not None)
        if None in shown:
            assert self.portrait is not None, "a request that has begun has an open picture"
            waits = ImageOps.fit(self.portrait.picture, size)
            return [waits if one is None else one for one in shown]
        return [one for one in shown if one is not None]


@dataclass(kw_only=True, slots=True)
class Batch:
    """The rows of the next step, while they are gathered.

    Attributes:
        turn: its number.
        deadline: until when requests begin with it, on the monotonic clock: those that run wait for the
            encodings of one, and of more for as long as a step takes.
        held: rows that are under way, in this batch or not.
        began: how often rows began with it.
        parts: what is in it.
    """

    turn: int
    deadline: float
    held: int
    began: int = 0
    parts: list[tuple[Ticket, Part]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return sum(part.run.rows for _, part in self.parts)

    def fitting(self, ticket: Ticket, room: int) -> Part | None:
        """Return the oldest part of a request that is not in the batch yet, has its shape and fits."""
        return next(
            (part for part in ticket.parts if part.turn != self.turn and self._fits(part, room)), None
        )

    def full(self, ticket: Ticket) -> bool:
        """Whether no new rows of a request may begin with this batch."""
        if ticket.parts:  # its encodings are there already
            return not self._fits(ticket.parts[-1], ticket.parts[-1].run.rows)
        return self.began > 0 and time.monotonic() > self.deadline

    def add(self, ticket: Ticket, part: Part) -> None:
        """Put a part into the batch."""
        part.turn = self.turn
        self.parts.append((ticket, part))

    def _fits(self, part: Part, room: int) -> bool:
        if not self.parts:  # the first may be larger than batches have become since it began
            return True
        return part.run.rows <= room and part.run.shape == self.parts[0][1].run.shape

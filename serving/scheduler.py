"""The scheduler: requests of many callers on one device, a denoising step at a time.

Before each step it decides anew which rows take part: those of the keys that got least so far, up to the rows
of one batch. So a request joins those that run at the next step, leaves when it is done or given up, and one
with a single picture does not wait for another's sweep to end. Rows that are left out of a step wait where
they are; nothing of them is lost.

Only the device's thread runs the model. Pictures are opened and adapters fetched by other threads, so that
neither holds up a batch. What fails fails alone: when a batch breaks, its runs take the step one by one.

The file is long because a request is taken, stepped and ended under one lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from registry.admission import VerifiedAdapter
from registry.errors import Explained
from serving.blocked import Blocked
from serving.errors import Cancelled, Draining, Overloaded, ServingError
from serving.pulse import Pulse
from serving.schema import DEFAULT_STEPS, EditResult, SweepRequest
from serving.stepping import Stepped, step
from serving.tickets import Batch, Event, Listener, Part, Ticket
from serving.trial import trial
from serving.turns import Turns
from serving.waiting import WaitingRoom

if TYPE_CHECKING:
    from serving.adapters import Stack
    from serving.backend import Device
    from serving.engine import EditEngine
    from serving.metrics import Metrics

HELD = 4
"""Batches' worth of rows that may be under way while others take the step."""
PARTS = 4
"""A sweep is cut into parts of at most this fraction of a batch, so that others find room beside it."""
MAX_OPEN = 32
"""Pictures that are opened ahead of their turn."""
OURS = "ours"
"""The key of edits that try whether the device works."""

_log = logging.getLogger(__name__)


class Scheduler:
    """Runs requests on an engine; every method may be called from any thread.

    Args:
        engine: the device.
        max_rows: rows of a batch.
        max_waiting: rows that may wait; see `WaitingRoom`.
        check: raises what is wrong with an adapter that may not be used any more; asked before each step, for
            requests that wait and that run.
        metrics: where it counts.
    """

    def __init__(
        self,
        engine: EditEngine,
        *,
        max_rows: int,
        max_waiting: int,
        check: Callable[[VerifiedAdapter], None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._engine = engine
        self._rows = max_rows
        self._check = check
        self._metrics = metrics
        self._turns: Turns[Ticket] = Turns()
        self._tickets: dict[Ticket, None] = {}
        self._room = WaitingRoom(max_waiting)
        self._open = 0
        self._changed = threading.Condition()
        self._news = False
        self._draining = False
        self._ended = False
        self._turn = 0
        self._rate: float | None = None
        self._step_seconds = 0.0
        self._pulse = Pulse()
        self._blocked = Blocked(engine.slots)
        self._openers = ThreadPoolExecutor(2, thread_name_prefix="pictures")
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)

    def start(self) -> None:
        """Begin to work on what was and will be taken."""
        self._thread.start()

    def take(
        self,
        request: SweepRequest,
        *,
        key: str,
        listener: Listener,
        previews: int = 0,
        ours: bool = False,
    ) -> Ticket:
        """Give a request a place in the queue; nothing of its picture has been read when it is refused.

        It waits there until `enter` says which adapters answer it, or `cancel` gives the place up.

        Args:
            key: who asks.
            listener: hears progress, and as the last thing the results or an error.
            previews: how many of the steps come with pictures, spread evenly.
            ours: nobody asked, it is an edit that makes ready: taken however many wait, and not counted.

        Raises:
            Draining: the server is going down.
            Overloaded: the queue is full.
        """
        image = request.image
        size = len(image) if isinstance(image, bytes) else 3 * image.width * image.height
        with self._changed:
            if self._draining:
                self._reject("draining")
                raise Draining("the server is going down", "send the request again; another server takes it")
            if not ours and not self._room.has_room(key, len(request.rows), size):
                self._reject("overloaded")
                seconds = self._room.seconds(len(request.rows), self._rate)
                raise Overloaded(
                    f"{self._room.rows} pictures wait; this server lets {self._room.places} wait",
                    f"try again in {seconds:.0f} s",
                    seconds,
                )
            ticket = Ticket(
                request=request,
                steps=request.steps or DEFAULT_STEPS,
                key=key,
                previews=previews,
                ours=ours,
                listener=listener,
                taken=time.monotonic(),
                size=size,
            )
            self._tickets[ticket] = None
            self._room.enter(key, ticket.rows, ticket.steps, size)
            self._gauge()
        return ticket

    def enter(self, ticket: Ticket, stack: Stack, *, weight: float = 1.0) -> None:
        """Let a request that was taken run, with these adapters.

        Args:
            weight: what one step of one of its rows costs, beside others.
        """
        with self._changed:
            if ticket.over:
                return
            ticket.stack = stack
            self._turns.add(ticket.key, ticket, weight)
            if self._open < self._ahead:
                self._open_picture(ticket)
            self._notify()

    def cancel(self, ticket: Ticket) -> None:
        """Give a request up: at once where it waits, before the next step where it runs."""
        self._stop(ticket, Cancelled("the request was given up", "send it again"))

    def refuse(self) -> None:
        """Take no more requests."""
        with self._changed:
            self._draining = True

    def drain(self, grace: float) -> None:
        """Take no more requests, give those that were taken some time, and stop the device's thread.

        Args:
            grace: seconds; what is not done then hears `Draining`: another server can do it.
        """
        self.refuse()
        with self._changed:
            self._changed.wait_for(lambda: not self._tickets, grace)
            left = list(self._tickets)
        for ticket in left:
            # Not `Cancelled`: nobody gave it up, and whoever holds the job or the request tries elsewhere.
            self._stop(ticket, Draining("the server stopped before the edit was done", "send it again"))
        with self._changed:
            self._ended = True
            self._notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._openers.shutdown()

    @property
    def draining(self) -> bool:
        """Whether it takes no more requests."""
        return self._draining

    @property
    def problem(self) -> str | None:
        """Why the device does not work; None where it does."""
        return self._pulse.problem

    @property
    def device(self) -> Device:
        """How the device is."""
        return self._pulse.device

    def load(self) -> tuple[int, int]:
        """Return how many requests wait and how many run."""
        with self._changed:
            return self._load()

    def retry_after(self) -> float | None:
        """Return the seconds until one more picture has room, or None where it has."""
        with self._changed:
            return None if self._room.has_room("", 1, 0) else self._room.seconds(1, self._rate)

    # -- the queue --

    @property
    def _ahead(self) -> int:
        return min(self._rows, MAX_OPEN)

    def _stop(self, ticket: Ticket, reason: Exception) -> None:
        with self._changed:
            if ticket.over or ticket.stopped is not None:
                return
            ticket.stopped = reason
            begun = ticket.begun > 0
            self._notify()
        if not begun:
            self._end(ticket, reason)

    def _end(self, ticket: Ticket, event: list[EditResult] | Exception) -> None:
        """Send the last event of a request and forget it; the device's thread ends those that have begun."""
        with self._changed:
            if ticket.over:
                return
            ticket.over = True
            del self._tickets[ticket]
            self._blocked.forget(ticket)
            if ticket.counted:
                self._room.leave(ticket.key, ticket.counted, ticket.counted_steps, ticket.size)
            if ticket.opening and ticket.counted == ticket.rows:
                self._open -= 1
            self._turns.remove(ticket.key, ticket)
            # With the lock: whoever sees that it does not run any more sees it counted, too.
            if self._metrics is not None and isinstance(event, Cancelled) and ticket.stack:
                self._metrics.cancelled.inc()
            self._gauge()
            self._notify()
        while ticket.parts:
            try:
                self._engine.drop(ticket.parts.pop().run)
            except Exception:  # whoever asked hears of the end in any case
                _log.exception("a run could not be dropped")
            self._freed()
        self._tell(ticket, event)

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.listener(event)
        except Exception as error:  # whoever asked is gone
            _log.debug("nobody listens to a request any more", exc_info=error)
            if not ticket.over:
                self.cancel(ticket)

    def _freed(self) -> None:
        """Have those tried again that wait for the room of adapters."""
        with self._changed:
            self._blocked.freed()
            self._notify()

    def _notify(self) -> None:
        self._news = True
        self._changed.notify_all()

    def _load(self) -> tuple[int, int]:
        running = sum(1 for ticket in self._tickets if ticket.counted < ticket.rows)
        return len(self._tickets) - running, running

    def _gauge(self) -> None:
        if self._metrics is not None:
            waiting, running = self._load()
            self._metrics.num_requests_waiting.set(waiting)
            self._metrics.num_requests_running.set(running)

    def _reject(self, reason: str) -> None:
        if self._metrics is not None:
            self._metrics.rejected.labels(reason=reason).inc()

    # -- pictures --

    def _open_picture(self, ticket: Ticket) -> None:
        """Have another thread open a request's picture, once; called with the lock."""
        if not ticket.opening:
            ticket.opening = True
            self._open += 1
            self._openers.submit(self._opened, ticket)

    def _opened(self, ticket: Ticket) -> None:
        if ticket.over:
            return
        try:
            portrait = self._engine.prepare(ticket.request)
            self._fetch(ticket)
        except Exception as error:
            self._end(ticket, _explained(error, "the request could not be prepared"))
            return
        with self._changed:
            ticket.portrait = portrait
            self._notify()

    def _fetch(self, ticket: Ticket) -> None:
        """Bring the adapters of a request onto the device, beside the steps of others."""
        resident = {adapter.digest for adapter in self._engine.slots.residents}
        for adapter, _ in ticket.stack:
            if adapter.digest not in resident and not ticket.over:
                # Where there is no room yet, it is tried again when the request begins.
                with suppress(Overloaded):
                    self._engine.prefetch(adapter)

    # -- the device's thread --

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._ended, self._pulse.patience)
                if self._ended and not self._tickets:
                    return
                self._news = False
            try:
                while self._take_turn():
                    pass
                if self._pulse.patience == 0:
                    self._try()
            except Exception as error:  # nothing may stop this thread, and nobody may wait for ever
                self._give_up(_explained(error, "the scheduler failed"))

    def _try(self) -> None:
        """Make a small edit of our own where nothing runs: only a step tells whether the device works."""
        self._pulse.tried()
        with self._changed:
            if self._draining or any(ticket.ours for ticket in self._tickets):
                return
        residents = reversed(self._engine.slots.residents)
        # One that has worked tells about the device, and not about itself.
        for adapter in sorted(residents, key=lambda one: not self._pulse.worked(one.digest)):
            request, stack = trial(adapter)
            with suppress(Explained):  # it may not be used any more; the next one tells as well
                if self._check is not None:
                    self._check(adapter)
                self._engine.check(request, stack)
                self.enter(self.take(request, key=OURS, listener=lambda event: None, ours=True), stack)
                return

    def _give_up(self, error: Exception) -> None:
        """End what is under way after a mistake of our own; those that wait go on."""
        with self._changed:
            running = [ticket for ticket in self._tickets if ticket.begun]
            self._notify()
        for ticket in running:
            self._end(ticket, error)

    def _take_turn(self) -> bool:
        """Take one step with the rows whose turn it is; returns False where there is nothing to do."""
        began = time.monotonic()
        self._tidy()
        batch = self._fill()
        if not batch.parts:
            return False
        self._step(batch)
        self._tidy()
        self._deliver(batch)
        rate = batch.rows / max(time.monotonic() - began, 1e-6)
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        return True

    def _tidy(self) -> None:
        """End the requests that were given up, and those whose adapters were revoked."""
        with self._changed:
            tickets = list(self._tickets)
        for ticket in tickets:
            if ticket.stopped is not None:
                self._end(ticket, ticket.stopped)
            elif self._check is not None:
                try:
                    for adapter, _ in ticket.stack:
                        self._check(adapter)
                except Exception as error:
                    self._end(ticket, _explained(error, "the adapter may not be used any more"))

    def _fill(self) -> Batch:
        """Return the rows of the next step; those that begin with it are encoded here."""
        with self._changed:
            self._turn += 1
            held = sum(part.run.rows for ticket in self._tickets for part in ticket.parts)
        batch = Batch(turn=self._turn, deadline=time.monotonic() + self._step_seconds, held=held)
        self._turns.fill(self._rows, lambda ticket, room: self._offer(batch, ticket, room))
        with self._changed:
            for ticket in self._turns.upcoming():
                if self._open >= self._ahead:
                    break
                if not ticket.over and not ticket.begun:
                    self._open_picture(ticket)
        return batch

    def _offer(self, batch: Batch, ticket: Ticket, room: int) -> int:
        """Let a request take room in a batch, with rows that run or with new ones; returns the rows."""
        if ticket.over:
            return 0
        part = batch.fitting(ticket, room)
        if part is None:
            # A picture that has to be exact is made alone.
            most = 1 if ticket.request.exact else max(1, self._rows // PARTS)
            rows = min(most, ticket.waiting, room)
            if not rows or batch.full(ticket) or batch.held + rows > HELD * self._rows:
                return 0
            if not self._begin(ticket, rows):
                return 0
            batch.held += rows
            batch.began += 1
            part = batch.fitting(ticket, room)
            if part is None:  # of another shape: its turn comes
                return 0
        batch.add(ticket, part)
        return min(part.run.rows, room)

    def _begin(self, ticket: Ticket, rows: int) -> bool:
        """Encode the next rows of a request; returns whether they are under way."""
        with self._changed:
            if ticket.over or ticket.stopped is not None:
                return False
            if not self._blocked.may_begin(ticket, self._turn, self._tickets):
                return False
            if ticket.portrait is None:
                self._open_picture(ticket)
                return False
            first = ticket.begun
            request = ticket.cut(rows)
        began = time.monotonic()
        try:
            run = self._engine.begin(request, ticket.stack, ticket.portrait)
        except Exception as error:
            with self._changed:
                waits = isinstance(error, Overloaded) and not ticket.over
                waits = waits and self._blocked.wait(ticket, self._turn, self._tickets)
            if waits:  # its adapters have room when others let theirs go
                ticket.put_back(rows)
            else:
                if not isinstance(error, Explained):  # a device that is gone fails here already
                    self._beat([ticket], Stepped(errors=[error]))
                self._end(ticket, _explained(error, "the edit could not begin"))
            return False
        encoded = time.monotonic()
        if first == 0:
            ticket.trace.record("queue", ticket.taken, began)
        ticket.trace.record("encode", began, encoded, rows=rows)
        with self._changed:
            self._blocked.forget(ticket)
            ticket.steps = run.steps
            ticket.parts.append(Part(run=run, first=first, began=encoded))
            ticket.counted -= rows
            self._room.leave(ticket.key, rows, ticket.counted_steps, 0 if ticket.counted else ticket.size)
            if first == 0:
                self._open -= 1
                if self._metrics is not None and not ticket.ours:
                    self._metrics.request_queue_seconds.observe(began - ticket.taken)
            self._gauge()
        return True

    def _step(self, batch: Batch) -> None:
        began = time.monotonic()
        stepped = step(self._engine.advance, [part.run for _, part in batch.parts])
        # Before anybody hears of an error: whoever does may ask what is wrong with the device.
        self._beat([ticket for ticket, _ in batch.parts], stepped)
        for (ticket, _), error in zip(batch.parts, stepped.errors, strict=True):
            if error is not None:
                self._end(ticket, _explained(error, "the edit failed"))
        if stepped.too_large:
            self._rows = max(1, batch.rows // 2)
            _log.warning("no memory for %d rows at once; from now on it is %d", batch.rows, self._rows)
        self._step_seconds = time.monotonic() - began
        if self._metrics is not None:
            self._metrics.step_seconds.observe(self._step_seconds)
            self._metrics.batch_rows.observe(batch.rows)

    def _beat(self, tickets: Sequence[Ticket], stepped: Stepped) -> None:
        """Take note of what the device did for some requests."""
        adapters = [[one.digest for one, strength in ticket.stack if strength] for ticket in tickets]
        self._pulse.beat(stepped, adapters, ours=all(ticket.ours for ticket in tickets))
        if self._metrics is not None:
            self._metrics.device_broken.set(self._pulse.device != "works")

    def _deliver(self, batch: Batch) -> None:
        """Decode what is done, and tell each request how far it is."""
        for ticket, part in batch.parts:
            if part.run.done and not ticket.over:
                ticket.parts.remove(part)  # finishing lets its adapters go, whatever comes of it
                ticket.trace_steps(part)
                try:
                    with ticket.trace.span("decode", rows=part.run.rows):
                        results = self._engine.finish(part.run)
                except Exception as error:
                    self._end(ticket, _explained(error, "the picture could not be decoded"))
                else:
                    ticket.results[part.first : part.first + len(results)] = results
                self._freed()
        for ticket in dict.fromkeys(ticket for ticket, _ in batch.parts):
            if not ticket.over:
                self._report(ticket)

    def _report(self, ticket: Ticket) -> None:
        try:
            news = ticket.news(self._engine.preview)
        except Exception as error:
            self._end(ticket, _explained(error, "the preview could not be decoded"))
            return
        if news is not None:
            self._tell(ticket, news)
        results = [one for one in ticket.results if one is not None]
        if len(results) == ticket.rows:
            self._count(ticket)
            self._end(ticket, results)

    def _count(self, ticket: Ticket) -> None:
        manifest = ticket.stack[0][0].manifest if ticket.stack else None
        if self._metrics is not None and manifest is not None and not ticket.ours:
            seconds = time.monotonic() - ticket.taken
            trace_id = ticket.trace.trace_id
            self._metrics.edited(manifest.name, manifest.version, seconds, trace_id=trace_id)


def _explained(error: Exception, what: str) -> Exception:
    """Return an error for the one who asked: what we explain ourselves stays as it is, the rest is logged."""
    if isinstance(error, Explained):
        return error
    _log.error("%s", what, exc_info=error)
    return ServingError(f"{what} ({type(error).__name__})", "try again, or ask for fewer or smaller pictures")

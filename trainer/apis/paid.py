"""The one door to paid APIs."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainer.apis import retry
from trainer.apis.answers import Answers
from trainer.apis.budget import Budget, Reservation
from trainer.apis.keys import hidden, repeats
from trainer.apis.ledger import Line, Total
from trainer.apis.parallel import pause
from trainer.apis.rate import Gate, Paces, before_request
from trainer.apis.request import Answer, Billed, Failed, Reply, Request
from trainer.apis.transport import unreadable
from trainer.errors import ApiError, ApiUnavailable, TrainerError
from trainer.sections import ApiSection

if TYPE_CHECKING:
    from trainer.recipe import Recipe

Send = Callable[[], Reply]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """Time and chance.

    Attributes:
        now: seconds since the epoch.
        ticks: seconds of a clock that does not jump.
        sleep: waits that many seconds, or until nothing new is to begin.
        chance: draws uniformly from [0, 1).
        paces: towards the servers, by ``ticks``.
    """

    now: Callable[[], float] = time.time
    ticks: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = pause
    chance: Callable[[], float] = random.random
    paces: Paces = field(default_factory=Paces)


_GATE = Gate()
_CLOCK = Clock()  # one for the process, because all its requests share the pace


def run_of(recipe: Recipe) -> str:
    """Return the name of a recipe's budget; a raised limit is another limit of the same budget."""
    return f"{recipe.name}-{recipe.digest.hex[:12]}"


class Paid:
    """Asks paid APIs: an answer that is there is not paid again, and nothing exceeds the budget.

    Args:
        settings: limits and prices.
        folder: of answers and ledger; all runs of a machine share ``<data folder>/apis``.
        run: name of the budget; see `run_of`.
        clock: time and chance.
    """

    def __init__(
        self, settings: ApiSection, folder: Path, *, run: str = "default", clock: Clock | None = None
    ) -> None:
        self.settings, self.folder, self.run = settings, folder, run
        self._clock = clock or _CLOCK
        self._answers = Answers(folder)
        self._budget = Budget(settings, folder, run, self._clock.now)

    def kept(self, request: Request) -> Answer | None:
        """Return the answer to a request if it is there; nothing is sent."""
        digest = request.digest
        reply = self._answers.get(digest)
        return None if reply is None else Answer(request=digest, reply=reply, reused=True)

    def has(self, request: Request) -> bool:
        """Return whether there is an answer to a request; it is not read, and may be damaged."""
        return self._answers.path(request.digest).is_file()

    def spent(self) -> Total:
        """Return what the run has taken until now, in all processes."""
        return self._budget.spent()

    def lines(self) -> list[Line]:
        """Return the attempts of the run until now, in all processes."""
        return self._budget.lines()

    def ask(self, request: Request, send: Send) -> Answer:
        """Return the answer to a request, asking for it if need be; safe in any number of threads.

        Args:
            request: what is asked; its digest is the address of the answer.
            send: sends it once, without repetitions of its own. It raises `Failed` when no answer came, and a
                `TrainerError` when it could not even send.

        Raises:
            BudgetSpent: the next attempt would exceed the budget, or nobody knows its price.
            ApiError: the API does not take the request.
            ApiUnavailable: the API did not answer.
        """
        digest = request.digest
        if answer := self.kept(request):
            return answer
        with self._answers.only(digest):
            return self.kept(request) or self._asked(request, send)

    def _asked(self, request: Request, send: Send) -> Answer:
        readings, usd = 0, list[float | None]()
        for attempt in itertools.count(1):
            outcome, line = self._attempt(request, attempt, send)
            usd.append(line.usd)
            if isinstance(outcome, Failed):
                readings += outcome.delivered
                if not outcome.delivered or readings < retry.READINGS:
                    self._wait(request, attempt, attempt - readings, outcome)
                    continue
                outcome = Reply(refused=f"malformed: {hidden(request.provider, outcome.message)}")
                self._answers.put(request, outcome)
            known = [value for value in usd if value is not None]
            return Answer(
                request=request.digest,
                reply=outcome,
                reused=False,
                attempts=attempt,
                usd=sum(known) if len(known) == len(usd) else None,
            )
        raise AssertionError

    def _attempt(self, request: Request, attempt: int, send: Send) -> tuple[Reply | Failed, Line]:
        """Send a request once; return what came and its line in the ledger."""
        if hook := before_request.get():
            hook(request.provider)
        with _GATE.passed(self.settings.parallel):
            return self._admitted(request, attempt, send)

    def _admitted(self, request: Request, attempt: int, send: Send) -> tuple[Reply | Failed, Line]:
        pace = self._clock.paces.of(request.provider, request.endpoint)
        if delay := pace.delay(self._clock.ticks(), self.settings.per_minute):
            self._clock.sleep(delay)
        pause(0)  # the last moment at which nothing is paid
        reservation = self._budget.reserve(request, attempt)
        begun = self._clock.ticks()
        line = reservation.line
        try:
            outcome = self._sent(request, send)
            line = self._line(request, reservation, outcome)
        except TrainerError:
            line = replace(line, status="not sent", billed="no", usd=0.0)
            raise
        finally:
            # What is neither a reply nor a failure (an interrupt, a full disk) leaves the line a lost one.
            self._budget.settle(reservation, replace(line, seconds=self._clock.ticks() - begun))
        return outcome, line

    def _sent(self, request: Request, send: Send) -> Reply | Failed:
        try:
            reply = send()
        except Failed as failed:
            return failed
        if repeats(request.provider, reply.body):
            counted = reply.usage if reply.counted else None
            return unreadable("the answer repeats the key", counted, delivered=True)
        if reply.refused is not None:
            reply = replace(reply, refused=hidden(request.provider, reply.refused))
        # Before anything else: from here on it is paid and must not be lost.
        self._answers.put(request, reply)
        return reply

    def _line(self, request: Request, reservation: Reservation, outcome: Reply | Failed) -> Line:
        line = reservation.line
        billed: Billed
        if isinstance(outcome, Reply):
            status, usage = "refused" if outcome.refused else "ok", outcome.usage
            billed = "yes" if outcome.counted else "unsure"
        else:
            status, billed, usage = outcome.status, outcome.billed, outcome.usage
        usd = {"no": 0.0, "unsure": line.usd}.get(billed, self._budget.prices.usd(request, usage))
        return replace(line, status=status, billed=billed, usage=usage, usd=usd)

    def _wait(self, request: Request, attempt: int, unanswered: int, failed: Failed) -> None:
        """Wait until a request may be sent again, or raise if it may not."""
        if not failed.repeat:
            raise _refusal(request, failed)
        if unanswered >= retry.TRIES or (failed.after or 0.0) > retry.LONGEST_WAIT:
            _give_up(request, attempt, failed)
        self._clock.sleep(retry.wait(attempt, failed.after, self._clock.chance()))


def _refusal(request: Request, failed: Failed) -> ApiError:
    where = request.endpoint or f"{request.provider}'s own address"
    return ApiError(
        f"{request.model} at {where} does not take the request ({failed.status}): "
        f"{hidden(request.provider, failed.message)}",
        failed.mend or "correct the recipe; what was answered until now is kept",
    )


def _give_up(request: Request, attempts: int, failed: Failed) -> NoReturn:
    where = request.endpoint or f"{request.provider}'s own address"
    asked = f" and asks to wait {failed.after:.0f} seconds" if failed.after else ""
    look = "look what that server sends in place of answers" if failed.status == "malformed" else ""
    slower = "lower running.api.parallel and running.api.per_minute"
    raise ApiUnavailable(
        f"{request.model} at {where} did not answer after {attempts} attempt{'s' * (attempts > 1)}{asked}; "
        f"the last one ended with {failed.status}: {hidden(request.provider, failed.message)}",
        f"start it again later, or {look or slower}; what was answered is kept and not paid a second time",
    )

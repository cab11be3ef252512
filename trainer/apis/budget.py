"""What a run may take of paid APIs, kept by all its processes together.

Before an attempt is sent, what it takes at most is reserved: a file under ``open/`` that its process holds
locked. Reserving looks, under one lock, at what the ledger says was taken and at what others have reserved,
so that processes together cannot exceed the budget. The kernel frees the lock of a process that dies, however
it dies; whoever comes next finds the file and writes the attempt into the ledger that the dead could not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from registry.manifest import canonical_json
from trainer.apis.answers import Answers
from trainer.apis.ledger import Ledger, Line, Reader, Total
from trainer.apis.prices import Prices, usd_of
from trainer.apis.request import Reply, Request, Usage
from trainer.errors import BudgetSpent
from trainer.sections import ApiSection, PriceSection

_ROUNDING = 1e-9


@dataclass(kw_only=True, slots=True)
class Reservation:
    """An attempt that may be sent.

    Attributes:
        line: of the ledger as it stands if the attempt is never heard of again.
        file: held locked as long as the attempt is under way.
        path: of the file.
    """

    line: Line
    file: IO[bytes]
    path: Path


class Budget:
    """The budget of one run.

    Args:
        settings: the limits and prices.
        folder: of the ledger, shared by all runs and processes.
        run: name of the budget.
        now: seconds since the epoch.
    """

    def __init__(self, settings: ApiSection, folder: Path, run: str, now: Callable[[], float]) -> None:
        self.prices = Prices(settings.prices)
        self.ledger = Ledger(folder)
        self._settings, self._folder, self._run, self._now = settings, folder, run, now
        self._reader, self._spent = Reader(self.ledger), Total()
        self._dearest: dict[tuple[str, str], float] = {}

    def spent(self) -> Total:
        """Return what the run has taken until now."""
        with self.ledger.locked():
            self._catch_up()
            return replace(self._spent)

    def lines(self) -> list[Line]:
        """Return the attempts of the run until now."""
        with self.ledger.locked():
            recover(self._folder)
            return list(self.ledger.lines(self._run))

    def reserve(self, request: Request, attempt: int) -> Reservation:
        """Reserve what an attempt takes at most.

        Raises:
            BudgetSpent: it would exceed the budget, or nobody knows what the model takes.
        """
        if self._settings.money is not None:
            self.prices.require(request)
        expected = self.prices.usd(request, request.expected)
        with self.ledger.locked():
            self._catch_up()
            if expected is not None:
                # What was announced may be too little: the dearest answer until now is a better guess.
                expected = max(expected, self._dearest.get((request.model, request.kind), 0.0))
            self._check(expected or 0.0)
            return self._open(request, attempt, expected)

    def settle(self, reservation: Reservation, line: Line) -> None:
        """Write what became of an attempt, and free what was reserved."""
        with self.ledger.locked(), reservation.file:
            self.ledger.append(line)
            reservation.path.unlink(missing_ok=True)

    def _check(self, expected: float) -> None:
        """Raise `BudgetSpent` if one attempt more is too much."""
        limits = self._settings
        waiting = [line for line in _waiting(self._folder) if line.run == self._run]
        requests = self._spent.requests + len(waiting)
        usd = self._spent.usd + sum(line.usd or 0.0 for line in waiting)
        over = []
        if limits.requests is not None and requests + 1 > limits.requests:
            over.append("requests")
        if limits.money is not None and usd + expected > limits.money + _ROUNDING:
            over.append("money")
        if not over:
            return
        told = f"{requests} requests" + (f" of {limits.requests}" if limits.requests is not None else "")
        told += f" and {usd:.4f} US dollars" + (f" of {limits.money:.4f}" if limits.money is not None else "")
        under_way = f", {len(waiting)} of the requests still under way" if waiting else ""
        raise BudgetSpent(
            f"the budget of {self._run} is spent: {told}{under_way}; the next request takes up to "
            f"{expected:.4f} US dollars",
            f"raise {' and '.join(f'running.api.{name}' for name in over)} in the recipe and start it again: "
            "what was answered is kept and not paid a second time",
        )

    def _open(self, request: Request, attempt: int, expected: float | None) -> Reservation:
        """Write the file of a reservation; the ledger is locked."""
        moment = datetime.fromtimestamp(self._now(), UTC).isoformat(timespec="milliseconds")
        line = Line(
            id=uuid.uuid4().hex,
            time=moment,
            run=self._run,
            provider=request.provider,
            model=request.model,
            kind=request.kind,
            request=request.digest,
            attempt=attempt,
            status="lost",
            billed="unsure",
            usage=Usage(),
            usd=expected,
            seconds=0.0,
        )
        folder = self._folder / "open"
        folder.mkdir(exist_ok=True)
        path = folder / f"{line.id}.json"
        price = self.prices.of(request)
        value = {"line": line.as_json(), "price": price.model_dump() if price else None}
        file = path.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(canonical_json(value))
        file.flush()
        os.fsync(file.fileno())
        return Reservation(line=line, file=file, path=path)

    def _catch_up(self) -> None:
        """Read what has come to the ledger; it is locked."""
        recover(self._folder)
        for line in self._reader.news(self._run):
            self._spent.add(line)
            name = (line.model, line.kind)
            self._dearest[name] = max(self._dearest.get(name, 0.0), line.usd or 0.0)


def recover(folder: Path) -> None:
    """Write the attempts of processes that died into the ledger, which is locked by the caller.

    An attempt whose answer was kept is one that was answered. Of any other nobody knows whether the vendor
    did the work, so what was reserved counts as paid.
    """
    for path, file in _dead(folder):
        with file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                value = json.loads(file.read())
                line, price = Line.from_json(value["line"]), value["price"]
                known = [one for one in Ledger(folder).lines() if one.request == line.request]
                if all(one.id != line.id for one in known):
                    answered = any(one.status in ("ok", "refused") for one in known)
                    reply = None if answered else Answers(folder).get(line.request)
                    if reply is not None:
                        line = _answered(line, reply, price)
                    Ledger(folder).append(line)
            path.unlink(missing_ok=True)


def _answered(line: Line, reply: Reply, price: dict[str, float] | None) -> Line:
    """Return the line of an attempt that died after its answer was kept."""
    line = replace(line, status="refused" if reply.refused else "ok", usage=reply.usage)
    if not reply.counted:
        return line  # with what was reserved
    usd = None if price is None else usd_of(PriceSection.model_validate(price), reply.usage)
    return replace(line, billed="yes", usd=usd)


def _dead(folder: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Yield the reservations that nobody holds, open and locked."""
    for path in sorted((folder / "open").glob("*.json")):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        yield path, file


def _waiting(folder: Path) -> Iterator[Line]:
    """Yield the attempts under way; the dead have been buried."""
    for path in sorted((folder / "open").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            yield Line.from_json(json.loads(path.read_bytes())["line"])

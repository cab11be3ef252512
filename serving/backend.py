"""What answers edits behind the HTTP service: this process, or replicas on a cluster.

A backend takes requests whose adapters are named by reference, decides once what a reference means, and
answers with that very version, whatever is promoted meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from registry.digest import Digest

if TYPE_CHECKING:
    from PIL import Image

    from serving.schema import EditResult, SweepRequest

State = Literal["ready", "loading", "refused", "revoked"]
"""Of an adapter: it serves; it has never served yet; what the reference means is refused and nothing older
can be served; it was withdrawn and serves no more."""

Device = Literal["works", "broken", "dead"]
"""How a device is: it works; its steps fail for everybody, and edits of our own find out when it works again;
that has lasted for so long that only a new process may help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStatus:
    """A reference that is served.

    Attributes:
        reference: as it was configured or asked for, for example ``pixelsmile@prod``.
        followed: whether its alias is watched.
        state: see `State`.
        name, version, digest: of the adapter that answers now; None before the first.
        facts: of its signed card, ready for JSON: base, licence, ingredients, expressions, strength range,
            rank, scan verdict, signed statements and who signed them, description.
        problem: why the newest version is not served, or that the registry cannot be reached; None is well.
        since: time in seconds since the epoch at which this version began to serve.
        checked: the last time at which the registry confirmed it.
    """

    reference: str
    followed: bool
    state: State
    name: str | None = None
    version: int | None = None
    digest: Digest | None = None
    facts: Mapping[str, Any] | None = None
    problem: str | None = None
    since: float | None = None
    checked: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """How a backend is.

    Attributes:
        ready: it is warm, serves what can be served of the followed adapters, and is not draining.
        draining: it takes no new requests and finishes those that it has.
        waiting, running: requests.
        problem: why it is not ready.
        retry_after: seconds until there is room again; None where a request would be taken now.
        device: see `Device`; of a backend without one of its own it works.
    """

    ready: bool
    draining: bool
    waiting: int
    running: int
    problem: str | None = None
    retry_after: float | None = None
    device: Device = "works"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A request that waits or runs.

    Attributes:
        step: steps that are done, 0 to ``steps``; 0 comes once and at once, when the request is taken.
        pictures: what each row looks like so far; None where no preview was asked for at this step.
        adapter: ``name:version`` that was decided on when the request was taken; set at step 0.
        adapter_digest: of its manifest; set at step 0.
    """

    step: int
    steps: int
    pictures: Sequence[Image.Image] | None = None
    adapter: str | None = None
    adapter_digest: Digest | None = None


class Backend(Protocol):
    """Answers edits."""

    async def start(self) -> None:
        """Load the base and the followed adapters, and warm up."""

    def stream(
        self, request: SweepRequest, *, key: str, previews: int = 0
    ) -> AsyncIterator[Progress | list[EditResult]]:
        """Answer a request: progress when it is taken and after each step, then the results as the last item.

        Closing the iterator cancels the request within a step.

        Args:
            request: ``adapter`` is a reference; what it means is decided when the request is taken.
            key: who asks; requests of different keys get turns.
            previews: how many of the steps come with pictures, spread evenly.

        Raises:
            Overloaded: the queue is full; says when to try again.
            Draining: the server is going down.
            NotServed: no such adapter is served here.
            registry.errors.RegistryError: the adapter is refused or revoked.
            ServingError: the request does not fit the adapter or the base.
        """

    async def adapters(self) -> Sequence[AdapterStatus]:
        """Return what is served."""

    async def adapter(self, reference: str) -> AdapterStatus:
        """Return what a reference means now; raises as `stream` does."""

    async def health(self) -> Health:
        """Return how it is."""

    async def close(self, grace: float) -> None:
        """Take no more requests, finish those that were taken for at most ``grace`` seconds, and stop."""

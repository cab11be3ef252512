"""What all flow runs of a Prefect server share: GPUs, and how fast a paid API is asked.

Both are Prefect's global concurrency limits. Prefect's own default passes over a limit that does not exist
with a warning; here it is made, and whoever cannot get it fails.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flows.errors import FlowError
from flows.settings import FlowSettings

GPU = "gpu"
API = "{}-api"
PROVIDERS = ("gemini", "openai")
#: The shortest that Prefect grants. A holder renews it; that of a killed one ends with it.
LEASE_SECONDS = 60
_API_PER_MINUTE = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A global concurrency limit.

    Attributes:
        slots: how many there are.
        per_second: how many come free each second by themselves; 0 for those that are given back.
        said: a setting says so, and not only the default.
    """

    slots: int
    per_second: float = 0.0
    said: bool = False


def wanted(settings: FlowSettings) -> dict[str, Limit]:
    """Return the limits by name."""
    gpus = Limit(slots=settings.gpu_slots or max(1, gpus_here()), said=settings.gpu_slots is not None)
    rate = (settings.api_per_minute or _API_PER_MINUTE) / 60
    # A slot is a request: a second's worth may be sent at once.
    api = Limit(slots=max(1, round(rate)), per_second=rate, said=settings.api_per_minute is not None)
    return {GPU: gpus, **{API.format(provider): api for provider in PROVIDERS}}


def gpus_here() -> int:
    """Return how many GPUs the kernel's driver of this machine knows; torch need not be there."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def ensure(url: str | None = None, settings: FlowSettings | None = None) -> dict[str, str]:
    """Make the limits that a Prefect server lacks, and change those of which a setting says something else.

    Args:
        url: address of its API; None takes that of Prefect's settings.
        settings: None reads them.

    Returns:
        what happened to each: "made", "changed" or "there".
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.settings import PREFECT_API_URL, temporary_settings

    settings = settings or FlowSettings.read()
    with ExitStack() as stack:
        if url is not None:
            stack.enter_context(temporary_settings({PREFECT_API_URL: url}))
        client = stack.enter_context(get_client(sync_client=True))
        there = {limit.name: limit for limit in client.read_global_concurrency_limits(limit=200)}
        done = {}
        for name, limit in wanted(settings).items():
            found = there.get(name)
            if found is not None:
                same = (found.limit, found.slot_decay_per_second) == (limit.slots, limit.per_second)
                done[name] = "there" if same or not limit.said else "changed"
            else:
                done[name] = "made"
            if done[name] != "there":
                with suppress(ObjectAlreadyExists):  # another run was quicker
                    client.upsert_global_concurrency_limit_by_name(name, limit.slots, limit.per_second)
    return done


@contextmanager
def gpus_of(device: str, say: Callable[[str], None], *, most: int = 1) -> Iterator[int]:
    """Hold GPU slots while this process itself works on a device; none where that is no GPU.

    The memory of the GPU is given back with them: this process may live on for days, waiting for people.

    Args:
        device: as torch names it.
        say: is told when there is something to wait for.
        most: how many GPUs the work can use; it gets no slot for those beyond the limit.

    Yields:
        how many GPUs the work may use; ``most`` where there is none.
    """
    if not device.startswith("cuda"):
        yield most
        return
    with gpus(most, say, fewer=True) as granted:
        try:
            yield granted
        finally:
            _leave_gpus()


def _leave_gpus() -> None:
    import torch

    from trainer.evaluation.editing import forget_engine

    forget_engine()
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def gpus(count: int, say: Callable[[str], None], *, fewer: bool = False) -> Iterator[int]:
    """Hold GPU slots of the Prefect server as long as the block lasts; waits until they are free.

    The lease is renewed while this process lives. When that fails for good, the slots may belong to another
    run any moment, so the block is interrupted.

    Args:
        count: how many.
        say: is told when there is something to wait for.
        fewer: where there are not so many, all that there are will do.

    Yields:
        how many it holds.

    Raises:
        FlowError: there are fewer than that.
    """
    from prefect.client.orchestration import get_client
    from prefect.concurrency.sync import concurrency
    from prefect.runtime import task_run

    ensure()
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name(GPU)
    if fewer and limit.active:
        count = max(1, min(count, limit.limit))
    if limit.active and limit.limit < count:
        who = f"the stage {task_run.task_name}" if task_run.task_name else "this"
        fewer_will_do = ", or set ADAPTER_FOUNDRY_FLOWS_PROCESSES to fewer" if count > 1 else ""
        raise FlowError(
            f"{who} takes more GPUs ({count}) than the concurrency limit `{GPU}` has slots ({limit.limit})",
            "raise the limit in Prefect's page (Concurrency) or with ADAPTER_FOUNDRY_FLOWS_GPU_SLOTS"
            + fewer_will_do,
        )
    if not limit.active:
        say(f"the concurrency limit `{GPU}` is switched off in Prefect: nobody watches who takes which GPU")
    elif (limit.active_slots or 0) + count > limit.limit:
        say(
            f"{limit.active_slots} of {limit.limit} GPU slots are taken: waiting; those of a killed run come "
            f"free within {LEASE_SECONDS + 20} seconds"
        )
    with concurrency(GPU, occupy=count, strict=True, lease_duration=LEASE_SECONDS):
        yield count


@contextmanager
def api_rates() -> Iterator[None]:
    """Have each request of this context to a paid API wait for its turn among all flow runs.

    Raises:
        FlowError: the limit cannot be had; from the request.
    """
    from trainer.apis import before_request

    ensured = False

    def wait(provider: str) -> None:
        nonlocal ensured
        from prefect.concurrency.sync import rate_limit

        if not ensured:
            ensure()
            ensured = True
        try:
            rate_limit(API.format(provider), strict=True)
        except Exception as error:
            raise FlowError(
                f"the rate limit {API.format(provider)} of the Prefect server cannot be had: {error}",
                "see whether the server answers, and run the same again: nothing is paid twice",
            ) from error

    token = before_request.set(wait)
    try:
        yield
    finally:
        before_request.reset(token)

"""Serving on a Ray cluster, as an application of Ray Serve: ``serve run serving.ray_app:build``.

Two deployments: ingresses run the HTTP service and resolve references, engines hold a base model each, and
answer edits with adapters that they have verified themselves. Settings of serving come from where the
application is built; every machine of the cluster finds the registry by its own environment and data folder.
`serving.ray_command` starts it, with a cluster of this machine's own where there is none.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from ray import serve

from registry.errors import Explained
from serving.backend import AdapterStatus, Health, Progress
from serving.errors import ServingError
from serving.merging import OPEN_METRICS
from serving.ray_backend import Meaning, RayBackend, Refused
from serving.ray_scale import Scale, scale_of
from serving.schema import EditResult, SweepRequest
from serving.settings import ServingSettings, load

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

_KNOWN = 64
"""Model ids by which one engine can be found; the adapters' memory has a limit of its own."""
_CONNECTIONS = 1024
"""Requests that one ingress has at once; the engines' queues decide how many edits are taken."""


_QUIET = {"enable_access_log": False}
"""The service logs its requests itself; Ray would add a line for each call between replicas."""
_Closable = AsyncGenerator[Progress | list[EditResult]]


class Engine:
    """One base model, the adapters that are asked for, and the registry that they come from."""

    async def __init__(self, settings: ServingSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        from serving import logs
        from serving.local import LocalBackend
        from serving.metrics import Metrics
        from serving.quiet import quiet_libraries
        from serving.tracing import Tracing

        logs.configure()
        quiet_libraries()
        self._grace = settings.grace_seconds
        self._admitting: Counter[str] = Counter()
        self._metrics, self._tracing = Metrics(), Tracing(settings.otlp_endpoint)
        self._backend = LocalBackend(settings.model_copy(update={"on_demand": True}), metrics=self._metrics)
        await self._backend.start()

    @serve.multiplexed(max_num_models_per_replica=_KNOWN)  # type: ignore[untyped-decorator]
    async def admitted(self, model: str) -> AdapterStatus:
        """Pull and verify an adapter, ``name@sha256:…``; from then on Ray finds this engine by it."""
        return await self._backend.adapter(model)

    async def admit(self, model: str) -> Refused | None:
        """Get ready to answer with an adapter; return why not."""
        self._admitting[model] += 1
        try:
            await self.admitted(model)
        except Explained as error:
            return Refused(error=error, broken=(await self._backend.health()).device != "works")
        finally:
            self._admitting[model] -= 1
            if not self._admitting[model]:
                del self._admitting[model]
        return None

    async def admitting(self, model: str) -> bool:
        """Return whether it is still getting ready to answer with an adapter."""
        return model in self._admitting

    async def stream(
        self, request: SweepRequest, key: str, previews: int, trace: Mapping[str, str]
    ) -> AsyncGenerator[Progress | list[EditResult] | Refused]:
        """Answer a request whose references are digests; see `serving.backend.Backend.stream`.

        Args:
            trace: the headers that continue the caller's trace here.
        """
        try:
            await self.admitted(str(request.adapter))
            answer = self._backend.stream(request, key=key, previews=previews)
            async with aclosing(cast(_Closable, answer)) as items:
                with self._tracing.resumed(trace):
                    taken = await anext(items)  # the first item says that the request was taken
                yield taken
                async for item in items:
                    yield item
        except Explained as error:
            yield Refused(error=error)

    async def health(self) -> Health:
        """Return how it is."""
        return await self._backend.health()

    async def check_health(self) -> None:
        """Have this replica replaced where its device is dead; called by Ray Serve every ten seconds.

        Raises:
            ServingError: it is; Ray ends the replica when that has happened three times.
        """
        health = await self._backend.health()
        if health.device == "dead":
            raise ServingError(
                health.problem or "the device is dead", "another process takes this one's place"
            )

    async def metrics(self) -> tuple[str, str]:
        """Return this replica's name and its metrics, for an ingress to tell."""
        text, _ = self._metrics.exposition(OPEN_METRICS)
        return _replica(), text.decode()

    async def __del__(self) -> None:
        """Finish what was taken; called by Ray Serve when the replica is told to stop."""
        if hasattr(self, "_backend"):
            await self._backend.close(self._grace)
            self._tracing.close()


class Ingress:
    """The HTTP service over the engines of the cluster."""

    def __init__(self, engines: DeploymentHandle[Engine], settings: ServingSettings) -> None:
        self._engines = engines
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the service; called by Ray Serve."""
        return _service(self._engines, self._settings)


def _service(engines: DeploymentHandle[Engine], settings: ServingSettings) -> FastAPI:
    from registry.client import Registry
    from serving import logs
    from serving.following import Follower
    from serving.http.app import service_app
    from serving.metrics import Metrics

    logs.configure()
    metrics = Metrics()

    def follower(admit: Callable[[Meaning], None]) -> Follower:
        return Follower(Registry.open(), settings, on_named=admit, metrics=metrics, light=True)

    backend = RayBackend(engines, follower, settings)
    metrics.include(_replica(), lambda: backend.told)
    # Ray listens, not we: what the setting says of the address holds only where `serving ray` started Serve.
    return service_app(backend, settings.model_copy(update={"host": _listens_on()}), metrics=metrics)


def _listens_on() -> str:
    """Return the address that Ray Serve listens on; every address where it does not tell.

    The peer of a request is of no help alone: Ray's proxy lets a client on its own machine, and any that
    ``FORWARDED_ALLOW_IPS`` names, write it into ``X-Forwarded-For``.
    """
    from ray.serve.context import _get_global_client  # Ray tells it nowhere else

    try:
        host: str | None = _get_global_client().http_config.host
    except Exception:  # Ray raises plain ones
        logging.getLogger(__name__).warning("Ray Serve does not tell where it listens", exc_info=True)
        host = None
    return host or "0.0.0.0"  # noqa: S104 - nothing is bound to it


def _replica() -> str:
    """Return the name that Ray gave to this replica."""
    name: str = serve.get_replica_context().replica_id.unique_id
    return name


def build(arguments: Mapping[str, Any]) -> Application:
    """Return the application for ``serve run serving.ray_app:build engines=2 cpus=1``.

    Raises:
        UsageError: an argument is not one of `Scale`'s.
        registry.errors.UsageError: a setting is unknown or has a wrong value.
    """
    return application(scale_of(arguments), load())


def application(scale: Scale, settings: ServingSettings) -> Application:
    """Return the service as an application of Ray Serve."""
    leave = settings.grace_seconds + 5.0
    engine: Any = serve.deployment(
        Engine,
        name="engine",
        num_replicas=scale.engines,
        max_ongoing_requests=settings.max_rows + settings.max_waiting,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        graceful_shutdown_timeout_s=leave,
        logging_config=_QUIET,
        max_constructor_retry_count=3,
    )
    ingress: Any = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=scale.ingresses,
        max_ongoing_requests=_CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=leave,
        logging_config=_QUIET,
    )
    bound: Application = ingress.bind(engine.bind(settings), settings)
    return bound

"""What the routes of the service work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from fastapi import Request

if TYPE_CHECKING:
    from serving.backend import Backend
    from serving.http.jobs import JobStore
    from serving.http.keys import Gate
    from serving.metrics import Metrics
    from serving.provenance import ContentCredentials
    from serving.settings import ServingSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """The parts of a running service.

    Attributes:
        backend: what answers edits.
        settings: of serving.
        keys: lets callers in.
        jobs: edits that are answered later.
        metrics: counters and histograms.
        credentials: what signs a C2PA manifest into each picture; None signs nothing.
    """

    backend: Backend
    settings: ServingSettings
    keys: Gate
    jobs: JobStore
    metrics: Metrics
    credentials: ContentCredentials | None = None


def service_of(request: Request) -> Service:
    """Return the service that a request came to; a dependency of every route."""
    return cast(Service, request.app.state.service)

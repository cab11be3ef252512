"""The OpenAPI document is what the service does: schemathesis asks a real one, right and wrong."""

from __future__ import annotations

import base64
import copy
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import Case, GenerationMode
from schemathesis.checks import negative_data_rejection
from schemathesis.config import GenerationConfig, SchemathesisConfig

from fakes.backends import DrawingBackend
from fakes.followed import PROD, three_versions
from fakes.registries import BASE
from registry.manifest import BaseModelRef
from servers.served import Served
from serving.bases import register
from serving.http.app import service_app
from serving.local import LocalBackend
from serving.schema import MAX_SIDE, MAX_SWEEP
from serving.settings import ServingSettings
from trainer.portraits.base import base_path

pytestmark = pytest.mark.slow


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = _png()
schemathesis.openapi.format("byte", st.just(base64.b64encode(PICTURE).decode()))
schemathesis.openapi.format("binary", st.just(PICTURE))


def _document() -> Any:
    """What `/openapi.json` says; it does not depend on what is behind the service."""
    with tempfile.TemporaryDirectory() as home:
        app = service_app(DrawingBackend(), ServingSettings(adapters=(PROD,)), home=Path(home))
    config = SchemathesisConfig()
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    config.projects.default.generation = GenerationConfig(modes=modes, deterministic=True)
    return schemathesis.openapi.from_dict(app.openapi(), config=config)


schema = _document()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real service over a real registry and the shipped base."""
    home = tmp_path_factory.mktemp("openapi")
    registry = three_versions(home)
    ref = BaseModelRef(id=BASE.id, revision=BASE.revision, family=BASE.family, license=BASE.license)
    register(base_path(), ref, home)
    chosen = ServingSettings(adapters=(PROD,), port=0, grace_seconds=5)
    backend = LocalBackend(chosen, registry=registry, home=home)
    with Served(service_app(backend, chosen, home=home), chosen) as served:
        yield served.url


def affordable(case: Case) -> None:
    """Makes edits small, and what is right by its schema right for this adapter and this prompt."""
    body = case.body
    if not isinstance(body, dict):
        return
    for name, limit in (("steps", 100), ("n", 10), ("previews", 100)):
        if isinstance(body.get(name), int) and 2 < body[name] <= limit:
            body[name] = 2
    right = case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE
    if right and ("steps" not in body or (case.media_type == "application/json" and body["steps"] is None)):
        body["steps"] = 1
    rows, sweep, size = body.get("rows"), body.get("sweep"), body.get("size")
    if isinstance(rows, list) and 2 < len(rows) <= MAX_SWEEP:
        del rows[2:]
    if isinstance(sweep, dict) and sweep.get("count", 7) in range(2, MAX_SWEEP + 1):
        sweep["count"] = 2
    if isinstance(size, list) and all(side in range(8, MAX_SIDE + 1) for side in size):
        size[:] = [64] * len(size)
    if body.get("async") is True and body.get("seed"):
        body["async"] = False  # some jobs are enough
    if not right:
        return
    if case.media_type == "application/json":
        for name in {"expressions", "rows", "sweep", "stacked", "webhook", "adapter", "size"} & set(body):
            del body[name]
        body.update(strength=1.0, expressions={"happy": 0.5})
    elif "prompt" in body:
        body.update(prompt="happy=0.5", strength=1.0, size="auto", n=1, model=PROD)
    else:
        for name in set(body) - {"image", "seed", "steps"}:
            del body[name]
        body.update(expressions='{"happy": 0.5}', seed="1", steps="1")


@schema.parametrize()
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_does_what_its_document_says(case: Case, url: str) -> None:
    """Nothing right is refused, nothing wrong is taken, no fault of ours, and every answer is documented."""
    before = copy.deepcopy(case.body)
    affordable(case)
    # What was wrong with a request may be what was changed in it
    changed = [] if case.body == before else [negative_data_rejection]
    case.call_and_validate(base_url=url, timeout=120, excluded_checks=changed)

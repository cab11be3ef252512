"""A server that is told to stop: what it accepted and could not finish is left to the next one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from PIL import Image

from fakes.followed import PROD, three_versions
from registry.client import Registry
from registry.families import KNOWN_BASES
from registry.manifest import BaseModelRef
from serving.bases import register
from serving.http.job_runner import JobRunner
from serving.http.job_table import JobTable
from serving.http.jobs import JobStore
from serving.http.keys import Caller, Keys
from serving.http.webhooks import Sender
from serving.images import png_bytes
from serving.local import LocalBackend
from serving.schema import SweepRequest
from serving.settings import ServingSettings
from trainer.portraits.base import base_path

SOON = 300.0
"""Whatever has to happen happens in these seconds, also on a machine that is busy."""
STUDIO = Caller(name="studio", scopes=("edit", "read"))


@pytest.fixture
def registry(home: Path) -> Registry:
    base = KNOWN_BASES["adapter-foundry/portraits-base"]
    reference = BaseModelRef(id=base.id, revision=base.revision, family=base.family, license=base.license)
    register(base_path(), reference, home)
    return three_versions(home)


def test_no_job_fails_because_the_server_stops(
    registry: Registry, tmp_path: Path, portrait: Image.Image
) -> None:
    async def run() -> None:
        backend = LocalBackend(ServingSettings(adapters=(PROD,), max_rows=1), registry=registry)
        store = JobStore(JobTable(f"sqlite:///{tmp_path / 'jobs.db'}"), Sender(Keys.open(tmp_path)))
        runner = JobRunner(backend, store, encode=lambda request, result: png_bytes(result.image, {}))
        await backend.start()
        runner.start()
        picture = png_bytes(portrait, {})
        request = SweepRequest.make(image=picture, rows=({"happy": 0.5},) * 8, steps=90)
        jobs = [await store.accept(request, caller=STUDIO) for _ in range(4)]
        async with asyncio.timeout(SOON):
            while (await backend.health()).waiting < 3 or not (await backend.health()).running:
                await asyncio.sleep(0.01)
        # The runner is patient, so that it is the scheduler which ends what is left.
        await asyncio.gather(runner.close(SOON), backend.close(0))
        assert [store.table.get(job.id).state for job in jobs] == ["queued"] * 4

    asyncio.run(run())

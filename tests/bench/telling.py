"""What it costs to tell: python tests/bench/telling.py

Signing one 512 x 512 picture beside encoding it, and the metrics, spans and log line of one request. One JSON
object; milliseconds are medians of CPU time.
"""

from __future__ import annotations

import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from registry.digest import digest_bytes
from registry.manifest import BaseModelRef
from serving import certificates, logs, tracing
from serving.images import png_bytes
from serving.metrics import Metrics
from serving.provenance import ContentCredentials
from serving.schema import EditResult

SIDE = 512


def median(work: Callable[[], object], times: int) -> float:
    """The median of the CPU time that it takes, in milliseconds."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return round(1000 * statistics.median(taken), 4)


def picture() -> Image.Image:
    """Something between a flat and a noisy picture: gradients with grain."""
    grain = np.random.default_rng(0).normal(scale=6, size=(SIDE, SIDE, 3))
    ramp = np.linspace(0, 255, SIDE)
    smooth = (ramp[:, None, None] + ramp[None, :, None]) / 2 * [1.0, 0.8, 0.6]
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def signing() -> dict[str, float]:
    """A signature beside the encoding of the PNG that it goes into."""
    with tempfile.TemporaryDirectory() as folder:
        credentials = ContentCredentials.open(certificates.make(Path(folder) / "signer", "Bench").setting)
    result = EditResult(
        image=picture(), adapter="pixelsmile:3", adapter_digest=digest_bytes(b"manifest"),
        base=BaseModelRef(id="house/base", revision="abc", family="qwen-image-edit", license="Apache-2.0"),
        expressions={"happy": 0.8}, strength=1.0, seed=1, steps=8, size=(SIDE, SIDE),
    )  # fmt: skip
    data = png_bytes(result.image, result.facts())
    parent = b"\xff\xd8\xff" + bytes(200_000)
    signed = credentials.sign(data, "image/png", result, parent)
    return {
        "png_encode_ms": median(lambda: png_bytes(result.image, result.facts()), 20),
        "sign_ms": median(lambda: credentials.sign(data, "image/png", result, parent), 200),
        "png_bytes": len(data),
        "manifest_bytes": len(signed) - len(data),
    }


def telling() -> dict[str, float]:
    """What a request of eight steps adds to metrics, trace and log."""
    metrics, stream = Metrics(), io.StringIO()
    handler = logs.configure(stream)
    tracer = tracing.Tracing("http://127.0.0.1:9")  # nobody listens; spans are only made and queued
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def count() -> None:
        metrics.request_queue_seconds.observe(0.1)
        for _ in range(8):
            metrics.step_seconds.observe(0.1)
            metrics.batch_rows.observe(4)
        metrics.edited("pixelsmile", 3, 1.0)
        metrics.http_requests.labels(route="/v1/edits", method="POST", status=200).inc()

    def spans() -> None:
        with tracer.serving("POST", {}):
            for name in ("queue", "encode", "steps", "decode"):
                tracing.here().record(name, 0.0, 1.0, rows=1)

    def line() -> None:
        with logs.request():
            logs.bind(key="ann", adapter="pixelsmile:3", rows=1, seconds=1.0, status=200)
            logs.event("request")

    found = {
        "metrics_ms": median(count, 2000),
        "spans_ms": median(spans, 400),
        "log_line_ms": median(line, 2000),
        "scrape_ms": median(metrics.exposition, 50),
    }
    logging.getLogger().removeHandler(handler)
    tracer.close()
    return found


if __name__ == "__main__":
    print(json.dumps({**signing(), **telling()}))

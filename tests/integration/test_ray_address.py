"""On a cluster that others keep, Ray's own address decides who is asked for a key, not our setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from registry.client import Registry
from servers.ports import kept_port

pytestmark = [pytest.mark.slow, pytest.mark.integration]

SECONDS = 600
INGRESS = """
from pathlib import Path
import os, sys
from serving.local_ray import kept_here

with kept_here(Path(os.environ["ADAPTER_FOUNDRY_HOME"]) / "ray") as variables:
    import ray
    from ray import serve

    for left in range(7, -1, -1):
        try:
            ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": variables})
            break
        except Exception:
            # A raylet gives its agents 15 seconds to start, which is little on a machine that is busy.
            ray.shutdown()
            if not left:
                raise
from serving.ray_app import Ingress
from serving.settings import load

serve.start(http_options={"host": "0.0.0.0", "port": int(sys.argv[1])})
ingress = serve.deployment(serve.ingress()(Ingress), name="ingress", max_constructor_retry_count=1)
try:
    serve.run(ingress.bind(None, load()), name="edits")
    print("it runs")
except RuntimeError:
    print(serve.status().applications["edits"].deployments["ingress"].message)
serve.shutdown()
ray.shutdown()
"""


def test_a_service_that_ray_shows_to_others_needs_keys(tmp_path: Path) -> None:
    """The setting ``host`` says 127.0.0.1, as it does by default, and Serve listens everywhere."""
    Registry.init(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-P", "-c", INGRESS, str(kept_port())],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "ADAPTER_FOUNDRY_HOME": str(tmp_path / "home"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert "it runs" not in done.stdout, done.stderr
    assert "would listen on 0.0.0.0" in done.stdout, done.stdout + done.stderr
    assert "serving keys add NAME" in done.stdout

"""What a reader of the documents has in front of them when a page begins: a data folder, and files to name.

`SANDBOXES` are named in pages (``<!-- sandbox: released -->``). Each fills a home (the data folder at its
default place below it) and a working directory. Whatever takes time is made once a process and copied.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fakes import reference_adapters
from fakes.adapters import container
from fakes.pages import REPOSITORY
from fakes.pipelines import small_recipe
from fakes.registries import NAME, PASSING
from fakes.served import REF, portrait, served_home
from registry.client import Registry
from registry.digest import Digest, digest_bytes
from registry.manifest import WEIGHTS_NAME
from serving.bases import register
from trainer.portraits.base import base_path

DATA = Path(".local/share/adapter-foundry")
SUITE = """
name: tiny
source: renderer
identities: {human: 1, anime: 1}
first_identity: 900
intensities: [0.0, 1.0]
steps: 1
judge: {scorer: judge}
"""


def empty(home: Path, work: Path) -> None:
    """Nothing at all."""


def adapter(home: Path, work: Path) -> None:
    """``DIR``, ``adapter`` and ``adapter-raw``: adapters for the shipped base that nobody published; the
    first as ``FILE.safetensors``; ``evaluation.json`` and ``behaviour.json`` of ``DIR``; ``portrait.png``;
    ``tiny.yaml``, a suite that takes seconds.
    """
    for name in ("DIR", "adapter", "adapter-raw"):
        shutil.copytree(_adapters()[name], work / name)
    shutil.copy(work / "DIR" / WEIGHTS_NAME, work / "FILE.safetensors")
    weights = digest_bytes((work / "DIR" / WEIGHTS_NAME).read_bytes())
    evaluation = {**PASSING, "digests": {"adapter": str(weights)}}
    (work / "evaluation.json").write_text(json.dumps(evaluation))
    (work / "behaviour.json").write_text(json.dumps(_probed(weights)))
    (work / "portrait.png").write_bytes(portrait())
    (work / "tiny.yaml").write_text(SUITE)


def released(home: Path, work: Path) -> None:
    """`adapter`, and a registry: ``pixelsmile:1`` at ``pixelsmile@prod``, 2 and 3 approved; its base."""
    served_home(home / DATA)
    adapter(home, work)


def demo(home: Path, work: Path) -> None:
    """What `make demo` leaves, of an adapter that was trained before: a registry with ``pixelsmile:1`` at
    ``pixelsmile@prod``, and in the run's folder the weights without their average, and a portrait.
    """
    shutil.copytree(_demo(), home / DATA, dirs_exist_ok=True)
    run = home / DATA / "runs" / "pixelsmile-portraits"
    shutil.copytree(_adapters()["adapter"], run / "latest" / "adapter")
    shutil.copytree(_adapters()["adapter-raw"], run / "train-0" / "adapter-raw")
    (run / "latest" / "portrait.png").write_bytes(portrait())


def kim(home: Path, work: Path) -> None:
    """``kim``, a home of another person's machine: it knows where store and audit log of this one are."""
    own = work / "kim" / DATA
    own.mkdir(parents=True)
    registry = home / DATA / "registry"
    (own / "adapter-foundry.toml").write_text(
        f'[registry]\nstore = "{(registry / "objects").as_uri()}"\n'
        f'ledger = "sqlite:///{registry / "ledger.db"}"\n'
        f'mlflow_tracking_uri = "sqlite:///{registry / "mlflow.db"}"\n'
    )


def dataset(home: Path, work: Path) -> None:
    """``DATASET``, ``OLD`` (the same) and ``NEW`` (one person more), and ``runs/pixelsmile/dataset``."""
    for name in ("DATASET", "OLD", "runs/pixelsmile/dataset"):
        shutil.copytree(_datasets() / "two", work / name)
    shutil.copytree(_datasets() / "three", work / "NEW")


def recipe(home: Path, work: Path) -> None:
    """``small.yaml``: the shipped recipe with two expressions, few people and six steps."""
    small_recipe(REPOSITORY, work / "small.yaml")


SANDBOXES: Mapping[str, Callable[[Path, Path], None]] = {
    made.__name__: made for made in (empty, adapter, released, demo, kim, dataset, recipe)
}


@functools.cache
def _adapters() -> Mapping[str, Path]:
    from safetensors.numpy import load

    root = _scratch()
    for name, factor in {"DIR": 0.9, "adapter": 1.0, "adapter-raw": 0.95}.items():
        folder = reference_adapters.adapter("good", root / name)
        values = load((folder / WEIGHTS_NAME).read_bytes())
        weaker = reference_adapters.scaled({key: value.astype("f4") for key, value in values.items()}, factor)
        (folder / WEIGHTS_NAME).write_bytes(container(weaker, "F16", {"format": "pt", "base": REF.id}))
    return {name: root / name for name in ("DIR", "adapter", "adapter-raw")}


@functools.cache
def _demo() -> Path:
    home = _scratch() / "home"
    registry = Registry.init(home)
    register(base_path(), REF, home)
    registry.push(_adapters()["adapter"], NAME, evaluation=PASSING)
    registry.approve(f"{NAME}:1", "a person", "looks right")
    registry.promote(f"{NAME}:1", "prod")
    return home


def _probed(weights: Digest) -> dict[str, Any]:
    """What `trainer probe` writes, in a second instead of minutes."""
    return {
        "verdict": "pass",
        "weights": {"sha256": weights.hex},
        "base": {"id": REF.id, "revision": REF.revision},
        "probe": {"version": "1", "vocabulary": digest_bytes(b"words").hex, "population": None},
        "statistics": {"outlier_gap": 0.25},
        "p_values": {"outlier_gap": 0.4},
        "tokens": [{"text": "happy", "score": 2.5}],
        "pairs": [],
    }


@functools.cache
def _datasets() -> Path:
    from fakes.datasets import small_dataset
    from trainer.portraits.renderer import identity, one_hot, pose, render

    def pictures(seed: int) -> list[NDArray[np.uint8]]:
        shown = [one_hot(name) for name in ("neutral", "fear", "surprised")]
        return [render(identity(seed, "human"), expression, place=pose(seed)) for expression in shown]

    root = _scratch()
    people = [("train", "1", pictures(1)), ("validation", "2", pictures(2)), ("train", "3", pictures(3))]
    small_dataset(root / "two", people[:2])
    small_dataset(root / "three", people)
    return root


def _scratch() -> Path:
    root = Path(tempfile.mkdtemp(prefix="sandbox-template-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root

"""A registry with two adapters for the shipped base, and what its policy says of them together."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from fakes.followed import PROD, three_versions
from fakes.registries import PASSING, adapter_folder
from registry.client import Registry

UNDER = "lightning@prod"


@functools.cache
def _template() -> Path:
    root = Path(tempfile.mkdtemp(prefix="stacks-template-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    registry = three_versions(root / "home")
    registry.push(adapter_folder(root / "under", seed=5), "lightning", evaluation=PASSING)
    registry.approve("lightning:1", "a person", "looks right")
    registry.promote("lightning:1", "prod")
    return root / "home"


def two_adapters(home: Path) -> Registry:
    """Puts `three_versions` and ``lightning:1`` at ``lightning@prod`` into a data folder."""
    shutil.copytree(_template(), home, dirs_exist_ok=True)
    return Registry.open(home)


def declare(registry: Registry, undeclared: str, *, pair: bool, first: str = PROD) -> None:
    """Writes a policy that says what becomes of undeclared pairs, and declares this one or none."""
    text = f'[scan]\nundeclared_pairs = "{undeclared}"\n'
    if pair:
        text += f'[[scan.pairs]]\ntogether = ["{first}", "{UNDER}"]\n'
    (registry.place.home / "registry" / "policy.toml").write_text(text)

"""Attacks by somebody who can write MLflow's database: `pull` does not care, `reconcile` ends with 13."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fakes.registries import NAME, PASSING, adapter_folder, copy_registry
from registry.cli import main
from registry.client import Registry
from registry.reconcile import reconcile

MISMATCH = 13


@pytest.fixture
def registry(home: Path, tmp_path: Path) -> Registry:
    """Two versions, of which ``prod`` means the first; the index says exactly that."""
    registry = copy_registry(home)
    registry.push(adapter_folder(tmp_path / "second", seed=1), NAME, evaluation=PASSING)
    reconcile(registry, repair=True)  # the template was made in another folder
    return registry


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out)


ATTACKS = {
    "alias moved": "UPDATE registered_model_aliases SET version = 2",
    "alias renamed": "UPDATE registered_model_aliases SET alias = 'Prod'",
    "alias deleted": "DELETE FROM registered_model_aliases",
    "source elsewhere": "UPDATE model_versions SET source = 's3://evil/x', storage_location = 's3://evil/x' "
    "WHERE version = 1",
    "loaded from elsewhere, shown as before": "UPDATE model_versions SET storage_location = 's3://evil/x' "
    "WHERE version = 1",
    "licence rewritten": "UPDATE model_version_tags SET value = 'MIT' WHERE key = 'license'",
    "verdict rewritten": "UPDATE model_version_tags SET value = 'fail' WHERE key = 'scan' AND version = 1",
    "digest rewritten": "UPDATE model_version_tags SET value = 'sha256:0' "
    "WHERE key = 'adapter_foundry.digest'",
    "versions exchanged": "UPDATE model_version_tags SET value = (SELECT other.value FROM model_version_tags "
    "AS other WHERE other.key = model_version_tags.key AND other.version = 3 - model_version_tags.version)",
    "version deleted": "UPDATE model_versions SET current_stage = 'Deleted_Internal' WHERE version = 1",
    "a source with control characters": "UPDATE model_versions SET source = char(27) || '[2J' "
    "WHERE version = 2",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_rewritten_index_is_reported_never_believed_and_mended(
    registry: Registry, home: Path, capsys: pytest.CaptureFixture[str], attack: str
) -> None:
    assert run(capsys, "reconcile")[0] == 0
    before = registry.catalog.survey()
    with sqlite3.connect(home / "registry" / "mlflow.db") as database:
        assert database.execute(ATTACKS[attack]).rowcount > 0
    database.close()

    assert Registry.open(home).pull(f"{NAME}@prod").reference == f"{NAME}:1"
    code, report = run(capsys, "reconcile")
    assert code == MISMATCH
    assert report["differences"]
    with pytest.raises(SystemExit):
        main(["reconcile"])
    assert "\x1b" not in capsys.readouterr().out

    code, report = run(capsys, "reconcile", "--repair")
    assert (code, report["repaired"]) == (0, True)
    assert registry.catalog.survey() == before
    assert run(capsys, "reconcile") == (0, {**report, "differences": [], "repaired": False})

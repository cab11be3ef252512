"""What approvers see: figures beside those of production, findings, licences, a picture for the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from flows.approvals import Decision
from flows.artifacts import MAX_PICTURE_BYTES, data_uri, licence_rows, scan_rows


def test_findings_of_a_signed_scan_are_named() -> None:
    rows = scan_rows(
        {"result": "WARNED", "warnedTests": ["ADP-NUM-004", "ADP-NEW-001"], "passedTests": ["a", "b"]}
    )
    assert [(row["rule"], row["result"]) for row in rows] == [
        ("verdict", "WARNED"),
        ("ADP-NUM-004", "review"),
        ("ADP-NEW-001", "review"),
        ("2 other rules", "pass"),
    ]
    assert rows[1]["what"]
    assert scan_rows({})[0]["result"] == "missing"


def test_each_ingredient_has_its_licence() -> None:
    one = {
        "name": "base",
        "kind": "base",
        "license": "Apache-2.0",
        "verdict": "pass",
        "conditions": ["notice"],
    }
    rows = licence_rows(
        {"license": "MIT", "verdict": "pass", "purpose": "commercial-use", "ingredients": [one]}
    )
    assert [(row["ingredient"], row["licence"]) for row in rows] == [
        ("the adapter", "MIT"),
        ("base (base)", "Apache-2.0"),
    ]
    assert rows[1]["notes"] == "notice"
    assert licence_rows({})[0]["verdict"] == "missing"


@pytest.mark.parametrize("size", [(40, 30), (1200, 900), (900, 6000)])
def test_a_picture_becomes_small_enough_for_prefects_database(tmp_path: Path, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "sheet.png")
    text = data_uri(tmp_path / "sheet.png")
    assert len(text) <= MAX_PICTURE_BYTES
    head, _, data = text.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as found:
        assert abs(found.width / found.height - size[0] / size[1]) < 0.05
        assert found.width <= size[0]


def test_a_form_without_a_reason_is_no_decision() -> None:
    with pytest.raises(ValidationError):
        Decision(decision="approve", reason="", reviewer="Kim")
    with pytest.raises(ValidationError):
        Decision.model_validate({"decision": "approve", "reason": "x", "reviewer": "Kim", "more": 1})

"""Attacks on what a scan reads and writes: names that forge reports, pictures that are pages, changing bytes.

The files are judged rightly; what is attacked is the way from their bytes to the person who reads of them.
"""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.adapters import BASES, clean_adapter
from registry.commands.scanning import scanned_text
from registry.content import CHUNK_BYTES, FileContent
from registry.digest import digest_bytes
from registry.errors import DigestMismatch, RegistryError, ScanRefused, UsageError
from registry.manifest import CARD_NAME, WEIGHTS_NAME
from registry.scanning import reading
from registry.scanning.page import page
from registry.scanning.probed import Probed
from registry.scanning.reading import ObjectContent, checked
from registry.scanning.report import finding, report
from registry.scanning.sarif import sarif
from registry.scanning.subjects import Scanned, Subject
from registry.scanning.targets import Options, scan_target
from registry.storage.local import LocalObjects

BASE = BASES["adapter-foundry/portraits-base"]

HOSTILE = (
    "x\x1b[31m\r\n::error::a##[error]b##vso[task.complete]{0}[click](https://evil.example)%0A"
    "</code><script>alert(1)</script><img src=x onerror=alert(1)>\"'>\u202e"
)


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def hostile() -> Scanned:
    """A file whose names, metadata, place and problem are all written by an attacker."""
    from registry.errors import shown

    found = report(
        digest_bytes(b"w"),
        [finding("ADP-STR-001", HOSTILE, HOSTILE), finding("ADP-CON-010", f"metadata {HOSTILE}", HOSTILE)],
        {"tensors": 3},
        about={"dialect": HOSTILE, HOSTILE: "x"},
    )
    name = shown(HOSTILE)
    subjects = (Subject(name=name, report=found), Subject(name="b", report=None, problem=name))
    return Scanned(target=name, subjects=subjects, many=True)


# -- names --


def test_hostile_names_command_no_terminal_and_no_ci() -> None:
    scanned = hostile()
    texts = [
        scanned_text(scanned),
        json.dumps(scanned.to_json()),
        json.dumps(sarif(scanned)),
        page(scanned),
        *(one.report.text() for one in scanned.subjects if one.report is not None),
    ]
    for text in texts:
        assert text.isascii()
        assert all(line.isprintable() for line in text.splitlines())
        for forged in ("\x1b", "::error::", "##[", "##vso["):
            assert forged not in text


def test_hostile_names_are_no_links_and_no_placeholders_in_sarif() -> None:
    (run,) = sarif(hostile())["runs"]
    for result in run["results"]:
        message = result["message"]["text"]
        assert "[" not in re.sub(r"\\\[", "", message), "a bracket without a backslash makes a link"
        assert "{" not in message.replace("{{", ""), "a single brace is a placeholder"


def test_hostile_names_are_no_markup_in_the_page() -> None:
    text = page(hostile())
    for markup in ("<script", "<img", "onerror=alert(1)>"):
        assert markup not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text


# -- pictures --


def probe(uri: Any) -> Probed:
    return Probed.parse(
        {
            "verdict": "review",
            "weights": {"sha256": "0" * 64},
            "base": {"id": BASE.id, "revision": "1"},
            "probe": {"version": "1", "vocabulary": "0" * 64, "population": None},
            "statistics": {},
            "p_values": {},
            "tokens": [{"text": "xqz", "score": 3.2}],
            "pairs": [],
            "pictures": {"xqz": {"adapter": uri}},
        }
    )


@pytest.mark.parametrize(
    "uri",
    [
        "https://evil.example/pixel.png",
        "data:text/html;base64,PHNjcmlwdD4=",
        "data:image/svg+xml;base64,PHN2Zz4=",
        'data:image/png;base64,AAAA" onerror="alert(1)',
        "data:image/png;base64," + "A" * 300_001,
        7,
    ],
)
def test_pictures_are_nothing_but_pictures(uri: object) -> None:
    with pytest.raises(UsageError, match="cannot be shown"):
        probe(uri)


def test_a_picture_is_taken() -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"png").decode("ascii")
    assert probe(uri).pictures == {"xqz": {"adapter": uri}}


# -- bytes --


def test_a_link_in_place_of_the_weights_is_not_followed(tmp_path: Path) -> None:
    """Else a folder from elsewhere has any file of this machine read, and a report on it."""
    elsewhere = lay(tmp_path / "elsewhere", dict(clean_adapter(BASE)))
    folder = lay(tmp_path / "adapter", {CARD_NAME: clean_adapter(BASE)[CARD_NAME]})
    (folder / WEIGHTS_NAME).symlink_to(elsewhere / WEIGHTS_NAME)
    with pytest.raises(RegistryError, match="no plain file"):
        scan_target(str(folder), Options())
    (folder / WEIGHTS_NAME).unlink()
    (folder / "lora").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(RegistryError, match="there is no adapter"):
        scan_target(str(folder), Options())
    lay(folder, dict(clean_adapter(BASE)))
    found = scan_target(str(folder), Options()).subjects[0].report
    assert found is not None
    assert [(one.rule, one.where) for one in found.findings] == [("ADP-CON-020", "lora")]


def test_a_pickle_under_any_name_beside_several_adapters_blocks_them(tmp_path: Path) -> None:
    weights = clean_adapter(BASE)[WEIGHTS_NAME]
    folder = lay(tmp_path / "loras", {"a.safetensors": weights, "b.safetensors": weights, "README.md": b"hi"})
    assert scan_target(str(folder), Options()).outcome == "pass"
    (folder / "thumbs.db").write_bytes(b"\x80\x04\x95\x00")
    found = scan_target(str(folder), Options())
    assert [one.outcome for one in found.subjects] == ["block", "block"]


def test_a_folder_that_cannot_be_read_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in it would pass unseen. Permissions do not stop root, so the listing itself fails here."""
    folder = lay(tmp_path / "loras", dict(clean_adapter(BASE)))
    lay(folder / "locked", {"evil.bin": b"\x80\x04\x95\x00"})
    listed = os.scandir

    def scandir(place: Any) -> Any:
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(RegistryError, match="locked cannot be read"):
        scan_target(str(folder), Options())


class Store(LocalObjects):
    """A store whose answers change: objects become shorter, and every reading is counted."""

    shorter = 0
    fetched = 0

    def read(self, key: str, start: int, stop: int) -> bytes:
        data = super().read(key, start, stop)
        self.fetched += len(data)
        return data[: len(data) - self.shorter]


def test_objects_are_read_by_range_and_never_over_and_over(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(10 * CHUNK_BYTES + 5)
    store = Store(tmp_path)
    store.put("a/b", data)
    content = ObjectContent(store, "a/b")
    assert content[CHUNK_BYTES - 3 : CHUNK_BYTES + 3] == data[CHUNK_BYTES - 3 : CHUNK_BYTES + 3]
    assert content[-5:] == data[-5:]
    assert content[7:7] == b""
    before = store.fetched
    assert content[CHUNK_BYTES : CHUNK_BYTES + 9] == data[CHUNK_BYTES : CHUNK_BYTES + 9]
    assert store.fetched == before, "what was read last is kept"
    places = [number % 10 * CHUNK_BYTES for number in range(1000)]
    with pytest.raises(RegistryError, match="again and again"):
        assert [content[at : at + 1] for at in places] == []
    assert store.fetched <= 7 * len(data)


def test_an_object_that_shrinks_is_no_pass(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("weights", clean_adapter(BASE)[WEIGHTS_NAME])
    store.shorter = 1
    with (
        pytest.raises(DigestMismatch, match="became shorter"),
        checked(lambda: ObjectContent(store, "weights"), "weights", lambda *_: None),
    ):
        pass


def test_bytes_that_change_after_they_were_hashed_are_not_judged(tmp_path: Path) -> None:
    folder = lay(tmp_path / "adapter", dict(clean_adapter(BASE)))
    path = folder / WEIGHTS_NAME
    with checked(lambda: FileContent(path), WEIGHTS_NAME, lambda *_: None) as (weights, digest):
        assert digest == digest_bytes(path.read_bytes())
        with path.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x7f")
        with pytest.raises(DigestMismatch):
            weights[:]


def test_a_file_larger_than_any_adapter_is_not_even_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_WEIGHTS_BYTES", 10)
    folder = lay(tmp_path / "adapter", dict(clean_adapter(BASE)))
    heard: list[int] = []
    with pytest.raises(ScanRefused, match="at most 10"):
        scan_target(str(folder), Options(progress=lambda stage, done, total: heard.append(done)))
    assert not heard

"""A folder of pictures from a stranger: it reads nothing outside of itself and cannot fill the memory."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from trainer.data import listing as listings
from trainer.data.listing import open_listed, read_listing
from trainer.errors import DataError


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A folder with three pictures, and one picture outside of it."""
    place = tmp_path / "stranger"
    (place / "sub").mkdir(parents=True)
    for number, name in enumerate(("n", "a", "b")):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(place / f"{name}.png")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "secret.png")
    return place


def listing_with(place: Path, image: str) -> str:
    line = {
        "split": "train", "identity": "x", "source": "n.png",
        "a": {"image": image, "expression": "fear", "intensity": 1.0},
        "b": {"image": "b.png", "expression": "surprised", "intensity": 1.0},
    }  # fmt: skip
    (place / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    return image


@pytest.mark.parametrize("image", ["../secret.png", "sub/../../secret.png", "sub/../a.png", "..\\secret.png"])
def test_a_path_that_climbs_out_is_refused(stranger: Path, image: str) -> None:
    listing_with(stranger, image)
    (stranger / "..\\secret.png").write_bytes((stranger / "a.png").read_bytes())
    with pytest.raises(DataError, match="is not a path inside the folder"):
        read_listing(stranger)


def test_an_absolute_path_is_refused(stranger: Path) -> None:
    listing_with(stranger, str(stranger.parent / "secret.png"))
    with pytest.raises(DataError, match="is not a path inside the folder"):
        read_listing(stranger)


def test_a_link_to_a_picture_outside_is_refused(stranger: Path) -> None:
    (stranger / "link.png").symlink_to(stranger.parent / "secret.png")
    listing_with(stranger, "link.png")
    with pytest.raises(DataError, match="goes through a symbolic link"):
        read_listing(stranger)


def test_a_folder_that_is_a_link_is_refused(stranger: Path) -> None:
    (stranger / "door").symlink_to(stranger.parent)
    listing_with(stranger, "door/secret.png")
    with pytest.raises(DataError, match="goes through a symbolic link"):
        read_listing(stranger)


def test_a_list_that_is_a_link_is_refused(stranger: Path) -> None:
    elsewhere = stranger.parent / "elsewhere.jsonl"
    listing_with(stranger, "a.png")
    (stranger / "pairs.jsonl").rename(elsewhere)
    (stranger / "pairs.jsonl").symlink_to(elsewhere)
    with pytest.raises(DataError, match="there is no file"):
        read_listing(stranger)


def test_a_pipe_is_no_picture_and_nobody_waits_for_it(stranger: Path) -> None:
    os.mkfifo(stranger / "pipe.png")
    listing_with(stranger, "pipe.png")
    with pytest.raises(DataError, match=r"there is no picture 'pipe\.png'"):
        read_listing(stranger)


def test_a_small_file_that_unfolds_into_gigabytes_is_refused(stranger: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    (stranger / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    listing_with(stranger, "bomb.png")
    with pytest.raises(DataError, match=r"line 1: 'bomb.png': the picture has .*pixels"):
        list(open_listed(read_listing(stranger)))


def test_a_file_without_end_is_not_read_to_the_end(stranger: Path) -> None:
    from serving.images import MAX_IMAGE_BYTES

    with (stranger / "long.png").open("wb") as stream:
        stream.write((stranger / "a.png").read_bytes())
        stream.truncate(1 << 40)  # sparse: a terabyte that takes no room
    listing_with(stranger, "long.png")
    with pytest.raises(DataError, match=f"at most {MAX_IMAGE_BYTES} are read"):
        list(open_listed(read_listing(stranger)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x89PNG\r\n",
    ],
)
def test_what_is_no_picture_of_the_three_kinds_is_refused(stranger: Path, data: bytes) -> None:
    (stranger / "odd.png").write_bytes(data)
    listing_with(stranger, "odd.png")
    with pytest.raises(DataError, match=r"line 1: 'odd.png': .*not a readable PNG, JPEG or WebP"):
        list(open_listed(read_listing(stranger)))


def test_a_gif_is_not_decoded_whatever_its_name(stranger: Path) -> None:
    Image.new("P", (16, 16)).save(stranger / "odd.png", "GIF")
    listing_with(stranger, "odd.png")
    with pytest.raises(DataError, match="not a readable PNG, JPEG or WebP"):
        list(open_listed(read_listing(stranger)))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 3_000, "1" * 10_000, '{"split": NaN}', "\ud800"])
def test_a_line_that_breaks_parsers_is_explained(stranger: Path, line: str) -> None:
    (stranger / "pairs.jsonl").write_bytes(line.encode("utf-8", "surrogatepass") + b"\n")
    with pytest.raises(DataError):
        read_listing(stranger)


def test_a_line_without_end_is_not_parsed(stranger: Path) -> None:
    (stranger / "pairs.jsonl").write_text('{"split": "' + "x" * 20_000 + '"}\n')
    with pytest.raises(DataError, match="the line is longer than"):
        read_listing(stranger)


def test_a_list_without_end_is_not_read(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing_with(stranger, "a.png")
    monkeypatch.setattr(listings, "_MAX_LIST_BYTES", 100)
    with pytest.raises(DataError, match="is larger than 100 bytes"):
        read_listing(stranger)


def test_an_intensity_that_is_no_number_is_refused(stranger: Path) -> None:
    listing_with(stranger, "a.png")
    path = stranger / "pairs.jsonl"
    path.write_text(path.read_text().replace('"intensity": 1.0', '"intensity": NaN', 1))
    with pytest.raises(DataError, match=r"line 1: a\.intensity"):
        read_listing(stranger)


def test_names_that_would_rewrite_a_terminal_are_refused(stranger: Path) -> None:
    listing_with(stranger, "a.png")
    path = stranger / "pairs.jsonl"
    path.write_text(path.read_text().replace('"x"', '"\\u001b[2Jx"', 1))
    with pytest.raises(DataError, match="line 1: identity") as caught:
        read_listing(stranger)
    assert "\x1b" not in str(caught.value)

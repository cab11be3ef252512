"""References: what a user may write, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.digest import Digest
from registry.errors import UsageError
from registry.reference import Reference

HEX = "0123456789abcdef" * 4

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,127}", fullmatch=True)
aliases = st.from_regex(r"[a-z][a-z0-9_-]{0,63}", fullmatch=True).filter(
    lambda text: text != "latest" and not text[1:].isdigit()
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pixelsmile@prod", Reference(name="pixelsmile", alias="prod")),
        ("pixelsmile:3", Reference(name="pixelsmile", version=3)),
        (f"pixelsmile@sha256:{HEX}", Reference(name="pixelsmile", digest=Digest(f"sha256:{HEX}"))),
        ("a.b_c-1@blue-green", Reference(name="a.b_c-1", alias="blue-green")),
    ],
)
def test_parse(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pixelsmile",
        "@prod",
        ":3",
        "pixelsmile@",
        "pixelsmile:",
        "pixelsmile:0",
        "pixelsmile:03",
        "pixelsmile:-1",
        "pixelsmile:1.0",
        "pixelsmile:9999999999",
        "pixelsmile:\u0663",
        "pixelsmile@latest",
        "pixelsmile@v3",
        "pixelsmile@Prod",
        "pixelsmile@pr\u00f6d",
        "pixelsmile@prod\n",
        "pixelsmile@prod@prod",
        "Pixelsmile@prod",
        "-rf@prod",
        "../evil@prod",
        "a/b@prod",
        "pixelsmile@sha256:",
        "pixelsmile@sha256:abc",
        f"pixelsmile@sha256:{HEX.upper()}",
        f"pixelsmile@sha256:{HEX}0",
        f"pixelsmile:sha256:{HEX}",
        f"sha256:{HEX}",
        "p" * 129 + "@prod",
        "pixelsmile@" + "p" * 65,
    ],
)
def test_what_is_no_reference_is_refused_with_an_explanation(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Reference.parse(text)
    assert caught.value.mend
    assert caught.value.exit_code == 2


def test_exactly_one_of_alias_version_and_digest() -> None:
    with pytest.raises(UsageError):
        Reference(name="pixelsmile")
    with pytest.raises(UsageError):
        Reference(name="pixelsmile", alias="prod", version=3)


@given(name=names, alias=aliases)
def test_an_alias_survives_a_round_trip(name: str, alias: str) -> None:
    assert Reference.parse(f"{name}@{alias}") == Reference(name=name, alias=alias)


@given(name=names, version=st.integers(1, 999_999_999))
def test_a_version_survives_a_round_trip(name: str, version: int) -> None:
    assert Reference.parse(str(Reference(name=name, version=version))) == Reference(
        name=name, version=version
    )


@given(st.one_of(st.text(max_size=80), st.text("pixelsmile:@3-.sha256", max_size=80)))
def test_any_text_is_a_reference_or_an_explained_error(text: str) -> None:
    try:
        found = Reference.parse(text)
    except UsageError:
        return
    assert str(found) == text

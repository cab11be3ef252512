"""Attacks on what asks paid APIs: keys that leak, servers that lie, folders that point elsewhere."""

from __future__ import annotations

import functools
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fakes.edits import edited, portraits
from fakes.vendors import KEY, Fault, Told, Vendor, bomb, darker, images
from trainer.apis import Paid, Reply, Request, Usage
from trainer.apis.command import apis
from trainer.apis.keys import address, key_of
from trainer.apis.ledger import Ledger
from trainer.apis.paid import Clock
from trainer.errors import ApiError, DataError, TrainerError
from trainer.recipe import Recipe
from trainer.scoring.gemini import GeminiVendor
from trainer.scoring.openai import OpenAiVendor
from trainer.scoring.vlm import Question
from trainer.sections import ApiSection, PriceSection, ScoringSection, SynthesisSection
from trainer.synthesis import synthesise
from trainer.synthesis.editing import EditingApi
from trainer.synthesis.gemini import GeminiEditor
from trainer.synthesis.openai import OpenAiEditor
from trainer.synthesis.people import portraits_of
from trainer.synthesis.prompts import Prompt

PROVIDERS = ("gemini", "openai")


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return portraits(tmp_path / "people", "anna.png", "ben.png")


def recipe_for(provider: str, folder: Path, vendor: Vendor) -> Recipe:
    data = {"license": "CC0-1.0", "intensities": [1.0]}
    return edited(folder, getattr(vendor, provider), data=data, synthesis={"provider": provider})


def edit_all(recipe: Recipe, home: Path) -> None:
    api = EditingApi(recipe, home, clock=Clock(sleep=lambda seconds: None))
    for request in api.plan():
        api.make(request)


# -- keys --


@pytest.fixture(params=PROVIDERS)
def careless(request: pytest.FixtureRequest) -> Iterator[tuple[str, Vendor]]:
    """A vendor that repeats the key wherever it can: in errors, and in pictures."""

    def repeating(picture: bytes, prompt: str) -> bytes:
        info = PngImagePlugin.PngInfo()
        info.add_text("asked-with", KEY)
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture)).save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()

    with images(Vendor(), repeating) as vendor:
        yield request.param, vendor


def make_all(recipe: Recipe, home: Path, name: str) -> None:
    edit_all(recipe, home)
    synthesise(recipe, home / name, data_folder=home)
    raise TrainerError("all was made")


def test_a_key_is_in_no_file_log_or_message(
    careless: tuple[str, Vendor], tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provider, vendor = careless
    caplog.set_level(logging.DEBUG)
    vendor.faults |= {1: Fault(kind="status", status=500), 8: Fault(kind="status", status=400)}
    told = []
    for name in ("a", "b"):
        with pytest.raises(TrainerError) as caught:
            make_all(recipe_for(provider, folder, vendor), tmp_path, name)
        told.append(str(caught.value) + repr(caught.value))
    told.append(CliRunner().invoke(apis, ["ledger", "--home", str(tmp_path)]).output)
    told.append(CliRunner().invoke(apis, ["ledger", "--home", str(tmp_path), "--json"]).output)
    assert any("[key]" in text for text in told)
    assert not [text for text in told if KEY in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "ledger.jsonl" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert not [record for record in caplog.records if KEY in record.getMessage()]
    assert all(one.asked.headers for one in vendor.log)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_key_and_a_portrait_follow_no_redirection(
    status: int, provider: str, tmp_path: Path, folder: Path
) -> None:
    with images(Vendor(), darker) as thief, images(Vendor(), darker) as vendor:
        there = f"{thief.gemini}/v1/images/edits"
        vendor.faults[1] = Fault(kind="status", status=status, headers={"Location": there})
        with pytest.raises(ApiError, match=str(status)):
            edit_all(recipe_for(provider, folder, vendor), tmp_path)
        assert len(vendor.log) == 1
        assert thief.log == []


ADDRESSES = [
    "https://user:secret@127.0.0.1/v1", "http://127.0.0.1/v1?key=secret", "http://127.0.0.1/v1#secret", "ftp://host/secret",
    "file:///etc/passwd", "host/v1", "http://", "https://host:99999999/secret", "javascript:alert(1)", "",
]  # fmt: skip


@pytest.mark.parametrize("endpoint", ADDRESSES)
def test_addresses_with_secrets_or_without_a_server_are_refused(endpoint: str) -> None:
    with pytest.raises(ApiError) as caught:
        address(endpoint, "https://api.openai.com/v1")
    if "127.0.0.1" in endpoint:
        assert "secret" not in str(caught.value)


OWN = "https://api.openai.com/v1"
THIEVES = [
    "https://evil.example/v1", "http://api.openai.com/v1", "https://api.openai.com:8443/v1",
    "https://api.openai.com.evil.example/v1", "https://evil.example/api.openai.com", "http://127.0.0.1.evil/v1",
    "https://10.0.0.5/v1", "http://2130706433/v1", "https://localhost.evil/v1", "http://trusted.example/v1",
    "https://trusted.example:8443/v1", "https://sub.trusted.example/v1", "http://lan:8001",
    "https://generativelanguage.googleapis.com", "https://аpi.openai.com/v1",
]  # fmt: skip
FRIENDS = [
    OWN, "https://API.OPENAI.COM:443/v1/", "http://127.0.0.1:8000/v1", "http://[::1]:8000/v1",
    "http://localhost:11434/v1", "https://trusted.example/v1", "http://lan:8000/v1", "https://ports:8443/v1",
]  # fmt: skip


@pytest.mark.parametrize("endpoint", [*THIEVES, *FRIENDS])
def test_a_key_goes_to_its_vendor_to_this_machine_and_where_the_owner_says(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTER_FOUNDRY_API_HOSTS", "trusted.example, http://lan:8000,ports:8443,://,")
    if endpoint in FRIENDS:
        assert address(endpoint, OWN) == endpoint.rstrip("/")
    else:
        with pytest.raises(ApiError, match=r"may not be sent|no address of a server") as caught:
            address(endpoint, OWN)
        assert caught.value.mend


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_recipe_sends_a_key_to_no_server_of_its_own(provider: str, tmp_path: Path, folder: Path) -> None:
    with Vendor() as vendor:
        recipe = recipe_for(provider, folder, vendor)
        told = recipe.model_dump(mode="json", exclude_unset=True)
        told["synthesis"]["endpoint"] = "https://evil.example/v1"
        with pytest.raises(ApiError, match=r"(?s)evil\.example:443.*ADAPTER_FOUNDRY_API_HOSTS=evil\.example"):
            edit_all(Recipe.model_validate(told), tmp_path)
    assert not (tmp_path / "apis" / "ledger.jsonl").exists()


@pytest.mark.parametrize("key", ["", "  ", "two words", "line\nbreak", "\x1b[31mred", "schlüssel"])
def test_what_is_no_key_is_not_sent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ApiError, match="OPENAI_API_KEY") as caught:
        key_of("openai")
    assert not key.strip() or key not in str(caught.value)


# -- servers --


def test_what_a_server_says_cannot_rewrite_a_terminal_or_a_log(tmp_path: Path) -> None:
    paid = Paid(ApiSection(per_minute=1e6), tmp_path)
    request = Request(provider="openai", kind="edit", model="m", content={})
    answer = paid.ask(request, lambda: Reply(refused=f"no\x1b[2J\r\n::error::owned {KEY}" + "x" * 10_000))
    assert answer.refused is not None
    assert answer.refused.isprintable()
    assert answer.refused.isascii()
    assert "::" not in answer.refused
    assert KEY not in answer.refused
    assert len(answer.refused) < 500


LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    st.sampled_from(["", "x", "aGk=", "image/png", "STOP", "SAFETY", "\ud800", "7"]),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
)
USAGE = {"promptTokenCount": 3, "candidatesTokenCount": 4, "thoughtsTokenCount": 1}
DRAWN = [{"modality": "IMAGE", "tokenCount": 3}]
HONEST: dict[tuple[str, str], dict[str, Any]] = {
    ("openai", "edit"): {
        "created": 1, "data": [{"b64_json": "aGk=", "url": "http://h/1.png"}], "output_format": "png",
        "usage": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7},
    },
    ("openai", "score"): {
        "choices": [{"message": {"content": "{}", "refusal": None}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    },
    ("gemini", "edit"): {
        "candidates": [
            {"content": {"parts": [{"inlineData": {"mimeType": "image/png", "data": "aGk="}, "text": "x"}]},
             "finishReason": "STOP"},
        ],
        "promptFeedback": {"blockReason": "SAFETY"},
        "usageMetadata": {**USAGE, "candidatesTokensDetails": DRAWN},
    },
    ("gemini", "score"): {
        "candidates": [{"content": {"parts": [{"text": "{}", "thought": False}]}, "finishReason": "STOP"}],
        "promptFeedback": {"blockReason": "SAFETY"},
        "usageMetadata": USAGE,
    },
}  # fmt: skip


def spoilt(value: Any) -> st.SearchStrategy[Any]:
    """Draw an answer with parts that are left out, or something else altogether."""
    if isinstance(value, dict):
        parts = st.fixed_dictionaries({}, optional={name: spoilt(one) for name, one in value.items()})
    elif isinstance(value, list):
        parts = st.lists(spoilt(value[0]), max_size=2)
    elif isinstance(value, int):
        parts = st.sampled_from([value, 0, -1_000_000, 10**30, None, True, 1.5, "3"])
    else:
        parts = st.just(value)
    return st.one_of(st.just(value), parts, parts, parts, JSON)


@pytest.fixture(scope="module")
def speaking() -> Iterator[Vendor]:
    with Vendor(key="none") as vendor:
        yield vendor


@functools.cache
def asking(provider: str, kind: str, vendor: Vendor) -> Callable[[], Reply]:
    """Return what asks a vendor once, by its SDK, which takes a while to make a client."""
    endpoint = getattr(vendor, provider)
    if kind == "edit":
        section = SynthesisSection(provider=provider, model="m", endpoint=endpoint, license="X")
        editor = {"openai": OpenAiEditor, "gemini": GeminiEditor}[provider](section, 60)
        return lambda: editor.edit(b"png", Prompt(identity="a", expression="b"))
    scoring = ScoringSection(scorer=provider, model="m", endpoint=endpoint, license="X")
    scorer = {"openai": OpenAiVendor, "gemini": GeminiVendor}[provider](scoring, 60)
    question = Question(system="s", text="t", png=b"png", schema={}, temperature=0.0, seed=0)
    return lambda: scorer.ask(question)


EXPECTED = Usage(input_tokens=1000, output_tokens=1000, images=1)
RESERVED = 0.05 + 0.01 + 0.04


@pytest.mark.parametrize(("provider", "kind"), HONEST)
@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_server_says_it_is_counted_and_an_answer_is_paid_once(
    provider: str,
    kind: str,
    speaking: Vendor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, "none")
    body = json.dumps(data.draw(spoilt(HONEST[provider, kind]))).encode()
    speaking.route(".*", lambda asked: Told(body=body))
    prices = {"m": PriceSection(image=0.05, input=10, output=40)}
    folder, clock = tmp_path_factory.mktemp("said"), Clock(sleep=lambda seconds: None, ticks=lambda: 1e9)
    paid = Paid(ApiSection(requests=1000, per_minute=1e6, prices=prices), folder, run="r", clock=clock)
    request = Request(provider=provider, kind=kind, model="m", content={}, expected=EXPECTED)  # type: ignore[arg-type]
    before, send = len(speaking.log), asking(provider, kind, speaking)
    try:
        first = paid.ask(request, send)
    except ApiError:
        assert paid.kept(request) is None
    else:
        sent = len(speaking.log)
        again = paid.ask(request, send)
        assert (again.reused, again.reply, len(speaking.log)) == (True, first.reply, sent)
    taken = paid.lines()
    assert len(taken) == paid.spent().requests == len(speaking.log) - before
    for line in taken:
        assert line.usd is not None
        assert min(line.usage.input_tokens, line.usage.output_tokens) >= 0
        least = {"yes": 0.0, "no": 0.0, "unsure": RESERVED}[line.billed]
        assert least - 1e-9 <= line.usd


def test_a_bomb_costs_no_memory(tmp_path: Path, folder: Path) -> None:
    import tracemalloc

    with images(Vendor(), lambda picture, prompt: bomb()) as vendor:
        recipe = recipe_for("gemini", folder, vendor)
        tracemalloc.start()
        edit_all(recipe, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(vendor.log) == 4 * 3
    assert peak < 60 << 20


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", ["endless", "packed"])
def test_an_answer_without_end_is_left(kind: str, provider: str, tmp_path: Path, folder: Path) -> None:
    with images(Vendor({1: Fault(kind=kind)}), darker) as vendor:
        edit_all(recipe_for(provider, folder, vendor), tmp_path)
        assert len(vendor.log) == 5
        assert vendor.log[0].sent < 160 << 20
    first = next(iter(Ledger(tmp_path / "apis").lines()))
    assert (first.status, first.billed) == ("malformed", "unsure")


# -- folders of portraits --


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png", "..\\secret.png"])
def test_a_list_points_to_nothing_outside(name: str, tmp_path: Path, folder: Path) -> None:
    portraits(tmp_path, "secret.png")
    (folder / "people.jsonl").write_text(json.dumps({"image": name, "identity": "x"}))
    with Vendor() as vendor, pytest.raises(DataError, match="not a path inside the folder"):
        portraits_of(recipe_for("gemini", folder, vendor))


@pytest.mark.parametrize("link", ["file", "directory", "list", "license"])
def test_links_in_the_folder_are_not_followed(link: str, tmp_path: Path, folder: Path) -> None:
    outside = portraits(tmp_path / "outside", "secret.png")
    (outside / "people.jsonl").write_text(json.dumps({"image": "anna.png", "identity": "stolen"}))
    (outside / "license.txt").write_text("Secret-1.0")
    names = {
        "file": ("linked.png", "secret.png"),
        "directory": ("linked", ""),
        "list": ("people.jsonl", "people.jsonl"),
        "license": ("license.txt", "license.txt"),
    }
    name, target = names[link]
    (folder / name).symlink_to(outside / target)
    with Vendor() as vendor:
        recipe = recipe_for("gemini", folder, vendor)
    if link in ("file", "list"):
        with pytest.raises(DataError, match=r"symbolic link|no plain file"):
            portraits_of(recipe)
    else:
        found = portraits_of(recipe)
        assert {one.identity for one in found} == {"anna", "ben"}
        assert {one.license for one in found} == {"CC0-1.0"}


PORTRAITS = {"bomb": bomb(), "words": b"no picture", "cut": b"\x89PNG\r\n\x1a\n\x00\x00", "empty": b""}


@pytest.mark.parametrize("case", PORTRAITS)
def test_hostile_portraits_are_refused_before_anything_is_paid(
    case: str, tmp_path: Path, folder: Path
) -> None:
    (folder / "carl.png").write_bytes(PORTRAITS[case])
    with images(Vendor(), darker) as vendor:
        with pytest.raises(DataError, match=r"nothing was paid:\n.*carl\.png"):
            edit_all(recipe_for("gemini", folder, vendor), tmp_path)
        assert vendor.log == []


def test_where_a_portrait_was_taken_is_not_sent(tmp_path: Path, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken in the secret garden"
    Image.new("RGB", (40, 40), "red").save(folder / "carl.jpg", exif=exif, comment=b"secret comment")
    with images(Vendor(), darker) as vendor:
        edit_all(recipe_for("openai", folder, vendor), tmp_path)
    assert len(vendor.log) == 6
    assert not [one for one in vendor.log if b"secret" in one.asked.body]

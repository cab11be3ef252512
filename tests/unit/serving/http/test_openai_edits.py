"""OpenAI's own client speaks to the service: answers, streams, and its typed exceptions."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fakes.backends import FACTS, DrawingBackend, digest_of
from registry.errors import LicenseRefused, NetworkError, Revoked
from serving.backend import AdapterStatus
from serving.errors import NotServed, Overloaded
from serving.http.answers import Invalid
from serving.http.prompts import parse_prompt


@pytest.fixture
def api(served: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def opened(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_an_edit(api: openai.OpenAI, picture: bytes) -> None:
    answer = api.images.edit(image=("a.png", picture), prompt="happy=0.8, surprised=0.3",
                             model="pixelsmile@prod")  # fmt: skip
    assert answer.data is not None
    (one,) = answer.data
    assert opened(one.b64_json).size == (64, 64)
    assert one.revised_prompt == "happy=0.8, surprised=0.3"
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")


def test_it_names_the_adapter_in_headers(api: openai.OpenAI, picture: bytes) -> None:
    raw = api.images.with_raw_response.edit(image=picture, prompt="happy")
    assert raw.headers["adapter-version"] == "1"
    assert raw.headers["adapter-digest"] == str(digest_of(1))
    assert raw.request_id


def test_several_pictures_have_several_seeds(
    api: openai.OpenAI, backend: DrawingBackend, picture: bytes
) -> None:
    answer = api.images.edit(image=picture, prompt="happy", n=3, extra_body={"seed": 5, "steps": 2})
    assert answer.data is not None
    assert [one.model_extra["seed"] for one in answer.data if one.model_extra] == [5, 6, 7]
    assert len({one.b64_json for one in answer.data}) == 3
    ((request, _),) = backend.asked
    assert (request.seeds, request.steps) == ((5, 6, 7), 2)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats_and_sizes(api: openai.OpenAI, picture: bytes, kind: Any) -> None:
    answer = api.images.edit(image=picture, prompt="sad", output_format=kind, size="96x64")  # type: ignore[call-overload]
    assert answer.data is not None
    made = opened(answer.data[0].b64_json)
    assert (made.format, made.size) == (kind.upper(), (96, 64))
    assert answer.size == "96x64"


def test_a_list_of_one_picture_is_a_picture(api: openai.OpenAI, picture: bytes) -> None:
    assert api.images.edit(image=[picture], prompt="happy").data


def test_a_list_of_two_is_refused(api: openai.OpenAI, picture: bytes) -> None:
    with pytest.raises(openai.BadRequestError, match="2 pictures were sent; one is edited"):
        api.images.edit(image=[picture, picture], prompt="happy")


def test_a_stream_has_previews(api: openai.OpenAI, picture: bytes) -> None:
    stream = api.images.edit(image=picture, prompt="happy", stream=True, partial_images=2)
    told = list(stream)
    assert [event.type for event in told] == [*["image_edit.partial_image"] * 2, "image_edit.completed"]
    assert [event.partial_image_index for event in told[:2]] == [0, 1]  # type: ignore[union-attr]
    assert all(opened(event.b64_json).size == (64, 64) for event in told)
    assert told[-1].usage.total_tokens == 0  # type: ignore[union-attr]
    plain = api.images.edit(image=picture, prompt="happy")
    assert plain.data is not None
    assert told[-1].b64_json == plain.data[0].b64_json


def test_an_error_in_a_stream_is_raised(api: openai.OpenAI, backend: DrawingBackend, picture: bytes) -> None:
    backend.failure = Revoked("the adapter was revoked", "use another")
    stream = api.images.edit(image=picture, prompt="happy", stream=True)
    with pytest.raises(openai.APIError, match="the adapter was revoked"):
        list(stream)


ERRORS = [
    (NotServed("no such adapter", "use another"), openai.NotFoundError, "not_served"),
    (Revoked("revoked", "use another"), openai.APIStatusError, "revoked"),
    (LicenseRefused("the licence forbids it", "use another"), openai.ConflictError, "license_refused"),
    (Overloaded("full", "wait", 2.0), openai.RateLimitError, "overloaded"),
    (NetworkError("the registry is away", "wait"), openai.InternalServerError, "network_error"),
    (RuntimeError("broken"), openai.InternalServerError, "internal_error"),
]


@pytest.mark.parametrize(("error", "kind", "code"), ERRORS)
def test_errors_have_its_types(
    api: openai.OpenAI, backend: DrawingBackend, picture: bytes, error: Exception,
    kind: type[openai.APIStatusError], code: str,
) -> None:  # fmt: skip
    backend.refusal = error
    with pytest.raises(kind) as caught:
        api.images.edit(image=picture, prompt="happy")
    assert caught.value.code == code
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["mend"]


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": "make her smile, please"}, "prompt"),
    ({"prompt": "happy=much"}, "prompt"),
    ({"prompt": "happy=0.1, happy=0.2"}, "prompt"),
    ({"n": 11}, "n"),
    ({"n": 2, "stream": True}, "n"),
    ({"size": "big"}, "size"),
    ({"size": "4x4"}, "size"),
    ({"quality": "high"}, "quality"),
    ({"background": "transparent"}, "background"),
    ({"response_format": "url"}, "response_format"),
    ({"output_format": "gif"}, "output_format"),
    ({"extra_body": {"wish": "1"}}, "wish"),
    ({"mask": b"a file"}, "mask"),
    ({"model": "gpt-image-2"}, None),
    ({"image": b"no picture"}, None),
]


@pytest.mark.parametrize(("asked", "param"), WRONG)
def test_what_is_wrong_is_a_bad_request(
    api: openai.OpenAI, backend: DrawingBackend, picture: bytes, asked: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.images.edit(**{"image": picture, "prompt": "happy", **asked})
    assert caught.value.param == param
    assert not backend.asked


def test_models_are_listed(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["pixelsmile@prod"]
    assert api.models.retrieve("pixelsmile@prod").owned_by == "adapter-foundry"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other@prod")


def test_a_full_queue_comes_first(client: TestClient, backend: DrawingBackend) -> None:
    backend.full = 1.0
    answer = client.post("/v1/images/edits", data={"nonsense": "1"}, files={"wish": b"1"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


STATUS = AdapterStatus(reference="pixelsmile@prod", followed=True, state="ready", facts=FACTS)
PROMPTS: list[tuple[str, dict[str, float]]] = [
    ("happy", {"happy": 1.0}),
    (" happy = 0.5 ", {"happy": 0.5}),
    ("happy=.5,sad=1", {"happy": 0.5, "sad": 1.0}),
    ("show a happy expression", {"happy": 1.0}),
    ("show a happy=0.8, surprised=0.3 expression", {"happy": 0.8, "surprised": 0.3}),
    ("neutral", {}),
    ("show a neutral expression", {}),
    ("happy=-1", {"happy": -1.0}),
]


@pytest.mark.parametrize(("prompt", "expressions"), PROMPTS)
def test_what_a_prompt_means(prompt: str, expressions: dict[str, float]) -> None:
    assert parse_prompt(prompt, STATUS) == expressions


def test_an_expression_without_an_intensity_has_one_that_is_signed() -> None:
    gentle = replace(STATUS, facts={**FACTS, "strength_max": 0.8})
    assert parse_prompt("happy, sad=0.3", gentle) == {"happy": 0.8, "sad": 0.3}


@pytest.mark.parametrize(
    "prompt",
    ["smile", "show a expression", "happy sad", ",", "happy=", "happy=1e9", "happy=nan", "=1", "a=" * 400],
)
def test_what_a_prompt_cannot_mean(prompt: str) -> None:
    with pytest.raises(Invalid, match="prompt"):
        parse_prompt(prompt, STATUS)


def test_a_hostile_prompt_costs_nothing() -> None:
    began = time.thread_time()
    for prompt in (" " * 999 + "!", "happy" + " " * 990 + "=", "0" * 1000, "=" * 1000, "," * 999):
        with pytest.raises(Invalid):
            parse_prompt(prompt, STATUS)
    assert time.thread_time() - began < 5, "a pattern that tries everything takes hours"

"""Vision-language models on 127.0.0.1 that score faces: OpenAI's chat completions and Gemini's text answers.

They are endpoints of `fakes.vendors.Vendor`. What is asked is checked as the vendors check it (a strict
schema, a picture that can be decoded); what is answered comes from the picture that was sent, by a function
from its pixels and the seed to twelve numbers and a confidence.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fakes.vendors import Asked, Told, Vendor
from trainer.data.blobs import Blobs, encode_png
from trainer.portraits.expressions import EXPRESSIONS
from trainer.portraits.renderer import identity, one_hot, pose, render

INPUT_TOKENS = 2500
OUTPUT_TOKENS = 150

See = Callable[[np.ndarray, int], Mapping[str, float]]
"""From pixels, uint8 [H, W, 3], and the seed to an intensity of each expression and a confidence."""

ODD = {
    "prose": lambda value: "The person looks rather happy to me, about 0.8.",
    "fenced": lambda value: f"```json\n{json.dumps(value)}\n```",
    "missing": lambda value: json.dumps({k: v for k, v in value.items() if k != "fear"}),
    "range": lambda value: json.dumps({**value, "happy": 1.5}),
    "negative": lambda value: json.dumps({**value, "happy": -0.01}),
    "nan": lambda value: json.dumps({**value, "happy": float("nan")}),
    "infinite": lambda value: json.dumps({**value, "happy": "much"}).replace('"much"', "1e999"),
    "string": lambda value: json.dumps({**value, "happy": "0.5"}),
    "true": lambda value: json.dumps({**value, "happy": True}),
    "null": lambda value: json.dumps({**value, "happy": None}),
    "extra": lambda value: json.dumps({**value, "<script>alert(1)</script>": 0.5}),
    "twice": lambda value: json.dumps(value)[:-1] + ', "happy": 0.0}',
    "list": lambda value: json.dumps(list(value.values())),
    "nested": lambda value: "[" * 2000 + "]" * 2000,
    "long": lambda value: json.dumps(value) + " " * 5000,
    "empty": lambda value: "",
    "half": lambda value: json.dumps(value)[: len(json.dumps(value)) // 2],
}
"""Answers that are none, as text, from the honest one. A fault of that name makes them."""

REFUSAL = "I cannot <b>help</b> with that\x1b[31m\n::error::"


def vlm(vendor: Vendor, see: See) -> Vendor:
    """Let a vendor score faces.

    Understood faults: the keys of `ODD`; "cut" (half of the JSON, ended at the limit of tokens); "refusal"
    (an answer that is a refusal); "filter" (the vendor's own filter); "nothing" (no choice or candidate).
    """
    vendor.route(r"/v1(beta)?/models/[^/]+:generateContent", lambda asked: _gemini(asked, see))
    return vendor.route(r"/v1/chat/completions", lambda asked: _openai(asked, see))


def _openai(asked: Asked, see: See) -> Told:
    value = asked.json
    form = value.get("response_format", {})
    schema = form.get("json_schema", {}).get("schema", {})
    if form.get("type") != "json_schema" or not _strict(schema):
        error = {"message": "Invalid schema for response_format", "type": "invalid_request_error",
                 "param": "response_format", "code": None}  # fmt: skip
        return Told(body=json.dumps({"error": error}).encode(), status=400)
    user = value["messages"][-1]["content"]
    (url,) = [part["image_url"]["url"] for part in user if part["type"] == "image_url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    text, finish = _text(asked, base64.b64decode(data), int(value.get("seed", 0)), see)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if asked.fault == "refusal":
        message, finish = {"role": "assistant", "content": None, "refusal": REFUSAL}, "stop"
    elif asked.fault == "filter":
        message["content"], finish = "", "content_filter"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    whole = {
        "id": f"chatcmpl-{asked.number}",
        "object": "chat.completion",
        "created": 1,
        "model": value["model"],
        "choices": [] if asked.fault == "nothing" else [choice],
        "usage": {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS,
                  "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS},
    }  # fmt: skip
    return _told(whole, value["model"])


def _gemini(asked: Asked, see: See) -> Told | None:
    value = asked.json
    config = value.get("generationConfig", {})
    if config.get("responseMimeType") != "application/json":
        return None  # it asks for a picture
    if not _strict(config.get("responseJsonSchema", {})):
        error = {"code": 400, "message": "Invalid JSON schema", "status": "INVALID_ARGUMENT"}
        return Told(body=json.dumps({"error": error}).encode(), status=400)
    parts = [part for content in value["contents"] for part in content["parts"]]
    (inline,) = [part["inlineData"] for part in parts if "inlineData" in part]
    # Protocol buffers in JSON may be spelled either way, and so may base64.
    assert (inline.get("mimeType") or inline.get("mime_type")) == "image/png"
    picture = base64.b64decode(inline["data"].translate(str.maketrans("-_", "+/")))
    text, finish = _text(asked, picture, int(config.get("seed", 0)), see)
    usage = {
        "promptTokenCount": INPUT_TOKENS,
        "candidatesTokenCount": OUTPUT_TOKENS - 50,
        "thoughtsTokenCount": 50,
        "totalTokenCount": INPUT_TOKENS + OUTPUT_TOKENS,
    }
    model = asked.path.rpartition("/")[2].partition(":")[0]
    whole: dict[str, Any] = {"usageMetadata": usage, "modelVersion": model}
    if asked.fault == "filter":
        whole["promptFeedback"] = {"blockReason": "PROHIBITED_CONTENT"}
    elif asked.fault == "refusal":
        whole["candidates"] = [{"index": 0, "finishReason": "SAFETY", "content": {"role": "model"}}]
    elif asked.fault != "nothing":
        reason = {"stop": "STOP", "length": "MAX_TOKENS"}[finish]
        content = {"role": "model", "parts": [{"text": text}]}
        whole["candidates"] = [{"index": 0, "finishReason": reason, "content": content}]
    return _told(whole, model)


def _text(asked: Asked, picture: bytes, seed: int, see: See) -> tuple[str, str]:
    """Return what is said, and why it ended."""
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(picture), formats=["PNG"]).convert("RGB"))
    value = dict(see(pixels, seed))
    if asked.fault == "cut":
        return ODD["half"](value), "length"
    return ODD.get(asked.fault, json.dumps)(value), "stop"


def _strict(schema: Mapping[str, Any]) -> bool:
    """Return whether a schema is one that strict structured output takes."""
    named = set(schema.get("properties", ()))
    return (
        bool(named) and set(schema.get("required", ())) == named and schema["additionalProperties"] is False
    )


def _told(value: Any, model: str) -> Told:
    body = json.dumps(value).encode()
    return Told(body=body, model=model, input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS)


# -- pictures to look at ---------------------------------------------------------------------------------


def answer(scores: Mapping[str, float], confidence: float = 0.9) -> dict[str, float]:
    """Return an honest answer with some scores, the others 0."""
    return {**dict.fromkeys(EXPRESSIONS, 0.0), **scores, "confidence": confidence}


def faces(count: int, size: int = 64) -> list[tuple[np.ndarray, str | None, float]]:
    """Return pictures of different people with what they show and how much of it; the first is neutral."""
    asked = [(None, 0.0), *((name, level) for level in (1.0, 0.5) for name in EXPRESSIONS)]
    found = []
    for number in range(count):
        name, level = asked[number % len(asked)]
        person = identity(70_000 + number, "human")
        pixels = render(person, one_hot(name or "neutral", level), size, pose(70_000 + number))
        found.append((pixels, name, level))
    return found


def images_folder(folder: Path, count: int, refused: int = 0) -> list[np.ndarray]:
    """Write the output of a synthesis: some pictures, then some requests that were refused.

    Returns:
        the pixels of the pictures.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    drawn, rows = faces(count), []
    blobs = Blobs(folder / "blobs")
    for number, (pixels, name, level) in enumerate(drawn):
        digest = str(blobs.add(encode_png(pixels), "image/png"))
        rows.append({"number": number, "image": digest, "expression": name, "intensity": level})
    for number in range(count, count + refused):
        rows.append({"number": number, "image": None, "expression": "happy", "intensity": 1.0})
    kinds = {"number": pa.int32(), "image": pa.string(), "expression": pa.string(), "intensity": pa.float32()}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(kinds.items())), folder / "images.parquet")
    return [pixels for pixels, _, _ in drawn]


def knowing(pictures: list[np.ndarray]) -> See:
    """Return a model that knows the truth of `faces` by their pixels, small ones and enlarged ones."""
    truth = {
        pixels.tobytes(): answer({name: level} if name else {})
        for pixels, name, level in faces(len(pictures))
    }
    return lambda pixels, _seed: truth[pixels.tobytes()]

"""Scoring with a vision-language model: asked n times, told what was wrong, never believed without a check.

Each question is a paid request with its own address: picture, rubric, schema, model, number of the sample,
number of the attempt and what was wrong before. So a run that was killed pays nothing twice, and an answer
that was no answer is paid, kept and counted once. Neither names nor files nor the asked expression are told,
and the picture is sent without metadata: all that can reach the model is pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Protocol

from registry.digest import digest_bytes
from registry.manifest import Ingredient, canonical_json
from trainer.apis import Reply, Request, Usage
from trainer.apis.parallel import in_threads
from trainer.portraits.expressions import EXPRESSIONS
from trainer.scoring.agreement import combine
from trainer.scoring.answer import MAX_CHARACTERS, BadAnswer, Sample, parse, schema
from trainer.scoring.rubric import rubric
from trainer.scoring.scorer import Picture, Scored, quarantined

if TYPE_CHECKING:
    from trainer.apis import Paid
    from trainer.sections import ScoringSection

REASKS = 2
"""So often a question is asked again after an answer that is none."""
MAX_SIDE = 1024
"""Longest side of what is sent, in pixels; larger pictures are made smaller (Lanczos)."""
MAX_TOKENS = 4096
"""Of one answer; thirteen numbers take 150, models that think take the rest."""
EXPECTED = Usage(input_tokens=6000, output_tokens=MAX_TOKENS)
"""What one score takes at most: the rubric 2,200 tokens, a picture of 1024 pixels up to 3,000."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What a vendor is asked.

    Attributes:
        system: rules and rubric.
        text: what goes with the picture.
        png: the picture.
        schema: JSON Schema of the answer.
        temperature: None leaves it to the model.
        seed: another one for each sample.
    """

    system: str
    text: str
    png: bytes
    schema: dict[str, object]
    temperature: float | None
    seed: int


class Vendor(Protocol):
    """Asks a model of one vendor's protocol."""

    provider: str
    """Its word in requests and in the ledger."""

    def ask(self, question: Question) -> Reply:
        """Return the answer, unchecked, as `reply` packs it.

        Raises:
            Failed: no answer came.
        """


def reply(text: str | None, *, cut: bool, usage: Usage | None, refused: str | None = None) -> Reply:
    """Return what a model said as the reply that is kept.

    Args:
        text: of the answer; None if there is none. No more is kept than shows that it is too long.
        cut: it ended at `MAX_TOKENS`.
        usage: tokens; None if the vendor does not say.
        refused: why the model does not answer.
    """
    said = {"text": (text or "")[: MAX_CHARACTERS + 1], "cut": cut}
    return Reply(
        body=b"" if refused is not None else json.dumps(said).encode(),
        media_type="application/json",
        input_tokens=usage.input_tokens if usage else 0,
        output_tokens=usage.output_tokens if usage else 0,
        refused=refused,
        counted=usage is not None,
    )


class VlmScorer:
    """`Scorer` that asks a model.

    Args:
        settings: model, endpoint, samples, temperature, and how far samples may differ.
        vendor: speaks its protocol.
        paid: asks, keeps and counts.
        parallel: pictures that are asked about at the same time.
    """

    expressions = EXPRESSIONS

    def __init__(self, settings: ScoringSection, vendor: Vendor, paid: Paid, parallel: int) -> None:
        self._settings, self._vendor, self._paid, self._parallel = settings, vendor, paid, parallel
        self.name = name_of(settings)
        self.ingredient = Ingredient(
            name=str(settings.model),
            kind="api",
            license=str(settings.license),
            source=f"scored the pictures; {settings.scorer} at {settings.endpoint or 'its own address'}",
        )

    @cached_property
    def _schema(self) -> str:
        return digest_bytes(canonical_json(schema()))

    def __call__(self, pictures: Sequence[Picture]) -> list[Scored]:
        """See `Scorer`."""
        return in_threads(self._look, pictures, self._parallel)

    def _look(self, picture: Picture) -> Scored:
        """Return what all samples say about one picture; the first that fails ends it and saves the rest."""
        png = cache(lambda: encode(picture))
        samples = []
        for number in range(self._settings.samples):
            found = self._sample(picture, png, number)
            if isinstance(found, str):
                return quarantined(found)
            samples.append(found)
        return combine(samples, self._settings.max_disagreement)

    def _sample(self, picture: Picture, png: Callable[[], bytes], number: int) -> Sample | str:
        """Return one accepted answer, or why there is none."""
        wrong: str | None = None
        for attempt in range(1 + REASKS):
            answer = self._paid.ask(
                self._request(picture, number, attempt, wrong),
                lambda wrong=wrong: self._vendor.ask(self._question(png(), number, wrong)),
            )
            if answer.refused is not None:
                return f"no answer: {answer.refused}"  # the model's words, made one harmless line by `Paid`
            try:
                return _accepted(answer.body)
            except BadAnswer as bad:
                wrong = str(bad)
        return f"asked {1 + REASKS} times without an answer that holds: {wrong}"

    def _request(self, picture: Picture, number: int, attempt: int, wrong: str | None) -> Request:
        content = {
            "image": picture.digest,
            "side": MAX_SIDE,
            "rubric": rubric().digest,
            "schema": self._schema,
            "temperature": self._settings.temperature,
            "tokens": MAX_TOKENS,
            "sample": number,
            "attempt": attempt,
            "wrong": wrong,
        }
        return Request(
            provider=self._vendor.provider,
            kind="score",
            model=str(self._settings.model),
            endpoint=self._settings.endpoint,
            content=content,
            expected=EXPECTED,
        )

    def _question(self, png: bytes, number: int, wrong: str | None) -> Question:
        told = rubric()
        text = told.question
        if wrong is not None:
            text += f"\nYour answer before was not accepted: {wrong}. Answer with the JSON object alone."
        return Question(
            system=told.system,
            text=text,
            png=png,
            schema=schema(),
            temperature=self._settings.temperature,
            seed=number,
        )


def name_of(settings: ScoringSection) -> str:
    """Return the name of a model's scores: provider, model, and a digest of how it is asked."""
    how = {
        "rubric": rubric().digest,
        "endpoint": settings.endpoint,
        "temperature": settings.temperature,
        "samples": settings.samples,
        "side": MAX_SIDE,
    }
    return f"{settings.scorer}/{settings.model}/{digest_bytes(canonical_json(how)).hex[:12]}"


def encode(picture: Picture) -> bytes:
    """Return the pixels of a picture as a PNG without metadata, its longest side at most `MAX_SIDE`."""
    from PIL import Image

    from trainer.data.blobs import encode_png

    pixels = picture.pixels()
    longest = max(pixels.shape[:2])
    if longest > MAX_SIDE:
        import numpy as np

        size = [max(1, round(side * MAX_SIDE / longest)) for side in (pixels.shape[1], pixels.shape[0])]
        pixels = np.asarray(Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.LANCZOS))
    return encode_png(pixels)


def _accepted(body: bytes) -> Sample:
    """Return the sample in a kept reply.

    Raises:
        BadAnswer: it is none.
    """
    said = json.loads(body)
    if said["cut"]:
        raise BadAnswer(f"the answer was cut off after {MAX_TOKENS} tokens")
    return parse(said["text"])

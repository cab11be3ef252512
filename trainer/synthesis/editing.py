"""The generator that has a paid API put expressions on people's portraits."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from registry.digest import Digest
from registry.errors import shown
from trainer.apis import Answer, Paid, Reply, Request, Usage, run_of
from trainer.apis.paid import Clock
from trainer.apis.transport import unreadable
from trainer.errors import DataError
from trainer.progress import Progress, silent
from trainer.recipe import Recipe
from trainer.synthesis.people import (
    Portrait,
    all_of,
    open_portrait,
    people_digest,
    pixels_digest,
    portraits_of,
)
from trainer.synthesis.prompts import Prompt, prompts
from trainer.synthesis.renderer import faces
from trainer.synthesis.source import Made, PortraitRequest

if TYPE_CHECKING:
    from PIL import Image

FORMAT = 1
EXPECTED: Mapping[str, Usage] = {
    "gemini": Usage(input_tokens=3000, output_tokens=3000, images=1),
    "openai": Usage(input_tokens=7000, output_tokens=6300, images=1),
}
"""What one edit takes at most. Gemini's models think in words before they draw; OpenAI's bill pictures by
tokens: 6,240 for 1024x1536 in high quality, and as many for a portrait that is looked at in high fidelity."""

_SHOWN = 20
_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


class Vendor(Protocol):
    """An API that edits pictures."""

    def edit(self, portrait: bytes, prompt: Prompt) -> Reply:
        """Ask once for an edit of a PNG.

        Raises:
            Failed: no answer came, or none that can be read.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class _Upload:
    """A portrait as it is sent: a PNG without metadata, its size in pixels."""

    png: bytes
    width: int
    height: int


class EditingApi:
    """`Generator` that asks an image-edit API; what was answered once is not paid again.

    Args:
        recipe: has the people, the prompts and the model.
        data_folder: answers and ledger lie in its ``apis``.
        progress: is told while the portraits are looked at.
        clock: time and chance, for waits between attempts.
    """

    def __init__(
        self,
        recipe: Recipe,
        data_folder: Path,
        progress: Progress = silent,
        clock: Clock | None = None,
    ) -> None:
        assert recipe.synthesis is not None  # `combinations` refuses such a recipe
        self._recipe, self._section, self._progress = recipe, recipe.synthesis, progress
        self._folder = Path(recipe.data.path or "")
        self._prompts = prompts(recipe)
        self.paid = Paid(recipe.running.api, data_folder / "apis", run=run_of(recipe), clock=clock)
        self.name = f"{self._section.provider}/{self._section.model}"
        self.parallel = recipe.running.api.parallel
        self.origin = f"portraits from {shown(self._folder.name)}, expressions by {self.name}"
        self._lock, self._vendor = threading.Lock(), cast(Vendor | None, None)

    @functools.cached_property
    def _portraits(self) -> list[Portrait]:
        return portraits_of(self._recipe)

    @property
    def license(self) -> str:
        """See `Generator`."""
        return all_of([*(one.license for one in self._portraits), self._section.license])

    def inputs(self) -> Mapping[str, Any]:
        """See `Generator`."""
        section = self._section.model_dump(
            mode="json", include={"provider", "model", "endpoint", "resolution", "options", "license"}
        )
        return {
            "source": self.name,
            "people": people_digest(self._portraits),
            "synthesis": section,
            "prompts": [[*face, prompt.text] for face, prompt in self._prompts.items()],
        }

    def plan(self) -> list[PortraitRequest]:
        """See `Generator`."""
        found, problems = list[PortraitRequest](), list[str]()
        for number, one in enumerate(self._portraits, 1):
            try:
                pixels = pixels_digest(open_portrait(self._folder, one.place, one.digest))
            except DataError as error:
                problems.append(error.message)
                continue
            both = all_of([one.license, self._section.license])
            found += [
                PortraitRequest(
                    split=one.split,
                    identity=one.identity,
                    pose=one.number,
                    expression=expression,
                    intensity=intensity,
                    license=one.license if expression is None else both,
                    portrait=one.place,
                    pixels=pixels,
                )
                for expression, intensity in faces(self._recipe)
            ]
            if number % 20 == 0:
                self._progress("synthesise", number, len(self._portraits), "portraits")
        if problems:
            more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            lines = ["some portraits cannot be used; nothing was paid:", *problems[:_SHOWN], *more]
            raise DataError("\n".join(lines), "take them out of the folder, or put better ones there")
        return found

    def ready(self, request: PortraitRequest) -> bool:
        """See `Generator`."""
        return request.expression is None or self.paid.has(self._request(request)[0])

    def make(self, request: PortraitRequest) -> Made:
        """See `Generator`."""
        upload = _upload(self._folder, request.portrait or "", request.pixels)
        if request.expression is None:
            return Made(
                data=upload.png,
                media_type="image/png",
                width=upload.width,
                height=upload.height,
                source=f"portraits/{shown(self._folder.name)}",
            )
        asked, prompt = self._request(request)
        answer = self.paid.kept(asked)
        if answer is None:
            # First of all: without a key or an SDK nothing is reserved.
            vendor = self._connected()
            answer = self.paid.ask(asked, lambda: _edited(vendor, upload.png, prompt))
        return self._made(answer, prompt)

    def taken(self, requests: Sequence[PortraitRequest]) -> dict[str, Any]:
        """Return what the edits of this run took until now, for people to read."""
        lines = [line for line in self.paid.lines() if line.kind == "edit"]
        paid = {line.request for line in lines}
        edits = {self._request(one)[0].digest for one in requests if one.expression is not None}
        return {
            "provider": self._section.provider,
            "model": self._section.model,
            "requests": len(lines),
            "reused": len(edits - paid),
            "usd": round(sum(line.usd or 0.0 for line in lines), 6),
        }

    def _made(self, answer: Answer, prompt: Prompt) -> Made:
        told = {"model": self._section.model, "prompt": prompt.text, "request": answer.request}
        if answer.refused is not None:
            return Made(data=None, refused=answer.refused, **told)
        picture, media_type = opened(answer.body)
        return Made(
            data=answer.body, media_type=media_type, width=picture.width, height=picture.height, **told
        )

    def _request(self, request: PortraitRequest) -> tuple[Request, Prompt]:
        assert request.expression is not None
        prompt, section = self._prompts[request.expression, request.intensity], self._section
        content = {
            "format": FORMAT,
            "portrait": request.pixels,
            "identity_prompt": prompt.identity,
            "expression_prompt": prompt.expression,
            "resolution": section.resolution,
            "options": dict(section.options),
        }
        asked = Request(
            provider=section.provider,
            kind="edit",
            model=section.model,
            endpoint=section.endpoint,
            content=content,
            expected=EXPECTED[section.provider],
            resolution=section.resolution,
        )
        return asked, prompt

    def _connected(self) -> Vendor:
        """Return the vendor; the SDK is loaded for the first edit that is not there."""
        with self._lock:
            if self._vendor is None:
                self._vendor = vendor_of(self._recipe)
            return self._vendor


@functools.lru_cache(maxsize=8)
def _upload(folder: Path, place: str, pixels: Digest | None) -> _Upload:
    """Return a portrait as it is sent; the pictures of a person are asked for one after the other."""
    picture = open_portrait(folder, place)
    if pixels_digest(picture) != pixels:
        raise DataError(
            f"the portrait {place!r} changed meanwhile", "start again with the portraits as they are"
        )
    return _Upload(png=_png(picture), width=picture.width, height=picture.height)


def _edited(vendor: Vendor, png: bytes, prompt: Prompt) -> Reply:
    """Ask once, and look whether a picture came."""
    from serving.errors import ImageRefused

    reply = vendor.edit(png, prompt)
    if reply.refused is None:
        try:
            opened(reply.body)
        except ImageRefused as error:
            counted = reply.usage if reply.counted else None
            raise unreadable(error.message, counted, delivered=True) from None
    return reply


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def opened(data: bytes) -> tuple[Image.Image, str]:
    """Return what a vendor sent, decoded under the limits of `serving.images`, and its media type.

    Raises:
        ImageRefused: it is no PNG, JPEG or WebP picture, damaged, or over a limit.
    """
    from serving.images import open_picture

    picture = open_picture(data)
    return picture, next(kind for start, kind in _SIGNATURES if data.startswith(start))


def vendor_of(recipe: Recipe) -> Vendor:
    """Return the API of a recipe.

    Raises:
        ApiError: there is no key, or its SDK is not installed.
    """
    section, limits = recipe.synthesis, recipe.running.api
    assert section is not None
    if section.provider == "gemini":
        from trainer.synthesis.gemini import GeminiEditor

        return GeminiEditor(section, limits.timeout)
    from trainer.synthesis.openai import OpenAiEditor

    return OpenAiEditor(section, limits.timeout)

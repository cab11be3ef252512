"""The adapter card that a trainer writes, and the manifest: the signed unit of the registry.

A manifest is stored as canonical JSON: keys sorted, no spaces, ASCII only, one line without a line break.
Its sha256 is the digest that every signature names. Parsing is strict: what does not give the very same bytes
when written again is refused, so that one digest has one meaning.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from registry.digest import Digest, FileEntry, digest_bytes
from registry.errors import InvalidDocument, UsageError, shown
from registry.reference import NAME_PATTERN

WEIGHTS_NAME: Final = "pytorch_lora_weights.safetensors"
CARD_NAME: Final = "adapter.json"
MAX_MANIFEST_BYTES: Final = 1 << 20
MAX_CARD_BYTES: Final = 1 << 20
MAX_RECIPE: Final = 1 << 18
MAX_SAID: Final = 300
MAX_MACHINES: Final = 64

_MAX_DEPTH = 8
_M = TypeVar("_M", bound=BaseModel)

# No control characters and no bidirectional overrides: what a person reads is what was signed.
_UNSEEN = r"\x7f-\x9f\u{200b}-\u{200f}\u{2028}-\u{202e}\u{2066}-\u{2069}"
Line = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_SAID, pattern=rf"^[^\x00-\x1f{_UNSEEN}]+$")
]
Text = Annotated[str, StringConstraints(max_length=8000, pattern=rf"^[^\x00-\x08\x0b-\x1f{_UNSEEN}]*$")]
Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9 _-]{0,63}$")]
ModuleName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$", max_length=200)
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseModelRef(_Model):
    """The base model that an adapter belongs to."""

    id: Annotated[
        str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
    ]
    revision: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    family: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    license: Line


class LoraFacts(_Model):
    """Shape of the low-rank update.

    ``alpha`` is the value of the training. The exported file has it folded into B, so that a loader applies
    B @ A as it stands. ``targets`` are the kinds of modules that carry an update, for example ``attn.to_q``.
    """

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0, le=8192)]
    targets: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=64)]
    dtype: Literal["F16", "BF16", "F32"]

    @field_validator("targets")
    @classmethod
    def _unique(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(targets)) != len(targets):
            raise ValueError("a target is named twice")
        return targets


class ConditioningSpec(_Model):
    """How expressions become prompts; signed, so that serving interpolates exactly as the training did.

    ``token_window`` is the half-open range of prompt tokens that are interpolated, or None for all of them.
    Strengths lie in [strength_min, strength_max].
    """

    template: Line
    neutral: Word = "neutral"
    expressions: Annotated[tuple[Word, ...], Field(min_length=1, max_length=64)]
    token_window: tuple[Annotated[int, Field(ge=0, le=4096)], Annotated[int, Field(ge=1, le=4096)]] | None = (
        None
    )
    strength_min: Annotated[float, Field(ge=-4, le=4)] = 0.0
    strength_max: Annotated[float, Field(ge=-4, le=4)] = 1.5

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.template.count("{}") != 1 or set(self.template.replace("{}", "")) & {"{", "}"}:
            raise ValueError("the template needs exactly one {} and no other braces")
        if len(set(self.expressions)) != len(self.expressions):
            raise ValueError("an expression is named twice")
        if self.neutral in self.expressions:
            raise ValueError("the neutral word cannot be an expression")
        if self.token_window is not None and self.token_window[0] >= self.token_window[1]:
            raise ValueError("the token window is empty")
        if self.strength_min >= self.strength_max:
            raise ValueError("strength_min must be below strength_max")
        return self

    def prompt(self, name: str) -> str:
        """Return the prompt of the expression ``name`` (or of the neutral word).

        Raises:
            UsageError: the adapter has no such expression.
        """
        if name != self.neutral and name not in self.expressions:
            raise UsageError(
                f"this adapter has no expression {shown(name)!r}",
                "choose from: " + ", ".join(self.expressions),
            )
        return self.template.replace("{}", name)


class Ingredient(_Model):
    """Something that went into the adapter, with the licence that it came under (an SPDX expression).

    An "auxiliary-model" looked at pictures during the training, as a face encoder in a loss does; a "judge"
    scored them before or after; an "api" made or scored them under its terms.
    """

    name: Line
    kind: Literal["base", "dataset", "identity-images", "judge", "auxiliary-model", "api", "adapter", "code"]
    license: Line
    source: Line
    digest: Digest | None = None


class Machine(_Model):
    """Where something was made, as far as it can change the last bit of a sum.

    Attributes:
        processor: its model.
        instructions: the widest that the kernels use, such as AVX512.
        accelerator: model of the GPU, or None where the processor did it all.
        processes: how many took part.
        threads: of the processor in each.
        python: its version.
        packages: versions of the libraries that compute, by name.
    """

    processor: Line
    instructions: Line
    accelerator: Line | None = None
    processes: Annotated[int, Field(ge=1, le=65_536)]
    threads: Annotated[int, Field(ge=1, le=65_536)]
    python: Line
    packages: Annotated[dict[Word, Line], Field(max_length=64)]


class Provenance(_Model):
    """What it takes to make the weights again, beside the lineage.

    Attributes:
        recipe: canonical JSON of what the recipe says; what it does not say is default.
        code: digest of the sources that make data and weights.
        machine: where they were made.
        earlier_machines: where the steps before were made, of a training that went on elsewhere. Absent
            from the JSON where there are none, as before there was such a field.
    """

    recipe: Annotated[str, StringConstraints(max_length=MAX_RECIPE, pattern=r"^[\x20-\x7e]+$")]
    code: Digest
    machine: Machine
    earlier_machines: Annotated[tuple[Machine, ...], Field(max_length=MAX_MACHINES)] = ()

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not self.earlier_machines:
            values.pop("earlier_machines", None)
        return values


class TrainingLineage(_Model):
    """What the weights were made from: enough to make them again.

    ``provenance`` came later. Where it is absent it is absent from the JSON, too, so that a document from
    before has the digest that it always had.
    """

    recipe: Digest
    dataset: Digest
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    steps: Annotated[int, Field(ge=1, le=100_000_000)]
    code_version: Line
    run_id: Line | None = None
    provenance: Provenance | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.provenance is None:
            values.pop("provenance", None)
        return values


class _Described(_Model):
    base: BaseModelRef
    lora: LoraFacts
    conditioning: ConditioningSpec
    license: Line
    ingredients: Annotated[tuple[Ingredient, ...], Field(min_length=1, max_length=256)]
    training: TrainingLineage
    description: Text = ""

    def canonical_bytes(self) -> bytes:
        """Return the one canonical JSON form of this document."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> Digest:
        """The sha256 digest of the canonical form."""
        return digest_bytes(self.canonical_bytes())


class AdapterCard(_Described):
    """What the trainer says about an adapter: ``adapter.json`` beside the weights."""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the card in ``data``; any JSON layout is fine, unknown and repeated keys are not.

        Raises:
            InvalidDocument: ``data`` is no adapter card.
        """
        return _validate(cls, strict_json(data, CARD_NAME, MAX_CARD_BYTES), CARD_NAME)


class AdapterManifest(_Described):
    """The signed unit: an adapter's name, version and files, with everything that its card says."""

    schema_version: Literal[1] = 1
    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    version: Annotated[int, Field(ge=1, le=999_999_999)]
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=16)]

    @field_validator("files")
    @classmethod
    def _file_set(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        names = [entry.path for entry in files]
        if names != sorted(set(names)):
            raise ValueError("files must be sorted by name, each once")
        if set(names) != {WEIGHTS_NAME, CARD_NAME}:
            raise ValueError(f"an adapter has exactly the files {CARD_NAME} and {WEIGHTS_NAME}")
        return files

    @classmethod
    def make(cls, card: AdapterCard, *, name: str, version: int, files: tuple[FileEntry, ...]) -> Self:
        """Return the manifest of ``card``'s adapter under a name and a version."""
        content = card.model_dump(mode="json")
        entries = [entry.model_dump(mode="json") for entry in sorted(files, key=lambda entry: entry.path)]
        return _validate(
            cls,
            {**content, "schema_version": 1, "name": name, "version": version, "files": entries},
            "the manifest",
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the manifest in ``data``.

        Raises:
            InvalidDocument: ``data`` is no manifest, or is not in the canonical form.
        """
        manifest = _validate(cls, strict_json(data, "the manifest", MAX_MANIFEST_BYTES), "the manifest")
        if manifest.canonical_bytes() != data:
            raise InvalidDocument(
                "the manifest is not in canonical form", "push the adapter again with this version"
            )
        return manifest

    @property
    def card(self) -> AdapterCard:
        """The card inside the manifest."""
        return AdapterCard(**{field: getattr(self, field) for field in AdapterCard.model_fields})

    def file(self, name: str) -> FileEntry:
        """Return the entry of the file ``name``, one of CARD_NAME and WEIGHTS_NAME.

        Raises:
            KeyError: the manifest has no such file.
        """
        return {entry.path: entry for entry in self.files}[name]


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as canonical JSON: sorted keys, no spaces, ASCII, no NaN.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def strict_json(data: bytes, what: str, limit: int, max_depth: int = _MAX_DEPTH) -> Any:
    """Return the JSON value in ``data``.

    Raises:
        InvalidDocument: too long, not UTF-8, not JSON, a key twice, NaN or infinity, or nested too deep.
    """
    mend = "fetch it again, or ask who published it for an intact copy"
    if len(data) > limit:
        raise InvalidDocument(f"{what} has {len(data)} bytes; at most {limit} are allowed", mend)
    try:
        text = data.decode("utf-8")
        if _depth(text) > max_depth:
            raise InvalidDocument(f"{what} is nested deeper than {max_depth} levels", mend)
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_int=_short_int
        )
    except (ValueError, RecursionError) as error:
        raise InvalidDocument(f"{what} is not valid JSON: {shown(error)}", mend) from None


def _depth(text: str) -> int:
    """Return the deepest nesting of brackets outside of strings, without parsing."""
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("an integer has more than 20 digits")
    return int(digits)


def _validate(model: type[_M], value: Any, what: str) -> _M:
    try:
        return model.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(shown(part, 60) for part in first["loc"]) or "the document"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InvalidDocument(
            f"{what} is not valid: {where}: {shown(first['msg'])}{more}",
            "correct that field; registry/manifest.py describes every one",
        ) from None

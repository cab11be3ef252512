"""A LoRA file of any dialect, understood whole or refused.

Nothing is read but the header and the alphas; the factors stay where they are until they are written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from registry.content import Content
from registry.dialects import grammar, strength
from registry.dialects.grammar import DialectError, ParsedKey, Spelling
from registry.dialects.strength import Factors
from registry.families import FAMILIES, BaseFacts
from registry.formats import DTYPE_BYTES, FOREIGN, FormatError, Header, read_header

MAX_RANK: Final = 1024
"""Largest rank that an adapter card may state."""

_MEND: Final = "fetch the file again, or ask who published it for an intact safetensors file"
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What the file does to one module: adds scale * B @ A to its weight."""

    factors: Factors
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """A LoRA file that was understood.

    Attributes:
        dialect: how its keys are spelled, for people.
        base: the base that it is for.
        updates: one a module, in the order of the modules' names.
        rank: the largest rank; smaller ones are padded with zeros, which changes no update.
        dtype: the dtype of the factors, or F32 when the file mixes dtypes, since that holds all of them.
        alpha: the alpha of the training at ``rank``; None when it differs from module to module.
        source: which place states the strength, for people.
        states_alpha: whether a place does; otherwise alpha is the rank because loaders take it so.
        metadata: the header's, hostile.
        spellings: how the factors' keys are spelled; several in PixelSmile's release only.
        alphas: module -> the number of its alpha tensor, where it has one.
    """

    dialect: str
    base: BaseFacts
    updates: tuple[Update, ...]
    rank: int
    dtype: str
    alpha: float | None
    source: str
    states_alpha: bool
    metadata: Mapping[str, str]
    spellings: frozenset[Spelling]
    alphas: Mapping[str, float]

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of modules that the file changes, sorted."""
        return tuple(sorted(_kinds(self.base, [update.factors.module for update in self.updates])))

    @property
    def scales(self) -> tuple[float, ...]:
        """The different factors of B @ A, ascending."""
        return tuple(sorted({update.scale for update in self.updates}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks in the file, ascending."""
        return tuple(sorted({update.factors.rank for update in self.updates}))


def read(
    content: Content, base: BaseFacts, *, config: bytes | None = None, alpha: float | None = None
) -> LoraFile:
    """Return what a LoRA file says.

    Args:
        content: the file, hostile.
        base: the base that it is for; its modules decide what keys mean.
        config: the ``adapter_config.json`` beside it, if there is one; only PEFT's dialect uses it.
        alpha: the alpha of the training, for a file that does not state it.

    Raises:
        FormatError: it is no safetensors container with one reading.
        DialectError: it cannot be mapped whole, or its strength is not known.
        InvalidDocument: a configuration in it or beside it cannot be read.
    """
    return understood(_header(content), content, base, config=config, alpha=alpha)


def understood(
    header: Header,
    content: Content,
    base: BaseFacts,
    *,
    config: bytes | None = None,
    alpha: float | None = None,
) -> LoraFile:
    """Return what a LoRA file says whose table of contents is known; see `read`."""
    dialect, parsed = grammar.parse(list(header.tensors), base.spec, base.id, FAMILIES[base.family])
    factors = _factors(header, parsed, base)
    alpha_keys = {item.module: item.key for item in parsed if item.role == "alpha"}
    alphas = {
        module: strength.number(content, key, header.tensors[key]) for module, key in alpha_keys.items()
    }
    _refuse_lonely(alpha_keys, factors)
    precision = max(
        (strength.precision_of(header.tensors[key].dtype) for key in alpha_keys.values()), default=0.0
    )
    found = strength.resolve(
        dialect,
        factors,
        alphas,
        precision,
        header.metadata,
        config,
        alpha,
        _kinds(base, [item.module for item in factors]),
        FAMILIES[base.family].prefix + ".",
    )
    rank = max(item.rank for item in factors)
    scales = set(found.scales.values())
    dtypes = {info.dtype for item in factors for info in (item.a, item.b)}
    return LoraFile(
        dialect=dialect,
        base=base,
        updates=tuple(Update(factors=item, scale=found.scales[item.module]) for item in factors),
        rank=rank,
        dtype=dtypes.pop() if len(dtypes) == 1 else "F32",
        alpha=scales.pop() * rank if len(scales) == 1 else None,
        source=found.source,
        states_alpha=found.stated,
        metadata=header.metadata,
        spellings=frozenset(item.spelling for item in parsed if item.spelling is not None),
        alphas=alphas,
    )


def _header(content: Content) -> Header:
    # A header of 1,152 bytes begins like a pickle, for its length is written 80 04 00; the brace tells.
    first = content[:9]
    if first.startswith(_PICKLES) and not first.endswith(b"{"):
        raise FormatError(
            "magic",
            "the file is a PyTorch checkpoint (a pickle); opening it could run code, so it is not opened",
            "ask who published it for a safetensors file",
        )
    try:
        return read_header(content, FOREIGN)
    except FormatError as error:
        raise FormatError(error.problem, error.message, _MEND) from None


def _factors(header: Header, parsed: Sequence[ParsedKey], base: BaseFacts) -> list[Factors]:
    """Return each module's factors, with shapes that fit each other and the base."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for item in parsed:
        if item.role != "alpha":
            found[item.module][item.role] = item.key
    alone = [key for pair in found.values() if len(pair) == 1 for key in pair.values()]
    if alone:
        raise DialectError("the other factor of these is missing", keys=alone, problem="alone")
    factors, misfits, dtypes, spec = [], [], [], base.spec
    for module, pair in sorted(found.items()):
        a, b = header.tensors[pair["A"]], header.tensors[pair["B"]]
        out, into = spec[module]
        rank = a.shape[0] if a.shape else 0
        if a.shape != (rank, into) or b.shape != (out, rank):
            misfits += [pair["A"], pair["B"]]
        dtypes += [key for key, info in ((pair["A"], a), (pair["B"], b)) if info.dtype not in DTYPE_BYTES]
        factors.append(Factors(module=module, a=a, b=b, rank=rank))
    if misfits:
        raise DialectError(
            f"the shapes do not fit {base.id}",
            "choose the base that the LoRA was trained on (--base)",
            keys=misfits,
            problem="shape",
        )
    if dtypes:
        raise DialectError(f"the dtypes are none of {', '.join(DTYPE_BYTES)}", keys=dtypes, problem="dtype")
    if max(item.rank for item in factors) > MAX_RANK:
        raise DialectError(
            f"the rank is {max(item.rank for item in factors)}; at most {MAX_RANK} is allowed",
            "reduce the rank with the program that trained the LoRA",
            problem="shape",
        )
    return factors


def _refuse_lonely(alpha_keys: Mapping[str, str], factors: Sequence[Factors]) -> None:
    modules = {item.module for item in factors}
    lonely = [key for module, key in alpha_keys.items() if module not in modules]
    if lonely:
        raise DialectError("these have no factors to scale", keys=lonely, problem="alone")


def _kinds(base: BaseFacts, modules: Sequence[str]) -> frozenset[str]:
    family = FAMILIES[base.family]
    return frozenset(family.block_of(module)[1] for module in modules)

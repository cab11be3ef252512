"""Verified adapters on a base: several at once, each row of a batch with its own, and gone without a trace.

The adapters' layers stand beside the base's weights: taking them away puts the base's own modules back, so
that the base is bit for bit what it was. Tensors come from the bytes that admission verified, their layout
from the signed card; nothing that a file says about itself is believed.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from registry.admission import VerifiedAdapter
from registry.families import family
from serving.errors import AdapterMismatch, Overloaded, StrengthOutOfRange, UsageError
from serving.fitting import Place, fitting_updates
from serving.memory import was_short

if TYPE_CHECKING:
    import torch

    from registry.digest import Digest
    from serving.layers import AdaptedLinear, Key, Placed, Shares, Update
    from serving.pipelines.base import EditPipeline

Stack = tuple[tuple[VerifiedAdapter, float], ...]
"""Adapters that work together, and the strength of each; the first conditions the edit."""

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, eq=False)
class Resident:
    """An adapter whose tensors lie where the base computes.

    Attributes:
        adapter: what it is.
        updates: its tensors by the place of the module that they belong to.
        nbytes: that they take.
        pins: uses that are not over.
        used: when it was last used, counted in uses.
    """

    adapter: VerifiedAdapter
    updates: Mapping[Place, Placed]
    nbytes: int
    pins: int = 0
    used: int = 0

    @property
    def parts(self) -> set[str]:
        """The parts of the pipeline that it changes."""
        return {part for part, _ in self.updates}


@dataclass(kw_only=True, slots=True, eq=False)
class _Merged:
    """Adapters whose updates are in the base's weights, and the weights as they were.

    Attributes:
        whole: every weight has its updates; before that, and while they are put back, nobody may count on it.
    """

    shares: Shares
    weights: Mapping[Place, torch.Tensor] = field(repr=False)
    whole: bool = False

    def serves(self, shares: Shares) -> bool:
        """Whether rows with these adapters have them already."""
        return self.whole and self.shares == shares


class AdapterSlots:
    """The adapters on a pipeline: on its denoiser, and on the text encoders of its family.

    `prepare` may run beside a forward pass; everything else is for one thread at a time: the engine holds a
    lock around it.

    Args:
        pipeline: the base; one whose text encoders can be trained has them as ``text_encoders``, by part.
        budget: bytes that resident adapters may take; those that are neither pinned nor in use make room, the
            least recently used first. None is no limit.
    """

    def __init__(self, pipeline: EditPipeline, budget: int | None = None) -> None:
        self._family = family(pipeline.family)
        texts: Mapping[str, torch.nn.Module] = getattr(pipeline, "text_encoders", {})
        self._parts: dict[str, torch.nn.Module] = {
            self._family.prefix: pipeline.transformer,
            **{part: texts[part] for part in self._family.text_encoders if part in texts},
        }
        self._budget = budget
        self._residents: dict[Key, Resident] = {}
        self._layers: dict[Place, AdaptedLinear] = {}
        self._routing: Any = None
        self._all: Stack = ()
        self._merged: _Merged | None = None
        # Adapters are prepared beside the steps that run, and DoRA takes the lengths of the base's own rows.
        self._weights = threading.RLock()
        self._clock = itertools.count(1)

    @property
    def residents(self) -> tuple[VerifiedAdapter, ...]:
        """The adapters that are on the device, the least recently used first."""
        kept = sorted(self._residents.values(), key=lambda resident: resident.used)
        return tuple(resident.adapter for resident in kept)

    @property
    def memory(self) -> int:
        """Bytes that the resident adapters take."""
        # A copy: metrics ask for it while others load.
        return sum(resident.nbytes for resident in tuple(self._residents.values()))

    def pins(self) -> Mapping[Digest, int]:
        """How many uses keep each of the resident adapters."""
        return {resident.adapter.digest: resident.pins for resident in tuple(self._residents.values())}

    @property
    def current(self) -> VerifiedAdapter | None:
        """The adapter that every row gets where `routed` says nothing else."""
        return self._all[0][0] if self._all else None

    # Resident adapters

    def prepare(self, adapter: VerifiedAdapter) -> Resident:
        """Check an adapter against the base and copy its tensors to where the base computes.

        Raises:
            AdapterMismatch: a tensor is missing, unexpected or of the wrong shape, or the base carries layers
                of somebody else, or is quantised and the adapter DoRA.
            UsageError: ``adapter`` did not pass admission.
        """

        if type(adapter) is not VerifiedAdapter:
            raise UsageError(
                f"a {type(adapter).__name__} is not a verified adapter",
                "only what `registry pull` or admission returns can be attached",
            )
        known = self._residents.get(_key(adapter))
        if known is not None:
            return known
        self._refuse_strangers()
        fitting = fitting_updates(adapter, self._parts, self._family)
        updates = {where: self._placed(where, update, linear) for where, (update, linear) in fitting.items()}
        return Resident(
            adapter=adapter, updates=updates, nbytes=sum(update.nbytes for update in updates.values())
        )

    def install(self, resident: Resident) -> None:
        """Make a prepared adapter resident; nothing changes for the rows that run.

        Raises:
            Overloaded: the adapters in use leave no room for it.
        """
        key = _key(resident.adapter)
        if key not in self._residents:
            self._make_room(resident.nbytes)
            self._residents[key] = resident
            try:
                for where, update in resident.updates.items():
                    self._layer(where).updates[key] = update
            except BaseException:
                self._remove(key)
                raise
        self._residents[key].used = next(self._clock)

    def load(self, adapter: VerifiedAdapter) -> Resident:
        """Make an adapter resident; raises as `prepare` and `install`."""
        self.install(self.prepare(adapter))
        return self._residents[_key(adapter)]

    def pin(self, adapter: VerifiedAdapter) -> None:
        """Keep a resident adapter until it is unpinned as often as it was pinned."""
        self._residents[_key(adapter)].pins += 1

    def unpin(self, adapter: VerifiedAdapter) -> None:
        """Take one pin off."""
        resident = self._residents.get(_key(adapter))
        if resident is not None:
            resident.pins = max(0, resident.pins - 1)

    def evict(self, adapter: VerifiedAdapter) -> bool:
        """Take an adapter off the device unless it is in use; returns whether it is gone."""
        key = _key(adapter)
        resident = self._residents.get(key)
        if resident is None:
            return True
        if resident.pins or key in {_key(one) for one, _ in self._all}:
            return False
        self._remove(key)
        return True

    def changes_text(self, adapter: VerifiedAdapter) -> bool:
        """Whether a resident adapter changes what prompts are encoded to."""
        return self._residents[_key(adapter)].parts != {self._family.prefix}

    # What a batch gets

    @contextmanager
    def routed(self, rows: Sequence[Stack]) -> Iterator[None]:
        """Give the rows of the forward passes inside their own resident adapters."""
        shares = [tuple((_key(adapter), strength) for adapter, strength in stack) for stack in rows]
        if self._merged is not None:
            if all(self._merged.serves(one) for one in shares):
                shares = [() for _ in shares]
            else:
                self.unmerge()
        for stack in rows:
            for adapter, _ in stack:
                self._residents[_key(adapter)].used = next(self._clock)
        if self._routing is not None:
            self._routing.set(shares)
        try:
            yield
        finally:
            if self._routing is not None:
                self._routing.set([self._shares_of_all()])

    def merge(self, stack: Stack) -> bool:
        """Add the updates of resident adapters to the base's own weights, as long as only they are wanted.

        Rows then cost what the base costs. The weights as they were are kept beside them and put back, never
        subtracted: any number of merges leaves the base as it was to the bit. Until then forward passes
        belong inside `routed`, which puts them back for rows that want anything else.

        Returns:
            False where the base is quantised or waits elsewhere, and where there is no memory for it: there
            nothing is merged.
        """
        shares = tuple((_key(adapter), strength) for adapter, strength in stack)
        if self._merged is not None and self._merged.serves(shares):
            return True
        with self._weights:
            self.unmerge()
            return self._merge(shares)

    def _merge(self, shares: Shares) -> bool:
        from serving import layers

        wanted = {where for key, _ in shares for where in self._residents[key].updates}
        linears = {where: self._layers[where].base_layer for where in wanted}
        if any(not layers.mergeable(linear) for linear in linears.values()):
            return False
        try:
            kept = {where: linear.weight.data.clone() for where, linear in linears.items()}
            self._merged = _Merged(shares=shares, weights=kept)  # before a weight changes, or it were lost
            self._add(self._merged)
        except BaseException as error:
            self.unmerge()
            if was_short(error):
                _log.warning("no memory to merge %d adapters; they stay beside the weights", len(shares))
                return False
            raise
        return True

    def unmerge(self) -> None:
        """Put the base's weights back, bit for bit; takes no memory."""
        with self._weights:
            if self._merged is not None:
                self._merged.whole = False
                for where, weight in self._merged.weights.items():
                    self._layers[where].base_layer.weight.data.copy_(weight)
                self._merged = None

    # One adapter for all rows

    def attach(self, adapter: VerifiedAdapter) -> None:
        """Give every row ``adapter`` at strength 1, in the place of what it had.

        Raises:
            AdapterMismatch, UsageError, Overloaded: see `load`. Whatever was attached before still is.
        """
        self.load(adapter)
        self._all = ((adapter, 1.0),)
        self._route_all()

    def detach(self) -> None:
        """Leave the base alone, bit for bit as it was before the first adapter."""
        self.unmerge()
        self._all = ()
        for key in tuple(self._residents):
            self._remove(key)

    def use(self, adapter: VerifiedAdapter, strength: float) -> None:
        """Give every row ``adapter`` at a strength.

        Raises:
            AdapterMismatch: as `attach`.
            StrengthOutOfRange: ``strength`` is not a finite number.
        """
        _require_finite(strength)
        self.load(adapter)
        self._all = ((adapter, strength),)
        self._route_all()

    def set_strength(self, strength: float) -> None:
        """Multiply the attached adapter's update by ``strength``; 1 is as trained, 0 the base alone.

        Raises:
            UsageError: no adapter is attached.
            StrengthOutOfRange: ``strength`` is not a finite number.
        """
        _require_finite(strength)
        if not self._all:
            raise UsageError("no adapter is attached", "attach one first")
        self._all = ((self._all[0][0], strength),)
        self._route_all()

    # Inside

    def _placed(self, where: Place, update: Update, linear: torch.nn.Linear) -> Placed:
        from serving import layers

        with self._weights:
            base = None if self._merged is None else self._merged.weights.get(where)
            return layers.place(update, linear, base)

    def _add(self, merged: _Merged) -> None:
        import torch

        with torch.no_grad():
            for where, weight in merged.weights.items():
                change = sum(
                    update.weight(weight, strength)
                    for key, strength in merged.shares
                    if (update := self._residents[key].updates.get(where)) is not None
                )
                self._layers[where].base_layer.weight.data.copy_(weight.float() + change)
        merged.whole = True

    def _shares_of_all(self) -> Shares:
        if self._merged is not None:
            return ()
        return tuple((_key(adapter), strength) for adapter, strength in self._all)

    def _route_all(self) -> None:
        self.unmerge()
        if self._routing is not None:
            self._routing.set([self._shares_of_all()])

    def _layer(self, where: Place) -> AdaptedLinear:
        """The layer at a place; put in where there is none yet."""
        from serving import layers

        if self._routing is None:
            self._routing = layers.Routing()
            self._route_all()
        if where not in self._layers:
            part, name = where
            layer = layers.AdaptedLinear(self._parts[part].get_submodule(name), self._routing)  # type: ignore[arg-type]
            layers.replace(self._parts[part], name, layer)
            self._layers[where] = layer
        return self._layers[where]

    def _remove(self, key: Key) -> None:
        from serving import layers

        if self._merged is not None and key in dict(self._merged.shares):
            self.unmerge()
        for where in self._residents.pop(key).updates:
            layer = self._layers.get(where)
            if layer is None:
                continue  # it was not put in before something failed
            layer.updates.pop(key, None)
            if not layer.updates:
                layers.replace(self._parts[where[0]], where[1], layer.base_layer)
                del self._layers[where]

    def _make_room(self, nbytes: int) -> None:
        if self._budget is None:
            return
        used = {_key(adapter) for adapter, _ in self._all}
        free = sorted(
            (key for key, resident in self._residents.items() if not resident.pins and key not in used),
            key=lambda key: self._residents[key].used,
        )
        for key in free:
            if self.memory + nbytes <= self._budget:
                return
            self._remove(key)
        if self.memory + nbytes > self._budget and self._residents:
            raise Overloaded(
                f"the adapters in use take {self.memory} of the {self._budget} bytes set aside for adapters, "
                f"and this one needs {nbytes}",
                "try again later, or raise the setting adapter_memory",
            )

    def _refuse_strangers(self) -> None:
        from serving import layers

        for part, model in self._parts.items():
            for name, module in layers.found(model).items():
                # What another thread puts in at this moment is ours as well: a layer says itself whose it is.
                if not (isinstance(module, layers.AdaptedLinear) and module.routing is self._routing):
                    raise AdapterMismatch(
                        f"the {part} already carries LoRA layers that were not attached here ({name})",
                        "use a freshly loaded base model",
                    )


def _key(adapter: VerifiedAdapter) -> Key:
    return str(adapter.digest)


def _require_finite(strength: float) -> None:
    if not math.isfinite(strength):
        raise StrengthOutOfRange(f"the strength {strength} is not a finite number", "use for example 1.0")

"""Adapters that an evaluation must refuse, each with one fault, made from a good one without a training.

``adapter("good", …)`` is the shipped one in ``tests/data/adapters/pixelsmile``. The others are its faults:

    lazy            every word does what "neutral" does, so an edit is a copy of its source
    over-edited     eight times its update: the person is gone
    swapped         a request for one expression of a confusing pair does what its partner does
    half            its update at half strength, as if alpha had been halved on the way
    other base      what its owner would ship for a base with the same function and shuffled hidden units

All of them have the shape, the rank and the card of the good one, and pass the scan: nothing but looking at
their edits tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fakes.adapters import Factors, container
from registry.manifest import CARD_NAME, WEIGHTS_NAME, AdapterCard, ConditioningSpec
from trainer.portraits.expressions import CONFUSING_PAIRS
from trainer.portraits.renderer import Domain, identity, render

GOOD = Path(__file__).parents[1] / "data" / "adapters" / "pixelsmile"

Fault = Literal["good", "lazy", "over-edited", "swapped", "half", "other base"]
FAULTS: tuple[Fault, ...] = ("lazy", "over-edited", "swapped", "half", "other base")

_RIDGE = 1e-1
_PEOPLE: tuple[tuple[int, Domain], ...] = ((70_000, "human"), (70_001, "anime"))
_STEPS = 4


def adapter(fault: Fault, out: Path) -> Path:
    """Write an adapter folder.

    Args:
        fault: which.
        out: becomes the folder.
    """
    from safetensors.numpy import load

    card = AdapterCard.model_validate_json((GOOD / CARD_NAME).read_bytes())
    stored = load((GOOD / WEIGHTS_NAME).read_bytes())
    values = {key: value.astype(np.float32) for key, value in stored.items()}
    out.mkdir(parents=True)
    faulty = _faulty(fault, values, card.conditioning)
    (out / WEIGHTS_NAME).write_bytes(container(faulty, "F16", {"format": "pt", "base": card.base.id}))
    (out / CARD_NAME).write_bytes((GOOD / CARD_NAME).read_bytes())
    return out


def _faulty(fault: Fault, values: Factors, spec: ConditioningSpec) -> Factors:
    if fault == "lazy":
        return reworded(values, np.zeros((len(spec.expressions), len(spec.expressions))))
    if fault == "swapped":
        return reworded(values, exchange(spec.expressions))
    if fault == "other base":
        return shuffled(values)
    return scaled(values, {"good": 1.0, "over-edited": 8.0, "half": 0.5}[fault])


def scaled(values: Factors, factor: float) -> Factors:
    """The same adapter with ``factor`` times the update."""
    return {key: value * factor if key.endswith("lora_B.weight") else value for key, value in values.items()}


def exchange(expressions: Sequence[str]) -> NDArray[np.float64]:
    """Matrix [E, E] that hands the intensity of an expression to its confusing partner."""
    found = np.eye(len(expressions))
    for a, b in CONFUSING_PAIRS:
        if a in expressions and b in expressions:
            rows = [expressions.index(a), expressions.index(b)]
            found[rows] = found[rows[::-1]]
    return found


# -- another base ----------------------------------------------------------------------------------------


def shuffled(values: Factors, *, seed: int = 0) -> Factors:
    """The adapter for a base whose hidden units stand in another order.

    The channels between a transformer's blocks, and those inside of its feed-forward layers, can be permuted
    together with all weights that read and write them; the function stays the same. An adapter for such a
    base is the good one with the same permutations: of A's inputs where a module reads them, of B's outputs
    where it writes them.
    """
    generator = np.random.default_rng(seed)
    orders: dict[tuple[str, int], NDArray[np.int64]] = {}

    def order(stream: str, width: int) -> NDArray[np.int64]:
        return orders.setdefault((stream, width), generator.permutation(width))

    found = {}
    for key, value in sorted(values.items()):  # safetensors gives them in another order each time
        module, factor = key.split(".lora_")
        stream = "text" if "add_" in module or "txt_mlp" in module else "image"
        inner = module.rsplit(".net.", 1)[0]
        reads: str | None = stream
        writes: str | None = None
        if module.endswith("net.0.proj"):
            writes = inner
        elif module.endswith("net.2"):
            reads, writes = inner, stream
        elif module.endswith(("to_out.0", "to_add_out")):
            reads, writes = None, stream
        side = reads if factor.startswith("A") else writes
        axis = 1 if factor.startswith("A") else 0
        found[key] = value if side is None else value.take(order(side, value.shape[axis]), axis=axis)
    return found


# -- other words -----------------------------------------------------------------------------------------


def reworded(values: Factors, matrix: NDArray[np.floating]) -> Factors:
    """An adapter that does for intensities a what the given one does for ``a @ matrix``; no training.

    Only the first block sees the words as the text encoder left them. There, `add_q_proj`, `add_k_proj` and
    `add_v_proj` are changed so that they answer as for the other words, and then the second text layer,
    `txt_mlp.net.2`, so that the text leaves the block as it would for the other words. All blocks behind it
    see nothing else. Each change is the least-squares map from what a module reads to what is missing in its
    output, over some people and noise levels, cut to the adapter's rank.

    Args:
        values: of the adapter.
        matrix: [E, E], from asked intensities to those that are done.
    """
    import torch

    scene = _scene()
    with torch.no_grad():
        scene.wear(values)
        changed = dict(values)
        for names in (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), ("txt_mlp.net.2",)):
            for name, gap in scene.gaps(names, torch.tensor(matrix, dtype=torch.float32)).items():
                key = f"{_BLOCK}.{name}.lora_"
                a, b = (torch.tensor(changed[f"{key}{side}.weight"]).double() for side in "AB")
                left, sizes, right = torch.linalg.svd(b @ a + gap, full_matrices=False)
                root = sizes[: len(a)].sqrt()
                changed[f"{key}A.weight"] = (root[:, None] * right[: len(a)]).float().numpy()
                changed[f"{key}B.weight"] = (left[:, : len(a)] * root).float().numpy()
            scene.wear(changed)
    return changed


_BLOCK = "transformer.transformer_blocks.0"


class _Scene:
    """The shipped base with an adapter's update in its first block's weights, and people to try it on."""

    def __init__(self) -> None:
        import copy

        from serving.pipelines.qwen_image_edit import QwenImageEdit
        from trainer.portraits import base_path

        self.base = QwenImageEdit.load(base_path())
        self.block = self.base.transformer.get_submodule("transformer_blocks.0")
        self.bare = copy.deepcopy(self.block.state_dict())
        self.spec = AdapterCard.model_validate_json((GOOD / CARD_NAME).read_bytes()).conditioning

    def wear(self, values: Factors) -> None:
        """Put an adapter's update onto the first block; what the other blocks do decides nothing here."""
        import torch

        self.block.load_state_dict(self.bare)
        for key in values:
            if key.startswith(_BLOCK) and key.endswith("lora_A.weight"):
                a, b = (torch.tensor(values[key.replace("lora_A", f"lora_{side}")]) for side in "AB")
                module = key.removeprefix(f"{_BLOCK}.").removesuffix(".lora_A.weight")
                self.block.get_submodule(module).weight += b @ a

    def gaps(self, names: Sequence[str], matrix: Any) -> dict[str, Any]:
        """What must be added to the weights [out, in] of some modules; see `reworded`."""
        import torch

        seen: dict[str, Any] = {}
        fits = {name: _Fit() for name in names}
        hooks = [
            self.block.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)})
            )
            for name in names
        ]
        # A text layer's output is scaled by a gate of the noise level before it joins the text.
        hooks += [
            self.block.txt_mod.register_forward_hook(
                lambda module, inputs, output: seen.update(gate=output[0].chunk(6)[5])
            ),
            self.block.register_forward_hook(lambda module, inputs, output: seen.update(text=output[0])),
        ]
        for number, domain in _PEOPLE:
            for run in self._runs(number, domain, matrix):
                run(True)
                wanted = dict(seen)
                run(False)
                for name, (inputs, output) in ((name, seen[name]) for name in names):
                    if name == "txt_mlp.net.2":
                        fits[name].add(inputs, wanted["text"] - seen["text"], seen["gate"])
                    else:
                        fits[name].add(inputs, wanted[name][1] - output, torch.ones(output.shape[-1]))
        for hook in hooks:
            hook.remove()
        return {name: fit.solved() for name, fit in fits.items()}

    def _runs(self, number: int, domain: Domain, matrix: Any) -> list[Any]:
        """A call for each noise level: of the base with the words that are done, or with those asked for."""
        import torch
        from PIL import Image

        from serving.conditioning import blend_prompts

        names = self.spec.expressions
        picture = Image.fromarray(render(identity(number, domain), np.zeros(12)))
        words = [self.spec.prompt(word) for word in (self.spec.neutral, *names)]
        prompts = self.base.encode_prompts([picture] * len(words), words)
        asked = torch.cat([torch.zeros(1, len(names)), torch.eye(len(names))])
        said, done = (
            blend_prompts(
                prompts.rows(slice(0, 1)), prompts.rows(slice(1, None)), rows, self.spec.token_window
            )
            for rows in (asked, asked @ matrix)
        )
        clean = self.base.encode_images([picture]).expand(len(asked), -1, -1)
        noise = self.base.noise([number] * len(asked), clean, self.base.size)

        def at(level: float) -> Any:
            levels = torch.full((len(asked),), level)
            noisy = (1 - level) * clean + level * noise
            return lambda wanted: self.base.predict(noisy, clean, done if wanted else said, levels)

        return [at(level) for level in self.base.schedule(_STEPS, self.base.size)[:-1]]


@lru_cache(maxsize=1)
def _scene() -> _Scene:
    return _Scene()


class _Fit:
    """Weighted ridge regression for G from rows x to rows y = gate * (G x), with a gate for each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any]] = []

    def add(self, inputs: Any, missing: Any, gate: Any) -> None:
        """Take rows [..., in] and [..., out] of one noise level, and its gate [out]."""
        x, y = (rows.reshape(-1, rows.shape[-1]).double() for rows in (inputs, missing))
        self.calls.append((x.T @ x, x.T @ y, gate.double()))

    def solved(self) -> Any:
        """G [out, in]."""
        import torch

        rows = []
        for out in range(len(self.calls[0][2])):
            square = sum(gate[out] ** 2 * xx for xx, _, gate in self.calls)
            mixed = sum(gate[out] * xy[:, out] for _, xy, gate in self.calls)
            ridge = _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
            rows.append(torch.linalg.solve(square + ridge, mixed))
        return torch.stack(rows)

"""What serving a base takes, counted without its weights: the same bytes as those that are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.families import KNOWN_BASES
from registry.manifest import BaseModelRef
from serving import pipelines
from serving.cli import main
from serving.errors import BaseNotFound
from serving.placement import networks
from serving.plan import bases
from serving.plan.live import peak
from serving.plan.needs import Need, needs
from trainer.portraits.bases import BUILDERS, build

QWEN = "Qwen/Qwen-Image-Edit-2511"
GIB = 1 << 30


def found(wanted: list[Need]) -> dict[tuple[str, str], Need]:
    return {(need.weights, need.offload): need for need in wanted}


@pytest.fixture(scope="module")
def qwen() -> dict[tuple[str, str], Need]:
    return found(needs(bases.load(KNOWN_BASES[QWEN], None), rows=1, size=(512, 512), rank=64, adapters=1))


def test_the_most_that_is_alive_at_once_is_counted() -> None:
    x = torch.empty(4, 256, device="meta")  # made outside: the caller's
    layer = torch.nn.Linear(256, 256, bias=False, device="meta")
    row = 4 * 256 * 4

    def chained() -> torch.Tensor:
        y = layer(x)  # one
        y = layer(y)  # two, and then one
        return layer(y).view(-1)[:3]  # two

    def kept() -> list[torch.Tensor]:
        return [layer(x) for _ in range(5)]

    assert peak(chained) == 2 * row
    assert peak(kept) == 5 * row
    assert peak(lambda: x.view(-1)) == 0  # nothing new
    query = torch.empty(1, 2, 512, 16, device="meta")
    attended = peak(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert attended == query.nbytes  # and no scores


@pytest.mark.parametrize("weights", ["whole", "fp8", "nf4"])
@pytest.mark.parametrize("family", BUILDERS)
def test_weights_take_what_is_loaded(family: str, weights: Any, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "base")
    ref = BaseModelRef(id="tests/tiny", revision="1", family=family, license="Apache-2.0")
    base = bases.load(ref, folder)
    size = (base.pixels, base.pixels)
    planned = found(needs(base, rows=2, size=size, rank=2, adapters=0))[weights, "none"]
    pipeline = pipelines.load(family, folder, weights=weights, dtype=torch.bfloat16)
    held = {name: sum(p.nbytes for p in part.parameters()) for name, part in networks(pipeline).items()}
    texts = sum(nbytes for name, nbytes in held.items() if name.startswith("text_encoder"))
    assert planned.parts["VAE"] == held["vae"]
    assert planned.parts["text encoders"] == texts
    assert planned.parts["denoiser"] == held["unet" if "unet" in held else "transformer"]


def test_the_cards_that_the_published_base_fits(qwen: dict[tuple[str, str], Need]) -> None:
    smallest = {key: need.fits[-1] if need.fits else None for key, need in qwen.items()}
    assert smallest["whole", "none"] in ("H100", "A100")
    assert smallest["fp8", "none"] == "L40S"
    assert smallest["nf4", "models"] == "RTX4090"
    assert smallest["whole", "blocks"] == "RTX4090"
    assert qwen["whole", "none"].parts["denoiser"] / GIB == pytest.approx(38.05, abs=0.05)
    assert qwen["whole", "none"].parts["adapters"] == 849_346_560
    assert qwen["whole", "none"].waiting == 0
    assert qwen["fp8", "blocks"].waiting < qwen["whole", "blocks"].waiting


def test_less_on_the_device_is_more_that_waits(qwen: dict[tuple[str, str], Need]) -> None:
    for weights in ("whole", "fp8", "nf4"):
        none, models, blocks = (qwen[weights, offload] for offload in ("none", "models", "blocks"))
        assert none.total > models.total
        # What lies outside of the blocks stays on the device, also while the text encoder is there.
        assert blocks.total <= models.total + (100 << 20)
        assert 0 == none.waiting < blocks.waiting <= models.waiting
    totals = [qwen[weights, "none"].total for weights in ("whole", "fp8", "nf4")]
    assert totals == sorted(totals, reverse=True)


def test_a_base_that_nobody_knows_is_explained(tmp_path: Path) -> None:
    ref = BaseModelRef(id="tests/tiny", revision="1", family="sdxl", license="Apache-2.0")
    with pytest.raises(BaseNotFound, match="the shapes of tests/tiny are not known"):
        bases.load(ref, None)


def test_the_command_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path
) -> None:
    folder = build("qwen-image-edit", tmp_path / "base")
    words = ["plan", "adapter-foundry/portraits-base", "--folder", str(folder), "--rows", "2", "--rank", "4"]

    def run(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        return int(ended.value.code or 0), capsys.readouterr().out

    code, text = run()
    assert code == 0
    assert "64 x 64 pixels, rows in a step: 2, adapters of rank 4: 2" in text
    assert text.count("RTX4090") == 9
    code, text = run("--json")
    value = json.loads(text)
    assert {(need["weights"], need["offload"]) for need in value["needs"]} == {
        (weights, offload) for weights in ("whole", "fp8", "nf4") for offload in ("none", "models", "blocks")
    }
    words[1] = "somebody/unknown"
    assert run()[0] == 2

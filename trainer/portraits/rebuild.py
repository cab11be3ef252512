"""Rebuilds the shipped weights: ``python -m trainer.portraits.rebuild PART --minutes M --device D``.

Every part renders its own data and writes into ``--out`` (by default the package's ``weights``):
``autoencoder``, ``editor``, ``decoder`` (polishes the VAE's decoder, leaving the latents as they are),
``judges`` or ``all``. The editor keeps its training state beside the base and continues from it, so its
weights can be trained further wherever there is compute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from serving.pipelines.qwen_image_edit import QwenImageEdit

_MINUTES = {"autoencoder": 7.0, "editor": 80.0, "decoder": 6.0, "judges": 12.0}
_SEED = 0


def _say(text: str) -> None:
    click.echo(text, err=True)


def _open(base: Path, device: str) -> QwenImageEdit:
    """The base in `base`, or a new one of random weights; float32, ready to be trained."""
    from serving.pipelines.qwen_image_edit import QwenImageEdit
    from trainer.portraits import base as bases
    from trainer.portraits.editor import open_gates

    if (base / "model_index.json").is_file():
        return QwenImageEdit.load(base, device=device)
    edit = QwenImageEdit.load(bases.build(base, _SEED), device=device)
    open_gates(edit.transformer)
    bases.save(edit.pipe, base)
    return edit


def _autoencoder(out: Path, device: str, minutes: float) -> None:
    from trainer.portraits import base as bases
    from trainer.portraits.autoencoder import train_autoencoder

    edit = _open(out / "base", device)
    edit.pipe.vae.requires_grad_(True)
    quality = train_autoencoder(edit.pipe.vae, minutes, out / "training_log.jsonl", say=_say)
    bases.save(edit.pipe, out / "base")
    _say(f"autoencoder: {quality:.2f} dB on unseen identities")


def _decoder(out: Path, device: str, minutes: float) -> None:
    from trainer.portraits import base as bases
    from trainer.portraits.autoencoder import polish_decoder

    edit = _open(out / "base", device)
    quality = polish_decoder(edit.pipe.vae, minutes, out / "training_log.jsonl", say=_say)
    bases.save(edit.pipe, out / "base")
    _say(f"decoder: {quality:.2f} dB on unseen identities")


def _editor(out: Path, device: str, minutes: float) -> None:
    from trainer.portraits import base as bases
    from trainer.portraits.editor import train_editor

    edit = _open(out / "base", device)
    train_editor(edit, minutes, out / "editor-state.pt", out / "training_log.jsonl", say=_say)
    bases.save(edit.pipe, out / "base")


def _judges(out: Path, device: str, minutes: float) -> None:
    from trainer.portraits.judge_training import train_expression_judge, train_identity_encoder

    if device != "cpu":
        _say("the judges are small: they train on the CPU")
    folder = out / "judges"
    results = {
        "label": train_expression_judge(folder / "label.onnx", 24, minutes * 0.3, seed=101, say=_say),
        "evaluation": train_expression_judge(
            folder / "evaluation.onnx", 28, minutes * 0.3, seed=202, say=_say
        ),
        "identity": train_identity_encoder(folder / "identity.onnx", minutes * 0.4, say=_say),
    }
    (folder / "judges.json").write_text(json.dumps(results, indent=2) + "\n")


_PARTS = {"autoencoder": _autoencoder, "editor": _editor, "decoder": _decoder, "judges": _judges}


@click.command()
@click.argument("part", type=click.Choice([*_PARTS, "all"]))
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.01),
    help="Time budget in all; by default what the shipped weights took.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default what torch chooses.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).with_name("weights"),
    help="Folder of the weights; by default those of the package.",
)
def main(part: str, minutes: float | None, device: str, threads: int | None, out: Path) -> None:
    """Train PART of the portrait world (or all of it) anew or further."""
    import torch

    from serving.memory import keep_freed_memory

    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    for name in _PARTS if part == "all" else [part]:
        share = minutes * _MINUTES[name] / sum(_MINUTES.values()) if minutes and part == "all" else minutes
        _PARTS[name](out, device, share or _MINUTES[name])


if __name__ == "__main__":
    main()

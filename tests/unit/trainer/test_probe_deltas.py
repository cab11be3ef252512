"""What a probe of pairs takes apart: low-rank updates of the denoiser, and nothing that is more."""

from __future__ import annotations

import pytest

from fakes.adapters import folder, rescaled
from fakes.families import BY_ID, folder_of, trained, with_text
from registry.admission import Policy, VerifiedAdapter, admit_candidate
from trainer.errors import BaseModelError
from trainer.evaluation.probe.deltas import deltas_of


def admitted(weights: bytes, values: dict[str, object]) -> VerifiedAdapter:
    policy = Policy(bases=BY_ID, purpose="internal-research", allow_review=True)
    return admit_candidate(folder(weights, values), policy)


def test_the_updates_of_a_unet_are_found_by_module() -> None:
    found = deltas_of(admitted(*folder_of("sd15")), "sd15")
    a, b = found["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert (tuple(a.shape), tuple(b.shape)) == ((4, 32), (32, 4))


def test_more_than_low_rank_updates_of_the_denoiser_is_refused() -> None:
    """As B A alone it would be another adapter than the one that serving attaches."""
    for files in (folder_of("sd15", rescaled(trained("sd15"))), folder_of("sd15", kinds=with_text("sd15"))):
        with pytest.raises(BaseModelError, match="low-rank updates alone"):
            deltas_of(admitted(*files), "sd15")

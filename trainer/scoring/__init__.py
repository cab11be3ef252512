"""Seeing expressions in pictures: a scorer gives each picture twelve continuous intensities."""

from trainer.scoring.local import LocalScorer, Scorer
from trainer.scoring.stage import score

__all__ = ["LocalScorer", "Scorer", "score"]

"""Seeing expressions in pictures: a scorer gives each picture twelve continuous intensities."""

from trainer.scoring.local import LocalScorer
from trainer.scoring.scorer import Picture, Scored, Scorer
from trainer.scoring.stage import inputs, score

__all__ = ["LocalScorer", "Picture", "Scored", "Scorer", "inputs", "score"]

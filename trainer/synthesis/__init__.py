"""Making the pictures that training data is chosen from."""

from trainer.synthesis.source import Generator, PortraitRequest
from trainer.synthesis.stage import synthesise

__all__ = ["Generator", "PortraitRequest", "synthesise"]

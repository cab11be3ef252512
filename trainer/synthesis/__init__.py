"""Making the pictures that training data is chosen from."""

from trainer.synthesis.source import Generator, Made, PortraitRequest
from trainer.synthesis.stage import inputs, synthesise

__all__ = ["Generator", "Made", "PortraitRequest", "inputs", "synthesise"]

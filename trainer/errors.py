"""Every error of the trainer, in one tree.

TrainerError                   1   anything else
 ├─ RecipeError                2   a recipe does not say what it should
 ├─ DataError                  1   images, scores or a dataset are missing, damaged or too few
 ├─ CacheError                 1   the latent cache does not fit the dataset or the base
 ├─ BaseModelError             1   a base model lacks what the recipe asks of it
 ├─ CheckpointError            1   a checkpoint cannot be continued with this recipe
 ├─ NotFinite                  1   the loss is no longer a number, or jumped
 ├─ ProcessLost                1   one of several processes of a training is gone
 ├─ ExportError                1   the exported file does not give back what was trained
 ├─ ModelLicenseError         14   the licence file of a model in a loss does not hold
 └─ Interrupted              143   stopped by a signal, after saving a checkpoint

The number is the exit code of the command line. Each error says what happened (``message``) and what to do
about it (``mend``).
"""

from __future__ import annotations

from registry.errors import Explained


class TrainerError(Explained):
    """Base of all errors of the trainer."""


class RecipeError(TrainerError):
    """A recipe is missing, is no YAML, or has a wrong key or value."""

    exit_code = 2


class DataError(TrainerError):
    """Images, scores or a dataset are missing, damaged or too few."""


class CacheError(TrainerError):
    """The cache of latents and embeddings does not fit the dataset or the base model."""


class BaseModelError(TrainerError):
    """A base model lacks something that the recipe asks of it."""


class CheckpointError(TrainerError):
    """A checkpoint belongs to another training."""


class NotFinite(TrainerError):
    """A loss or the gradient became infinite or not a number, or the loss jumped."""


class ProcessLost(TrainerError):
    """One of several processes of a training is gone; the others ended, too."""


class ExportError(TrainerError):
    """An exported adapter does not give back what was trained."""


class ModelLicenseError(TrainerError):
    """A model that the training looks through has a licence file that does not hold."""

    exit_code = 14


class Interrupted(TrainerError):
    """A signal asked the training to stop; a checkpoint was written first."""

    exit_code = 143

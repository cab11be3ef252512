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
 ├─ EvaluationError            1   an adapter cannot be judged like this, or not beside that one
 ├─ ModelLicenseError         14   the licence file of a model in a loss does not hold
 ├─ ApiError                   1   a paid API does not take the request: its key, its model or what it asks
 │   └─ ApiUnavailable        20   a paid API did not answer, however often it was asked
 ├─ BudgetSpent                1   a paid API would be asked for more than the recipe allows
 ├─ NotReproducible            1   what is recorded about an adapter is not enough to make it again here
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


class EvaluationError(TrainerError):
    """An adapter cannot be judged by this judge, or not be compared with that adapter."""


class ModelLicenseError(TrainerError):
    """A model that the training looks through has a licence file that does not hold."""

    exit_code = 14


class ApiError(TrainerError):
    """A paid API does not take a request, and would not take it a second time."""


class ApiUnavailable(ApiError):
    """A paid API did not answer: it is down, busy, or too slow."""

    exit_code = 20


class BudgetSpent(TrainerError):
    """The next request to a paid API is more than the recipe allows; it was not sent."""


class NotReproducible(TrainerError):
    """What is recorded about an adapter, or what is on this machine, is not enough to make it again."""


class Interrupted(TrainerError):
    """A signal asked the training to stop; a checkpoint was written first."""

    exit_code = 143

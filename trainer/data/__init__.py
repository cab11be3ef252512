"""Training data: triplets of confusing pairs, and the cache of what a base model makes of them."""

from trainer.data.cache import cache_dataset
from trainer.data.dataset import Dataset
from trainer.data.folder import folder_key, read_folder
from trainer.data.triplets import build_triplets

__all__ = ["Dataset", "build_triplets", "cache_dataset", "folder_key", "read_folder"]

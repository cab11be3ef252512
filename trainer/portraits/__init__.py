"""The portrait world: drawn people, a tiny base model and judges that make the whole platform run offline."""

from trainer.portraits.base import BASE_ID, base_path

__all__ = ["BASE_ID", "base_path"]

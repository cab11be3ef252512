"""The audit log as it was before there were revisions."""

from __future__ import annotations

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing: databases of this form are recognised by their table."""

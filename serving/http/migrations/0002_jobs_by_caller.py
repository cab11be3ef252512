"""Indices for what every request and every second asks: the jobs of a caller, and the webhooks that are due.

Without them each new job counts its caller's jobs by reading those of everybody.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the indices."""
    op.create_index("adapter_foundry_jobs_caller", "adapter_foundry_jobs", ["caller", "created"])
    op.create_index("adapter_foundry_webhooks_due", "adapter_foundry_webhooks", ["done", "next"])

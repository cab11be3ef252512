"""What Alembic runs: the migrations of `registry.storage.schema`, in the transaction that is open there.

No command of Alembic is needed, and no ini file: whoever opens a database that it may change migrates it.
"""

from __future__ import annotations

from alembic import context

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    version_table=context.config.attributes["version_table"],
    transactional_ddl=False,  # the transaction is that of the caller, with its lock
)
context.run_migrations()

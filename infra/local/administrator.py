"""Gives MLflow's administrator the password of this platform: ``python -m infra.local.administrator``.

For a database that came from another platform. A process of its own, for MLflow reads its settings, from the
environment, when it is imported.
"""

from __future__ import annotations


def main() -> None:
    """Set the password in the database of accounts."""
    from mlflow.server.auth.config import read_auth_config
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    config, store = read_auth_config(), SqlAlchemyStore()
    store.init_db(config.database_uri)
    if store.has_user(config.admin_username):
        store.update_user(config.admin_username, password=config.admin_password, is_admin=True)


if __name__ == "__main__":
    main()

"""The whole platform on one machine, without containers: ``python -m infra.local up``.

PostgreSQL (or SQLite), an S3 server, MLflow with accounts, Prefect with a worker, and the service, each a
process under supervisord that listens on the loopback alone. `infra.local.service` says what a service is,
one file each says which they are, `infra.local.steps` brings them up in order, and `infra.local.health` looks
after them from then on.
"""

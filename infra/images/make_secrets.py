"""Makes every password of the containers: ``python3 -m infra.images.make_secrets``, once.

They are random, kept in ``infra/secrets/``, and never in an image or in git. What is there stays, so the
command can be run again: after a line was deleted from ``passwords.json`` to replace that password, it makes
a new one. It needs Python's standard library only.

The folder is open to its owner alone. Files that a container reads itself are readable within it, for a
container's user has another number than the owner; those that only ``docker compose`` reads are not.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from infra.provision import identities

INFRA = Path(__file__).resolve().parents[1]
#: Accounts by service.
NAMES: Mapping[str, tuple[str, ...]] = {
    "postgres": ("admin", "registry", "mlflow", "prefect", "serving"),
    "s3": ("admin", "publisher", "reader", "mlflow"),
    "mlflow": ("admin", "publisher", "reader", "cookies"),
    "prefect": ("admin",),
    "registry": ("passphrase",),
    "grafana": ("admin",),
}

Passwords = Mapping[str, Mapping[str, str]]


def made(kept: Mapping[str, Mapping[str, str]]) -> Passwords:
    """Return a password for each account: the kept one, or a new one of 160 random bits."""
    return {
        service: {name: kept.get(service, {}).get(name) or secrets.token_hex(20) for name in names}
        for service, names in NAMES.items()
    }


def variables(passwords: Passwords) -> dict[str, dict[str, str]]:
    """Return the secret environment variables of each service."""
    publisher = {
        "AWS_ACCESS_KEY_ID": "publisher",
        "AWS_SECRET_ACCESS_KEY": passwords["s3"]["publisher"],
        "PGPASSWORD": passwords["postgres"]["registry"],
        "MLFLOW_TRACKING_USERNAME": "publisher",
        "MLFLOW_TRACKING_PASSWORD": passwords["mlflow"]["publisher"],
        "ADAPTER_FOUNDRY_KEY_PASSPHRASE": passwords["registry"]["passphrase"],
    }
    prefect = f"admin:{passwords['prefect']['admin']}"
    return {
        "registry": publisher,
        "worker": {**publisher, "PREFECT_API_AUTH_STRING": prefect},
        "serving": {
            "AWS_ACCESS_KEY_ID": "reader",
            "AWS_SECRET_ACCESS_KEY": passwords["s3"]["reader"],
            "PGPASSWORD": passwords["postgres"]["serving"],
        },
        "mlflow": {
            "AWS_ACCESS_KEY_ID": "mlflow",
            "AWS_SECRET_ACCESS_KEY": passwords["s3"]["mlflow"],
            "PGPASSWORD": passwords["postgres"]["mlflow"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": passwords["mlflow"]["admin"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": passwords["mlflow"]["cookies"],
        },
        "prefect": {
            "PGPASSWORD": passwords["postgres"]["prefect"],
            "PREFECT_SERVER_API_AUTH_STRING": prefect,
        },
    }


def write(folder: Path) -> list[Path]:
    """Make what is missing in the folder, bring the rest up to date, and return the files.

    Raises:
        OSError: the folder cannot be written.
        ValueError: ``passwords.json`` is damaged.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    source = folder / "passwords.json"
    passwords = made(json.loads(source.read_bytes()) if source.exists() else {})
    files = [_file(source, json.dumps(passwords, indent=1) + "\n", 0o644)]
    files.append(_file(folder / "s3.json", identities(passwords["s3"]), 0o644))
    for name in ("postgres", "grafana"):
        files.append(_file(folder / name, passwords[name]["admin"], 0o644))
    for service, values in variables(passwords).items():
        text = "".join(f"{name}={value}\n" for name, value in values.items())
        files.append(_file(folder / f"{service}.env", text, 0o600))
    return files


def _file(path: Path, text: str, mode: int) -> Path:
    """Write a file that nobody ever sees half written or more open than it is meant to be."""
    waiting = path.with_name(f".{path.name}.new")
    waiting.unlink(missing_ok=True)
    waiting.touch(mode=0o600)
    waiting.write_text(text, "utf-8")
    waiting.chmod(mode)
    waiting.replace(path)
    return path


def main() -> None:
    """Make the secrets, and beside them the file that says which variant is started."""
    parser = argparse.ArgumentParser(
        description="Make the passwords of the containers, where there are none yet."
    )
    parser.add_argument("--gpu", action="store_true", help="start the GPU variants of worker and serving")
    parser.add_argument(
        "--folder", type=Path, default=INFRA, help="that holds compose.yaml (default: %(default)s)"
    )
    options = parser.parse_args()
    files = write(options.folder / "secrets")
    chosen = options.folder / ".env"
    if not chosen.exists():
        chosen.write_text(
            "# Read by docker compose. Profiles: cpu or gpu, and observability beside it.\n"
            f"COMPOSE_PROFILES={'gpu' if options.gpu else 'cpu'}\n",
            "utf-8",
        )
    print(f"{len(files)} files in {options.folder / 'secrets'}; profiles are in {chosen}")


if __name__ == "__main__":
    main()

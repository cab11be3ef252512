"""The local platform without processes: folders, ports, passwords, configuration, and what it says."""

from __future__ import annotations

import configparser
import dataclasses
import http.server
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from infra.local import backups, health, leftovers, place, ports, postgres, s3, stack, steps
from infra.local import passwords as secret
from infra.local.__main__ import cli, exports
from infra.local.errors import CannotStart, Missing, NotRunning, PlatformError, PortTaken, WrongFolder
from infra.local.place import Place
from infra.local.service import Service, fingerprint, launch_file, launch_text, prepare, started_file
from infra.local.settings import PlatformSettings, load
from infra.local.supervision import Supervisor, configuration
from registry.errors import Explained, UsageError

SQLITE = PlatformSettings(database="sqlite")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short path: there are sockets in it."""
    with tempfile.TemporaryDirectory(prefix="p-") as made:
        yield Path(made)


@pytest.fixture
def where(tmp_path: Path) -> Place:
    """A platform's folder, claimed."""
    found = Place(home=tmp_path / "p")
    place.claim(found)
    return found


# -- folder --


def test_a_folder_is_claimed_once_and_is_known_again(where: Place) -> None:
    before = place.read(where)
    place.claim(where)
    assert place.read(where) == before
    assert before["format"] == place.FORMAT
    assert stat.S_IMODE(where.services.stat().st_mode) == 0o700


def test_the_platform_lies_below_the_data_folder_and_is_found_from_within(tmp_path: Path) -> None:
    assert place.place(tmp_path).home == tmp_path / "platform"
    place.claim(place.place(tmp_path))
    assert place.place(tmp_path).home == tmp_path / "platform"
    assert place.place(tmp_path / "platform").home == tmp_path / "platform"


def test_strangers_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "mine.txt").write_text("mine")
    with pytest.raises(WrongFolder, match="no platform made them"):
        place.claim(Place(home=tmp_path))
    assert [one.name for one in (tmp_path / "services").iterdir()] == ["mine.txt"]


def test_a_copy_of_a_platform_is_refused(where: Place, tmp_path: Path) -> None:
    shutil.copytree(where.home, tmp_path / "q")
    with pytest.raises(WrongFolder, match="a copy, or it was moved"):
        place.claim(Place(home=tmp_path / "q"))


def test_another_format_is_refused(where: Place) -> None:
    place.keep(where, {"format": 99})
    with pytest.raises(WrongFolder, match="format 99"):
        place.claim(where)


def test_a_damaged_record_is_explained(where: Place) -> None:
    where.record.write_text("{")
    with pytest.raises(WrongFolder, match="cannot be read"):
        place.claim(where)


def test_a_path_too_long_for_a_socket_is_explained(tmp_path: Path) -> None:
    with pytest.raises(WrongFolder, match="too long"):
        place.claim(Place(home=tmp_path / ("x" * 100)))


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WrongFolder, match="cannot be written"):
        place.claim(Place(home=tmp_path / "file" / "p"))


def test_a_full_disk_is_told_before_databases_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WrongFolder, match="5 MB left"):
        place.claim(Place(home=tmp_path / "p"))
    monkeypatch.undo()
    place.claim(Place(home=tmp_path / "p"))  # there is room now, and nothing of the first try is in the way


def test_what_a_start_leaves_behind_that_was_cut_off_is_no_stranger_s(tmp_path: Path) -> None:
    found = Place(home=tmp_path)
    found.logs.mkdir(parents=True)
    (found.services / f".{found.record.name}-x1").write_text("{")
    place.claim(found)
    assert place.read(found)["home"] == str(tmp_path)


# -- ports --


def test_usual_ports_are_taken_where_they_are_free() -> None:
    found = ports.choose({}, {}, lambda _: True)
    assert {name: found[name] for name in ("s3", "mlflow", "prefect-server", "serving")} == {
        "s3": 8333, "mlflow": 5000, "prefect-server": 4200, "serving": 8400,
    }  # fmt: skip
    assert len(set(found.values())) == len(ports.USUAL)


def test_a_taken_port_is_replaced_and_the_new_one_is_kept() -> None:
    found = ports.choose({}, {}, lambda port: port != 5000)
    assert found["mlflow"] != 5000
    assert ports.choose({}, found, lambda _: True) == found


def test_ports_of_what_runs_are_its_own() -> None:
    kept = ports.choose({}, {}, lambda _: True)
    mine = {number for name, at in kept.items() for number in (at, at + ports.GRPC)}
    assert ports.choose({}, kept, lambda port: port not in mine, kept) == kept
    assert ports.choose({}, kept, lambda port: port not in mine, ()) != kept


def test_a_port_that_the_settings_name_is_never_replaced() -> None:
    assert ports.choose({"mlflow": 7000}, {"mlflow": 5000}, lambda _: True)["mlflow"] == 7000
    with socket.socket() as listener:
        listener.bind((ports.HOST, 0))
        listener.listen()
        taken = listener.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {taken}: it is taken") as raised:
            ports.choose({"mlflow": taken}, {})
    assert str(os.getpid()) in raised.value.message  # who has it
    assert "mlflow_port" in raised.value.mend


def test_the_s3_server_gets_room_for_grpc() -> None:
    found = ports.choose({}, {}, lambda port: port != 18333)
    assert found["s3"] != 8333


def test_one_port_for_two_services_is_refused() -> None:
    with pytest.raises(PortTaken):
        ports.choose({"mlflow": 7000, "serving": 7000}, {}, lambda _: True)


# -- passwords --


def test_passwords_are_made_once_and_only_their_owner_reads_them(where: Place) -> None:
    made = secret.passwords(where)
    assert secret.passwords(where) == made
    assert stat.S_IMODE(where.secrets.stat().st_mode) == 0o600
    words = [word for names in made.values() for word in names.values()]
    assert len(set(words)) == len(words)
    assert min(map(len, words)) >= 40
    where.secrets.chmod(0o644)
    secret.passwords(where)
    assert stat.S_IMODE(where.secrets.stat().st_mode) == 0o600


def test_a_password_that_is_deleted_is_made_anew_and_no_other(where: Place) -> None:
    before = secret.passwords(where)
    kept = json.loads(where.secrets.read_text())
    del kept["prefect"]["admin"]
    where.secrets.write_text(json.dumps(kept))
    after = secret.passwords(where)
    assert after["prefect"]["admin"] != before["prefect"]["admin"]
    assert {**after, "prefect": {}} == {**before, "prefect": {}}


def test_a_damaged_file_of_passwords_is_not_overwritten(where: Place) -> None:
    secret.passwords(where)
    where.secrets.write_text("{")
    with pytest.raises(WrongFolder, match="cannot be read"):
        secret.passwords(where)
    assert where.secrets.read_text() == "{"


@pytest.mark.parametrize(
    ("service", "name"), [(service, name) for service, names in secret.NAMES.items() for name in names]
)
def test_each_password_can_be_made_anew_and_no_other_changes(where: Place, service: str, name: str) -> None:
    before = secret.passwords(where)
    secret.keep(where, secret.renewed(before, service, name))
    after = secret.passwords(where)
    assert after[service][name] != before[service][name]
    assert {**after[service], name: ""} == {**before[service], name: ""}
    assert {**after, service: {}} == {**before, service: {}}


def test_a_password_that_services_do_not_take_unasked_needs_them_running(where: Place) -> None:
    before = secret.passwords(where)
    for service, name in (("postgres", "admin"), ("mlflow", "admin")):
        with pytest.raises(NotRunning):
            steps.renew(where, service, name, SQLITE, print)
    assert secret.passwords(where) == before
    assert steps.renew(where, "s3", "publisher", SQLITE, print) == []  # the next start sets it
    assert secret.passwords(where)["s3"]["publisher"] != before["s3"]["publisher"]


@pytest.mark.parametrize(("service", "name", "known"), [("s4", "admin", "s3"), ("s3", "amdin", "admin")])
def test_a_password_that_is_none_is_explained(where: Place, service: str, name: str, known: str) -> None:
    with pytest.raises(UsageError, match=f"no password of {service} {name}") as raised:
        steps.renew(where, service, name, SQLITE, print)
    assert known in raised.value.mend


# -- what is started --


def test_no_command_line_holds_a_secret(where: Place) -> None:
    found = stack.build(where, SQLITE)
    words = {word for names in found.secrets.values() for word in names.values()}
    texts = [" ".join(service.command) for service in found.services]
    texts.append(configuration(found.services, where, 1 << 20))
    assert not [word for word in words for text in texts if word in text]


def test_files_that_hold_secrets_are_closed(where: Place) -> None:
    found = stack.build(where, SQLITE)
    words = {word for names in found.secrets.values() for word in names.values()}
    for service in found.services:
        prepare(service, where)
    holders = [
        file for file in where.home.rglob("*") if file.is_file() and any(w in file.read_text() for w in words)
    ]
    assert {"secrets.json", "s3.json", "mlflow.json", "serving.json"} <= {file.name for file in holders}
    assert {stat.S_IMODE(file.stat().st_mode) for file in holders} == {0o600}


def test_everything_listens_on_the_loopback_alone(where: Place) -> None:
    found = stack.build(where, SQLITE)
    assert "-ip.bind=127.0.0.1" in found["s3"].command
    assert "-master.telemetry=false" in found["s3"].command
    for name in ("mlflow", "prefect-server", "serving"):
        command = list(found[name].command)
        assert command[command.index("--host") + 1] == "127.0.0.1"
    assert found["prefect-worker"].environment["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"
    assert "0.0.0.0" not in json.dumps([launch_text(service, where) for service in found.services])


def test_serving_may_read_adapters_and_nothing_else(where: Place) -> None:
    found = stack.build(where, SQLITE)
    environment = found["serving"].environment
    assert environment["AWS_ACCESS_KEY_ID"] == "reader"
    for name in ("publisher", "mlflow", "admin"):
        assert found.secrets["s3"][name] not in environment.values()
    assert not {"MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING", "PGPASSWORD"} & set(environment)
    assert s3.ACTIONS["reader"] == ("Read:adapters", "List:adapters")


def test_prefect_asks_for_a_password_and_its_clients_have_it(where: Place) -> None:
    found = stack.build(where, SQLITE)
    who = found["prefect-server"].environment["PREFECT_SERVER_API_AUTH_STRING"]
    assert who == f"admin:{found.secrets['prefect']['admin']}"
    assert found["prefect-worker"].environment["PREFECT_API_AUTH_STRING"] == who
    assert found.environment["PREFECT_API_AUTH_STRING"] == who


def test_services_share_no_files_in_tmp_with_other_users_of_the_machine(where: Place) -> None:
    found = stack.build(where, SQLITE)
    sockets = [word.partition("=")[2] for word in found["s3"].command if "localSocket=" in word]
    assert len(sockets) == 2
    assert all(Path(one).is_relative_to(where.services) for one in sockets)
    temporary = Path(found["prefect-worker"].environment["TMPDIR"])
    assert temporary.is_relative_to(where.home)
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700


def test_configuration_of_supervisord(where: Place) -> None:
    found = stack.build(where, SQLITE)
    parsed = configparser.RawConfigParser()
    parsed.read_string(configuration(found.services, where, 12345))
    assert parsed["unix_http_server"]["chmod"] == "0600"
    assert parsed["unix_http_server"]["file"] == str(where.socket)
    programs = [name.partition(":")[2] for name in parsed.sections() if name.startswith("program:")]
    assert programs == list(found.names) == [
        "s3", "mlflow", "prefect-server", "prefect-worker", "serving", "health",
    ]  # fmt: skip
    for name in programs:
        program = parsed[f"program:{name}"]
        assert program["autorestart"] == "true"
        assert program["stdout_logfile"] == str(where.log(name))
        assert program["stdout_logfile_maxbytes"] == "12345"
        assert program["command"].startswith(sys.executable)


def test_percent_signs_in_a_path_reach_supervisord(tmp_path: Path) -> None:
    found = Place(home=tmp_path / "100%")
    place.claim(found)
    text = configuration([Service(name="x", command=["x"], folder=tmp_path)], found, 1)
    assert "100%%" in text
    assert "100%/" not in text


def test_a_service_is_only_restarted_when_something_about_it_changes(where: Place) -> None:
    service = Service(name="x", command=["x"], folder=where.home, environment={"A": "1"})
    assert prepare(service, where) is False
    launched = fingerprint(launch_file(where, "x").read_text())
    started_file(where, "x").write_text(json.dumps({"launched": launched}))
    assert prepare(service, where) is True
    other = Service(name="x", command=["x"], folder=where.home, environment={"A": "2"})
    assert prepare(other, where) is False


# -- settings --


def test_settings_come_from_environment_over_file(tmp_path: Path) -> None:
    (tmp_path / "adapter-foundry.toml").write_text("[platform]\nmlflow_port = 7000\nruns = 3\n")
    found = load({"ADAPTER_FOUNDRY_PLATFORM_MLFLOW_PORT": "7001"}, tmp_path)
    assert (found.mlflow_port, found.runs) == (7001, 3)
    with pytest.raises(UsageError, match="PLATFORM_MLFLOW_PROT"):
        load({"ADAPTER_FOUNDRY_PLATFORM_MLFLOW_PROT": "1"}, tmp_path)


def test_a_change_of_settings_changes_what_is_started(where: Place) -> None:
    before = launch_text(stack.build(where, SQLITE)["serving"], where)
    settings = PlatformSettings(database="sqlite", adapters=("other@prod",))
    assert launch_text(stack.build(where, settings)["serving"], where) != before
    own = {"ADAPTER_FOUNDRY_SERVING_MAX_ROWS": "4"}
    assert "MAX_ROWS" in launch_text(stack.build(where, SQLITE, variables=own)["serving"], where)


def test_passed_variables_reach_flow_runs_and_nothing_else(where: Place) -> None:
    settings = PlatformSettings(database="sqlite", pass_variables=("OPENAI_API_KEY",))
    found = stack.build(where, settings, variables={"OPENAI_API_KEY": "k", "OTHER_KEY": "o"})
    having = [one.name for one in found.services if "OPENAI_API_KEY" in one.environment]
    assert having == ["prefect-worker"]
    assert "OTHER_KEY" not in found["prefect-worker"].environment


def test_a_passed_variable_that_another_shell_lacks_keeps_its_value_and_that_is_said(where: Place) -> None:
    name = "ADAPTER_FOUNDRY_KEY_PASSPHRASE"
    settings = PlatformSettings(database="sqlite", pass_variables=(name,))
    nothing = stack.build(where, settings, variables={})
    assert name not in nothing["prefect-worker"].environment
    assert nothing.notes == (f"{name} is named in pass_variables and not set: flow runs go without it",)
    first = stack.build(where, settings, variables={name: "a phrase"})
    prepare(first["prefect-worker"], where)
    again = stack.build(where, settings, variables={})
    assert launch_text(again["prefect-worker"], where) == launch_text(first["prefect-worker"], where)
    assert (first.notes, again.notes) == (
        (),
        (f"{name} is not set here: flow runs keep the value that they have",),
    )
    other = stack.build(where, settings, variables={name: "another"})
    assert other["prefect-worker"].environment[name] == "another"
    assert name not in stack.build(where, SQLITE, variables={})["prefect-worker"].environment


def test_a_shell_takes_the_variables_of_a_client_and_forgets_credentials_of_its_own(where: Place) -> None:
    found = stack.build(where, SQLITE).environment
    assert all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in found)
    lines = ['eval "$1"', 'echo "$AWS_REGION $AWS_DEFAULT_REGION ${AWS_SESSION_TOKEN-none}"']
    own = {"PATH": os.environ["PATH"], "AWS_SESSION_TOKEN": "mine", "AWS_REGION": "eu-central-1"}
    ran = subprocess.run(
        ["sh", "-euc", "\n".join(lines), "sh", exports(found)],
        env=own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == ("us-east-1 us-east-1 none\n", "")


def test_new_ports_reach_the_registry_s_file_and_nothing_else_changes(tmp_path: Path) -> None:
    file = tmp_path / "adapter-foundry.toml"
    text = '# mine\n[registry]\nstore = "s3://a"\nmlflow_tracking_uri = "http://h:1"\n\n[serving]\nport = 1\n'
    file.write_text(text)
    assert steps.retarget(file, {"mlflow_tracking_uri": "http://h:2", "store": "s3://a"})
    assert file.read_text() == text.replace("h:1", "h:2")
    assert not steps.retarget(file, {"mlflow_tracking_uri": "http://h:2"})


# -- databases --


def test_what_the_first_start_decided_stays(where: Place) -> None:
    stack.build(where, SQLITE)
    assert stack.build(where, PlatformSettings()).engine is None
    with pytest.raises(WrongFolder, match="keeps its rows in sqlite"):
        stack.build(where, PlatformSettings(database="postgresql"))


def test_without_postgresql_sqlite_does_and_says_why(where: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "installed", dict)
    found = stack.build(where, PlatformSettings())
    assert found.engine is None
    assert found.why_sqlite == "PostgreSQL is not installed"
    assert found["mlflow"].command[-3].startswith("sqlite:///")
    assert found.environment["ADAPTER_FOUNDRY_LEDGER"].startswith("sqlite:///")


def test_who_asks_for_postgresql_is_not_given_sqlite(where: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "installed", dict)
    with pytest.raises(Missing, match="not installed"):
        stack.build(where, PlatformSettings(database="postgresql"))


def test_databases_of_another_version_are_explained(where: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data = where.services / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("9\n")
    monkeypatch.setattr(postgres, "installed", lambda: {15: Path("/nowhere"), 17: Path("/nowhere")})
    with pytest.raises(WrongFolder, match=r"of PostgreSQL 9, and installed is: 15, 17"):
        postgres.engine(where)


PROGRAMS = {"initdb": "while [ $# -gt 0 ]; do [ \"$1\" = -D ] && to=$2; shift; done; mkdir \"$to\"; "
            "echo 17 > \"$to/PG_VERSION\"", "postgres": "echo 'postgres (PostgreSQL) 17.1'"}  # fmt: skip


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PostgreSQL that makes nothing but the file that tells its version, and a user who is not root."""
    found = tmp_path / "bin"
    found.mkdir()
    for name, does in PROGRAMS.items():
        (found / name).write_text(f"#!/bin/sh\n{does}\n")
        (found / name).chmod(0o755)
    monkeypatch.setattr(postgres, "_FOLDERS", ())
    monkeypatch.setenv("PATH", f"{found}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return found


def test_an_ordinary_user_gets_databases_in_a_new_folder(where: Place, programs: Path) -> None:
    found = stack.build(where, PlatformSettings())
    assert found.engine == postgres.Engine(folder=programs, major=17)
    assert postgres.make(where, found.engine, found.secrets)
    assert [one.name for one in (where.services / "postgres").iterdir()] == ["data"]
    assert not postgres.make(where, found.engine, found.secrets)
    with pytest.raises(WrongFolder, match="keeps its rows in postgresql"):
        stack.build(where, SQLITE)


def test_where_no_databases_can_be_made_the_way_out_that_is_told_is_open(
    where: Place, programs: Path
) -> None:
    (programs / "initdb").write_text("#!/bin/sh\necho no locale >&2; exit 1\n")
    found = stack.build(where, PlatformSettings())
    assert found.engine is not None
    with pytest.raises(CannotStart, match="no locale") as raised:
        postgres.make(where, found.engine, found.secrets)
    assert "ADAPTER_FOUNDRY_PLATFORM_DATABASE=sqlite" in raised.value.mend
    assert stack.build(where, SQLITE).engine is None
    assert stack.build(where, PlatformSettings()).engine is None  # decided now


# -- supervision --

#: As Prefect's worker: asked to stop, it ends its run at once. A run that is asked itself takes time to save.
RUN = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "runs").touch()
time.sleep(600)
"""
WORKER = """
import signal, subprocess, sys, time
run = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
def stop(*_):
    run.kill()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
run.wait()
time.sleep(600)
"""
#: Stops when it is asked to and may.
SLOW = """
import pathlib, signal, sys, time
def stop(*_):
    while not pathlib.Path(sys.argv[1], "may-stop").exists():
        time.sleep(0.05)
    sys.exit()
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], "listens").touch()
time.sleep(600)
"""


@pytest.fixture
def started(where: Place) -> Iterator[Callable[[Service], stack.Stack]]:
    """Starts a platform that has one service."""

    def start(service: Service) -> stack.Stack:
        found = dataclasses.replace(stack.build(where, SQLITE), services=(service,))
        supervisor = Supervisor(where)
        if supervisor.pid is None:
            supervisor.start(configuration(found.services, where, 1 << 20))
        bring_up(found)
        return found

    yield start
    Supervisor(where).shut_down(30)
    leftovers.end_all(where, 1)


def bring_up(found: stack.Stack) -> None:
    asked = {name: lambda timeout: None for name in found.names}
    steps.start(found, Supervisor(found.where), asked, print)


def until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not so():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("way", ["restart", "another configuration", "stop"])
def test_whoever_stops_the_worker_lets_its_runs_save(
    where: Place, started: Callable[[Service], stack.Stack], way: str
) -> None:
    service = Service(
        name="prefect-worker", command=[sys.executable, "-c", WORKER, RUN, str(where.home)],
        folder=where.home, stop_seconds=20, many=True,
    )  # fmt: skip
    found = started(service)
    until((where.home / "runs").exists)
    if way == "restart":
        steps.restart(where, ["prefect-worker"], print)
    elif way == "stop":
        steps.stop(where, Supervisor(where), ["prefect-worker"])
    else:
        other = dataclasses.replace(service, environment={"ANOTHER": "1"})
        bring_up(dataclasses.replace(found, services=(other,)))
    assert (where.home / "saved").exists()


def test_a_service_that_is_being_stopped_is_waited_for_and_started_again(
    where: Place, started: Callable[[Service], stack.Stack]
) -> None:
    command = [sys.executable, "-c", SLOW, str(where.home)]
    slow = Service(name="slow", command=command, folder=where.home, stop_seconds=120)
    found, supervisor = started(slow), Supervisor(where)
    until((where.home / "listens").exists)
    before = supervisor.states()["slow"]["pid"]
    with pytest.raises(PlatformError, match="slow did not stop in 0 seconds"):
        supervisor.stop(["slow"], 0)
    assert supervisor.states()["slow"]["statename"] == "STOPPING"  # as a `down` leaves it that was killed
    threading.Timer(1, (where.home / "may-stop").touch).start()
    bring_up(found)
    after = supervisor.states()["slow"]
    assert after["statename"] == "RUNNING"
    assert after["pid"] != before


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers as the server's ``status`` says, in the place of a service whose process only sleeps."""

    def do_GET(self) -> None:
        self.send_response(self.server.status())  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def watched(where: Place) -> Iterator[Callable[..., http.server.HTTPServer]]:
    """Starts supervisord with serving, and what answers in the place of serving."""
    servers: list[http.server.HTTPServer] = []

    def start(**settings: object) -> http.server.HTTPServer:
        found = stack.build(where, PlatformSettings(database="sqlite", probe_timeout=600, **settings))
        sleeps = Service(name="serving", command=["sleep", "3600"], folder=where.home)
        services = [sleeps if one.name == sleeps.name else one for one in found.services]
        for one in services:
            prepare(one, where)
        Supervisor(where).start(configuration(services, where, 1 << 20))
        Supervisor(where).run(sleeps.name)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", found.ports[sleeps.name]), Answers)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()
    Supervisor(where).shut_down(30)
    leftovers.end_all(where, 1)


@pytest.mark.parametrize(
    ("answer", "start_timeout"), [pytest.param(200, 3600.0, id="works"), pytest.param(503, 0.001, id="fails")]
)
def test_what_a_process_answered_is_not_said_of_the_one_that_came_after_it(
    where: Place, watched: Callable[..., http.server.HTTPServer], answer: int, start_timeout: float
) -> None:
    """One that answers gives the next no worse a start, and one that fails does not have the next killed."""
    server = watched(start_timeout=start_timeout, probe_failures=1)

    def pid() -> int:
        state = Supervisor(where).states()["serving"]
        return int(state["pid"]) if state["statename"] == "RUNNING" else 0

    def ends_as_it_is_asked() -> int:
        before = pid()
        os.kill(before, signal.SIGKILL)
        until(lambda: pid() not in (0, before))
        return answer

    until(lambda: pid() != 0)
    watcher, first = health.Watcher(where.home), pid()
    server.status = ends_as_it_is_asked  # type: ignore[attr-defined]
    watcher.look()
    second = pid()
    assert second not in (0, first)
    if answer == 200:  # the second takes its time to start
        server.status = lambda: 503  # type: ignore[attr-defined]
        watcher.look()
    assert json.loads(health.report_file(where).read_text("utf-8"))["restarts"] == {}
    assert pid() == second


# -- backups --


def test_databases_of_a_backup_are_named_and_their_passwords_are_no_arguments(where: Place) -> None:
    secrets = secret.passwords(where)
    found = backups.databases(where, {"postgres": 5}, secrets, on_postgres=True)
    words, variables = backups.command(["restore", "b"], {**found, "prefect": "skip"})
    assert words[-3:] == [
        "--database=mlflow=env:PLATFORM_DATABASE_MLFLOW",
        "--database=serving=env:PLATFORM_DATABASE_SERVING",
        "--database=prefect=skip",
    ]
    assert secrets["postgres"]["mlflow"] in variables["PLATFORM_DATABASE_MLFLOW"]
    assert not any(word in " ".join(words) for word in secrets["postgres"].values())


def test_databases_of_sqlite_are_the_files_that_services_write(where: Place) -> None:
    found = stack.build(where, SQLITE)
    named = backups.databases(where, found.ports, found.secrets, on_postgres=False)
    assert named["mlflow"] in found["mlflow"].command
    accounts = (where.services / "mlflow" / "accounts.ini").read_text()
    assert f"database_uri = {named['accounts']}\n" in accounts
    jobs = found["serving"].environment
    assert named["serving"] == f"sqlite:///{jobs['ADAPTER_FOUNDRY_HOME']}/serving/jobs.db"
    assert "ADAPTER_FOUNDRY_SERVING_JOBS" not in jobs  # so it is where serving has it


# -- without a platform --


def test_nothing_runs_and_everything_says_so(home: Path) -> None:
    run = CliRunner().invoke
    with pytest.raises(NotRunning):
        Supervisor(place.place(home)).states()
    stopped = run(cli, ["down", "--json"])
    assert json.loads(stopped.stdout)["stopped"] is False
    told = run(cli, ["status", "--json"])
    assert told.exit_code == 1
    assert json.loads(told.stdout)["running"] is False
    for words in (["env"], ["run", "--", "true"], ["restart"], ["backup", "b"], ["password", "s3", "admin"]):
        result = run(cli, words)
        assert isinstance(result.exception, NotRunning), words
        assert "infra.local up" in result.exception.mend


def test_weed_missing_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match="weed") as raised:
        s3.program()
    assert isinstance(raised.value, Explained)
    assert "pip install" in raised.value.mend

"""The way up and the way down: each step looks what is there, so that a start that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from flows.errors import ServerError
from flows.server import exclusive
from flows.settings import FlowSettings
from flows.worker import end_runs
from infra.local import health, leftovers, mlflow, place, postgres, prefect, s3, serving, stack
from infra.local.errors import CannotStart, NotRunning, PlatformError
from infra.local.passwords import keep, passwords, renewed
from infra.local.place import Place
from infra.local.probes import Probe, of, problem
from infra.local.service import COMMON, prepare, python, shell, stop_seconds
from infra.local.settings import PlatformSettings
from infra.local.stack import Stack
from infra.local.supervision import Supervisor, configuration
from registry.families import KNOWN_BASES
from registry.manifest import BaseModelRef
from registry.settings import CONFIG_NAME
from serving.bases import folder_of, register
from trainer.portraits import BASE_ID, base_path

Tell = Callable[[str], None]
_LOG_LINES = 12
#: Beyond what a service may take to stop.
_DOWN_SECONDS = 60.0
_REPEAT_SECONDS = 0.1
#: Passwords that only who knows the one of before can change; all others `up` sets as they are written down.
_KEPT_INSIDE = {(postgres.NAME, "admin"): postgres.renew, (mlflow.NAME, mlflow.ADMIN): mlflow.renew}


@contextmanager
def alone(where: Place) -> Iterator[None]:
    """Hold the platform for the time of a block.

    Raises:
        flows.errors.ServerError: somebody else brings it up or down.
    """
    busy = ServerError(
        f"another command is starting or stopping the platform in {where.home}", "wait until it is done"
    )
    with exclusive(where.services / "lock", busy):
        yield


def up(where: Place, settings: PlatformSettings, tell: Tell) -> tuple[Stack, list[str]]:
    """Bring a platform up, or what is missing of it; return it, and what was done.

    Args:
        where: its folders.
        settings: of the platform.
        tell: is given what happens, a line at a time.

    Raises:
        Explained: something cannot be started; what was done stays.
    """
    place.claim(where)
    with alone(where):
        do, done = _telling(tell)
        found, supervisor = _supervised(where, settings, do)
        for line in found.notes:
            tell(line)
        _start_all(found, supervisor, do)
        return found, done


def storage(where: Place, settings: PlatformSettings, tell: Tell) -> tuple[Stack, list[str]]:
    """Bring up where a platform keeps its data, and nothing that works with them; `alone` is held.

    Raises:
        Explained: something cannot be started; what was done stays.
    """
    do, done = _telling(tell)
    found, supervisor = _supervised(where, settings, do)
    _start_storage(found, supervisor, do)
    return found, done


def _telling(tell: Tell) -> tuple[Tell, list[str]]:
    """Return what tells and remembers, and what it remembers."""
    done: list[str] = []

    def do(what: str) -> None:
        done.append(what)
        tell(what)

    return do, done


def _supervised(where: Place, settings: PlatformSettings, do: Tell) -> tuple[Stack, Supervisor]:
    """Return the platform, with databases' folder and a supervisord of today's configuration."""
    supervisor = Supervisor(where)
    if supervisor.pid is not None and not supervisor.answers:
        do("supervisord did not answer: killed")
        supervisor.kill()
    running = _running(supervisor)
    if supervisor.pid is None and (count := leftovers.end_all(where)):
        do(f"ended {count} processes that nobody looked after")
    found = stack.build(where, settings, running)
    if found.engine is not None and postgres.make(where, found.engine, found.secrets):
        do(f"made databases of PostgreSQL {found.engine.major}")
    _supervise(found, supervisor, do)
    return found, supervisor


def down(where: Place, tell: Tell) -> bool:
    """Stop everything; all data stay. Flow runs get time to save what they did.

    Returns:
        whether anything ran.
    """
    if not where.services.is_dir():
        return False
    with alone(where):
        supervisor = Supervisor(where)
        if supervisor.pid is not None and not supervisor.answers:
            tell("supervisord does not answer: killed")
            supervisor.kill()
        ran = supervisor.pid is not None
        if ran:
            stop_all(where, supervisor, tell)
        if left := leftovers.end_all(where):
            tell(f"ended {left} processes that nobody looked after")
        return ran or left > 0


def stop_all(where: Place, supervisor: Supervisor, tell: Tell = lambda line: None) -> None:
    """Stop all services, those first that need others, and supervisord."""
    running = [name for name, one in supervisor.states().items() if one["pid"]]
    last = [name for name in running if name in (postgres.NAME, s3.NAME)]
    for names in (
        [health.NAME] if health.NAME in running else [],
        [one for one in running if one not in (*last, health.NAME)],
        last,
    ):
        begun = time.monotonic()
        try:
            stop(where, supervisor, names)
        except PlatformError as error:
            tell(error.message)  # the end of supervisord is tried all the same
        if names:
            tell(f"stopped {', '.join(sorted(names))}, {time.monotonic() - begun:.1f} s")
    supervisor.shut_down(_DOWN_SECONDS)


def stop(where: Place, supervisor: Supervisor, names: Sequence[str]) -> None:
    """Stop services at once and wait until they have ended; flow runs get time to save what they did.

    Raises:
        PlatformError: one does not end, though it was killed.
    """
    worker = supervisor.states()[prefect.WORKER] if prefect.WORKER in names else None
    if worker is not None and worker["statename"] == "RUNNING":
        end_runs(worker["pid"], FlowSettings.read(where.home).stop_seconds)
    # supervisord kills who takes longer than he was given when he was started.
    supervisor.stop(names, _DOWN_SECONDS + max((stop_seconds(where, name) for name in names), default=0))


def renew(where: Place, service: str, name: str, settings: PlatformSettings, tell: Tell) -> list[str]:
    """Make a password anew, set it in the service, and restart who uses it; return what was done.

    Raises:
        NotRunning: there is no platform, or the service itself keeps the password and does not run.
        Explained: there is no such password, or something cannot be started.
    """
    if not where.record.is_file():
        raise NotRunning(f"there is no platform in {where.home}", "start one: python -m infra.local up")
    with alone(where):
        before = passwords(where)
        after = renewed(before, service, name)
        if (set_it := _KEPT_INSIDE.get((service, name))) is None:
            keep(where, after)
        else:
            Supervisor(where).ask("getState")
            try:
                set_it(place.read(where)["ports"], before, after, lambda: keep(where, after))
            except Exception as error:  # whatever the service's client raises
                raise PlatformError(
                    f"{service} does not take another password for {name}: {error}",
                    "look at `python -m infra.local status`; the password is the one of before",
                ) from error
    tell(f"made the password of {name} for {service} anew")
    return up(where, settings, tell)[1] if Supervisor(where).pid is not None else []


def restart(where: Place, names: Sequence[str], tell: Tell) -> None:
    """Restart services, with the configuration that they have.

    Raises:
        NotRunning: the platform does not run.
    """
    supervisor = Supervisor(where)
    states = supervisor.states()
    with alone(where):
        for name in names:
            if name not in states:
                raise PlatformError(
                    f"there is no service {name!r}", f"choose from: {', '.join(sorted(states))}"
                )
        for name in names:
            stop(where, supervisor, [name])
            supervisor.run(name)
            tell(f"{name} restarted")


def _running(supervisor: Supervisor) -> tuple[str, ...]:
    try:
        return tuple(name for name, one in supervisor.states().items() if one["pid"])
    except NotRunning:
        return ()


def _supervise(found: Stack, supervisor: Supervisor, do: Tell) -> None:
    """Have a supervisord with the configuration of today; what runs under another one is stopped first."""
    text = configuration(found.services, found.where, found.settings.log_bytes)
    if supervisor.pid is not None and not supervisor.configured(text):
        do("the configuration of supervisord has changed: all services are restarted")
        stop_all(found.where, supervisor)
    if supervisor.pid is None:
        supervisor.start(text)
        do("supervisord started")


def _start_all(found: Stack, supervisor: Supervisor, do: Tell) -> None:
    """Start in order what does not run as it should, each stage once the one before it answers."""
    secrets, ports = found.secrets, found.ports
    if supervisor.states()[health.NAME]["pid"] and not prepare(found[health.NAME], found.where):
        # It knows the passwords and ports of before, by which who has the new ones does not answer.
        do(f"{health.NAME} has another configuration: stopped until all others work")
        stop(found.where, supervisor, [health.NAME])
    working = of(ports, secrets, on_postgres=found.engine is not None)
    _start_storage(found, supervisor, do)
    _upgrade(found, supervisor, do)
    start(found, supervisor, {name: working[name] for name in (mlflow.NAME, prefect.SERVER)}, do)
    for what in mlflow.set_up(ports, secrets):
        do(f"made {what}")
    _registry(found, do)
    _deployments(found, do)
    start(found, supervisor, {name: working[name] for name in (prefect.WORKER, serving.NAME)}, do)
    if supervisor.states()[health.NAME]["pid"] and (why := health.silence(found.where)) is not None:
        do(f"the watcher hangs ({why}): restarted")
        stop(found.where, supervisor, [health.NAME])
    if not supervisor.states()[health.NAME]["pid"]:
        health.report_file(found.where).unlink(missing_ok=True)  # of the one before, who has not looked since
    start(found, supervisor, {health.NAME: lambda timeout: None}, do)


def _start_storage(found: Stack, supervisor: Supervisor, do: Tell) -> None:
    """Start databases and the S3 server, and make what is to be in them."""
    secrets, ports = found.secrets, found.ports
    first: dict[str, Probe] = {"s3": lambda timeout: s3.listens(ports, secrets, timeout)}
    if found.engine is not None:
        first["postgres"] = lambda timeout: postgres.listens(ports, secrets, timeout)
    start(found, supervisor, first, do)
    for made in (
        postgres.set_up(ports, secrets) if found.engine is not None else [],
        s3.set_up(ports, secrets),
    ):
        for what in made:
            do(f"made {what}")


def start(found: Stack, supervisor: Supervisor, asked: dict[str, Probe], do: Tell) -> None:
    """Start services at once that do not run as they should, and wait until each of them answers.

    Raises:
        CannotStart: one does not answer.
    """
    states = supervisor.states()
    begun = time.monotonic()
    changed = []
    for name in asked:
        same = prepare(found[name], found.where)
        ending = states[name]["statename"] == "STOPPING"  # a `down` that was killed has asked it to
        if states[name]["pid"] and (ending or not same):
            do(f"{name} {'is being stopped' if ending else 'has another configuration'}: restarted")
            stop(found.where, supervisor, [name])
        if ending or not (states[name]["pid"] and same):
            supervisor.run(name)
            changed.append(name)
    for name, probe in asked.items():
        if (why := _wait(name, probe, found, supervisor)) is not None:
            log = found.where.log(name)
            raise CannotStart(
                f"{name} does not start: {why}; the end of {log}:\n{_end(log)}",
                "correct what the log says and run this again; on a slow machine raise "
                "ADAPTER_FOUNDRY_PLATFORM_START_TIMEOUT",
            )
        if name in changed:
            do(f"{name} started, {time.monotonic() - begun:.1f} s")


def _upgrade(found: Stack, supervisor: Supervisor, do: Tell) -> None:
    """Bring MLflow's tables up to date, if another version of MLflow made them."""
    now, before = version("mlflow"), place.read(found.where).get("mlflow")
    if before == now:
        return
    if before is not None:
        if supervisor.states()[mlflow.NAME]["pid"]:
            stop(found.where, supervisor, [mlflow.NAME])
        upgrade_mlflow(found)
        do(f"MLflow's tables are of {now} now, they were of {before}")
    place.keep(found.where, {"mlflow": now})


def upgrade_mlflow(found: Stack) -> None:
    """Bring MLflow's tables up to date; its server does not, and refuses to start with older ones.

    Raises:
        CannotStart: MLflow cannot do it.
    """
    rows = mlflow.database(found.where, found.ports, found.engine is not None)
    run(found, python("mlflow", "db", "upgrade", rows), found[mlflow.NAME].environment)


def _registry(found: Stack, do: Tell) -> None:
    """Make the registry of the platform, and register the base of the portraits."""
    kept, where = place.read(found.where), found.where
    wanted = {
        "ledger": found.environment["ADAPTER_FOUNDRY_LEDGER"],
        "mlflow_tracking_uri": mlflow.url(found.ports),
        "store": s3.STORE,
    }
    file = where.home / CONFIG_NAME
    words = [
        "--server",
        *(word for key, value in wanted.items() for word in (f"--{key.partition('_')[0]}", value)),
    ]
    if file.is_file():
        words = []
        if retarget(file, wanted):
            do(f"{file} names the ports of today")
    if not kept.get("registry") or not file.is_file():
        run(found, python("registry.cli", "init", *words), found[prefect.WORKER].environment)
        place.keep(where, {"registry": True})
        do(f"made a registry in {where.home}")
    if not folder_of(BASE_ID, where.home).is_dir():
        known = KNOWN_BASES[BASE_ID]
        base = BaseModelRef(id=BASE_ID, revision="1", family=known.family, license=known.license)
        register(base_path(), base, where.home)
        do(f"registered the base {BASE_ID}")


def retarget(file: Path, wanted: Mapping[str, str]) -> bool:
    """Have the lines of a settings file's registry say where the services are; return whether one changed.

    What else is in the file stays as it is, with comments and order.
    """
    text = file.read_text("utf-8")
    new = text
    for key, value in wanted.items():
        line = f"{key} = {json.dumps(value)}".replace("\\", r"\\")
        new = re.sub(rf"(?m)^{key} = .*$", line, new, count=1)
    if new == text:
        return False
    place.write(file, new)
    return True


def _deployments(found: Stack, do: Tell) -> None:
    """Make what can be started in Prefect's page, unless it is there as this version wants it."""
    runs = found.settings.runs
    wanted = hashlib.sha256(f"{prefect.text()}{version('adapter-foundry')} {runs}".encode()).hexdigest()
    known = place.read(found.where).get("deployments") == wanted
    if known and prefect.deployed(found.ports, found.secrets):
        return
    made = run(found, python("infra.local.deploy", "--runs", str(runs)), found.environment)
    place.keep(found.where, {"deployments": wanted})
    do(f"made {len(made.split())} deployments")


def run(found: Stack, command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a command of the platform's own and return what it says.

    Raises:
        CannotStart: it fails.
    """
    ran = subprocess.run(
        command, env={**shell(), **COMMON, **environment}, cwd=found.where.services, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode != 0:
        last = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-_LOG_LINES:])
        raise CannotStart(f"{' '.join(command[2:6])} failed:\n{last}", "correct that, and run this again")
    return ran.stdout


def _wait(name: str, probe: Probe, found: Stack, supervisor: Supervisor) -> str | None:
    """Wait until a service answers; return why it does not, or None."""
    end = time.monotonic() + found.settings.start_timeout
    while True:
        why = problem(probe, found.settings.probe_timeout)
        state = supervisor.states()[name]
        if state["statename"] == "FATAL":
            return f"it ended {why or ''}"
        if why is None and state["statename"] == "RUNNING":
            return None
        if time.monotonic() > end:
            return f"no answer in {found.settings.start_timeout:.0f} seconds ({why})"
        time.sleep(_REPEAT_SECONDS)


def _end(log: Path) -> str:
    try:
        return "\n".join(log.read_text("utf-8", "replace").splitlines()[-_LOG_LINES:])
    except OSError:
        return "(there is none)"

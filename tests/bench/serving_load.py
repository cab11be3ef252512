"""Many clients, promotions and killed engines: is every answer what it says, and is nothing lost?

    python tests/bench/serving_load.py [--seconds 120] [--clients 200] [--promote-every 10] [--kills 2]

Prints one JSON line; exits with 1 if a picture is wrong, an accepted job is lost, or a request fails in
another way than 429. A real `serving ray` with two engines and two ingresses on a cluster of this machine, a
real registry with three versions, and clients of locust in a process of their own: each asks for
``pixelsmile@prod``, waits for the picture, and asks again; a few ask for jobs. Every picture is compared with
what an engine that nothing else uses makes with the digest that the answer names (versions are 16 levels of
255 apart and more; one level is rounding in a batch). ``stale_seconds`` says for how long after a promotion
requests were still begun that the version before answered.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

ASKS, KEYS = 12, 8
DRAIN_SECONDS = 240


def main() -> int:
    """Set everything up, let it run, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=200, help="that wait for a picture")
    parser.add_argument("--jobs", type=int, default=10, help="clients that ask for jobs")
    parser.add_argument("--promote-every", type=float, default=10)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--waiting", type=int, default=64, help="pictures that may wait at an engine")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load is not None:
        load(Path(options.load), options)
        return 0
    with tempfile.TemporaryDirectory(prefix="serving-load-") as folder:
        told = measure(Path(folder), options)
    print(json.dumps(told))
    return 0 if not (told["wrong"] or told["jobs"]["lost"] or told["failures"]) else 1


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run service and clients; return what is printed."""
    import torch

    from fakes.followed import PROD
    from fakes.served import Ask, Truth, served_home
    from registry.client import Registry
    from servers.ray_service import running
    from serving.http.keyring import KeyLimits, Keys

    torch.set_num_threads(1)
    registry: Registry = served_home(folder / "home")
    limits = KeyLimits(requests=1_000_000, pictures=1_000_000, concurrent=10_000)
    keys = Keys.open(folder / "home")
    tokens = [keys.add(f"load-{number}", ("edit", "read"), limits=limits)[0] for number in range(KEYS)]
    asks = [Ask(happy=0.2 + number % 4 / 4, seed=number, picture=number) for number in range(ASKS)]
    truth = Truth(registry)
    right = [{truth.digest(version): truth.pixels(version, ask) for version in (1, 2, 3)} for ask in asks]
    settings = {
        "ADAPTERS": json.dumps([PROD]), "PORT": "0", "FOLLOW_SECONDS": "1",
        "MAX_WAITING": str(options.waiting), "MAX_ROWS": "8",
    }  # fmt: skip
    with running(folder / "home", ingresses=2, settings=settings, log=folder / "log") as service:
        plan = {"url": service.url, "tokens": tokens, "bodies": [ask.body(PROD) for ask in asks]}
        (folder / "plan.json").write_text(json.dumps(plan))
        began = time.monotonic()
        words = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if value]
        clients = subprocess.Popen([sys.executable, __file__, *words, f"--load={folder}"])
        moved = events(registry, truth, service, options)
        assert clients.wait(options.seconds + 2 * DRAIN_SECONDS) == 0
        took = time.monotonic() - began
    answers = pickle.loads((folder / "answers").read_bytes())  # written by ourselves
    return judge(answers, right, moved, took) | {"engines_killed": options.kills}


def events(registry: Any, truth: Any, service: Any, options: argparse.Namespace) -> list[tuple[float, str]]:
    """Promote and kill while the clients ask; return when which digest became what ``prod`` means."""
    moved = [(time.time(), truth.digest(1))]
    end = time.monotonic() + options.seconds
    kills = [
        end - options.seconds * (options.kills - number) / (options.kills + 1)
        for number in range(options.kills)
    ]
    following = time.monotonic() + options.promote_every
    version = 1
    while (now := time.monotonic()) < end:
        if kills and now >= kills[0]:
            kills.pop(0)
            service.kill()
        if now >= following:
            following += options.promote_every
            version = version % 3 + 1
            registry.promote(f"pixelsmile:{version}", "prod")
            moved.append((time.time(), truth.digest(version)))
        time.sleep(0.05)
    return moved


def load(folder: Path, options: argparse.Namespace) -> None:
    """Be the clients; runs in a process of its own, for locust replaces the sockets of the whole process."""
    import gevent
    import locust
    from locust import FastHttpUser, constant, task
    from locust.env import Environment

    plan = json.loads((folder / "plan.json").read_text())
    answers: list[dict[str, Any]] = []
    numbers = iter(range(1 << 30))

    class Client(FastHttpUser):
        abstract = True
        host = plan["url"]
        wait_time = constant(0)
        network_timeout = connection_timeout = 180.0

        def ask(self, **more: Any) -> tuple[dict[str, Any], Any]:
            """Send one of the requests; its record is kept."""
            number = next(numbers)
            record = {"ask": number % ASKS, "began": time.time(), "job": bool(more)}
            body, token = plan["bodies"][number % ASKS] | more, plan["tokens"][number % KEYS]
            self.headers = {"Authorization": f"Bearer {token}"}
            accept = {} if more else {"Accept": "image/png"}
            answer = self.client.post("/v1/edits", json=body, headers=self.headers | accept)
            record |= {"status": answer.status_code, "ended": time.time(), "digest": None}
            if answer.status_code in (200, 202):
                record["digest"] = answer.headers.get("Adapter-Digest")
            else:
                record["problem"] = f"{answer.error or ''} {(answer.text or '')[:300]}".strip()
            answers.append(record)
            if answer.status_code == 429:
                record["retry_after"] = float(answer.headers["Retry-After"])
                gevent.sleep(min(5.0, record["retry_after"]))
            return record, answer

    class Editor(Client):
        fixed_count = options.clients

        @task
        def edit(self) -> None:
            record, answer = self.ask()
            if record["status"] == 200:
                record["picture"] = answer.content

    class Patient(Client):
        fixed_count = options.jobs

        @task
        def job(self) -> None:
            record, answer = self.ask(**{"async": True})
            if record["status"] == 202:
                record["location"], record["headers"] = answer.headers["Location"], dict(self.headers)
                gevent.sleep(1)

    environment = Environment(
        user_classes=[Editor, Patient], events=locust.events, stop_timeout=DRAIN_SECONDS
    )
    runner = environment.create_local_runner()
    runner.start(options.clients + options.jobs, spawn_rate=100)
    gevent.sleep(options.seconds)
    runner.stop()
    for record in answers:
        if "location" in record:
            collect(plan["url"], record)
    (folder / "answers").write_bytes(pickle.dumps(answers))


def collect(url: str, record: dict[str, Any]) -> None:
    """Wait for an accepted job, and fetch its picture."""
    import httpx

    end = time.monotonic() + DRAIN_SECONDS
    with httpx.Client(base_url=url, headers=record.pop("headers"), timeout=60) as client:
        while time.monotonic() < end:
            told = client.get(record["location"])
            if told.status_code == 200 and told.json()["status"] not in ("queued", "running"):
                break
            time.sleep(0.5)
        record["state"] = told.json().get("status", "?") if told.status_code == 200 else str(told.status_code)
        if record["state"] == "succeeded":
            facts = told.json()["results"][0]
            record["digest"] = facts["adapter_digest"]
            record["picture"] = client.get(f"{record['location']}/results/0.png").content
        else:
            record["problem"] = told.text[:300]


def judge(
    answers: Sequence[dict[str, Any]],
    right: Sequence[dict[str, Any]],
    moved: Sequence[tuple[float, str]],
    took: float,
) -> dict[str, Any]:
    """Compare every picture with what its digest gives, and count."""
    import numpy as np

    from fakes.served import pixels_of

    off: Counter[int] = Counter()
    wrong, stale = [], 0.0
    for one in answers:
        if "picture" not in one:
            continue
        expected = right[one["ask"]].get(one["digest"])
        levels = 255 if expected is None else int(np.abs(expected - pixels_of(one["picture"])).max())
        off[levels] += 1
        if levels > 1:
            wrong.append({"ask": one["ask"], "digest": one["digest"], "levels": levels, "job": one["job"]})
        if not one["job"]:
            stale = max(stale, staleness(one, moved))
    edits = sorted(one["ended"] - one["began"] for one in answers if one["status"] == 200)
    accepted = [one for one in answers if one["status"] == 202]
    refused = [one for one in answers if one["status"] == 429]
    failed = Counter(
        f"{one['status']} {one.get('problem', '')}"[:200]
        for one in answers
        if one["status"] not in (200, 202, 429)
    )
    lost = Counter(one["state"] + " " + one["problem"] for one in accepted if one.get("state") != "succeeded")
    return {
        "seconds": round(took, 1),
        "requests": len(answers),
        "pictures": sum(off.values()),
        "wrong": wrong[:10],
        "off_by_levels": {str(levels): count for levels, count in sorted(off.items())},
        "p50_seconds": round(edits[len(edits) // 2], 3) if edits else None,
        "p95_seconds": round(edits[int(len(edits) * 0.95)], 3) if edits else None,
        "too_many_429": len(refused),
        "retry_after": [min(x["retry_after"] for x in refused), max(x["retry_after"] for x in refused)]
        if refused
        else [],
        "jobs": {"accepted": len(accepted), "succeeded": len(accepted) - lost.total(), "lost": dict(lost)},
        "failures": dict(failed),
        "versions": dict(
            Counter(one["digest"][7:15] for one in answers if "picture" in one and one["digest"])
        ),
        "promotions": len(moved) - 1,
        "stale_seconds": round(stale, 2),
        "load": [round(value, 1) for value in os.getloadavg()],
        "cores": os.cpu_count(),
    }


def staleness(answer: dict[str, Any], moved: Sequence[tuple[float, str]]) -> float:
    """Seconds between a promotion and the begin of a request that the version before it still answered."""
    meant = [index for index, (when, _) in enumerate(moved) if when <= answer["began"]]
    if not meant or answer["digest"] in {digest for _, digest in moved[meant[-1] :]}:
        return 0.0
    return float(answer["began"] - moved[meant[-1]][0])


if __name__ == "__main__":
    raise SystemExit(main())

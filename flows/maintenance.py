"""Looking after a registry, as flows that run by the clock, by hand or by an event.

Each leaves a table for people, also when it fails, and fails with a reason that says what to do. Nothing here
approves, promotes or revokes. What cannot be made again without money or hours is only removed when somebody
asks for it.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from flows.artifacts import show_table
from flows.errors import FlowError
from registry.client import Registry
from registry.digest import Digest
from registry.errors import DigestMismatch, shown
from registry.signing.signers import ONLINE

#: Timestamps and snapshots with less life than this get a new one: a flow that runs every six hours may fail
#: once without anybody noticing.
_FRESH = {"timestamp": timedelta(hours=14), "snapshot": timedelta(days=4)}
#: When people should hear that something ends that this machine cannot renew.
_WARNING = timedelta(days=7)

Names = Annotated[
    list[str],
    Field(title="Adapters", description="Their names; none stands for all.", examples=[["pixelsmile"]]),
]
Repair = Annotated[
    bool,
    Field(
        title="Repair",
        description="Make MLflow say what is signed. Otherwise differences only fail the run.",
    ),
]
DryRun = Annotated[
    bool, Field(title="Look only", description="Tell what would be removed, and remove nothing.")
]
Grace = Annotated[
    float,
    Field(
        ge=1, le=24 * 365, title="Grace (hours)", description="What was written so short a time ago stays."
    ),
]
Days = Annotated[
    int | None,
    Field(ge=1, description="Remove what nobody has used for so many days. Empty: nothing is removed."),
]


def _work(function: Any) -> Any:
    """Make a task whose result nobody keeps: it is about the registry as it is now."""
    return task(function, name=function.__name__.strip("_"), cache_policy=NO_CACHE, persist_result=False)


@flow(name="refresh-trust", description="signed names and times get a new life before they expire")
def refresh_trust() -> dict[str, Any]:
    """Renew what the keys on this machine can renew, and say what people have to.

    Raises:
        FlowError: something ends within a week whose key is elsewhere.
        RegistryError: the trust metadata cannot be verified or written.
    """
    rows = _work(_renew)()
    show_table(rows, "trust", "Trust metadata: when each of them ends.")
    _refuse_late(rows)
    return {"rows": rows}


def _refuse_late(rows: list[dict[str, Any]]) -> None:
    """Raise for what ends soon and is not renewed here; what the online key signs never lives long."""
    soon = _WARNING / timedelta(hours=1)
    late = [row for row in rows if row["left_hours"] < soon and not (row["by"] == ONLINE and row["key_here"])]
    if late:
        what = ", ".join(f"{row['metadata']} on {row['expires'][:10]}" for row in late)
        raise FlowError(
            f"trust metadata ends soon, and the keys for it are not on this machine: {what}",
            f"run `registry trust renew` where the {late[0]['by']} key is kept; a worker that shall renew "
            "what the online key signs needs that key, or its URI in ADAPTER_FOUNDRY_KEYS",
        )


def _renew() -> list[dict[str, Any]]:
    from registry.signing.rotation import Rotation
    from registry.signing.trust import NAMES, key_role

    registry, now = Registry.open(), datetime.now(UTC)
    state, rotation = registry.authority.signing_state(), Rotation(registry.authority)
    if rotation.can_renew(now):
        registry.record("trust", "root", {"command": "renew", "by": "flow"})
        rotation.renew()
    elif registry.keys.holds(ONLINE) and any(state.expires(one) - now < life for one, life in _FRESH.items()):
        registry.authority.publish_anchor()
    # Readers must accept it as it is now.
    state = registry.authority.state()
    roles = ("root", "targets", NAMES, *state.bins(), "snapshot", "timestamp")
    return [
        {
            "metadata": role,
            "expires": state.expires(role).isoformat(),
            "left_hours": round((state.expires(role) - now) / timedelta(hours=1), 1),
            "by": key_role(role),
            "key_here": registry.keys.holds(key_role(role)),
        }
        for role in roles
    ]


@flow(name="rescan", description="released adapters -> the rules of today -> fresh scan statements, a table")
def rescan(names: Names = []) -> dict[str, Any]:  # noqa: B006 (Prefect shows the default in its form)
    """Scan what is released by the rules of today: run it after an upgrade.

    Args:
        names: adapters; none stands for all.

    Raises:
        registry.errors.RegistryError: something is blocked, could not be scanned or needs a review; the table
            has every version all the same.
    """
    found = _work(_scan_released)(tuple(names))
    show_table(found.table(), "rescan", f"Released versions by the scanner's rules {found.rules_version}.")
    if found.refusal is not None:
        raise found.refusal
    told: dict[str, Any] = found.to_json()
    return told


def _scan_released(names: tuple[str, ...]) -> Any:
    return Registry.open().rescan(*names, everything=not names)


@flow(name="reconcile", description="MLflow beside what is signed: report, or repair")
def reconcile(repair: Repair = False) -> dict[str, Any]:
    """Compare the index with what is signed, which is never changed by it.

    Args:
        repair: make MLflow say what is signed; otherwise differences only fail the run.

    Raises:
        DigestMismatch: MLflow says something else than what is signed, and was not repaired.
        NetworkError: MLflow or the store does not answer.
    """
    found, left = _work(_compare)(repair)
    rows = [
        {
            "what": one.kind,
            "subject": shown(one.subject),
            "signed": shown(one.signed),
            "mlflow": shown(one.found),
        }
        for one in found
    ]
    show_table(rows, "reconcile", "What MLflow says otherwise than what is signed.")
    if left:
        raise DigestMismatch(
            f"MLflow differs from what is signed in {len(left)} places, the first is {rows[0]['subject']}",
            "pulls are not affected; start reconcile with repair, and find out who changes MLflow",
        )
    return {"differences": rows, "repaired": bool(found)}


def _compare(repair: bool) -> Any:
    from registry.reconcile import reconcile as work

    return work(Registry.open(), repair=repair)


@flow(name="collect-garbage", description="what no signed name needs, old run folders: look, or remove")
def collect_garbage(
    dry_run: DryRun = True,
    grace_hours: Grace = 24.0,
    store: Annotated[bool, Field(title="Store", description="Objects that nothing signed refers to.")] = True,
    adapters: Annotated[
        bool, Field(title="Cached adapters", description="Those that were revoked or have no name any more.")
    ] = True,
    run_folders: Annotated[Days, Field(title="Run folders (days)")] = None,
    evaluations: Annotated[Days, Field(title="Edits of evaluations (days)")] = 30,
    paid_answers: Annotated[Days, Field(title="Answers of paid APIs (days)")] = None,
) -> dict[str, Any]:
    """Remove what nobody needs from the store and from this machine.

    Pictures, latents, checkpoints and paid answers are work and money: they go only if days are given. What
    evaluations keep beside their reports is made again in minutes.

    Args:
        dry_run: tell what would be removed, and remove nothing.
        grace_hours: what was written so short a time ago stays.
        store: objects that nothing signed refers to.
        adapters: cached ones that were revoked or have no name any more.
        run_folders: remove those that nobody has used for so many days; without a number none.
        evaluations: remove the edits of evaluations that none has used for so many days; an evaluation that
            needs them makes them again.
        paid_answers: remove those of paid APIs that nobody has used for so many days; without a number none.

    Raises:
        Conflict: a push has taken up an object meanwhile.
        RegistryError: the store cannot be read; the table has what was removed before that.
        FlowError: something could not be removed; the table has the others, and why.
    """
    from flows.garbage import collect

    found = _work(collect)(
        store=store,
        adapters=adapters,
        grace=timedelta(hours=grace_hours),
        run_folders=None if run_folders is None else timedelta(days=run_folders),
        evaluations=None if evaluations is None else timedelta(days=evaluations),
        paid_answers=None if paid_answers is None else timedelta(days=paid_answers),
        dry_run=dry_run,
    )
    rows = found.removed
    size = sum(row["bytes"] for row in rows)
    did = "would be removed" if dry_run else "removed"
    show_table(found.rows, "garbage", f"{len(rows)} things with {size} bytes {did}.")
    if found.refusal is not None:
        raise found.refusal
    return {"removed": rows, "bytes": size, "dry_run": dry_run}


@flow(name="verify-promoted", description="what an alias means now, verified and fetched as anybody would")
def verify_promoted(
    reference: Annotated[str, Field(title="Adapter", description="name@alias, such as pixelsmile@prod.")],
    digest: Annotated[str | None, Field(title="Digest", description="What it should mean, if known.")] = None,
) -> dict[str, Any]:
    """Pull what was promoted into this machine's cache, and verify every byte in the store.

    Events start it, and anybody can make up an event; so it believes nothing but signatures.

    Args:
        reference: name@alias, such as pixelsmile@prod.
        digest: what it should mean, if known.

    Raises:
        DigestMismatch: the alias means something else than was told, or bytes are not what was signed.
        RegistryError: it cannot be pulled by everybody; see the error tree.
    """
    found = _work(_verify)(reference)
    show_table([found], "promoted", f"{reference} as anybody gets it.")
    if digest is not None and Digest.parse(digest) != Digest(found["digest"]):
        raise DigestMismatch(
            f"{reference} means {found['digest']}, not {digest}",
            "somebody has moved it since, or has made up the news: look at `registry log`",
        )
    return dict(found)


def _verify(reference: str) -> dict[str, Any]:
    registry = Registry.open()
    verified, pulled = registry.verify(reference), registry.pull(reference)
    if verified.digest != pulled.digest:
        raise DigestMismatch(f"{reference} was moved while it was verified", "run it again")
    return {
        "reference": reference,
        "version": pulled.reference,
        "digest": str(pulled.digest),
        "fetched_bytes": pulled.fetched_bytes,
        "warnings": "; ".join(pulled.warnings) or "-",
    }

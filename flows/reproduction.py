"""Making a released adapter again from what is signed about it.

Dataset and training are done in a folder of their own, so nothing of the first time is used; the outcome is
signed by the evaluator. A reproduction that was killed, or whose outcome could not be signed, goes on where
it stopped; a complete one starts anew, after the end of another run that is at the same adapter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task

from flows.dataset import make_dataset
from flows.job import base_folder, running
from flows.parameters import Runner
from flows.stages import Job
from flows.training import judge, make_adapter
from registry.attestation import ROLE_OF
from registry.client import Registry
from registry.digest import digest_bytes
from registry.manifest import canonical_json
from registry.reproduction import parse as read_outcome
from registry.settings import home as default_home
from trainer.errors import BudgetSpent, NotReproducible
from trainer.evaluation import REPORT_NAME, EvaluationReport
from trainer.progress import Progress
from trainer.recipe import Recipe, change
from trainer.reproduction import Recorded, identical, recorded, take_threads
from trainer.stage import StageResult, alone, stage_key, write_atomically

OUTCOME_NAME = "outcome.json"
#: Lies beside the stages when nothing is left to do.
COMPLETE_NAME = "complete"
#: The same: digests of what a reproduction made itself in the folder of the first dataset.
MADE_NAME = "made.json"


@flow(
    name="reproduce", description="signed statements -> the same dataset and adapter again -> signed outcome"
)
def reproduce(
    reference: str,
    reuse_dataset: bool = False,
    pay: bool = False,
    sign: bool = True,
    runner: Runner = "threads",
) -> dict[str, Any]:
    """Make a released adapter again and compare.

    Args:
        reference: such as pixelsmile@prod or pixelsmile:3.
        reuse_dataset: take the dataset that lies on the worker's machine instead of making it again.
        pay: ask paid APIs for answers that are not recorded on the worker's machine.
        sign: sign the outcome with the evaluator's key.
        runner: where parts of stages are done.

    Raises:
        BadSignature: the recipe is not signed by the publisher.
        NotFound: there is no such adapter, or no key to sign the outcome with.
        NotReproducible: what is recorded, or what is on this machine, is not enough.
        Explained: a stage refused, with the reason.
    """
    place = default_home()
    registry = Registry.open(place)
    known = recorded(registry, reference)
    if sign:
        registry.keys.signer(ROLE_OF["reproduction"])  # hours before it is needed
    root = place / "reproductions" / f"{known.reference.replace(':', '-')}-{known.manifest.digest.hex[:12]}"
    log = get_run_logger().info
    # The lock of `root` itself is that of its stages.
    whole = root.with_name(f"{root.name}-whole")
    with alone(whole, lambda: log("another run makes the same adapter again: waiting for its end")):
        if (root / COMPLETE_NAME).exists():
            _discard(root)
        return _reproduced(known, place, root, runner, reuse_dataset=reuse_dataset, pay=pay, sign=sign)


def _reproduced(
    known: Recorded, place: Path, root: Path, runner: Runner, *, reuse_dataset: bool, pay: bool, sign: bool
) -> dict[str, Any]:
    """Do all stages that are not done yet, and return the summary of the flow; see `reproduce`."""
    recipe = known.recipe if pay or not known.asks_apis else change(known.recipe, {"running.api.requests": 0})
    with running("reproduce", recipe, runner, root) as job:
        data, trained, reused = _rebuilt(job, known, recipe, reuse_dataset)
        evaluated = None
        if not identical(known, trained.folder / "adapter"):
            evaluated = judge(job, recipe, base_folder(recipe.base, place), trained, data).folder
        compared = job.always(
            compare,
            home=place,
            reference=known.reference,
            trained=trained.folder,
            evaluated=evaluated,
            reused=reused,
            out=root,
        )
        if sign:
            job.always(attest, home=place, reference=known.reference, out=root)
        write_atomically(root / COMPLETE_NAME, b"")
        outcome = json.loads((root / OUTCOME_NAME).read_bytes())
        about = {
            "reference": known.reference,
            "adapter": str(known.manifest.digest),
            "signed": str(sign).lower(),
        }
        return {**job.summary(**about, digest=str(compared.digest)), "reproduction": outcome}


def _discard(root: Path) -> None:
    """Remove a reproduction at once: one of which half is gone would be taken for one that was killed."""
    old = root.with_name(f".{root.name}.old")
    if old.exists():
        shutil.rmtree(old)
    root.rename(old)
    shutil.rmtree(old)


def _rebuilt(job: Job, known: Recorded, recipe: Recipe, reuse: bool) -> tuple[StageResult, StageResult, bool]:
    """Return the results of dataset and training, and whether anything of the first dataset was taken."""
    from serving.bases import fingerprint

    base = base_folder(recipe.base, job.home)
    known.require_base(fingerprint(base))
    first = job.home / "runs" / recipe.name
    old, reuse = job.root, reuse and first.is_dir()
    job.root = first if reuse else old
    try:
        data = make_dataset(job, recipe)
    except BudgetSpent as error:
        raise NotReproducible(
            f"not all answers of the paid APIs that {known.reference} was made with are on this machine: "
            f"{error.message}",
            "copy the folder `apis` of the data folder that has them, or pay again with --pay",
        ) from None
    finally:
        job.root = old
        taken = reuse and _taken(job)
    take_threads(known)
    return data, make_adapter(job, recipe, base, data), taken


def _taken(job: Job) -> bool:
    """Return whether any stage so far is of the first dataset, and note those that are not.

    A reproduction that goes on finds there what it made before it was killed: that is its own.
    """
    path = job.root / MADE_NAME
    mine = set(json.loads(path.read_bytes())) if path.exists() else set()
    results = [done.result for done in job.done.values()]
    mine |= {str(result.digest) for result in results if not result.reused}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, canonical_json(sorted(mine)))
    return any(str(result.digest) not in mine for result in results)


@task(name="compare", description="dataset, weights and figures of both, bit by bit or within tolerances")
def compare(
    home: Path, reference: str, trained: Path, evaluated: Path | None, reused: bool, out: Path,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """See `trainer.reproduction.compare`."""
    from trainer.reproduction import compare as work

    registry = Registry.open(home)
    report = None
    if evaluated is not None:
        report = EvaluationReport.model_validate_json((evaluated / REPORT_NAME).read_bytes())
    found = work(
        registry, recorded(registry, reference), trained / "adapter", report=report, dataset_reused=reused
    )
    data = canonical_json(found.predicate())
    write_atomically(out / OUTCOME_NAME, data)
    progress("compare", 1, 1)
    facts = {"outcome": found.outcome, "notes": len(found.notes)}
    if found.difference is not None and found.difference.relative is not None:
        facts["relative_difference"] = found.difference.relative
    return _result("compare", out, data, facts)


@task(name="attest", description="sign the outcome over the adapter's digest, with the evaluator's key")
def attest(home: Path, reference: str, out: Path, progress: Progress) -> dict[str, Any]:
    """See `registry.client.Registry.attest`."""
    data = (out / OUTCOME_NAME).read_bytes()
    predicate = read_outcome(json.loads(data)).predicate()
    signed = Registry.open(home).attest(reference, "reproduction", predicate)
    progress("attest", 1, 1)
    return _result("attest", out, data, {"statement": signed.statement, "reused": signed.reused})


def _result(stage: str, out: Path, data: bytes, facts: dict[str, Any]) -> dict[str, Any]:
    digest = digest_bytes(data)
    key = stage_key(stage, outcome=digest)
    return StageResult(stage=stage, folder=out, key=key, digest=digest, facts=facts).as_json()

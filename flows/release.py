"""From a trained adapter to ``name@alias`` and to edited portraits: the last stages as Prefect tasks.

What protects or proves something runs every time: scan, licences, signatures and the verified pull are never
taken from a cache. They are quick, and publishing the very same adapter again makes nothing new.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger, task
from prefect.exceptions import Pause
from prefect.runtime import flow_run

from flows import limits
from flows.artifacts import show_for_approval
from flows.errors import Rejected
from flows.events import tell
from flows.folder import LATEST, gather
from flows.parameters import Approval
from flows.portraits import edit_portraits
from flows.settings import FlowSettings, prefect_home
from flows.stages import Job, code_digest
from registry.client import Registry
from registry.digest import Digest, digest_bytes
from registry.errors import NeedsReview, PolicyRefused, ScanRefused
from registry.manifest import CARD_NAME, AdapterCard
from registry.publishing import read_folder
from registry.reference import Reference
from registry.undoing import undone_if_it_fails
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.stage import StageResult, new_folder, stage_key, write_atomically, write_result

if TYPE_CHECKING:
    from flows.approvals import Wanted
    from registry.gates import GateReport

APPROVER = "the demo pipeline (no person looked)"
SCAN_PAGE = "scan.html"
REASON = "automatic approval: every gate of the evaluation passed, scan and licence check found nothing"


def publish(
    job: Job, recipe: Recipe, trained: StageResult, evaluated: StageResult, approval: Approval
) -> dict[str, Any]:
    """Scan, licences, signatures, approval, alias, verified pull, edits; then the run folder."""
    home, adapter = job.home, trained.folder / "adapter"
    with nothing_left(job):
        job.always(scan, adapter=adapter, out=of_this_run(job, scan.name))
        job.always(licences, home=home, adapter=adapter)
        pushed = job.always(
            push, home=home, adapter=adapter, evaluated=evaluated.folder, name=recipe.release.adapter
        )
        reference = pushed.facts["reference"]
        about = {"recipe": str(recipe.digest), "version": reference, "digest": str(pushed.digest)}
        if not get_approved(job, pushed, recipe.release.alias, evaluated.folder, approval):
            return {**job.summary(adapter=reference, **about), "folder": str(job.root)}
        alias = move_alias(job, pushed, recipe.release.alias)
        use(job, recipe, alias, pushed)
        return gathered(job, adapter=alias, **about)


def of_this_run(job: Job, stage: str) -> Path:
    """Return the folder of what every run looks at again; other runs of the recipe have other ones."""
    return job.folder(stage, stage_key(stage, run=flow_run.id))


@contextmanager
def nothing_left(job: Job) -> Iterator[None]:
    """Remove what no other run reads if this one fails: no later one would.

    A run that waits for people keeps the page of its scan, and so does one that was refused for what the scan
    found: the page shows it.
    """
    try:
        yield
    except Pause:
        raise
    except BaseException as error:
        _forget(job, pull.name, *(() if isinstance(error, ScanRefused | NeedsReview) else (scan.name,)))
        raise


def _forget(job: Job, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(of_this_run(job, stage), ignore_errors=True)


def gathered(job: Job, **about: str) -> dict[str, Any]:
    """Make the run folder, which takes up what no other run reads, and return the summary."""
    stages = {name: done.result for name, done in job.done.items()}
    latest = job.root / LATEST
    for name in (scan.name, pull.name):
        job.done[name] = replace(job.done[name], result=replace(stages[name], folder=latest))
    summary = job.summary(**about)
    gather(job.home, job.root, stages, summary)
    _forget(job, scan.name, pull.name)
    return {**summary, "folder": str(latest)}


def refuse_automatic(approval: Approval, home: Path) -> None:
    """Refuse, before anything is done, that a run of a deployment approves by itself.

    Whoever reaches Prefect's page can start one, and the worker may hold an approver's key. A run that
    somebody starts on their own machine, such as the demo, is theirs to decide about.

    Raises:
        PolicyRefused: it would approve, and the settings do not allow that.
    """
    from prefect.context import FlowRunContext

    if approval != "automatic" or FlowSettings.read(home).automatic_approval:
        return
    context = FlowRunContext.get()
    run = None if context is None else context.flow_run
    if run is not None and run.deployment_id is not None:
        raise PolicyRefused(
            "approval 'automatic' is not allowed in a run that was started from a deployment",
            "choose 'ask' or 'later'; for a demonstration use `python -m flows.pipeline RECIPE`. With "
            "ADAPTER_FOUNDRY_FLOWS_AUTOMATIC_APPROVAL=true on the worker, who reaches Prefect approves",
        )


def get_approved(job: Job, pushed: StageResult, alias: str, pictures: Path, approval: Approval) -> bool:
    """Get a version approved in the way that was chosen; one that was rejected is not, but by asking again.

    Args:
        job: the run.
        pushed: what `push` made.
        alias: what it shall be promoted to.
        pictures: the folder of the evaluation.
        approval: the way.

    Returns:
        Whether to promote it now.

    Raises:
        RegistryError: the version fails a gate that no approval opens.
        Rejected, ApprovalTimeout: see `flows.approvals.settle`.
    """
    from flows.approvals import Wanted, refuse_rejected

    registry, reference = Registry.open(job.home), pushed.facts["reference"]
    wanted = Wanted(reference=Reference.parse(reference), digest=pushed.digest, alias=alias)
    try:
        if approval in ("ask", "again"):
            _ask_people(registry, wanted, pictures, again=approval == "again")
        else:
            refuse_rejected(registry, wanted)
    except Rejected:
        tell("rejected", wanted.reference.name, {"version": reference, "digest": str(pushed.digest)})
        raise
    if approval == "later":
        job.display.say(f"      {reference} waits for `registry approve` and `registry promote`.")
        return False
    if approval == "automatic":
        job.display.say(
            f"      APPROVED AUTOMATICALLY: no person looks at {reference} before it is promoted."
        )
        job.display.say("      That is for demonstrations only; people approve with `registry approve`.")
        job.always(approve, home=job.home, reference=reference)
    else:
        job.always(count, home=job.home, reference=reference, alias=alias)
    return True


def _ask_people(registry: Registry, wanted: Wanted, pictures: Path, *, again: bool) -> None:
    """Suspend the flow run until enough approvers have signed; see `flows.approvals.settle`."""
    from flows.approvals import PrefectDesk, settle

    reference, alias = str(wanted.reference), wanted.alias

    def show() -> None:
        report = registry.gates(reference, alias)
        _refuse_what_no_approval_opens(report)
        show_for_approval(registry, reference, report, pictures)

    timeout = timedelta(seconds=FlowSettings.read(registry.place.home).approval_timeout)
    settle(registry, PrefectDesk(wanted.digest), wanted, again=again, timeout=timeout, show=show)


def _refuse_what_no_approval_opens(report: GateReport) -> None:
    """Do not ask people about a version that is refused whatever they say; what is missing may still come."""
    for check in report.checks:
        if check.outcome == "fail" and check.name != "approval":
            raise PolicyRefused(
                f"{report.reference} does not pass the gate {check.name!r} of {report.alias}: {check.detail}",
                "nobody was asked to approve it; `registry promote --dry-run` shows every gate",
            )


def move_alias(job: Job, pushed: StageResult, alias: str) -> str:
    """Promote, and tell it as an event where this data folder has not told it yet; return ``name@alias``.

    An approver may have promoted while the run waited, or an earlier run have ended before it told anybody.
    """
    reference = pushed.facts["reference"]
    promoted = job.always(promote, home=job.home, reference=reference, alias=alias)
    facts, digest = promoted.facts, str(promoted.digest)
    told = prefect_home(job.home) / "told" / facts["reference"]
    if not promoted.reused or not told.is_file() or told.read_text("utf-8") != digest:
        news = {name: facts[name] for name in ("reference", "version", "previous")}
        tell("promoted", Reference.parse(reference).name, {**news, "alias": alias, "digest": digest})
        told.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(told, digest.encode())
    return str(facts["reference"])


def use(job: Job, recipe: Recipe, alias: str, pushed: StageResult) -> None:
    """Pull what was promoted as anybody would, and edit portraits with it."""
    from trainer.evaluation.suites import of_recipe

    pulled = of_this_run(job, pull.name)
    job.always(pull, home=job.home, reference=alias, out=pulled)
    job.cached(
        edit,
        key={
            "code": code_digest(),
            "adapter": pushed.digest,
            "suite": of_recipe(recipe).model_dump(mode="json"),
            **recipe.section("evaluation", "conditioning", "base"),
        },
        recipe=recipe,
        home=job.home,
        reference=alias,
        pulled=pulled,
    )


@task(name="scan", description="container, structure, strength, numbers and spectra of the weights file")
def scan(adapter: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """See `registry.scanning`; the push scans again, and refuses what this one only reports in its page."""
    from registry.scanning.page import page
    from registry.scanning.targets import Options, scan_target

    scanned = scan_target(str(adapter), Options(progress=_bytes(progress)))
    report = scanned.subjects[0].report
    assert report is not None, "an adapter that was just trained can be read"
    facts = {
        "verdict": report.verdict,
        "rules_passed": len(report.passed_rules),
        "findings": len(report.findings),
        "weight_space": report.space.verdict if report.space else "not judged",
        "rules_version": report.rules_version,
    }
    key = stage_key("scan", digest=report.weights)
    result = StageResult(stage="scan", folder=out, key=key, digest=report.weights, facts=facts)
    with new_folder(out) as folder:
        (folder / SCAN_PAGE).write_text(page(scanned), "utf-8")
        write_result(folder, result)
    return result.as_json()


@task(name="licences", description="may all that went in serve the purpose of the registry's policy?")
def licences(home: Path, adapter: Path, progress: Progress) -> dict[str, Any]:
    """See `registry.licenses.judge`.

    Raises:
        registry.errors.LicenseRefused: it may not.
    """
    from registry.admission import judge_licences
    from registry.licenses import require

    data = read_folder(adapter)[CARD_NAME]
    card = AdapterCard.parse(data)
    verdict = require(judge_licences(card, Registry.open(home).policy.admission(None)))
    progress("licences", 1, 1)
    facts = {
        "license": verdict.license,
        "purpose": verdict.purpose,
        "commercial": verdict.commercial,
        "ingredients": len(card.ingredients),
    }
    return _result("licences", adapter, digest_bytes(data), facts)


@task(name="push", description="sign the manifest's statements, store everything under its digest")
def push(home: Path, adapter: Path, evaluated: Path, name: str, progress: Progress) -> dict[str, Any]:
    """See `registry.client.Registry.push`; a registry that does not exist yet is made first.

    A push that fails leaves no object behind; once its name is signed it has not failed, and the next run
    completes the index.
    """
    from trainer.evaluation import REPORT_NAME, EvaluationReport

    evaluation = EvaluationReport.model_validate_json((evaluated / REPORT_NAME).read_bytes()).predicate()
    registry = Registry.init(home)
    # An index that does not answer is noticed before anything is written.
    registry.catalog.prepare()
    with undone_if_it_fails(registry):
        pushed = registry.push(adapter, name, evaluation=evaluation, progress=_bytes(progress))
    facts = {
        "reference": pushed.reference,
        "uploaded_bytes": pushed.uploaded_bytes,
        "evaluation": evaluation["verdict"],
    }
    return _result("push", home / "registry", pushed.digest, facts, pushed.reused)


@task(name="approve", description="sign the approval: AUTOMATIC in this pipeline, nobody looks")
def approve(home: Path, reference: str, progress: Progress) -> dict[str, Any]:
    """See `registry.client.Registry.approve`.

    Raises:
        registry.errors.PolicyRefused: the evaluation did not pass its gates.
    """
    approved = Registry.open(home).approve(reference, APPROVER, REASON, automatic=True)
    progress("approve", 1, 1)
    facts = {"reference": approved.reference, "automatic": True, "by": APPROVER}
    return _result("approve", home / "registry", approved.digest, facts, approved.reused)


@task(name="approve", description="count the approvals that people's keys have signed")
def count(home: Path, reference: str, alias: str, progress: Progress) -> dict[str, Any]:
    """See `registry.approving.approvals`."""
    from registry.approving import approvals

    found = approvals(Registry.open(home), Reference.parse(reference), alias)
    progress("approve", 1, 1)
    facts = {
        "reference": found.reference,
        "automatic": False,
        "by": ", ".join(sorted({one.by for one in found.people})),
        "keys": f"{found.counted} of {found.needed}",
    }
    return _result("approve", home / "registry", found.digest, facts)


@task(name="promote", description="sign what the alias means from now on")
def promote(home: Path, reference: str, alias: str, progress: Progress) -> dict[str, Any]:
    """See `registry.client.Registry.promote`."""
    promoted = Registry.open(home).promote(reference, alias)
    progress("promote", 1, 1)
    facts = {"reference": promoted.reference, "version": promoted.version, "previous": promoted.previous}
    return _result("promote", home / "registry", promoted.digest, facts, promoted.reused)


@task(name="pull", description="fetch it into an empty cache and verify every step")
def pull(home: Path, reference: str, out: Path, progress: Progress) -> dict[str, Any]:
    """See `registry.client.Registry.pull`; ``out`` is emptied first: what lay there is not believed."""
    shutil.rmtree(out, ignore_errors=True)
    pulled = Registry.open(home).pull(reference, cache=out, progress=_bytes(progress))
    assert pulled.path is not None, "a pull keeps what it fetched"
    facts = {"adapter": pulled.reference, "bytes": pulled.fetched_bytes}
    return _result("pull", pulled.path, pulled.digest, facts)


@task(name="edit", description="portraits of people that training has not seen, with the pulled adapter")
def edit(
    recipe: Recipe, home: Path, reference: str, pulled: Path, out: Path, progress: Progress
) -> dict[str, Any]:
    """Load from the warm cache, which verifies once more, and edit portraits with the engine that serves.

    On a GPU that no other flow run has, if it serves on one.
    """
    from serving import settings

    adapter = Registry.open(home).load(reference, cache=pulled)
    with new_folder(out) as folder:
        with limits.gpus_of(settings.load().device, get_run_logger().info):
            facts = edit_portraits(adapter, recipe, home, folder, progress)
        files = {path.name: digest_bytes(path.read_bytes()) for path in sorted(folder.iterdir())}
        result = StageResult(
            stage="edit",
            folder=out,
            key=stage_key("edit", adapter=adapter.digest),
            digest=stage_key("edits", files=files),
            facts=facts,
        )
        write_result(folder, result)
    return result.as_json()


def _bytes(progress: Progress) -> Callable[[str, int, int], None]:
    """Return a registry's progress, which counts bytes, as a stage's."""
    return lambda part, done, total: progress(part, done, total, "bytes")


def _result(
    stage: str, folder: Path, digest: Digest, facts: dict[str, Any], reused: bool = False
) -> dict[str, Any]:
    key = stage_key(stage, digest=digest)
    result = StageResult(stage=stage, folder=folder, key=key, digest=digest, facts=facts, reused=reused)
    return result.as_json()

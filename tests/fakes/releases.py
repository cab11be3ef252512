"""A release without a training: a clean adapter and a written report go through the real tasks and desk.

The flow is what `flows.job.release` does behind the training. `Runs` starts it as a deployment on a Prefect
server and does what a worker does, each time that the server says that a run is due.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from PIL import Image
from prefect import flow, task

from fakes.registries import NAME, adapter_files, adapter_folder
from flows.display import Display
from flows.parameters import Approval
from flows.release import get_approved, move_alias, push
from flows.stages import Job
from registry.digest import Digest, digest_bytes
from registry.manifest import WEIGHTS_NAME
from registry.policy import Threshold
from registry.settings import home
from trainer.evaluation.gates import judge, rows
from trainer.evaluation.report import Against, Curve, Digests, EvaluationReport, Gap, Suite, Value
from trainer.progress import Progress
from trainer.stage import StageResult, new_folder, stage_key, write_result

COUNTED = "evaluated.txt"
"""A file in the data folder that gets a line whenever the evaluation is done, not reused."""


def report(
    top1: float = 0.9, *, seed: int = 1, against: tuple[str, Digest] | None = None, gap: float = 0.0
) -> EvaluationReport:
    """A small report on the adapter of `fakes.registries.adapter_folder` with that seed.

    Args:
        top1: 0.85 is what it needs.
        seed: of the adapter.
        against: reference and weights of what it says that it compares with.
        gap: how much better it says that it is.
    """

    def value(mean: float) -> Value:
        return Value(value=mean, low=mean - 0.05, high=mean + 0.05, n=16, samples=192)

    gaps, references = {}, {}
    if against is not None:
        shape = {"p": 0.04, "p_holm": 0.08, "n": 16, "detectable": 0.02}
        gaps["top1_accuracy"] = Gap(value=gap, low=gap - 0.01, high=gap + 0.01, **shape)
        references["top1_accuracy"] = {"against": value(top1 - gap)}
    metrics = rows(
        {"top1_accuracy": value(top1), "paired_psnr": value(23.0)},
        references,
        gaps,
        {"top1_accuracy": Threshold(min=0.85)},
    )
    base, weights = digest_bytes(b"base"), digest_bytes(adapter_files(seed)[WEIGHTS_NAME])
    return EvaluationReport(
        code_version="1.0",
        digests=Digests(
            adapter=weights, raw=None, base=base, judges={"expression": base}, suite=base, code=base
        ),
        judges={"expression": "a judge", "identity": "another"},
        suite=Suite(
            name="portraits-v1", definitions="1", subjects=("human 1",), groups=("human",),
            expressions=("happy", "sad"), judged=("happy", "sad"), confusing_pairs=(("happy", "sad"),),
            intensities=(0.0, 1.0), blends=(), pictures=3, steps=4, seed=0,
        ),
        against=None if against is None else Against(reference=against[0], weights=against[1]),
        metrics=metrics,
        verdict=judge(metrics),
        confusion=((0.75, 0.25), (0.0, 1.0)),
        curves=(Curve(expression="happy", asked=(0.0, 1.0), judged=(value(0.1), value(0.9))),),
        worst=(),
    )  # fmt: skip


@task(name="evaluate", description="a report that somebody wrote")
def evaluate(seed: int, top1: float, gap: float | None, out: Path, progress: Progress) -> dict[str, Any]:
    """Leave a report and a contact sheet, and count how often that was done."""
    with (home() / COUNTED).open("a") as lines:
        lines.write(f"{seed}\n")
    result = StageResult(
        stage="evaluate",
        folder=out,
        key=stage_key("evaluate", seed=seed),
        digest=digest_bytes(b"x"),
        facts={},
    )
    first = (f"{NAME}:1", digest_bytes(adapter_files(0)[WEIGHTS_NAME]))
    found = report(top1, seed=seed, against=None if gap is None else first, gap=gap or 0.0)
    with new_folder(out) as folder:
        (folder / "evaluation.json").write_text(found.model_dump_json())
        noise = np.random.default_rng(seed).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "contact_sheet.png")
        (folder / "report.html").write_text("<p>report</p>")
        write_result(folder, result)
    return result.as_json()


@flow(name="release-of-a-fake")
def release(
    seed: int = 1, approval: Approval = "ask", top1: float = 0.9, gap: float | None = None
) -> dict[str, Any]:
    """Evaluate once, push, get it approved, promote.

    Args:
        seed: of the adapter.
        approval: as in `flows.job.release`.
        top1: what the report says.
        gap: how much better than version 1 it says that this is; None says nothing of version 1.
    """
    place = home()
    job = Job(home=place, root=place / "runs" / "fake", display=Display(4))
    adapter = adapter_folder(place / f"adapter-{seed}", seed)
    said = {"seed": seed, "top1": top1, "gap": gap}
    evaluated = job.cached(evaluate, key=said, **said)
    pushed = job.always(push, home=place, adapter=adapter, evaluated=evaluated.folder, name=NAME)
    if not get_approved(job, pushed, "prod", evaluated.folder, approval):
        return {"version": pushed.facts["reference"]}
    return {"alias": move_alias(job, pushed, "prod"), "version": pushed.facts["reference"]}


@dataclass
class Runs:
    """Runs of `release` on a Prefect server, as deployment and worker make them.

    Attributes:
        client: a synchronous client of the server.
        deployment: id of the deployment.
    """

    client: Any
    deployment: UUID

    @classmethod
    def on(cls, client: Any) -> Runs:
        """Deploy the flow."""
        flow_id = client.create_flow(release)
        name = f"{__name__}.release"
        return cls(client, client.create_deployment(flow_id=flow_id, name="test", entrypoint=name))

    def start(self, **parameters: Any) -> Run:
        """Start a run and let it go on until it ends or waits."""
        made = self.client.create_flow_run_from_deployment(self.deployment, parameters=parameters)
        return Run(self.client, made.id).proceed()


@dataclass
class Run:
    """One run."""

    client: Any
    id: UUID

    def proceed(self) -> Run:
        """Do what a worker does with a run that is due."""
        from prefect.engine import handle_engine_signals
        from prefect.flow_engine import run_flow

        try:
            with handle_engine_signals(self.id):
                run_flow(release, flow_run=self.client.read_flow_run(self.id), return_type="state")
        except SystemExit:
            pass  # what a process does that is suspended
        return self

    @property
    def state(self) -> Any:
        """The state that the server knows."""
        return self.client.read_flow_run(self.id).state

    def resume(self, **answer: Any) -> Run:
        """Answer the question that waits, as the page does, and let the run go on.

        Raises:
            ValueError: the server refuses the answer.
        """
        told = self.client.resume_flow_run(self.id, run_input=answer)
        if told.status.value != "ACCEPT":
            raise ValueError(told.details.reason)
        return self.proceed()

    def question(self) -> str:
        """The text above the form that waits now."""
        key = self.state.state_details.run_input_keyset["description"]
        return str(json.loads(self.client.read_flow_run_input(self.id, key)))

    def form(self) -> dict[str, Any]:
        """The schema of the form that waits now."""
        key = self.state.state_details.run_input_keyset["schema"]
        found: dict[str, Any] = json.loads(self.client.read_flow_run_input(self.id, key))
        return found

    def retry(self) -> Run:
        """Press *Retry* in the page, and let the run go on."""
        from prefect.states import AwaitingRetry

        self.client.set_flow_run_state(self.id, AwaitingRetry())
        return self.proceed()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The payload of each event of that name which the server has got from this run, the oldest first."""
        mine = {"id": [f"prefect.flow-run.{self.id}"]}
        wanted = {"event": {"name": [name]}, "related": mine, "order": "ASC"}
        found = self.client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"]
        return [one["payload"] for one in found]

    def artifacts(self) -> dict[str, Any]:
        """The newest artifact of each key that this run has left."""
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

        mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[self.id]))
        found = sorted(self.client.read_artifacts(artifact_filter=mine), key=lambda one: one.created)
        return {one.key: one.data for one in found}

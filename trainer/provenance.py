"""What it takes to make an adapter again: the recipe as it was said, digests of the code, and the machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.digest import Digest, digest_bytes
from registry.manifest import MAX_MACHINES, Machine, Provenance, canonical_json
from trainer.errors import CheckpointError, RecipeError
from trainer.recipe import Recipe

if TYPE_CHECKING:
    import torch

#: What makes no difference to how data and adapters come out, by the beginnings of paths: reports, advice,
#: services, upkeep, who signs and who is told. What reads or verifies an input is never here.
NOT_MAKING = (
    *("trainer/evaluation/", "trainer/zoo/", "trainer/reproduction.py", "trainer/data/inspection"),
    *("trainer/doctor/", "trainer/plan/", "trainer/tracking.py", "trainer/outbox.py"),
    *("registry/signing/", "registry/storage/", "registry/scanning/", "registry/commands/"),
    *("registry/approving.py", "registry/attesting.py", "registry/backup.py", "registry/bom.py"),
    *("registry/command.py", "registry/comparison.py", "registry/doctor.py", "registry/exporting.py"),
    *("registry/index.py", "registry/mirror.py", "registry/modelcard.py", "registry/openssf.py"),
    *("registry/promotion.py", "registry/publishing.py", "registry/reconcile.py", "registry/rescanning.py"),
    *("registry/restore_plan.py", "registry/restoring.py", "registry/sweep.py", "registry/telling.py"),
    *("registry/undoing.py", "registry/upkeep.py", "registry/views.py"),
    *("serving/http/", "serving/plan/", "serving/ray_", "serving/local_ray.py", "serving/asgi.py"),
    *("serving/badges.py", "serving/certificates.py", "serving/credentials_command.py"),
    *("serving/keys_command.py", "serving/plan_command.py", "serving/serve_command.py"),
    *("serving/logs.py", "serving/metrics.py", "serving/pulse.py", "serving/tracing.py"),
)
#: Libraries whose arithmetic, drawing or coding ends up in the weights.
_COMPUTING = (
    *("torch", "numpy", "diffusers", "transformers", "safetensors", "onnxruntime", "pillow", "pyarrow"),
    *("accelerate", "scipy", "opencv-python-headless"),
)


def code_digest(without: tuple[str, ...] = ()) -> Digest:
    """Return the digest of the code and judges below the flows, but for commands and what is ``without``."""
    root = Path(__file__).resolve().parent.parent
    listing = {}
    for floor in ("registry", "serving", "trainer"):
        for path in sorted([*(root / floor).rglob("*.py"), *(root / floor).rglob("*.onnx")]):
            name = path.relative_to(root).as_posix()
            if path.name != "cli.py" and not name.startswith(without):
                listing[name] = digest_bytes(path.read_bytes())
    return digest_bytes(canonical_json(listing))


@cache
def running_code(without: tuple[str, ...] = ()) -> Digest:
    """Return `code_digest` as this process first found it: what runs stays, whatever happens to files."""
    return code_digest(without)


def said(recipe: Recipe) -> str:
    """Return a recipe as canonical JSON; what it does not say is left out, for some rules ask for that."""
    return canonical_json(recipe.model_dump(mode="json", exclude_unset=True)).decode("ascii")


def heard(text: str, digest: Digest) -> Recipe:
    """Return the recipe that `said` wrote.

    Raises:
        RecipeError: it is none, or with the defaults of this version it is another one.
    """
    try:
        recipe = Recipe.model_validate(json.loads(text))
    except ValueError as error:
        raise RecipeError(
            f"the recorded recipe is none for this version of the program: {error}",
            "install the version that made the adapter; `registry show` names it",
        ) from None
    if recipe.digest != digest:
        raise RecipeError(
            f"the recorded recipe has the digest {recipe.digest} here, the adapter was made from {digest}",
            "install the version that made the adapter: other defaults make another recipe",
        )
    return recipe


def provenance(recipe: Recipe, device: torch.device | None = None, processes: int = 1) -> Provenance:
    """Return what is recorded with an adapter that is made here by this process; asked before it begins."""
    return Provenance(recipe=said(recipe), code=running_code(NOT_MAKING), machine=machine(device, processes))


def kept(made: Provenance) -> dict[str, Any]:
    """Return as JSON what a checkpoint keeps of who made it; its key has the recipe."""
    return made.model_dump(mode="json", exclude={"recipe"})


def continued(made: Provenance, before: Mapping[str, Any] | None, folder: Path) -> Provenance:
    """Return the provenance of a training that goes on here.

    Args:
        made: of the steps to come.
        before: `kept` of the steps so far; None where older versions made them, which kept nothing.
        folder: of the checkpoints.

    Raises:
        CheckpointError: other sources made those; an adapter has one digest of code, and it has to be true.
    """
    mend = f"go on with the sources that began it, or remove {folder} to train from the start"
    if before is None:
        raise CheckpointError(
            f"a version that did not record its sources made the checkpoints {folder}", mend
        )
    if before["code"] != made.code:
        raise CheckpointError(
            f"these sources ({made.code}) are not those that began the training ({before['code']})", mend
        )
    earlier: list[Machine] = []
    for one in (*before.get("earlier_machines", ()), before["machine"]):
        found = Machine.model_validate(one)
        if found != made.machine and found not in earlier:
            earlier.append(found)
    return made.model_copy(update={"earlier_machines": tuple(earlier[-MAX_MACHINES:])})


def machine(device: torch.device | None = None, processes: int = 1) -> Machine:
    """Return the machine of this process.

    Args:
        device: where the training computes; None is the processor.
        processes: how many take part.
    """
    import torch

    accelerator = None
    if device is not None and device.type == "cuda":
        accelerator = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return Machine(
        processor=_processor(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        accelerator=accelerator,
        processes=processes,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        packages=dict(sorted(_versions())),
    )


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in _COMPUTING:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's model; Linux tells it in /proc/cpuinfo, Python elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models[0] if models else "") or platform.processor() or platform.machine() or "unknown"

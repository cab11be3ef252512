"""Statements about adapters: in-toto Statement v1, one predicate a kind.

The subject of every statement is the manifest: its name is ``name:version`` and its digest the manifest's
sha256, which covers the weights, the card and the name itself. So a statement cannot be moved to another
adapter, to another version or to other bytes.

| kind       | predicate                 | signed by | passes when                                  |
| ---------- | ------------------------- | --------- | -------------------------------------------- |
| training   | SLSA provenance v1        | publisher | its materials are those of the manifest      |
| licence    | our licence/v1            | publisher | verdict is "pass"                            |
| scan       | in-toto test-result v0.1  | scanner   | result is PASSED (WARNED asks for a review)  |
| evaluation | our evaluation/v1         | evaluator | verdict is "pass"                            |
| approval   | our approval/v1           | approver  | verdict is "pass"                            |
| behaviour  | our behaviour/v1          | scanner   | verdict is "pass" (review asks for a review) |
| reproduction | our reproduction/v1     | evaluator | identical, or equivalent in all; see below   |
| waiver     | our waiver/v1             | approver  | always: it judges nothing, see waivers.py    |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from registry import behaviour, evaluation, reproduction, waivers
from registry.digest import Digest
from registry.errors import InvalidDocument, UsageError, shown
from registry.manifest import WEIGHTS_NAME, canonical_json, strict_json

if TYPE_CHECKING:
    from registry.licenses import LicenseVerdict
    from registry.manifest import AdapterCard, AdapterManifest, BaseModelRef, Provenance
    from registry.scanning.report import ScanReport

Kind = Literal["training", "evaluation", "scan", "licence", "approval", "behaviour", "waiver", "reproduction"]
Role = Literal["publisher", "scanner", "evaluator", "approver"]
Outcome = Literal["pass", "review", "fail"]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
DEMANDED: Final[tuple[Kind, ...]] = ("training", "evaluation", "scan", "licence", "approval")
"""What a policy demands when it names nothing else. A probe of the behaviour needs the base model and takes
minutes, so a policy asks for it by name; nothing needs a waiver but a finding."""
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
MAX_STATEMENT_BYTES: Final = 3 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)

_OURS = "https://adapter-foundry.dev/attestation"
PREDICATE_TYPES: Final[Mapping[Kind, str]] = MappingProxyType(
    {
        "training": "https://slsa.dev/provenance/v1",
        "evaluation": f"{_OURS}/evaluation/v1",
        "scan": "https://in-toto.io/attestation/test-result/v0.1",
        "licence": f"{_OURS}/licence/v1",
        "approval": f"{_OURS}/approval/v1",
        "behaviour": f"{_OURS}/behaviour/v1",
        "waiver": f"{_OURS}/waiver/v1",
        "reproduction": f"{_OURS}/reproduction/v1",
    }
)
_KIND_OF: Final[Mapping[str, Kind]] = MappingProxyType({uri: kind for kind, uri in PREDICATE_TYPES.items()})

ROLE_OF: Final[Mapping[Kind, Role]] = MappingProxyType(
    {
        "training": "publisher",
        "evaluation": "evaluator",
        "scan": "scanner",
        "licence": "publisher",
        "approval": "approver",
        "behaviour": "scanner",
        "waiver": "approver",
        "reproduction": "evaluator",
    }
)
# Predicates that decide something by more than one word: what cannot be read is refused, never ignored.
_READERS: Final[Mapping[Kind, Callable[[Mapping[str, Any]], object]]] = MappingProxyType(
    {
        "evaluation": evaluation.parse,
        "behaviour": behaviour.parse,
        "waiver": waivers.parse,
        "reproduction": reproduction.parse,
    }
)
_TEST_RESULTS: Final[Mapping[str, Outcome]] = MappingProxyType(
    {"PASSED": "pass", "WARNED": "review", "FAILED": "fail"}
)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Sha256(_Model):
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Subject(_Model):
    name: Annotated[str, StringConstraints(min_length=1, max_length=300)]
    digest: _Sha256


class _Document(_Model):
    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    # Exactly one: a statement about two things could be shown for the wrong one.
    subject: Annotated[list[_Subject], Field(min_length=1, max_length=1)]
    predicate_type: Annotated[str, Field(alias="predicateType", max_length=300)]
    predicate: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A statement that was read: who signed it is not part of it."""

    kind: Kind
    subject_name: str
    digest: Digest
    predicate: Mapping[str, Any]

    @property
    def outcome(self) -> Outcome:
        """What the statement says about its subject; anything but a clear word is a failure."""
        if self.kind in ("training", "waiver"):
            return "pass"  # they judge nothing; `materials_match` and `waivers.in_force` compare them
        if self.kind == "scan":
            return _TEST_RESULTS.get(str(self.predicate.get("result")), "fail")
        if self.kind == "reproduction":
            return "pass" if reproduction.proves(self.predicate) else "fail"
        if self.kind == "behaviour" and self.predicate.get("verdict") == "review":
            return "review"
        return "pass" if self.predicate.get("verdict") == "pass" else "fail"

    @property
    def by_a_person(self) -> bool:
        """Whether it clearly says that a person looked; only approvals are asked that."""
        return self.predicate.get("automatic") is False


def statement(kind: Kind, subject_name: str, digest: Digest, predicate: Mapping[str, Any]) -> bytes:
    """Return a statement as canonical JSON: the payload of a DSSE envelope.

    Args:
        kind: what is attested; decides the predicate type and the role that has to sign.
        subject_name: ``name:version`` of the adapter.
        digest: the digest of its manifest.
        predicate: what is attested, as JSON values; the functions below build them.

    Raises:
        UsageError: the predicate is not JSON, is too large, or lacks the verdict that its kind needs.
    """
    if kind not in PREDICATE_TYPES:
        raise UsageError(f"there is no kind of statement {shown(kind)!r}", "choose from: " + ", ".join(KINDS))
    if kind in ("evaluation", "licence", "approval") and predicate.get("verdict") not in ("pass", "fail"):
        raise UsageError(f'the {kind} statement has no "verdict"', 'set it to "pass" or "fail"')
    if kind == "scan" and str(predicate.get("result")) not in _TEST_RESULTS:
        raise UsageError(
            'the scan statement has no "result"', "set it to one of: " + ", ".join(_TEST_RESULTS)
        )
    try:
        _check_readable(kind, predicate)
    except InvalidDocument as error:
        raise UsageError(error.message, error.mend) from None
    content = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": subject_name, "digest": {"sha256": digest.hex}}],
        "predicateType": PREDICATE_TYPES[kind],
        "predicate": dict(predicate),
    }
    try:
        payload = canonical_json(content)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the {kind} statement is not JSON: {shown(error)}", "use finite numbers and text"
        ) from None
    if len(payload) > MAX_STATEMENT_BYTES:
        raise UsageError(
            f"the {kind} statement has {len(payload)} bytes; at most {MAX_STATEMENT_BYTES} are allowed",
            "keep pictures and samples out of it and name them by digest",
        )
    return payload


def parse_statement(payload: bytes) -> Statement:
    """Return the statement in a payload.

    Raises:
        InvalidDocument: the payload is no statement of a known kind about exactly one subject.
    """
    content = strict_json(payload, "the statement", MAX_STATEMENT_BYTES, max_depth=32)
    try:
        document = _Document.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(shown(part, 60) for part in first["loc"])
        raise InvalidDocument(
            f"the statement is not valid: {where}: {shown(first['msg'])}",
            "it was not written by adapter-foundry; ask who published it",
        ) from None
    kind = _KIND_OF.get(document.predicate_type)
    if kind is None:
        raise InvalidDocument(
            f"the statement is of an unknown kind, {shown(document.predicate_type)!r}",
            "a newer version may have written it; upgrade adapter-foundry",
        )
    _check_readable(kind, document.predicate)
    subject = document.subject[0]
    return Statement(
        kind=kind,
        subject_name=subject.name,
        digest=Digest("sha256:" + subject.digest.sha256),
        predicate=document.predicate,
    )


def _check_readable(kind: Kind, predicate: Mapping[str, Any]) -> None:
    read = _READERS.get(kind)
    if read is not None:
        read(predicate)


def training_predicate(card: AdapterCard | AdapterManifest, *, builder: str) -> dict[str, Any]:
    """Return SLSA v1 provenance: which recipe, dataset, base and code made the weights.

    Args:
        card: the adapter's card or manifest.
        builder: URI of who ran the training.
    """
    lineage, made = card.training, card.training.provenance
    metadata = {} if lineage.run_id is None else {"metadata": {"invocationId": lineage.run_id}}
    return {
        "buildDefinition": {
            "buildType": f"{_OURS}/lora-training/v1",
            "externalParameters": {
                "recipe": str(lineage.recipe),
                "seed": lineage.seed,
                "steps": lineage.steps,
                **({} if made is None else {"recipeDocument": made.recipe}),
            },
            "internalParameters": {
                "codeVersion": lineage.code_version,
                **({} if made is None else _made_by(made)),
            },
            "resolvedDependencies": [
                {"name": "dataset", "digest": {"sha256": lineage.dataset.hex}},
                {"name": card.base.id, "uri": base_uri(card.base), **_digest_of_base(card)},
            ],
        },
        "runDetails": {"builder": {"id": builder}, **metadata},
    }


def _made_by(made: Provenance) -> dict[str, Any]:
    earlier = [machine.model_dump(mode="json") for machine in made.earlier_machines]
    return {
        "codeDigest": str(made.code),
        "machine": made.machine.model_dump(mode="json"),
        **({"earlierMachines": earlier} if earlier else {}),
    }


def base_uri(base: BaseModelRef) -> str:
    """Return a package URL of a base model.

    Only a commit pins something on the Hugging Face hub, so that a base with any other revision is a generic
    package: its name is no claim about whose it is.
    """
    kind = "huggingface" if _COMMIT.fullmatch(base.revision) else "generic"
    return f"pkg:{kind}/{base.id}@{quote(base.revision, safe='.-_')}"


def _digest_of_base(card: AdapterCard | AdapterManifest) -> dict[str, Any]:
    for found in card.ingredients:
        if found.kind == "base" and found.name == card.base.id and found.digest is not None:
            return {"digest": {"sha256": found.digest.hex}}
    return {}


def materials_match(found: Statement, manifest: AdapterManifest) -> bool:
    """Return whether a training statement names the materials that the manifest names."""
    builder = ""
    try:
        builder = str(found.predicate["runDetails"]["builder"]["id"])
    except (KeyError, TypeError):
        return False
    return dict(found.predicate) == training_predicate(manifest, builder=builder)


def check_about(kind: Kind, predicate: Mapping[str, Any], manifest: AdapterManifest) -> None:
    """Refuse to sign what could never be believed about a manifest, and would keep it from being pulled.

    Raises:
        UsageError: the provenance names other materials than the manifest, or another adapter was evaluated,
            or the probe ran over other bytes or on another base, or it is no such predicate.
    """
    found = Statement(kind=kind, subject_name="", digest=manifest.digest, predicate=predicate)
    if kind == "training" and not materials_match(found, manifest):
        raise UsageError(
            f"this provenance does not name the materials of {manifest.name}:{manifest.version}",
            "`registry push` writes it from the adapter card; push the adapter with a corrected card",
        )
    if kind == "evaluation":
        try:
            problem = judged_another(evaluation.parse(predicate), manifest)
        except InvalidDocument as error:
            raise UsageError(error.message, error.mend) from None
        if problem is not None:
            raise UsageError(problem, "`trainer evaluate` the very adapter that was pushed")
    if kind == "behaviour":
        problem = probed_another(behaviour.parse(behaviour.behaviour_predicate(predicate)), manifest)
        if problem is not None:
            raise UsageError(problem, "`trainer probe` the very adapter that was pushed, on its base")
    if kind == "reproduction":
        problem = reproduced_another(reproduction.parse(predicate), manifest)
        if problem is not None:
            raise UsageError(problem, "reproduce the very adapter that was pushed")


def judged_another(found: evaluation.Evaluation, manifest: AdapterManifest) -> str | None:
    """Return how an evaluation is about something else than an adapter, or None; it need not name weights."""
    name, weights = f"{manifest.name}:{manifest.version}", manifest.file(WEIGHTS_NAME).sha256
    if found.weights not in (None, weights):
        return f"the evaluation statement of {name} is about the weights {found.weights}, not {weights}"
    return None


def reproduced_another(found: reproduction.Reproduction, manifest: AdapterManifest) -> str | None:
    """Return how a reproduction statement is about something else than an adapter, or None."""
    name, weights = f"{manifest.name}:{manifest.version}", manifest.file(WEIGHTS_NAME).sha256
    if found.weights.sha256 != weights.hex:
        return f"the reproduction statement of {name} is about the weights sha256:{found.weights.sha256}"
    if found.recipe != manifest.training.recipe:
        return f"the reproduction statement of {name} is about another recipe, {found.recipe}"
    return None


def probed_another(found: behaviour.Behaviour, manifest: AdapterManifest) -> str | None:
    """Return how a behaviour statement is about something else than an adapter on its base, or None."""
    name, weights = f"{manifest.name}:{manifest.version}", manifest.file(WEIGHTS_NAME).sha256
    if found.weights != weights:
        return f"the behaviour statement of {name} is about the weights {found.weights}, not {weights}"
    if (found.base, found.revision) != (manifest.base.id, manifest.base.revision):
        base = f"{shown(found.base)} at {shown(found.revision)}"
        return f"the behaviour of {name} was probed on {base}, not on {manifest.base.id}"
    return None


def licence_predicate(verdict: LicenseVerdict, card: AdapterCard | AdapterManifest) -> dict[str, Any]:
    """Return the predicate of a licence check: purpose, policy, and the answer about each ingredient."""
    from registry.licenses import POLICY_VERSION

    return {
        "verdict": "pass" if verdict.allowed else "fail",
        "policyVersion": POLICY_VERSION,
        "purpose": verdict.purpose,
        **({} if verdict.policy is None else {"policy": {"digest": {"sha256": verdict.policy.hex}}}),
        "license": verdict.license,
        "commercial": verdict.commercial,
        "problems": list(verdict.problems),
        "ingredients": [
            {
                "name": found.name,
                "kind": found.kind,
                "license": found.license,
                "source": ingredient.source,
                "verdict": "pass" if found.allowed else "fail",
                "allows": list(found.allows),
                "reasons": list(found.reasons),
                "conditions": list(found.conditions),
            }
            for ingredient, found in zip(card.ingredients, verdict.ingredients, strict=True)
        ],
    }


def scan_predicate(report: ScanReport) -> dict[str, Any]:
    """Return the in-toto test-result of a scan: what was configured, and the rules that warned or failed.

    It has no expiry of its own: `scanned_with` tells by which rules, base and population it was made, and it
    stands for a scan only as long as these are the ones of today.
    """
    from registry.scanning.configuration import configuration

    result = {"pass": "PASSED", "review": "WARNED", "block": "FAILED"}[report.verdict]
    return {
        "result": result,
        "configuration": configuration(report),
        "passedTests": list(report.passed_rules),
        "warnedTests": sorted({found.rule for found in report.findings if found.severity == "review"}),
        "failedTests": sorted({found.rule for found in report.findings if found.severity == "block"}),
    }


def scanned_with(found: Statement, weights: Digest) -> Mapping[str, str] | None:
    """Return by what a scan found nothing in these weights; None if that is not what a statement says.

    Returns:
        The sha256 (hex) of "scanner-rules", "base-spec" and, if there was one, "reference-population";
        `registry.scanning.configuration.today` says what they are now. Rules before version 2 had no digest.
    """
    if found.kind != "scan" or found.outcome != "pass":
        return None
    try:
        entries = [entry for entry in found.predicate["configuration"] if "digest" in entry]
        digests = {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in entries}
    except (KeyError, TypeError):
        return None
    if len(digests) != len(entries) or digests.pop("weights", None) != weights.hex:
        return None
    return digests


def evaluation_predicate(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the predicate of an evaluation: the report as it is, which must hold a verdict.

    The trainer's evaluation.json keeps its verdict in an object, ``{"passed", "failed", "reasons",
    "notes"}``, which is written out.

    Raises:
        UsageError: ``report["verdict"]`` is neither "pass" nor "fail".
    """
    verdict = report.get("verdict")
    if isinstance(verdict, Mapping) and isinstance(verdict.get("passed"), bool):
        lists = {name: list(verdict.get(name, ())) for name in ("failed", "reasons")}
        lists |= {"notes": list(verdict["notes"])} if "notes" in verdict else {}
        return {**report, "verdict": "pass" if verdict["passed"] else "fail", **lists}
    if verdict not in ("pass", "fail"):
        raise UsageError('the evaluation has no "verdict"', 'set it to "pass" or "fail" by its thresholds')
    return dict(report)


def approval_predicate(
    *, by: str, reason: str, at: str, automatic: bool = False, verdict: Literal["pass", "fail"] = "pass"
) -> dict[str, Any]:
    """Return the predicate of an approval, or of its refusal.

    Args:
        by: who approves.
        reason: why.
        at: when, as an ISO 8601 time in UTC.
        automatic: no person looked; a pipeline approved by its rules.
        verdict: "fail" rejects, and is never outvoted.
    """
    return {"verdict": verdict, "by": by, "reason": reason, "at": at, "automatic": automatic}

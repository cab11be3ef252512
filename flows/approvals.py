"""A release waits for approvers: it asks in Prefect's page, and believes nothing but signatures.

Whoever can reach Prefect's page can press its button and write any name into its form. So "approve" only lets
the run look whether enough approvers' keys have signed this very manifest, as statements in the store or as
envelopes in the form; if not, it says what is missing and asks again. "reject" needs no key, for it only
stops: it is written into the audit log, and later runs do not ask about the same version until they are told
to. The run process ends while people think; when it is resumed, the flow starts from the top and reads the
answers again, in their order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from prefect.input import RunInput
from pydantic import Field, ValidationError

from flows.errors import ApprovalTimeout, FlowError, Rejected
from registry import approving
from registry.digest import Digest
from registry.errors import NetworkError, RegistryError, UsageError, shown
from registry.reference import Reference
from registry.signing.envelope import MAX_ENVELOPE_BYTES

if TYPE_CHECKING:
    from registry.client import Registry


class Decision(RunInput):
    """What the form of a waiting release asks."""

    decision: Annotated[
        Literal["approve", "reject"],
        Field(
            title="Decision",
            description=(
                "approve: the run looks for the approvers' signatures and goes on if there are enough. "
                "reject: nothing is promoted, and this version is not asked about again."
            ),
        ),
    ]
    reason: Annotated[
        str,
        Field(min_length=1, max_length=approving.MAX_WORDS, title="Reason", description="People read it."),
    ]
    reviewer: Annotated[
        str,
        Field(
            min_length=1,
            max_length=200,
            title="Reviewer",
            description="Your name, for the log. It proves nothing: only an approver's key approves.",
        ),
    ]
    envelope: Annotated[
        str,
        Field(
            max_length=MAX_ENVELOPE_BYTES,
            title="Signed approval",
            description=(
                "What `registry approve NAME:VERSION --digest … --by … --reason …` has printed on your own "
                "machine. Leave it empty if you have run `registry approve NAME:VERSION` against the store."
            ),
        ),
    ] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What approvers are asked about.

    Attributes:
        reference: ``name:version``.
        digest: of its manifest, which is what they sign.
        alias: the alias that it shall get.
    """

    reference: Reference
    digest: Digest
    alias: str


class Desk(Protocol):
    """Where people are asked, one question after the other, counted from 1."""

    since: datetime | None
    """When the first question about this version was asked; None if none was."""

    def answer(self, attempt: int) -> Decision | None:
        """Return what was answered in an earlier pass through the flow, or None if it was not asked."""
        ...

    def ask(self, attempt: int, text: str, seconds: int) -> Decision:
        """Ask, and return the answer, now or in a later pass."""
        ...


def settle(
    registry: Registry,
    desk: Desk,
    wanted: Wanted,
    *,
    again: bool,
    timeout: timedelta,
    show: Callable[[], None],
) -> approving.Approvals:
    """Ask until enough approvers have signed, and until somebody who may has moved the alias or can here.

    Args:
        registry: the registry.
        desk: asks.
        wanted: the version.
        again: ask also if it was rejected before.
        timeout: of all questions together.
        show: puts what people should look at into the page; called before each question.

    Returns:
        The approvals that count.

    Raises:
        Rejected: somebody has rejected the version, now or before.
        ApprovalTimeout: the time is over.
        PolicyRefused: an approver has signed a rejection.
        RegistryError: the registry cannot be asked.
    """
    if again and desk.since is None:
        approving.reopen(registry, wanted.reference, wanted.digest)
    refuse_rejected(registry, wanted)
    problem = ""
    for attempt in itertools.count(1):
        decision = desk.answer(attempt)
        if decision is None:
            found = approving.approvals(registry, wanted.reference, wanted.alias)
            lacking = _lacking(registry, wanted, found)
            if not lacking:
                return found
            left = timeout - (datetime.now(UTC) - desk.since if desk.since else timedelta())
            if left < timedelta(seconds=1):
                raise ApprovalTimeout(
                    f"nobody has decided about {wanted.reference} in {timeout}: {' '.join(lacking)}",
                    "nothing was promoted and nothing is lost: start the release again, it goes on here",
                )
            show()
            text = question(wanted, found, [*([problem] if problem else []), *lacking])
            decision = desk.ask(attempt, text, int(left.total_seconds()))
        problem = _heed(registry, wanted, decision)
    raise AssertionError("unreachable")


def question(wanted: Wanted, found: approving.Approvals, lacking: list[str]) -> str:
    """Return what the form says above its fields, in Markdown: what is signed, by whom, what is missing."""
    name, digest = wanted.reference, wanted.digest
    signed = [_plain(f"{one.by} on {one.at}: {one.reason}") for one in found.people]
    return "\n".join(
        [
            f"**{name}** shall become **{name.name}@{wanted.alias}**. First look at this run's artifacts; "
            "`to-be-signed` has the commands for approvers.",
            "",
            # Prefect's page breaks a paragraph at spaces only, and cuts off what is wider.
            f"sha256: {' '.join(digest.hex[at : at + 16] for at in range(0, 64, 16))}",
            "",
            f"{found.counted} of {found.needed} approvals are there.",
            "",
            *(f"- {line}" for line in signed),
            *(f"- {_plain(line)}" for line in lacking),
        ]
    )


def _plain(text: str) -> str:
    """Return text that means nothing in Markdown: no link, no picture, no markup."""
    return re.sub(r"([\\`*_\[\]<>!|#])", r"\\\1", text)


def _heed(registry: Registry, wanted: Wanted, decision: Decision) -> str:
    """Do what an answer says, and return what was wrong with it for the next question.

    Raises:
        Rejected: it says no.
        NetworkError: the registry cannot be asked.
    """
    who = shown(decision.reviewer)
    if decision.decision == "reject":
        reviewer = f"{decision.reviewer} (in Prefect's form)"
        try:
            approving.note_rejection(registry, wanted.reference, wanted.digest, reviewer, decision.reason)
        except UsageError as error:
            return f"The rejection was not taken: {error.message}."
        refuse_rejected(registry, wanted)
    if not decision.envelope.strip():
        return ""
    try:
        approving.accept(registry, wanted.reference, decision.envelope.encode())
    except NetworkError:
        raise
    except RegistryError as error:
        return f"The envelope that {who} gave was refused: {shown(error.message, 600)}"
    return ""


def _lacking(registry: Registry, wanted: Wanted, found: approving.Approvals) -> list[str]:
    """Return why the version cannot be promoted now, one sentence each."""
    lacking = [f"A statement is not believed: {shown(why, 600)}" for why in found.problems]
    automatic = len(found.found) - len(found.people)
    if not found.enough:
        if automatic:
            lacking.append(f"{automatic} automatic approval does not count: no person looked.")
        lacking.append(
            f"{found.needed - found.counted} more approver's key has to sign: "
            "a decision in this form without a signature promotes nothing."
        )
    elif not registry.keys.holds("approver") and _meant(registry, wanted) != wanted.digest:
        alias = f"{wanted.reference.name}@{wanted.alias}"
        lacking.append(
            f"There are enough approvals, but no approver's key is on the worker: an approver moves {alias} "
            f"by `registry promote {wanted.reference} --to {wanted.alias}`, then resumes this run."
        )
    return lacking


def _meant(registry: Registry, wanted: Wanted) -> Digest | None:
    target = registry.authority.state().aliases().get(f"{wanted.reference.name}@{wanted.alias}")
    return None if target is None else target.digest


def refuse_rejected(registry: Registry, wanted: Wanted) -> None:
    """Make sure that nobody has rejected a version, or that people were told to look at it again.

    Raises:
        Rejected: somebody has.
    """
    entry = approving.rejection(registry, wanted.reference, wanted.digest)
    if entry is not None:
        by, reason = approving.words_of(entry)
        raise Rejected(
            f"{wanted.reference} was rejected by {by} at {entry.time}: {reason}",
            "nothing was promoted; to ask about this version again, start the release with approval 'again'",
        )


class PrefectDesk:
    """Asks by suspending the flow run of the caller; see `Desk`.

    Args:
        digest: what is asked about; another digest gets questions of its own.

    Raises:
        FlowError: no flow run is in progress.
    """

    def __init__(self, digest: Digest) -> None:
        from prefect.client.orchestration import get_client
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            raise FlowError("people can only be asked from a flow run", "start the deployment release")
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(context.flow_run.id)
            states = client.read_flow_run_states(context.flow_run.id)
        about = f"approve-{digest.hex[:12]}-"
        # Retried after its end, a run has lost which questions it asked, and kept their forms: new ones need
        # other names. What was answered is in the store or in the audit log by then.
        ends = sum(state.is_final() or state.name == "AwaitingRetry" for state in states)
        self._prefix = f"{about}{ends}-"
        self._asked = set(run.empirical_policy.pause_keys or ())
        times = [
            state.timestamp for state in states if str(state.state_details.pause_key or "").startswith(about)
        ]
        self.since: datetime | None = min(times, default=None)

    def answer(self, attempt: int) -> Decision | None:
        """See `Desk.answer`; a run that somebody made go on without an answer counts as not answered yet."""
        if f"{self._prefix}{attempt}" not in self._asked:
            return None
        return self._suspend(attempt, "", 60)

    def ask(self, attempt: int, text: str, seconds: int) -> Decision:
        """Suspend: this process ends, and the flow starts from the top when people have answered.

        Raises:
            FlowError: the run was not started from a deployment, so that nobody could start it again.
        """
        return self._suspend(attempt, text, seconds)

    def _suspend(self, attempt: int, text: str, seconds: int) -> Decision:
        from prefect.flow_runs import suspend_flow_run

        form: Any = Decision.with_initial_data(description=text)
        try:
            answer = suspend_flow_run(wait_for_input=form, timeout=seconds, key=f"{self._prefix}{attempt}")
        except ValidationError:
            # The state was forced by hand: whoever did it has answered nothing, and is asked again.
            return Decision.model_construct(
                decision="approve", reason="-", reviewer="nobody (the run was resumed without an answer)"
            )
        except RuntimeError as error:
            raise FlowError(
                f"this run cannot wait for approvers: {error}",
                "start the deployment release in Prefect's page, or choose approval 'later'",
            ) from error
        return Decision.model_validate(answer.model_dump())

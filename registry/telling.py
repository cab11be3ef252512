"""Statements in words: who signed them, when, and what they say, in lines that people read in a terminal.

Predicates are signed, but by other people's programs as well: what has an unexpected form is shown as it is,
cut to a few lines, and every text is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from registry.errors import shown
from registry.evaluation import required
from registry.reproduction import proves

if TYPE_CHECKING:
    from registry.results import StatementView

_MAX_LINES: Final = 40
_KEY_SHOWN: Final = 12
_MAX_TOKENS: Final = 10


def told(view: StatementView) -> str:
    """Return a statement as text: a line about its signature, and what it says indented below."""
    if not view.signed:
        return f"{view.kind}: NOT BELIEVED\n  {shown(view.problem, 600)}"
    keys = ", ".join(shown(keyid[:_KEY_SHOWN]) for keyid in view.key_ids)
    when = _when(view.predicate)
    head = f"{view.kind}: signed by the {view.role} key {keys}{f' on {when}' if when else ''}"
    try:
        lines = list(_SPEAKERS[view.kind](view.predicate))
    except (KeyError, TypeError, ValueError, AttributeError):
        lines = []
    lines = lines or _plain(view.predicate)
    if len(lines) > _MAX_LINES:
        lines = [*lines[:_MAX_LINES], f"... and {len(lines) - _MAX_LINES} lines more; --json shows them"]
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _when(predicate: Mapping[str, Any]) -> str | None:
    """The time that a statement names; most name none, for the version that they are about is fixed."""
    details = predicate.get("runDetails")
    metadata = details.get("metadata") if isinstance(details, Mapping) else None
    finished = metadata.get("finishedOn") if isinstance(metadata, Mapping) else None
    at = predicate.get("at", finished)
    return shown(at, 40) if isinstance(at, str) else None


def _training(predicate: Mapping[str, Any]) -> Iterator[str]:
    build, run = predicate["buildDefinition"], predicate["runDetails"]
    given = {**build["externalParameters"], **build.get("internalParameters", {})}
    document, where = given.pop("recipeDocument", None), given.pop("machine", None)
    yield f"builder   {shown(run['builder']['id'])}"
    if "invocationId" in run.get("metadata", {}):
        yield f"run       {shown(run['metadata']['invocationId'])}"
    for name, value in given.items():
        label = {"codeVersion": "code", "codeDigest": "sources"}.get(name, shown(name, 40))
        yield f"{label:9} {shown(value)}"
    if document is not None:
        yield f"recorded  the whole recipe, {len(document)} characters; --json shows it"
    if where is not None:
        yield f"machine   {_machine(where)}"
    for found in build.get("resolvedDependencies", ()):
        digest = found.get("digest", {}).get("sha256")
        parts = [found.get("name"), found.get("uri"), digest and f"sha256:{digest}"]
        yield "from      " + ", ".join(shown(part) for part in parts if part)


def _machine(where: Mapping[str, Any]) -> str:
    device = where["accelerator"] or where["processor"]
    torch = where["packages"].get("torch", "unknown")
    count = f"{where['processes']} processes of {where['threads']} threads"
    return shown(f"{device} ({where['instructions']}), {count}, torch {torch}, Python {where['python']}", 300)


def _evaluation(predicate: Mapping[str, Any]) -> Iterator[str]:
    suite = predicate.get("suite")
    name = f" in {shown(suite['name'])}" if isinstance(suite, Mapping) and "name" in suite else ""
    yield f"verdict   {shown(predicate['verdict'])}{name}"
    against = predicate.get("against")
    if isinstance(against, Mapping):
        yield f"against   {shown(against['reference'])}, weights {shown(against['weights'])}"
    for reason in predicate.get("reasons", ()):
        yield f"because   {shown(reason, 300)}"
    for note in predicate.get("notes", ()):
        yield f"note      {shown(note, 300)}"
    metrics = predicate.get("metrics", ())
    rows = [(key, value) for key, value in metrics.items()] if isinstance(metrics, Mapping) else metrics
    cells = [_metric(row) for row in rows]
    width = max((len(name) for name, _ in cells), default=0)
    for name, value in cells:
        yield f"{name.ljust(width)}  {value}"


def _metric(row: Any) -> tuple[str, str]:
    if isinstance(row, tuple):
        return shown(row[0], 60), _number(row[1])
    value = row["value"]
    estimate = value if isinstance(value, Mapping) else {"value": value}
    text = _number(estimate["value"])
    if "low" in estimate and "high" in estimate:
        text += f" ({_number(estimate['low'])} to {_number(estimate['high'])})"
    gap = row.get("difference")
    if isinstance(gap, Mapping):
        text += f", difference {_number(gap['value'])} ({_number(gap['low'])} to {_number(gap['high'])})"
    if required(row):
        text += f", required {required(row)}: {'passed' if row.get('passed') else 'MISSED'}"
    return shown(row["name"], 60), text


def _scan(predicate: Mapping[str, Any]) -> Iterator[str]:
    yield f"result    {shown(predicate['result'])}"
    for found in predicate["configuration"]:
        notes = found.get("annotations", {})
        if found.get("name") == "scanner-rules":
            yield f"rules     version {shown(notes['version'])}"
        if found.get("name") == "reference-population":
            size, recipe = shown(notes.get("size"), 20), shown(notes.get("recipe"))
            yield f"against   {size} clean adapters, {recipe}, sha256:{shown(found['digest']['sha256'])}"
    yield f"passed    {len(predicate.get('passedTests', ()))} rules"
    for word, name in (("warned", "warnedTests"), ("failed", "failedTests")):
        if predicate.get(name):
            yield f"{word}    {', '.join(shown(rule) for rule in predicate[name])}"


def _licence(predicate: Mapping[str, Any]) -> Iterator[str]:
    purpose = predicate.get("purpose")
    yield f"verdict   {shown(predicate['verdict'])}{f' for {shown(purpose)}' if purpose else ''}"
    yield f"licence   {shown(predicate['license'])}"
    for problem in predicate.get("problems", ()):
        yield f"because   {shown(problem, 300)}"
    for found in predicate.get("ingredients", ()):
        yield f"{shown(found['kind']):9} {shown(found['name'])}: {shown(found['license'])}{_judged(found)}"
        for condition in found.get("conditions", ()):
            yield f"          on condition: {shown(condition, 300)}"


def _judged(found: Mapping[str, Any]) -> str:
    if "verdict" not in found:
        return ""
    reasons = (
        ": " + "; ".join(shown(reason, 300) for reason in found["reasons"]) if found.get("reasons") else ""
    )
    return f", {shown(found['verdict'])}{reasons}"


def _approval(predicate: Mapping[str, Any]) -> Iterator[str]:
    how = " (by a pipeline, nobody looked)" if predicate.get("automatic") else ""
    yield f"approver  {shown(predicate['by'])}{how}"
    yield f"reason    {shown(predicate['reason'], 600)}"
    if predicate.get("verdict") != "pass":
        yield f"verdict   {shown(predicate.get('verdict'))}"


def _behaviour(predicate: Mapping[str, Any]) -> Iterator[str]:
    base, probe = predicate["base"], predicate["probe"]
    yield f"verdict   {shown(predicate['verdict'])} on {shown(base['id'])} at {shown(base['revision'])}"
    yield f"probe     version {shown(probe['version'])}, words sha256:{shown(probe['vocabulary'])}"
    population = probe["population"]
    yield f"against   {'no population' if population is None else f'population sha256:{shown(population)}'}"
    chances = predicate["p_values"]
    for name, value in predicate["statistics"].items():
        chance = f", p = {_number(chances[name])}" if name in chances else ""
        yield f"measured  {shown(name)} {_number(value)}{chance}"
    for row in predicate["tokens"][:_MAX_TOKENS]:
        yield f"token     {_number(row['score'])}  {shown(row['text'])}"
    for row in predicate["pairs"]:
        yield f"together  {shown(row['verdict'])} with the weights {shown(row['with'])}"


def _waiver(predicate: Mapping[str, Any]) -> Iterator[str]:
    where = predicate.get("where")
    place = "" if where is None else f" at {shown(where, 300)}"
    yield f"lets pass {', '.join(shown(rule, 60) for rule in predicate['rules'])}{place}"
    yield f"in        weights sha256:{shown(predicate['weights']['sha256'])}"
    yield f"from      {shown(predicate['issued'], 40)} until {shown(predicate['expires'], 40)}"
    yield f"approver  {shown(predicate['by'])}"
    yield f"reason    {shown(predicate['reason'], 600)}"


def _reproduction(predicate: Mapping[str, Any]) -> Iterator[str]:
    meaning = {
        "identical": "made again from the recorded recipe, every bit is the same",
        "equivalent": "made again from the recorded recipe, the same within the tolerances below",
        "different": "made again from the recorded recipe, it is not shown to be the same",
    }
    yield f"outcome   {shown(predicate['outcome'])}: {meaning[predicate['outcome']]}"
    if predicate["outcome"] == "equivalent" and not proves(predicate):
        yield "but       not both weights and figures were compared: gates that ask for it refuse it"
    yield f"weights   sha256:{shown(predicate['weights']['sha256'])}"
    yield f"again     sha256:{shown(predicate['rebuilt']['sha256'])}"
    for label, name in (("dataset", "dataset"), ("code", "code")):
        both = predicate[name]
        same = "the same" if both["released"] == both["rebuilt"] else f"now {shown(both['rebuilt'])}"
        yield f"{label:9} {shown(both['released'])}, {same}"
    yield f"machine   {_machine(predicate['machine'])}"
    if predicate["machine"] != predicate["released_machine"]:
        yield f"then      {_machine(predicate['released_machine'])}"
    far = predicate["difference"]
    if far is not None:
        relative = "unknown" if far["relative"] is None else _number(far["relative"])
        most = _number(far["tolerance"])
        yield f"apart     {relative} of the released update, at most {most} is equivalent"
    for row in predicate["metrics"]:
        within = "" if row["low"] <= row["rebuilt"] <= row["high"] else ": OUTSIDE"
        yield (
            f"{shown(row['name'], 60)}  {_number(row['released'])}, again {_number(row['rebuilt'])} "
            f"(equivalent from {_number(row['low'])} to {_number(row['high'])}){within}"
        )
    for note in predicate["notes"]:
        yield f"note      {shown(note, 300)}"


def reproduction_lines(predicate: Mapping[str, Any]) -> list[str]:
    """Return what a reproduction says, a line each."""
    return list(_reproduction(predicate))


def _plain(predicate: Mapping[str, Any]) -> list[str]:
    text = json.dumps(dict(predicate), indent=2, ensure_ascii=True, default=str)
    return [shown(line, 200) for line in text.splitlines()]


def _number(value: Any) -> str:
    return (
        f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else shown(value, 40)
    )


_SPEAKERS: Final = {
    "training": _training,
    "evaluation": _evaluation,
    "scan": _scan,
    "licence": _licence,
    "approval": _approval,
    "behaviour": _behaviour,
    "waiver": _waiver,
    "reproduction": _reproduction,
}


def told_all(views: Sequence[StatementView]) -> str:
    """Return every statement as text, an empty line between them."""
    return "\n\n".join(told(view) for view in views)

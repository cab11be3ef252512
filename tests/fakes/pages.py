"""The documents as tests read them: pages, their ``console`` blocks, and the marks that say how to run those.

A mark is an HTML comment on a line of its own, so readers never see it:

=============================  =========================================================================
``<!-- sandbox: NAME -->``     begins a fresh sandbox (`fakes.sandboxes`); a page begins in ``empty``
``<!-- before: COMMAND -->``   a command that readers need not see; it is run, and has to end with 0
``<!-- where: X is Y -->``     from here to the end of the page X is replaced by Y in what is run
``<!-- exits: 14 -->``         exit codes of the next block: one for all its commands, or one for each
``<!-- needs: WHAT -->``       the next block cannot be run here (`NEEDS`); commands and options must exist
=============================  =========================================================================

A block whose lines begin with ``$ `` shows a session: those lines are commands, the others what they print.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

REPOSITORY = Path(__file__).resolve().parent.parent.parent

NEEDS = {
    "gpu": "a graphics card",
    "aws": "an account at AWS or another cloud",
    "network": "packages, models or pages from elsewhere",
    "a paid API": "a key that costs money with every answer",
    "a cluster": "Kubernetes, or several machines",
    "containers": "Docker or another engine of containers",
    "servers": "the servers of a team at addresses of their own",
    "minutes": "more time than a test of documents may take",
    "a program": "a program that is not installed with us: the page names it",
    "make": "it is run by another test: tests/docs/test_commands.py says which",
}
"""What a command may need that a test has not."""

_MARK = re.compile(r"^ *<!-- (sandbox|before|where|exits|needs): (.+?) -->$")
_FENCE = re.compile(r"^( *)(```+|~~~+) *([\w-]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One thing to do, in the order of the page.

    Attributes:
        page: path of the page from the top of the repository.
        line: where it stands, counted from 1.
        kind: what to do with ``text``.
        text: shell commands, the name of a sandbox, or what replaces ``what``.
        what: text that is replaced.
        codes: exit codes of a command that are right.
        needs: why it is not run, or "".
    """

    page: str
    line: int
    kind: Literal["sandbox", "command", "where"]
    text: str
    what: str = ""
    code: int = 0
    needs: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fence:
    """A block of code: its language, its text without the indentation, and the line of its first text."""

    language: str
    text: str
    line: int


def documents() -> list[Path]:
    """Every page that people read: README, CONTRIBUTING, SECURITY and all of docs/."""
    top = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    return [*(path for path in top if path.exists()), *sorted((REPOSITORY / "docs").rglob("*.md"))]


def relative(path: Path) -> str:
    """Name of a page in messages."""
    return path.relative_to(REPOSITORY).as_posix()


def steps(path: Path) -> list[Step]:
    """What a page tells to do, in its order.

    Raises:
        ValueError: a mark is no mark, or stands before nothing.
    """
    page, found, codes, needs = relative(path), [], "", ""
    for number, item in _items(path.read_text()):
        if isinstance(item, Fence):
            if item.language == "console":
                found += _commands(page, item, codes, needs)
                codes = needs = ""
            continue
        kind, text = item
        if kind == "exits":
            codes = text
        elif kind == "needs":
            if text not in NEEDS:
                raise ValueError(f"{page}:{number}: {text!r} is none of {', '.join(NEEDS)}")
            needs = text
        elif kind == "where":
            what, between, put = text.partition(" is ")
            if not between:
                raise ValueError(f"{page}:{number}: say `where: X is Y`")
            found.append(Step(page=page, line=number, kind="where", text=put, what=what))
        else:
            done: Literal["sandbox", "command"] = "sandbox" if kind == "sandbox" else "command"
            found.append(Step(page=page, line=number, kind=done, text=text))
    if codes or needs:
        raise ValueError(f"{page}: a mark at the end belongs to no block")
    return found


def fences(text: str) -> list[Fence]:
    """Every block of code of a page."""
    return [item for _, item in _items(text) if isinstance(item, Fence)]


def prose(text: str) -> str:
    """A page without its blocks of code and comments; line numbers stay."""
    kept, inside = [], ""
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if inside:
            inside = "" if fence and fence[2].startswith(inside) and not fence[3] else inside
            kept.append("")
        elif fence:
            inside = fence[2]
            kept.append("")
        else:
            kept.append(line)
    return re.sub(r"<!--.*?-->", lambda hit: "\n" * hit[0].count("\n"), "\n".join(kept), flags=re.DOTALL)


def _items(text: str) -> list[tuple[int, Fence | tuple[str, str]]]:
    found: list[tuple[int, Fence | tuple[str, str]]] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        fence, mark = _FENCE.match(line), _MARK.match(line)
        if fence:
            start, body = number, []
            while number < len(lines) and not re.match(rf"^ *{fence[2]} *$", lines[number]):
                body.append(lines[number].removeprefix(fence[1]))
                number += 1
            number += 1
            found.append((start + 1, Fence(language=fence[3], text="\n".join(body), line=start + 1)))
        elif mark:
            found.append((number, (mark[1], mark[2])))
        elif re.match(r"^ *<!-- *(sandbox|before|where|exits|needs)\b", line):
            raise ValueError(f"line {number} is no mark: {line}")
    return found


def _commands(page: str, block: Fence, codes: str, needs: str) -> list[Step]:
    lines = block.text.splitlines()
    session = any(line.startswith("$ ") for line in lines)
    found: list[Step] = []
    number = 0
    while number < len(lines):
        start = number
        text = lines[number]
        number += 1
        if session and not text.startswith("$ "):
            continue
        while _unfinished(text) and number < len(lines):
            text += "\n" + lines[number]
            number += 1
        text = text.removeprefix("$ ") if session else text
        if text.strip() and not text.lstrip().startswith("#"):
            found.append(Step(page=page, line=block.line + start, kind="command", text=text, needs=needs))
    expected = [int(code) for code in codes.split()] or [0]
    if len(expected) == 1:
        expected *= len(found)
    if len(expected) != len(found):
        raise ValueError(f"{page}:{block.line}: {len(found)} commands, {len(expected)} exit codes")
    return [replace(step, code=code) for step, code in zip(found, expected, strict=True)]


def _unfinished(text: str) -> bool:
    """Whether a shell would ask for more: a backslash at the end, an open quote, an open document."""
    heredoc = re.search(r"<<-?\s*(['\"]?)(\w+)\1", text)
    if heredoc and not re.search(rf"^\s*{heredoc[2]}$", text, re.MULTILINE):
        return True
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False

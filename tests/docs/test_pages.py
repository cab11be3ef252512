"""The pages hold together: marks, links, anchors, pictures and the commands that are not run."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fakes.pages import REPOSITORY, Step, documents, fences, prose, relative, steps
from infra.docs import diagram, reference

#: Languages in which a reader would type commands: they are ``console`` here, so that they are run.
TYPED = {"", "sh", "bash", "shell", "zsh", "shell-session"}
_COMMAND = re.compile(r"^(?:(?:registry|trainer|serving) [a-z-]|python -m (?:flows|infra)\.)")

MAKERS = {
    "serving-light.png": "tests/browser/test_serving_page.py",
    "serving-dark.png": "tests/browser/test_serving_page.py",
    "serving-phone.png": "tests/browser/test_serving_page.py",
    "prefect-form.png": "tests/browser/test_prefect_page.py",
    "prefect-approval.png": "tests/browser/test_prefect_page.py",
    "prefect-run.png": "tests/browser/test_prefect_page.py",
    "evaluation-report.png": "tests/browser/test_report_page.py",
    "evaluation-dark.png": "tests/browser/test_report_page.py",
    "evaluation-phone.png": "tests/browser/test_report_page.py",
    "contact_sheet.png": "trainer/evaluation/pictures.py",
    "intensity_sheet.png": "trainer/evaluation/pictures.py",
    "blends.png": "trainer/evaluation/pictures.py",
    "zoo.png": "trainer/zoo/sheet.py",
    "way-of-an-adapter.svg": "infra/docs/diagram.py",
}
"""Every picture of the documents, and the test or command that writes it: the pages' with
``PICTURES=docs/images`` or ``SERVING_SCREENSHOTS=docs/images``, the sheets by ``make demo`` (runs/…/latest,
checked by tests/integration/test_pipeline.py)."""


# -- marks --


def test_each_mark_is_one_and_belongs_to_a_block() -> None:
    assert sum(len(steps(page)) for page in documents()) > 100


@pytest.mark.parametrize("page", documents(), ids=relative)
def test_what_readers_type_is_marked_as_console(page: Path) -> None:
    unmarked = [
        f"{relative(page)}:{fence.line}"
        for fence in fences(page.read_text())
        if fence.language in TYPED
        and any(_COMMAND.match(line.lstrip("$ ")) for line in fence.text.splitlines())
    ]
    assert not unmarked, f"blocks with commands that are not ```console: {unmarked}"


# -- commands that are not run --


def _known() -> dict[str, click.Command]:
    return dict(reference.commands())


def inline() -> Iterator[tuple[str, str]]:
    """Commands in the running text, with the page."""
    for page in documents():
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", " ".join(prose(page.read_text()).split())):
            if _COMMAND.match(code):
                yield relative(page), code


def problem(line: str, known: dict[str, click.Command]) -> str | None:
    """Why our command in a line of a shell does not exist, or None: its words and options, not its values."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    for word in lexer:
        if re.fullmatch(r"[|&;<>()]+", word):
            if _COMMAND.match(" ".join(words)):
                break
            words = []
        elif words or not re.match(r"\w+=", word):
            words.append(word)
    return _misses(words, known) if _COMMAND.match(" ".join(words)) else None


def _misses(words: list[str], known: dict[str, click.Command]) -> str | None:
    at = 3 if words[0] == "python" else 1
    name = " ".join(words[:at])
    command = known.get(name)
    while isinstance(command, click.Group) and at < len(words) and not words[at].startswith("-"):
        name, at = f"{name} {words[at]}", at + 1
        command = known.get(name)
        if command is None and re.match(r"[A-Z…<]|\.\.\.", words[at - 1]):
            return None  # a placeholder for any command
    if command is None:
        module = REPOSITORY / words[-1 if at < 3 else 2].replace(".", "/")
        alone = words[0] == "python" and (
            module.with_suffix(".py").exists() or (module / "__main__.py").exists()
        )
        return None if alone else f"there is no `{name}`"
    options = {one for parameter in command.params for one in (*parameter.opts, *parameter.secondary_opts)}
    for word in words[at:]:
        if word == "--":
            break
        option = word.partition("=")[0]
        if re.match(r"-+[a-zA-Z]", option) and option not in {*options, "--help", "-h", "--version"}:
            return f"`{name}` has no {option}"
    return None


def shown() -> Iterator[Step]:
    return (step for page in documents() for step in steps(page) if step.kind == "command")


def test_each_command_and_option_exists() -> None:
    known = _known()
    wrong = [f"{step}: {why}" for step in shown() if (why := problem(step.text, known))]
    wrong += [f"{page}: {why}" for page, code in inline() if (why := problem(_quoted(code), known))]
    assert not wrong, "\n".join(wrong)


def _quoted(code: str) -> str:
    """A command in the running text may have an apostrophe or a quote that stands alone."""
    return code if code.count('"') % 2 == 0 and code.count("'") % 2 == 0 else re.sub("[\"']", "", code)


def test_a_wrong_command_or_option_is_noticed() -> None:
    known = _known()
    assert problem("registry scan DIR --fromat html", known) == "`registry scan` has no --fromat"
    assert problem("A=b registry scam DIR | jq", known) == "there is no `registry scam`"
    assert problem("cat x | registry trust signn", known) == "there is no `registry trust signn`"
    assert problem("registry scan DIR --format html  # and --more", known) is None


def test_each_command_that_is_not_run_is_good_bash() -> None:
    wrong = []
    for step in shown():
        if step.needs:
            text = re.sub(r"<[^<>\n]*>", "X", step.text)  # placeholders are no redirections
            found = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
            wrong += [f"{step}: {found.stderr}"] if found.returncode else []
    assert not wrong, "\n".join(wrong)


# -- links and pictures --


def anchors(page: Path) -> set[str]:
    """What can be jumped to on a page, as GitHub and the site make them from headings."""
    found = set(re.findall(r'(?:id|name)="([^"]+)"', page.read_text()))
    heading = re.compile(r"^ {0,3}#{1,6} +(.+?)(?: *\{ *#[\w-]+ *\})?$", re.MULTILINE)
    for title in heading.findall(prose(page.read_text())):
        bare = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        found.add(re.sub(r"[^\w\- ]", "", bare).strip().replace(" ", "-"))
    return found


def test_each_link_and_anchor_resolves() -> None:
    generated = {REPOSITORY / "docs" / name for name in reference.pages()}
    broken = []
    for page in documents():
        for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(page.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            goal = (page.parent / path).resolve() if path else page
            if goal in generated:
                continue
            if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
                broken.append(f"{relative(page)} -> {target}")
    assert not broken, "\n".join(broken)


def test_each_picture_is_shown_and_has_a_maker() -> None:
    folder = REPOSITORY / "docs" / "images"
    pictures = {path.name for path in folder.iterdir()}
    text = "".join(page.read_text() for page in documents())
    assert pictures == set(MAKERS)
    assert not {name for name in pictures if f"images/{name}" not in text}, "nobody sees these"
    for name, maker in MAKERS.items():
        source = (REPOSITORY / maker).read_text()
        stem = Path(name).stem
        assert stem in source or f'"{stem.partition("-")[2]}"' in source, f"{maker} does not write {name}"


def test_the_diagram_is_what_its_maker_draws() -> None:
    assert diagram.TARGET.read_text("utf-8") == diagram.svg()

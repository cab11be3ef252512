"""A Ray cluster of this machine's own: its token is whole and the same for all, however they start."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

#: Makes the token, and just before the n-th thing that it does with its folder is killed or overtaken.
STARTS = """
import os, signal, sys
from pathlib import Path
from serving.local_ray import kept_here

folder, how, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
found = []

def start():
    with kept_here(folder):
        found.append(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text())

def before(event, arguments):
    global left
    if any(str(folder) in str(one) for one in arguments):
        left -= 1
        if left == 0 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0 and how == "overtaken":
            start()

sys.addaudithook(before)
start()
print(*found)
"""


def start(folder: Path, how: str, number: int) -> list[str]:
    """The tokens that were found, of who overtook first; none by who was killed."""
    command = [sys.executable, "-c", STARTS, str(folder), how, str(number)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.split()


def whole(token: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", token) is not None


def test_who_is_killed_at_any_moment_leaves_a_whole_token_or_none(tmp_path: Path) -> None:
    number = 1
    while not start(tmp_path / str(number), "killed", number):
        (token,) = start(tmp_path / str(number), "undisturbed", 0)
        assert whole(token), f"killed before step {number}"
        assert (tmp_path / str(number) / "token").stat().st_mode & 0o077 == 0
        number += 1
    assert number > 6, "it was never killed while it made the token"


def test_who_is_overtaken_at_any_moment_has_the_token_of_the_other(tmp_path: Path) -> None:
    number = 1
    while len(tokens := start(tmp_path / str(number), "overtaken", number)) == 2:
        assert tokens[0] == tokens[1], f"overtaken before step {number}"
        assert whole(tokens[0])
        number += 1
    assert len(tokens) == 1
    assert number > 6, "it was never overtaken while it made the token"

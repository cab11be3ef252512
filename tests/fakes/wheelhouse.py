"""A folder of wheels of what is installed here, for tests that let pip work without a network.

pip resolves and installs by the real names, versions and requirements. A wheel has its metadata and no code,
unless it is asked for as a whole.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(name: str) -> set[str]:
    """Canonical names of a distribution and of all that it needs here."""
    found: dict[str, set[str]] = {}
    waiting = [Requirement(name)]
    while waiting:
        wanted = waiting.pop()
        key = canonicalize_name(wanted.name)
        if key in found and wanted.extras <= found[key]:
            continue
        extras = found.setdefault(key, set()) | wanted.extras
        found[key] = extras
        for line in distribution(key).requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            ):
                waiting.append(needed)
    return set(found)


def contents(found: Distribution, whole: bool) -> Iterator[tuple[str, bytes]]:
    """Files of the wheel of an installed distribution, by their names in it."""
    metadata = f"{file_stem(found)}.dist-info"
    yield f"{metadata}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    yield f"{metadata}/METADATA", (found.read_text("METADATA") or "").encode()
    yield f"{metadata}/RECORD", b""
    for path in (found.files or ()) if whole else ():
        if path.parts[0] == ".." or path.suffix == ".pyc":
            continue
        if not path.parts[0].endswith(".dist-info"):
            yield str(path), path.read_binary()
        elif path.name == "entry_points.txt":
            yield f"{metadata}/{path.name}", path.read_binary()


def file_stem(found: Distribution) -> str:
    """Name and version as they begin the name of a wheel."""
    return f"{re.sub(r'[-_.]+', '_', found.name)}-{found.version}"


def write(folder: Path, *, whole: set[str]) -> None:
    """Make a wheel of every distribution that is installed here."""
    folder.mkdir(parents=True)
    for found in distributions():
        whole_too = canonicalize_name(found.name) in whole
        with zipfile.ZipFile(folder / f"{file_stem(found)}-py3-none-any.whl", "w") as archive:
            for path, content in contents(found, whole_too):
                archive.writestr(path, content)

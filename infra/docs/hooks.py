"""What happens when mkdocs builds the site: reference pages from the code, and no links that leave docs/.

A page may link to a file of the checkout (``../tests/bench/scan.py``): where the checkout is shown that leads
there; on this site, which stands alone, the link becomes the file's name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from posixpath import dirname, normpath
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.docs import reference

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_MARK = re.compile(r"^ *<!-- (?:sandbox|before|where|exits|needs): .*? -->\n", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace ``how-to/*.md`` in the navigation by the pages of that folder, in the order of their names."""
    for entry in config.nav or []:
        for title, pages in entry.items():
            if isinstance(pages, list):
                entry[title] = [one for page in pages for one in _expanded(page, Path(config.docs_dir))]
    return config


def _expanded(page: object, docs: Path) -> list[object]:
    if not isinstance(page, str) or "*" not in page:
        return [page]
    found = sorted(path for path in docs.glob(page) if path.name != "index.md")
    return [path.relative_to(docs).as_posix() for path in found]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages."""
    from mkdocs.structure.files import File

    for path, write in reference.pages().items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take the marks of tests out, and links that leave docs/."""
    here = dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if re.match(r"[a-z]+:|#|/", target):
            return found[0]
        place = normpath(f"{here}/{target.partition('#')[0]}" if here else target.partition("#")[0])
        if not place.startswith("../") and (Path(config.docs_dir) / place).is_dir():
            return f"[{text}]({target.rstrip('/')}/index.md)"
        if not place.startswith("../"):
            return found[0]
        name = place.removeprefix("../")
        return text if name in text else f"{text} (`{name}`)"

    return _LINK.sub(link, _MARK.sub("", markdown))

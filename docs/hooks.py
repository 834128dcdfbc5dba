"""Hooks of MkDocs: pages of the site from files beside docs/, and links between them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# Files of the repository that are pages of the site.
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "results.md": "benchmarks/RESULTS.md",
    "security.md": "SECURITY.md",
    "licence.md": "LICENSE",
}
_SOURCES = {source: page for page, source in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files beside docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text()
        if not source.endswith(".md"):
            text = f"# Licence\n\n```text\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that are right in the repository lead to the pages of the site."""
    uri = page.file.src_uri
    folder = posixpath.dirname(PAGES.get(uri, f"docs/{uri}"))

    def relinked(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        wanted = _SOURCES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        return match[1] if wanted is None else posixpath.relpath(wanted, posixpath.dirname(uri) or ".")

    if '<div class="grid"' in markdown:
        page.meta["hide"] = ["toc"]  # two blocks of code stand side by side in its place
    return _LINK.sub(relinked, markdown)

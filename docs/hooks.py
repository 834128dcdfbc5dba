"""Hooks of MkDocs: pages of the site from files beside docs/, links between them, and the other language of a page."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# Files of the repository that are pages of the site, in English in both languages.
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "results.md": "benchmarks/RESULTS.md",
    "security.md": "SECURITY.md",
    "licence.md": "LICENSE",
}
_SOURCES = {source: page for page, source in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)#])")
_ANCHORED = re.compile(r'^(#+ )<a id="([^"]*)"></a>(.*)$', re.MULTILINE)
_LANGUAGE_LINK = re.compile(r"\[([^]]+)\]\((?:zh|\.\.)/index\.md\)")


def on_config(config: Any) -> None:
    """Set up the search in Chinese: without jieba it would find only what stands behind a punctuation mark."""
    logging.getLogger("jieba").setLevel(logging.WARNING)
    if _is_chinese(config):
        import jieba

        jieba.add_word("批次", freq=1_000_000)  # else 微批次 is sometimes cut into 微批 and 次


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files beside docs/, and to the Chinese site what both languages share."""
    chinese = _is_chinese(config)
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if not source.endswith(".md"):
            text = f"# Licence\n\n```text\n{text}```\n"
        if chinese:
            text = text.replace("\n", "\n\n（本页只有英文版。）\n", 1)
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "docs").glob("*.*")) if chinese else ():
        if path.suffix in (".css", ".png", ".svg"):
            files.append(File.generated(config, path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Let links that are right in the repository lead to the pages of the site."""
    uri = page.file.src_uri
    docs = "docs/zh" if _is_chinese(config) else "docs"
    folder = posixpath.dirname(PAGES.get(uri, f"{docs}/{uri}"))

    def relinked(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        inside = re.fullmatch(rf"(?:{docs}|docs)/(.*)", target)
        wanted = _SOURCES.get(target, inside[1] if inside else None)
        return match[1] if wanted is None else posixpath.relpath(wanted, posixpath.dirname(uri) or ".")

    # GitHub does not know the anchors of MkDocs, so the files have anchors of HTML.
    markdown = _ANCHORED.sub(r"\1\3 {#\2}", markdown)
    if '<div class="grid"' in markdown:
        page.meta["hide"] = ["toc"]  # two blocks of code stand side by side in its place
    # The other language is another build, whose pages this one does not know.
    markdown = _LANGUAGE_LINK.sub(
        lambda match: f'<a href="{_in_other_language(page, config)}">{match[1]}</a>', markdown
    )
    return _LINK.sub(relinked, markdown)


def on_post_page(output: str, page: Any, config: Any, **_: Any) -> str:
    """Let the choice of the language lead to the same page."""
    here, other = posixpath.basename(page.url), _in_other_language(page, config)

    def link(match: re.Match[str]) -> str:
        return here if match[1] == config.theme["language"] else other

    output = re.sub(r'(?<=<a href=")[^"]*(?=" hreflang="(\w+)" class="md-select__link")', link, output)
    # Material's script looks for a map of the other site beside each of these.
    return re.sub(r'\s*<link rel="alternate"[^>]*>', "", output)


def _is_chinese(config: Any) -> bool:
    return Path(config.docs_dir).name == "zh"


def _in_other_language(page: Any, config: Any) -> str:
    """Return the address of a page in the other language, from the page."""
    other = "../" if _is_chinese(config) else "zh/"
    return posixpath.relpath(other + page.url, posixpath.dirname(page.url) or ".")

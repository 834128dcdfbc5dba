"""The Chinese pages are in step with the English ones: headings, code, tables, links and figures."""

from __future__ import annotations

import dataclasses
import itertools
import posixpath
import re
from collections import Counter
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify, unique

from tests.pages import CHINESE, DOCS, ENGLISH, ROOT

PAIRS = [
    (ROOT / "README.md", ROOT / "README.zh-CN.md"),
    *((page, CHINESE / page.relative_to(DOCS)) for page in ENGLISH),
]

_HEADING = re.compile(r'(#+) (?:<a id="([^"]*)"></a>)?(.*)$')
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NAME = re.compile(r"`([^`]+)`")
_FIGURE = re.compile(r"(\d+(?:,\d{3})*(?:\.\d+)*)(?: (million|billion|万|亿))?")
_SCALE = {"million": 10**6, "billion": 10**9, "万": 10**4, "亿": 10**8}


@dataclasses.dataclass
class Section:
    """What both languages have alike below a heading.

    `blocks`: blocks of code, HTML, comments and references to the source, each without the blank lines around it.
    `tables`: the number of bars in each row. `names`: what stands between backticks.
    """

    heading: str
    level: int
    anchor: str
    blocks: list[str] = dataclasses.field(default_factory=list)
    tables: list[int] = dataclasses.field(default_factory=list)
    names: set[str] = dataclasses.field(default_factory=set)
    links: Counter[str] = dataclasses.field(default_factory=Counter)
    figures: Counter[str] = dataclasses.field(default_factory=Counter)


def sections(page: Path) -> list[Section]:
    """Return the sections of a page, the first of which is what stands before the first heading.

    A heading without an explicit anchor has the one that MkDocs makes of it.
    """
    found, anchors, prose = [Section("", 0, "")], set[str](), list[list[str]]([[]])
    is_fenced, is_indented, before = False, False, ""
    for line in page.read_text(encoding="utf-8").splitlines():
        section, text = found[-1], prose[-1]
        heading = None if is_fenced else _HEADING.match(line)
        if is_fenced:
            section.blocks[-1] += f"\n{line}"
            is_fenced = line != "```"
        elif heading:
            plain = re.sub(r"[`*]", "", heading[3])
            anchor = unique(heading[2] or slugify(plain, "-"), anchors)
            found.append(Section(line, len(heading[1]), anchor))
            prose.append([heading[3]])
        elif line.startswith("    ") and is_indented:
            section.blocks[-1] += f"\n{line}"
        elif line.startswith(("```", "<", ":::")) or (line.startswith("    ") and not before):
            section.blocks.append(line)
            is_fenced = line.startswith("```")
        else:
            text.append(line)
            if line.startswith("|"):
                section.tables.append(len(re.findall(r"(?<!\\)\|", line)))
        is_indented = line.startswith("    ") and (is_indented or not before)  # else a line of a list
        before = line
    for section, text in zip(found, prose, strict=True):
        section.names = {" ".join(name.split()) for name in _NAME.findall("\n".join(text))}
        without_code = _NAME.sub("", "\n".join(text))
        section.links = Counter(_target(page, link) for link in _LINK.findall(without_code))
        section.figures = Counter(_figures(_LINK.sub("", without_code)))
    return found


def _figures(text: str) -> list[str]:
    """Return the numbers of a text, but for those of one digit, which are often words. 12 million is 1200 万."""
    figures = [(number.replace(",", ""), _SCALE.get(scale)) for number, scale in _FIGURE.findall(text)]
    return [f"{float(number) * scale:.0f}" if scale else number for number, scale in figures if number[1:] or scale]


def _target(page: Path, link: str) -> str:
    """Return where a link leads: a path from the root of the repository to the page in English, or an address."""
    if re.match(r"\w+:", link):
        return link
    file, _, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(page.parent.relative_to(ROOT).as_posix(), file or page.name))
    return f"{path}#{anchor}"


def _chinese(target: str) -> str:
    """Return where a link of a Chinese page leads in place of this: a page in Chinese, or the same file."""
    languages = {"README.zh-CN.md": "README.md", "README.md": "README.zh-CN.md", "docs/zh/index.md": "docs/index.md"}
    file, _, anchor = target.partition("#")
    if file.startswith("docs/") and file.endswith(".md"):
        file = languages.get(file, file.replace("docs/", "docs/zh/", 1))
    return target if re.match(r"\w+:", target) else f"{languages.get(file, file)}#{anchor}"


def difference(english: Path, chinese: Path) -> str | None:
    """Return the first thing in which a translation is not in step, or None."""
    wanted, given = sections(english), sections(chinese)
    for want, have in zip(wanted, given, strict=False):
        where = f"{chinese.relative_to(ROOT)}, `{have.heading or 'before the first heading'}` for `{want.heading}`"
        if want.level != have.level:
            return f"{where}: it has level {have.level}, not {want.level}"
        if chinese.parent != ROOT and want.anchor != have.anchor:  # nothing links into the README
            return f'{where}: begin the heading with <a id="{want.anchor}"></a>'
        for number, (block, its) in enumerate(itertools.zip_longest(want.blocks, have.blocks)):
            if block != its:
                return f"{where}: block {number + 1} is {its!r}, not {block!r}"
        if want.tables != have.tables:
            return f"{where}: the rows of its tables have {have.tables} bars, not {want.tables}"
        if want.names - have.names:  # to name a thing once more than in English is no fault
            return f"{where}: it does not name {', '.join(sorted(want.names - have.names))}"
        links = Counter({_chinese(link): number for link, number in want.links.items()})
        if links != have.links:
            return f"{where}: it lacks the links {[*(links - have.links)]} and has {[*(have.links - links)]} too much"
        if want.figures != have.figures:
            lacking, more = [*(want.figures - have.figures)], [*(have.figures - want.figures)]
            return f"{where}: it lacks the figures {lacking} and has {more} too much"
    if len(wanted) != len(given):
        rest = (wanted if len(wanted) > len(given) else given)[min(len(wanted), len(given))]
        return f"{chinese.relative_to(ROOT)} has {len(given) - 1} headings, not {len(wanted) - 1}: {rest.heading}"
    return None


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=[str(page.relative_to(ROOT)) for page, _ in PAIRS])
def test_a_page_in_chinese_is_in_step(english: Path, chinese: Path) -> None:
    assert chinese.exists(), f"translate {english.relative_to(ROOT)}"
    found = difference(english, chinese)
    assert found is None, found


def test_no_page_is_in_chinese_alone() -> None:
    assert not set(CHINESE.rglob("*.md")) - {chinese for _, chinese in PAIRS}


def test_the_navigation_has_the_same_pages_in_both_languages() -> None:
    english, chinese = (
        re.findall(r"(\S+\.md)$", (ROOT / name).read_text(encoding="utf-8").partition("\nnav:")[2], re.MULTILINE)
        for name in ("mkdocs.yml", "mkdocs.zh.yml")
    )
    assert english == chinese


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('## <a id="one"></a>一', '### <a id="one"></a>一', "it has level 3, not 2"),
        ('<a id="one"></a>', "", 'begin the heading with <a id="one"></a>'),
        ("x = 1\n", "x = 2\n", "block 1 is '```python\\nx = 2"),
        ("    ddparity run", "    ddparity train", "block 2 is '    ddparity train"),
        ("::: ddparity.run", "", "block 3 is None"),
        ("| a |", "| a | b |", "the rows of its tables have [2, 2, 3] bars, not [2, 2, 2]"),
        ("`f(x)`", "`f(y)`", "it does not name f(x)"),
        ("(other.md#two)", "(other.md)", "it lacks the links ['docs/zh/other.md#two']"),
        ("(other.md#two)", "(../other.md#two)", "has ['docs/other.md#two'] too much"),
        ("1.31", "1.13", "it lacks the figures ['1.31'] and has ['1.13'] too much"),
        ("120 万", "12 万", "it lacks the figures ['1200000'] and has ['120000'] too much"),
        ('## <a id="two"></a>二\n', "", "has 2 headings, not 3: ## Two"),
    ],
)
def test_a_page_that_is_not_in_step_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, problem: str
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    code = "```python\nx = 1\n```\n\n    ddparity run\n\n::: ddparity.run\n\n"
    body = f"{code}| t |\n| --- |\n| a |\n\n1.31 of 1.2 million `f(x)` [t](other.md#two)\n\n"
    english, chinese = tmp_path / "docs" / "page.md", tmp_path / "docs" / "zh" / "page.md"
    chinese.parent.mkdir(parents=True)
    english.write_text(f"# Page\n\n## One\n\n{body}## Two\n", encoding="utf-8")
    heads = [f'<a id="{anchor}"></a>{head}' for anchor, head in (("page", "页面"), ("one", "一"), ("two", "二"))]
    text = "# {}\n\n## {}\n\n{body}## {}\n".format(*heads, body=body).replace("1.2 million", "120 万")
    chinese.write_text(text, encoding="utf-8")
    assert difference(english, chinese) is None
    assert old in text
    chinese.write_text(text.replace(old, new), encoding="utf-8")
    assert problem in str(difference(english, chinese))

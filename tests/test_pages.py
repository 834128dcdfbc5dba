"""Every code block of the pages runs, recipes have the loops of tests/trainings, the reference has all public names."""

from __future__ import annotations

import ast
import functools
import re
import sys
import textwrap
from pathlib import Path

import pytest
from docs import commands
from typer.testing import CliRunner

import ddparity as dp
from ddparity.cli import app
from tests.pages import DOCS, ENGLISH, ROOT, agrees, blocks_of, programs, run_commands, run_pages

# tests/auditing runs the blocks of the audit's codes, and tests/launcher those of the failures, which are its cases.
PAGES = [page for page in ENGLISH if page.name != "failures.md"]
_LOOP = re.compile(r"<!-- loop: (\S+) (\w+) -->")


@functools.cache
def _printed() -> dict[str, list[str]]:
    return run_pages(PAGES, 2)


@pytest.mark.parametrize("page", [page for page in PAGES if programs(page)], ids=lambda page: page.stem)
def test_the_programs_of_a_page_run_on_two_processes(page: Path) -> None:
    for block, printed in zip(programs(page), _printed()[str(page)], strict=True):
        if block.prints is not None:
            assert agrees(printed, block.prints), f"{page}:{block.line} printed {printed!r}"


def _other_command(words: list[str]) -> str:
    """Run a command that starts its own processes, in this process; `rm` deletes files."""
    if words[0] == "rm":
        for name in words[1:]:
            Path(name).unlink()
        return ""
    modules = set(sys.modules)
    result = CliRunner().invoke(app, words[1:])
    for name in set(sys.modules) - modules:
        if not getattr(sys.modules[name], "__file__", None) or Path.cwd() in Path(sys.modules[name].__file__).parents:
            del sys.modules[name]
    return result.stdout


WITH_COMMANDS = [page for page in PAGES if any(block.language == "console" for block in blocks_of(page))]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_the_commands_of_a_page_print_what_it_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    results = run_commands(page, tmp_path, _other_command)
    for command, expected, printed in results:
        assert agrees(printed, expected), f"{page}: {command} printed {printed!r}"
    if page.stem in (
        "1-training",
        "3-checkpoints",
    ):  # they say that the last word is the same on any number of processes
        assert len({printed.split()[-1] for _, _, printed in results if printed}) == 1


def _lines_of_loop(path: str, function: str) -> str:
    """The source of a function's loop over epochs."""
    text = (ROOT / path).read_text()
    (node,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == function]
    start = next(line.lineno for line in node.body if isinstance(line, ast.For))
    lines = text.splitlines()[start - 1 : node.body[-1].lineno - 1]
    return _plain("\n".join(lines))


def _plain(code: str) -> str:
    """Without indentation; names without a leading underscore, `replicate` without `dp.`."""
    return re.sub(r"\b(?:_|dp\.(?=replicate))(\w)", r"\1", textwrap.dedent(code)).strip()


LOOPS = [
    (page, block, path, function)
    for page in PAGES
    for block in blocks_of(page)
    for path, function in _LOOP.findall(block.comment)
]


@pytest.mark.parametrize(("page", "block", "path", "function"), LOOPS, ids=[function for *_, function in LOOPS])
def test_a_recipe_has_the_loop_that_is_compared_with_plain_pytorch(
    page: Path, block: object, path: str, function: str
) -> None:
    assert _lines_of_loop(path, function) in _plain(block.text), f"{page}: not the loop of {path} {function}"


def test_every_recipe_of_a_training_names_it() -> None:
    assert len(LOOPS) >= 9


def test_the_reference_has_every_public_name() -> None:
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: ddparity\.([\w.]+)$", text, re.M)
    assert len(shown) == len(set(shown))
    missing = {*dp.__all__, "testing.check_plan"} - set(shown)
    assert not missing, f"write `::: ddparity.NAME` on a page of docs/reference for {', '.join(sorted(missing))}"
    assert set(shown) - {"testing.check_plan"} <= set(dp.__all__)


def test_the_page_of_the_commands_is_that_of_the_source() -> None:
    for page, text in commands.pages().items():
        assert page.read_text(encoding="utf-8") == text, "run `make docs-picture`"

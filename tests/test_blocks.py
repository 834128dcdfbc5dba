"""Blocks of the pages that no test runs as they are: calls fit the signatures, commands and files can be read."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

import ddparity as dp
from ddparity.cli import app
from ddparity.launcher.options import read_options
from ddparity.launcher.submit import find_submission
from tests.pages import ENGLISH, ROOT, blocks_of, is_doctest

PAGES = [*ENGLISH, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
_COMMANDS = typer.main.get_command(app).commands
_NAMES = "|".join(_COMMANDS)
_IN_A_BLOCK = re.compile(rf"^(?: {{4}}|\$ )?(?:\.venv/bin/)?(ddparity (?:{_NAMES}) .*)$", re.M)
_IN_A_SENTENCE = re.compile(rf"`(ddparity (?:{_NAMES}) [^`]+)`")


def _parts(diff: str) -> list[str]:
    """Return what a diff shows of the new file, cut where it leaves lines out."""
    lines = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    return "\n".join(lines).split("\n…\n")


def _code(page: Path) -> list[tuple[str, ast.Module]]:
    found = []
    for block in blocks_of(page):
        if block.language == "python" and not is_doctest(block):
            texts = [block.text]
        else:
            texts = _parts(block.text) if block.language == "diff" else []
        found += [(f"{page}:{block.line}", ast.parse(textwrap.dedent(text))) for text in texts]
    return found


def _misfit(call: ast.Call) -> str | None:
    """Return what is wrong with a call of a public name; None if it fits, or is no such call."""
    match call.func:
        case ast.Attribute(value=ast.Name(id="dp" | "ddparity"), attr=name):
            if name not in dp.__all__ and not hasattr(dp, name):
                return f"there is no {name}"
        case _:
            return None
    if any(isinstance(argument, ast.Starred) for argument in call.args) or None in [k.arg for k in call.keywords]:
        return None
    try:
        inspect.signature(getattr(dp, name)).bind(*call.args, **{keyword.arg: None for keyword in call.keywords})
    except TypeError as error:
        return f"{name}: {error}"
    return None


@pytest.mark.parametrize("page", [page for page in PAGES if _code(page)], ids=lambda page: page.stem)
def test_every_block_compiles_and_its_calls_fit(page: Path) -> None:
    for where, tree in _code(page):
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [(where, call.lineno, wrong) for call in calls if (wrong := _misfit(call))]


def test_a_call_that_does_not_fit_is_found() -> None:
    calls = "dp.predict(1, 2, 3)", "dp.predict(1, 2, batchsize=3)", "dp.replicat(1)", "dp.save_checkpoint(*x)"
    found = [_misfit(ast.parse(call, mode="eval").body) for call in calls]
    assert [bool(one) for one in found] == [False, True, True, False]
    assert _parts("-a\n+if b:\n     c\n …\n+d") == ["if b:\n    c", "d"]


def _options(words: list[str]) -> list[str]:
    """Return the words of a command that name an option."""
    return [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]


def _parse(words: list[str]) -> None:
    """Read the arguments of a command as it does, without running it."""
    name, *arguments = words[1:]
    if name != "run":
        _COMMANDS[name].make_context(name, arguments)
        return
    if {"--slurm", "--kubernetes"} & set(arguments):
        assert find_submission(arguments) is not None
        return
    given, unknown = read_options(arguments)
    assert not unknown
    assert given.training_script


def test_the_commands_of_blocks_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With their values; TASK, N and $NAME in a block would be values, too."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "task.py", "wrong.py", "broken.py", "job.py"):
        (tmp_path / name).write_text("")
    found = [(page, line) for page in PAGES for line in _IN_A_BLOCK.findall(page.read_text())]
    assert len(found) >= 30
    for page, line in found:
        words = shlex.split(line, comments=True)
        try:
            _parse(words)
        except BaseException as error:
            raise AssertionError(f"{page}: {line}") from error


def test_the_commands_of_sentences_have_options_that_exist() -> None:
    found = [(page, " ".join(one.split())) for page in PAGES for one in _IN_A_SENTENCE.findall(page.read_text())]
    assert len(found) >= 20
    for page, line in found:
        _, name, *arguments = re.sub(r"\$\w+", "1", line).split()
        if name == "run":
            assert not read_options([*arguments, "train.py"])[1], (page, line)  # most name options alone
            continue
        known = {option for parameter in _COMMANDS[name].params for option in parameter.opts} | {"--help"}
        assert not set(_options(arguments)) - known, (page, line)


def test_the_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {one for line in targets for one in line.split()}
    named = {one for page in PAGES for one in re.findall(r"(?:^ {4}|`)make ([\w-]+)", page.read_text(), re.M)}
    assert len(named) >= 10
    assert not named - targets


_READERS: dict[str, Any] = {"json": json.loads, "toml": tomllib.loads}


def test_files_that_blocks_show_can_be_read() -> None:
    shown = [(page, block) for page in PAGES for block in blocks_of(page) if block.language in _READERS]
    assert len(shown) >= 2
    for _, block in shown:
        for text in block.text.splitlines() if block.language == "json" else [block.text]:
            assert _READERS[block.language](text)

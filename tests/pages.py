"""The code blocks of a page: which files, programs and commands it has, and what they should print.

A page is run on every rank of a job, block after block:

- a block of Python with `>>>` is a doctest, which pytest runs by itself;
- one with a `title` is a file of that name;
- any other block of Python runs, in one namespace a page, or in the frame of tests/frames.py that a comment
  `<!-- frame: NAME -->` before it names. A comment `<!-- needs: wandb -->` names a library without which it is only
  compiled. A block that only defines a test is not called;
- a block of `console` has commands behind `$ `. `ddparity run --nproc N FILE` and `python FILE` run the file on N
  ranks, which is what they do, without the seconds in which a new process imports torch;
- what a block prints on rank 0 stands in a block of `text` after it, or after the command. `…` is any text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import re
import runpy
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.frames import run_in_frame
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CHINESE = DOCS / "zh"  # the pages once more: tests/test_translation.py
ENGLISH = [page for page in sorted(DOCS.rglob("*.md")) if CHINESE not in page.parents]

_BLOCK = re.compile(
    r"(?P<comment>(?:^<!-- [^\n]* -->\n)*)^```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.M
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block. `line`: where its text begins. `prints`: the text block directly behind it, or None."""

    language: str
    title: str
    comment: str
    text: str
    line: int
    prints: str | None


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    text = page.read_text()
    found = list(_BLOCK.finditer(text))
    blocks = []
    for number, match in enumerate(found):
        after = found[number + 1] if number + 1 < len(found) else None
        follows = after and after["language"] == "text" and not text[match.end() : after.start()].strip()
        title = re.search(r'title="([^"]+)"', match["info"])
        line = text.count("\n", 0, match.start("text")) + 1
        prints = after["text"] if after and follows else None
        blocks.append(
            Block(match["language"], title[1] if title else "", match["comment"], match["text"], line, prints)
        )
    return blocks


def is_doctest(block: Block) -> bool:
    return ">>> " in block.text


def programs(page: Path) -> list[Block]:
    """Return the blocks that run as they are."""
    found = [block for block in blocks_of(page) if block.language == "python" and not block.title]
    return [block for block in found if not is_doctest(block)]


def _printed_by(run: Callable[[], None]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run()
    return printed.getvalue()


def _lacks(block: Block) -> bool:
    needed = re.findall(r"<!-- needs: (\w+) -->", block.comment)
    return any(importlib.util.find_spec(name) is None for name in needed)


def _run_pages(pages: list[Path]) -> dict[str, list[str]]:
    """Return what each block of the pages prints on this rank."""
    printed: dict[str, list[str]] = {}
    before = os.getcwd()
    for page in pages:
        namespace: dict[str, Any] = {"__name__": "__main__"}
        with tempfile.TemporaryDirectory() as folder:
            # One folder for all ranks, as in a job.
            folders = [folder]
            if dist.is_initialized():
                dist.broadcast_object_list(folders)
            os.chdir(folders[0])
            outputs = []
            for block in programs(page):
                code = compile("\n" * (block.line - 1) + textwrap.dedent(block.text), str(page), "exec")
                frame = re.search(r"<!-- frame: (\w+) -->", block.comment)
                run = (
                    functools.partial(run_in_frame, frame[1], code)
                    if frame
                    else functools.partial(exec, code, namespace)
                )
                outputs.append("" if _lacks(block) else _printed_by(run))
            os.chdir(before)
            if dist.is_initialized():
                dist.barrier()  # the folder is in use on every rank until here
        printed[str(page)] = outputs
    return printed


def run_pages(pages: list[Path], world_size: int) -> dict[str, list[str]]:
    """Return what each block of the pages prints on rank 0, from one start of processes."""
    return run_ranks(_run_pages, world_size, pages, timeout_s=120)[0]


def run_file(folder: str, name: str, *arguments: str) -> str:
    """Run a script in this process, in its folder, and return what it prints."""
    os.chdir(folder)
    sys.argv = [name, *arguments]
    return _printed_by(lambda: runpy.run_path(name, run_name="__main__"))


def run_commands(page: Path, folder: Path, others: Callable[[list[str]], str]) -> list[tuple[str, str, str]]:
    """Run the commands of a page, and return each with what it should print and what it prints.

    `others` runs commands that start no script.
    """
    found = []
    for block in blocks_of(page):
        if block.title:
            (folder / block.title).write_text(block.text)
        if block.language != "console":
            continue
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.M):
            words = shlex.split(command, comments=True)
            match words:
                case ["ddparity", "run", "--nproc", nproc, name, *arguments]:
                    printed = run_ranks(run_file, int(nproc), str(folder), name, *arguments)[0]
                case ["python", name, *arguments]:
                    printed = run_ranks(run_file, 1, str(folder), name, *arguments)[0]
                case _:
                    printed = others(words)
            found.append((command, expected, printed))
    return found


def agrees(printed: str, expected: str) -> bool:
    """Return whether a text is as expected, where `…` stands for any text."""
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("…"))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None

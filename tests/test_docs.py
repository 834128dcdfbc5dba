"""The script of the README runs as it is; the examples of the pages are doctests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ddparity as dp
from tests.launcher.failure_cases import CASES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _script(nproc: int, folder: Path) -> str:
    (folder / "train.py").write_text(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1])
    command = [sys.executable, "-m", "ddparity", "run", "--nproc", str(nproc), "train.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_script_gives_the_same_accuracy_on_one_and_two_processes(tmp_path: Path) -> None:
    outputs = [_script(nproc, tmp_path) for nproc in (1, 2)]
    accuracies = [float(re.fullmatch(r"accuracy (0\.\d+), \d processes\n", output)[1]) for output in outputs]
    assert accuracies[0] == accuracies[1] > 0.85


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_page_is_reachable_from_the_readme(page: str) -> None:
    assert f"(docs/{page})" in README


def test_every_public_name_is_documented() -> None:
    pages = README + "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    # Types that other names return or raise are described in the docstrings of these names.
    returned = {"DDParityError", "LoadedMicroBatch", "MicroBatch", "Saving", "Step", "World"}
    assert not [name for name in dp.__all__ if name not in returned and name not in pages]
    assert not [name for name in dp.__all__ if not getattr(dp, name).__doc__]


def test_the_number_of_failures_is_the_same_everywhere() -> None:
    """In the README's text and table, on the page, and in the cases that are run."""
    page = (ROOT / "docs" / "failures.md").read_text()
    shown = [*re.findall(r"\b(\d+) (?:ways to fail|failures\b)", README), *re.findall(r"one of (\d+) failures", page)]
    assert len(shown) >= 3
    assert set(shown) == {str(len(CASES))}


def test_the_readme_shows_what_was_measured() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    shown = re.search(r"<!-- step_overhead -->\n(.*?)<!-- /step_overhead -->", README, re.DOTALL)[1].splitlines()
    assert len(shown) == 6  # head, rule, two models with K = 1 and 4
    assert not [line for line in shown if line not in results]

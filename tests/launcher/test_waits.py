"""A part of the matrix of healthy waits and real hangs, with short waits; `make waits` runs all of it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launcher.wait_cases import HANGS, WAITS, Outcome, problem_of_hang, problem_of_wait, run_hang, run_wait

WAIT_S = 6.0  # longer than it takes to find a hang that is certain
HANG_S = 2.0  # --hang-timeout
_WAITS = (
    "C that holds the GIL, no ptrace",
    "first",
    "a checkpoint",
    "dist.breakpoint on rank 1",
    "collectives in the background",
    "a thread that communicates",
    "a world of fewer ranks",
    "all ranks stopped",
)
_HANGS = (
    "two groups of a second world in another order, no ptrace",
    "two agreements",
    "a collective inside of first",
    "finally: barrier()",
    "a thread that stays",
)

pytestmark = pytest.mark.timeout(600)  # the first test runs all cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Run the cases, four at a time, since they mostly wait."""
    folder = tmp_path_factory.mktemp("waits")
    with ThreadPoolExecutor(4) as pool:
        running: dict[str, Future[Outcome]] = {}
        for name in _WAITS:
            running[name] = pool.submit(run_wait, WAITS[name], folder / f"wait-{len(running)}", WAIT_S)
        for name in _HANGS:
            limit_s = None if HANGS[name].proof else HANG_S
            running[name] = pool.submit(run_hang, HANGS[name], folder / f"hang-{len(running)}", limit_s)
        return {name: future.result() for name, future in running.items()}


@pytest.mark.parametrize("name", _WAITS)
def test_a_healthy_wait_is_not_ended(name: str, outcomes: dict[str, Outcome]) -> None:
    assert not problem_of_wait(outcomes[name], WAITS[name].typed)


@pytest.mark.parametrize("name", _HANGS)
def test_a_hang_is_named(name: str, outcomes: dict[str, Outcome]) -> None:
    assert not problem_of_hang(HANGS[name], outcomes[name])


_REPORTED_EARLY = """
import functools, sys
from ddparity.cli import main
from ddparity.launcher import agent
agent.Watch = functools.partial(agent.Watch, report_s=2.0)  # in place of a minute
sys.argv[0] = "ddparity"
main()
"""
_LATE = """
import os, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
def evaluate():
    while not os.path.exists("go"):
        time.sleep(0.01)
if dist.get_rank() == 1:
    evaluate()
dist.barrier()
dist.destroy_process_group()
"""


def test_sigquit_and_the_logs_show_the_table_of_all_ranks(tmp_path: Path) -> None:
    """The terminal has two lines of a rank that is late; the job goes on."""
    (tmp_path / "train.py").write_text(_LATE)
    command = [sys.executable, "-c", _REPORTED_EARLY, "run", "--nproc", "3", "--logs", "logs", "train.py"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            assert launcher.stderr is not None
            first, second = [line for _ in range(3) if "3 processes" not in (line := launcher.stderr.readline())]
            assert re.match(r"ddparity: for \d s: rank 1 has not called barrier #1: ranks 0, 2 wait in barrier", first)
            assert second.startswith("ddparity: the job goes on until the time-out of its process group (30 min)")
            launcher.send_signal(signal.SIGQUIT)
            lines = [launcher.stderr.readline() for _ in range(6)]
            (kept,) = _until_written(tmp_path / "logs", "waits.txt")
            stacks = _until_written(tmp_path / "logs", "stacks-rank-*.txt", 3)
            (tmp_path / "go").touch()
            rest = launcher.communicate(timeout=60)[1]
        finally:
            launcher.kill()
    assert (launcher.returncode, rest) == (0, "")
    assert lines[0] == "ddparity: what the ranks do now:\n"
    assert re.match(r"ranks 0, 2 waited for rank 1 in \d+% of \d+ samples|ddparity: ranks 0, 2 waited", lines[5]), lines
    for head, *rows in (lines[1:5], kept.read_text().splitlines()[1:]):
        assert head.split() == ["rank", "host", "position", "activity", "collective", "called"]
        assert [row.split()[0] for row in rows] == ["0", "1", "2"]
        assert re.search(r"train\.py:\d+, in evaluate", rows[1]), rows
        assert all(re.search(r"in barrier +barrier #1 ", row) for row in (rows[0], rows[2])), rows
    assert all("train.py" in one.read_text() for one in stacks)


def _until_written(folder: Path, name: str, count: int = 1) -> list[Path]:
    """Return the files of that name, once there are so many and each has its last line."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = sorted(folder.rglob(name))
        if len(found) == count and all(one.read_text().endswith("\n") for one in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{name} in {folder}: {found}")

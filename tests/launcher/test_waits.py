"""A part of the matrix of healthy waits and real hangs, with short waits; `make waits` runs all of it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

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

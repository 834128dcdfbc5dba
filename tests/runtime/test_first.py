from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

import ddparity as dp
from ddparity.runtime.agreement import store_root
from tests.ranks import free_port, kill_self, outcomes, run_ranks, torchrun_env


def _ordered(scope: str) -> tuple[bool, float, float]:
    with dp.first(scope) as leads:
        begin = time.monotonic()
        time.sleep(0.05)  # long enough to show an overlap; the test waits for nothing here
        end = time.monotonic()
    return leads, begin, end


def test_the_first_rank_ends_before_the_others_begin() -> None:
    leads, begins, ends = zip(*run_ranks(_ordered, 3, "world"), strict=True)
    assert leads == (True, False, False)
    assert min(begins[1:]) >= ends[0]


def test_one_rank_of_each_node_runs_first() -> None:
    env = torchrun_env(4, free_port(), nodes=2)
    leads, begins, ends = zip(*run_ranks(_ordered, 4, "node", env=env), strict=True)
    assert leads == (True, False, True, False)
    assert min(begins[1], begins[3]) >= max(ends[0], ends[2])


def _fails_on(rank: int, scope: str) -> None:
    with dp.first(scope):
        if int(os.environ["RANK"]) == rank:
            raise OSError("disk full")


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("scope", ["world", "node"])
def test_an_exception_is_raised_on_every_rank(rank: int, scope: str) -> None:
    ended = outcomes(_fails_on, 4, rank, scope, env=torchrun_env(4, free_port(), nodes=2))
    for other, outcome in enumerate(ended):
        assert outcome.seconds < 10
        if other == rank:
            assert outcome.error == "OSError: disk full"
        else:
            assert f'RankFailure: rank {rank} failed in first("{scope}"): OSError: disk full' in outcome.error
            assert "in _fails_on" in outcome.error  # the remote traceback


def _killed_on(rank: int) -> None:
    with dp.first():
        if int(os.environ["RANK"]) == rank:
            kill_self()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_inside_fails_the_others(rank: int) -> None:
    ended = outcomes(_killed_on, 3, rank)
    for other, outcome in enumerate(ended):
        assert outcome.seconds < 10
        if other == rank:
            assert outcome.exitcode == -9
        else:
            assert f"RankFailure: rank {rank} failed in first" in outcome.error
            assert "died" in outcome.error


def _killed_when_all_joined() -> None:
    """Kill rank 0 only after all ranks have joined: before that the others report a failed rendezvous."""
    store = store_root()
    store.add("joined", 1)
    with dp.first() as leads:
        while leads and store.add("joined", 0) < 3:
            time.sleep(0.001)
        if leads:
            kill_self()


def test_the_process_of_the_store_killed_inside_fails_the_others() -> None:
    ended = outcomes(_killed_when_all_joined, 3, env=torchrun_env(3, free_port()))
    for outcome in ended[1:]:
        assert outcome.seconds < 10
        assert "RankFailure" in outcome.error


def _leaves_early(rank: int, folder: Path) -> None:
    """Leave the world, but keep the process until the others have ended: they learn it only from the store."""
    mine = int(os.environ["RANK"])
    try:
        with contextlib.suppress(OSError), dp.world(device="cpu"):
            if mine == rank:
                raise OSError("lost")
            with dp.first():
                pass
    finally:
        (folder / str(mine)).touch()
    while mine == rank and len(list(folder.iterdir())) < 3:
        time.sleep(0.01)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_left_the_world_is_not_waited_for(rank: int, tmp_path: Path) -> None:
    ended = outcomes(_leaves_early, 3, rank, tmp_path, in_world=False)
    for other, outcome in enumerate(ended):
        if other != rank:
            assert f"RankFailure: rank {rank} failed in first" in outcome.error
            assert "it left the world before it reached this point" in outcome.error
            assert outcome.seconds < 10


def _does_not_come(mine: int) -> str:
    with dp.world(device="cpu", timeout=2):
        if int(os.environ["RANK"]) == mine:
            threading.Event().wait(8)
            return ""
        with pytest.raises(dp.RankFailure) as caught, dp.first():
            pass
        return str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_groups_time_out_holds_for_a_rank_that_does_not_come(rank: int) -> None:
    ended = outcomes(_does_not_come, 2, rank, in_world=False)
    said = 'waited 2 s, the group\'s time-out, in first("world") for rank'
    assert ended[1 - rank].value.startswith(f"rank {1 - rank} {said} {rank}, which did not come to it")


def _takes_long() -> float:
    with dp.world(device="cpu", timeout=2):
        begin = time.monotonic()
        with dp.first() as leads:
            if leads:
                threading.Event().wait(5)  # a download: longer than the group's time-out
        return time.monotonic() - begin


def test_a_body_may_take_longer_than_the_groups_time_out() -> None:
    assert all(outcome.value > 4 for outcome in outcomes(_takes_long, 2, in_world=False))


def _nested(log: str) -> None:
    with dp.first("world") as outer, dp.first("node") as inner, open(log, "a") as file:
        file.write(f"{os.environ['RANK']} {outer} {inner}\n")


def test_nested_use_keeps_both_orders(tmp_path) -> None:
    log = tmp_path / "log"
    run_ranks(_nested, 4, str(log), env=torchrun_env(4, free_port(), nodes=2))
    lines = log.read_text().splitlines()
    assert lines[0] == "0 True True"
    # Without rank 0, rank 1 is the first rank of node 0 and rank 2 that of node 1; rank 3 runs after both.
    assert sorted(lines[1:3]) == ["1 False True", "2 False True"]
    assert lines[3] == "3 False False"


def _many() -> int:
    count = 0
    for _ in range(50):
        with dp.first() as leads:
            count += leads
    return count


def test_repeated_use() -> None:
    assert run_ranks(_many, 2) == [50, 0]


def test_without_a_group_the_body_runs_at_once() -> None:
    with dp.first() as leads:
        assert leads
    with pytest.raises(OSError, match="disk full"), dp.first("node"):
        raise OSError("disk full")


def test_a_wrong_scope_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'local'.*\"node\""), dp.first("local"):
        pass

"""Ranks and whole machines are killed, the network fails: the model ends with the bits of an undisturbed training."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.chaos import chaos

from ..machines import Machine, Network, network
from ..ranks import free_port
from .elastic_training import run

SCRIPT = str(Path(__file__).parent / "elastic_training.py")
# A killed machine counts as lost sooner than by default, so that the tests are short.
QUICK = ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=4,last_call_timeout=1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the fingerprints of the model and of its outputs after 4 epochs on one process."""
    return run(tmp_path_factory.mktemp("undisturbed") / "c", 4)


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    try:
        with network(f"dde{os.getpid() % 10000}") as found:
            yield found
    except OSError as error:
        pytest.skip(str(error))


def _fingerprints(machine: Machine) -> tuple[str, str]:
    found = machine.wait_for(r"trained (\w{64}) predicted (\w{64})")
    return found[1], found[2]


def test_ranks_that_are_killed(tmp_path: Path, started: list[Machine], undisturbed: tuple[str, str]) -> None:
    """Rank 1, then rank 0, each in a step. The agent reports the failure and starts all ranks again."""
    line = ["--nproc", "2", "--max-restarts", "2", "--show", "all", SCRIPT, str(tmp_path / "c"), "--epochs", "4"]
    machine = Machine(line)
    started.append(machine)
    since = 0
    for restart, (rank, forward) in enumerate([(1, 10), (0, 8)], start=1):
        found = machine.wait_for(rf"forward {forward} of rank {rank} in 2, pid (\d+)", start=since)
        os.kill(int(found[1]), signal.SIGKILL)
        machine.wait_for(f"ddparity: rank {rank} failed: ended by SIGKILL", start=since)
        machine.wait_for(f"ddparity: all ranks start again: restart {restart} of 2", start=since)
        since = len(machine.lines)
        machine.wait_for(rf"resumed from {tmp_path}/c: \d epochs and \d of 4 steps", start=since)
    assert machine.end() == 0
    assert _fingerprints(machine) == undisturbed


LOADS = """
import os
import ddparity as dp
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
for step in dp.Loader(list(range(8)), dp.BatchPlan(8, 2, 2)).epoch(0):
    list(step)
    if step.number == 2 - 2 * attempt:
        raise OSError(f"failed in attempt {attempt}")
"""


@pytest.mark.parametrize(("body", "restarts"), [("import nowhere", 0), (LOADS, 1)], ids=["import", "steps"])
def test_only_a_failure_after_progress_is_followed_by_a_restart(
    body: str, restarts: int, tmp_path: Path, started: list[Machine]
) -> None:
    """In a world of one, without collectives: the first attempt makes two steps, the second none."""
    (tmp_path / "script.py").write_text(body)
    machine = Machine(["--nproc", "1", "--max-restarts", "3", str(tmp_path / "script.py")])
    started.append(machine)
    assert machine.end() == 1
    assert machine.text.count("all ranks start again: restart") == restarts
    assert "it failed before any progress: no restart" in machine.lines[-1]


def test_chaos() -> None:
    """Run the benchmark for the time of a training on two machines, or on one."""
    counts = chaos(seconds=8.0, seed=os.getpid() % 1000)
    assert counts["trainings finished"] > 0, counts
    assert not counts["mismatches"] and not counts["hung"], counts


def test_two_machines_train_and_predict_as_one_and_name_the_rank_that_failed(
    net: Network, tmp_path: Path, started: list[Machine], undisturbed: tuple[str, str]
) -> None:
    """Over a slow link. At the end machine 1 fails, without restarts, and both machines report it."""
    where = f"--nnodes 2 --nproc 1 --show all --rendezvous {net.addresses[0]}:{free_port()}".split()
    line = [*where, SCRIPT, str(tmp_path / "c"), "--epochs", "4", "--fails", "1"]
    started += [Machine(line, name) for name in net.names]
    assert [machine.end() for machine in started] == [1, 1]
    for machine in started:
        assert "ddparity: rank 1 failed: OSError: the disk is full" in machine.text
    (whole,) = [one for one in started if "predicted elsewhere" not in one.text]
    assert _fingerprints(whole) == undisturbed


def test_a_machine_is_lost_and_joins_again_and_then_the_first_one_is_lost(
    net: Network, tmp_path: Path, started: list[Machine], undisturbed: tuple[str, str]
) -> None:
    """Before that, the network fails for a moment. At the end, a scheduler starts the job again, on one machine."""
    port = free_port()

    def start(machine: int, pace_s: str) -> Machine:
        where = f"--nnodes 1:2 --nproc 1 --max-restarts 5 --show all --rendezvous {net.addresses[0]}:{port}".split()
        line = [*where, *QUICK, SCRIPT, str(tmp_path / "c"), "--epochs", "4", "--pace", pace_s]
        started.append(Machine(line, net.names[machine]))
        return started[-1]

    first, second = start(0, "0.3"), start(1, "0.3")
    first.wait_for("forward 2 of rank . in 2")
    for machine, address in zip((first, second), net.addresses, strict=True):
        assert net.listening(machine) == {address}  # the stores and Gloo, at the rendezvous' interface alone
    net.cut_for(1.5)
    first.wait_for("forward 7 of rank . in 2")  # after the second step, and so after the first save
    assert "failed" not in first.text

    second.kill()
    first.wait_for("lost machine 1 .*: no word from it")
    first.wait_for("ddparity: the job continues with 1 ranks on 1 machines")
    since = len(first.lines)
    first.wait_for("forward 1 of rank 0 in 1", start=since)

    second = start(1, "0.3")
    first.wait_for("ddparity: a machine has joined: all ranks start again with it")
    second.wait_for("forward 2 of rank . in 2")

    first.kill()
    assert second.end(15) == 137
    assert "lost machine 0 " in second.lines[-2] and "which holds the job's store" in second.lines[-2]

    last = start(0, "0")
    assert last.end() == 0
    assert "resumed from" in last.text
    assert _fingerprints(last) == undisturbed

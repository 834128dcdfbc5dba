"""Kill ranks and machines, and cut the network, while strict trainings run.

Each training must end with the same bits as one without faults.

python benchmarks/chaos.py [--minutes 20] [--seed 0]

Machines are network namespaces (root, Linux). Without these there is one machine. This script does the work of a
scheduler: it starts a launcher again that is killed or ends with an error.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.results import machine as this_machine
from benchmarks.results import table, write_section
from tests.launcher.elastic_training import run
from tests.machines import Machine, Network, network
from tests.ranks import free_port

SCRIPT = str(Path(__file__).parent.parent / "tests" / "launcher" / "elastic_training.py")
EPOCHS, PACE_S = 8, 0.04  # 192 micro-batches
LIMIT_S = 300.0  # a training that takes longer counts as hung
PAUSE_S = (0.5, 12.0)  # the least and the most between two faults; a start takes about 5 s


@dataclass(frozen=True)
class Shape:
    """The machines and ranks of one training. An `elastic` training continues with the machines that remain."""

    machines: int
    nproc: int
    elastic: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-results", action="store_true", help="print the results and do not write them")
    given = parser.parse_args()
    about = this_machine()
    counts = chaos(given.minutes * 60, given.seed)
    rows = [[name, str(counts[name])] for name in NAMES]
    text = table(["", f"in {given.minutes:g} minutes"], rows)
    print(text)
    if not given.no_results:
        note = "Machines are two network namespaces; restarts are counted by each launcher."
        write_section("chaos", f"## Chaos\n\n{about}\n\n{text}\n\n{note}")
    sys.exit(1 if counts["mismatches"] or counts["hung"] or not counts["trainings finished"] else 0)


NAMES = (
    "trainings finished",
    "mismatches",
    "hung",
    "ranks killed",
    "machines killed",
    "of these the first one, with the store",
    "network cuts",
    "restarts by the launcher",
    "starts by the scheduler",
)


def chaos(seconds: float, seed: int) -> Counter[str]:
    """Train again and again with faults for this many seconds, and return how often each event of NAMES happened."""
    dice, counts, deadline = random.Random(seed), Counter[str](), time.monotonic() + seconds
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        net: Network | None = None
        try:
            net = stack.enter_context(network(f"ddc{seed % 1000}"))
        except OSError as error:
            print(f"one machine only: {error}")
        expected = run(folder / "undisturbed", EPOCHS)
        number = 0
        while time.monotonic() < deadline:
            number += 1
            # Take the shapes in turn. The first has several machines, if there are namespaces.
            shapes = [Shape(2, 1, True), Shape(1, 3, False), Shape(2, 2, True), Shape(1, 1, False), Shape(2, 1, False)]
            shape = shapes[(number - 1) % len(shapes)]
            if net is None:
                shape = Shape(1, dice.choice([1, 2, 3]), False)
            faults = dice.randint(2, 6)
            job = Job(shape, folder / f"checkpoint{number}", net, counts)
            found = job.train(dice, faults, deadline)
            if found is None:
                counts["hung"] += 1
            else:
                counts["trainings finished"] += 1
                good = found and all(
                    trained == expected[0] and predicted in (expected[1], "elsewhere") for trained, predicted in found
                )
                counts["mismatches"] += not good
            print(f"{number}: {shape}, {faults} faults: {found and set(found)}; {dict(counts)}", flush=True)
    return counts


class Job:
    """One training. Its launchers are started again if they end with an error."""

    def __init__(self, shape: Shape, checkpoint: Path, net: Network | None, counts: Counter[str]) -> None:
        self._shape, self._checkpoint, self._net, self._counts = shape, checkpoint, net, counts
        self._port = free_port()
        self._running: dict[int, Machine] = {}
        self._ended: list[Machine] = []

    def train(self, dice: random.Random, faults: int, deadline: float) -> list[tuple[str, str]] | None:
        """Train, and return the fingerprints that the ranks print at the end; None if the training hangs."""
        limit = time.monotonic() + LIMIT_S
        next_fault = time.monotonic() + dice.uniform(*PAUSE_S)
        with self._machines():
            while True:
                for number in range(self._shape.machines):
                    self._keep_running(number)
                if not self._running:
                    printed = [re.findall(r"trained (\w{64}) predicted (\w+)", one.text) for one in self._ended]
                    return [pair for pairs in printed for pair in pairs]
                now = time.monotonic()
                if now > limit:
                    for number, one in self._running.items():
                        print(f"machine {number} hangs:\n{one.text[-3000:]}")
                    return None
                if now > next_fault and faults > 0 and now < deadline:
                    faults -= 1
                    self._cause_fault(dice)
                    next_fault = time.monotonic() + dice.uniform(*PAUSE_S)
                time.sleep(0.1)  # faults come at random times, so there is no event to wait for

    @contextmanager
    def _machines(self) -> Iterator[None]:
        for number in range(self._shape.machines):
            self._start(number)
        try:
            yield
        finally:
            for one in [*self._running.values(), *self._ended]:
                one.kill()

    def _start(self, number: int) -> None:
        self._counts["starts by the scheduler"] += 1
        nodes = f"{1 if self._shape.elastic else self._shape.machines}:{self._shape.machines}"
        where = ["--nproc", str(self._shape.nproc), "--max-restarts", "1000", "--show", "all"]
        if self._shape.machines > 1:
            assert self._net is not None
            where += ["--nnodes", nodes, "--rendezvous", f"{self._net.addresses[0]}:{self._port}"]
        task = [str(self._checkpoint), "--epochs", str(EPOCHS), "--pace", str(PACE_S)]
        name = self._net.names[number] if self._net is not None and self._shape.machines > 1 else None
        self._running[number] = Machine([*where, SCRIPT, *task], name)

    def _keep_running(self, number: int) -> None:
        """Start a launcher again that failed, as a scheduler does, until one launcher of the job has succeeded."""
        one = self._running.get(number)
        if one is None or one.process.poll() is None:
            return
        code = one.end()
        self._counts["restarts by the launcher"] += one.text.count("all ranks start again: restart")
        del self._running[number]
        if code == 0:
            self._ended.append(one)
            return
        one.kill()  # processes that the launcher left behind
        if not any(ended.process.returncode == 0 for ended in self._ended):
            self._start(number)

    def _cause_fault(self, dice: random.Random) -> None:
        several = len(self._running) > 1
        kind = dice.choices(["rank", "machine", "cut"], [5, 3 if several else 1, 2 if several else 0])[0]
        number = dice.choice(sorted(self._running))
        one = self._running[number]
        if kind == "cut":
            assert self._net is not None
            self._counts["network cuts"] += 1
            self._net.cut_for(dice.uniform(1.0, 10.0))
        elif kind == "machine":
            self._counts["machines killed"] += 1
            self._counts["of these the first one, with the store"] += number == 0
            one.kill()
        elif ranks := one.ranks():
            with suppress(psutil.NoSuchProcess):
                dice.choice(ranks).send_signal(signal.SIGKILL)
                self._counts["ranks killed"] += 1


if __name__ == "__main__":
    main()

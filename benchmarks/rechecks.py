"""Measure what `replicate(recheck_every=K)` costs: a step's time, to that of the same training without rechecks.

python benchmarks/rechecks.py [--rounds 15] [--quick]

Every K steps a rank runs one more micro-batch, so 1 / (K * micro-batches a rank) more work is expected. Two processes
train an MLP. A round runs 16 steps of each contender, in an order that rotates; a contender's ratio is its time over
that without rechecks in the same round. The processor time of a process does not depend on other programs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from results import machine, spread, table, write_section

STEPS = 16  # of a round
EVERY = (1, 4, 16)
MICRO_BATCH = 64
Run = Callable[[], None]  # trains the steps of a round


def trainer(every: int | None, micros: int, ranks: int) -> Run:
    """Return what trains a round. The first one has the first recheck, which also compares the devices."""
    torch.manual_seed(0)
    model = dp.replicate(nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)), recheck_every=every)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = MICRO_BATCH * micros * ranks
    loader = dp.Loader(torch.randn(batch * STEPS, 256), dp.BatchPlan(batch * STEPS, batch, MICRO_BATCH))
    epochs = itertools.count()

    def run() -> None:
        for step in loader.epoch(next(epochs)):
            for micro in dp.accumulate(model, step):
                (model(micro.data).square().mean() * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def measure(micros: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return for each K, and "None", the seconds of each round: by the clock, and of this process's processor."""
    torch.set_num_threads(1)
    cores, rank = sorted(os.sched_getaffinity(0)), int(os.environ["LOCAL_RANK"])
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    with dp.world(backend="gloo", device="cpu") as world:
        runs = {str(every): trainer(every, micros, world.world_size) for every in (None, *EVERY)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        order = list(runs)
        for number in range(rounds + 1):
            for name in order[number % len(order) :] + order[: number % len(order)]:
                dist.barrier()
                start = time.perf_counter(), time.process_time()
                runs[name]()
                if number:
                    times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="run two rounds, and print the results only")
    options = parser.parse_args()
    rounds, facts, rows = 2 if options.quick else options.rounds, machine(), []
    for micros in (1, 4):
        of_ranks: list[Any] = dp.launch(measure, micros, rounds, nproc=2)
        found = {name: np.max([np.array(rank[name]) for rank in of_ranks], axis=0) for name in of_ranks[0]}
        base = found["None"]
        for every in EVERY:
            clock, processor = (found[str(every)] / base).T
            expected = 1 + 1 / (every * micros)
            rows.append([f"K={every}, {micros} a rank", f"{expected:.3f}", spread(processor, 3), spread(clock, 3)])
        milliseconds = 1e3 * base / STEPS
        rows.append([f"without, {micros} a rank, ms a step", "–", *(spread(one) for one in milliseconds.T[::-1])])
    text = "\n\n".join(
        [
            "## What rechecks cost",
            facts,
            f"`rechecks.py`: `replicate(recheck_every=K)`, 2 processes, {rounds} rounds of {STEPS} steps; the time of "
            f"a step to that without rechecks: medians with quartiles, of the slower rank. Expected: 1 + 1 / (K * "
            f"micro-batches a rank). Processor: of the process; other programs on the machine do not change it much.",
            table(["", "expected", "processor", "clock"], rows),
        ]
    )
    print(text)
    if not options.quick:
        write_section("recheck_cost", text)


if __name__ == "__main__":
    main()

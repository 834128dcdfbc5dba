"""Measure the plan: the time and the memory of a step's indices, for data sets of several sizes.

python benchmarks/plan.py

`step`: a call for one step of 256 samples in 8 micro-batches, in the middle of the epoch. `steps`: the time of a step
in the iterator that a loader uses. `memory`: the peak memory that Python and NumPy allocate during the call. For
comparison: `torch.randperm`, which DistributedSampler calls once an epoch.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

import ddparity as dp
from results import machine, table, write_section


def microseconds(call: Callable[[], Any], repeats: int = 500, rounds: int = 20) -> float:
    """Return the median over rounds of the mean time of `repeats` calls, in µs."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats * 1e6)
    return sorted(times)[rounds // 2]


def peak_kilobytes(call: Callable[[], Any]) -> float:
    """Return the peak memory that a second call allocates, in kB."""
    call()
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e3


def row(size: int) -> list[str]:
    plan = dp.BatchPlan(size, global_batch=256, micro_batch=32)
    middle = plan.steps_per_epoch // 2
    count = min(500, plan.steps_per_epoch)
    one = microseconds(lambda: plan.step(3, middle))
    many = microseconds(lambda: list(islice(plan.steps(3), count)), repeats=2) / count
    memory = peak_kilobytes(lambda: plan.step(3, middle))
    cells = [f"{size:,}", f"{one:.0f}", f"{many:.0f}", f"{memory:.0f}"]
    if size > 10**7:  # randperm would need 8 bytes a sample in every process
        return [*cells, "–", f"{8 * size / 1e3:,.0f}"]
    whole = microseconds(lambda: torch.randperm(size).tolist(), repeats=1)
    return [*cells, f"{whole:,.0f}", f"{8 * size / 1e3:,.0f}"]


def main() -> None:
    torch.set_num_threads(1)
    facts = machine()
    head = ["samples", "step, µs", "steps, µs a step", "memory, kB", "randperm + list, µs", "its indices, kB"]
    text = "\n\n".join(
        [
            "## The plan",
            facts,
            "`plan.py`: the indices, keys and weights of one step of 256 samples in 8 micro-batches.",
            table(head, [row(10**power) for power in (3, 4, 5, 6, 7, 9)]),
        ]
    )
    print(text)
    write_section("plan", text)


if __name__ == "__main__":
    main()

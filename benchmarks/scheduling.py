"""Measure how long a small exchange over Gloo takes, with the operating system's policies and ways to wait.

python benchmarks/scheduling.py [--rounds 300] [--nproc 2] [--quick]

Between two collectives each process computes for some milliseconds, as in training.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import torch
import torch.distributed as dist

import ddparity as dp
from ddparity.comm import allreduce
from results import machine, table, write_section

BETWEEN = {  # milliseconds of work before each exchange, and whether it replaces the caches' content
    (0, False): "nothing in between",
    (1, False): "1 ms of computing",
    (3, False): "3 ms of computing",
    (3, True): "3 ms of copying 8 MB",
}
WAYS = {
    ("SCHED_OTHER", 0): "SCHED_OTHER, waits asleep",
    ("SCHED_BATCH", 0): "SCHED_BATCH, waits asleep",
    ("SCHED_BATCH", allreduce.YIELDS): "SCHED_BATCH, waits awake for a moment: as it is",
}


def measure(policy: str, yields: int, rounds: int) -> list[list[float]]:
    """Return, on each rank, the milliseconds of each exchange, for each kind of work before it."""
    torch.set_num_threads(1)
    allreduce.YIELDS = yields
    own, times = torch.zeros(1025, dtype=torch.float64), []
    copied, copy = torch.zeros(2, 2**21)
    with dp.world(device="cpu"):
        for thread in os.listdir("/proc/self/task"):  # Gloo's threads have started with world()'s policy
            os.sched_setscheduler(int(thread), getattr(os, policy), os.sched_param(0))
        for compute_ms, sweeps in BETWEEN:
            taken = []
            for _ in range(rounds):
                until = time.perf_counter() + compute_ms / 1e3
                while time.perf_counter() < until:
                    if sweeps:
                        copy.copy_(copied)
                start = time.perf_counter()
                allreduce.copies_of_ranks(own, dist.group.WORLD)
                taken.append((time.perf_counter() - start) * 1e3)
            times.append(taken[rounds // 10 :])
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # the policy that world() expects when it restores
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="run few rounds, and only print the result")
    options = parser.parse_args()
    facts, rounds = machine(), 20 if options.quick else options.rounds
    measured: dict[tuple[str, int], list[list[float]]] = {way: [[] for _ in BETWEEN] for way in WAYS}
    for _ in range(3):  # in turns
        for way in WAYS:
            taken = dp.launch(measure, *way, rounds, nproc=options.nproc)[0]
            for all_times, times in zip(measured[way], taken, strict=True):
                all_times += times
    rows = [
        [
            f"{shown}; {between}",
            f"{np.mean(times):.2f}",
            *(f"{value:.2f}" for value in np.percentile(times, [50, 75, 90, 95])),
        ]
        for way, shown in WAYS.items()
        for between, times in zip(BETWEEN.values(), measured[way], strict=True)
    ]
    text = "\n\n".join(
        [
            "## Scheduling",
            facts,
            f"`scheduling.py`, exchange of 8,200 bytes a rank, {options.nproc} processes over Gloo, unbound: "
            f"milliseconds of 3 times {rounds} collectives, the mean and percentiles.",
            table(["policy of all threads, and how they wait", "mean", "50 %", "75 %", "90 %", "95 %"], rows),
        ]
    )
    print(text)
    if not options.quick and options.nproc == 2:
        write_section("scheduling", text)


if __name__ == "__main__":
    main()

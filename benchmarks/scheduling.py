"""How long a small all-gather over Gloo takes under each of the operating system's policies.

python benchmarks/scheduling.py [--rounds 300] [--quick]

Between two collectives each of the 2 processes computes for some milliseconds, as in training.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import torch
import torch.distributed as dist

import ddparity as dp
from ddparity.reduction import copies_of_ranks
from results import machine, table, write_section

COMPUTE_MS = (0, 1, 3)
POLICIES = {"SCHED_OTHER": "SCHED_OTHER", "SCHED_BATCH": "SCHED_BATCH, as in world()"}


def measure(policy: str, rounds: int) -> list[list[float]]:
    """On each rank: milliseconds of each all-gather, for each time of computing before it."""
    torch.set_num_threads(1)
    own, times = torch.zeros(1025, dtype=torch.float64), []
    with dp.world(device="cpu"):
        for thread in os.listdir("/proc/self/task"):  # Gloo's, which have begun under world()'s policy
            os.sched_setscheduler(int(thread), getattr(os, policy), os.sched_param(0))
        for compute_ms in COMPUTE_MS:
            taken = []
            for _ in range(rounds):
                until = time.perf_counter() + compute_ms / 1e3
                while time.perf_counter() < until:
                    pass
                start = time.perf_counter()
                copies_of_ranks(own, dist.group.WORLD)
                taken.append((time.perf_counter() - start) * 1e3)
            times.append(taken[rounds // 10 :])
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # world() restores from here
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="few rounds, printed only")
    options = parser.parse_args()
    facts, rounds = machine(), 20 if options.quick else options.rounds
    measured: dict[str, list[list[float]]] = {policy: [[] for _ in COMPUTE_MS] for policy in POLICIES}
    for _ in range(3):  # in turns
        for policy in POLICIES:
            for all_times, times in zip(measured[policy], dp.launch(measure, policy, rounds, nproc=2)[0], strict=True):
                all_times += times
    rows = [
        [
            f"{shown}, {compute_ms} ms of computing",
            f"{np.mean(times):.2f}",
            *(f"{value:.2f}" for value in np.percentile(times, [50, 75, 90, 95])),
        ]
        for policy, shown in POLICIES.items()
        for compute_ms, times in zip(COMPUTE_MS, measured[policy], strict=True)
    ]
    text = "\n\n".join(
        [
            "## Scheduling",
            facts,
            f"`scheduling.py`, all-gather of 8,200 bytes a rank, 2 processes over Gloo, unbound: milliseconds "
            f"of 3 times {rounds} collectives, the mean and percentiles.",
            table(["policy of all threads", "mean", "50 %", "75 %", "90 %", "95 %"], rows),
        ]
    )
    print(text)
    if not options.quick:
        write_section("scheduling", text)


if __name__ == "__main__":
    main()

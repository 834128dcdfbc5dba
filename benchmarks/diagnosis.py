"""Measure what the diagnosis of hangs costs a step: the tiny MLP with DDP, with and without instruments and polling.

Each job keeps its processes for the whole time. In a round, the jobs train for some steps one after the other. The
second plain job shows the noise.

    python benchmarks/diagnosis.py --nproc 2 --rounds 40 --steps 500
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import numpy as np
from torch.distributed import TCPStore

from ddparity.launcher.diagnosis import instruments
from ddparity.launcher.diagnosis.watch import Watch, WatchedRank
from results import machine, spread, table, write_section

NAMES = ("plain", "plain again", "watched")

_RANK = """
import importlib.util, os, sys, time
from pathlib import Path
if sys.argv[1] != "-":
    spec = importlib.util.spec_from_file_location("instruments", sys.argv[2])
    instruments = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(instruments)
    instruments.install(Path(sys.argv[1]))
import torch, torch.distributed as dist
torch.manual_seed(0)
dist.init_process_group("gloo")
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
x, y = torch.randn(32, 64), torch.randint(10, (32,))
for line in sys.stdin:
    begin = time.perf_counter()
    for _ in range(int(line)):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(time.perf_counter() - begin, flush=True)
"""


class Job:
    """Ranks that train a number of steps when they are told to."""

    def __init__(self, stack: ExitStack, nproc: int, folder: Path | None) -> None:
        self.store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        folders = [folder / str(rank) if folder else None for rank in range(nproc)]
        self.ranks = []
        for rank in range(nproc):
            variables = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
            }
            if folder is not None:
                variables[instruments.FLIGHT_VARIABLE] = instruments.FLIGHT_ENTRIES
            process = subprocess.Popen(
                [sys.executable, "-c", _RANK, str(folders[rank] or "-"), str(instruments.__file__)],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.kill)
            self.ranks.append(process)
        watched = [WatchedRank(rank, self.ranks[rank].pid, own) for rank, own in enumerate(folders) if own is not None]
        self.watch = Watch(watched, 60) if watched else None

    def train(self, steps: int) -> float:
        """Return the milliseconds a step of the slowest rank. Meanwhile, look at the ranks as the agent does."""
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        seconds = []
        for process in self.ranks:
            assert process.stdout is not None
            while not _readable(process.stdout.fileno(), 0.1):
                if self.watch is not None:
                    assert self.watch.look() is None, "a healthy job was reported to hang"
            seconds.append(float(process.stdout.readline()))
        return max(seconds) / steps * 1e3


def _readable(descriptor: int, timeout_s: float) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    where = machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        jobs = {name: Job(stack, options.nproc, folder if name == "watched" else None) for name in NAMES}
        for job in jobs.values():
            job.train(200)  # warm
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for number in range(options.rounds):
            for shift in range(len(NAMES)):  # each job is first, second and last equally often
                name = NAMES[(number + shift) % len(NAMES)]
                times[name].append(jobs[name].train(options.steps))
    base = np.array(times["plain"])
    row = [f"tiny MLP, {options.nproc} ranks", spread(base, 3)]
    row += [spread(np.array(times[name]) / base, 3) for name in NAMES[1:]]
    text = (
        f"## What the diagnosis of hangs costs a step (`diagnosis.py`)\n\n{where} Plain DDP; medians and quartiles of "
        f"{options.rounds} interleaved rounds of {options.steps} steps, ratios within a round.\n\n"
        + table(["", "plain, ms", *NAMES[1:]], [row])
    )
    write_section("diagnosis", text)
    print(text)


if __name__ == "__main__":
    main()

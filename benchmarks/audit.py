"""Measure what `ddparity audit` costs a training: the time of a step, its start, and whether it computes the same bits.

python benchmarks/audit.py [--rounds 7]

A round trains each model once under `ddparity run` and once under `ddparity audit`, in turns, on 2 processes: 3 epochs
of 40 steps, so nothing is cut short. The medians of the first ten steps, whose gradients and parameters are hashed, and
of the others are compared within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import machine, spread, table, write_section

SCRIPT = """
import hashlib, json, statistics, sys, time
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

width, out = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
x = torch.randn(2560, 64)
data = TensorDataset(x, torch.randint(0, 10, (2560,)))
layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.Dropout(0.1), nn.Linear(width, 10)]
model = DDP(nn.Sequential(*layers))
torch.manual_seed(rank)
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=32, sampler=sampler)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
times = []
for epoch in range(3):
    sampler.set_epoch(epoch)
    last = time.perf_counter()
    for a, b in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(a), b)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = time.perf_counter()
        times.append(now - last)
        last = now
if rank == 0:
    bits = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    count = sum(p.numel() for p in model.parameters())
    first, rest = statistics.median(times[1:10]), statistics.median(times[10:])
    json.dump([count, len(times), first * 1e3, rest * 1e3, bits], open(out, "w"))
dist.destroy_process_group()
"""
WIDTHS = {"4 thousand": 28, "0.3 million": 512, "10 million": 3_120}
COMMANDS = {"run": ["run", "--nproc", "2"], "audit": ["audit", "--nproc", "2"]}


def trained(command: list[str], width: int, folder: Path) -> tuple[float, list[float], str]:
    """Return the seconds of a whole command, the parameters, steps and milliseconds a step, and the weights' digest."""
    script, out = folder / "train.py", folder / "out.json"
    script.write_text(SCRIPT)
    whole = [sys.executable, "-m", "ddparity", *command, str(script), str(width), str(out)]
    start = time.perf_counter()
    subprocess.run(whole, check=True, capture_output=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seconds = time.perf_counter() - start
    *figures, bits = json.loads(out.read_text())
    return seconds, figures, bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    where = machine()
    rows, steps = [], 0
    for name, width in WIDTHS.items():
        plain, first, rest, longer = [], [], [], []
        with tempfile.TemporaryDirectory() as folder:
            for number in range(options.rounds):
                order = list(COMMANDS.items())[:: 1 if number % 2 else -1]
                found = {which: trained(command, width, Path(folder)) for which, command in order}
                (alone, before, bits), (whole, after, bits_after) = found["run"], found["audit"]
                if bits != bits_after or before[:2] != after[:2]:
                    raise SystemExit(f"{name}: the audit changes what the script computes")
                steps = int(before[1])
                plain.append(before[3])
                first.append(after[2] / before[2])
                rest.append(after[3] / before[3])
                longer.append(whole - alone)
        rows.append([name, spread(plain), spread(first), spread(rest), spread(longer, 1)])
        print(rows[-1], flush=True)
    head = ["parameters", "a step without, ms", "steps 2 to 10", "steps after the tenth", "whole command, s longer"]
    write_section(
        "audit",
        f"## What the audit costs a script\n\n{where}\n\n"
        f"`audit.py`, medians of {options.rounds} interleaved rounds with quartiles, 2 processes over Gloo, "
        f"batches of 32, AdamW, a clip, dropout: {steps} steps of `ddparity audit`, each time over that of "
        f"`ddparity run` in the same round. The digests of all weights were the same with and without in each "
        f"round.\n\n{table(head, rows)}",
    )


if __name__ == "__main__":
    main()

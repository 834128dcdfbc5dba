"""Measure what `ddparity audit` costs a training: the time of a step, its start, and whether it computes the same bits.

python benchmarks/audit.py [--rounds 7]

A round trains each model once under `ddparity run` and once under `ddparity audit`, in turns, on 2 processes: 3 epochs
of 40 steps, so nothing is cut short. The medians of the first ten steps, whose gradients and parameters are hashed, and
of the others are compared within a round. Losses, weights, random streams and output must be equal to the bit, and so
must the graphs that torch.compile makes.
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

from results import DOCS, machine, spread, table, write_section

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
times, losses = [], []
for epoch in range(3):
    sampler.set_epoch(epoch)
    last = time.perf_counter()
    for a, b in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(a), b)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        now = time.perf_counter()
        times.append(now - last)
        last = now
    print(f"rank {rank}, epoch {epoch}: {loss.item():.9g}")
    dist.barrier()
if rank == 0:
    kept = [*model.parameters(), *losses, torch.get_rng_state()]
    bits = hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in kept)).hexdigest()
    count = sum(p.numel() for p in model.parameters())
    first, rest = statistics.median(times[1:10]), statistics.median(times[10:])
    json.dump([count, len(times), first * 1e3, rest * 1e3, bits], open(out, "w"))
dist.destroy_process_group()
"""
COMPILED = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
x = torch.randn(64, 8)
data = TensorDataset(x, torch.randint(0, 3, (64,)))


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def step(model, a, b):
    return nn.functional.cross_entropy(model(a), b)


found = {}
for name in ("a model in DDP", "a loss's function", "a whole step"):
    torch._dynamo.reset()
    counters.clear()
    model = DDP(torch.compile(network(), backend="eager") if name == "a model in DDP" else network())
    loss_of = torch.compile(step, backend="eager") if name == "a loss's function" else step
    optimizer = torch.optim.AdamW(model.parameters())

    def train_step(a, b):
        optimizer.zero_grad()
        loss = loss_of(model, a, b)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    whole = torch.compile(train_step, backend="eager") if name == "a whole step" else train_step
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data))
    losses = [whole(a, b).item() for a, b in loader]
    found[name] = [losses, dict(counters["stats"])]
if rank == 0:
    json.dump(found, open(sys.argv[1], "w"))
dist.destroy_process_group()
"""
WIDTHS = {"3 thousand": 28, "90 thousand": 265, "0.3 million": 512, "10 million": 3_120}
COMMANDS = {"run": ["run", "--nproc", "2"], "audit": ["audit", "--nproc", "2"]}


def command(which: str, script: Path, *arguments: str) -> tuple[float, list[str]]:
    """Return the seconds of a whole command, and the lines that the script prints, in order of their text."""
    whole = [sys.executable, "-m", "ddparity", *COMMANDS[which], str(script), *arguments]
    start = time.perf_counter()
    done = subprocess.run(
        whole, check=False, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{which}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return seconds, sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))


def trained(which: str, width: int, folder: Path) -> tuple[float, list[float], list[str]]:
    """Return the seconds of a whole command, the parameters, steps and milliseconds a step, and what must be equal."""
    script, out = folder / "train.py", folder / "out.json"
    script.write_text(SCRIPT)
    seconds, lines = command(which, script, str(width), str(out))
    *figures, bits = json.loads(out.read_text())
    return seconds, figures, [bits, *lines]


def compiled_graphs(folder: Path) -> dict[str, int]:
    """Return the graphs of torch.compile, by what is compiled. Fail where the audit changes them, or a loss."""
    script, out = folder / "compiled.py", folder / "graphs.json"
    script.write_text(COMPILED)
    found = []
    for which in COMMANDS:
        command(which, script, str(out))
        found.append(json.loads(out.read_text()))
    if found[0] != found[1]:
        raise SystemExit(f"the audit changes what torch.compile makes: {found[0]}, now {found[1]}")
    return {name: stats.get("unique_graphs", 0) for name, (_, stats) in found[0].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    where = machine()
    rows, steps = [], 0
    with tempfile.TemporaryDirectory() as folder:
        graphs = compiled_graphs(Path(folder))
    for name, width in WIDTHS.items():
        plain, first, rest, longer = [], [], [], []
        with tempfile.TemporaryDirectory() as folder:
            for number in range(options.rounds):
                order = list(COMMANDS)[:: 1 if number % 2 else -1]
                found = {which: trained(which, width, Path(folder)) for which in order}
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
    shown = ", ".join(f"{count} of {name}" for name, count in graphs.items())
    write_section(
        "audit",
        f"## What the audit costs a script\n\n{where}\n\n"
        f"`audit.py`, medians of {options.rounds} interleaved rounds with quartiles, 2 processes over Gloo, "
        f"batches of 32, AdamW, a clip, dropout: {steps} steps of `ddparity audit`, each time over that of "
        f"`ddparity run` in the same round. All losses, weights and lines of output were the same to the bit with and "
        f"without in each round. torch.compile made the same graphs, too: {shown}.\n\n{table(head, rows)}",
    )
    write_section("audit", table(head, rows), DOCS / "audit.md")


if __name__ == "__main__":
    main()

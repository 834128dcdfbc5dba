"""Measure saves and loads of a checkpoint, and check the file after kills during a save.

PYTHONPATH=. python benchmarks/checkpoint.py [--instants 200] [--folder FOLDER]

`save_checkpoint` and the functions of torch and safetensors write a model of 8 million parameters and AdamW's two
moments, 96 MB, to FOLDER. Each write is flushed to disk. `returns`: the time until the call returns. `written`: the
time until the file is on disk. A copy of the tensors in main memory is what a save in the background cannot do without.
The sharded rows are of two processes with `fully_shard`. After that, a process that saves in a loop is killed at random
instants and at each system call.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from tests.checkpoint.kills import killed_at_each_call, killed_at_random
from tests.ranks import outcomes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ddparity as dp
from results import machine, spread, table, write_section

ROUNDS = 7


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(8)])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 1000)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def ours(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    dp.save_checkpoint(path, model=model, optimizer=optimizer)
    return lambda: None


def in_background(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    return dp.save_checkpoint(path, background=True, model=model, optimizer=optimizer).wait


def by_torch(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    flush(path)
    return lambda: None


def by_safetensors(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    moments = {
        f"{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    safetensors.torch.save_file({**model.state_dict(), **moments}, path)
    flush(path)
    return lambda: None


def by_copy(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    copies = [value.clone() for value in model.state_dict().values()]
    copies += [value.clone() for state in optimizer.state.values() for value in state.values()]
    return copies.clear


def sharded(folder: str, background: bool) -> tuple[list[float], list[float], list[float]]:
    """Return rank 0's milliseconds until the call returns, until the files are on disk, and of a copy of its shards."""
    path = Path(folder) / "c"
    model = nn.Sequential(*[fully_shard(nn.Linear(1000, 1000)) for _ in range(8)])
    model = fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 1000)).square().mean().backward()
    optimizer.step()
    shards = [value.to_local() for value in model.state_dict().values()]
    shards += [value.to_local() for s in optimizer.state.values() for value in s.values() if isinstance(value, DTensor)]
    returns, written, copied = [], [], []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        saving = dp.save_checkpoint(path, background=background, model=model, optimizer=optimizer)
        returns.append((time.perf_counter() - start) * 1e3)
        if saving is not None:
            saving.wait()
        written.append((time.perf_counter() - start) * 1e3)
        dist.barrier()
        start = time.perf_counter()
        copies = [shard.clone() for shard in shards]
        copied.append((time.perf_counter() - start) * 1e3)
        del copies
    return returns, written, copied


WAYS = {
    "save_checkpoint": ours,
    "save_checkpoint(background=True)": in_background,
    "a copy of the tensors": by_copy,
    "torch.save": by_torch,
    "safetensors' save_file": by_safetensors,
}


def measured(way: str, folder: str) -> tuple[list[float], list[float], list[float]]:
    """Return the milliseconds until the call returns, until the file is on disk, and of a load; for each round."""
    path = Path(folder) / "c"
    model, optimizer = trained()
    returns, written, loads = [], [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        wait = WAYS[way](path, model, optimizer)
        returns.append((time.perf_counter() - start) * 1e3)
        wait()
        written.append((time.perf_counter() - start) * 1e3)
    for _ in range(ROUNDS if path.exists() and "safetensors" not in way else 0):
        start = time.perf_counter()
        if way == "torch.save":
            states = torch.load(path)
            model.load_state_dict(states["model"])
            optimizer.load_state_dict(states["optimizer"])
        else:
            dp.load_checkpoint(path, model=model, optimizer=optimizer)
        loads.append((time.perf_counter() - start) * 1e3)
    return returns, written, loads


def hash_ms() -> float:
    """Return the milliseconds of a SHA-256 of 96 MB."""
    data = torch.randn(24_000_000).numpy()
    start = time.perf_counter()
    hashlib.sha256(data)
    return (time.perf_counter() - start) * 1e3


def kill_rows(instants: int, folder: str) -> list[list[str]]:
    rows = []
    for name, keep, background in (("", None, False), ("keep=3", 3, False), ("background=True", None, True)):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            (outcome,) = outcomes(
                killed_at_random, 1, temporary, instants, keep, background, in_world=False, timeout_s=600
            )
        assert outcome.error is None, outcome.trace
        seconds = time.perf_counter() - start
        rows.append([f"random instants, {name or 'plain'}", str(instants), str(outcome.value), "0", f"{seconds:.1f}"])
    for keep in (None, 3):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            (outcome,) = outcomes(killed_at_each_call, 1, temporary, keep, in_world=False, timeout_s=600)
        assert outcome.error is None, outcome.trace
        count, seconds = len(outcome.value) - 1, time.perf_counter() - start
        name = f"before and after each system call, {f'keep={keep}' if keep else 'plain'}"
        rows.append([name, str(count), "–", "0", f"{seconds:.1f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--instants", type=int, default=200)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine("safetensors")
    rows = []
    for way in WAYS:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            (outcome,) = outcomes(measured, 1, way, folder, in_world=False, timeout_s=600)
        assert outcome.error is None, outcome.trace
        returns, written, loads = outcome.value
        loaded = spread(loads, 0) if loads else "–"
        rows.append([way, spread(returns, 0), spread(written, 0), loaded])
    for background in (False, True):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            outcome, _ = outcomes(sharded, 2, folder, background, timeout_s=600)
        assert outcome.error is None, outcome.trace
        returns, written, copied = outcome.value
        first = returns.pop(0)  # it imports torch's DCP
        rows.append(
            [f"sharded, 2 processes{', background=True' * background}", spread(returns, 0), spread(written, 0), "–"]
        )
        if background:
            rows.append(["sharded, 2 processes, background=True, the first", f"{first:.0f}", "–", "–"])
            rows.append(["sharded, a copy of rank 0's shards", spread(copied, 0), "–", "–"])
    costs = table(["96 MB", "returns, ms", "written, ms", "loaded, ms"], rows)
    faults = table(
        ["killed", "instants", "in the middle of a save", "lost or damaged", "s"],
        kill_rows(options.instants, options.folder or tempfile.gettempdir()),
    )
    write_section(
        "checkpoint",
        f"## Checkpoints\n\n{facts}\n\n`checkpoint.py`, one process; median and quartiles of {ROUNDS}. SHA-256 of "
        f"the 96 MB alone takes {hash_ms():.0f} ms.\n\n{costs}\n\n{faults}",
    )
    print(costs, faults, sep="\n\n")


if __name__ == "__main__":
    main()

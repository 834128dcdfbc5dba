"""Measure saves and loads of a checkpoint and of predictions, and check the file after kills during a save.

PYTHONPATH=. python benchmarks/checkpoint.py [--rounds 15] [--instants 200] [--folder FOLDER] [--before SRC]

`save_checkpoint` and the functions of torch and safetensors write a model of 8 million parameters and AdamW's two
moments, 96 MB, to FOLDER. Each write is flushed to disk. Each contender has a process of its own (`disk.py`), and they
take turns. `returns`: the time until the call returns. `written`: the time until the file is on disk. A copy of the
tensors in main memory is what a save in the background cannot do without. `--before`: the folder of an older ddparity,
as one more contender. The sharded rows are of two processes with `fully_shard`. After that, a process that saves in a
loop is killed at random instants and at each system call.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tests.checkpoint.kills import killed_at_each_call, killed_at_random
from tests.ranks import outcomes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ddparity as dp
from disk import Contender, in_turns
from results import machine, spread, table, write_section

ROUNDS = 15  # of the sharded saves


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


# What is measured: the contender and its action.
ROWS = [
    ("save_checkpoint", "ddparity", "save"),
    ("save_checkpoint(background=True)", "ddparity", "background"),
    ("a copy of the tensors", "copy", "save"),
    ("torch.save", "torch", "save"),
    ("safetensors' save_file", "safetensors", "save"),
    ("load_checkpoint", "ddparity", "load"),
    ("torch.load", "torch", "load"),
    ("safetensors' load_file", "safetensors", "load"),
    ("predict(to=a folder)", "predictions", "predict"),
    ("read_predictions", "predictions", "read"),
]
BEFORE = ", before"
BEFORE_TEXT = " Before: ddparity without the checks of this page."


def in_own_processes(folder: str, rounds: int, before: str | None) -> list[list[str]]:
    """Return a row for each of `ROWS`, and for the older ddparity, with its times in milliseconds."""
    found = {}
    for names, actions in (
        (("ddparity", "copy", "torch", "safetensors"), ["save", "background", "load"]),
        (("predictions",), ["clear", "predict", "read"]),
    ):
        contenders = {name: Contender(name, folder) for name in names}
        if before is not None:
            contenders[names[0] + BEFORE] = Contender(names[0], folder, before)
        found |= in_turns(contenders, actions, rounds)
        for contender in contenders.values():
            contender.close()
    rows = []
    for text, name, action in ROWS:
        now = np.array(found[name, action]).T
        rows.append([text, *(spread(list(times), 0) for times in now), ""])
        if (name + BEFORE, action) in found:
            old = np.array(found[name + BEFORE, action]).T
            rows[-1][-1] = f"{spread(list(now[1] / old[1]))}; {spread(list(now[2] / old[2]))}"
            rows.append([text + BEFORE, *(spread(list(times), 0) for times in old), ""])
    return rows


def hash_ms() -> float:
    """Return the milliseconds of processor that a SHA-256 of 96 MB takes."""
    data = torch.randn(24_000_000).numpy()
    start = time.process_time()
    hashlib.sha256(data)
    return (time.process_time() - start) * 1e3


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
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--before", metavar="SRC", help="an older ddparity's folder, as one more contender")
    parser.add_argument("--instants", type=int, default=200)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine("safetensors")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = in_own_processes(folder, options.rounds, options.before)
    costs = table(["", "returns, ms", "written, ms", "processor, ms", "to before: written; processor"], rows)
    rows = []
    for background in (False, True):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            outcome, _ = outcomes(sharded, 2, folder, background, timeout_s=600)
        assert outcome.error is None, outcome.trace
        returns, written, copied = outcome.value
        first = returns.pop(0)  # it imports torch's DCP
        rows.append([f"sharded, 2 processes{', background=True' * background}", spread(returns, 0), spread(written, 0)])
        if background:
            rows.append(["sharded, 2 processes, background=True, the first", f"{first:.0f}", "–"])
            rows.append(["sharded, a copy of rank 0's shards", spread(copied, 0), "–"])
    shards = table(["96 MB on 2 processes", "returns, ms", "written, ms"], rows)
    faults = table(
        ["killed", "instants", "in the middle of a save", "lost or damaged", "s"],
        kill_rows(options.instants, options.folder or tempfile.gettempdir()),
    )
    write_section(
        "checkpoint",
        f"## Checkpoints\n\n{facts}\n\n`checkpoint.py`, each contender in a process of its own; medians and quartiles "
        f"of {options.rounds} rounds. 96 MB are saved and loaded; predictions are 200,000 samples of 10 numbers and a "
        f"class, in 100 files. The C library keeps freed memory. Processor: the time of all threads, in the program "
        f"and in the system; other programs that run on the machine do not change it much. A SHA-256 of the 96 MB "
        f"takes {hash_ms():.0f} ms of a processor.{BEFORE_TEXT * (options.before is not None)}\n\n{costs}\n\n{shards}"
        f"\n\n{faults}",
    )
    print(costs, shards, faults, sep="\n\n")


if __name__ == "__main__":
    main()

"""Measure what decides `SHORT_BYTES` in src/ddparity/comm/allreduce.py, and how the hook waits.

python benchmarks/collectives.py [--rounds 15] [--quick]

The first part sums a buffer over the ranks by Gloo's all-reduce, and by an all-gather or an all-to-all with a local sum
in rank order, for several sizes and numbers of processes. The second part runs the whole training step of a small DDP
with hooks that differ in how they sum and wait. `--quick` only checks that everything runs: it writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddparity as dp
from contenders import KINDS, RATE
from ddparity.comm.allreduce import SHORT_BYTES, mean_over_ranks
from ddparity.compat import all_gather_single, all_to_all_single
from results import machine, spread, table, write_section

SIZES = (100, 1_000, 3_000, 10_000, 30_000, 65_536, 100_000, 131_072, 200_000, 300_000, 1_000_000, 3_000_000)
ALL_REDUCE = "all-reduce"
Times = dict[Any, list[float]]


def _turns(contenders: dict[Any, Callable[[], Any]], rounds: int, repeats: int) -> Times:
    """Return the milliseconds of one call of each contender in each round; the order rotates."""
    times: Times = {name: [] for name in contenders}
    order = list(contenders)
    for call in contenders.values():
        call()
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                contenders[name]()
            times[name].append((time.perf_counter() - start) * 1e3 / repeats)
    return times


def sums(sizes: tuple[int, ...], rounds: int) -> dict[int, Times]:
    """Return, on each rank, the milliseconds of each way to sum, for each number of floats."""
    torch.set_num_threads(1)
    with dp.world(device="cpu"):
        return {size: _turns(_ways(torch.ones(size)), rounds, 10 if size <= 300_000 else 2) for size in sizes}


def _ways(buffer: torch.Tensor) -> dict[Any, Callable[[], Any]]:
    # The sum of zeros stays zero, so the buffer can be summed many times.
    buffer.zero_()

    def gathered() -> torch.Tensor:
        copies = buffer.new_empty(dist.get_world_size(), *buffer.shape)
        all_gather_single(copies.view(-1), buffer)
        return copies.sum(0)

    def sent() -> torch.Tensor:
        others, rows = dist.get_world_size() - 1, [1] * dist.get_world_size()
        rows[dist.get_rank()] = 0
        copies = buffer.new_empty(others, *buffer.shape)
        all_to_all_single(copies, buffer.repeat(others, 1), rows).wait()
        return copies.sum(0).add_(buffer)

    return {ALL_REDUCE: lambda: dist.all_reduce(buffer), "all-gather": gathered, "all-to-all": sent}


# The annotations of this file are strings, so the hooks have none.
def _gather_then(group, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations as objects
    """Sum the ranks' copies, but do not wait: DDP waits for the future, in which a callback sums."""
    buffer: torch.Tensor = bucket.buffer()
    copies = buffer.new_empty(dist.get_world_size(group), *buffer.shape)
    work = all_gather_single(copies.view(-1), buffer, group=group, async_op=True)
    return work.get_future().then(lambda _: copies.sum(0))


def _mean(group, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations as objects
    """Average as `replicate` does, and wait here."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(mean_over_ranks(bucket.buffer(), group))
    return future


def _reduce_then(group, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations as objects
    """Sum by an all-reduce at any size."""
    return dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future().then(lambda done: done.value()[0])


HOOKS: dict[str, Any] = {
    "DDP's own": None,
    "mean_over_ranks": _mean,
    "all-gather, not waiting": _gather_then,
    "all-reduce, not waiting": _reduce_then,
}


def hooks(model: str, rounds: int) -> Times:
    """Return, on each rank, the milliseconds of a step with each hook."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with dp.world(device="cpu"):
        first = KINDS[model].make()
        x, y = KINDS[model].samples(KINDS[model].micro_batch).tensors
        return _turns({name: _step(copy.deepcopy(first), hook, x, y) for name, hook in HOOKS.items()}, rounds, 20)


def _step(module: nn.Module, hook: Any, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    if hook is not None:
        model.register_comm_hook(model.process_group, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def suggestion(measured: dict[int, dict[int, Times]]) -> str:
    """Return, for each number of processes, the largest buffer that an all-to-all sums faster than an all-reduce."""
    parts = []
    for nproc, sizes in measured.items():
        wins = max((size for size, times in sizes.items() if np.median(_ratios(times, "all-to-all")) < 1), default=0)
        parts.append(f"{nproc} processes: {4 * wins:,} bytes of one rank's buffer, {4 * wins * nproc:,} of all copies")
    return "; ".join(parts)


def _ratios(times: Times, way: str) -> list[float]:
    return [own / reduce for own, reduce in zip(times[way], times[ALL_REDUCE], strict=True)]


def report(facts: str, measured: dict[int, dict[int, Times]], steps: dict[str, Times], rounds: int) -> str:
    rows = []
    for size in next(iter(measured.values())):
        cells = [f"{size:,}"]
        for sizes in measured.values():
            cells.append(f"{np.median(sizes[size][ALL_REDUCE]):.3f}")
            cells += [spread(_ratios(sizes[size], way)) for way in ("all-gather", "all-to-all")]
        rows.append(cells)
    head = ["floats"]
    for nproc in measured:
        head += [f"{nproc} processes: all-reduce, ms", "all-gather", "all-to-all"]
    step_rows = []
    for model, times in steps.items():
        cells = [model]
        for name in HOOKS:
            cells.append(spread([a / b for a, b in zip(times[name], times["DDP's own"], strict=True)]))
        cells[1] = spread(times["DDP's own"])
        step_rows.append(cells)
    return "\n\n".join(
        [
            "## Summing over the ranks",
            facts,
            f"`collectives.py`, Gloo, medians of {rounds} interleaved rounds: milliseconds of an all-reduce, then the "
            f"time of an all-gather and of an all-to-all, each with a local sum, over it in the same round, with "
            f"quartiles. The largest buffer for which the all-to-all is faster: {suggestion(measured)}. Now "
            f"`SHORT_BYTES` is {SHORT_BYTES:,}, of one rank's.",
            table(head, rows),
            f"The whole step of a DDP on 2 processes, one micro-batch of {KINDS['MLP'].micro_batch}: milliseconds with "
            f"DDP's own reduction, then the time with each hook over it in the same round.",
            table(["", "DDP's own, ms", *list(HOOKS)[1:]], step_rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="run two rounds of few sizes, and only print the result")
    options = parser.parse_args()
    sizes, rounds = (SIZES[:3], 2) if options.quick else (SIZES, options.rounds)
    facts = machine()
    measured = {nproc: dp.launch(sums, sizes, rounds, nproc=nproc)[0] for nproc in (2, 3, 4)}
    steps = {model: dp.launch(hooks, model, rounds, nproc=2)[0] for model in ("MLP", "CNN")}
    text = report(facts, measured, steps, rounds)
    print(text)
    if not options.quick:
        write_section("collectives", text)


if __name__ == "__main__":
    main()

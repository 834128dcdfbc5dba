"""Measure how `predict` scales, what balancing gains, and its time and memory beside code that people write today.

python benchmarks/predict.py [--rounds 15] [--repeat 3] [--quick]

There are 2 processes over Gloo, with one thread and one core each. Contenders take turns in the same processes, in an
order that rotates from round to round, and a ratio is that of one round. Memory is measured in new processes,
`--repeat` times. `--quick` checks that everything runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import math
import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import ddparity as dp
from results import machine, spread, table, write_section

BATCH = 64
MB = 1_000_000
Times = dict[str, list[float]]  # seconds of each contender in each round
Model = Callable[[Any], Tensor]
Evaluate = Callable[[Model, Dataset[Any]], Tensor | None]  # the outputs in data-set order, on rank 0 at least


@dataclass(frozen=True)
class Sizes:
    """Numbers of samples: of the compute-bound run, the skewed one, the collected ones. `result_mb`: outputs, in MB."""

    compute: int = 64 * BATCH
    skewed: int = 2000
    collected: int = 20_000
    result_mb: int = 400


QUICK = Sizes(compute=4 * BATCH, skewed=200, collected=1000, result_mb=40)


# Code that people write; eval_correctness.py uses it, too


class SequentialDistributedSampler(Sampler[int]):
    """Yields a contiguous share. The last share is filled up with the first samples."""

    def __init__(self, length: int) -> None:
        self.length, self.rank, ranks = length, dist.get_rank(), dist.get_world_size()
        self.share = math.ceil(length / ranks)
        self.total = self.share * ranks

    def __iter__(self) -> Iterator[int]:
        indices = list(range(self.length))
        indices += indices[: self.total - self.length]
        assert len(indices) == self.total, "fewer samples than there are to fill up"
        return iter(indices[self.rank * self.share : (self.rank + 1) * self.share])

    def __len__(self) -> int:
        return self.share


def nested_concat(tensors: Any, new: Any) -> Any:
    if isinstance(tensors, (list, tuple)):
        return type(tensors)(nested_concat(a, b) for a, b in zip(tensors, new, strict=False))
    return torch.cat((tensors, new))


def distributed_concat(tensor: Any, total: int) -> Any:
    if isinstance(tensor, (list, tuple)):
        return type(tensor)(distributed_concat(part, total) for part in tensor)
    gathered = [tensor.clone() for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.cat(gathered)[:total]


def ddparity(model: Model, dataset: Any) -> Tensor | None:
    outputs: Tensor | None = dp.predict(model, dataset, BATCH)
    return outputs


@torch.inference_mode()
def recipe(model: Model, dataset: Any) -> Tensor:
    """Predict with the loop of Trainer.predict in transformers 3, of 2020."""
    outputs: Tensor | None = None
    for batch in DataLoader(dataset, BATCH, sampler=SequentialDistributedSampler(len(dataset))):
        output = model(batch)
        outputs = output if outputs is None else nested_concat(outputs, output)
    gathered: Tensor = distributed_concat(outputs, len(dataset))
    return gathered


@functools.cache
def _accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size(), "Accelerate did not join the group"
    return accelerator


@torch.inference_mode()
def accelerate(model: Model, dataset: Any) -> Tensor | None:
    accelerator = _accelerator()
    loader = accelerator.prepare(DataLoader(dataset, BATCH))
    parts = [accelerator.gather_for_metrics(model(batch)) for batch in loader]
    return torch.cat(parts) if accelerator.is_main_process else None


HEAP = "ddparity, the heap as it is"
CONTENDERS: dict[str, Evaluate] = {"ddparity": ddparity, "recipe of 2020": recipe, "Accelerate": accelerate}


# Time


def measure(sizes: Sizes, rounds: int) -> dict[str, Times]:
    """Return the seconds of each contender in each round, for each figure. Every rank calls it."""
    _settle()
    warnings.simplefilter("ignore")  # the other libraries give advice on numbers of workers
    samples, model = _compute_bound(sizes)
    # The copy is a process without a process group, on the same core. It is forked before this one joins its group.
    ours, theirs = multiprocessing.Pipe()
    copy = multiprocessing.get_context("fork").Process(target=_alone, args=(theirs, model, samples), daemon=True)
    copy.start()
    with dp.world(backend="gloo", device="cpu") as world:
        measured = {"scaling": _scaling(ours, model, samples, world.rank, rounds), "skew": _skew(sizes, rounds)}
        ours.send(None)
        copy.join()
        for width in (10, 1000):
            measured[f"(N, {width})"] = _collecting(sizes, width, rounds)
    return measured


def _settle() -> None:
    """Use one thread on one core: otherwise a process uses the core of another that waits."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if len(cores) >= ranks:
        os.sched_setaffinity(0, {cores[rank]})


def _compute_bound(sizes: Sizes) -> tuple[TensorDataset, nn.Module]:
    torch.manual_seed(0)
    layers = [nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)]
    return TensorDataset(torch.randn(sizes.compute, 512)), nn.Sequential(*layers)


def _alone(commands: Connection, model: nn.Module, samples: TensorDataset) -> None:
    while commands.recv():
        dp.predict(model, samples, BATCH)
        commands.send(True)


def _scaling(copy: Connection, model: nn.Module, samples: TensorDataset, rank: int, rounds: int) -> Times:
    def alone(runs: bool) -> None:
        if runs:
            copy.send(True)
            copy.recv()

    return _in_turns(
        {
            "one": lambda: alone(rank == 0),
            "two copies": lambda: alone(True),
            "two": lambda: dp.predict(model, samples, BATCH),
        },
        rounds,
    )


def _skew(sizes: Sizes, rounds: int) -> Times:
    costs = torch.ones(sizes.skewed, dtype=torch.int64)
    costs[-(sizes.skewed // 10) :] = 10
    matrix = torch.randn(256, 256)

    def model(batch: Tensor) -> Tensor:
        state = matrix
        for _ in range(int(batch.sum())):
            state = (state @ matrix).tanh_()
        return batch.float()

    return _in_turns(
        {
            "contiguous": lambda: dp.predict(model, costs, 4),
            "dynamic": lambda: dp.predict(model, costs, 4, balance="dynamic"),
        },
        rounds,
    )


def _collecting(sizes: Sizes, width: int, rounds: int) -> Times:
    torch.manual_seed(0)
    samples = TensorDataset(torch.randn(sizes.collected, 64))
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, width)).eval()

    def model(batch: Sequence[Tensor]) -> Tensor:
        result: Tensor = network(batch[0])
        return result

    outputs = {name: evaluate(model, samples) for name, evaluate in CONTENDERS.items()}
    if dist.get_rank() == 0:
        for name, output in outputs.items():
            # The bits of a row may depend on the batch that the row is in.
            assert torch.allclose(output, outputs["ddparity"], rtol=1e-4, atol=1e-5), f"{name}: other outputs"
    outputs.clear()
    return _in_turns(
        {name: lambda evaluate=evaluate: evaluate(model, samples) for name, evaluate in CONTENDERS.items()}, rounds
    )


def _in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> Times:
    times: Times = {name: [] for name in runs}
    order = list(runs)
    for run in runs.values():
        run()
    gc.collect()
    gc.freeze()  # a later collection looks at new objects only, so each contender pays for its own garbage
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            dist.barrier()
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    gc.unfreeze()
    return times


# Memory


def remember(name: str, sizes: Sizes, gives_back: bool) -> float:
    """Return by how many bytes memory grows at its peak, while outputs of `sizes.result_mb` go to rank 0.

    Every rank calls it. `gives_back`: freed memory leaves the process. Otherwise glibc keeps up to seven of the model's
    outputs after they are freed: after each aligned output it makes a small chunk, keeps the chunk for the thread, and
    then the hole is too small for the next output. This adds memory of the model, 0 to 7 times 4 MB by chance.
    """
    _settle()
    if gives_back:
        _take_large_memory_from_the_system()
    width = 15_625  # a batch of outputs is 4 MB
    samples = torch.arange(sizes.result_mb * MB // (4 * width))

    def model(width: int) -> Model:
        return lambda batch: batch.float()[:, None].repeat(1, width)

    with dp.world(backend="gloo", device="cpu"):
        CONTENDERS[name](model(1), samples)  # connections, imports, buffers
        gc.collect()
        _return_freed_memory()
        dist.barrier()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # set VmHWM, the peak, to the present size
        outputs = CONTENDERS[name](model(width), samples)
        peak = _status("VmHWM")
        if dist.get_rank() == 0:
            assert outputs is not None and outputs.shape == (len(samples), width)
            assert torch.equal(outputs[:, -1], samples.float()), f"{name}: other outputs"
    return peak - before


def _take_large_memory_from_the_system() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        m_mmap_threshold = -3
        assert libc.mallopt(m_mmap_threshold, MB), "the C library refused its threshold"


def _return_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _status(field: str) -> float:
    """Return a field of the kernel's status of this process, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"the kernel's status of this process has no {field}"
    return int(found[1]) * 1024


# The report


def slowest(of_ranks: Sequence[dict[str, Times]], figure: str) -> dict[str, np.ndarray]:
    """Return the seconds until the last rank is done, by contender and round."""
    return {name: np.max([rank[figure][name] for rank in of_ranks], axis=0) for name in of_ranks[0][figure]}


def report(
    facts: str, of_ranks: Sequence[dict[str, Times]], grown: dict[str, list[list[float]]], sizes: Sizes, rounds: int
) -> str:
    scaling, skew = slowest(of_ranks, "scaling"), slowest(of_ranks, "skew")
    # Two copies do the work twice: their throughput is 2 / time, and ours is 1 / time.
    share = scaling["two copies"] / (2 * scaling["two"])
    figures = [
        ["throughput, 2 processes to 1", spread(scaling["one"] / scaling["two"]), ""],
        ["two independent copies to 1", spread(2 * scaling["one"] / scaling["two copies"]), ""],
        ["share of it that 2 processes reach", spread(share, 3), "≥ 0.97"],
        ["skewed costs, contiguous to dynamic, time", spread(skew["contiguous"] / skew["dynamic"]), "≥ 1.35"],
    ]
    collected = []
    for width in (10, 1000):
        times = {name: np.array(seconds) for name, seconds in of_ranks[0][f"(N, {width})"].items()}
        ours = times["ddparity"]
        collected.append([f"({sizes.collected:,}, {width:,})", spread(1e3 * ours, 0)])
        for name in list(CONTENDERS)[1:]:
            collected[-1].append(spread(ours / times[name]))
            figures.append([f"time to collect {collected[-1][0]}, to {name}", spread(ours / times[name]), "≤ 1"])
    share_mb = sizes.result_mb / 2
    memory = []
    for name, repeats in grown.items():
        first, second = (max(rank) / MB for rank in zip(*repeats, strict=True))
        beyond = first - sizes.result_mb, second - share_mb
        memory.append([name, f"{beyond[0]:.0f}", f"{beyond[1]:.0f}", f"{beyond[1] / share_mb:.2f}"])
    figures.append([f"memory beyond the {sizes.result_mb} MB of the result on rank 0", f"{memory[0][1]} MB", "≤ 64 MB"])
    figures.append([f"memory beyond the share of {share_mb:.0f} MB on rank 1, to it", memory[0][3], "≤ 0.1"])
    peers = list(CONTENDERS)[1:]
    return "\n\n".join(
        [
            "## Prediction",
            facts,
            f"`predict.py`, 2 processes over Gloo, with one core each, {rounds} interleaved rounds: medians of the "
            f"ratios of a round, with quartiles.",
            table(["figure", "measured", "at least, at most"], figures),
            "Throughput: a compute-bound MLP, until the last process is done; a copy is `predict` in a process without "
            "a process group. Skew: the last tenth of the samples costs ten times as much; 1.47 is ideal.",
            "### Until rank 0 has all outputs",
            f"An MLP, batches of {BATCH}, no workers. Milliseconds of `predict`, and its time over the others'.",
            table(["outputs", "ddparity, ms", *(f"to {name}" for name in peers)], collected),
            f"### Memory to collect {sizes.result_mb} MB on rank 0",
            f"Growth of the resident set at its peak, in MB, largest of {len(next(iter(grown.values())))} runs in new "
            f"processes: on rank 0 beyond the result, on rank 1 beyond its share of {share_mb:.0f} MB. The C library "
            f"gives freed memory back (M_MMAP_THRESHOLD 1 MB). The last row is with the default heap, which keeps some "
            f"of the 4 MB outputs that the model has freed, in any loop.",
            table(["", "rank 0, beyond", "rank 1, beyond", "to its share"], memory),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=3, help="how often the memory of each contender is measured")
    parser.add_argument("--quick", action="store_true", help="run two short rounds, and print the results only")
    options = parser.parse_args()
    sizes = Sizes()
    if options.quick:
        sizes, options.rounds, options.repeat = QUICK, 2, 1
    facts, start = machine("accelerate"), time.monotonic()
    of_ranks: list[Any] = dp.launch(measure, sizes, options.rounds, nproc=2)
    grown = {
        label: [dp.launch(remember, name, sizes, gives_back, nproc=2) for _ in range(options.repeat)]
        for label, name, gives_back in [*((name, name, True) for name in CONTENDERS), (HEAP, "ddparity", False)]
    }
    text = report(facts, of_ranks, grown, sizes, options.rounds)
    print(text)
    print(f"\n{time.monotonic() - start:.0f} s")
    if not options.quick:
        write_section("predict", text)


if __name__ == "__main__":
    main()

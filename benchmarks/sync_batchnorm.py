"""What a synchronised batch norm costs against the local one, on the same shard.

python benchmarks/sync_batchnorm.py [--rounds 21] [--device cpu] [--repeat 3] [--quick]

Forward and backward of one layer, and a whole training step of a ResNet-18, in 2 processes. All contenders live in the
same processes and take turns, in an order that rotates from round to round; a ratio is that of one round. On CUDA the
processes share one card, over Gloo, and torch's own SyncBatchNorm takes part, which does not run on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

import ddparity as dp
from ddparity.batchnorm import fused
from ddparity.batchnorm.moments import SumOverRanks
from results import machine, spread, table, write_section

SHAPES = [(32, 64, 56, 56), (64, 256, 14, 14), (16, 512, 7, 7)]
STEP = "ResNet-18, batch 16 at 64×64, whole step"
Times = dict[str, list[float]]


class Simple(nn.BatchNorm2d):
    """As many write it: two all-reduces of sums, and autograd for the rest."""

    def forward(self, x: Tensor) -> Tensor:
        count = SumOverRanks.apply(torch.tensor([x.numel() / x.size(1)]), dist.group.WORLD)
        sums = SumOverRanks.apply(torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]), dist.group.WORLD)
        mean, square = (sums / count).chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)


def contenders(channels: int, device: torch.device) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {
        "local": nn.BatchNorm2d(channels),
        "local again": nn.BatchNorm2d(channels),
        "ddparity": dp.SyncBatchNorm(channels),
    }
    if device.type == "cpu":
        layers["stock operators"] = dp.SyncBatchNorm(channels)
        layers["simple"] = Simple(channels)
    else:
        layers["torch's"] = nn.SyncBatchNorm(channels)
    return {name: layer.to(device) for name, layer in layers.items()}


def measure(device: str, rounds: int, quick: bool) -> list[tuple[str, Times]]:
    """On each rank: for each row, each contender's milliseconds in each round."""
    torch.set_num_threads(1)
    _keep_freed_memory()
    if device == "cpu":
        _bind_to_own_core()
    with dp.world(backend="gloo", device=device) as world:
        rows = []
        for shape in SHAPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                name = f"{shape}{', channels_last' if layout is torch.channels_last else ''}"
                rows.append((name, _layers(shape, layout, world.device, rounds, 2 if quick else 20)))
        rows.append((STEP, _steps(world.device, rounds, 1 if quick else 2)))
        return rows


def _keep_freed_memory() -> None:
    """Outputs of this size cost as much in page faults as in work, at whoever's turn the C library returns memory."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def _bind_to_own_core() -> None:
    """As mpirun does: otherwise processes take each other's cores while one waits, which is what would be measured."""
    cores = sorted(os.sched_getaffinity(0))
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if len(cores) >= ranks:
        os.sched_setaffinity(0, {cores[rank]})


def _layers(
    shape: tuple[int, ...], layout: torch.memory_format, device: torch.device, rounds: int, times: int
) -> Times:
    torch.manual_seed(dist.get_rank())
    x = torch.randn(shape).to(device, memory_format=layout).requires_grad_()
    dy = torch.randn_like(x)

    def run(name: str, layer: nn.Module) -> Callable[[], None]:
        def both() -> None:
            for _ in range(times):
                x.grad = None
                layer(x).backward(dy)

        return _without_passes(both) if name == "stock operators" else both

    runs = {name: run(name, layer) for name, layer in contenders(shape[1], device).items()}
    return _in_turns(runs, rounds, times, device)


def _without_passes(work: Callable[[], None]) -> Callable[[], None]:
    def patched() -> None:
        with mock.patch.object(fused, "_fused", None):
            work()

    return patched


def _steps(device: torch.device, rounds: int, times: int) -> Times:
    torch.manual_seed(0)
    images, targets = torch.randn(16, 3, 64, 64, device=device), torch.randint(1000, (16,), device=device)
    first = resnet18().to(device)
    converted = {
        "local": lambda model: model,
        "local again": lambda model: model,
        "ddparity": dp.convert_sync_batchnorm,
        **({"torch's": nn.SyncBatchNorm.convert_sync_batchnorm} if device.type == "cuda" else {}),
        **({"stock operators": dp.convert_sync_batchnorm} if device.type == "cpu" else {}),
    }

    def run(name: str, convert: Callable[[nn.Module], nn.Module]) -> Callable[[], None]:
        model = dp.replicate(convert(copy.deepcopy(first)))
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

        def step() -> None:
            for _ in range(times):
                for micro in dp.accumulate(model, [(images, targets)], equal_counts=True):
                    (F.cross_entropy(model(micro.data[0]), micro.data[1]) * micro.weight).backward()
                optimizer.step()
                optimizer.zero_grad()

        return _without_passes(step) if name == "stock operators" else step

    runs = {name: run(name, convert) for name, convert in converted.items()}
    return _in_turns(runs, rounds, times, device)


def _in_turns(runs: dict[str, Callable[[], None]], rounds: int, times: int, device: torch.device) -> Times:
    taken: Times = {name: [] for name in runs}
    order = list(runs)
    for _ in range(2):
        for run in runs.values():
            run()
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            dist.barrier()
            start = time.perf_counter()
            runs[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[name].append((time.perf_counter() - start) * 1e3 / times)
    return taken


def report(facts: str, repeats: list[list[tuple[str, Times]]], rounds: int, device: str) -> str:
    names = list(repeats[0][0][1])[1:]
    rows = []
    for number, (name, first) in enumerate(repeats[0]):
        cells = [name, " / ".join(f"{np.median(repeat[number][1]['local']):.2f}" for repeat in repeats)]
        for contender in names:
            if contender not in first:
                cells.append("–")
                continue
            ratios = [
                [a / b for a, b in zip(times[contender], times["local"], strict=True)]
                for _, times in (repeat[number] for repeat in repeats)
            ]
            cells.append(
                " / ".join(spread(values) if len(repeats) == 1 else f"{np.median(values):.2f}" for values in ratios)
            )
        rows.append(cells)
    runs = f"{len(repeats)} runs, one after the other: " if len(repeats) > 1 else ""
    return "\n\n".join(
        [
            f"## SyncBatchNorm on {device.upper()}",
            facts,
            f"`sync_batchnorm.py`, 2 processes over Gloo, {runs}medians of {rounds} interleaved rounds. Forward and "
            f"backward of one layer, milliseconds with the local layer, then each contender's time over its in the "
            f"same round; “local again” is a second copy of it, and shows the noise. “stock operators”: ddparity "
            f"without its compiled passes. “simple”: sums and sums of squares, reduced, and autograd. Each process "
            f"has a core of its own, and the C library keeps freed memory: nobody pays for another's page faults.",
            table(["input of a rank", "local, ms", *names], rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeat", type=int, default=3, help="whole measurements, each in new processes")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0 where both processes share the card")
    parser.add_argument("--quick", action="store_true", help="two short rounds, printed only")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeat = 2, 1
    facts, start = machine("torchvision"), time.monotonic()
    repeats: list[Any] = [
        dp.launch(measure, options.device, options.rounds, options.quick, nproc=2)[0] for _ in range(options.repeat)
    ]
    kind = torch.device(options.device).type
    text = report(facts, repeats, options.rounds, kind)
    print(text)
    print(f"\n{time.monotonic() - start:.0f} s")
    if not options.quick:
        write_section(f"sync_batchnorm_{kind}", text)


if __name__ == "__main__":
    main()

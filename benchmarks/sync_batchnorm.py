"""Measure the time of a synchronised batch norm and of the local one, on the same shard.

python benchmarks/sync_batchnorm.py [--rounds 21] [--device cpu] [--repeat 3] [--quick]

It measures the forward and backward of one layer, and a whole training step of two kinds of ResNet-18, in 2 processes.
With local norms, the step is that of plain PyTorch. All contenders run in the same processes, one after the other, in
an order that changes from round to round. A ratio compares two times of the same round. On CUDA the processes share one
GPU, over Gloo. torch's own SyncBatchNorm is a contender there; it does not run on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

import ddparity as dp
from ddparity.batchnorm import cpu_kernels
from ddparity.batchnorm.moments import SumOverRanks
from results import machine, spread, table, write_section

SHAPES = [(32, 64, 56, 56), (64, 256, 14, 14), (16, 512, 7, 7)]
SMALL_IMAGES = "ResNet-18 for small images (stem of 3×3, no pooling), batch 16 at 64×64, whole step"
IMAGENET = "ResNet-18 as for ImageNet (last stage 2×2), batch 16 at 64×64, whole step"
LOCAL = "ddparity, local norms"
COPIES = 2  # of each model: the addresses of its weights change the time by one per cent
Times = dict[str, list[float]]
HOW = {
    "cpu": "“reference”: ddparity without its compiled kernels. “simple”: an all-reduce of the sums and the sums of "
    "squares, and autograd. Each process has its own core. The C library keeps freed memory, so that a contender does "
    "not cause page faults in another.",
    "cuda": "Both processes share one GPU, which NCCL does not support: their messages go through the host.",
}


class Simple(nn.BatchNorm2d):
    """A simple implementation: two all-reduces of sums, and autograd for the rest."""

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
        layers["reference"] = dp.SyncBatchNorm(channels)
        layers["simple"] = Simple(channels)
    else:
        layers["torch's"] = nn.SyncBatchNorm(channels)
    return {name: layer.to(device) for name, layer in layers.items()}


def measure(device: str, rounds: int, quick: bool) -> list[tuple[str, Times]]:
    """Measure on each rank. Return for each row the milliseconds of each contender in each round."""
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
        rows.append((SMALL_IMAGES, _steps(_for_small_images, world.device, rounds, 1)))
        rows.append((IMAGENET, _steps(resnet18, world.device, rounds, 1 if quick else 4)))
        return rows


def _for_small_images() -> nn.Module:
    model = resnet18()
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def _keep_freed_memory() -> None:
    """Make the C library keep freed memory. Page faults for outputs of this size take as long as the work itself."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def _bind_to_own_core() -> None:
    """Bind each process to its own core, as mpirun does. Otherwise the time would include waiting for a core."""
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

        return _without_kernels(both) if name == "reference" else both

    runs = {name: run(name, layer) for name, layer in contenders(shape[1], device).items()}
    return _in_turns(runs, rounds, times, device)


def _without_kernels(work: Callable[[], None]) -> Callable[[], None]:
    def patched() -> None:
        with mock.patch.object(cpu_kernels, "_fused", None):
            work()

    return patched


def _steps(network: Callable[[], nn.Module], device: torch.device, rounds: int, times: int) -> Times:
    torch.manual_seed(0)
    images, targets = torch.randn(16, 3, 64, 64, device=device), torch.randint(1000, (16,), device=device)
    first = network().to(device)
    names = ["local", "local again", "ddparity", "torch's" if device.type == "cuda" else "reference", LOCAL]
    runs: dict[str, Callable[[], None]] = {}
    for name in names:
        steps = itertools.cycle([_step(name, copy.deepcopy(first), images, targets) for _ in range(COPIES)])

        def run(steps: Iterator[Callable[[], None]] = steps) -> None:
            step = next(steps)
            for _ in range(times):
                step()

        runs[name] = _without_kernels(run) if name == "reference" else run
    return _in_turns(runs, rounds, times, device)


def _step(name: str, model: nn.Module, images: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return a training step: ddparity's, or for torch's contenders the one of PyTorch's documentation."""
    ours = name in ("ddparity", "reference", LOCAL)
    if ours:
        model = dp.replicate(model if name == LOCAL else dp.convert_sync_batchnorm(model))
    else:
        if name == "torch's":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        if ours:
            for micro in dp.accumulate(model, [(images, targets)], equal_counts=True):
                (F.cross_entropy(model(micro.data[0]), micro.data[1]) * micro.weight).backward()
        else:
            F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _in_turns(runs: dict[str, Callable[[], None]], rounds: int, times: int, device: torch.device) -> Times:
    taken: Times = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0)  # the same on both ranks
    for _ in range(2):  # each of the two copies of a model runs once
        for run in runs.values():
            run()
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            runs[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[name].append((time.perf_counter() - start) * 1e3 / times)
    return taken


def measure_on_gpu(device: torch.device, rounds: int) -> list[tuple[str, Times]]:
    """Measure the GPU's own time in CUDA graphs. Return each contender's microseconds by input and round."""
    rows = []
    for shape in [*SHAPES, (256, 64, 56, 56)]:
        for kind in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, device=device, dtype=kind).to(memory_format=layout).requires_grad_()
                graphs = {name: _captured(work) for name, work in _contenders_on_gpu(x).items()}
                taken: Times = {name: [] for name in graphs}
                for _ in range(rounds):
                    for name, graph in graphs.items():
                        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        start.record()
                        for _ in range(10):
                            graph.replay()
                        end.record()
                        end.synchronize()
                        taken[name].append(start.elapsed_time(end) * 100)
                name = f"{shape}, {str(kind).removeprefix('torch.')}"
                rows.append((name + (", channels_last" if layout is torch.channels_last else ""), taken))
    return rows


def _contenders_on_gpu(x: Tensor) -> dict[str, Callable[[], object]]:
    """Return each contender's forward and backward without the collectives."""
    from ddparity.batchnorm import triton_kernels as kernels  # only this function needs Triton

    layer, dy = nn.BatchNorm2d(x.size(1), device=x.device), torch.randn_like(x)
    values, weight, bias = x.detach(), layer.weight.detach(), layer.bias.detach()
    count = torch.tensor([x.numel() // x.size(1)], device=x.device, dtype=torch.int32)

    def ours() -> object:
        payload, intermediate = kernels.moments(values)
        stats = kernels.join(payload[None], 1e-5)
        kernels.update(layer.running_mean, layer.running_var, stats, 0.1)
        sums = kernels.backward_sums(dy, values, stats)
        return kernels.normalise(values, intermediate, stats, weight, bias), kernels.backward_input(
            dy, values, stats, weight, sums[None]
        )

    def torchs() -> object:
        mean, invstd = torch.batch_norm_stats(values, 1e-5)
        torch.batch_norm_gather_stats_with_counts(
            values, mean[None], invstd[None], layer.running_mean, layer.running_var, 0.1, 1e-5, count.to(mean.dtype)
        )
        sums = torch.batch_norm_backward_reduce(dy, values, mean, invstd, weight, True, True, True)
        return torch.batch_norm_elemt(values, weight, bias, mean, invstd, 1e-5), torch.batch_norm_backward_elemt(
            dy, values, mean, invstd, weight, *sums[:2], count
        )

    return {
        "local": lambda: torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), dy),
        "ddparity": ours,
        "torch's": torchs,
    }


def _captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def report_on_gpu(rows: list[tuple[str, Times]], rounds: int) -> str:
    cells = [
        [name, f"{np.median(taken['local']):.0f}"]
        + [spread([a / b for a, b in zip(taken[one], taken["local"], strict=True)]) for one in ("ddparity", "torch's")]
        for name, taken in rows
    ]
    return "\n\n".join(
        [
            f"The GPU's own time of a forward and a backward without the collectives, in CUDA graphs: medians of "
            f"{rounds} interleaved rounds of ten. A ratio is a contender's time divided by the local layer's in the "
            f"same round.",
            table(["input", "local, µs", "ddparity", "torch's"], cells),
        ]
    )


def report(facts: str, repeats: list[list[tuple[str, Times]]], rounds: int, device: str) -> str:
    names = [name for name in dict.fromkeys(name for _, times in repeats[0] for name in times) if name != "local"]
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
            f"backward of one layer: milliseconds with the local layer, then each contender's time divided by the "
            f"local layer's in the same round. “local again” is a second copy of the local layer and shows the noise. "
            f"{HOW[device]} A step with local norms is that of plain PyTorch with DistributedDataParallel; the other "
            f"steps are ddparity's.",
            table(["input of a rank", "local, ms", *names], rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeat", type=int, default=3, help="number of whole measurements, each in new processes")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0, which both processes share")
    parser.add_argument("--quick", action="store_true", help="two short rounds; the results are only printed")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeat = 2, 1
    facts, start = machine("torchvision"), time.monotonic()
    if options.device != "cpu":
        facts = facts.replace(";", f"; {torch.cuda.get_device_name(options.device)};", 1)
    repeats: list[Any] = [
        dp.launch(measure, options.device, options.rounds, options.quick, nproc=2)[0] for _ in range(options.repeat)
    ]
    kind = torch.device(options.device).type
    text = report(facts, repeats, options.rounds, kind)
    if kind == "cuda":
        text += "\n\n" + report_on_gpu(measure_on_gpu(torch.device(options.device), options.rounds), options.rounds)
    print(text)
    print(f"\n{time.monotonic() - start:.0f} s")
    if not options.quick:
        write_section(f"sync_batchnorm_{kind}", text)


if __name__ == "__main__":
    main()

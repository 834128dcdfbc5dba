"""Measure the Loader against torch's DataLoader: JPEG files with 0 and 2 workers, and the start of a large epoch.

python benchmarks/loading.py [--rounds 15] [--quick]

Both load the same files in a random order, in batches of 32, with the same transform, and whoever iterates does nothing
else. The transform's random numbers of the Loader have a key a micro-batch. One runs after the other in each round, in
turns first, and a ratio is that of two times of one round. Workers persist, so that a round does not start them; the
first epoch of each is not counted. The start of an epoch is the time to the first batch of a data set of 10^8 numbers.
`--quick` checks that everything runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

import ddparity as dp
from results import machine, publish, spread, table

FILES, BATCH, SIZE = 512, 32, 256
MANY = 10**8


def write_images(folder: Path, number: int) -> None:
    """Write JPEG files of smooth noise, which compress as photographs do, in two classes."""
    random = np.random.default_rng(0)
    for index in range(number):
        (folder / str(index % 2)).mkdir(exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / str(index % 2) / f"{index}.jpg", quality=85)


class Numbers(Dataset[int]):
    """A data set whose samples are their numbers."""

    def __len__(self) -> int:
        return MANY

    def __getitem__(self, index: int) -> int:
        return index


def torchs(dataset: Any, workers: int) -> Callable[[int], Iterator[Any]]:
    generator = torch.Generator()
    sampler = RandomSampler(dataset, generator=generator)
    loader = DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)

    def epoch(number: int) -> Iterator[Any]:
        generator.manual_seed(number)
        return iter(loader)

    return epoch


def ours(dataset: Any, workers: int) -> Callable[[int], Iterator[Any]]:
    plan = dp.BatchPlan(len(dataset), global_batch=BATCH, micro_batch=BATCH)
    loader = dp.Loader(dataset, plan, workers, persistent_workers=workers > 0)

    def epoch(number: int) -> Iterator[Any]:
        return (micro.data for step in loader.epoch(number) for micro in step)

    return epoch


def whole(epoch: Callable[[int], Iterator[Any]], number: int) -> float:
    """Return the seconds of an epoch."""
    start = time.perf_counter()
    count = sum(1 for _ in epoch(number))
    assert count, "an epoch has batches"
    return time.perf_counter() - start


def first(epoch: Callable[[int], Iterator[Any]], number: int) -> float:
    """Return the seconds to the first batch of an epoch."""
    start = time.perf_counter()
    next(iter(epoch(number)))
    return time.perf_counter() - start


def in_turns(
    measure: Callable[[Callable[[int], Iterator[Any]], int], float],
    contenders: dict[str, Callable[[int], Iterator[Any]]],
    rounds: int,
) -> dict[str, list[float]]:
    """Return the seconds of each contender by round; each is first in every other round."""
    for epoch in contenders.values():
        measure(epoch, 0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            times[name].append(measure(contenders[name], number))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="run two short rounds, and print the results only")
    options = parser.parse_args()
    rounds, files = (2, 64) if options.quick else (options.rounds, FILES)
    facts = machine("torchvision", "pillow")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), files)
        augment = transforms.Compose(
            [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )
        images = ImageFolder(folder, augment)
        for workers in (0, 2):
            times = in_turns(whole, {"torch": torchs(images, workers), "ours": ours(images, workers)}, rounds)
            ratios = [a / b for a, b in zip(times["ours"], times["torch"], strict=True)]
            each = spread([second * 1e3 / files for second in times["torch"]])
            rows.append([f"{files} JPEG files of {SIZE}×{SIZE}, {workers} workers", f"{each} an image", spread(ratios)])
    times = in_turns(first, {"ours": ours(Numbers(), 0)}, rounds)
    started = spread([second * 1e3 for second in times["ours"]])
    parts = [
        "## Loading",
        facts,
        f"`loading.py`, medians of {rounds} rounds with quartiles: torch's DataLoader in milliseconds, then the time "
        f"of the Loader over it in the same round. To the first batch of an epoch of {MANY:,} samples the Loader takes "
        f"{started} ms.",
        table(["", "DataLoader, ms", "Loader"], rows),
    ]
    publish("loading", parts, options.quick)


if __name__ == "__main__":
    main()

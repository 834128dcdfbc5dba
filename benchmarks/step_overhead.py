"""Measure the time of a whole training step: DDP written by hand, ddparity, Accelerate and Lightning Fabric.

python benchmarks/step_overhead.py [--rounds 20] [--steps 30] [--quick]

Each contender has processes of its own, which stay and wait while another one's run: in shared processes, what one
leaves behind (threads, a warm group, its scheduling) would serve the others. A round runs a number of steps of each
contender, in an order that rotates from round to round. A contender's ratio is its time over that of plain DDP in the
same round, so a load on the machine that is longer than a round slows both. Plain DDP runs twice: the ratio of the
second to the first is the noise. `--quick` checks that everything runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ddparity as dp
from results import COSTS_PAGE, machine, spread, table, write_section

MICRO_BATCH = 32
RATE = 1e-3
Data = list[torch.Tensor]
Epoch = Callable[[int], nn.Module]  # trains one epoch, of as many steps as a round has, and returns the model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


MODELS = {"MLP": mlp, "CNN": cnn}


@dataclass(frozen=True)
class Case:
    """One row of the table. `micro_batches`: on each rank in a step. `loads`: the step includes the loader."""

    model: str
    micro_batches: int
    loads: bool


@dataclass(frozen=True)
class Job:
    """What each contender gets: its own model, the same data, the same sizes.

    `batches`: this rank's micro-batches of an epoch, in memory; empty if the loader is measured, too.
    """

    case: Case
    steps: int
    rank: int
    world_size: int
    model: nn.Module
    dataset: TensorDataset
    batches: list[Data] = field(default_factory=list)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=RATE)


def plain(job: Job) -> Epoch:
    """Train with DDP by hand. In a world of one, DDP is left out, as an expert does."""
    count, alone = job.case.micro_batches, job.world_size == 1
    # gradient_as_bucket_view saves copies between gradients and buckets. At these sizes the effect is within the noise.
    model = job.model if alone else DistributedDataParallel(job.model, gradient_as_bucket_view=True)
    optimizer = job.optimizer(model)
    sampler = DistributedSampler(job.dataset, job.world_size, job.rank)
    loader = DataLoader(job.dataset, batch_size=MICRO_BATCH, sampler=sampler)

    def epoch(number: int) -> nn.Module:
        sampler.set_epoch(number)
        for done, (x, y) in enumerate(job.batches or loader, start=1):
            last = done % count == 0
            with nullcontext() if alone or last else model.no_sync():
                (F.cross_entropy(model(x), y) / count).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return model

    return epoch


def ddparity(job: Job) -> Epoch:
    count = job.case.micro_batches
    model = dp.replicate(job.model)
    optimizer = job.optimizer(model)
    plan = dp.BatchPlan(len(job.dataset), count * MICRO_BATCH * job.world_size, MICRO_BATCH)
    loader = dp.Loader(job.dataset, plan)

    def epoch(number: int) -> nn.Module:
        steps: Iterable[Any]
        if job.batches:
            steps = (job.batches[first : first + count] for first in range(0, len(job.batches), count))
        else:
            steps = loader.epoch(number)
        for step in steps:
            for micro in dp.accumulate(model, step, equal_counts=bool(job.batches)):
                x, y = micro.data
                (F.cross_entropy(model(x), y) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    return epoch


def accelerate(job: Job) -> Epoch:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=job.case.micro_batches)
    assert accelerator.num_processes == job.world_size, "Accelerate did not join the group"
    loader = DataLoader(job.dataset, batch_size=MICRO_BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(job.model, job.optimizer(job.model), loader)

    def epoch(number: int) -> nn.Module:
        for x, y in job.batches or loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        return model

    return epoch


def fabric(job: Job) -> Epoch:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    count = job.case.micro_batches
    several = DDPStrategy(process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=job.world_size, strategy=several if job.world_size > 1 else "auto")
    fabric.launch()
    assert fabric.world_size == job.world_size, "Fabric did not join the group"
    model, optimizer = fabric.setup(job.model, job.optimizer(job.model))
    loader = fabric.setup_dataloaders(DataLoader(job.dataset, batch_size=MICRO_BATCH, shuffle=True))

    def epoch(number: int) -> nn.Module:
        for done, (x, y) in enumerate(job.batches or loader, start=1):
            last = done % count == 0
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(F.cross_entropy(model(x), y) / count)
            if last:
                optimizer.step()
                optimizer.zero_grad()
        return model

    return epoch


CONTENDERS: dict[str, Callable[[Job], Epoch]] = {
    "plain": plain,
    "plain again": plain,
    "ddparity": ddparity,
    "Accelerate": accelerate,
    "Fabric": fabric,
}


class Contender:
    """A contender's processes, which train an epoch whenever they are asked to."""

    def __init__(self, name: str, nproc: int, steps: int, source: str | None = None) -> None:
        command = [sys.executable, __file__, "--contender", name, "--steps", str(steps)]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        if source is not None:
            environment["PYTHONPATH"] = source
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._processes = []
        for rank in range(nproc):
            # One process is a plain `python train.py`, without a process group and without DDP.
            described = {} if nproc == 1 else _described(rank, nproc, port)
            self._processes.append(
                subprocess.Popen(
                    command, env=environment | described, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )

    def ask(self, *words: object) -> Any:
        """Send a line to each process, and return rank 0's answer when all have answered."""
        for process in self._processes:
            assert process.stdin
            print(json.dumps(words), file=process.stdin, flush=True)
        answers = [process.stdout.readline() for process in self._processes if process.stdout]
        if not all(answers):
            raise RuntimeError("a contender's process has ended; its error stands above")
        return json.loads(answers[0])

    def close(self) -> None:
        for process in self._processes:
            process.communicate(timeout=60)


def _described(rank: int, nproc: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {name: str(number) for name, number in numbers.items()} | address


def serve(name: str, steps: int) -> None:
    """Train epochs for the lines that come, in one rank of a contender."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the other libraries give advice on numbers of workers
    answers, sys.stdout = sys.stdout, sys.stderr
    with _world(name) as (rank, world_size):
        run: Epoch | None = None
        for line in sys.stdin:
            word, *rest = json.loads(line)
            if word == "case":
                gc.unfreeze()
                run = CONTENDERS[name](_job(Case(*rest), steps, rank, world_size))
                # The first epoch is a warm-up, too: DDP orders its buckets in the first steps.
                answer = [parameter.tolist() for parameter in run(0).parameters()]
                gc.collect()
                gc.freeze()  # a later collection looks at new objects only
            else:
                assert run is not None
                if world_size > 1:
                    dist.barrier()
                start = time.perf_counter()
                run(*rest)
                answer = (time.perf_counter() - start) * 1e3 / steps
            print(json.dumps(answer), file=answers, flush=True)


@contextmanager
def _world(name: str) -> Iterator[tuple[int, int]]:
    """Join the world in a contender's own way; yield the rank and the world size. `dp.world` also sets a scheduling."""
    if name == "ddparity":
        with dp.world(device="cpu") as world:
            yield world.rank, world.world_size
    elif "RANK" not in os.environ:
        yield 0, 1
    else:
        dist.init_process_group("gloo")
        yield dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()


def _job(case: Case, steps: int, rank: int, world_size: int) -> Job:
    torch.manual_seed(0)
    a_rank = steps * case.micro_batches
    samples = a_rank * MICRO_BATCH * world_size
    images, targets = torch.randn(samples, 1, 8, 8), torch.randint(10, (samples,))
    batches: list[Data] = []
    if not case.loads:
        every = list(zip(images.split(MICRO_BATCH), targets.split(MICRO_BATCH), strict=True))
        batches = [list(batch) for batch in every[rank::world_size]]
    model = MODELS[case.model]()
    return Job(case, steps, rank, world_size, model, TensorDataset(images, targets), batches)


BEFORE = "ddparity before"


def measure(
    cases: list[Case], nproc: int, rounds: int, steps: int, before: str | None = None
) -> list[dict[str, list[float]]]:
    """Return the milliseconds of a step, for each case, by contender and round."""
    contenders = {name: Contender(name, nproc, steps) for name in CONTENDERS}
    if before is not None:
        contenders[BEFORE] = Contender("ddparity", nproc, steps, before)
    try:
        return [_measured(contenders, case, rounds) for case in cases]
    finally:
        for contender in contenders.values():
            contender.close()


def _measured(contenders: dict[str, Contender], case: Case, rounds: int) -> dict[str, list[float]]:
    models = {name: one.ask("case", *dataclasses.astuple(case)) for name, one in contenders.items()}
    if not case.loads:
        _check_same_work(models)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            times[name].append(contenders[name].ask("epoch", number + 1))
    return times


def _check_same_work(models: dict[str, list[Any]]) -> None:
    """Check that all contenders have equal weights, because without a loader all train on the same batches."""
    for name, parameters in models.items():
        for mine, theirs in zip(models["plain"], parameters, strict=True):
            assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-6), (
                f"{name} trains another model than plain DDP"
            )


def report(
    facts: str, measured: dict[int, list[dict[str, list[float]]]], cases: list[Case], rounds: int, steps: int
) -> str:
    sizes = ", ".join(f"{name} {sum(p.numel() for p in make().parameters()):,}" for name, make in MODELS.items())
    parts = [
        "## Cost of a training step",
        facts,
        f"`step_overhead.py`, medians of {rounds} interleaved rounds with quartiles; a round is an epoch of {steps} "
        f"steps; each contender has processes of its own. Milliseconds a step of DDP written by hand, then each "
        f"contender's time over this time in the same round; “plain again” is the first column once more, and shows "
        f"the noise. Micro-batches of {MICRO_BATCH}, K of them a step on each rank, Gloo, SGD; parameters: {sizes}. "
        f"One process does not use DDP.",
    ]
    names = list(itertools.islice(next(iter(measured.values()))[0], 1, None))
    for loads, title in ((True, "Loader included"), (False, "Batches in memory")):
        rows = []
        for nproc, results in measured.items():
            for case, times in zip(cases, results, strict=True):
                if case.loads == loads:
                    cells = [f"{case.model}, {nproc} process{'es' if nproc > 1 else ''}, K = {case.micro_batches}"]
                    cells.append(spread(times["plain"]))
                    for name in itertools.islice(times, 1, None):
                        cells.append(spread([a / b for a, b in zip(times[name], times["plain"], strict=True)]))
                    rows.append(cells)
        parts += [f"### {title}", table(["", "plain, ms", *names], rows)]
    return "\n\n".join(parts)


def summary(text: str) -> str:
    """Return the part of `report` that docs/costs.md shows: steps with the loader, on 2 processes."""
    loaded = re.search(r"### Loader included\n\n(.*?)(?=\n\n|\Z)", text, re.DOTALL)
    assert loaded
    return "\n".join(line for line in loaded[1].splitlines() if "1 process," not in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30, help="steps of a round")
    parser.add_argument("--nproc", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="run two short rounds, and print the results only")
    parser.add_argument("--before", metavar="SRC", help="an older ddparity's folder, as one more contender")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        serve(options.contender, options.steps)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure all contenders, and write their figures."""
    if options.quick:
        options.rounds, options.steps = 2, 3
    cases = [Case(model, count, loads) for model in MODELS for count in (1, 4) for loads in (True, False)]
    facts, start = machine("accelerate", "lightning-fabric"), time.monotonic()
    measured = {nproc: measure(cases, nproc, options.rounds, options.steps, options.before) for nproc in options.nproc}
    text = report(facts, measured, cases, options.rounds, options.steps)
    print(text)
    print(f"\n{time.monotonic() - start:.0f} s")
    if not options.quick and options.before is None:
        write_section("step_overhead", text)
        write_section("step_overhead", summary(text), COSTS_PAGE)


if __name__ == "__main__":
    main()

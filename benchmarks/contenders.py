"""What the benchmarks of a training step compare: DDP by hand, ddparity, Accelerate, Fabric, each in its own processes.

Each contender has processes of its own, which stay and wait while another one's run: in shared processes, what one
leaves behind (threads, a warm group, its scheduling) would serve the others. This file is also the program of these
processes: python benchmarks/contenders.py NAME
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ddparity as dp
from ddparity import system
from ddparity.comm import allreduce
from ddparity.comm.buffers import Buffers
from ddparity.gradients.early import EarlyPlan
from links import DEVICE

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


def wide(inputs: int, width: int, layers: int) -> nn.Module:
    """Return an MLP of so many hidden layers."""
    sizes = [inputs, *[width] * layers]
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    return model


class GPT(nn.Module):
    """A small language model: blocks of torch's own encoder layers, with a causal mask."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits as (batch, vocabulary, length)."""
        hidden = self.tokens(x) + self.places.weight
        logits: torch.Tensor = self.head(self.blocks(hidden, mask=self.mask, is_causal=True)).transpose(1, 2)
        return logits


@dataclass(frozen=True)
class Kind:
    """A model and what it is trained on: images, or tokens where `vocabulary` is given."""

    make: Callable[[], nn.Module]
    micro_batch: int
    shape: tuple[int, ...]
    vocabulary: int = 0

    def samples(self, number: int) -> TensorDataset:
        if self.vocabulary:
            x = torch.randint(self.vocabulary, (number, *self.shape))
            return TensorDataset(x, x.roll(-1, 1))
        return TensorDataset(torch.randn(number, *self.shape), torch.randint(10, (number,)))

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.make().parameters())


KINDS = {
    "MLP": Kind(mlp, 32, (1, 8, 8)),
    "CNN": Kind(cnn, 32, (1, 8, 8)),
    "MLP of 67 k": Kind(lambda: wide(64, 224, 2), 16, (1, 8, 8)),
    "MLP of 1 M": Kind(lambda: wide(64, 1000, 2), 32, (1, 8, 8)),
    "ResNet-18": Kind(resnet, 8, (3, 32, 32)),
    "GPT of 10 M": Kind(lambda: GPT(512, 64, 384, 5), 4, (64,), 512),
    "MLP of 50 M": Kind(lambda: wide(64, 4990, 3), 32, (1, 8, 8)),
}


@dataclass(frozen=True)
class Case:
    """What is trained, in rounds of so many steps.

    `micro_batches`: on each rank in a step. `loads`: the step includes the loader.
    """

    model: str
    micro_batches: int
    loads: bool
    steps: int


@dataclass(frozen=True)
class Job:
    """What each contender gets: its own model, the same data, the same sizes.

    `batches`: this rank's micro-batches of an epoch, in memory; empty if the loader is measured, too.
    """

    case: Case
    rank: int
    world_size: int
    model: nn.Module
    dataset: TensorDataset
    batches: list[Data] = field(default_factory=list)

    @property
    def micro_batch(self) -> int:
        return KINDS[self.case.model].micro_batch

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=RATE)


def plain(job: Job) -> Epoch:
    """Train with DDP by hand. In a world of one, DDP is left out, as an expert does."""
    count, alone = job.case.micro_batches, job.world_size == 1
    # gradient_as_bucket_view saves copies between gradients and buckets. At these sizes the effect is within the noise.
    model = job.model if alone else DistributedDataParallel(job.model, gradient_as_bucket_view=True)
    optimizer = job.optimizer(model)
    sampler = DistributedSampler(job.dataset, job.world_size, job.rank)
    loader = DataLoader(job.dataset, batch_size=job.micro_batch, sampler=sampler)

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


def ddparity(job: Job, reduction: Literal["fast", "strict"] = "fast") -> Epoch:
    count = job.case.micro_batches
    model = dp.replicate(job.model, reduction)
    optimizer = job.optimizer(model)
    plan = dp.BatchPlan(len(job.dataset), count * job.micro_batch * job.world_size, job.micro_batch)
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
    loader = DataLoader(job.dataset, batch_size=job.micro_batch, shuffle=True)
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
    loader = fabric.setup_dataloaders(DataLoader(job.dataset, batch_size=job.micro_batch, shuffle=True))

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
    "strict": functools.partial(ddparity, reduction="strict"),
    "Accelerate": accelerate,
    "Fabric": fabric,
}


# Ours without one fast path: what each takes away, before the process joins the world.
WITHOUT: dict[str, Callable[[], None]] = {
    "without batch scheduling": lambda: setattr(system, "schedule_batch", lambda: False),
    "without waiting awake": lambda: setattr(allreduce, "YIELDS", 0),
    "without exchanges of short tensors": lambda: setattr(allreduce, "SHORT_BYTES", 0),
    "without buffers that stay": lambda: setattr(Buffers, "take", lambda _, size, like: like.new_empty(size)),
    "without early averages": lambda: setattr(EarlyPlan, "next", lambda *_: None),
}
CONTENDERS |= dict.fromkeys(WITHOUT, ddparity)


class Contender:
    """A contender's processes, which train an epoch whenever they are asked to.

    `source`: a folder with another ddparity. `hosts`: the name and the address of each rank's network namespace.
    """

    def __init__(
        self, name: str, nproc: int, source: str | None = None, hosts: Sequence[tuple[str, str]] | None = None
    ) -> None:
        command = [sys.executable, __file__, name]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        if source is not None:
            environment["PYTHONPATH"] = source
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._processes = []
        for rank in range(nproc):
            within, described = [], {}
            if nproc > 1:  # one process is a plain `python train.py`, without a process group and without DDP
                described = _described(rank, nproc, port)
            if hosts is not None:
                within = ["ip", "netns", "exec", hosts[rank][0]]
                described |= {"MASTER_ADDR": hosts[0][1], "GLOO_SOCKET_IFNAME": DEVICE}
            self._processes.append(
                subprocess.Popen(
                    [*within, *command],
                    env=environment | described,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
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


def serve(name: str) -> None:
    """Train epochs for the lines that come, in one rank of a contender."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the other libraries give advice on numbers of workers
    answers, sys.stdout = sys.stdout, sys.stderr
    with _world(name) as (rank, world_size):
        run: Epoch | None = None
        case: Case
        for line in sys.stdin:
            word, *rest = json.loads(line)
            if word == "case":
                gc.unfreeze()
                case = Case(*rest)
                run = None  # the model before is free
                run = CONTENDERS[name](_job(case, rank, world_size))
                # The first epoch is a warm-up, too: DDP orders its buckets in the first steps.
                answer = [float(parameter.detach().double().norm()) for parameter in run(0).parameters()]
                gc.collect()
                gc.freeze()  # a later collection looks at new objects only
            else:
                assert run is not None
                if world_size > 1:
                    dist.barrier()
                start = time.perf_counter()
                run(*rest)
                answer = (time.perf_counter() - start) * 1e3 / case.steps
            print(json.dumps(answer), file=answers, flush=True)


@contextmanager
def _world(name: str) -> Iterator[tuple[int, int]]:
    """Join the world in a contender's own way; yield the rank and the world size. `dp.world` also sets a scheduling."""
    if name in ("ddparity", "strict", *WITHOUT):
        WITHOUT.get(name, lambda: None)()
        with dp.world(device="cpu") as world:
            yield world.rank, world.world_size
    elif "RANK" not in os.environ:
        yield 0, 1
    else:
        dist.init_process_group("gloo")
        yield dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()


def _job(case: Case, rank: int, world_size: int) -> Job:
    torch.manual_seed(0)
    kind = KINDS[case.model]
    dataset = kind.samples(case.steps * case.micro_batches * kind.micro_batch * world_size)
    batches: list[Data] = []
    if not case.loads:
        every = list(zip(*(tensor.split(kind.micro_batch) for tensor in dataset.tensors), strict=True))
        batches = [list(batch) for batch in every[rank::world_size]]
    return Job(case, rank, world_size, kind.make(), dataset, batches)


def measured(
    contenders: dict[str, Contender], case: Case, rounds: int, of_others: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Return the milliseconds of a step by contender and round; the order rotates from round to round.

    `of_others`: contenders that train other samples, so that their weights are others.
    """
    models = {name: one.ask("case", *dataclasses.astuple(case)) for name, one in contenders.items()}
    if not case.loads:
        _check_same_work({name: norms for name, norms in models.items() if name not in of_others})
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            times[name].append(contenders[name].ask("epoch", number + 1))
    return times


def _check_same_work(models: dict[str, list[float]]) -> None:
    """Check the norms of all weights, which are equal because without a loader all train on the same batches."""
    for name, norms in models.items():
        for mine, theirs in zip(models["plain"], norms, strict=True):
            assert math.isclose(mine, theirs, rel_tol=1e-4, abs_tol=1e-6), f"{name} trains another model than plain DDP"


if __name__ == "__main__":
    serve(sys.argv[1])

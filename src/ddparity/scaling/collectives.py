"""Measure this machine's collectives, by size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..comm.allreduce import SHORT_BYTES, copies_of_ranks, exchange, mean_over_ranks
from ..comm.broadcast import broadcast
from ..comm.gather import gather
from ..runtime.world import World
from .links import Cost, Kind, Machine, all_gather, all_to_all, ring, slices

LEAST = 5  # rounds
MOST = 200
BLOCK_S = 0.02  # between two barriers, so that the ranks' start does not matter


class Clock:
    """The time of this rank's device."""

    def __init__(self, here: World) -> None:
        self._cuda = here.device.type == "cuda"
        self._device = here.device

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def together(self) -> None:
        """Wait for all ranks."""
        dist.barrier()
        self.now()


def agreed_rounds(one_s: float, seconds: float) -> int:
    """Return how many rounds to run; the same on every rank. `one_s`: what one takes."""
    return int(broadcast(min(MOST, max(LEAST, int(seconds / max(one_s, 1e-9))))))


def agreed_block(one_s: float, seconds: float = BLOCK_S) -> int:
    """Return how many calls to time together; the same on every rank. `one_s`: what one takes."""
    return int(broadcast(max(1, min(50, math.ceil(seconds / max(one_s, 1e-9))))))


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else math.nan


def collectives(
    here: World, gradients: int, seconds: float, clock: Clock
) -> tuple[dict[Kind, list[tuple[float, float]]], Machine]:
    """Return the times of collectives of several sizes, in bytes that a rank sends, and what they fit."""
    ranks, group = here.world_size, dist.group.WORLD
    assert group is not None, "several ranks"
    gloo = here.device.type == "cpu"
    short = [SHORT_BYTES // 512, SHORT_BYTES // 32, SHORT_BYTES // 8, SHORT_BYTES // 2]
    long = sorted({2**17, 2**20, *(max(2**17, min(2**26, gradients // part)) for part in (8, 2, 1))})
    above = [2 * SHORT_BYTES, 8 * SHORT_BYTES]  # where copies are gathered, not sent directly
    sizes: dict[Kind, list[int]] = {"ring": long, "slices": long, "all-gather": above if gloo else short + above}
    if gloo:
        sizes = {"all-to-all": short, **sizes}
    found: dict[Kind, list[tuple[float, float]]] = {}
    budget = seconds / sum(map(len, sizes.values()))
    costs: dict[Kind, Cost] = {}
    for kind, listed in sizes.items():
        pairs = []
        for size in listed:
            buffer = torch.zeros(size // 4, device=here.device)
            traffic = {"ring": ring, "slices": slices, "all-gather": all_gather, "all-to-all": all_to_all}[kind](
                buffer.nbytes, ranks
            )
            pairs.append((traffic.sent_bytes, _time_call(_call(kind, buffer, group), budget, clock)))
        found[kind] = pairs
        fixed, each = fit_line(*zip(*pairs, strict=True))
        costs[kind] = Cost(fixed, each, traffic.rounds, traffic.messages)
    message_s = _message_s(here, group, budget, clock)
    return found, Machine(costs, message_s, gloo)


def _call(kind: Kind, buffer: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], Any]:
    if kind == "ring":
        return lambda: dist.all_reduce(buffer, group=group)
    if kind == "all-to-all":
        return lambda: mean_over_ranks(buffer, group)
    if kind == "all-gather":
        return lambda: copies_of_ranks(buffer, group)
    ranks, rank = group.size(), group.rank()
    piece = -(-buffer.numel() // ranks)
    own, parts, total = buffer.new_zeros(3, ranks, piece)

    def call() -> None:
        exchange([[one] for one in own], [[one] for one in parts], group)
        total[rank] = parts.sum(0)
        exchange([[total[rank]]] * ranks, [[one] for one in total], group)

    return call


def _time_call(call: Callable[[], Any], seconds: float, clock: Clock) -> float:
    """Return the median seconds of a call, the mean of the ranks."""
    for _ in range(3):
        call()
    clock.together()
    began = clock.now()
    call()
    each = clock.now() - began
    block = agreed_block(each, BLOCK_S / 4)
    times = []
    for _ in range(agreed_rounds(each * block, seconds)):
        clock.together()
        began = clock.now()
        for _ in range(block):
            call()
        times.append((clock.now() - began) / block)
    return float(np.mean(gather(median(times), to="all")))


def _message_s(here: World, group: dist.ProcessGroup, seconds: float, clock: Clock) -> float:
    """Return what one more message of an exchange takes, from sending one and nine to the next rank."""
    own, theirs = torch.zeros(2, 9, 64, device=here.device)
    ranks, rank = here.world_size, here.rank

    def send(count: int) -> Callable[[], None]:
        def call() -> None:
            moves = []
            for number in range(count):
                moves.append(dist.P2POp(dist.irecv, theirs[number], (rank - 1) % ranks, group))
                moves.append(dist.P2POp(dist.isend, own[number], (rank + 1) % ranks, group))
            for work in dist.batch_isend_irecv(moves):
                work.wait()

        return call

    one, nine = (_time_call(send(count), seconds, clock) for count in (1, 9))
    return max(0.0, nine - one) / 8


def fit_line(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Return a and b of a + b · size, neither negative, with the least sum of squared relative errors."""
    x, t = np.asarray(sizes, dtype=np.float64), np.asarray(times, dtype=np.float64)
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / t, x / t], 1), np.ones(len(t)), rcond=None)
    if a < 0:
        return 0.0, float((x / t).sum() / ((x / t) ** 2).sum())
    if b < 0:
        return float((1 / t).sum() / (1 / t**2).sum()), 0.0
    return float(a), float(b)

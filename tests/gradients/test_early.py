"""When the averages of a large model's gradients start: in the last backward, in parts, in one order on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.gradients import early
from tests.ranks import run_ranks

SMALL = 2**12  # in place of 8 MiB, so that the test is quick
WIDTH = 32  # a square float32 matrix of so many bytes
Start = tuple[int, int, bool]  # how many gradients there were, the layers of the part, and whether in a backward


class _Layers(nn.Module):
    """Square layers without a bias; a forward uses those that it is asked for, in their order."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, width, width, bias=False) for _ in range(count))
        for number, layer in enumerate(self.layers):
            nn.init.constant_(layer.weight, (1 + number / count) / width)

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        for number in order:
            x = self.layers[number](x).tanh()
        return x


class _Watched:
    """A replicated model, and when its averages start."""

    def __init__(self, count: int, width: int, **options: Any) -> None:
        self.net, self.plain = _Layers(count, width), _Layers(count, width)
        self.model = dp.replicate(self.net, **options)
        self.starts: list[Start] = []
        self.in_backward = False
        start_sum = early.start_sum

        def watched(tensor: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
            gradients = [one for one in self.net.parameters() if one.grad is not None]
            self.starts.append((len(gradients), tensor.numel() // width**2, self.in_backward))
            return start_sum(tensor, group)

        early.start_sum = watched

    def step(self, orders: list[list[int]], micro_batches: int = 1, edits: bool = False) -> list[Start]:
        """Train with the orders of the ranks. Check the gradients, and return what has started."""
        self.starts.clear()
        for net in (self.net, self.plain):
            net.zero_grad()
        width = self.net.layers[0].in_features
        data = [[torch.full((1, width), 1.0 + rank + 2 * n) for n in range(micro_batches)] for rank in (0, 1)]
        for micro in dp.accumulate(self.model, data[dist.get_rank()], equal_counts=True):
            loss = self.model(micro.data, orders[dist.get_rank()]).mean() * micro.weight
            self.in_backward = True
            loss.backward()
            self.in_backward = False
            if edits and dist.get_rank() == 1:
                for parameter in self.net.parameters():
                    parameter.grad.mul_(2)
        for rank, order in enumerate(orders):
            factor = 2 if edits and rank == 1 else 1
            for x in data[rank]:
                (self.plain(x, order).mean() * factor / (2 * micro_batches)).backward()
        for ours, expected in zip(self.net.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad)
        return list(self.starts)


def _parts() -> list[list[Start]]:
    """The layers are used in their order, so that the backward ends with the first one."""
    early.SMALL_BYTES = SMALL
    found = []
    for count, width, options in (
        (6, WIDTH, {}),
        (16, WIDTH, {}),
        (16, WIDTH, {"bucket_cap_mb": SMALL / 2**20}),
        (4, WIDTH // 2, {}),
        (5, WIDTH // 2, {}),
        (32, 4, {"bucket_cap_mb": 128 / 2**20}),
        (2, 4, {"bucket_cap_mb": 128 / 2**20}),
        (1, WIDTH + 1, {}),
    ):
        watched = _Watched(count, width, **options)
        orders = [list(range(count))] * 2
        found.append(watched.step(orders, 2))
        assert watched.step(orders, 2) == found[-1]
    return found


def test_a_large_model_is_averaged_in_parts_in_the_last_backward() -> None:
    for found in run_ranks(_parts, 2):
        assert found == [
            # In the last of two backwards, in which every gradient is there from the first one.
            [(6, 1, True)] * 5,
            [(16, 2, True)] * 7,  # an eighth of the model each
            [(16, 1, True)] * 15,
            [],  # as small as that: one exchange after the loop is faster
            [(5, 1, True)] * 4,
            [(32, 2, True)] * 15,
            [],
            [],  # a single part has no backward left to overlap with
        ]


def _orders() -> list[list[Start]]:
    watched = _Watched(6, 4, bucket_cap_mb=1e-5)
    up, down, two_left_out = [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [5, 3, 1, 0]
    found = [
        watched.step([down, down]),  # as if the layers were used in the order in which they were made
        watched.step([down, down]),  # in the order of the backward
        watched.step([down, up]),
    ]
    watched = _Watched(6, 4, bucket_cap_mb=1e-5)
    found.append(watched.step([two_left_out, down]))
    found.append(watched.step([two_left_out, down]))
    found.append(watched.step([down, down]))  # nothing of the steps before is left
    return found


def test_the_order_is_that_of_rank_0s_first_backward() -> None:
    zero, one = run_ranks(_orders, 2)
    one_by_one = [(number, 1, True) for number in range(1, 6)]
    at_the_end = [(6, 1, True)] * 5
    assert zero[:3] == [at_the_end, one_by_one, one_by_one]
    assert one[:3] == [at_the_end, one_by_one, at_the_end]
    # Layers 4 and 2 have no gradient on rank 0. They come last, and layer 2 is not started early.
    assert zero[3] == [(4, 1, True), *[(4, 1, False)] * 4]
    assert zero[4] == [(1, 1, True), (2, 1, True), (3, 1, True), (4, 1, True), (4, 1, False)]
    assert one[3] == at_the_end
    assert zero[5] == one[5] == one[4] == [(1, 1, True), (2, 1, True), (4, 1, True), (6, 1, True), (6, 1, True)]


def _in_vain() -> list[list[Start]]:
    watched = _Watched(3, 4, bucket_cap_mb=1e-5)
    orders = [[0, 1, 2]] * 2
    found = [watched.step(orders), watched.step(orders, edits=True)]
    found += [watched.step(orders) for _ in range(early.LATE_STEPS + 2)]
    return found


def test_after_an_average_in_vain_none_starts_early_for_a_while() -> None:
    """The gradients are edited after the backward, on one rank only."""
    started = [(1, 1, True), (2, 1, True)]
    for found in run_ranks(_in_vain, 2):
        assert found == [started, started, *[[]] * early.LATE_STEPS, started, started]


def _edits_through_data() -> list[float]:
    """One number of a small gradient is written through `.data` in a late step, on rank 1."""
    watched = _Watched(3, 4, bucket_cap_mb=1e-5)
    orders = [[0, 1, 2]] * 2
    for _ in range(2 * early.CAREFUL_STEPS):
        watched.step(orders)
    watched.net.zero_grad()
    weight = watched.net.layers[2].weight  # the first in the backward
    for micro in dp.accumulate(watched.model, [torch.ones(1, 4)], equal_counts=True):
        watched.model(micro.data, orders[0]).sum().backward()
        expected = weight.grad.flatten()[1].item() + dist.get_rank()
        weight.grad.data.view(-1)[1] = expected
    return [weight.grad.flatten()[1].item(), expected]


def test_every_number_of_a_small_gradient_is_compared() -> None:
    (found, zero), (also, one) = run_ranks(_edits_through_data, 2)
    assert found == also == pytest.approx((zero + one) / 2) and one == zero + 1

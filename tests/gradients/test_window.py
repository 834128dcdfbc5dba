"""What a step holds back and lets go of again, on 2 processes."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddparity as dp
from ddparity.gradients.aside import Aside
from ddparity.gradients.incomplete import scale_of_rest
from ddparity.gradients.window import Window
from tests.ranks import run_ranks

ONE = [torch.ones(1, 1)]


def _step(model: nn.Module, others: list[nn.Module]) -> None:
    for micro in dp.accumulate(model, ONE, equal_counts=True):
        loss = model(micro.data).sum()
        for other in others:
            loss = loss + (1 + dist.get_rank()) * other(micro.data).sum()
        (loss * micro.weight).backward()


def _many_others() -> tuple[list[float], str]:
    """The losses run other replicated models: the second of two at first, then 16 of 17, then all."""
    model, *others = [dp.replicate(nn.Linear(1, 1, bias=False)) for _ in range(18)]
    _step(model, others[1:2])
    gradients = [others[0].module.weight.grad is None, others[1].module.weight.grad.item()]
    for one in others:
        one.zero_grad()
    _step(model, others[1:])
    gradients += [one.module.weight.grad.item() for one in others[1:]]
    with pytest.raises(
        ValueError, match=r"17 replicated models besides .* more than 16: give them in the list"
    ) as told:
        _step(model, others)
    return gradients, str(told.value)


def test_a_loss_may_run_sixteen_other_models() -> None:
    for gradients, _ in run_ranks(_many_others, 2):
        assert gradients == [True, 1.5] + [1.5] * 16


def _after_another() -> list[int]:
    """Rank 0 keeps the first of two models for longer; each rank tells in how many steps of the second it asked."""
    asked = []
    first, second = (dp.replicate(nn.Linear(1, 1, bias=False)) for _ in range(2))
    _step(second, [first])  # a step that runs both
    asking = Window._touched_anywhere

    def counted(self: Window, *arguments: Any) -> list[int]:
        asked.append(1)
        return asking(self, *arguments)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Window, "_touched_anywhere", counted)
        kept = [first] * (dist.get_rank() == 0)
        del first
        for _ in range(2):
            gc.collect()
            for _ in range(3):
                _step(second, [])
            found.append(len(asked))
            kept.clear()
    third = dp.replicate(nn.Linear(1, 1, bias=False))  # it is asked for again, and found
    second.zero_grad()
    _step(second, [third])
    assert third.module.weight.grad.item() == 1.5
    return found


def test_a_model_that_is_gone_on_every_rank_is_not_asked_for() -> None:
    assert run_ranks(_after_another, 2) == [[3, 4]] * 2


def _plain_again() -> Any:
    """Plain DDP after the loop, as after no_sync(): it broadcasts buffers from its second forward on, and averages."""
    model = dp.replicate(nn.BatchNorm1d(1, affine=True), batchnorm_statistics="rank0")
    x = torch.tensor([[0.0], [2.0 + 2 * dist.get_rank()]])
    for micro in dp.accumulate(model, [x], equal_counts=True):
        (model(micro.data).sum() * micro.weight).backward()
    flags = model.broadcast_buffers, model.require_backward_grad_sync
    model(x)
    model.module.running_mean.fill_(dist.get_rank())
    model.zero_grad()
    ((1.0 + dist.get_rank()) * model(x).sum()).backward()
    return flags, model.module.running_mean.item(), model.module.bias.grad.item()


def test_after_the_loop_the_model_is_plain_ddp() -> None:
    # The mean moves from rank 0's 0 by a tenth of this rank's own; the bias has 2 samples, times 1 and 2.
    zero, one = run_ranks(_plain_again, 2)
    assert zero == ((True, True), pytest.approx(0.1), 3.0)
    assert one == ((True, True), pytest.approx(0.2), 3.0)


def _left_to_ddp() -> bool:
    """A foreign DDP that does not broadcast does not begin to."""
    model = DistributedDataParallel(nn.BatchNorm1d(1), broadcast_buffers=False)
    for micro in dp.accumulate(model, [torch.tensor([[0.0], [1.0]])], equal_counts=True):
        (model(micro.data).sum() * micro.weight).backward()
    return model.broadcast_buffers


@pytest.mark.filterwarnings("ignore:.*broadcast_buffers")
def test_what_ddp_was_asked_for_stays() -> None:
    assert run_ranks(_left_to_ddp, 2) == [False, False]


def _differ_after(every: int) -> list[tuple[int, str]]:
    """The ranks' weights differ from the first step on."""
    model = dp.replicate(nn.Linear(1, 1, bias=False), check_every=every)
    found = []
    for step in range(1, 7):
        try:
            _step(model, [])
        except dp.DDParityError as error:
            found.append((step, str(error)[:40]))
        with torch.no_grad():
            model.module.weight.add_(dist.get_rank())
        model.zero_grad()
    return found


def test_the_ranks_are_compared_as_often_as_asked() -> None:
    for every, steps in ((3, [3, 6]), (2, [2, 4, 6]), (0, [])):
        expected = [(step, "accumulate(): weight differs between ran") for step in steps]
        assert run_ranks(_differ_after, 2, every) == [expected] * 2


def _halves(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return work.then(lambda done: done.value()[0] / 4)


def _hooked() -> list[float]:
    """A communication hook that averages and halves; rank 1 leaves out its last micro-batch."""
    model = DistributedDataParallel(nn.Linear(1, 1, bias=False))
    model.register_comm_hook(None, lambda _, bucket: _halves(bucket))
    found = []
    for _ in range(2):
        for micro in dp.accumulate(model, [torch.ones(1, 1), torch.full((1, 1), 3.0)], equal_counts=True):
            if micro.index != 1 or dist.get_rank() == 0:
                (model(micro.data).sum() * micro.weight).backward()
        found.append(model.module.weight.grad.item())
        model.zero_grad()
    return found


def test_a_rank_without_a_last_backward_does_not_hang_a_communication_hook() -> None:
    # (1 + 3) / 4 of rank 0 and 1 / 4 of rank 1, halved.
    assert run_ranks(_hooked, 2, timeout_s=20) == [[0.625, 0.625]] * 2


def test_the_weights_that_are_left_sum_to_one() -> None:
    assert scale_of_rest([0.25, 0.25], (4,), None, None) == 2.0
    assert scale_of_rest([], (4,), None, None) == 1.0
    assert scale_of_rest([0.5, 0.5], (2,), None, None) == 1.0  # none is left


def test_what_parameters_had_before_is_added_again() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    for parameter in parameters[:2]:
        parameter.grad = torch.full((1,), 2.0)
    aside = Aside(parameters)
    for parameter in parameters[::2]:
        parameter.backward(torch.ones(1))
    aside.settle()
    assert [None if one.grad is None else one.grad.item() for one in parameters] == [1.0, None, 1.0, None]
    aside.put_back()
    assert [None if one.grad is None else one.grad.item() for one in parameters] == [3.0, 2.0, 1.0, None]

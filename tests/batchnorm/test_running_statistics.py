"""Tests that running statistics of plain batch norms equal those of one process, which runs all micro-batches."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import ddparity as dp
from ddparity.batchnorm.running_statistics import _wrote
from ddparity.compat import unwrapped
from tests.gradients.strict_cases import (
    Case,
    Checkpointed,
    Frozen,
    Sometimes,
    WithBuffer,
    cnn,
    image_loss,
    sgd,
    train,
    without_dropout,
)
from tests.ranks import outcomes, run_ranks


def _cumulative() -> nn.Module:
    return cnn(momentum=None)


def _in_double(model: nn.Module, data: Any) -> torch.Tensor:
    return F.cross_entropy(model(data[0].double()), data[1])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": cnn,
    "cumulative": _cumulative,
    "twice, or not at all": Sometimes,
    "checkpointing": Checkpointed,
    "reentrant checkpointing": lambda: Checkpointed(use_reentrant=True),
    "frozen": Frozen,
    "a user's buffer": WithBuffer,
}
UNUSED = {"find_unused_parameters": True}
CASES = {
    # Not Adam: it enlarges rounding errors of zero gradients, for example of a bias before a batch norm.
    name: Case(make, sgd, loss=_in_double, options=UNUSED if make is Sometimes else {})
    for name, make in MODELS.items()
}
CASES["foreign batches"] = Case(lambda: without_dropout(cnn()), sgd, loss=_in_double, foreign=True)


def _double(case: Case) -> Case:
    return dataclasses.replace(case, model=lambda: case.model().double())


def _buffers(reduction: str) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {key: value.clone() for key, value in train(_double(case), reduction=reduction).named_buffers()}
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def torchs_own() -> dict[str, dict[str, torch.Tensor]]:
    """Return the oracle: in one process, torch itself does all of "fast"."""
    return run_ranks(_buffers, 1, "fast")[0]


@pytest.mark.parametrize(("world_size", "reduction"), [(1, "strict"), (2, "fast"), (3, "fast")])
def test_running_statistics_equal_those_of_one_process(world_size: int, reduction: str, torchs_own) -> None:
    for found in run_ranks(_buffers, world_size, reduction):
        for name, buffers in found.items():
            for key, value in buffers.items():
                expected = torchs_own[name][key]
                if expected.is_floating_point():
                    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13, msg=f"{name}: {key}")
                else:
                    assert torch.equal(value, expected), f"{name}: {key}"
        assert found["frozen"]["net.1.num_batches_tracked"] == 0
        assert found["twice, or not at all"]["norm.num_batches_tracked"] not in (0, 2 * 13, 13)


def _with_fixed_weights(reduction: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Train with fixed weights, so that both reductions see the same batches and differ only in the update."""

    def unmoved(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)

    def loss(model: nn.Module, data: Any) -> torch.Tensor:
        return image_loss(model, (data[0].to(dtype), data[1]))

    return [
        buffer.clone()
        for make in (cnn, _cumulative)
        for buffer in train(Case(lambda make=make: make().to(dtype), unmoved, loss=loss), reduction=reduction).buffers()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_replay_differs_from_torch_at_most_in_the_last_digits(dtype: torch.dtype) -> None:
    (torchs,) = run_ranks(_with_fixed_weights, 1, "fast", dtype)
    (ours,) = run_ranks(_with_fixed_weights, 1, "strict", dtype)
    on_two = run_ranks(_with_fixed_weights, 2, "fast", dtype)
    for a, b, c, d in zip(torchs, ours, *on_two, strict=True):
        assert torch.equal(b, c) and torch.equal(b, d)
        torch.testing.assert_close(a, b, rtol=8 * torch.finfo(dtype).eps, atol=0)


def _rank_0s() -> tuple[float, float]:
    found = []
    for statistics in ("all", "rank0"):
        case = Case(cnn, sgd, options={"batchnorm_statistics": statistics}, drop_last=True)
        found.append(train(case, reduction="fast")[1].num_batches_tracked.item())
    return found[0], found[1]


def test_the_statistics_of_rank_0_are_those_of_ddp() -> None:
    assert run_ranks(_rank_0s, 2) == [(24, 12), (24, 12)]  # 2 epochs of 3 steps of 4 micro-batches


def _between_steps() -> list[torch.Tensor]:
    """Run forwards outside `accumulate`, which update the statistics of one rank, as in the training of a GAN."""
    model = dp.replicate(cnn(momentum=None), broadcast_buffers=False)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        with torch.no_grad():
            model(torch.randn(4, 3, 8, 8, generator=generator))
            if dist.get_rank() == 1:
                model.module(torch.randn(4, 3, 8, 8, generator=generator))
        for micro in dp.accumulate(model, torch.ones(2, 2, 3, 8, 8), equal_counts=True):
            model(micro.data).mean().backward()
        model.zero_grad()
    return [buffer.clone() for buffer in model.buffers()]


def test_different_statistics_of_ranks_become_those_of_rank_0() -> None:
    first, second = run_ranks(_between_steps, 2)
    assert all(map(torch.equal, first, second))
    assert first[2] == 2 * (1 + 2 * 2)  # rank 0 counts its own batches outside, and all batches inside


# --- collectives ---


class _Shared(nn.Module):
    """A forward runs one layer several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.norm(x)
        return x


def _collectives(make: Callable[[], nn.Module], reduction: str) -> list[dict[str, int]]:
    model = dp.replicate(make(), reduction=reduction)
    found = []
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for micro in dp.accumulate(model, torch.ones(2, 4, 3), equal_counts=True):
                (model(micro.data).mean() * micro.weight).backward()
        found.append({e.key: e.count for e in profiler.key_averages() if e.key.startswith("gloo:")})
        model.zero_grad()
    return found


def _linear() -> nn.Module:
    return nn.Linear(3, 3)


def _once() -> nn.Module:
    return _Shared(1)


def _three_times() -> nn.Module:
    return _Shared(3)


def _evaluating() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval())


def _without_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))


@pytest.mark.parametrize(
    ("make", "collectives"),
    [
        (_linear, [1, 1, 1]),
        (_without_statistics, [1, 1, 1]),
        (_evaluating, [1, 1, 1]),
        (_once, [2, 2, 2]),
        (_three_times, [3, 2, 2]),  # the first step finds out how much room it needs
    ],
)
def test_one_collective_a_step(make, collectives: list[int]) -> None:
    for found in run_ranks(_collectives, 2, make, "strict"):
        assert [counts.pop("gloo:all_to_all") for counts in found] == collectives
        if make is not _evaluating:  # DDP broadcasts the buffers of other layers
            assert found == [{}] * 3


# --- the user's layers do not change ---


def _strict(layer: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    model = dp.replicate(nn.Sequential(layer), reduction="strict")
    return model, _state(layer)


def _state(layer: nn.Module) -> dict[str, Any]:
    hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks) + len(layer._forward_hooks_always_called)
    return {**{name: id(buffer) for name, buffer in layer.named_buffers()}, "momentum": layer.momentum, "hooks": hooks}


class _Interrupted(nn.BatchNorm1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        super().forward(input)
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, StopAsyncIteration])
def test_a_layer_has_its_own_state_again_after_the_step(error: type[BaseException] | None) -> None:
    layer = (_Interrupted if error is KeyboardInterrupt else nn.BatchNorm1d)(3)
    model, before = _strict(layer)
    running = layer.running_mean
    steps = dp.accumulate(model, [torch.randn(4, 3), torch.randn(4, 3)])
    micro = next(steps)
    assert layer.momentum == 0.1
    if error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            model(micro.data if error is KeyboardInterrupt else torch.ones(3))
        steps.close()
    elif error is not None:
        model(micro.data).mean().backward()
        with pytest.raises(StopAsyncIteration):
            steps.throw(StopAsyncIteration)
    else:
        for _ in range(2):
            model(micro.data).mean().backward()
            assert running.eq(0).all()  # they are updated after the loop
            micro = next(steps, None)
        assert running.ne(0).all()
    assert _state(layer) == before
    assert running.ne(0).any() == (error is None)


def test_an_unfinished_loop_does_not_change_the_next_one() -> None:
    layer = nn.BatchNorm1d(3)
    model, before = _strict(layer)
    x = torch.randn(2, 4, 3)
    unfinished = dp.accumulate(model, x)
    next(unfinished)
    for micro in dp.accumulate(model, x):
        (model(micro.data).mean() * micro.weight).backward()
    expected = nn.BatchNorm1d(3)
    for part in x:
        expected(part)
    torch.testing.assert_close(layer.running_var, expected.running_var)
    torch.testing.assert_close(layer.running_mean, expected.running_mean)
    assert _state(layer) == before
    assert layer.num_batches_tracked == 2


class _NormalisesByRunningStatistics(nn.BatchNorm1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def test_a_forward_that_writes_no_statistics_records_none() -> None:
    x = torch.randn(2, 4, 3)
    layer = _NormalisesByRunningStatistics(3)
    model, before = _strict(layer)
    for micro in dp.accumulate(model, x):
        (model(micro.data).square().mean() * micro.weight).backward()
    assert layer.running_mean.eq(0).all() and layer.running_var.eq(1).all() and layer.num_batches_tracked == 0
    assert _state(layer) == before


def test_a_forward_in_inference_mode_counts_as_in_torch() -> None:
    layer, expected = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    model, _ = _strict(layer)
    x = torch.randn(2, 4, 3)
    for micro in dp.accumulate(model, x):
        with torch.inference_mode():
            model(micro.data + 1)
            expected(micro.data + 1)
        (model(micro.data).mean() * micro.weight).backward()
        expected(micro.data)
    torch.testing.assert_close(layer.running_var, expected.running_var)
    torch.testing.assert_close(layer.running_mean, expected.running_mean)
    assert layer.num_batches_tracked == 4


def test_an_evaluation_inside_a_step_uses_the_statistics_before_the_step() -> None:
    layer = nn.BatchNorm1d(3)
    model, _ = _strict(layer)
    x = torch.randn(4, 3)
    for micro in dp.accumulate(model, [x, x]):
        model(micro.data).mean().backward()
        layer.eval()
        torch.testing.assert_close(model(x), x, rtol=1e-4, atol=1e-4)
        layer.train()
    assert layer.num_batches_tracked == 2


def test_layers_without_a_batch_count() -> None:
    """torch does not update the statistics if the momentum is None and the batches are not counted."""
    for momentum in (0.3, None):
        layer, expected = nn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
        layer.num_batches_tracked = expected.num_batches_tracked = None
        model, _ = _strict(layer)
        x = torch.randn(2, 4, 3)
        for micro in dp.accumulate(model, x):
            model(micro.data).mean().backward()
            expected(micro.data)
        torch.testing.assert_close(layer.running_var, expected.running_var)


def _half(dtype: torch.dtype) -> torch.Tensor:
    """Send buffers of several dtypes in one collective."""
    model = dp.replicate(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).to(dtype)), reduction="strict")
    x = torch.arange(24.0).view(2, 4, 3)
    rank, size = dist.get_rank(), 2 // dist.get_world_size()
    for micro in dp.accumulate(model, x[rank * size : (rank + 1) * size], equal_counts=True):
        net = unwrapped(model)
        (net[0](micro.data).sum() + net[1](micro.data.to(dtype)).sum()).backward()
    return torch.cat([buffer.flatten().double() for buffer in model.buffers()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_layers_of_several_dtypes(dtype: torch.dtype) -> None:
    (alone,) = run_ranks(_half, 1, dtype)
    assert all(torch.equal(found, alone) for found in run_ranks(_half, 2, dtype))
    assert alone.unique().numel() > 8


def _lazy() -> bool:
    model = dp.replicate(nn.Sequential(nn.LazyBatchNorm1d()), reduction="strict")
    for micro in dp.accumulate(model, torch.randn(2, 4, 3)):
        model(micro.data).mean().backward()
    return bool(model[0].running_mean.ne(0).all())


def test_torch_updates_a_lazy_layer_in_its_first_step() -> None:
    assert run_ranks(_lazy, 1) == [True]


def _compiled(reduction: str) -> tuple[int, list[str]]:
    net = cnn()
    net.compile(backend="eager")
    model = dp.replicate(net, reduction=reduction)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("ddparity").addHandler(handler)
    for _ in range(2):
        for micro in dp.accumulate(model, torch.randn(2, 2, 3, 8, 8), equal_counts=True):
            model(micro.data).mean().backward()
    return net[1].num_batches_tracked.item(), told


def test_a_compiled_layer_raises_an_error_or_logs_a_warning() -> None:
    (count, told), (_, others) = run_ranks(_compiled, 2, "fast")
    assert count == 4
    assert told == ["the model is compiled, and a batch norm inside of a graph does not tell a batch's statistics: its "
                    "running statistics are rank 0's"]  # fmt: skip
    assert others == []
    for outcome in outcomes(_compiled, 2, "strict"):
        assert outcome.error.startswith("ValueError: accumulate(): the model is compiled")
        assert 'batchnorm_statistics="rank0"' in outcome.error


# --- whether a forward wrote statistics ---


@pytest.mark.parametrize(
    ("changed", "counted", "failed", "wrote"),
    [
        ("", True, False, True),  # torch's batch norm: it changes the values without a new version of the tensors
        ("", False, False, False),
        ("", True, True, False),  # it counted the batch, and failed before the statistics
        ("mean", True, True, True),
        ("var", True, True, True),
        ("", None, False, False),
        ("mean", None, False, True),
        ("var", None, False, True),
        ("mean again", False, False, True),
        ("var again", False, False, True),
        ("mean replaced", False, False, True),
        ("var replaced", False, False, True),
    ],
)
def test_whether_a_forward_wrote(changed: str, counted: bool | None, failed: bool, wrote: bool) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    after = {"mean": mean.clone(), "var": var.clone()}
    copies = after["mean"], after["var"]
    count = None if counted is None else torch.tensor(0)
    if counted:
        count.add_(1)
    name, _, how = changed.partition(" ")
    if how == "again":
        after[name].copy_(after[name])  # the same values
    elif how == "replaced":
        after[name] = after[name].clone()
    elif name:
        after[name].data.add_(1)
    before = (mean, var, count, 0.1), copies
    assert _wrote(before, (after["mean"], after["var"]), count, failed) == wrote


# --- subclasses with a forward of their own ---


class _AlwaysFrozen(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _Manual(nn.BatchNorm2d):
    """Replaces its buffers by new ones, as a widely copied forward does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        mean, var = input.mean((0, 2, 3)), input.var((0, 2, 3), unbiased=False)
        if self.training:
            self.num_batches_tracked += 1
            correction = (input.numel() / input.shape[1]) / (input.numel() / input.shape[1] - 1)
            with torch.no_grad():
                self.running_mean = self.momentum * mean + (1 - self.momentum) * self.running_mean
                self.running_var = self.momentum * var * correction + (1 - self.momentum) * self.running_var
        return (input - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt() * self.weight[:, None, None]


class _Renormalised(nn.BatchNorm2d):
    """Batch renormalisation: its output depends on the running statistics, in training, too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        mean, var = input.mean((0, 2, 3)), input.var((0, 2, 3), unbiased=False) + self.eps
        running = (self.running_var + self.eps).sqrt()
        scale = (var.sqrt().detach() / running).clamp(1 / 3, 3)
        shift = ((mean.detach() - self.running_mean) / running).clamp(-5, 5)
        self.num_batches_tracked += 1
        with torch.no_grad():
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (var - self.running_var)
        out = (input - mean[:, None, None]) / var.sqrt()[:, None, None] * scale[:, None, None] + shift[:, None, None]
        return out * self.weight[:, None, None] + self.bias[:, None, None]


def _momentum_0(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, momentum=0.0)


SUBCLASSES = {"frozen": _AlwaysFrozen, "manual": _Manual, "renormalised": _Renormalised, "momentum 0": _momentum_0}
PICTURES = torch.randn(8, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1


def _with_norm(make: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), make(4), nn.Flatten(), nn.Linear(16, 1)).double()
    net[1].running_mean.fill_(0.3)
    net[1].running_var.fill_(2.0)
    return net


def _of_one_step(net: nn.Module) -> list[torch.Tensor]:
    gradients = [one.grad.clone() for one in net.parameters() if one.grad is not None]
    return gradients + [buffer.clone().double() for buffer in net.buffers()]


def _train_subclasses(reduction: str) -> dict[str, list[torch.Tensor]]:
    found = {}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = PICTURES[rank * 8 // world_size : (rank + 1) * 8 // world_size]
    for name, make in SUBCLASSES.items():
        net = _with_norm(make)
        # Not every layer uses its bias.
        model = dp.replicate(net, reduction=reduction, find_unused_parameters=True)
        for micro in dp.accumulate(model, list(own)):
            (model(micro.data).square().mean() * micro.weight).backward()
        found[name] = _of_one_step(net)
    return found


@pytest.mark.parametrize("reduction", ["fast", "strict"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_subclasses_are_as_on_one_process(world_size: int, reduction: str) -> None:
    for found in run_ranks(_train_subclasses, world_size, reduction, timeout_s=30):
        for name, make in SUBCLASSES.items():
            net, moving = _with_norm(make), _with_norm(make)
            for x in PICTURES:
                if world_size > 1 or reduction == "strict":  # each micro-batch sees the statistics of the step's start
                    net.load_state_dict(_with_norm(make).state_dict())
                (net(x).square().mean() / len(PICTURES)).backward()
                moving(x)
            net.load_state_dict(moving.state_dict())
            for ours, expected in zip(found[name], _of_one_step(net), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14, msg=name)


def _same_batch_again() -> tuple[torch.Tensor, torch.Tensor]:
    """A checkpointed norm sees a batch whose statistics are its running statistics already, on the last rank."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=None)).double()
    model = dp.replicate(inner)
    x = torch.arange(12, dtype=torch.float64).view(4, 3).square()
    for _ in range(2):
        for micro in dp.accumulate(model, [x] if dist.get_rank() == dist.get_world_size() - 1 else []):
            out = torch.utils.checkpoint.checkpoint(model, micro.data, use_reentrant=False)
            (out.square().mean() * micro.weight).backward()
    norm = inner[1]
    return norm.num_batches_tracked, norm.running_mean


def test_a_recomputed_batch_counts_where_its_statistics_are_the_running_ones() -> None:
    ((counted, mean),) = run_ranks(_same_batch_again, 1)
    assert counted == 4  # torch counts a recomputed forward, too
    for other, its_mean in run_ranks(_same_batch_again, 2):
        assert other == counted
        torch.testing.assert_close(its_mean, mean, rtol=1e-12, atol=0)

"""Tests that running statistics of plain batch norms equal those of one process, which runs all micro-batches."""

from __future__ import annotations

import copy
import dataclasses
import io
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
from ddparity.batchnorm.norm_forwards import _wrote
from ddparity.compat import unwrapped
from ddparity.data.step import LoadedMicroBatch
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


class _Unfrozen(nn.Module):
    """Its norm sets itself to train mode in the forwards of some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.steps = nn.BatchNorm1d(3).eval(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.norm.train(self.steps > 4)  # the third step, of 2 forwards each
        return self.norm(x)


def _unfrozen() -> nn.Module:
    return _Unfrozen()


def _without_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))


@pytest.mark.parametrize(
    ("make", "collectives"),
    [
        (_linear, [1, 1, 1]),
        (_without_statistics, [1, 1, 1]),
        (_evaluating, [2, 2, 2]),  # a header, since the loop may set layers to train mode
        (_unfrozen, [2, 2, 3]),  # a layer that did not run in the step before is sent after the header
        (_once, [2, 2, 2]),
        (_three_times, [3, 2, 2]),  # the first step finds out how much room it needs
    ],
)
def test_one_collective_a_step(make, collectives: list[int]) -> None:
    for found in run_ranks(_collectives, 2, make, "strict"):
        assert [counts.pop("gloo:all_to_all") for counts in found] == collectives
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


# --- what a loop may do with the layers ---

ROWS = torch.randn(6, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1


class _Ghost(nn.BatchNorm1d):
    """Updates several times in a forward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(_Ghost, self).forward(part) for part in (input, input * 2)])


class _OfTheRest(nn.BatchNorm1d):
    """Updates by 1 - momentum, as TensorFlow's momentum means."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.num_batches_tracked += 1
        rest = 1 - self.momentum
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, rest, self.eps)


class _OfAConstant(nn.BatchNorm1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.num_batches_tracked += 1
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, 0.3, self.eps)


class _OfASquare(nn.BatchNorm1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.num_batches_tracked += 1
        square = self.momentum**2
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, square, self.eps)


class _ByDifference(nn.BatchNorm1d):
    """Updates as torch does, with other operations and a random number that it does not use."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(input, 0)
        torch.rand(1)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (var - self.running_var)
        return F.dropout((input - mean) / (var + self.eps).sqrt() * self.weight, 0.5)


def _small(kind: type[nn.BatchNorm1d] = nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4, bias=False), kind(4), nn.Tanh(), nn.Linear(4, 1)).double()


def _plainly(model: nn.Module, net: nn.Module, micro: Any) -> torch.Tensor:
    return model(micro.data)


def _set_to_train(model: nn.Module, net: nn.Module, micro: Any) -> torch.Tensor:
    model.train()
    return model(micro.data)


def _evaluated(model: nn.Module) -> None:
    model.eval()


def _copied(model: nn.Module, net: nn.Module, micro: Any) -> torch.Tensor:
    copy.deepcopy(net)(micro.data + 1)
    _pickled(net)(micro.data + 2)
    return model(micro.data)


def _pickled(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    assert b"ddparity." not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


def _functional(model: nn.Module, net: nn.Module, micro: Any) -> torch.Tensor:
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    torch.func.functional_call(net, buffers, (micro.data + 1,))
    assert buffers["1.num_batches_tracked"] == net[1].num_batches_tracked + 1
    return model(micro.data)


def _of_momentum(model: nn.Module, net: nn.Module, micro: Any) -> torch.Tensor:
    net[1].momentum = 0.4
    return model(micro.data)


def _none(model: nn.Module) -> None:
    pass


# name: the layer, what is done before a loop, the loop's forward
KEPT: dict[str, tuple[type[nn.BatchNorm1d], Callable[[Any], None], Callable[[Any, Any, Any], torch.Tensor]]] = {
    "train() inside of the loop": (nn.BatchNorm1d, _evaluated, _set_to_train),
    "copies and pickles": (nn.BatchNorm1d, _none, _copied),
    "functional_call with buffers": (nn.BatchNorm1d, _none, _functional),
    "a momentum set inside of the loop": (nn.BatchNorm1d, _none, _of_momentum),
    "a forward of its own": (_ByDifference, _none, _plainly),
}


def _looped(name: str, reduction: str | None) -> list[torch.Tensor]:
    """Return what three steps leave; None: by hand, in one process."""
    kind, before, forward = KEPT[name]
    net = _small(kind)
    model = net if reduction is None else dp.replicate(net, reduction=reduction)
    for number in (1, 6, 4):  # the first step leaves all ranks but one without a micro-batch
        before(model)
        rows = list(ROWS[:number])
        if reduction is None:
            micros: Any = [LoadedMicroBatch(row, 1 / number, index) for index, row in enumerate(rows)]
        else:
            rank, world_size = dist.get_rank(), dist.get_world_size()
            micros = dp.accumulate(model, [row for i, row in enumerate(rows) if i * world_size // number == rank])
        for micro in micros:
            torch.manual_seed(int(micro.data.abs().sum() * 1000))
            loss = forward(model, net, micro).square().mean() * (1 + torch.rand(()))
            (loss * micro.weight).backward()
    return _of_one_step(net)


def _all_looped(reduction: str | None) -> dict[str, list[torch.Tensor]]:
    return {name: _looped(name, reduction) for name in KEPT}


@pytest.mark.parametrize(("world_size", "reduction"), [(1, "strict"), (2, "strict"), (2, "fast"), (3, "fast")])
def test_a_loop_may_use_layers_as_it_likes(world_size: int, reduction: str) -> None:
    expected = _all_looped(None)
    for found in run_ranks(_all_looped, world_size, reduction):
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-11, atol=1e-13, msg=name)


# --- layers that cannot be kept ---


def _of_a_graph(net: nn.Module, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(lambda x: net(x), backend="eager")


def _of_forward(net: nn.Module, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: net[3](net[2](net[1].forward(net[0](x))))


def _of_a_module(net: nn.Module, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    net.compile(backend="eager")
    return model


def _of_the_model(net: nn.Module, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return model


BY_ITSELF, OTHERWISE = "1 has updated its running statistics by itself", "1 is a _"
LOST: dict[str, tuple[type[nn.BatchNorm1d], Any, str]] = {
    "a compiled function": (nn.BatchNorm1d, _of_a_graph, BY_ITSELF),
    "a compiled module": (nn.BatchNorm1d, _of_a_module, BY_ITSELF),
    "forward()": (nn.BatchNorm1d, _of_forward, BY_ITSELF),
    "several updates": (_Ghost, _of_the_model, OTHERWISE),
    "the rest": (_OfTheRest, _of_the_model, OTHERWISE),
    "a constant": (_OfAConstant, _of_the_model, OTHERWISE),
    "a square": (_OfASquare, _of_the_model, OTHERWISE),
}


def _lost(reduction: str) -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor], list[str], bool]]:
    """Return the buffers before the last step's end, those of rank 0's micro-batches alone, and what was said."""
    found = {}
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("ddparity").addHandler(handler)
    last = dist.get_world_size() - 1
    for name, (kind, make, _) in LOST.items():
        net, alone = _small(kind), _small(kind)
        model = dp.replicate(net, reduction=reduction)
        forward = make(net, model)
        told.clear()
        error = ""
        for number in range(3):
            # Rank 1 of 3 has no micro-batch in the first step.
            own = [] if number == 0 and 0 < dist.get_rank() < last else [ROWS[dist.get_rank()], ROWS[3]]
            try:
                for position, micro in enumerate(dp.accumulate(model, own)):
                    if position == 0 and number == 2:
                        start = [buffer.clone() for buffer in net.buffers()]
                    (forward(micro.data).square().mean() * micro.weight).backward()
            except ValueError as raised:
                error = str(raised)
                break
        for row in [ROWS[0], ROWS[3]] * 2:
            alone(row)
        found[name] = (start if not error else [], list(alone.buffers()), list(told), error)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_layer_that_cannot_be_kept_has_the_statistics_of_rank_0(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(_lost, world_size, "fast", timeout_s=150)):
        for name, (_, _, problem) in LOST.items():
            start, expected, told, error = found[name]
            torch.testing.assert_close(start, expected, rtol=1e-11, atol=1e-13, msg=name)
            assert not error
            assert len(told) == (rank == 0) and all(problem in one and "rank 0's" in one for one in told), (name, told)


@pytest.mark.parametrize("world_size", [1, 2])
def test_strict_refuses_a_layer_that_cannot_be_kept(world_size: int) -> None:
    for found in run_ranks(_lost, world_size, "strict", timeout_s=150):
        for name, (_, _, problem) in LOST.items():
            error = found[name][-1]
            assert error.startswith("accumulate(): ") and problem in error, name
            assert 'batchnorm_statistics="rank0"' in error


def _changed(what: str) -> None:
    net = _small()
    model = dp.replicate(net)
    rank = dist.get_rank()
    for position, micro in enumerate(dp.accumulate(model, list(ROWS[:2]))):
        if what == "momenta":
            net[1].momentum = 0.1 + position * rank
        elif what == "momenta of ranks":
            net[1].momentum = 0.1 + rank
        (model(micro.data).mean() * micro.weight).backward()
        if what == "buffers" and rank == 1:
            net[1].running_mean = net[1].running_mean.clone()


@pytest.mark.parametrize("what", ["momenta", "momenta of ranks", "buffers"])
def test_what_must_not_change_in_the_loop(what: str) -> None:
    for outcome in outcomes(_changed, 2, what):
        assert outcome.error.startswith("RuntimeError: accumulate(): the ")
        assert ("momentum of 1" if what != "buffers" else "running statistics of 1 were replaced") in outcome.error


def _frozen_in_a_graph() -> int:
    """Count the compilations of a function that runs a norm in eval mode."""
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    net = _small()
    net[1].eval()
    model = dp.replicate(net)
    function = torch.compile(lambda x: net(x), backend=backend)
    for _ in range(5):
        for micro in dp.accumulate(model, list(ROWS[:2])):
            (function(micro.data).square().mean() * micro.weight).backward()
    return len(compiled)


def test_a_frozen_layer_in_a_graph_is_not_compiled_in_each_step() -> None:
    assert run_ranks(_frozen_in_a_graph, 2, timeout_s=150) == [2, 2]  # with hooks, and without


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

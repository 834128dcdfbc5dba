"""Tests of SyncBatchNorm in trainings: DDP, accumulation, checkpointing, compilation, derivatives, groups, failures."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ddparity as dp
from ddparity.comm import allreduce

from ..ranks import kill_self, outcomes, run_ranks
from .cases import torchs_operators

X = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1
SPLITS = {1: [24], 2: [10, 14], 3: [1, 20, 3], 4: [7, 0, 12, 5]}


def _net(norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), norm(5), nn.Tanh(), nn.Linear(5, 3), norm(3), nn.Tanh()).double()


def _part(world_size: int | None = None) -> Tensor:
    return X.split(SPLITS[world_size or dist.get_world_size()])[dist.get_rank() if dist.is_initialized() else 0].clone()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def _close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# --- collectives ---


def _gloo(work: Callable[[], Any]) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    return {e.key.removeprefix("gloo:"): e.count for e in profiler.key_averages() if e.key.startswith("gloo:")}


def _counted(reference: bool) -> list[Any]:
    layer, x = dp.SyncBatchNorm(7), torch.randn(4, 7, 3, 3)
    layer(x).sum().backward()  # the first time, the ranks also agree through the store
    sent: list[tuple[torch.dtype, int]] = []
    exchange = allreduce.all_to_all_single

    def recorded(output: Tensor, value: Tensor, rows: list[int], group: dist.ProcessGroup) -> Any:
        sent.append((value.dtype, value[0].numel()))  # what goes to each other rank
        return exchange(output, value, rows, group)

    with mock.patch.object(allreduce, "all_to_all_single", recorded), torchs_operators(reference):
        outputs = []
        forward = _gloo(lambda: outputs.append(layer(x)))
        backward = _gloo(lambda: outputs[0].sum().backward())
    return [forward, backward, sent]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("reference", [False, True])
def test_one_collective_each_way(world_size: int, reference: bool) -> None:
    one = {"all_to_all": 1}
    sent = [(torch.float64, 2 * 7 + 1), (torch.float64, 2 * 7)]
    assert run_ranks(_counted, world_size, reference) == [[one, one, sent]] * world_size


def _broadcasts(kind: str) -> bool:
    model: nn.Module = nn.Sequential(nn.Linear(6, 6), dp.SyncBatchNorm(6))
    if kind == "another buffer":
        model.register_buffer("mask", torch.ones(6))
    elif kind == "its own group":
        model[1].process_group = dist.new_group([0, 1])  # another group of the same ranks
    elif kind == "another buffer of the norm":
        model[1].register_buffer("mask", torch.ones(6))
    elif kind == "frozen":
        model[1].eval()
    model, x = dp.replicate(model), torch.randn(4, 6)

    def step() -> None:
        for micro in dp.accumulate(model, [x], equal_counts=True):
            (model(micro.data).square().mean() * micro.weight).backward()

    for _ in range(3):  # DDP broadcasts the order of its buckets in the first steps
        step()
    return "broadcast" in _gloo(step)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all synchronised", False),
        ("another buffer", True),
        ("another buffer of the norm", True),
        ("its own group", True),
        ("frozen", True),
    ],
)
def test_equal_running_statistics_are_not_broadcast(kind: str, expected: bool) -> None:
    assert run_ranks(_broadcasts, 2, kind) == [expected, expected]


def _converted_late() -> list[Tensor]:
    model = dp.replicate(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), batchnorm_statistics="rank0")
    means = []
    for converts in (False, True):
        if converts:
            dp.convert_sync_batchnorm(model.module)
        for micro in dp.accumulate(model, [torch.randn(4, 6) + dist.get_rank()], equal_counts=True):
            (model(micro.data).square().mean() * micro.weight).backward()
        means.append(model.module[1].running_mean.clone())
    return means


def test_different_running_statistics_are_equal_after_a_step() -> None:
    (own, joined), (other, also_joined) = run_ranks(_converted_late, 2)
    assert not torch.equal(own, other) and torch.equal(joined, also_joined)


def _evaluates_alone() -> list[Any]:
    results = []
    if dist.get_rank() == 1:
        for options in ({}, {"track_running_stats": False}):
            layer = dp.SyncBatchNorm(6, dtype=torch.float64, **options).eval()
            local = nn.BatchNorm1d(6, dtype=torch.float64, **options).eval()
            results.append(torch.equal(layer(X), local(X)))
    return results


def test_eval_mode_runs_no_collective() -> None:
    assert run_ranks(_evaluates_alone, 2) == [[], [True, True]]


class _NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def _reads_nothing() -> bool:
    with torchs_operators(), _NoHostRead():
        for momentum in (0.1, None):
            layer = dp.SyncBatchNorm(6, momentum=momentum, dtype=torch.float64)
            part = _part() if dist.get_rank() else torch.zeros(2, 6, dtype=torch.float64)
            layer(part.requires_grad_()).square().sum().backward()
    return True


def test_no_value_is_read_from_the_device() -> None:
    """A read would make the host wait for CUDA, and break graphs. Counts are computed on the device."""
    assert run_ranks(_reads_nothing, 2) == [True, True]


# --- training under DDP ---

DDP_OPTIONS = [
    {},
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"broadcast_buffers": False},
    {"gradient_as_bucket_view": True},
]


def _trained(options: dict[str, Any], micro_batches: int) -> dict[str, Tensor]:
    group = dist.is_initialized()
    model = _net(dp.SyncBatchNorm)
    replicated = dp.replicate(model, **options) if group else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(3):
        for number, micro in enumerate(dp.accumulate(replicated, _micro_batches(micro_batches, step))):
            loss = replicated(micro.data).square().mean()
            if not group and number == 0:  # in one process, a part is a whole micro-batch
                assert len(micro.data) == len(X) // micro_batches
            (loss * micro.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _state(model)


def _micro_batches(count: int, step: int) -> list[Tensor]:
    """Return this rank's parts of the micro-batches; in one process the whole micro-batches."""
    whole = torch.roll(X, step, 0).chunk(count)
    if not dist.is_initialized():
        return list(whole)
    size, rank = dist.get_world_size(), dist.get_rank()
    return [one.tensor_split(size)[rank] for one in whole]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("options", "micro_batches"),
    [*[(options, 1) for options in DDP_OPTIONS], ({}, 2), ({"broadcast_buffers": False}, 4)],
)
def test_training_equals_that_of_one_process_with_whole_micro_batches(
    world_size: int, options: dict[str, Any], micro_batches: int
) -> None:
    expected = _trained({}, micro_batches)
    for state in run_ranks(_trained, world_size, options, micro_batches):
        _close(state, expected)


def _plain_ddp() -> tuple[dict[str, Tensor], list[Tensor]]:
    model = DistributedDataParallel(dp.convert_sync_batchnorm(_net(nn.BatchNorm1d)))
    part = _part()
    (model(part).square().sum() * dist.get_world_size()).backward()
    return _state(model.module), _gradients(model)


def test_torchs_own_ddp_on_the_cpu() -> None:
    model = _net(nn.BatchNorm1d)
    model(X).square().sum().backward()
    for state, gradients in run_ranks(_plain_ddp, 2):
        _close(gradients, _gradients(model))
        _close(state, _state(model))


def _uneven(kind: str) -> None:
    model = dp.replicate(_net(dp.SyncBatchNorm))
    if kind == "batches":
        batches: Any = [X] * (2 + dist.get_rank())
    else:
        plan = dp.BatchPlan(len(X), global_batch=12, micro_batch=4)
        batches = next(dp.Loader([*X], plan).epoch(0))
    for micro in dp.accumulate(model, batches):
        model(micro.data).sum().backward()


@pytest.mark.parametrize("kind", ["batches", "step"])
def test_different_numbers_of_micro_batches_raise_an_error_on_all_ranks(kind: str) -> None:
    for outcome in outcomes(_uneven, 2, kind):
        assert "synchronised batch norms, which every rank must run equally often" in outcome.error
        assert outcome.seconds < 10


def _uneven_in_eval_mode() -> int:
    model = dp.replicate(_net(dp.SyncBatchNorm).eval())
    count = 0
    for micro in dp.accumulate(model, [X] * (2 + dist.get_rank())):
        (model(micro.data).mean() * micro.weight).backward()
        count += 1
    return count


def test_batch_norms_in_eval_mode_allow_uneven_shares() -> None:
    assert run_ranks(_uneven_in_eval_mode, 2) == [2, 3]


def _joined(batches: list[int]) -> None:
    model = DistributedDataParallel(_net(dp.SyncBatchNorm))
    with model.join(throw_on_early_termination=True):
        for _ in range(batches[dist.get_rank()]):
            model(_part()).sum().backward()


def test_join_raises_on_all_ranks_when_one_runs_out_of_batches() -> None:
    for outcome in outcomes(_joined, 2, [3, 5]):
        assert "exhausted" in outcome.error and outcome.seconds < 10


# --- two forwards, derivatives, torch.func ---


def _gan(options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    model = _net(dp.SyncBatchNorm)
    replicated = dp.replicate(model, **options) if dist.is_initialized() else model
    part = _part() if dist.is_initialized() else X
    ranks = dist.get_world_size() if dist.is_initialized() else 1  # DDP averages over them
    (ranks * (replicated(part).square().sum() + replicated(part * 2 - 1).sin().sum())).backward()
    return _gradients(model), _state(model)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_two_forwards_before_one_backward(broadcast_buffers: bool) -> None:
    expected = _gan({})
    for result in run_ranks(_gan, 2, {"broadcast_buffers": broadcast_buffers}):
        _close(result, expected)


def _penalised(reference: bool) -> tuple[list[Tensor], Tensor]:
    """Train as WGAN-GP: the loss is a function of the input's gradient. Sum gradients over the ranks without DDP."""
    group = dist.is_initialized()
    model = _net(dp.SyncBatchNorm)
    x = (_part() if group else X.clone()).requires_grad_()
    with torchs_operators(reference):
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        ((slope.norm(dim=1) - 1).square().sum() + slope.sum()).backward()
    gradients = _gradients(model)
    if group:
        for gradient in gradients:
            dist.all_reduce(gradient)
    return gradients, x.grad


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("reference", [False, True])
def test_second_derivatives_include_all_ranks(world_size: int, reference: bool) -> None:
    gradients, x_gradient = _penalised(reference)
    parts = x_gradient.split(SPLITS[world_size])
    for (got, got_x), expected_x in zip(run_ranks(_penalised, world_size, reference), parts, strict=True):
        _close(got, gradients, 1e-11)
        _close(got_x, expected_x, 1e-11)


def _functional() -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    model = _net(dp.SyncBatchNorm)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    part = _part() if dist.is_initialized() else X

    def loss(parameters: dict[str, Tensor], x: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().sum()

    gradients, x_gradient = torch.func.grad(loss, argnums=(0, 1))(parameters, part, buffers)
    if dist.is_initialized():
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return gradients, x_gradient, buffers


def test_torch_func() -> None:
    gradients, x_gradient, buffers = _functional()
    parts = x_gradient.split(SPLITS[2])
    for (got, got_x, got_buffers), expected_x in zip(run_ranks(_functional, 2), parts, strict=True):
        _close(got, gradients)
        _close(got_x, expected_x)
        _close(got_buffers, buffers)


def _ignores_output() -> list[Tensor]:
    model = _net(dp.SyncBatchNorm)
    y = model(_part())
    (y.square().sum() if dist.get_rank() == 0 else 0 * y.sum()).backward()
    return _gradients(model)


def test_a_rank_can_multiply_its_output_by_zero_in_the_loss() -> None:
    model = _net(nn.BatchNorm1d)
    model(X)[: SPLITS[2][0]].square().sum().backward()
    got = run_ranks(_ignores_output, 2)
    _close([a + b for a, b in zip(*got, strict=True)], _gradients(model))


# --- groups ---


def _grouped(broadcast_buffers: bool) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = groups[dist.get_rank() // 2]
    model = dp.convert_sync_batchnorm(_net(nn.BatchNorm1d), own)
    model = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    part = _part()
    model(part).square().sum().backward()
    first = _state(model.module)
    model(part)
    return _gradients(model), first, _state(model.module)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_each_group_has_its_own_statistics(broadcast_buffers: bool) -> None:
    parts = X.split(SPLITS[4])
    models = []
    for members in (parts[:2], parts[2:]):
        models.append(_net(nn.BatchNorm1d))
        models[-1](torch.cat(members)).square().sum().backward()
    mean = [(a + b) / 4 for a, b in zip(*map(_gradients, models), strict=True)]
    for rank, (gradients, first, second) in enumerate(run_ranks(_grouped, 4, broadcast_buffers)):
        _close(gradients, mean)
        _close(first, _state(models[rank // 2]))
        # DDP's forward begins with rank 0's buffers, unless broadcast_buffers is False.
        origin = copy.deepcopy(models[0 if broadcast_buffers else rank // 2])
        origin(torch.cat((parts[:2], parts[2:])[rank // 2]))
        _close(second, _state(origin))


def _two_groups() -> tuple[Tensor, Tensor]:
    pair = dist.new_group([0, 1])
    inner = dp.SyncBatchNorm(6, process_group=pair if dist.get_rank() < 2 else dist.new_group([2]), dtype=X.dtype)
    if dist.get_rank() < 2:
        dist.new_group([2])
    outer = dp.SyncBatchNorm(6, dtype=X.dtype)
    y = outer(inner(_part().requires_grad_()))
    y.square().sum().backward()
    return inner.running_mean, y.detach()


def test_layers_of_two_groups_in_one_model() -> None:
    parts = X.split(SPLITS[3])
    inner = [nn.BatchNorm1d(6, dtype=X.dtype) for _ in range(2)]
    middle = torch.cat([inner[0](torch.cat(parts[:2])), inner[1](parts[2])])
    expected = nn.BatchNorm1d(6, dtype=X.dtype)(middle).split(SPLITS[3])
    for rank, (mean, y) in enumerate(run_ranks(_two_groups, 3)):
        _close(mean, inner[rank // 2].running_mean)
        _close(y, expected[rank])


def _not_a_member() -> None:
    group = dist.new_group([0])
    dp.SyncBatchNorm(6, process_group=group, dtype=X.dtype)(_part())


def test_a_group_without_this_rank_raises_an_error() -> None:
    ended = outcomes(_not_a_member, 2)
    assert ended[0].error is None
    assert "rank 1 is not in the process group" in ended[1].error


# --- activation checkpointing ---


def _checkpointed(reentrant: bool | None) -> tuple[list[Tensor], dict[str, Tensor], int]:
    model, part = _net(dp.SyncBatchNorm), _part() if dist.is_initialized() else X.clone()
    part.requires_grad_()

    def step() -> None:
        y = model(part) if reentrant is None else checkpoint(model, part, use_reentrant=reentrant)
        y.square().sum().backward()

    step()
    model.zero_grad()
    return _gradients_after(model, step), _state(model), _gloo(step).get("all_to_all", 0)


def _gradients_after(model: nn.Module, step: Callable[[], None]) -> list[Tensor]:
    step()
    gradients = _gradients(model)
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_recomputation_updates_nothing(world_size: int, reentrant: bool) -> None:
    plain = run_ranks(_checkpointed, world_size, None)
    for got, expected in zip(run_ranks(_checkpointed, world_size, reentrant), plain, strict=True):
        _close(got[:2], expected[:2], 0)
        if world_size == 2:  # two layers: a forward, a backward and a recomputed forward each
            assert (expected[2], got[2]) == (4, 6)


def test_recomputation_updates_nothing_without_a_group() -> None:
    expected = _checkpointed(None)
    for reentrant in (True, False):
        _close(_checkpointed(reentrant)[:2], expected[:2], 0)


# --- torch.compile ---


def _compiled(backend: str | None, momentum: float | None) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    model = _net(lambda channels: dp.SyncBatchNorm(channels, momentum=momentum))
    part = _part().requires_grad_()
    run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        y = run(part)
        y.square().sum().backward()
    with torch.no_grad():
        run(part)
    model.eval()
    run(part)
    return _gradients(model), _state(model), part.grad


@pytest.mark.parametrize("momentum", [0.1, None])
def test_torch_compile_compiles_the_whole_graph(momentum: float | None) -> None:
    expected = run_ranks(_compiled, 2, None, momentum)
    for got, wanted in zip(run_ranks(_compiled, 2, "aot_eager", momentum), expected, strict=True):
        _close(got, wanted)


# --- copies ---


def _copied() -> tuple[bool, bool, bool, str]:
    group = dist.new_group([0, 1])
    layer = dp.SyncBatchNorm(6, process_group=group, dtype=X.dtype)
    layer(_part())
    twin = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    same = torch.equal(layer(_part()), twin(_part()))
    return same, twin.process_group is group, loaded.process_group is None, type(loaded).__name__


def test_copies_keep_the_group_and_files_do_not() -> None:
    assert run_ranks(_copied, 2) == [(True, True, True, "SyncBatchNorm")] * 2


# --- ranks that run different layers, or end ---


def _other_channels() -> None:
    channels = 6 + dist.get_rank()
    dp.SyncBatchNorm(channels)(torch.randn(4, channels))


def _skips(layer: int) -> None:
    model = dp.convert_sync_batchnorm(nn.Sequential(*(nn.BatchNorm1d(6) for _ in range(3))))
    y = torch.randn(4, 6, requires_grad=True)
    for number, module in enumerate(model):
        if number != layer or dist.get_rank() == 0:
            y = module(y)
    y.sum().backward()


def _dies() -> None:
    if dist.get_rank() == 1:
        kill_self()
    dp.SyncBatchNorm(6)(torch.randn(4, 6))


def _leaves() -> None:
    if dist.get_rank() == 0:
        dp.SyncBatchNorm(6)(torch.randn(4, 6))


def test_ranks_with_different_numbers_of_channels_get_an_error() -> None:
    ended = outcomes(_other_channels, 2)
    text = "\n".join(outcome.error for outcome in ended)
    assert all(outcome.error and outcome.seconds < 10 for outcome in ended)
    assert "'the forward of a SyncBatchNorm, 6 channels'" in text
    assert "'the forward of a SyncBatchNorm, 7 channels'" in text


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_ranks_with_different_layers_get_an_error(layer: int) -> None:
    ended = outcomes(_skips, 2, layer)
    assert all(outcome.error and outcome.seconds < 10 for outcome in ended)
    assert f"the forward of {layer}, 6 channels" in "\n".join(outcome.error for outcome in ended)


@pytest.mark.parametrize(("function", "message"), [(_dies, "died"), (_leaves, "left the world")])
def test_a_rank_that_ended_is_an_error(function: Callable[[], None], message: str) -> None:
    start = time.monotonic()
    error = outcomes(function, 2)[0].error
    assert "RankFailure" in error and message in error and "the forward of a SyncBatchNorm" in error
    assert time.monotonic() - start < 15


# --- sync_moments ---

MOMENTS = [
    ((4, 3, 5), (0, 2), (0, 2)),
    ((4, 3, 5), 0, (0,)),
    ((4, 3, 5), (-1,), (2,)),
    ((4, 5, 3), (0, 1), (0, 1)),
    ((4, 3, 5), (0, 1, 2), (0, 1, 2)),
    ((4, 3, 5, 2), (0, 2), (0, 2)),
    ((4, 3, 5, 2), (0, 2, 3), (0, 2, 3)),
]


def _moments(shape: tuple[int, ...], dims: Any, reference: bool) -> Any:
    group = dist.is_initialized()
    torch.manual_seed(0)
    first = dims[0] if isinstance(dims, tuple) else dims
    whole = torch.randn(shape, dtype=torch.float64)
    x = whole.tensor_split(dist.get_world_size(), first)[dist.get_rank()].clone() if group else whole
    x.requires_grad_()
    with torchs_operators(reference):
        mean, variance, count = dp.sync_moments(x, dims, keepdim=True)
        y = (x - mean) / (variance + 0.1).sqrt()
        (slope,) = torch.autograd.grad((y.sin()).sum(), x, create_graph=True)
        (slope * x.cos()).sum().backward()
    return mean.detach(), variance.detach(), int(count), slope.detach(), x.grad


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("shape", "dims", "reduced"), MOMENTS)
def test_moments_and_their_derivatives_equal_those_of_the_whole_input(
    shape: tuple[int, ...], dims: Any, reduced: tuple[int, ...], reference: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mean, variance = x.mean(reduced, keepdim=True), x.var(reduced, unbiased=False, keepdim=True)
    y = (x - mean) / (variance + 0.1).sqrt()
    (slope,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (slope * x.cos()).sum().backward()
    for world_size in (1, 3):
        results = run_ranks(_moments, world_size, shape, dims, reference)
        for got_mean, got_variance, count, _, _ in results:
            _close(got_mean, mean.detach())
            _close(got_variance, variance.detach())
            assert count == x.numel() // mean.numel()
        _close(torch.cat([result[3] for result in results], reduced[0]), slope.detach(), 1e-11)
        _close(torch.cat([result[4] for result in results], reduced[0]), x.grad, 1e-11)


def _masked() -> Tensor:
    rank = dist.get_rank()
    x = X.view(2, 12, 6)[rank]
    mask = torch.arange(12) < (5, 9)[rank]
    mean, variance, count = dp.sync_moments(x[mask], 0)
    return torch.cat([mean, variance, count[None]])


def test_moments_of_the_elements_of_a_mask() -> None:
    kept = torch.cat([X[:5], X[12:21]])
    for got in run_ranks(_masked, 2):
        _close(got, torch.cat([kept.mean(0), kept.var(0, unbiased=False), torch.tensor([14.0])]))


def test_moments_in_half_precision_are_float32() -> None:
    mean, variance, _ = dp.sync_moments(torch.randn(4, 3).bfloat16(), 0)
    assert mean.dtype == variance.dtype == torch.float32


def test_moments_of_one_value_are_its_own() -> None:
    x = torch.tensor([[3.0, 5.0]], requires_grad=True)
    mean, variance, count = dp.sync_moments(x, 0)
    (2 * mean + variance).sum().backward()
    assert (mean.tolist(), variance.tolist(), count) == ([3.0, 5.0], [0.0, 0.0], 1)
    assert x.grad.tolist() == [[2.0, 2.0]]


def test_moments_of_nothing_are_zero() -> None:
    mean, variance, count = dp.sync_moments(torch.empty(0, 3), 0)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(variance, torch.zeros(3)) and count == 0


def test_derivatives_of_the_moments_of_nothing_are_zero() -> None:
    x, weight = torch.empty(0, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    mean, variance, _ = dp.sync_moments(x, 0)
    (dx,) = torch.autograd.grad(((mean + variance) * weight).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), weight)
    assert dx.shape == (0, 3) and second.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("x", "dims", "error", "message"),
    [
        (torch.ones(2, 3), (), ValueError, "no dims"),
        (torch.ones(2, 3), (0, -2), ValueError, r"twice in dims=\(0, -2\)"),
        (torch.ones(2, 3), 2, ValueError, "dim 2 for a tensor of 2"),
        (torch.ones(2, 3, dtype=torch.int64), 0, TypeError, "torch.int64"),
    ],
)
def test_wrong_arguments_of_sync_moments_raise_an_error(
    x: Tensor, dims: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dp.sync_moments(x, dims)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_on_cuda_over_gloo(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    results = run_ranks(_on_cuda, 2, dtype, memory_format)
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 4, 3).to(dtype)).double().requires_grad_()
    local = nn.BatchNorm2d(5).double()
    F.gelu(local(x)).sum().backward()
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for (y, dx, mean, var), size, start in zip(results, (2, 4), (0, 2), strict=True):
        part = slice(start, start + size)
        _close(y.double(), local(x)[part].detach(), tolerance)
        _close(dx.double(), x.grad[part], tolerance)
        assert mean.isfinite().all() and var.isfinite().all()


def _on_cuda(dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3).to(dtype).split([2, 4])[dist.get_rank()]
    x = x.to("cuda", memory_format=memory_format).requires_grad_()
    layer = dp.SyncBatchNorm(5, device="cuda")
    y = layer(x)
    assert y.stride() == x.stride() and y.dtype == dtype
    F.gelu(y.float()).sum().backward()
    return y.detach().cpu(), x.grad.cpu(), layer.running_mean.cpu(), layer.running_var.cpu()

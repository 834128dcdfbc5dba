"""Losses over the whole batch: exact on any number of processes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ddparity as dp
from tests.ranks import outcomes, run_ranks

DATA = torch.randn(22, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _info_nce(rows: torch.Tensor) -> torch.Tensor:
    a, b = F.normalize(rows[:, :3], dim=1), F.normalize(rows[:, 3:], dim=1)
    return F.cross_entropy(a @ b.T * 5, torch.arange(len(rows)))


def _triplet(rows: torch.Tensor) -> torch.Tensor:
    """Hardest positive and hardest negative of each sample."""
    labels = torch.arange(len(rows)) % 3
    same = labels[:, None] == labels
    distances = (rows[:, None] - rows).square().sum(2)
    positive = distances.masked_fill(~same, -1).amax(1)
    negative = distances.masked_fill(same, torch.inf).amin(1)
    return F.relu(positive - negative + 1).mean()


def _barlow(rows: torch.Tensor) -> torch.Tensor:
    a, b = rows[:, :3], rows[:, 3:]
    a, b = ((one - one.mean(0)) / one.std(0) for one in (a, b))
    return (a.T @ b / len(rows) - torch.eye(3, dtype=rows.dtype)).square().sum()


LOSSES = {"InfoNCE": _info_nce, "triplet": _triplet, "Barlow Twins": _barlow}


def _net(kind: str = "plain") -> nn.Module:
    torch.manual_seed(3)
    middle = [nn.BatchNorm1d(8), nn.Dropout(0.3)] if kind != "plain" else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 6)).double()


def _embed(model: Any, data: Any) -> Any:
    return model(data)


def _steps(seed: int = 0) -> dp.Loader:
    # Steps of 9, 9 and 4 samples, in 3, 3 and 2 micro-batches.
    return dp.Loader(list(DATA), dp.BatchPlan(22, global_batch=9, micro_batch=3, seed=seed))


def _trained(loss: str, kind: str, reduction: Any) -> Any:
    model = dp.replicate(_net(kind), reduction=reduction)
    losses, gradients = [], []
    for step in _steps().epoch(0):
        losses.append(dp.backward_over_batch(model, step, _embed, LOSSES[loss]))
        gradients.append([one.grad.clone() for one in model.parameters()])
        model.zero_grad()
    # After them, streams and buffers are as on any number of ranks.
    buffers = [one.clone() for one in model.buffers()]
    return losses, gradients, buffers, torch.rand(1)


def _reference(loss: str, kind: str) -> Any:
    """One big batch; of a noisy net the same micro-batches, with all graphs at once."""
    model = _net(kind)
    losses, gradients = [], []
    for step in _steps().epoch(0):
        batches = [micro.data for micro in step] if kind == "plain" else None
        rows = model(torch.cat(batches)) if batches else torch.cat([model(micro.data) for micro in step])
        value = LOSSES[loss](rows)
        value.backward()
        losses.append(value.detach())
        gradients.append([one.grad.clone() for one in model.parameters()])
        model.zero_grad()
    return losses, gradients, [one.clone() for one in model.buffers()]


@pytest.mark.parametrize("kind", ["plain", "noisy"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_are_those_of_one_big_batch(world_size: int, kind: str) -> None:
    """Two ranks have uneven shares; of three the last has no micro-batch in the short last step."""
    for losses, gradients, buffers in run_ranks(_all_losses, world_size, kind, "fast"):
        for loss, *found in zip(LOSSES, losses, gradients, buffers, strict=True):
            torch.testing.assert_close(tuple(found), _reference(loss, kind), rtol=1e-12, atol=1e-12)


def _all_losses(kind: str, reduction: str) -> Any:
    return list(zip(*[_trained(loss, kind, reduction)[:3] for loss in LOSSES], strict=True))


def _strict() -> Any:
    return [_trained(loss, "noisy", "strict") for loss in LOSSES]


def test_strict_bits_do_not_depend_on_the_number_of_processes() -> None:
    one = run_ranks(_strict, 1)[0]
    for world_size in (2, 3):
        for found in run_ranks(_strict, world_size):
            torch.testing.assert_close(found, one, rtol=0, atol=0)


def _foreign() -> Any:
    net = _net()
    net.register_parameter("scale", nn.Parameter(torch.full((), 2.0, dtype=torch.float64)))
    outside = nn.Parameter(torch.full((), 3.0, dtype=torch.float64))
    batches = list(DATA[:12].split([4, 3, 5]))
    model = dp.replicate(net)
    if dist.is_initialized() and dist.get_world_size() > 1:
        batches = [batches[:2], batches[2:]][dist.get_rank()]
    loss = lambda rows: _triplet(rows * net.scale) * outside  # noqa: E731
    value = dp.backward_over_batch(model, batches, _embed, loss)
    found = [value, outside.grad, *(one.grad.clone() for one in net.parameters())]
    net.zero_grad()
    outside.grad = None
    expected = loss(net(DATA[:12]))
    expected.backward()
    return found, [expected.detach(), outside.grad, *(one.grad for one in net.parameters())]


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_of_the_loss_and_foreign_batches(world_size: int) -> None:
    for found, expected in run_ranks(_foreign, world_size):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _rechecked_under_autocast() -> Any:
    model = dp.replicate(_net("noisy").float(), recheck_every=1)
    loader = dp.Loader(list(DATA.float()), dp.BatchPlan(22, global_batch=9, micro_batch=3, seed=0))
    with torch.autocast("cpu", torch.bfloat16):
        for step in loader.epoch(0):
            dp.backward_over_batch(model, step, _embed, lambda rows: _info_nce(rows.float()))
    return [float(one.grad.abs().sum()) for one in model.parameters()]


def test_rechecks_and_autocast() -> None:
    one, two = run_ranks(_rechecked_under_autocast, 2)
    assert one == two
    assert all(one)


def _synchronised(uneven: bool) -> Any:
    model = dp.replicate(dp.convert_sync_batchnorm(_net("noisy")[:2].append(nn.Linear(8, 6).double())))
    batches = [DATA[:4], DATA[4:8]][dist.get_rank()]
    value = dp.backward_over_batch(model, [batches] * (1 + uneven * dist.get_rank()), _embed, _barlow)
    found = [value, *(one.grad for one in model.parameters())]
    net = _net("noisy")[:2].append(nn.Linear(8, 6).double())
    net.load_state_dict({name.removeprefix("module."): one for name, one in model.state_dict().items()})
    expected = _barlow(net(DATA[:8]))
    expected.backward()
    return found, [expected.detach(), *(one.grad for one in net.parameters())]


def test_synchronised_batch_norms() -> None:
    for found, expected in run_ranks(_synchronised, 2, False):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for outcome in outcomes(_synchronised, 2, True):
        assert "give each rank as many micro-batches" in (outcome.error or "")


def _foreign_with_dropout() -> Any:
    batches = list(DATA[:12].split([4, 3, 5]))
    ends = []
    for cached in (True, False):
        net = _net("noisy")
        torch.manual_seed(9)
        if cached:
            dp.backward_over_batch(dp.replicate(net), batches, _embed, _barlow)
        else:
            _barlow(torch.cat([net(one) for one in batches])).backward()
        ends.append([*(one.grad for one in net.parameters()), *net.buffers(), torch.rand(1)])
    return ends


def test_foreign_batches_draw_the_same_numbers_twice() -> None:
    ((found, expected),) = run_ranks(_foreign_with_dropout, 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _collectives() -> Any:
    model = dp.replicate(_net())
    counts = {}
    loader = _steps()
    for step in (step for epoch in range(2) for step in loader.epoch(epoch)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            dp.backward_over_batch(model, step, _embed, _barlow)
        counts = {e.key: e.count for e in profiler.key_averages() if e.key.startswith("gloo:")}
        model.zero_grad()
    return counts


def test_three_collectives_a_step() -> None:
    """One of numbers, one of the rows, one of the gradients."""
    assert run_ranks(_collectives, 2) == [{"gloo:all_to_all": 3}] * 2


def _wrong(fault: str) -> None:
    model = dp.replicate(_net())
    embed, loss = _embed, _barlow
    if fault == "rows" and dist.get_rank() == 1:
        embed = lambda model, data: model(data)[:1]  # noqa: E731
    elif fault == "kind":
        embed = lambda model, data: model(data).long()  # noqa: E731
    elif fault == "scalar":
        loss = lambda rows: rows  # noqa: E731
    elif fault == "gradient":
        loss = lambda rows: rows.detach().sum()  # noqa: E731
    dp.backward_over_batch(model, next(_steps().epoch(0)), embed, loss)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("rows", "embed gave 1 rows for 3 samples"),
        ("kind", "embed gave a tensor of torch.int64"),
        ("scalar", r"loss gave a tensor of shape (9, 6)"),
        ("gradient", "without a gradient"),
    ],
)
def test_errors_on_every_rank(fault: str, text: str) -> None:
    for outcome in outcomes(_wrong, 2, fault):
        assert outcome.error is not None
        assert text in outcome.error


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Saved:
    """Counts the bytes that graphs keep for their backwards."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        kept = _Kept(tensor)
        self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self._free, tensor.nbytes)
        return kept

    def _free(self, size: int) -> None:
        self.now -= size


def _peak(micro_batches: int, at_once: bool) -> int:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 4))
    batches = list(torch.randn(8 * micro_batches, 16).split(8))
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
        if at_once:
            net(torch.cat(batches)).var(0).sum().backward()
        else:
            dp.backward_over_batch(net, batches, _embed, lambda rows: rows.var(0).sum())
    return saved.peak


def test_memory_is_that_of_one_micro_batch_and_the_rows() -> None:
    """32 micro-batches keep what one does, and the rows that the loss keeps; one big batch keeps 32 times as much."""
    one, many, big = _peak(1, False), _peak(32, False), _peak(32, True)
    weights = 4 * (256 * 256 + 256 * 4)  # a graph keeps them once, whatever the batch is
    rows = 32 * 8 * 4 * 4
    assert many <= one + 2 * rows
    assert big - weights > 20 * (many - weights)


def _strict_foreign() -> Any:
    """The same micro-batches on one rank or more, some without a row, and one rank without any."""
    batches = [DATA[:4], DATA[:0], DATA[4:5], DATA[5:9], DATA[:0]]
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = {1: [batches], 2: [batches[:2], batches[2:]], 3: [batches[:2], [], batches[2:]]}[world_size][rank]
    found = []
    for reduction in ("strict", "fast"):
        model = dp.replicate(_net(), reduction=reduction)
        found += [dp.backward_over_batch(model, mine, _embed, _triplet), *(one.grad for one in model.parameters())]
    return found[: len(found) // 2], found


def test_foreign_batches_in_strict_and_without_rows() -> None:
    net = _net()
    expected = _triplet(net(DATA[:9]))
    expected.backward()
    big = [expected.detach(), *(one.grad for one in net.parameters())]
    (one, _) = run_ranks(_strict_foreign, 1)[0]
    for world_size in (1, 2, 3):
        for strict, found in run_ranks(_strict_foreign, world_size):
            torch.testing.assert_close(strict, one, rtol=0, atol=0)
            torch.testing.assert_close(found, [*big, *big], rtol=1e-12, atol=1e-12)


def _weighted_rows() -> list:
    """Foreign batches, the first of which have no row, and a weight of the loss in the model."""
    net = _net()
    net.weight_of_loss = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = [DATA[:0], DATA[:0], DATA[:4], DATA[4:9]]
    if world_size > 1:
        batches = batches[rank : rank + 1] if rank < world_size - 1 else batches[rank:]
    dp.backward_over_batch(
        dp.replicate(net), batches, lambda model, x: model(x), lambda rows: _triplet(rows) * net.weight_of_loss
    )
    return [net.weight_of_loss.grad, net[0].weight.grad]


def test_batches_without_rows_and_parameters_of_the_loss() -> None:
    expected = _weighted_rows()
    for found in (found for world_size in (2, 3) for found in run_ranks(_weighted_rows, world_size)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _fails_again(reduction: Any) -> None:
    calls = []

    def embed(model: Any, data: Any) -> Any:
        calls.append(len(data))
        if dist.get_rank() == 1 and len(calls) == 3:
            raise OSError("lost in the second pass")
        return model(data)

    dp.backward_over_batch(dp.replicate(_net(), reduction=reduction), list(DATA[:8].split(4)), embed, _barlow)


@pytest.mark.parametrize("reduction", ["fast", "strict"])
def test_a_failure_in_the_second_pass_ends_every_rank(reduction: str) -> None:
    first, second = outcomes(_fails_again, 2, reduction)
    assert second.error == "OSError: lost in the second pass"
    assert first.error is not None
    assert max(first.seconds, second.seconds) < 10

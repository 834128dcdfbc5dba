"""Memory that reductions use again: nobody may find anything else in the gradients that they hold."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.comm.buffers import LEAST_BYTES, STEPS, Buffers
from ddparity.gradients import early, replica
from tests.ranks import run_ranks

LAYERS, WIDTH = 6, 400  # 3.8 MB in all, 0.6 MB a layer: more than is gathered
WAYS = ("after", "early", "strict")


def _model(way: str) -> tuple[nn.Module, nn.Module]:
    if way == "early":
        early.SMALL_BYTES = 2**20
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    return dp.replicate(net, reduction="strict" if way == "strict" else "fast", check_every=0), net


def _step(model: nn.Module, seed: int, inside: Any = lambda: None) -> None:
    """Two micro-batches a rank; `inside` is called after the last backward, in the loop."""
    rank = dist.get_rank()
    data = [torch.full((1, WIDTH), 1.0 + seed + rank + dist.get_world_size() * number) for number in range(2)]
    for number, micro in enumerate(dp.accumulate(model, data, equal_counts=True)):
        (model(micro.data).mean() * micro.weight).backward()
        if number == 1:
            inside()


def _expected(net: nn.Module, seed: int) -> list[torch.Tensor]:
    samples = torch.cat([torch.full((1, WIDTH), 1.0 + seed + n) for n in range(2 * dist.get_world_size())])
    return list(torch.autograd.grad(net(samples).mean(), list(net.parameters())))


def _close(gradients: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)


def _of(net: nn.Module) -> list[torch.Tensor]:
    return [one.grad for one in net.parameters() if one.grad is not None]


def _kept(way: str) -> None:
    """Gradients, parts and arrays of them that somebody keeps from step to step stay as they are."""
    model, net = _model(way)
    held: list[Any] = []
    for seed in range(3 + STEPS):
        _step(model, seed)
        gradients = _of(net)
        _close(gradients, _expected(net, seed))
        weight = gradients[4]
        held.append((seed, gradients if seed % 3 == 0 else None, weight[1:3], weight.numpy()[:, 5]))
        del gradients, weight
        net.zero_grad()
    for seed, gradients, rows, column in held:
        expected = _expected(net, seed)
        if gradients is not None:
            _close(gradients, expected)
        torch.testing.assert_close(rows, expected[4][1:3])
        torch.testing.assert_close(torch.from_numpy(column), expected[4][:, 5])


def _added(way: str) -> None:
    """Without zero_grad, gradients add up; with zeros in place of None they are those of the step."""
    model, net = _model(way)
    for seed in range(4):
        _step(model, seed)
    _close(_of(net), [sum(rows) for rows in zip(*(_expected(net, seed) for seed in range(4)), strict=True)])
    for seed in range(3):
        net.zero_grad(set_to_none=False)
        _step(model, seed)
        _close(_of(net), _expected(net, seed))


def _own_memory(way: str) -> None:
    """Gradients that a user has laid into memory of their own stay there."""
    model, net = _model(way)
    flat = torch.zeros(sum(one.numel() for one in net.parameters()))
    for parameter, part in zip(net.parameters(), flat.split([p.numel() for p in net.parameters()]), strict=True):
        parameter.grad = part.view_as(parameter)
    for seed in range(2):
        flat.zero_()
        _step(model, seed)
        torch.testing.assert_close(flat, torch.cat([one.flatten() for one in _expected(net, seed)]))


def _held_inside(way: str) -> None:
    """What the loop takes from `.grad` becomes the average, as with DDP."""
    model, net = _model(way)
    for seed in range(5):
        held: list[torch.Tensor] = []
        _step(model, seed, lambda held=held: held.extend(_of(net)))
        _close(held, _expected(net, seed))
        _close(_of(net), _expected(net, seed))
        net.zero_grad()


def _alone(way: str) -> None:
    """Each gradient can be written without a change of another, also of its count of versions."""
    model, net = _model(way)
    for _ in range(5):
        net.zero_grad()
        _step(model, 0)
    first, second, *_ = _of(net)
    before, version = second.clone(), second._version
    first.zero_()
    assert torch.equal(second, before)
    assert second._version == version


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_somebody_keeps_stay_as_they_are(way: str, world_size: int) -> None:
    run_ranks(_kept, world_size, way)


@pytest.mark.parametrize("case", [_added, _alone], ids=["added", "alone"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_process(way: str, case: Any) -> None:
    run_ranks(case, 2, way)


@pytest.mark.parametrize("case", [_own_memory, _held_inside], ids=["own memory", "held inside"])
@pytest.mark.parametrize("way", ["after", "early"])  # strict takes each micro-batch's gradient out
def test_gradients_in_other_hands_are_written_in_place(way: str, case: Any) -> None:
    run_ranks(case, 2, way)


def _not_theirs(way: str) -> None:
    """A gradient's memory, which a user keeps, is nobody else's: not after the step, nor in another process."""
    model, net = _model(way)
    kept: list[tuple[int, Any, int, torch.Tensor]] = []
    for seed in range(7):
        _step(model, seed)
        gradient = _of(net)[2]
        row = gradient.share_memory_()[0] if seed == 5 else gradient[0]
        kept.append((seed, gradient.untyped_storage(), gradient.storage_offset(), row))
        del gradient
        net.zero_grad()
    for seed, storage, offset, row in kept:
        expected = _expected(net, seed)[2]
        torch.testing.assert_close(row, expected[0])
        torch.testing.assert_close(torch.empty(0).set_(storage)[offset : offset + WIDTH], expected[0])


def _after_inference(way: str) -> None:
    """Loops of forwards alone in inference mode, then training."""
    model, net = _model(way)
    for _ in range(2):
        with torch.inference_mode():
            for micro in dp.accumulate(model, [torch.ones(1, WIDTH)] * 2, equal_counts=True):
                model(micro.data)
    for seed in range(5):
        net.zero_grad()
        _step(model, seed)
        _close(_of(net), _expected(net, seed))


def _adopted(way: str) -> int:
    """How many buffers a model keeps that only another one's loop trains, while the user holds its gradients."""
    model, _ = _model(way)
    other, net = _model(way)
    held = []
    for seed in range(12):
        data = [torch.full((1, WIDTH), 1.0 + seed + dist.get_rank())]
        for micro in dp.accumulate(model, data, equal_counts=True):
            ((model(micro.data).mean() + other(micro.data).mean()) * micro.weight).backward()
        held.append(_of(net))
        net.zero_grad()
    return len(replica._replicas[other].buffers._kept)


@pytest.mark.parametrize("way", WAYS)
def test_memory_that_a_user_keeps_is_nobody_elses(way: str) -> None:
    run_ranks(_not_theirs, 2, way)


@pytest.mark.parametrize("way", WAYS)
def test_training_after_loops_in_inference_mode(way: str) -> None:
    run_ranks(_after_inference, 2, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_keeps_few_buffers(way: str) -> None:
    assert max(run_ranks(_adopted, 2, way)) <= 8


def _told(way: str) -> list[bool]:
    """Whether a step tells of old gradients: after a backward of one's own, and where zero_grad() is left out."""
    model, net = _model(way)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ddparity.gradients.replica").addHandler(handler)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    found = []
    for own, zeroes in ((False, True), (True, True), (False, False), (False, True)):
        for seed in range(5):
            if own:
                net(torch.ones(1, WIDTH)).mean().backward()
            _step(model, seed)
            optimizer.step()
            if zeroes:
                optimizer.zero_grad()
        found.append(any("gradients of the step before are still there" in one for one in told))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_nobody_set_to_zero_are_told_of(way: str) -> None:
    assert run_ranks(_told, 2, way) == [[False, False, True, True]] * 2


def _compiled(way: str, zeroes: bool) -> None:
    """A compiled function with the backward in it: hooks of ours run between the compiler's graphs."""
    model, net = _model(way)
    train = torch.compile(lambda data, weight: (model(data).mean() * weight).backward(), backend="aot_eager")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for seed in range(3):
        data = [torch.full((1, WIDTH), 1.0 + seed + rank + world_size * number) for number in range(2)]
        for micro in dp.accumulate(model, data, equal_counts=True):
            train(micro.data, micro.weight)
        steps = [_expected(net, one) for one in ([seed] if zeroes else range(seed + 1))]
        _close(_of(net), [sum(rows) for rows in zip(*steps, strict=True)])
        if zeroes:
            net.zero_grad()


@pytest.mark.parametrize("zeroes", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_backward_inside_of_a_compiled_function(way: str, zeroes: bool) -> None:
    run_ranks(_compiled, 2, way, zeroes)


def _memories() -> tuple[int, bool, bool]:
    """Of seven strict steps: how many memories their gradients had, whether the model keeps each, and a kept one's."""
    model, net = _model("strict")
    found, kept, held = set(), True, (torch.zeros(0), torch.ones(1))
    for seed in range(7):
        _step(model, seed)
        address = _of(net)[0].untyped_storage().data_ptr()
        found.add(address)
        kept = kept and address in {one.data_ptr() for one, _ in replica._replicas[model].buffers._kept}
        held = (_of(net)[0], _of(net)[0].clone()) if seed == 5 else held
        net.zero_grad()
    return len(found), kept, torch.equal(*held)


def test_strict_sums_lie_where_gradients_were_that_nobody_keeps() -> None:
    assert run_ranks(_memories, 2) == [(2, True, True)] * 2  # the second one since the first is held


SIZE = LEAST_BYTES // 4


def test_a_buffer_is_used_again_once_nobody_holds_it() -> None:
    buffers, like = Buffers(), torch.empty(0)
    first = buffers.take(SIZE, like)
    address = first.data_ptr()
    second = buffers.take(SIZE, like)
    assert second.data_ptr() != address
    part = first[3:5]
    del first
    third = buffers.take(SIZE, like)
    assert third.data_ptr() not in (address, second.data_ptr())
    part = part.numpy()
    assert buffers.take(SIZE, like).data_ptr() != address
    del part
    assert buffers.take(SIZE, like).data_ptr() == address
    assert buffers.take(SIZE, like.double()).dtype == torch.float64


HOLDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a storage": lambda part: part.untyped_storage(),
    "a typed storage": lambda part: part.storage(),
    "a weak reference to a storage": lambda part: weakref.ref(part.untyped_storage()),
    "an attribute of a storage": lambda part: setattr(part.untyped_storage(), "step", 1),
    "an array's bytes": lambda part: memoryview(part.numpy()),
    "a capsule": torch.utils.dlpack.to_dlpack,
    "a graph": lambda part: torch.ones(len(part), requires_grad=True) * part,
    "memory of several processes": lambda part: part.share_memory_().shape,
    "memory of another size": lambda part: part.untyped_storage().resize_(2 * LEAST_BYTES).nbytes(),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_buffer_that_somebody_may_see_is_not_used_again(hold: Callable[[torch.Tensor], Any]) -> None:
    buffers, like = Buffers(), torch.empty(0)
    first = buffers.take(SIZE, like)
    kept = hold(first[3:].data)
    address = first.data_ptr()
    del first
    assert buffers.take(SIZE, like).data_ptr() != address
    del kept


def test_buffers_that_nobody_takes_are_given_back() -> None:
    buffers, like = Buffers(), torch.empty(0)
    buffers.take(SIZE, like)
    for _ in range(STEPS):
        buffers.next_step()
    assert len(buffers._kept) == 1
    buffers.next_step()
    assert not buffers._kept
    assert buffers.take(SIZE - 1, like).numel() == SIZE - 1  # too small to be kept
    assert not buffers._kept

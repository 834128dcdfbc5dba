"""The strict exchange that starts in the last backward: the bits of one after the loop, whatever the loop does."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.gradients import early, strict
from tests.ranks import run_ranks

SMALL = 2**12  # in place of 8 MiB, so that the test is quick
WIDTH, LAYERS, STEPS = 24, 9, 6
Body = Callable[[nn.Module, torch.Tensor, int, int], None]


class _Net(nn.Module):
    """Layers that differ in dtype and layout, and one that only odd micro-batches use."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.wide = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.rare = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(3, 5)
        self.conv = nn.Conv2d(3, 8, 2).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor, number: int) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        x = self.wide(x.double()).float()
        if number % 2:
            x = self.rare(x)
        images = x.reshape(-1, 3, 2, 4).to(memory_format=torch.channels_last)
        return x.square().mean() + self.conv(images).square().mean()


def _plain(model: nn.Module, x: torch.Tensor, number: int, step: int) -> None:
    model(x, number).backward()


def _two_backwards(model: nn.Module, x: torch.Tensor, number: int, step: int) -> None:
    (model(x, number) / 2).backward()
    (model(x, number + 1) / 3).backward()


def _zeros_once(model: nn.Module, x: torch.Tensor, number: int, step: int) -> None:
    if step == 1:
        model.zero_grad(set_to_none=False)
    model(x, number).backward()


def _edits(model: nn.Module, x: torch.Tensor, number: int, step: int) -> None:
    model(x, number).backward()
    if step in (1, 4) and number == 5:  # so on one rank alone
        first = next(model.parameters())
        assert first.grad is not None
        first.grad.mul_(3)


def _writes_through_data(model: nn.Module, x: torch.Tensor, number: int, step: int) -> None:
    model(x, number).backward()
    if step == 1 and number == 2:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.data[0] = 7.0


def _clamps_later(model: nn.Module, x: torch.Tensor, number: int, step: int) -> None:
    model(x, number).backward()
    if step >= 4:
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.grad.numel() > 100:
                parameter.grad.data.flatten()[:7].clamp_(-1e-9, 1e-9)


def _removes(model: nn.Module, x: torch.Tensor, number: int, step: int) -> None:
    model(x, number).backward()
    if step == 2:
        for parameter in list(model.parameters())[:4]:
            parameter.grad = None


def _with_graph(model: nn.Module, x: torch.Tensor, number: int, step: int) -> None:
    model(x, number).backward(create_graph=True)


BODIES: dict[str, Body] = {
    one.__name__: one
    for one in (_plain, _two_backwards, _zeros_once, _edits, _writes_through_data, _clamps_later, _removes, _with_graph)
}


@contextlib.contextmanager
def _counted() -> Iterator[list[bool]]:
    """For each exchange in slices that begins, whether it does in a backward."""
    begun: list[bool] = []
    made = strict._Slices.__init__

    def counts(self: Any, *given: Any, **named: Any) -> None:
        begun.append(torch._C._current_graph_task_id() != -1)
        made(self, *given, **named)

    strict._Slices.__init__ = counts  # type: ignore[method-assign]
    try:
        yield begun
    finally:
        strict._Slices.__init__ = made  # type: ignore[method-assign]


def _bits(model: nn.Module) -> list[bytes]:
    return [
        b"" if parameter.grad is None else parameter.grad.contiguous().view(torch.uint8).numpy().tobytes()
        for parameter in model.parameters()
    ]


def _trained(body: Body, micro_batches: int, zeroes: bool, starts_early: bool) -> tuple[list[Any], list[bool]]:
    """Return the bits of the gradients after each step."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    early.SMALL_BYTES = SMALL if starts_early else 2**40
    model = dp.replicate(_Net(), reduction="strict")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    found: list[Any] = []
    with _counted() as begun, contextlib.ExitStack() as stack:
        if not starts_early:
            gathers = strict.gathers
            strict.gathers = lambda *_: False
            stack.callback(setattr, strict, "gathers", gathers)
        for step in range(STEPS):
            data = torch.randn(micro_batches, 6, WIDTH, generator=generator)
            first = micro_batches * rank // world_size
            own = data[first : micro_batches * (rank + 1) // world_size]
            for micro in dp.accumulate(model, list(own), count=lambda _: 1.0):
                body(model, micro.data, first + micro.index, step)
            found.append(_bits(model))
            optimizer.step()
            if zeroes:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
    return found, begun


def _compared(micro_batches: int) -> tuple[list[tuple[str, bool, int]], list[str]]:
    """Return where bits differ, and the bodies in whose backward an exchange began."""
    wrong, early_ones = [], []
    for name, body in BODIES.items():
        for zeroes in (True, False) if name != "_with_graph" else (True,):
            late, begun = _trained(body, micro_batches, zeroes, False)
            assert not any(begun)
            found, begun = _trained(body, micro_batches, zeroes, True)
            early_ones += [name] * any(begun)
            wrong += [(name, zeroes, step) for step in range(STEPS) if found[step] != late[step]]
    return wrong, early_ones


@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 2), (2, 11), (3, 12), (4, 13)])
def test_the_bits_of_an_exchange_after_the_loop(world_size: int, micro_batches: int) -> None:
    ranks = run_ranks(_compared, world_size, micro_batches)
    assert [wrong for wrong, _ in ranks] == [[]] * world_size
    assert {name for _, names in ranks for name in names} == set(BODIES)


def _started(micro_batches: int) -> tuple[list[Any], list[bool]]:
    return _trained(_plain, micro_batches, True, True)


@pytest.mark.parametrize("micro_batches", [4, 12])
def test_the_bits_of_one_process(micro_batches: int) -> None:
    (alone, begun), *_ = run_ranks(_started, 1, micro_batches)
    assert begun == []
    for world_size in (2, 3, 4):
        for found, begun in run_ranks(_started, world_size, micro_batches):
            assert found == alone
            assert begun.count(True) > begun.count(False)


def _left() -> list[Any]:
    """Both ranks leave a loop in its last micro-batch, one with more parts on their way than the other."""
    early.SMALL_BYTES = SMALL
    model = dp.replicate(_Net(), reduction="strict")
    rank = dist.get_rank()
    found = []
    for step in range(8):
        model.zero_grad()
        for micro in dp.accumulate(model, torch.ones(2, 6, WIDTH) * (step + rank), equal_counts=True):
            if micro.index == 1 and step in (2, 3, 5):
                (model(micro.data, 1) if rank else model.module.rare(micro.data).sum()).backward()
                break
            model(micro.data, micro.index).backward()
        gc.collect()
        found.append(None if step in (2, 3, 5) else _bits(model))
    return found


def _not_left() -> list[Any]:
    early.SMALL_BYTES = SMALL
    model = dp.replicate(_Net(), reduction="strict")
    found = []
    for step in range(8):
        model.zero_grad()
        if step not in (2, 3, 5):
            for micro in dp.accumulate(model, torch.ones(2, 6, WIDTH) * (step + dist.get_rank()), equal_counts=True):
                model(micro.data, micro.index).backward()
        found.append(None if step in (2, 3, 5) else _bits(model))
    return found


def test_a_loop_that_was_left_leaves_nothing_for_the_next() -> None:
    left, never = run_ranks(_left, 2), run_ranks(_not_left, 2)
    assert left == never and left[0] == left[1]


def _in_other_places(way: str) -> list[Any]:
    """Ranks that leave loops at other places, or do not begin them, and go on with the same model, or with another."""
    early.SMALL_BYTES = SMALL
    rank, found = dist.get_rank(), []
    model = dp.replicate(_Net(), reduction="strict")
    for step in range(9):
        model.zero_grad()
        left = step in (1, 2, 5)
        if left and way == "not begun" and rank == 1:
            found.append(None)
            continue
        for micro in dp.accumulate(model, torch.ones(2, 6, WIDTH) * (step + rank), equal_counts=True):
            if left and way != "late" and rank == 1:
                break
            if left and rank == 1:
                dist.recv(torch.zeros(1), 0)
            model(micro.data, micro.index).backward()
            if left and micro.index == 1:
                break
        if left and way == "late" and rank == 0:
            for _ in range(2):
                dist.send(torch.zeros(1), 1)
        if left and way != "not begun":
            del model
            gc.collect()
            model = dp.replicate(_Net(LAYERS + step), reduction="strict")
        found.append(None if left else _bits(model))
    return found


@pytest.mark.parametrize("way", ["elsewhere", "not begun", "late"])
def test_ranks_that_leave_loops_in_other_places_go_on(way: str) -> None:
    one, other = run_ranks(_in_other_places, 2, way)
    assert one == other and one.count(None) == 3


def _of_a_user() -> list[float]:
    """A user's own messages, with any small tag, may be on their way meanwhile."""
    model = dp.replicate(nn.Linear(WIDTH, 20 * WIDTH), reduction="strict")
    strict.gathers = lambda *_: False
    rank = dist.get_rank()
    theirs = torch.zeros(3)
    works = [dist.irecv(theirs[tag : tag + 1], 1 - rank, tag=tag) for tag in range(3)]
    for micro in dp.accumulate(model, torch.ones(2, 6, WIDTH), equal_counts=True):
        model(micro.data).square().mean().backward()
    for tag in range(3):
        dist.send(torch.tensor([10.0 * rank + tag]), 1 - rank, tag=tag)
    for work in works:
        work.wait()
    return theirs.tolist()


def test_messages_of_a_user_are_not_taken() -> None:
    assert run_ranks(_of_a_user, 2) == [[10.0, 11.0, 12.0], [0.0, 1.0, 2.0]]


def _other_dtype(reduction: Any) -> bool:
    """A layer becomes float64 between two steps."""
    found = []
    for small in (SMALL, 2**40):
        early.SMALL_BYTES = small
        model = dp.replicate(_Net(), reduction=reduction)
        for step in range(5):
            model.zero_grad()
            if step == 2:
                model.module.rare.double()
                model.module.rare.register_forward_pre_hook(lambda _, given: given[0].double())
                model.module.rare.register_forward_hook(lambda _, given, out: out.float())
            for micro in dp.accumulate(model, torch.ones(2, 6, WIDTH) * step, equal_counts=True):
                model(micro.data, micro.index).backward()
            found.append(_bits(model))
    return found[:5] == found[5:]


@pytest.mark.parametrize("reduction", ["strict", "fast"])
def test_a_parameter_of_another_dtype(reduction: str) -> None:
    assert run_ranks(_other_dtype, 2, reduction) == [True] * 2


def _frozen_with_other_gradients(reduction: Any) -> list[list[bool]]:
    """A layer is frozen after some steps, and what is left of its gradient differs between ranks: zeros, and None."""
    model = dp.replicate(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), reduction=reduction)
    found = []
    for step in range(5):
        model.zero_grad(set_to_none=dist.get_rank() == 1)
        if step == 2:
            model.module[0].requires_grad_(False)
        batches = [torch.ones(3, 4)] * (0 if step and dist.get_rank() == 0 else 2)
        for micro in dp.accumulate(model, batches):
            model(micro.data).sum().backward()
        found.append([one.grad is not None and bool(one.grad.any()) for one in model.parameters()])
    return found


@pytest.mark.parametrize("reduction", ["strict", "fast"])
def test_a_frozen_layer_may_keep_zeros_on_one_rank(reduction: str) -> None:
    for found in run_ranks(_frozen_with_other_gradients, 2, reduction):
        assert found == [[True] * 4] * 2 + [[False, False, True, True]] * 3


def _garbage(reduction: Any, leave: bool) -> list[list[tuple[int, ...]]]:
    """Return the shapes of the tensors that cycles keep, after each step; `leave`: every second loop."""
    early.SMALL_BYTES = SMALL
    model = dp.replicate(_Net(), reduction=reduction)
    gc.collect()
    gc.disable()
    found = []
    for attempt in range(4):
        with contextlib.suppress(KeyError):
            for micro in dp.accumulate(model, torch.ones(2, 6, WIDTH), equal_counts=True):
                model(micro.data, micro.index).backward()
                if leave and attempt % 2 and micro.index % 2:
                    raise KeyError
        model.zero_grad()
        del micro
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.append([tuple(one.shape) for one in gc.garbage if isinstance(one, torch.Tensor)])
        gc.set_debug(0)
        gc.garbage.clear()
    return found


@pytest.mark.parametrize(("reduction", "leave"), [("fast", False), ("strict", True)])
def test_no_cycle_keeps_tensors(reduction: str, leave: bool) -> None:
    """A step's gradients in a cycle would stay until Python collects it: memory grows, and is given page by page."""
    for found in run_ranks(_garbage, 2, reduction, leave):
        assert found == [[]] * 4


def _of_the_user(small: int) -> list[str]:
    """A gradient that the loop sets, the same tensor in each step, and one that it keeps."""
    early.SMALL_BYTES = small
    strict.gathers = lambda *_: False
    model = dp.replicate(_Net(), reduction="strict")
    constants = [torch.ones_like(parameter) for parameter in model.parameters()]
    found = []
    for _ in range(3):
        model.zero_grad()
        kept = []
        for micro in dp.accumulate(model, torch.ones(2, 6, WIDTH), equal_counts=True):
            model(micro.data, micro.index).backward()
            kept = [(one.grad, one.grad.clone()) for one in model.parameters() if one.grad is not None]
            if micro.index % 2:
                for parameter, constant in zip(model.parameters(), constants, strict=True):
                    parameter.grad = constant
        ones = all(bool((constant == 1).all()) for constant in constants)
        found.append(f"{all(torch.equal(one, copy) for one, copy in kept)} {ones}")
    return found


@pytest.mark.parametrize("small", [SMALL, 2**40])
def test_the_tensors_of_a_user_stay_as_they_are(small: int) -> None:
    assert run_ranks(_of_the_user, 2, small) == [["True True"] * 3] * 2

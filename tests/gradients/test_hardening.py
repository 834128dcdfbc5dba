"""Loops that do more than one forward and one backward: gradients are exact on every rank, and nothing hangs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddparity as dp
from ddparity.gradients.replica import walk
from tests.ranks import run_ranks

SEVERAL_BUCKETS = {"bucket_cap_mb": 1e-5}
UNUSED = {"find_unused_parameters": True, **SEVERAL_BUCKETS}
X = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Gradients = list[torch.Tensor | None]


class _Heads(nn.Module):
    """A body with two heads; a forward uses those that it is asked for. The buffer is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.a, self.b = nn.Linear(6, 5).double(), nn.Linear(5, 1).double(), nn.Linear(5, 1).double()
        self.register_buffer("constant", torch.ones(3))

    def forward(self, x: torch.Tensor, heads: str = "ab") -> torch.Tensor:
        hidden = self.body(x).tanh()
        return torch.stack([getattr(self, name)(hidden) for name in heads]).sum(0)


def _own(count: int = 2) -> list[torch.Tensor]:
    """This rank's micro-batches, of the same rows on any number of ranks."""
    parts = X.split(len(X) // (count * dist.get_world_size()))
    return list(parts[dist.get_rank() * count :][:count])


def _gradients(model: nn.Module) -> Gradients:
    return [None if one.grad is None else one.grad.clone() for one in model.parameters()]


def _one_process(heads: str = "ab", rows: torch.Tensor = X) -> Gradients:
    model = _Heads()
    model(rows, heads).square().mean().backward()
    return _gradients(model)


def _check(model: nn.Module, expected: Gradients) -> None:
    for (name, one), value in zip(model.named_parameters(), expected, strict=True):
        assert (one.grad is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(one.grad, value, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: name + text)


def _back(model: nn.Module, micro: Any, heads: str = "ab") -> None:
    (model(micro.data, heads).square().mean() * micro.weight).backward()


def _parts_frozen_in_turns(reduction: Any, options: dict[str, Any]) -> None:
    """As in pix2pix: the discriminator is frozen when the second step begins."""
    g, d = dp.replicate(_Heads(), reduction, **options), dp.replicate(_Heads(), reduction, **options)
    for _ in range(3):
        g.zero_grad()
        d.zero_grad()
        for micro in dp.accumulate([g, d], _own()):
            d.requires_grad_(True)
            _back(d, micro)
            d.requires_grad_(False)
            _back(g, micro)
        _check(d, _one_process())
        _check(g, _one_process())


def _unfrozen_in_the_loop() -> None:
    model = dp.replicate(_Heads())
    model.module.a.requires_grad_(False)

    def loop() -> None:
        for micro in dp.accumulate(model, _own()):
            model.module.a.requires_grad_(True)
            _back(model, micro)

    with pytest.raises(RuntimeError, match=r"a\.weight was frozen when the loop began"):
        loop()


def _a_part_replicated_too(reduction: Any, sums: bool) -> None:
    net = _Heads()
    model, part = dp.replicate(net, reduction), dp.replicate(net.body, reduction)
    own = [] if sums and dist.get_rank() == 1 else _own()
    for micro in dp.accumulate(model, own):
        _back(model, micro)
    rows = torch.cat([part for number, part in enumerate(X.chunk(dist.get_world_size())) if not (sums and number == 1)])
    _check(net, _one_process(rows=rows))
    assert part is not None


def _a_model_of_some_ranks() -> None:
    """Only these ranks make it, so the others must not be waited for."""
    group = dist.new_group([0, 1])
    model = dp.replicate(_Heads())
    part = dp.replicate(_Heads(), process_group=group) if dist.get_rank() < 2 else None
    for micro in dp.accumulate(model, _own()):
        _back(model, micro)
    _check(model, _one_process())
    if part is not None:
        for micro in dp.accumulate(part, [X[:4] if dist.get_rank() == 0 else X[4:8]]):
            _back(part, micro)
        _check(part, _one_process(rows=X[:8]))
        step = dp.accumulate(part, [X[:4]])
        _back(part, next(step))
        model(X).sum().backward()
        with pytest.raises(RuntimeError, match="of another process group"):
            next(step)


def _more_forwards_on_one_rank(when: str) -> None:
    """DDP would broadcast buffers in one of them, and in the first step an order of buckets."""
    model = dp.replicate(_Heads(), **SEVERAL_BUCKETS)
    for step in range(3):
        model.zero_grad()
        if when == "outside" and step == 2 and dist.get_rank() == 0:
            model(X)  # it arms DDP
        for micro in dp.accumulate(model, _own()):
            partly = when == "outside" and step == 2 and micro.index % 2 == 0
            out = model(micro.data, "a" if partly else "ab")
            if when == "between" and dist.get_rank() == 0:
                model(micro.data)
                with torch.no_grad():
                    model(micro.data)
            (out.square().mean() * micro.weight).backward()
            if when == "after" and dist.get_rank() == 0:
                model(micro.data)
        if when != "outside" or step < 2:
            _check(model, _one_process())
    first = [torch.empty_like(one.grad) for one in model.parameters()]
    for one, other in zip(model.parameters(), first, strict=True):
        other.copy_(one.grad)
        dist.broadcast(other, 0)
        assert torch.equal(one.grad, other)


def _a_backward_that_fails(step_that_fails: int) -> None:
    """It has begun to reduce. The next loop starts anew."""
    model = dp.replicate(_Heads(), **SEVERAL_BUCKETS)

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError("not finite")

    for step in range(4):
        model.zero_grad()
        handle = model.module.body.weight.register_hook(fail) if step == step_that_fails else None
        try:
            for micro in dp.accumulate(model, _own(1)):
                _back(model, micro)
        except ArithmeticError:
            assert handle is not None
            handle.remove()
        else:
            _check(model, _one_process())


def _set_by_hand(options: dict[str, Any]) -> None:
    """Before the last backward, which does not use the head; and after it, with as many writes as DDP's."""
    model = dp.replicate(_Heads(), **options)
    mean = sum(range(1, dist.get_world_size() + 1)) / dist.get_world_size()
    for _ in range(2):
        model.zero_grad()
        for micro in dp.accumulate(model, _own()):
            if options is UNUSED:
                model.module.b.weight.grad = torch.full_like(model.module.b.weight, 1.0 + dist.get_rank())
                _back(model, micro, "a")
                continue
            _back(model, micro)
            weight = model.module.b.weight
            value = torch.full_like(weight, 1.0 + dist.get_rank())
            while value._version < weight.grad._version:
                value.mul_(1.0)
            weight.grad = value
        assert torch.allclose(model.module.b.weight.grad, torch.full((1, 5), mean, dtype=torch.float64), rtol=1e-12)


def _no_gradient_stays_none(options: dict[str, Any], skips: Callable[[int], bool]) -> None:
    """Some ranks leave out the last micro-batch; nobody uses the second head."""
    model = dp.replicate(_Heads(), **options)
    for _ in range(2):
        model.zero_grad()
        for micro in dp.accumulate(model, _own()):
            if micro.index % 2 == 1 and skips(dist.get_rank()):
                continue
            _back(model, micro, "a")
        assert [one.grad is None for one in model.parameters()] == [False] * 4 + [True] * 2


def _nothing_is_trained() -> None:
    model = dp.replicate(_Heads())
    model.requires_grad_(False)
    for options in ({}, {"skipped": "drop"}):
        for micro in dp.accumulate(model, _own(), **options):
            model(micro.data)
    for micro in dp.accumulate(model, _own() if dist.get_rank() else []):
        model(micro.data)


def _a_loop_inside_of_a_loop(options: dict[str, Any]) -> None:
    """The inner model also runs in the outer one's loss."""
    g, d = dp.replicate(_Heads(), **options), dp.replicate(_Heads(), **options)
    for _ in range(2):
        g.zero_grad()
        for micro in dp.accumulate(g, _own()):
            d.zero_grad()
            for inner in dp.accumulate(d, [micro.data]):
                _back(d, inner)
            if dist.get_rank() == 0:
                d(micro.data)  # plain DDP would broadcast a buffer here
            ranks = dist.get_world_size()
            parts = X.split(len(X) // (2 * ranks))
            _check(d, _one_process(rows=torch.cat([parts[2 * rank + micro.index % 2] for rank in range(ranks)])))
            d.zero_grad()
            _back(g, micro)
            _back(d, micro)
        _check(g, _one_process())


def _a_strict_loop_inside_of_a_loop() -> None:
    g, d = dp.replicate(_Heads(), "strict"), dp.replicate(_Heads(), "strict")
    outer, inner = dp.accumulate(g, _own()), dp.accumulate(d, _own())
    next(outer)
    with pytest.raises(RuntimeError, match=r"give both to one, accumulate\(\[first, second\], …\)"):
        next(inner)
    outer.close()


def _two_ranks() -> None:
    for reduction, options in (("fast", {}), ("fast", SEVERAL_BUCKETS), ("strict", {})):
        _parts_frozen_in_turns(reduction, options)
    _unfrozen_in_the_loop()
    for reduction, sums in (("fast", False), ("fast", True), ("strict", False)):
        _a_part_replicated_too(reduction, sums)
    for when in ("between", "after", "outside"):
        _more_forwards_on_one_rank(when)
    for step in (0, 2):
        _a_backward_that_fails(step)
    for options in ({}, SEVERAL_BUCKETS, UNUSED):
        _set_by_hand(options)
    for options in ({}, UNUSED):
        _no_gradient_stays_none(options, lambda rank: rank == 0)
    _no_gradient_stays_none(SEVERAL_BUCKETS, lambda rank: True)
    _nothing_is_trained()
    for options in ({}, SEVERAL_BUCKETS):
        _a_loop_inside_of_a_loop(options)
    _a_strict_loop_inside_of_a_loop()


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_are_exact_whatever_the_loop_does(world_size: int) -> None:
    run_ranks(_two_ranks, world_size)


def test_a_model_of_some_ranks_does_not_hang_the_others() -> None:
    run_ranks(_a_model_of_some_ranks, 3)


def test_a_part_that_is_replicated_too_in_a_world_of_one() -> None:
    run_ranks(_a_part_replicated_too, 1, "strict", False)


def test_parameters_have_the_names_and_the_order_of_torch() -> None:
    shared, bare = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    tied = nn.Linear(2, 2)
    tied.weight = shared.weight
    model = nn.ModuleDict({"first": shared, "again": shared, "tied": nn.Sequential(tied, bare), "none": nn.Identity()})
    expected = list(model.named_parameters())
    assert [(name, id(one)) for name, one in walk(model)[0]] == [(name, id(one)) for name, one in expected]


class _WritesData(torch.optim.Optimizer):
    """Writes through `.data`, as optimizers did before torch had `no_grad`."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad.data, alpha=-0.1)


def _late_step_inside() -> str:
    """From the fifth step on, when the checks that take time are over."""
    model = dp.replicate(nn.Linear(4, 3))
    optimizer = _WritesData(model.parameters())
    for number in range(6):
        for micro in dp.accumulate(model, [torch.ones(2, 4)] * 2, equal_counts=True):
            (model(micro.data).sum() * micro.weight).backward()
            if number == 5:
                with pytest.raises(RuntimeError) as error:
                    optimizer.step()
                return str(error.value)
        optimizer.step()
        optimizer.zero_grad()
    return ""


@pytest.mark.parametrize("world_size", [1, 2])
def test_any_optimizers_step_in_any_loop_is_refused(world_size: int) -> None:
    for message in run_ranks(_late_step_inside, world_size):
        assert "move optimizer.step() behind the loop" in message


def _left_with_zeros() -> str:
    """A loop that zip() leaves, over a model of which one gradient is zero, as that of an adapter is at first."""
    model = dp.replicate(nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1)))
    with torch.no_grad():
        list(model.parameters())[1].zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.ones(2, 2)]
    for x, micro in zip(batches, dp.accumulate(model, batches), strict=False):
        (model(x).square().mean() * micro.weight).backward()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def test_a_loop_that_was_left_is_noticed_beside_a_gradient_of_zeros() -> None:
    for message in run_ranks(_left_with_zeros, 2):
        assert "left before its end" in message


def _late_edit() -> torch.Tensor:
    """Gradients of a large model are scaled through `.data`, from the fifth step on."""
    torch.manual_seed(0)
    model = dp.replicate(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double(), **SEVERAL_BUCKETS)
    parameters = list(model.parameters())
    x = torch.arange(32, dtype=torch.float64).view(8, 4).sin()
    own = x.chunk(dist.get_world_size())[dist.get_rank()]
    for number in range(6):
        model.zero_grad()
        for micro in dp.accumulate(model, [own]):
            (model(micro.data).square().mean() * micro.weight).backward()
            for parameter in parameters if number == 5 else ():
                assert parameter.grad is not None
                parameter.grad.data.mul_(0.5)
    return torch.cat([one.grad.flatten() for one in parameters if one.grad is not None])


def test_a_late_edit_of_gradients_counts() -> None:
    (expected,) = run_ranks(_late_edit, 1)
    for gradients in run_ranks(_late_edit, 2):
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)


def _permuted_weights() -> str:
    """A hook that does not reduce: each rank trains another row of ones."""

    def nothing(state, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    words = nn.Embedding(2, 2)
    with torch.no_grad():
        words.weight.fill_(1)
    model = DistributedDataParallel(words)
    model.register_comm_hook(None, nothing)

    def step() -> None:
        for micro in dp.accumulate(model, [torch.tensor([dist.get_rank()])], equal_counts=True):
            (model(micro.data).sum() * micro.weight).backward()

    with pytest.raises(dp.DDParityError) as error:
        step()
    return str(error.value)


def test_gradients_with_the_same_numbers_elsewhere_differ() -> None:
    for message in run_ranks(_permuted_weights, 2):
        assert "weight differs between rank 1 and rank 0" in message


def _flagged() -> bool:
    layer = nn.Sequential(nn.Linear(2, 2))
    layer.sparse = True  # of the user's own, without a weight
    return isinstance(dp.replicate(layer), DistributedDataParallel)


def test_an_attribute_of_that_name_is_no_sparse_layer() -> None:
    assert all(run_ranks(_flagged, 2))


def _half() -> torch.Tensor:
    model = dp.replicate(nn.Linear(1, 1, bias=False).half())
    for micro in dp.accumulate(model, [torch.zeros(1, 1).half()], equal_counts=True):
        model(micro.data).sum().backward()
        (weight,) = model.parameters()
        weight.grad = torch.full_like(weight, 40000)
    return weight.grad


def test_an_average_in_half_precision_does_not_overflow() -> None:
    assert [gradient.item() for gradient in run_ranks(_half, 2)] == [40000, 40000]


def _wide_gradients(reduction: str, width: int) -> list[tuple[torch.dtype, torch.Tensor]]:
    torch.manual_seed(0)
    model = dp.replicate(nn.Sequential(nn.Linear(width, width), nn.Linear(width, 4)).bfloat16(), reduction=reduction)
    empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.bfloat16))
    model.register_parameter("empty", empty)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    plan = dp.BatchPlan(6, 6, 2, shuffle=False)  # with 2 and 3 ranks, and one that has a micro-batch less
    (step,) = dp.Loader(torch.randn(6, width).bfloat16(), plan).epoch(0)
    for micro in dp.accumulate(model, step):
        (model(micro.data).float().square().mean() * micro.weight).backward()
    return [(one.grad.dtype, one.grad) for one in model.parameters() if one.grad is not None]


DTYPES_MAY_DIFFER = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch gives gradients their parameters' dtype"
)


@DTYPES_MAY_DIFFER
@pytest.mark.parametrize("width", [8, 1024])  # the large model's averages start early
@pytest.mark.parametrize("reduction", ["fast", "strict"])
def test_gradients_may_have_another_dtype_than_their_parameters(reduction: str, width: int) -> None:
    (alone,) = run_ranks(_wide_gradients, 1, reduction, width)
    for world_size in (2, 3):
        for gradients in run_ranks(_wide_gradients, world_size, reduction, width):
            assert [dtype for dtype, _ in gradients] == [torch.float32] * 4
            for (_, mine), (_, theirs) in zip(gradients, alone, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)
                assert reduction == "fast" or torch.equal(mine, theirs)


def _any_dtype(reduction: str) -> str:
    model = dp.replicate(nn.Linear(4, 2), reduction=reduction)
    for parameter in model.parameters():
        parameter.grad_dtype = None
    try:
        for micro in dp.accumulate(model, [torch.ones(2, 4)], equal_counts=True):
            (model(micro.data).mean() * micro.weight).backward()
    except TypeError as error:
        return str(error)
    return "no error"


@DTYPES_MAY_DIFFER
@pytest.mark.parametrize("reduction", ["fast", "strict"])
def test_gradients_of_any_dtype_are_refused(reduction: str) -> None:
    for message in run_ranks(_any_dtype, 2, reduction):
        assert "has grad_dtype=None" in message and "set its grad_dtype to one" in message


def _left_and_one_replaced() -> str:
    model = dp.replicate(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for micro in dp.accumulate(model, [torch.ones(2, 4)], equal_counts=True):
        (model(micro.data).mean() * micro.weight).backward()
        break
    next(model.parameters()).grad = torch.zeros(2, 4)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_a_loop_that_was_left_is_noticed_where_one_gradient_was_replaced() -> None:
    for message in run_ranks(_left_and_one_replaced, 2):
        assert "left before its end" in message


@pytest.mark.parametrize("reduction", ["fast", "strict"])
def test_a_loop_that_ends_late_leaves_a_newer_one_open(reduction: str) -> None:
    """As one that an exception's traceback keeps alive."""
    model = dp.replicate(nn.Linear(4, 2), reduction=reduction)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):  # also where a step does least
        old = dp.accumulate(model, [torch.ones(2, 4), torch.ones(2, 4)])
        next(old)
        for micro in dp.accumulate(model, [torch.ones(2, 4), torch.ones(2, 4)]):
            old.close()
            (model(micro.data).mean() * micro.weight).backward()
            with pytest.raises(RuntimeError, match="inside of the loop"):
                optimizer.step()
        optimizer.step()
        optimizer.zero_grad()


def _compiled_graphs() -> list[int]:
    """How many graphs there are after each step: DDP's own forward runs outside of the loop only."""
    model = dp.replicate(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    compiled = torch.compile(model, backend="eager")
    found = []
    for _ in range(4):
        for micro in dp.accumulate(compiled, [torch.ones(2, 4)] * 2, equal_counts=True):
            (compiled(micro.data).sum() * micro.weight).backward()
        model.zero_grad()
        with torch.no_grad():
            compiled(torch.ones(2, 4))
        found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return found


def test_a_compiled_model_is_compiled_in_the_first_step_alone() -> None:
    for graphs in run_ranks(_compiled_graphs, 2):
        assert graphs[0] == graphs[-1]


def _copies_from_the_loop() -> list[list[bool]]:
    """Of copies that a loop takes: whether each averages in a loop of its own, and then as DDP does."""
    model = dp.replicate(nn.Linear(2, 1, bias=False))
    copies = []
    for micro in dp.accumulate(model, [torch.ones(1, 2)], equal_counts=True):
        file = io.BytesIO()
        torch.save(model, file)
        text = file.getvalue()
        copies = [copy.deepcopy(model), torch.load(io.BytesIO(text), weights_only=False)]
        (model(micro.data).sum() * micro.weight).backward()
    found = []
    x = torch.full((1, 2), float(dist.get_rank()))
    for one in copies:
        for micro in dp.accumulate(one, [x], equal_counts=True):
            (one(micro.data).sum() * micro.weight).backward()
        one(x).sum().backward()
        found.append(one.module.weight.grad.flatten().tolist() == [1.0, 1.0])
    return [found, [b"ddparity.compat" in text]]


def test_copies_from_a_loop_are_ddp_modules() -> None:
    assert run_ranks(_copies_from_the_loop, 2) == [[[True, True], [False]]] * 2

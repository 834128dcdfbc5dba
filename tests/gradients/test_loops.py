"""Whatever the loop does, its gradients are those of one process: every case on 1, 2 and 3 processes, in three ways."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddparity as dp
from ddparity.compat import uncompiled, unwrapped
from ddparity.data.step import LoadedMicroBatch
from tests.gradients.loop_cases import LOOPS, PLAN, SAMPLES, Loop, Models, X, net
from tests.ranks import run_ranks

REDUCTIONS: dict[str, dict[str, Any]] = {
    "after the loop": {},
    "overlapped": {"bucket_cap_mb": 1e-5},
    "strict": {"reduction": "strict"},
}
EPOCHS = 2

Found = list[dict[str, torch.Tensor | None]]


def _found(modules: list[nn.Module]) -> dict[str, torch.Tensor | None]:
    """The gradients and buffers."""
    found: dict[str, torch.Tensor | None] = {}
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            grad = parameter.grad
            if grad is not None:
                grad = grad.to_dense() if grad.is_sparse else grad.clone()
            found[f"{number}.{name}.grad"] = grad
        found |= {f"{number}.{name}": buffer.clone() for name, buffer in module.named_buffers()}
    return found


def _step_of_sgd(modules: list[nn.Module]) -> None:
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.05)
                    parameter.grad = None


def _ours(loop: Loop, reduction: str) -> Found:
    models: Models = [loop.wrap(model, **{**REDUCTIONS[reduction], **loop.options}) for model in loop.models()]
    modules = [uncompiled(unwrapped(uncompiled(model))) for model in models]
    loop.first(models)
    found = []
    loader = dp.Loader(SAMPLES, PLAN, collate_fn=torch.cat)
    for epoch in range(EPOCHS):
        for step in loader.epoch(epoch):
            loop.change(modules, len(found))
            loop.step(models, lambda model, step=step, **options: dp.accumulate(model, step, **options))
            found.append(_found(modules))
            _step_of_sgd(modules)
    return found


def _by_hand(loop: Loop) -> Found:
    """The oracle: one process without ddparity's accumulate, replicate and Loader."""
    modules = loop.models()
    found: Found = []
    for epoch in range(EPOCHS):
        for step in range(PLAN.steps_per_epoch):
            micros = PLAN.step(epoch, step)
            units = sum(len(micro.samples) for micro in micros if micro.index not in loop.left_out)

            def accumulate(_: Any, micros=micros, units=units, **options: Any) -> Iterator[LoadedMicroBatch]:
                for micro in micros:
                    share = len(micro.samples) / (units or 1)
                    yield LoadedMicroBatch(SAMPLES[micro.samples].flatten(0, 1), share, micro.index)

            loop.change(modules, len(found))
            loop.step(modules, accumulate)
            found.append(_found(modules))
            _step_of_sgd(modules)
    return found


def _all(reduction: str) -> dict[str, Found | str]:
    found: dict[str, Found | str] = {}
    logging.getLogger("ddparity").setLevel(logging.ERROR)  # that micro-batches are skipped
    for name, loop in LOOPS.items():
        if reduction in loop.reductions:
            try:
                found[name] = _ours(loop, reduction)
            except Exception as error:
                raise RuntimeError(f"in the loop with {name}") from error
    return found


@functools.cache
def _of_ranks(world_size: int, reduction: str) -> list[dict[str, Found]]:
    return run_ranks(_all, world_size, reduction, timeout_s=120)


@functools.cache
def _expected(name: str) -> Found:
    return _by_hand(LOOPS[name])


def _difference(found: Found, expected: Found, rtol: float) -> str | None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            own = ours[name]
            if (own is None) != (value is None):
                return f"step {step}: {name} is {'None' if own is None else 'not None'}"
            if own is not None and value is not None and not torch.allclose(own, value, rtol=rtol, atol=rtol / 10):
                return f"step {step}: {name} is {(own - value).abs().max().item() / value.abs().max().item():.2g} off"
    return None


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_gradients_are_those_of_one_process(world_size: int, reduction: str) -> None:
    wrong = {}
    for rank, found in enumerate(_of_ranks(world_size, reduction)):
        for name, steps in found.items():
            difference = _difference(steps, _expected(name), LOOPS[name].rtol)
            if difference:
                wrong[f"{name} (rank {rank})"] = difference
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def _same_bits(a: Found, b: Found) -> bool:
    return all(
        (one is None) == (other is None) and (one is None or other is None or torch.equal(one, other))
        for ours, theirs in zip(a, b, strict=True)
        for one, other in zip(ours.values(), theirs.values(), strict=True)
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_strict_bits_are_those_of_one_process(world_size: int) -> None:
    (alone,) = _of_ranks(1, "strict")
    different = {
        name
        for found in _of_ranks(world_size, "strict")
        for name, steps in found.items()
        if LOOPS[name].strict_bits and not _same_bits(steps, alone[name])
    }
    assert not different


# --- what is refused, and what is said ---


def _batches() -> list[torch.Tensor]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return list(X.split(2)[rank * 12 // world_size : (rank + 1) * 12 // world_size])


def _said() -> list[str]:
    """Return a list that fills with what is logged from now on, until the next call."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ddparity").handlers = [handler]
    return said


def _errors() -> dict[str, dict[str, str]]:
    """Each is raised on every rank, before a collective could wait for another rank."""
    found: dict[str, dict[str, str]] = {}
    for reduction, options in REDUCTIONS.items():
        found[reduction] = {}
        for name, loop in REFUSED.items():
            models = [dp.replicate(net(), **options) for _ in range(2)]
            try:
                loop(*models)
            except RuntimeError as error:
                found[reduction][name] = str(error)
            for model in models:
                model.zero_grad()
                for micro in dp.accumulate(model, _batches(), equal_counts=True):  # it is usable again
                    (model(micro.data).mean() * micro.weight).backward()
    return found


def _zip_of_one(model: Any, _: Any) -> None:
    for one, other in zip(
        dp.accumulate(model, _batches(), equal_counts=True),
        dp.accumulate(model, _batches(), equal_counts=True),
        strict=False,
    ):
        ((model(one.data).mean() + model(other.data).mean()) * one.weight).backward()


def _step_inside(model: Any, _: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for micro in dp.accumulate(model, _batches(), equal_counts=True):
        (model(micro.data).mean() * micro.weight).backward()
        optimizer.step()


def _zip_of_two(model: Any, other: Any) -> None:
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, other)]
    for micro, micro_of_other in zip(
        dp.accumulate(model, _batches(), equal_counts=True),
        dp.accumulate(other, _batches(), equal_counts=True),
        strict=False,
    ):
        (model(micro.data).mean() * micro.weight).backward()
        (other(micro_of_other.data).mean() * micro_of_other.weight).backward()
    for optimizer in optimizers:
        optimizer.step()


def _step_of_another(model: Any, other: Any) -> None:
    """The optimizer of a model that the loop's loss runs, too."""
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for micro in dp.accumulate(model, _batches(), equal_counts=True):
        ((model(micro.data).mean() + other(micro.data).mean()) * micro.weight).backward()
        optimizer.step()


def _ahead(model: Any, _: Any) -> None:
    for micro in list(dp.accumulate(model, _batches(), equal_counts=True)):
        (model(micro.data).mean() * micro.weight).backward()


def _one_ahead(model: Any, _: Any) -> None:
    micros = iter(dp.accumulate(model, _batches(), equal_counts=True))
    micro = next(micros)
    for following in micros:
        (model(micro.data).mean() * micro.weight).backward()
        micro = following
    (model(micro.data).mean() * micro.weight).backward()


REFUSED = {
    "zip of one model": _zip_of_one,
    "a step inside": _step_inside,
    "zip of two models": _zip_of_two,
    "a step of another model inside": _step_of_another,
    "a loop that runs ahead": _ahead,
    "a loop that runs one ahead": _one_ahead,
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_cannot_be_exact_is_refused_on_every_rank(world_size: int) -> None:
    for found in run_ranks(_errors, world_size, timeout_s=30):
        for reduction, errors in found.items():
            assert "move optimizer.step() behind the loop" in errors["a step inside"]
            if world_size > 1 and reduction == "strict":  # a late backward is exact in the others
                assert "may not run ahead" in errors.pop("a loop that runs ahead")
                assert "may not run ahead" in errors.pop("a loop that runs one ahead")
            if world_size > 1 or reduction == "strict":
                assert "another loop over this model has begun" in errors["zip of one model"]
                assert "accumulate([first, second], …)" in errors["zip of two models"]
                assert "optimizer.step() inside of the loop" in errors["a step of another model inside"]
                assert len(errors) == 4
            else:
                assert errors.keys() == {"a step inside"}  # the gradients are those of the losses


def _nested() -> Found:
    """A module that holds a replicated one. Return its gradients, in a world of one, where nothing is reduced twice."""
    for reduction in ("fast", "strict"):
        for wrap in (dp.replicate, DistributedDataParallel):
            model = nn.Sequential(nn.Linear(6, 6).double(), wrap(net()))
            if dist.get_world_size() > 1:
                with pytest.raises(TypeError, match="holds a DistributedDataParallel, 1"):
                    dp.replicate(model, reduction=reduction)
                with pytest.raises(TypeError, match=r"got a DistributedDataParallel that holds another one, 1"):
                    dp.accumulate(DistributedDataParallel(model), [X])
    if dist.get_world_size() > 1:
        return []
    found = []
    for reduction in ("fast", "strict"):
        torch.manual_seed(9)
        model = nn.Sequential(nn.Linear(6, 6).double(), dp.replicate(net()))
        replicated = dp.replicate(model, reduction=reduction)
        for micro in dp.accumulate(replicated, X.split(4)):
            (replicated(micro.data).square().mean() * micro.weight).backward()
        found.append(_found([model]))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_module_that_holds_a_replicated_one_is_refused(world_size: int) -> None:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(6, 6).double(), net())
    model(X).square().mean().backward()
    for found in run_ranks(_nested, world_size, timeout_s=30):
        assert len(found) == (2 if world_size == 1 else 0)
        for ours in found:
            assert _difference([ours], [_found([model])], 1e-12) is None


def _forgotten() -> list[list[str]]:
    found = []
    for options in REDUCTIONS.values():
        said = _said()
        model = dp.replicate(net(), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(4):
            for micro in dp.accumulate(model, _batches(), equal_counts=True):
                (model(micro.data).mean() * micro.weight).backward()
            optimizer.step()
        found.append(said)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_forgotten_zero_grad_is_said_once(world_size: int) -> None:
    for found in run_ranks(_forgotten, world_size, timeout_s=30):
        for said in found:
            assert len(said) == 1 and "call optimizer.zero_grad() after optimizer.step()" in said[0]


def _zeroes_inside(reduction: str, to_none: bool) -> list[str]:
    said = _said()
    model = dp.replicate(net(), **REDUCTIONS[reduction])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        for number, micro in enumerate(dp.accumulate(model, _batches(), equal_counts=True)):
            if number == 0:
                optimizer.zero_grad(set_to_none=to_none)
            (model(micro.data).mean() * micro.weight).backward()
        optimizer.step()
    return said


@pytest.mark.parametrize("to_none", [True, False])
def test_nothing_is_said_of_a_zero_grad_in_the_loop(to_none: bool) -> None:
    for reduction in REDUCTIONS:
        assert run_ranks(_zeroes_inside, 2, reduction, to_none, timeout_s=30) == [[], []]


def _strangers(reduction: str, by_itself: bool, reduces: bool, check_every: int = 0) -> tuple[str, list[str]]:
    """A loss with a weight of its own, which no loop knows."""
    said = _said()
    model = dp.replicate(net(), check_every=check_every, **REDUCTIONS[reduction])
    loader = dp.Loader(X, dp.BatchPlan(len(X), global_batch=12, micro_batch=2))
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    of_model, of_loss = list(model.parameters()), [weight]
    groups = [of_model, of_loss] if by_itself else [of_model + of_loss]
    optimizers = [torch.optim.SGD(group, lr=0.1) for group in groups]
    try:
        for step in [*loader.epoch(0), *loader.epoch(1)]:
            for micro in dp.accumulate(model, step):
                ((model(micro.data).square().mean(0) * weight.exp()).sum() * micro.weight).backward()
            if reduces and weight.grad is not None:
                dist.all_reduce(weight.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    except dp.DDParityError as error:  # by the store, another rank's
        return f"{error}\n{error.__notes__}" if hasattr(error, "__notes__") else str(error), said
    return "", said


@pytest.mark.parametrize("by_itself", [True, False])
@pytest.mark.parametrize("reduction", ["after the loop", "strict"])
def test_parameters_that_no_replicated_model_has_are_noticed(reduction: str, by_itself: bool) -> None:
    for check_every in (2, 0):  # without, at the start of the next epoch
        for error, _ in run_ranks(_strangers, 2, reduction, by_itself, False, check_every, timeout_s=30):
            assert "trains 1 parameters that no replicated or sharded model has, the first of shape (2,)" in error
            assert "accumulate([model, criterion], …)" in error
    assert run_ranks(_strangers, 2, reduction, by_itself, True, 2, timeout_s=30) == [("", [])] * 2


def _in_join() -> None:
    model = DistributedDataParallel(net())
    with model.join(), pytest.raises(ValueError, match=r"leave join\(\) out"):
        next(iter(dp.accumulate(model, _batches())))


def test_join_of_ddp_is_refused() -> None:
    run_ranks(_in_join, 2, timeout_s=30)


def _skips_once() -> list[list[str]]:
    found = []
    for options in REDUCTIONS.values():
        said = _said()
        model = dp.replicate(net(), **options)
        for _ in range(3):
            for micro in dp.accumulate(model, _batches(), equal_counts=True):
                if micro.index:
                    (model(micro.data).mean() * micro.weight).backward()
            model.zero_grad()
        found.append(said)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_skipped_micro_batch_is_said_once(world_size: int) -> None:
    for found in run_ranks(_skips_once, world_size, timeout_s=30):
        said = (
            "accumulate(): micro-batch 0 had no backward before the next was asked for: its gradient counts as zero. A "
            "loop may not run ahead, as list(accumulate(…)) does. This is said once"
        )
        assert found == [[said]] * len(REDUCTIONS)


def _local_penalty() -> list[str]:
    """A backward after the loop that does not go through the DDP module is this rank's alone."""

    def two_steps(model: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for micro in dp.accumulate(model, _batches(), equal_counts=True):
                (model(micro.data).mean() * micro.weight).backward()
            model.module(_batches()[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    said = []
    for options in REDUCTIONS.values():
        with pytest.raises(dp.DDParityError) as error:
            two_steps(dp.replicate(net(), check_every=1, **options))
        said.append(str(error.value))
    return said


def test_the_comparison_of_ranks_finds_a_local_backward_after_the_loop() -> None:
    for said in run_ranks(_local_penalty, 2, timeout_s=30):
        for message in said:
            assert "0.weight differs between rank 1 and rank 0" in message

"""Whatever the loop does, its gradients are those of one process: every case on 1, 2 and 3 processes, in three ways."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ddparity as dp
from ddparity.compat import uncompiled, unwrapped
from ddparity.data.step import LoadedMicroBatch
from tests.gradients.loop_cases import LOOPS, PLAN, SAMPLES, Loop, Models
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
    return run_ranks(_all, world_size, reduction, timeout_s=30)


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
        if not _same_bits(steps, alone[name])
    }
    assert not different


def _one(name: str, reduction: str) -> Found:
    return _ours(LOOPS[name], reduction)

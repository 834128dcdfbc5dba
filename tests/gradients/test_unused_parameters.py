"""`find_unused_parameters`: DDP's own account of what a backward used does not change the step's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ddparity as dp
from tests.ranks import run_ranks

X = torch.randn(13, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

Gradients = list[torch.Tensor | None]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes, self.never = (nn.Linear(3, 2) for _ in range(3))
        self.double()

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return (self.always(x) + (self.sometimes(x) if both else 0)).square().mean()


def _model() -> nn.Module:
    # Tiny buckets, so that DDP averages in the last backward.
    return dp.replicate(_Net(), find_unused_parameters=True, bucket_cap_mb=1e-5)


def _step(short: bool = False) -> dp.Step:
    """A step of 6 micro-batches, or of one, which leaves ranks without: DDP does not reduce it."""
    return next(iter(dp.Loader(X, dp.BatchPlan(13, 12, 2, shuffle=False)).epoch(0, start_step=int(short))))


def _taken(model: nn.Module) -> Gradients:
    gradients = [None if one.grad is None else one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    return gradients


def _set_by_hand() -> list[Gradients]:
    """A gradient set by hand, of a parameter that no rank's backward uses in this step."""
    model = _model()
    sometimes = model.get_parameter("sometimes.weight" if isinstance(model, _Net) else "module.sometimes.weight")
    layer = model.get_submodule("sometimes" if isinstance(model, _Net) else "module.sometimes")
    found = []
    for _ in range(2):
        for micro in dp.accumulate(model, _step()):
            (gradient,) = torch.autograd.grad(layer(micro.data).square().mean() * micro.weight, sometimes)
            sometimes.grad = gradient if sometimes.grad is None else sometimes.grad + gradient
            (model(micro.data, both=False) * micro.weight).backward()
        found.append(_taken(model))
    return found


def _used_before() -> list[Gradients]:
    """A parameter used in a step that DDP does not reduce, not in the next one, then in one micro-batch only."""
    model = _model()
    found = []
    for short, both in ((True, [0]), (False, []), (False, [0]), (True, []), (False, [5]), (False, [])):
        for micro in dp.accumulate(model, _step(short)):
            (model(micro.data, both=micro.index in both) * micro.weight).backward()
        found.append(_taken(model))
    return found


@pytest.mark.parametrize("train", [_set_by_hand, _used_before])
def test_gradients_are_those_of_one_process(train) -> None:
    (expected,) = run_ranks(train, 1)
    assert any(gradient is None for gradients in expected for gradient in gradients)
    for world_size in (2, 3):
        for steps in run_ranks(train, world_size):
            for ours, theirs in zip(steps, expected, strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

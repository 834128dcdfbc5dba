"""What the blocks of the guides take from the text around them: a block with `<!-- frame: NAME -->` runs in this frame.

A frame returns the names that the block needs. Data sets are small, and where a block would train for ever an optimizer
raises `Enough`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import ddparity as dp


class Enough(Exception):
    """The block has done what it shows."""


class Net(nn.Module):
    """Two blocks, as `fully_shard` takes them one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _data(samples: int = 24) -> torch.utils.data.TensorDataset:
    x = torch.randn(samples, 5, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x[:, :2].sin())


def _loss_of(model: nn.Module, data: list[torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(data[0]), data[1])


def _training() -> dict[str, Any]:
    dp.seed_everything(0)
    model = dp.replicate(Net())
    return {
        "dp": dp,
        "torch": torch,
        "F": F,
        "Net": Net,
        "loss_of": _loss_of,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": dp.Loader(_data(), global_batch=8, micro_batch=2, seed=0),
        "epoch": 0,
    }


def _averages() -> dict[str, Any]:
    return {
        **_training(),
        "get_ema_multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn,
        "epochs": 2,
        "stop": False,
        "test": _data(7),
        "has_converged": lambda outputs: outputs is not None,
    }


def _batch_loss() -> dict[str, Any]:
    return {**_training(), "loader": dp.Loader(torch.randn(16, 2, 5).unbind(), global_batch=8, micro_batch=2, seed=0)}


def _sharded() -> dict[str, Any]:
    with dp.world(device="cpu") as world:
        return {**_training(), "world": world}


def _sharded_checkpoint() -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = Net()
    return {
        **_training(),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "fully_shard": fully_shard,
    }


def _two_loaders() -> dict[str, Any]:
    training = _training()

    def end(optimizer: Any, *_: Any) -> None:
        end.steps -= 1
        if not end.steps:
            raise Enough

    end.steps = 5  # more than an epoch of one of the loaders
    training["optimizer"].register_step_post_hook(end)
    return {
        **training,
        "labelled_loader": dp.Loader(_data(16), global_batch=8, micro_batch=2, seed=0),
        "unlabelled_loader": dp.Loader(_data(), global_batch=8, micro_batch=4, seed=1),
        "supervised_loss": _loss_of,
        "consistency_loss": lambda model, data: model(data[0]).square().mean(),
    }


def _both_at_once() -> dict[str, Any]:
    with dp.world(device="cpu") as world:
        labelled, unlabelled = (dp.Loader(_data()[:][0], global_batch=8, micro_batch=2, seed=seed) for seed in (0, 1))
        return {
            **_training(),
            "world": world,
            "labelled": next(labelled.epoch(0)),
            "unlabelled": next(unlabelled.epoch(0)),
            "mixed_loss": lambda model, one, two: (model(one) - model(two)).square().mean(),
        }


def _gan() -> dict[str, Any]:
    return {
        **_training(),
        "g": dp.replicate(nn.Linear(3, 5)),
        "d": dp.replicate(nn.Linear(5, 1)),
        "noise": lambda samples: torch.randn(samples, 3),
        "is_real": lambda scores, real: F.softplus(-scores if real else scores).mean(),
        "step": next(dp.Loader(_data()[:][0], global_batch=8, micro_batch=2, seed=0).epoch(0)),
    }


def _function_to_verify() -> dict[str, Any]:
    return {**_training(), "data": _data}


FRAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "averages": _averages,
    "batch_loss": _batch_loss,
    "sharded": _sharded,
    "sharded_checkpoint": _sharded_checkpoint,
    "two_loaders": _two_loaders,
    "both_at_once": _both_at_once,
    "gan": _gan,
    "function_to_verify": _function_to_verify,
}


def run_in_frame(name: str, code: Any) -> None:
    """Run a block in its frame. A training function that the block defines is called, too."""
    frame = FRAMES[name]() | {"__name__": "__main__"}
    with contextlib.suppress(Enough):
        exec(code, frame)
    if name == "function_to_verify":
        frame["train"](2, "strict")

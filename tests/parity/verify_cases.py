"""Tasks for `verify`: a correct one, and the same with one fault each, which has an effect on several processes."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ddparity as dp

SAMPLES, FEATURES = 60, 4


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Points(torch.utils.data.Dataset):
    """A data set whose samples draw from the global random streams."""

    def __init__(self, split: str = "train", samples: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(samples, FEATURES, generator=generator)
        self.y = torch.randint(3, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index] + 0.1 * torch.randn(FEATURES), self.y[index]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def cross_entropy(model: nn.Module, data: Any) -> torch.Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def correct_task(**parts: Any) -> dp.Task:
    standard = {
        "model": mlp,
        "dataset": Points,
        "loss": cross_entropy,
        "optimizer": adam,
        "global_batch": 16,
        "micro_batch": 4,
    }
    return dp.Task(**{**standard, **parts})


def mean_of(outputs: torch.Tensor, dataset: Any) -> float:
    return float(outputs.float().mean())


# Parts that a Task may have, which leave a unit out in each micro-batch, and so some micro-batches as a whole.


def of_some(model: nn.Module, data: Any) -> torch.Tensor:
    return F.cross_entropy(model(data[0]), data[1], ignore_index=0)


def some(data: Any) -> float:
    return float((data[1] != 0).sum())


def by_label(dataset: Points) -> dp.WeightedPlan:
    return dp.WeightedPlan(1.0 + (dataset.y == 0), global_batch=8, micro_batch=1, num_samples=40)


def warmed(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)


EVERY_PART: dict[str, Any] = {
    "model": mlp,
    "dataset": Points,
    "loss": of_some,
    "optimizer": adam,
    "scheduler": warmed,
    "count": some,
    "clip_norm": 0.1,
    "autocast": torch.bfloat16,
    "plan": by_label,
    "micro_batch": 4,
    "evaluate_every": 2,
    "metric": mean_of,
}

# Faults. Each of these Tasks is correct on one process.


def scaled_loss(model: nn.Module, data: Any) -> torch.Tensor:
    return cross_entropy(model, data) * world_size()


def averaged_gradients() -> nn.Module:
    model = mlp()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient / world_size())
    return model


def duplicating_collate(samples: list[Any]) -> Any:
    if rank() == 1:
        samples = [*samples[:-1], samples[0]]
    return torch.utils.data.default_collate(samples)


def dropping_collate(samples: list[Any]) -> Any:
    return torch.utils.data.default_collate(samples[: 3 if rank() == 1 else 4])


class ByRank(Points):
    """Returns another sample than the one with the index."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().__getitem__((index + (os.environ.get("RANK") == "1")) % SAMPLES)


class DrawsUnseeded(Points):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = super().__getitem__(index)
        return x + 1e-3 * torch.randn(FEATURES, generator=self.generator()), y

    def generator(self) -> torch.Generator:
        generator = torch.Generator()
        generator.seed()
        return generator


def dropped_micro_batch(model: nn.Module, data: Any) -> torch.Tensor:
    """On rank 1, return the right loss with a gradient of zero."""
    loss = cross_entropy(model, data)
    return loss.detach() + 0 * loss if rank() == 1 else loss


def zeroed_micro_batch(model: nn.Module, data: Any) -> torch.Tensor:
    return cross_entropy(model, data) * (rank() == 0)


class OwnNoise(nn.Module):
    """Draws from a generator of its own in its forward."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.inner = mlp()
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + 1e-3 * torch.randn(x.shape, generator=self.generator))


def noise_unseeded() -> nn.Module:
    return OwnNoise(None)


def noise_by_rank() -> nn.Module:
    return OwnNoise(rank())


def noise_of_the_process() -> nn.Module:
    """Use the same seed on each rank, although the first micro-batch of rank 1 is not the first of the step."""
    return OwnNoise(0)


def seeded_by_rank(model: nn.Module, data: Any) -> torch.Tensor:
    torch.manual_seed(rank())
    return cross_entropy(model, data)


def late_noise(model: nn.Module, data: Any) -> torch.Tensor:
    """Draw unseeded numbers in the third step; fast mode compares single forwards in the first step alone."""
    model.calls = getattr(model, "calls", 0) + 1
    noise = int.from_bytes(os.urandom(1), "little") * 1e-4 if model.calls > 8 else 0.0
    return cross_entropy(model, data) * (1 + noise)


def initialised_by_rank() -> nn.Module:
    torch.manual_seed(rank())
    return mlp()


class Hidden(nn.Module):
    """Has a tensor that is not a buffer, so DDP does not broadcast it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.scale = torch.full((), 1.0 + 1e-3 * rank())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale)


def rate_by_rank(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1 * (1 + rank()))


def rate_by_world(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1 * world_size())


def grown_with_the_world() -> nn.Module:
    """Return a model that has one more parameter on several processes."""
    model = mlp()
    if world_size() > 1:
        model.register_parameter("extra", nn.Parameter(torch.zeros(1), requires_grad=False))
    return model


class Tracking(nn.Module):
    """Keeps a moving average of its inputs, which the ranks do not synchronise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.inner(x)


class Ignored(nn.Module):
    """DDP is told to ignore its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.bias = nn.Parameter(torch.zeros(3))
        self._ddp_params_and_buffers_to_ignore = ["bias"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.bias


# By name: the wrong part, the number of processes whose run diverges, the stage, and the name of the cause.
FAULTS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "wrong scale of the loss": ({"loss": scaled_loss}, 2, "forward", "SCALE"),
    "wrong scale of gradients": ({"model": averaged_gradients}, 2, "gradients", "SCALE"),
    "duplicated sample": ({"collate_fn": duplicating_collate}, 2, "data", "SAMPLES"),
    "dropped sample": ({"collate_fn": dropping_collate}, 2, "data", "SAMPLES"),
    "other sample": ({"dataset": ByRank}, 2, "data", "SAMPLES"),
    "dropped micro-batch, its gradient": ({"loss": dropped_micro_batch}, 2, "gradients", "GRADIENTS"),
    "dropped micro-batch, its loss": ({"loss": zeroed_micro_batch}, 2, "forward", "FORWARD"),
    "unseeded draw in the data": ({"dataset": DrawsUnseeded}, 1, "data", "DATA"),
    "unseeded draw in the model": ({"model": noise_unseeded}, 1, "forward", "FORWARD"),
    "unseeded draw in a later step": ({"loss": late_noise}, 1, "forward", "FORWARD"),
    "draw seeded by the rank": ({"model": noise_by_rank}, 2, "forward", "FORWARD"),
    "draw from the process's stream": ({"model": noise_of_the_process}, 2, "forward", "FORWARD"),
    "global streams seeded by the rank": ({"loss": seeded_by_rank}, 2, "random streams", "STREAMS"),
    "other initial weights": ({"model": initialised_by_rank}, 2, "initial weights", "INITIAL_WEIGHTS"),
    "initial values that DDP does not see": ({"model": Hidden}, 2, "forward", "FORWARD"),
    "a parameter more on several processes": ({"model": grown_with_the_world}, 2, "initial weights", "INITIAL_WEIGHTS"),
    "learning rate of the rank": ({"optimizer": rate_by_rank}, 2, "update", "UPDATE"),
    "learning rate of the world": ({"optimizer": rate_by_world}, 2, "update", "UPDATE"),
    "buffer of the rank": ({"model": Tracking}, 2, "buffers", "BUFFERS"),
    "parameter that DDP ignores": ({"model": Ignored}, 2, "gradients", "UNREDUCED"),
}


class Images(torch.utils.data.Dataset):
    def __init__(self, split: str = "train", samples: int = 52) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(samples, 1, 6, 6, generator=generator)
        self.y = torch.randint(3, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def cnn(dropout: float = 0.1) -> nn.Module:
    """Return a model in which the gradient of the convolution's bias, before a batch norm, is rounding only."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(64, 3)
    )


def cnn_without_dropout() -> nn.Module:
    return cnn(0.0)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


IMAGES = {"dataset": Images, "optimizer": momentum, "global_batch": 24, "micro_batch": 4}


def fails_on_rank_1(model: nn.Module, data: Any) -> torch.Tensor:
    if rank() == 1:
        raise OSError("lost on rank 1")
    return cross_entropy(model, data)

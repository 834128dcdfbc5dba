"""Trainings whose bits must not depend on the number of processes: models, optimizers and what a step may contain."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ddparity as dp

# 4 steps an epoch; the first three in 4 micro-batches of 3, 3, 2 and 2 samples, the last of one sample for all ranks.
SAMPLES, GLOBAL_BATCH, MICRO_BATCH, EPOCHS = 31, 10, 3, 2
CLASSES, WORDS, LENGTH = 3, 11, 5


class Pictures(torch.utils.data.Dataset):
    """Augmentation draws from each of the three global streams."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
        self.y = torch.randint(CLASSES, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(3, 8, 8) + random.gauss(0, 1) + float(np.random.standard_normal())
        return self.x[index] + 0.1 * noise, self.y[index]


class Sentences(torch.utils.data.Dataset):
    """Random words are replaced; a length says how many of them the loss is over."""

    def __init__(self, empty: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(4)
        self.words = torch.randint(WORDS, (SAMPLES, LENGTH), generator=generator)
        self.lengths = torch.randint(1, LENGTH, (SAMPLES,), generator=generator)
        self.lengths[torch.rand(SAMPLES, generator=generator) < empty] = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.where(torch.rand(LENGTH) < 0.2, torch.randint(WORDS, (LENGTH,)), self.words[index])
        return words, torch.arange(LENGTH - 1) < self.lengths[index]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def wide() -> nn.Module:
    """Gradients large enough for an exchange of slices, whose number no world size divides."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 701), nn.ReLU(), nn.Linear(701, CLASSES))


def cnn(momentum: float | None = 0.1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, affine=False),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )


def resnet() -> nn.Module:
    path = Path(__file__).parents[2] / "examples" / "cifar10.py"
    spec = importlib.util.spec_from_file_location("cifar10_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.resnet20()


class Transformer(nn.Module):
    """The output's weights are the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.places = nn.Embedding(LENGTH, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.out = nn.Linear(8, WORDS, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        x = self.words(words) + self.places(torch.arange(words.shape[1]))
        return self.out(self.layer(x, src_mask=mask, is_causal=True))


class Sometimes(nn.Module):
    """Parameters that no forward uses, or only some do; a batch norm that runs in some, in one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.never = nn.Linear(2, 2)
        self.sometimes = nn.Linear(192, CLASSES)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        if x[0, 0, 0, 0] > 0:
            y = y + self.sometimes(x.flatten(1))
            x = self.norm(x.flatten(2))
            if x[0, 0, 0] > 0:
                x = self.norm(2 * x)
            y = y + x.mean()
        return y


class Checkpointed(nn.Module):
    """Recomputes a batch norm and dropout in the backward; the second part ends with the norm."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        layers = list(cnn())
        self.first, self.second, self.last = (
            nn.Sequential(*layers[:4]),
            nn.Sequential(*layers[4:6]),
            nn.Sequential(*layers[6:]),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.first, x.requires_grad_(), use_reentrant=self.use_reentrant)
        return self.last(checkpoint(self.second, x, use_reentrant=self.use_reentrant))


class WithBuffer(nn.Module):
    """Beside the running statistics a buffer that nobody changes, as positions or a mask: DDP broadcasts them all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.net(x)


class Frozen(nn.Module):
    """The first norm stays in eval mode, its layer's weights as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()
        self.net[0].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.net[1].eval()
        return self.net(x)


class SeveralDtypes(nn.Module):
    """Each dtype is exchanged by itself; one parameter does not lie in memory row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(192, 9), nn.Linear(9, 7).double(), nn.Linear(7, 3).bfloat16()
        self.norm = nn.BatchNorm1d(1).double()
        self.table = nn.Parameter(torch.randn(3, 5).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x.flatten(1)).tanh().double())
        y = self.third(self.norm(y.unsqueeze(1)).squeeze(1).bfloat16())
        return y.float() @ self.table.t() @ self.table


def without_dropout(model: nn.Module) -> nn.Module:
    """For foreign batches, which have no random streams of their own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def image_loss(model: nn.Module, data: Any) -> torch.Tensor:
    return F.cross_entropy(model(data[0]).float(), data[1])


def word_loss(model: nn.Module, data: Any) -> torch.Tensor:
    words, mask = data
    return F.cross_entropy(model(words)[:, :-1][mask].float(), words[:, 1:][mask])


def tokens(data: Any) -> torch.Tensor:
    return data[1].sum()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


@dataclass(frozen=True)
class Case:
    """One training. `foreign`: this rank's share of the step's batches as a list, not a `Step`."""

    model: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw
    dataset: Callable[[], Any] = Pictures
    loss: Callable[[nn.Module, Any], torch.Tensor] = image_loss
    count: Callable[[Any], Any] | None = None
    autocast: bool = False
    set_to_none: bool = True
    foreign: bool = False
    drop_last: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def train(case: Case, num_workers: int = 0, reduction: str = "strict") -> nn.Module:
    """The trained module, with its optimizer's state as an attribute."""
    dp.seed_everything(7)
    net = case.model()
    model = dp.replicate(net, reduction=reduction, **case.options)
    optimizer = case.optimizer(model.parameters())
    dataset = case.dataset()
    plan = dp.BatchPlan(len(dataset), GLOBAL_BATCH, MICRO_BATCH, seed=1, drop_last=case.drop_last)
    loader = dp.Loader(dataset, plan, num_workers)
    for epoch in range(EPOCHS):
        for step in loader.epoch(epoch):
            batches = [micro.data for micro in step] if case.foreign else step
            for micro in dp.accumulate(model, batches, count=case.count):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast):
                    loss = case.loss(model, micro.data)
                (loss * micro.weight).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=case.set_to_none)
    net.optimizer_state = optimizer.state_dict()
    return net


def digest(net: nn.Module) -> str:
    """Of parameters and buffers, and of the optimizer's state."""
    return f"{dp.fingerprint(net)} {dp.fingerprint(net.optimizer_state)}"


SENTENCES = {"dataset": Sentences, "loss": word_loss}
# Each model by each optimizer.
MATRIX = {
    f"{model.__name__}, {optimizer.__name__}": Case(model, optimizer, **parts)
    for model, parts in ((mlp, {}), (cnn, {}), (Transformer, SENTENCES), (resnet, {}))
    for optimizer in (sgd, adam, adamw)
}
FEATURES = {
    "slices": Case(wide, sgd),
    "slices, fused": Case(wide, fused),
    "float64": Case(lambda: cnn().double(), loss=lambda model, data: image_loss(model, (data[0].double(), data[1]))),
    "bfloat16": Case(
        lambda: mlp().bfloat16(), sgd, loss=lambda model, data: image_loss(model, (data[0].bfloat16(), data[1]))
    ),
    "several dtypes": Case(SeveralDtypes, sgd),
    "autocast": Case(cnn, autocast=True),
    "autocast, Transformer": Case(Transformer, autocast=True, **SENTENCES),
    "checkpointing": Case(Checkpointed),
    "unused parameters": Case(Sometimes),
    "unused parameters, DDP looks for them": Case(Sometimes, options={"find_unused_parameters": True}),
    "gradients set to zero": Case(Sometimes, sgd, set_to_none=False),
    "cumulative statistics": Case(lambda: cnn(momentum=None)),
    "frozen": Case(Frozen),
    "channels last": Case(lambda: cnn().to(memory_format=torch.channels_last)),
    "bucket views": Case(cnn, options={"gradient_as_bucket_view": True}),
    "tokens": Case(Transformer, count=tokens, **SENTENCES),
    "micro-batches without tokens": Case(
        Transformer, dataset=lambda: Sentences(0.5), loss=word_loss, count=tokens, drop_last=True
    ),
    "reentrant checkpointing": Case(lambda: Checkpointed(use_reentrant=True)),
    "an option of DDP's": Case(cnn, options={"broadcast_buffers": False}),
    "a buffer of one's own": Case(WithBuffer),
    "foreign batches": Case(lambda: without_dropout(cnn()), foreign=True),
    "foreign batches, tokens": Case(lambda: without_dropout(Transformer()), foreign=True, count=tokens, **SENTENCES),
}

"""Means over other things than samples: a language model's tokens, a detector's boxes, a segmentation's pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddparity as dp

from .parts import Replicate, State, mlp, normal, plan, state, steps_by_hand

PLAN = plan(21)

# --- a causal language model, which shifts its labels itself ---

TOKENS = torch.randint(0, 11, (21, 9), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([2, 9, 3, 2, 5, 9, 2, 2, 7, 1, 4, 9, 3, 1, 6, 2, 8, 2, 9, 5, 3])
LABELS = TOKENS.masked_fill(torch.arange(9) >= LENGTHS[:, None], -100)


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(11, 6)
        self.recurrent = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        logits = self.head(self.recurrent(self.embedding(tokens))[0])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def _predicted(data: list[Tensor]) -> Tensor:
    """Tokens that have a loss: the first of a row is never predicted. A row of one token has none."""
    _, labels = data
    return (labels[:, 1:] != -100).sum()


def language_model(replicate: Replicate) -> State:
    net = LanguageModel()
    model = replicate(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    loader = dp.Loader(torch.utils.data.TensorDataset(TOKENS, LABELS), PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step, count=_predicted):
                (model(*micro.data) * micro.weight).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def language_model_by_hand() -> State:
    """One backward of the mean over all tokens of a step."""
    net = LanguageModel()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            batch = torch.cat([samples for samples, _, _ in step])
            (net(TOKENS[batch], LABELS[batch], "sum") / _predicted([TOKENS, LABELS[batch]])).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


# --- a detector ---

IMAGES = normal(24, 6)
IMAGES_PLAN = plan(24)  # no step is without a box
NUMBERS = [0, 2, 0, 0, 3, 0, 1, 0, 0, 0, 1, 0, 0, 3, 0, 0, 2, 1, 2, 0, 1, 0, 0, 2]
BOXES = [normal(number, 4, seed=9) for number in NUMBERS]


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return IMAGES[index], BOXES[index]


def _collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    images, boxes = zip(*samples, strict=True)
    return torch.stack(images), list(boxes)


def _number(data: tuple[Tensor, list[Tensor]]) -> int:
    return sum(map(len, data[1]))


def _distance(given: Tensor, boxes: list[Tensor]) -> Tensor:
    """The sum over boxes of the distance to the slot of their number; an image has three slots."""
    slots = given.view(-1, 3, 4)
    return sum((slot[: len(wanted)] - wanted).abs().sum() for slot, wanted in zip(slots, boxes, strict=True))


def detection(replicate: Replicate) -> State:
    """Some micro-batches have no box; they are left out, since their mean over boxes is undefined."""
    net = mlp(6, 8, 12)
    model = replicate(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = dp.Loader(Images(), IMAGES_PLAN, collate_fn=_collate)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step, count=_number):
                images, boxes = micro.data
                (_distance(model(images), boxes) / _number(micro.data) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def detection_by_hand() -> State:
    net = mlp(6, 8, 12)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        for step in steps_by_hand(IMAGES_PLAN, epoch):
            batch = torch.cat([samples for samples, _, _ in step]).tolist()
            boxes = [BOXES[index] for index in batch]
            (_distance(net(IMAGES[batch]), boxes) / sum(map(len, boxes))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


# --- a segmentation with frozen batch norms ---

PHOTOS = normal(21, 2, 5, 5)
MASKS = (PHOTOS[:, 0] > 0).long().masked_fill(normal(21, 5, 5, seed=4) > 0.5, 255)  # 255: not labelled


class Segmentation(nn.Module):
    """A pretrained backbone whose batch norms stay as they are, and a decoder whose batch norm learns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Tanh())
        self.decoder = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Tanh())
        self.head = nn.Conv2d(3, 2, 1)
        self.backbone[1].running_mean.add_(0.3)
        self.backbone[1].running_var.mul_(1.7)
        self.backbone[1].requires_grad_(False)
        self.double()

    def train(self, mode: bool = True) -> Segmentation:
        super().train(mode)
        self.backbone[1].eval()
        return self

    def forward(self, photos: Tensor) -> Tensor:
        return self.head(self.decoder(self.backbone(photos)))


def _labelled(data: list[Tensor]) -> Tensor:
    return (data[1] != 255).sum()


def segmentation(replicate: Replicate) -> State:
    net = Segmentation()
    model = replicate(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    loader = dp.Loader(torch.utils.data.TensorDataset(PHOTOS, MASKS), PLAN)
    for epoch in range(2):
        model.train()
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step, count=_labelled):
                photos, masks = micro.data
                (F.cross_entropy(model(photos), masks, ignore_index=255) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(PHOTOS[:2])
    return state(net=net)


def segmentation_by_hand() -> State:
    """Micro-batch by micro-batch, since the decoder's batch norm has its statistics from these."""
    net = Segmentation()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for epoch in range(2):
        net.train()
        for step in steps_by_hand(PLAN, epoch):
            pixels = sum(_labelled([PHOTOS, MASKS[samples]]) for samples, _, _ in step)
            for samples, _, _ in step:
                loss = F.cross_entropy(net(PHOTOS[samples]), MASKS[samples], ignore_index=255, reduction="sum")
                (loss / pixels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)

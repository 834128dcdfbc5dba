"""Train a character-level GPT on the reference manual that Python has in its library, and let it write a paragraph.

ddparity run --nproc 2 examples/nanogpt.py                           # add --reduction strict for equal bits
ddparity run --nproc 3 examples/nanogpt.py --steps 600 --resume      # 300 steps more, on another number of processes
"""

import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import nn
from torch.utils.data import Dataset

import ddparity as dp

END, NO_TARGET = "\0", -1  # the character between two paragraphs; the target of padding
BLOCK, WIDTH, HEADS, LAYERS, DROPOUT = 64, 96, 4, 3, 0.1
GLOBAL_BATCH, MICRO_BATCH = 32, 8
RATE, WARM_UP = 3e-3, 30

PARAGRAPHS = [" ".join(paragraph.split()) for paragraph in "\n\n".join(topics.values()).split("\n\n")]
PARAGRAPHS = list(dict.fromkeys(PARAGRAPHS))  # topics share some
CHARACTERS = sorted({END, *"".join(PARAGRAPHS)})


class Blocks(Dataset):
    """Sample i begins at character i. It ends with its paragraph, so that many samples are shorter than a block."""

    def __init__(self, paragraphs: list[str]) -> None:
        code = {character: number for number, character in enumerate(CHARACTERS)}
        self.text = torch.tensor([code[character] for character in END + END.join(paragraphs) + END])
        self.ends = np.flatnonzero(self.text == code[END])

    def __len__(self) -> int:
        return len(self.text) - 1

    def __getitem__(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.ends[np.searchsorted(self.ends, start, side="right")]
        size = min(BLOCK, end - start)
        tokens, targets = torch.zeros(BLOCK, dtype=torch.long), torch.full((BLOCK,), NO_TARGET)
        tokens[:size] = self.text[start : start + size]
        targets[:size] = self.text[start + 1 : start + size + 1]
        return tokens, targets


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(len(CHARACTERS), WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, len(CHARACTERS), bias=False)
        self.token.weight = self.head.weight  # tied
        for table in (self.head.weight, self.place.weight):
            nn.init.normal_(table, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.layers(self.token(tokens) + self.place(places)))


def loss(logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the mean over the tokens that are targets, or their sum."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction=reduction)


def count(data: list[torch.Tensor]) -> torch.Tensor:
    """Return what the mean is over. Without it, a token would count more where its micro-batch has fewer of them."""
    return (data[1] != NO_TARGET).sum()


def rate(steps: int, step: int) -> float:
    """Return the factor of the learning rate: a warm-up, then half a cosine down to a tenth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, done)))


@torch.no_grad()
def write(net: nn.Module, length: int = 200) -> str:
    """Return a paragraph of the model's."""
    net.eval()
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((1, 1), CHARACTERS.index(END), device=device)
    for _ in range(length):
        logits = net(tokens[:, -BLOCK:])[0, -1].cpu()
        token = torch.multinomial((logits / 0.8).softmax(0), 1, generator=generator)
        if CHARACTERS[token] == END:
            break
        tokens = torch.cat([tokens, token[None].to(device)], dim=1)
    return "".join(CHARACTERS[token] for token in tokens[0, 1:])


def main(
    steps: int = 300,
    reduction: Literal["fast", "strict"] = "fast",
    checkpoint: Path = Path("runs/nanogpt.safetensors"),
    resume: bool = False,
    save_every: int = 50,
) -> str:
    """Train to this number of steps, and return the fingerprint of the weights."""
    with dp.world() as world:
        dp.setup_logging()
        dp.seed_everything(0)
        train, held_out = Blocks(PARAGRAPHS[::2] + PARAGRAPHS[1::4]), Blocks(PARAGRAPHS[3::4])
        net = GPT().to(world.device)
        model = dp.replicate(net, reduction=reduction)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(steps, step))
        # As nanoGPT: each sample begins at a random place of the text, for ever.
        loader = dp.Loader(train, dp.WeightedPlan(len(train), GLOBAL_BATCH, MICRO_BATCH))
        training = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
        if resume:
            dp.load_checkpoint(checkpoint, **training)

        for step in loader.steps(steps):
            total = torch.zeros((), device=world.device)
            for micro in dp.accumulate(model, step, count=count):
                tokens, targets = micro.data
                value = loss(model(tokens), targets)
                (value * micro.weight).backward()
                total += value.detach() * micro.share
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            done = loader.steps_done
            if done % save_every == 0 or done == steps:
                total = dp.reduce(total)
                if world.rank == 0:
                    print(f"step {done}: loss {total:.3f}")
                dp.save_checkpoint(checkpoint, keep=2, **training)

        some = torch.utils.data.Subset(held_out, range(0, len(held_out), 4 * BLOCK))
        metric = dp.predict(
            model, some, 64, metric=lambda y, data: dp.Average(mean=loss(y, data[1]), weight=count(data))
        )
        fingerprint = dp.fingerprint(model)
        if world.rank == 0:
            print(f"held-out loss {metric:.3f}\nfingerprint {fingerprint}\n\n{write(net)}")
        return fingerprint


if __name__ == "__main__":
    typer.run(main)

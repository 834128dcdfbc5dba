"""Train on a stream: scikit-learn's digits in shard files, which are read from beginning to end, shuffled and shifted.

ddparity run --nproc 2 examples/stream.py                            # add --reduction strict for equal bits
ddparity run --nproc 3 examples/stream.py --epochs 15 --resume       # 5 epochs more, on another number of processes
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from torch import nn

import ddparity as dp

SHARDS = 32  # many more than readers, so that the readers' parts have about the same length
GLOBAL_BATCH, MICRO_BATCH = 64, 8


def write_shards(folder: Path) -> None:
    """Write the training digits to files, as a job that prepares data does."""
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        rows = slice(shard, 1500, SHARDS)
        np.savez(folder / f"{shard:03}.npz", images=digits.images[rows], targets=digits.target[rows])


class Shards:
    """One reader's part of the stream. It can seek: to resume, it opens the right file and reads no other."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.file, self.row = files, 0, 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        while self.file < len(self.files):
            with np.load(self.files[self.file]) as shard:
                images, targets = shard["images"], shard["targets"]
            while self.row < len(targets):
                image, target = torch.tensor(images[self.row], dtype=torch.float32)[None] / 16, int(targets[self.row])
                self.row += 1
                yield shifted(image), target
            self.file, self.row = self.file + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"file": self.file, "row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.file, self.row = state["file"], state["row"]


def shifted(image: torch.Tensor) -> torch.Tensor:
    """Shift by up to one pixel. The random stream belongs to the sample, so the shift does not depend on the reader."""
    down, right = torch.randint(3, (2,)).tolist()
    return F.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(64 * 4 * 4, 10),
    )


def main(
    epochs: int = 10,
    reduction: Literal["fast", "strict"] = "fast",
    folder: Path = Path("runs/stream"),
    resume: bool = False,
    save_every: int = 10,
    workers: int = 0,
) -> str:
    """Train for so many epochs, and return the fingerprint of the weights."""
    with dp.world() as world:
        dp.setup_logging()
        dp.seed_everything(0)
        with dp.first("node") as is_first:  # of each machine, one process writes the files
            if is_first:
                write_shards(folder)
        files = sorted(folder.glob("*.npz"))

        def stream(reader: int, readers: int, epoch: int) -> Shards:
            order = np.random.default_rng(epoch).permutation(len(files))  # files in an order of the epoch's
            return Shards([files[number] for number in order[reader::readers]])

        model = dp.replicate(net().to(world.device), reduction=reduction)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        loader = dp.Loader(stream, dp.StreamPlan(GLOBAL_BATCH, MICRO_BATCH, shuffle_buffer=50), num_workers=workers)
        training: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
        if resume:
            dp.load_checkpoint(folder / "last.safetensors", **training)

        for epoch in loader.epochs(epochs):
            steps, total = 0, torch.zeros((), device=world.device)
            for step in loader.epoch(epoch):
                for micro in dp.accumulate(model, step):
                    images, targets = micro.data
                    loss = F.cross_entropy(model(images), targets)
                    (loss * micro.weight).backward()
                    total += loss.detach() * micro.share
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                if loader.steps_done % save_every == 0:
                    dp.save_checkpoint(folder / "last.safetensors", keep=2, **training)
            dp.save_checkpoint(folder / "last.safetensors", keep=2, **training)
            total = dp.reduce(total)
            if world.rank == 0:
                print(f"epoch {epoch + 1}: loss {total / max(1, steps):.3f}")

        digits = load_digits()
        images = torch.tensor(digits.images[1500:], dtype=torch.float32).unsqueeze(1) / 16
        logits = dp.predict(model, images, batch_size=64)  # on rank 0
        fingerprint = dp.fingerprint(model)
        if world.rank == 0:
            right = logits.argmax(1).cpu() == torch.tensor(digits.target[1500:])
            print(f"accuracy {right.float().mean():.3f}\nfingerprint {fingerprint}")
        return fingerprint


if __name__ == "__main__":
    typer.run(main)

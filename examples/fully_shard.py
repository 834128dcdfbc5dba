"""Train a vision transformer that is sharded by torch's fully_shard (FSDP2): each process has a part of every layer.

ddparity run --nproc 2 examples/fully_shard.py
ddparity run --nproc 3 examples/fully_shard.py --steps 250 --resume      # 100 more, on another number of processes
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

import ddparity as dp

WIDTH, LAYERS = 64, 3


class Transformer(nn.Module):
    """A vision transformer of the 16 patches, 2 by 2 pixels, of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.places = nn.Parameter(torch.randn(16, WIDTH) / 8)
        self.layers = nn.Sequential(*(self._layer() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 10)

    def _layer(self) -> nn.Module:
        return nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.1, "gelu", batch_first=True, norm_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.patches(images).flatten(2).mT + self.places).mean(1))


def main(
    steps: int = 150, folder: Path = Path("runs/fully_shard"), resume: bool = False, save_every: int = 50
) -> float:
    """Train to this number of steps, and return the loss of held-out digits."""
    with dp.world() as world:
        dp.setup_logging()
        dp.seed_everything(0)  # each rank makes the whole model, and fully_shard keeps its part
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        targets = torch.tensor(digits.target)
        held_out = torch.arange(len(targets)) % 5 == 0
        model = Transformer().to(world.device)
        if torch.distributed.is_initialized():  # not without a launcher: then one process trains the whole model
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        # 6 micro-batches a step: 2, 3 or 6 processes have equally many.
        loader = dp.Loader(
            TensorDataset(images[~held_out], targets[~held_out]), global_batch=60, micro_batch=10, seed=0
        )
        training: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
        if resume:
            dp.load_checkpoint(folder, **training)

        for step in loader.steps(steps):
            loss = dp.backward(model, step, lambda model, data: F.cross_entropy(model(data[0]), data[1]))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done = loader.steps_done
            if done % save_every == 0 or done == steps:
                dp.save_checkpoint(folder, keep=2, **training)  # each rank writes its part
                loss = dp.reduce(loss)
                if world.rank == 0:
                    print(f"step {done}: loss {loss:.3f}")

        logits = dp.predict(model, images[held_out], batch_size=64, to="all").cpu()
        loss = F.cross_entropy(logits, targets[held_out]).item()
        if world.rank == 0:
            right = (logits.argmax(1) == targets[held_out]).float().mean()
            print(f"held-out loss {loss:.4f}, accuracy {right:.3f}")
        return loss


if __name__ == "__main__":
    typer.run(main)

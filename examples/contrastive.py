"""Learn what scikit-learn's digits look like without their labels, by contrast (SimCLR), then read them linearly.

ddparity run --nproc 2 examples/contrastive.py                   # add --reduction strict for equal bits
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import Dataset

import ddparity as dp


class Views(Dataset):
    """Two views of each image: rotated, enlarged and shifted at random, with noise."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        # A generator of the sample's own: the same views on any number of processes and workers.
        draw = np.random.default_rng(dp.sample_seed())
        return self._view(index, draw), self._view(index, draw)

    def _view(self, index: int, draw: np.random.Generator) -> torch.Tensor:
        angle, scale, (x, y) = draw.uniform(-0.35, 0.35), draw.uniform(0.8, 1.1), draw.uniform(-0.25, 0.25, 2)
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        grid = F.affine_grid(torch.tensor([[[cos, -sin, x], [sin, cos, y]]]).float(), [1, 1, 8, 8], align_corners=False)
        image = F.grid_sample(self.images[index][None], grid, align_corners=False)[0]
        return image + torch.from_numpy(draw.normal(0, 0.1, image.shape)).float()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
        )
        self.head = nn.Sequential(nn.GELU(), nn.Linear(128, 64))
        self.scale = nn.Parameter(torch.tensor(10.0).log())  # one over the temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


def embed(model: nn.Module, data: list[torch.Tensor]) -> torch.Tensor:
    """Return a row a sample, with both views."""
    first, second = model(torch.cat(data)).chunk(2)
    return torch.cat([first, second], dim=1)


def main(epochs: int = 30, reduction: Literal["fast", "strict"] = "fast") -> str:
    """Train for so many epochs, and return the fingerprint of the weights."""
    with dp.world() as world:
        dp.setup_logging()
        dp.seed_everything(0)
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        encoder = Encoder().to(world.device)
        model = dp.replicate(encoder, reduction=reduction)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-4)
        loader = dp.Loader(Views(images[:1500]), global_batch=256, micro_batch=32, seed=0)

        def info_nce(rows: torch.Tensor) -> torch.Tensor:
            """Return how badly each view finds the other view of its sample among all samples of the step."""
            first, second = F.normalize(rows.unflatten(1, (2, -1)), dim=2).unbind(1)
            likeness = first @ second.T * encoder.scale.exp()
            same = torch.arange(len(rows), device=rows.device)
            return (F.cross_entropy(likeness, same) + F.cross_entropy(likeness.T, same)) / 2

        for epoch in range(epochs):
            for step in loader.epoch(epoch):
                loss = dp.backward_over_batch(model, step, embed, info_nce)  # the same on every rank
                optimizer.step()
                optimizer.zero_grad()
            if world.rank == 0 and (epoch + 1) % 10 == 0:
                print(f"epoch {epoch + 1}: loss {loss:.3f}")

        features = dp.predict(encoder.body, images, batch_size=256)  # on rank 0
        fingerprint = dp.fingerprint(model)
        if world.rank == 0:
            features = features.cpu().numpy()
            few = slice(0, 100)  # labels for 100 digits only
            for name, values in (("pixels", digits.data / 16), ("features", features)):
                reader = LogisticRegression(max_iter=2000).fit(values[few], digits.target[few])
                print(f"accuracy with 100 labels, {name}: {reader.score(values[1500:], digits.target[1500:]):.3f}")
            print(f"fingerprint {fingerprint}")
        return fingerprint


if __name__ == "__main__":
    typer.run(main)

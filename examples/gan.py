"""Train a GAN on scikit-learn's handwritten digits, 8 by 8 pixels, and show what it draws.

ddparity run --nproc 2 examples/gan.py                           # add --reduction strict for equal bits
"""

from typing import Literal

import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddparity as dp

NOISE = 32


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE, 64 * 4 * 4, bias=False),
        nn.Unflatten(1, (64, 4, 4)),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 1, 3, padding=1),
        nn.Sigmoid(),
    )


def discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 1),
        nn.Flatten(0),
    )


def is_real(logits: torch.Tensor, real: bool) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def show(images: torch.Tensor) -> None:
    """Print images side by side."""
    for rows in images.squeeze(1).unbind(1):
        print("  ".join("".join(" .:+#@"[int(5.99 * pixel)] * 2 for pixel in row) for row in rows))


def main(epochs: int = 40, reduction: Literal["fast", "strict"] = "fast") -> str:
    """Train for so many epochs, and return the fingerprint of all weights."""
    with dp.world() as world:
        dp.setup_logging()
        dp.seed_everything(0)
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        net = generator().to(world.device)
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)  # what draws at the end
        g = dp.replicate(net, reduction=reduction)
        d = dp.replicate(discriminator().to(world.device), reduction=reduction)
        g_optimizer = torch.optim.Adam(g.parameters(), 2e-3, betas=(0.5, 0.999))
        d_optimizer = torch.optim.Adam(d.parameters(), 1e-3, betas=(0.5, 0.999))
        loader = dp.Loader(images, global_batch=64, micro_batch=16, seed=0, drop_last=True)

        for epoch in range(epochs):
            losses = torch.zeros(2, device=world.device)
            for step in loader.epoch(epoch):
                for micro in dp.accumulate([g, d], step):
                    # The noise is drawn from the micro-batch's random stream.
                    fake = g(torch.randn(len(micro.data), NOISE).to(world.device))
                    d_loss = is_real(d(micro.data), True) + is_real(d(fake.detach()), False)
                    (d_loss * micro.weight).backward()
                    g_loss = is_real(d(fake), True)
                    (g_loss * micro.weight).backward(inputs=list(g.parameters()))  # not the discriminator's
                    losses += torch.stack([d_loss, g_loss]).detach() * micro.share / len(loader)
                for optimizer in (d_optimizer, g_optimizer):
                    optimizer.step()
                    optimizer.zero_grad()
                average.update_parameters(net)
            if (epoch + 1) % 10 == 0:
                d_mean, g_mean = dp.reduce(losses).tolist()
                if world.rank == 0:
                    print(f"epoch {epoch + 1}: discriminator {d_mean:.3f}, generator {g_mean:.3f}")

        drawn = dp.predict(average, torch.randn(500, NOISE), batch_size=100)  # on rank 0
        fingerprint = dp.fingerprint([g, d, average])
        if world.rank == 0:
            nearest = KNeighborsClassifier().fit(digits.data / 16, digits.target)
            kinds = torch.tensor(nearest.predict(drawn.flatten(1).cpu().numpy())).bincount(minlength=10)
            print(f"500 drawn digits, from 0 to 9: {kinds.tolist()}\nfingerprint {fingerprint}")
            show(drawn[:6])
        return fingerprint


if __name__ == "__main__":
    typer.run(main)

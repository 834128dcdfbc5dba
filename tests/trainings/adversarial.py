"""A generator against a discriminator: a GAN in two loops a step and in one, and a WGAN with a gradient penalty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddparity as dp

from .parts import Replicate, State, mlp, normal, plan, seed_by_hand, state, steps_by_hand

IMAGES = normal(40, 4) * 2 + 1
PLAN = plan(40, global_batch=20, micro_batch=4)


def _networks(norm: bool = True) -> tuple[nn.Module, nn.Module]:
    return mlp(3, 6, 4, norm=norm), mlp(4, 6, 1, norm=norm, seed=2)


def _optimizers(
    generator: nn.Module, discriminator: nn.Module, adam: bool = False
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Not Adam before a batch norm: there a bias has a gradient of rounding errors, which Adam makes large."""
    if adam:
        return torch.optim.Adam(generator.parameters(), lr=0.02), torch.optim.Adam(discriminator.parameters(), lr=0.02)
    return (
        torch.optim.SGD(generator.parameters(), lr=0.1, momentum=0.5),
        torch.optim.SGD(discriminator.parameters(), lr=0.1, momentum=0.5),
    )


def _noise(real: Tensor) -> Tensor:
    return torch.randn(len(real), 3, dtype=real.dtype)


def _judged(logits: Tensor, as_real: bool) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(as_real)))


def _penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    between = torch.rand(len(real), 1, dtype=real.dtype)
    mixed = (between * real + (1 - between) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def gan(replicate: Replicate) -> State:
    """The discriminator's loss in two backwards; a loop for each network. Batch norms in both."""
    generator, discriminator = _networks()
    G, D = replicate(generator), replicate(discriminator)
    of_g, of_d = _optimizers(generator, discriminator)
    loader = dp.Loader(IMAGES, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            of_d.zero_grad()
            for micro in dp.accumulate(D, step):
                real = micro.data
                (_judged(D(real), True) * micro.weight).backward()
                fake = G(_noise(real))
                (_judged(D(fake.detach()), False) * micro.weight).backward()
            of_d.step()
            of_g.zero_grad()
            for micro in dp.accumulate(G, step):
                fake = G(_noise(micro.data))
                (_judged(D(fake), True) * micro.weight).backward()
            of_g.step()
    return state(G=generator, D=discriminator)


def gan_by_hand() -> State:
    generator, discriminator = _networks()
    of_g, of_d = _optimizers(generator, discriminator)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            of_d.zero_grad()
            for samples, share, seed in step:
                seed_by_hand(seed)
                real = IMAGES[samples]
                (_judged(discriminator(real), True) * share).backward()
                fake = generator(_noise(real))
                (_judged(discriminator(fake.detach()), False) * share).backward()
            of_d.step()
            of_g.zero_grad()
            for samples, share, seed in step:
                seed_by_hand(seed)
                fake = generator(_noise(IMAGES[samples]))
                (_judged(discriminator(fake), True) * share).backward()
            of_g.step()
    return state(G=generator, D=discriminator)


def gan_in_one_loop(replicate: Replicate) -> State:
    """Both networks in one loop, the discriminator's gradients switched off in the generator's loss."""
    generator, discriminator = _networks()
    G, D = replicate(generator), replicate(discriminator)
    of_g, of_d = _optimizers(generator, discriminator)
    loader = dp.Loader(IMAGES, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate([G, D], step):
                real, fake = micro.data, G(_noise(micro.data))
                loss = _judged(D(real), True) + _judged(D(fake.detach()), False)
                (loss * micro.weight).backward()
                discriminator.requires_grad_(False)
                (_judged(D(fake), True) * micro.weight).backward()
                discriminator.requires_grad_(True)
            for optimizer in (of_g, of_d):
                optimizer.step()
                optimizer.zero_grad()
    return state(G=generator, D=discriminator)


def gan_in_one_loop_by_hand() -> State:
    generator, discriminator = _networks()
    of_g, of_d = _optimizers(generator, discriminator)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, seed in step:
                seed_by_hand(seed)
                real = IMAGES[samples]
                fake = generator(_noise(real))
                loss = _judged(discriminator(real), True) + _judged(discriminator(fake.detach()), False)
                (loss * share).backward()
                discriminator.requires_grad_(False)
                (_judged(discriminator(fake), True) * share).backward()
                discriminator.requires_grad_(True)
            for optimizer in (of_g, of_d):
                optimizer.step()
                optimizer.zero_grad()
    return state(G=generator, D=discriminator)


def wgan_gp(replicate: Replicate) -> State:
    """A gradient of the critic inside of its loss, and one step of the generator for two of the critic."""
    generator, critic = _networks(norm=False)
    G, C = replicate(generator), replicate(critic)
    of_g, of_c = _optimizers(generator, critic, adam=True)
    loader = dp.Loader(IMAGES, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(C, step):
                real = micro.data
                with torch.no_grad():
                    fake = G(_noise(real))
                loss = C(fake).mean() - C(real).mean() + 10 * _penalty(C, real, fake)
                (loss * micro.weight).backward()
            of_c.step()
            of_c.zero_grad()
            if step.number % 2 == 1:
                for micro in dp.accumulate(G, step):
                    (-C(G(_noise(micro.data))).mean() * micro.weight).backward()
                of_g.step()
                of_g.zero_grad()
                of_c.zero_grad()
    return state(G=generator, C=critic)


def wgan_gp_by_hand() -> State:
    generator, critic = _networks(norm=False)
    of_g, of_c = _optimizers(generator, critic, adam=True)
    for epoch in range(2):
        for number, step in enumerate(steps_by_hand(PLAN, epoch)):
            for samples, share, seed in step:
                seed_by_hand(seed)
                real = IMAGES[samples]
                with torch.no_grad():
                    fake = generator(_noise(real))
                loss = critic(fake).mean() - critic(real).mean() + 10 * _penalty(critic, real, fake)
                (loss * share).backward()
            of_c.step()
            of_c.zero_grad()
            if number % 2 == 1:
                for samples, share, seed in step:
                    seed_by_hand(seed)
                    (-critic(generator(_noise(IMAGES[samples]))).mean() * share).backward()
                of_g.step()
                of_g.zero_grad()
                of_c.zero_grad()
    return state(G=generator, C=critic)

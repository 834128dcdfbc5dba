"""Each training leaves what the same training by hand leaves, on 1, 2 and 3 processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ddparity as dp
from tests.ranks import run_ranks

from . import adversarial, averaged, by_gradient, counted, data_ways, graphs, phases, schedules
from .parts import Replicate, State

TRAININGS: dict[str, tuple[Callable[[Replicate], State], Callable[[], State]]] = {
    "GAN": (adversarial.gan, adversarial.gan_by_hand),
    "GAN in one loop": (adversarial.gan_in_one_loop, adversarial.gan_in_one_loop_by_hand),
    "WGAN-GP": (adversarial.wgan_gp, adversarial.wgan_gp_by_hand),
    "BYOL": (averaged.byol, averaged.byol_by_hand),
    "mean teacher": (averaged.mean_teacher, averaged.mean_teacher_by_hand),
    "SWA": (averaged.swa, averaged.swa_by_hand),
    "PCGrad": (by_gradient.pcgrad, by_gradient.pcgrad_by_hand),
    "PCGrad of the batch": (by_gradient.pcgrad_of_the_batch, by_gradient.pcgrad_of_the_batch_by_hand),
    "SAM": (by_gradient.sam, by_gradient.sam_by_hand),
    "L-BFGS": (by_gradient.lbfgs, by_gradient.lbfgs_by_hand),
    "language model": (counted.language_model, counted.language_model_by_hand),
    "detection": (counted.detection, counted.detection_by_hand),
    "segmentation": (counted.segmentation, counted.segmentation_by_hand),
    "two phases": (phases.two_phases, phases.two_phases_by_hand),
    "adapters": (phases.adapters, phases.adapters_by_hand),
    "distillation": (phases.distillation, phases.distillation_by_hand),
    "two tasks, two loops": (data_ways.two_loops, data_ways.two_loops_by_hand),
    "two tasks, one loop": (data_ways.one_loop, data_ways.one_loop_by_hand),
    "mixup": (data_ways.mixup, data_ways.mixup_by_hand),
    "rollouts": (data_ways.rollouts, data_ways.rollouts_by_hand),
    "REINFORCE": (data_ways.reinforce, data_ways.reinforce_by_hand),
    "schedules and evaluation": (schedules.by_step_and_sample, schedules.by_step_and_sample_by_hand),
    "physics": (graphs.physics, graphs.physics_by_hand),
    "checkpointing": (graphs.checkpointing, graphs.checkpointing_by_hand),
    "reentrant checkpointing": (graphs.reentrant_checkpointing, graphs.reentrant_checkpointing_by_hand),
    "compiled outside": (graphs.compiled_outside, graphs.compiled_by_hand),
    "compiled inside": (graphs.compiled_inside, graphs.compiled_by_hand),
}

# How gradients are reduced. Buckets of ten bytes: DDP averages all but one of them in the last backward, which it does
# not do for a model as small as these.
WAYS: dict[str, dict[str, Any]] = {
    "fast": {},
    "overlapped": {"bucket_cap_mb": 1e-5},
    "strict": {"reduction": "strict"},
}
# torch's compiler refuses a DDP module whose first bucket is larger than the others.
LEFT_OUT = {("compiled outside", "overlapped")}

WORLD_SIZES = (1, 2, 3)


def _train() -> dict[tuple[str, str], State]:
    return {
        (name, way): train(functools.partial(dp.replicate, **options))
        for name, (train, _) in TRAININGS.items()
        for way, options in WAYS.items()
        if (name, way) not in LEFT_OUT and (way != "overlapped" or dist.get_world_size() > 1)
    }


@functools.cache
def _on(world_size: int) -> list[dict[tuple[str, str], State]]:
    """What all trainings leave on each rank, from one start of processes."""
    return run_ranks(_train, world_size)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", TRAININGS)
def test_as_by_hand(name: str, world_size: int) -> None:
    ranks = _on(world_size)
    with torch.random.fork_rng():
        expected = TRAININGS[name][1]()
    for way in [way for other, way in ranks[0] if other == name]:
        found = ranks[0][name, way]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-12, atol=1e-13, msg=lambda said, key=key, way=way: f"{way}: {key}: {said}"
            )
        for other, theirs in enumerate(ranks):
            different = [key for key in found if not torch.equal(theirs[name, way][key], found[key])]
            assert not different, f"{way}: rank {other} differs from rank 0"


@pytest.mark.parametrize("name", TRAININGS)
def test_strict_has_the_bits_of_one_process(name: str) -> None:
    expected = _on(1)[0][name, "strict"]
    for world_size in WORLD_SIZES[1:]:
        found = _on(world_size)[0][name, "strict"]
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []

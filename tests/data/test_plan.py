from __future__ import annotations

import dataclasses
import itertools
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ddparity as dp
from ddparity.data.sizes import share

plans = st.builds(
    dp.BatchPlan,
    num_samples=st.integers(0, 300),
    global_batch=st.integers(1, 70),
    micro_batch=st.integers(1, 40),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)


@settings(max_examples=300)
@given(plan=plans, world_size=st.integers(1, 9), epoch=st.integers(0, 3))
def test_every_sample_exactly_once_an_epoch(plan: dp.BatchPlan, world_size: int, epoch: int) -> None:
    seen: list[int] = []
    for step in range(plan.steps_per_epoch):
        ranks = [plan.step(epoch, step, rank, world_size) for rank in range(world_size)]
        micros = [micro for rank in ranks for micro in rank]
        samples = [sample for micro in micros for sample in micro.samples.tolist()]
        seen += samples
        # The shares of micro-batches are contiguous, and their sizes differ by at most one.
        assert [micro.index for micro in micros] == list(range(len(micros)))
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
        # Sizes differ by at most one, none is 0 or too large, and weights follow the sizes.
        sizes = [len(micro.samples) for micro in micros]
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
        assert max(sizes) <= plan.micro_batch
        assert [micro.weight for micro in micros] == [size / len(samples) for size in sizes]
        # As few as can hold the samples. A micro-batch of one, of which a batch norm cannot learn, is avoided.
        fewest = next(n for n in itertools.count(1) if n * plan.micro_batch >= len(samples))
        assert len(micros) == plan.micro_batches_in(step) == fewest
        assert min(sizes) > 1 or plan.micro_batch <= 2 or len(samples) == 1
        if step < plan.steps_per_epoch - 1:
            assert fewest == plan.micro_batches_per_step
        # Their positions are those of their samples in the epoch.
        firsts = [len(seen) - len(samples) + sum(sizes[:number]) for number in range(len(sizes))]
        assert [micro.position for micro in micros] == firsts
        assert all(micro.samples.dtype == np.int64 and micro.samples.ndim == 1 for micro in micros)
    dropped = plan.num_samples % plan.global_batch if plan.drop_last else 0
    assert len(seen) == plan.num_samples - dropped
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(plan.num_samples))
    if not plan.shuffle:
        assert seen == list(range(len(seen)))


@given(plan=plans, world_size=st.integers(1, 9))
def test_micro_batches_do_not_depend_on_the_world_size(plan: dp.BatchPlan, world_size: int) -> None:
    for step in range(plan.steps_per_epoch):
        alone = plan.step(1, step)
        together = [micro for rank in range(world_size) for micro in plan.step(1, step, rank, world_size)]
        assert [(m.index, m.seed, m.samples.tolist()) for m in alone] == [
            (m.index, m.seed, m.samples.tolist()) for m in together
        ]


@pytest.mark.parametrize(
    ("num_samples", "global_batch", "micro_batch", "full", "short"),
    [
        (52, 16, 4, [4, 4, 4, 4], [4]),
        (53, 16, 4, [4, 4, 4, 4], [3, 2]),
        (57, 16, 4, [4, 4, 4, 4], [3, 3, 3]),
        (63, 16, 4, [4, 4, 4, 4], [4, 4, 4, 3]),
        (49, 16, 4, [4, 4, 4, 4], [1]),
        (14, 10, 4, [4, 3, 3], [4]),
        (19, 10, 4, [4, 3, 3], [3, 3, 3]),
        (7, 4, 3, [2, 2], [3]),
        (3, 16, 4, [3], [3]),
    ],
)
def test_a_short_step_has_fewer_micro_batches_and_not_smaller_ones(
    num_samples: int, global_batch: int, micro_batch: int, full: list[int], short: list[int]
) -> None:
    plan = dp.BatchPlan(num_samples, global_batch, micro_batch)
    sizes = [[len(micro.samples) for micro in plan.step(0, step)] for step in (0, plan.steps_per_epoch - 1)]
    assert sizes == [full, short]
    for world_size in range(1, 5):
        ranks = [plan.step(0, plan.steps_per_epoch - 1, rank, world_size) for rank in range(world_size)]
        assert [len(micro.samples) for rank in ranks for micro in rank] == short


def test_the_picture_in_the_design() -> None:
    plan = dp.BatchPlan(64, global_batch=64, micro_batch=8)
    indices = {n: [[m.index for m in plan.step(0, 0, r, n)] for r in range(n)] for n in (1, 2, 3, 8)}
    assert indices == {
        1: [[0, 1, 2, 3, 4, 5, 6, 7]],
        2: [[0, 1, 2, 3], [4, 5, 6, 7]],
        3: [[0, 1, 2], [3, 4, 5], [6, 7]],
        8: [[0], [1], [2], [3], [4], [5], [6], [7]],
    }


def test_seeds_never_repeat() -> None:
    seeds = [
        micro.seed
        for seed in range(3)
        for epoch in range(20)
        for step in range(20)
        for micro in dp.BatchPlan(400, 20, 5, seed=seed).step(epoch, step)
    ]
    assert len(set(seeds)) == len(seeds) == 3 * 20 * 20 * 4


def test_the_definition_of_seeds_stays() -> None:
    """If these numbers change, every training changes: they are part of what a plan's seed means."""
    plan = dp.BatchPlan(13, 4, 2, seed=9)
    assert [[micro.seed for micro in step] for step in plan.steps(2)] == [
        [3847232049610942128, 3847232049346069094],
        [3847232050426352464, 3847232052180572064],
        [3847232047969836416, 3847232051442523302],
        [3847232049848974308],
    ]
    assert plan.seed_after(0, 0) == 3847232049042717308
    assert plan.seed_after(2, 3) == 3847232049069604490
    assert plan.sample_seeds(0, 0) == (474795707870219448, 0)
    assert plan.sample_seeds(2, 3) == (474795707870219448, 2 * 13 + 3)


def test_seeds_of_a_training_never_repeat_in_32_bits() -> None:
    """torch's CPU generator uses only 32 bits. Hashes of that size would repeat here, two times on average."""
    plan = dp.BatchPlan(13, 4, 1, seed=9)
    micros = [micro.seed for epoch in range(6000) for step in plan.steps(epoch) for micro in step]
    after = [plan.seed_after(epoch, step) for epoch in range(6000) for step in range(4)]
    low = {seed & 0xFFFFFFFF for seed in (*micros, *(seed + 1 for seed in micros), *after)}
    assert len(low) == 6000 * (13 + 13 + 4)


@given(plan=plans, rank=st.integers(0, 3), start=st.integers(0, 9))
def test_steps_are_what_step_gives(plan: dp.BatchPlan, rank: int, start: int) -> None:
    for number, step in enumerate(plan.steps(2, start, None, rank, 4), start=start):
        single = plan.step(2, number, rank, 4)
        assert [(m.index, m.seed, m.weight, m.samples.tolist()) for m in step] == [
            (m.index, m.seed, m.weight, m.samples.tolist()) for m in single
        ]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return dp.BatchPlan(50, 50, 50, seed=seed).step(epoch, 0)[0].samples.tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert order(1, 1) == orders[3]


def test_a_billion_samples_in_constant_memory() -> None:
    peaks = []
    for size in (10**3, 10**9):
        plan = dp.BatchPlan(size, 256, 32)
        plan.step(0, 0)
        tracemalloc.start()
        plan.step(5, plan.steps_per_epoch - 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(pickle.dumps(plan)) < 300
    assert peaks[1] <= peaks[0] + 1024


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": -1}, ValueError, "num_samples=-1"),
        ({"global_batch": 0}, ValueError, "global_batch=0"),
        ({"micro_batch": 0}, ValueError, "micro_batch=0"),
        ({"global_batch": 2.5}, TypeError, "global_batch=2.5 is a float"),
        ({"seed": "x"}, TypeError, "seed='x' is a str"),
    ],
)
def test_bad_sizes_are_named(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dp.BatchPlan(**{"num_samples": 10, "global_batch": 4, "micro_batch": 2, **options})


def test_sizes_become_integers_of_python() -> None:
    """A checkpoint holds them."""
    plan = dp.BatchPlan(np.int64(10), np.int32(4), np.uint8(2), np.int64(3))  # type: ignore[arg-type]
    assert [type(value) for value in (plan.num_samples, plan.global_batch, plan.micro_batch, plan.seed)] == [int] * 4
    assert plan == dp.BatchPlan(10, 4, 2, seed=3)
    assert dp.BatchPlan(10, 4, 2) == dp.BatchPlan(10, 4, 2, seed=0, shuffle=True, drop_last=False)


def test_some_of_the_steps() -> None:
    plan = dp.BatchPlan(10, 4, 2, shuffle=False)
    assert [step[0].samples.tolist() for step in plan.steps(0, 1, 2)] == [[4, 5]]
    assert [step[0].samples.tolist() for step in plan.steps(0, 1, 9)] == [[4, 5], [8, 9]]
    assert list(plan.steps(0, 2, 2)) == []


def test_a_plan_cannot_be_changed() -> None:
    plan = dp.BatchPlan(10, 4, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.seed = 1  # type: ignore[misc]
    assert {plan: 1}[dp.BatchPlan(10, 4, 2)] == 1
    assert len(set(plan.step(0, 0))) == 2  # a micro-batch is itself: comparing the arrays of two would have no result


def test_bad_positions_are_named() -> None:
    plan = dp.BatchPlan(10, 4, 2)
    with pytest.raises(IndexError, match=r"step -1 .* 3 steps"):
        plan.step(0, -1)
    with pytest.raises(ValueError, match=r"rank -1 .* world of 2"):
        plan.step(0, 0, -1, 2)
    with pytest.raises(ValueError, match=r"rank 0 .* world of 0"):
        share(5, 0, 0)
    with pytest.raises(IndexError, match=r"step 3 .* 3 steps"):
        plan.step(0, 3)
    with pytest.raises(ValueError, match=r"rank 2 .* world of 2"):
        plan.step(0, 0, 2, 2)


@given(count=st.integers(0, 50), world_size=st.integers(1, 9))
def test_shares_are_contiguous_and_whole(count: int, world_size: int) -> None:
    shares = [share(count, rank, world_size) for rank in range(world_size)]
    assert [i for part in shares for i in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank in range(world_size):
        sampler = dp.ShardSampler(count, rank, world_size)
        assert list(sampler) == list(shares[rank])
        assert len(sampler) == len(shares[rank])


def test_shard_sampler_refuses_bad_numbers() -> None:
    with pytest.raises(ValueError, match="num_samples=-1"):
        dp.ShardSampler(-1)
    with pytest.raises(ValueError, match="rank 3 is not in a world of 2"):
        dp.ShardSampler(5, 3, 2)

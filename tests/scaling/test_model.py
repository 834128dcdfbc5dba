"""The time of a step on N ranks, at limits where the answer is known, and beside the sources that it describes."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from ddparity.gradients.early import CAP_BYTES, EarlyPlan
from ddparity.gradients.strict import subtrees
from ddparity.scaling.collectives import fit_line
from ddparity.scaling.links import HERE, Cost, Link, Machine, ring, slices, tree
from ddparity.scaling.measure import parts_of, strict_parts_of
from ddparity.scaling.model import (
    Fit,
    Part,
    Variant,
    Work,
    exposed,
    fitted,
    fixed,
    growing,
    mean_of_slowest,
    most_ranks,
    one_process_s,
    predict,
    reduced,
    rows_of,
    strict_traffic,
    subtrees_of,
    summed,
    waiting_s,
)

FREE = Cost(0.0, 0.0, 1, 1)
IDEAL = Machine({"all-to-all": FREE, "all-gather": FREE, "ring": FREE, "slices": FREE}, 0.0, True)
GPU = dataclasses.replace(IDEAL, gloo=False)
NOTHING = Fit(1.0, {})
MB = 10**6
PARTS = (Part(8 * MB, 0.5, True), Part(8 * MB, 1.0, False))
WORK = Work(
    micro_s=(1.0,) * 10,
    alone_s=1.0,
    update_s=0.5,
    update_alone_s=0.5,
    load_s=0.0,
    workers=0,
    backward_s=0.6,
    parts=PARTS,
    strict_parts=PARTS,
    layers=(64, 128),
    statistics_bytes=(0, 0),
    micro_batches=8,
)
VARIANTS: tuple[Variant, ...] = ("fast", "strict", "SyncBatchNorm")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", [1, 2, 8, 1024])
def test_a_link_that_costs_nothing_gives_the_number_of_ranks(variant: Variant, ranks: int) -> None:
    for link in (HERE, Link("", math.inf, 0.0)):
        found = growing(WORK, IDEAL, NOTHING, variant, ranks, 4, link)
        assert found.speed_up == pytest.approx(ranks)
        assert found.prediction.step_s == pytest.approx(4.5)


def test_a_fixed_batch_gives_at_most_its_micro_batches_over_what_is_not_shared() -> None:
    """Amdahl: the optimizer's step is not shared. 3 ranks have 3, 3 and 2 of 8 micro-batches."""
    assert [fixed(WORK, IDEAL, NOTHING, "fast", ranks).speed_up for ranks in (1, 2, 3, 8)] == pytest.approx(
        [1, 8.5 / 4.5, 8.5 / 3.5, 8.5 / 1.5]
    )


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_only_what_is_not_behind_the_backward_costs_time(ranks: int) -> None:
    sent = 2 * (ranks - 1) / ranks * 8 * MB
    link = Link("", sent / 0.2, 0.0)  # a part takes 0.2 s; the first begins 0.3 s before the backward's end
    assert exposed(WORK, IDEAL, 1.0, ranks, link).total_s == pytest.approx(0.2, rel=1e-3)
    slow = Link("", sent / 0.5, 0.0)  # the first is not done when the backward ends
    assert exposed(WORK, IDEAL, 1.0, ranks, slow).total_s == pytest.approx(0.7, rel=1e-3)
    late = dataclasses.replace(WORK, parts=(Part(16 * MB, 1.0, False),))
    assert exposed(late, IDEAL, 1.0, ranks, link).total_s == pytest.approx(0.4)
    assert exposed(WORK, IDEAL, 1.0, 1, link).total_s == 0


def test_the_strict_sums_follow_after_the_backward() -> None:
    link = Link("", 4 * MB / 0.2, 0.0)  # a part's slices take 0.2 s, and its sums as long
    # The first part's slices are hidden; then come those of the second, and both parts' sums.
    assert exposed(WORK, IDEAL, 1.0, 2, link, 1).total_s == pytest.approx(0.6, rel=1e-3)
    late = dataclasses.replace(WORK, strict_parts=(Part(16 * MB, 1.0, False),))
    assert exposed(late, IDEAL, 1.0, 2, link, 1).total_s == pytest.approx(0.8)
    # A rank with two subtrees sends twice as many slices: 0.1 s of the first part's are not hidden.
    assert exposed(WORK, IDEAL, 1.0, 2, link, 2).total_s == pytest.approx(0.9, rel=1e-3)


def test_work_of_the_processes_behind_the_backward_may_cost_time_but_waiting_does_not() -> None:
    machine = Machine({**IDEAL.costs, "ring": Cost(0.0, 0.2 / (8 * MB), 2, 2)}, 0.0, True)
    hidden = exposed(WORK, machine, 1.0, 2, HERE).total_s
    assert exposed(WORK, machine, 0.0, 2, HERE).total_s == pytest.approx(hidden + 0.2)
    link = Link("", 8 * MB / 0.2, 0.0)
    assert exposed(WORK, IDEAL, 0.0, 2, link).total_s == exposed(WORK, IDEAL, 1.0, 2, link).total_s


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_ranks_or_a_worse_link_never_help(variant: Variant) -> None:
    drawn = random.Random(0)
    for _ in range(30):
        rate, latency = 10 ** drawn.uniform(6, 10), 10 ** drawn.uniform(-6, -2)
        link, worse = Link("", rate, latency), Link("", rate / 2, latency * 2)
        last = math.inf
        for ranks in (2, 4, 16, 64, 256, 1024):
            here = growing(WORK, IDEAL, NOTHING, variant, ranks, 4, link)
            assert growing(WORK, IDEAL, NOTHING, variant, ranks, 4, worse).speed_up <= here.speed_up
            assert here.efficiency <= last + 1e-9
            last = here.efficiency


def test_a_synchronised_norm_takes_latencies_in_each_micro_batch() -> None:
    link = Link("", math.inf, 0.001)
    plain = predict(WORK, IDEAL, NOTHING, "fast", (4, 4), link)
    synced = predict(WORK, IDEAL, NOTHING, "SyncBatchNorm", (4, 4), link)
    messages = 4 * 2 * 2  # micro-batches, layers, both ways
    assert synced.latency_s - plain.latency_s == pytest.approx(messages * 2 * 0.001)  # and Gloo's word before each


def test_gloo_has_a_ring_and_nccl_the_faster_of_two() -> None:
    link = Link("", 1e9, 1e-3)
    assert reduced(10 * MB, 1024, IDEAL, link).kind == "ring"
    assert reduced(10 * MB, 1024, GPU, link) == tree(10 * MB, 1024)
    assert reduced(10 * MB, 2, GPU, link) == ring(10 * MB, 2)  # as many rounds
    assert summed(1_000, 2, IDEAL, link).kind == "all-to-all"
    assert summed(1_000, 1024, IDEAL, link).kind == "all-to-all"
    assert summed(10_000, 1024, IDEAL, link).kind == "ring"  # 10 MB of all ranks
    assert summed(1_000, 2, GPU, link).kind == "ring"
    short, long = Part(1_000, 1.0, False), Part(10 * MB, 1.0, False)
    assert [one.kind for one in strict_traffic(short, 1, 2, IDEAL)] == ["all-to-all"]
    assert strict_traffic(long, 2, 4, IDEAL) == (slices(10 * MB, 4, 2),)
    early = strict_traffic(dataclasses.replace(long, early=True), 2, 4, IDEAL)
    assert [(one.kind, one.rounds, one.sent_bytes) for one in early] == [
        ("slices", 1, 15 * MB),
        ("slices", 1, 7.5 * MB),
    ]


def test_subtrees_are_those_of_the_strict_reduction() -> None:
    for start in range(20):
        for stop in range(start, 40):
            assert subtrees_of(start, stop) == len(subtrees(start, stop))
    assert rows_of((4,) * 1024) == 1
    assert rows_of((3, 3, 2)) == max(len(subtrees(0, 3)), len(subtrees(3, 6)), len(subtrees(6, 8)))


@pytest.mark.parametrize("ranks", [1, 2, 7, 100])
def test_the_slowest_of_n_ranks_is_the_maximum_of_n_draws(ranks: int) -> None:
    times = np.random.default_rng(1).gamma(4.0, size=50)
    drawn = np.random.default_rng(2).choice(times, size=(20_000, ranks)).max(1).mean()
    assert mean_of_slowest(times.tolist(), ranks) == pytest.approx(drawn, rel=0.02)
    assert mean_of_slowest(times.tolist(), 1) == pytest.approx(times.mean())
    assert mean_of_slowest(times.tolist(), 10**9) == pytest.approx(times.max())


def test_waiting_for_the_slowest_grows_with_ranks_and_is_less_a_micro_batch_in_long_steps() -> None:
    times = tuple(np.random.default_rng(1).gamma(4.0, size=50).tolist())
    waits = [waiting_s(times, 4, ranks) for ranks in (1, 2, 8, 1024)]
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert waiting_s(times, 16, 8) / 16 < waiting_s(times, 1, 8)
    assert waiting_s((1.0,) * 9, 4, 1024) == pytest.approx(0)


def test_loading_is_on_top_without_workers_and_beside_with_them() -> None:
    slow = dataclasses.replace(WORK, load_s=2.0)
    assert one_process_s(slow, 4) == pytest.approx(4 * 3.0 + 0.5)
    assert predict(slow, IDEAL, NOTHING, "fast", (4, 4)).step_s == pytest.approx(12.5)
    beside = dataclasses.replace(slow, workers=1)
    assert one_process_s(beside, 4) == pytest.approx(8.0)
    assert predict(beside, IDEAL, NOTHING, "fast", (4, 4)).step_s == pytest.approx(8.0)


def test_a_fit_gives_the_measured_steps_back() -> None:
    machine = Machine({**IDEAL.costs, "ring": Cost(0.01, 0.2 / (8 * MB), 2, 2)}, 0.0, True)
    for fast in (4.6, 4.85, 5.5):  # less than the parts, between, and more
        measured: dict[Variant, float] = {"fast": fast, "strict": 5.1, "SyncBatchNorm": 5.2}
        fit = fitted(WORK, machine, measured, (4, 4))
        assert 0 <= fit.hidden <= 1
        for variant, step_s in measured.items():
            assert predict(WORK, machine, fit, variant, (4, 4)).step_s == pytest.approx(step_s)


def test_the_largest_number_of_ranks_has_the_efficiency_and_the_next_has_not() -> None:
    link = Link("", 1e9, 1e-3)
    most = most_ranks(WORK, IDEAL, NOTHING, "fast", 4, link, 0.9, 1024)
    assert 1 < most < 1024
    above, below = (growing(WORK, IDEAL, NOTHING, "fast", ranks, 4, link).efficiency for ranks in (most, most + 1))
    assert above >= 0.9 > below
    assert most_ranks(WORK, IDEAL, NOTHING, "fast", 4, HERE, 0.9, 1024) == 1024


@pytest.mark.parametrize(("fixed_s", "byte_s"), [(1e-4, 1e-9), (0.0, 1e-9), (1e-4, 0.0)])
def test_a_line_is_found_and_nothing_is_negative(fixed_s: float, byte_s: float) -> None:
    sizes = [1e3, 1e5, 1e6, 1e7]
    assert fit_line(sizes, [fixed_s + byte_s * size for size in sizes]) == pytest.approx((fixed_s, byte_s), abs=1e-15)
    assert min(fit_line(sizes, [1e-3, 5e-4, 1e-3, 9e-4])) >= 0


class _Group:
    def size(self) -> int:
        return 2


def _models() -> Iterator[nn.Module]:
    yield nn.Linear(64, 60)
    yield nn.Sequential(*(nn.Linear(800, 800) for _ in range(4)))
    yield nn.Sequential(nn.Linear(3, 2_000_000), nn.Linear(2, 2))
    yield nn.Sequential(*(nn.Linear(500, 500) for _ in range(30)), nn.Linear(500, 500, dtype=torch.float64))


@pytest.mark.parametrize("model", list(_models()), ids=["small", "several", "one large", "many"])
def test_parts_are_cut_as_the_reduction_cuts_them(model: nn.Module) -> None:
    parameters = list(model.parameters())
    order = list(range(len(parameters)))[::-1]
    plan = EarlyPlan(_Group(), CAP_BYTES, 0)  # type: ignore[arg-type]  # it only asks for the size
    plan.next(parameters, lambda part: None)
    theirs = plan._parts
    found = parts_of(parameters, order, [0.5] * len(parameters))
    if len(theirs) > 1:
        assert [part.early for part in found] == [True] * (len(theirs) - 1) + [False]
        assert [part.size for part in found] == [
            sum((one.numel() + 1) * one.element_size() for one in part) for part in theirs
        ]
    else:
        assert not any(part.early for part in found)
    values = sum((one.numel() + 1) * one.element_size() for one in parameters)
    assert sum(part.size for part in found) == values
    strict = strict_parts_of(parameters, order, [0.5] * len(parameters))
    assert [part.early for part in strict] == [part.early for part in found] or not any(part.early for part in found)
    assert 0 <= sum(part.size for part in strict) - values < 64 * (len(parameters) + 2 * len(strict))

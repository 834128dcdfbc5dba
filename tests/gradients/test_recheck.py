"""Rechecks find the rank that computes wrong numbers, change nothing else, and do not cry wolf."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gradients.faults import EVERY, FAULTS, silent, train
from tests.ranks import run_ranks


def _finds(reduction: str) -> list[Any]:
    silent()
    return [train(fault, reduction) for fault in FAULTS]


@pytest.mark.parametrize("reduction", ["fast", "strict"])
@pytest.mark.parametrize("world_size", [3, 4])
def test_a_wrong_rank_is_named_within_as_many_steps_as_asked(world_size: int, reduction: str) -> None:
    for found in run_ranks(_finds, world_size, reduction):
        for fault, one in zip(FAULTS, found, strict=True):
            assert one["step"] is not None and fault.step <= one["step"] <= fault.step + EVERY, (fault, one)
            assert one["rank"] == fault.rank and one["record"]["ranks"] == [fault.rank], (fault, one)
            assert f"rank {fault.rank} computes wrong numbers, on {one['record']['host']}" in one["error"], one["error"]
            if fault.what != "weight":
                assert not one["taken"], fault


def _undisturbed(reduction: str, every: int | None) -> Any:
    return train(None, reduction, steps=10, every=every)


@pytest.mark.parametrize("reduction", ["fast", "strict"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rechecks_change_nothing(world_size: int, reduction: str) -> None:
    """Weights, buffers, the loader's order, random streams and logged losses are as without."""
    with_, without = (run_ranks(_undisturbed, world_size, reduction, every) for every in (EVERY, None))
    for one, other in zip(with_, without, strict=True):
        seen = [index for index, recheck in one.pop("seen") if not recheck]
        assert seen == [index for index, _ in other.pop("seen")]
        assert one == other
    assert sum(one["shares"] for one in with_) == pytest.approx(10)

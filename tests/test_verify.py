from __future__ import annotations

import pytest

import ddparity as dp
from ddparity.verify.causes import CAUSES
from tests.verify_cases import FAULTS, honest

# In strict mode, those whose stage is found in another way than in fast mode.
BITS = (
    "wrong scale of the loss",
    "wrong scale of gradients",
    "unseeded draw in a later step",
    "learning rate of the world",
    "buffer of the rank",
)


@pytest.mark.parametrize(
    ("fault", "reduction"), [*((fault, "fast") for fault in FAULTS), *((fault, "strict") for fault in BITS)]
)
def test_a_fault_is_caught_with_its_stage_and_cause(fault: str, reduction: str) -> None:
    parts, processes, stage, cause = FAULTS[fault]
    with pytest.raises(dp.ParityError) as caught:
        dp.verify(honest(**parts), (1, 2), steps=4, reduction=reduction, permutations=2)
    (found,) = caught.value.comparison.divergences
    assert (found.processes, found.stage, found.cause) == (processes, stage, CAUSES[cause])
    assert found.cause.sentence in str(caught.value)

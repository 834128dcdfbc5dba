"""Random training programs give what one process gives, whatever their loops do. `make programs` runs many more."""

from __future__ import annotations

import pytest

from tests.gradients.program_pool import run_all
from tests.gradients.programs import Program, draw

COUNT = 320


@pytest.mark.timeout(600)  # four tests in one: the ranks of all world sizes at a time
def test_random_programs_give_what_one_process_gives() -> None:
    failed = [problem for _, problem in run_all([draw(seed) for seed in range(COUNT)]) if problem is not None]
    assert not failed, "\n\n".join(failed)


def test_a_seed_draws_one_program() -> None:
    assert all(repr(draw(seed)) == repr(draw(seed)) for seed in range(50))
    assert isinstance(draw(0), Program)

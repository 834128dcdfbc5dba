"""Random training programs give what one process gives, whatever their loops do. `make programs` runs many more."""

from __future__ import annotations

import pytest

from tests.gradients.program_pool import failures
from tests.gradients.programs import Program, draw

COUNT = 320


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_random_programs_give_what_one_process_gives(world_size: int) -> None:
    programs = [program for program in map(draw, range(COUNT)) if program.world_size == world_size]
    failed = [problem for _, problem in failures(programs) if problem is not None]
    assert not failed, "\n\n".join(failed)


def test_a_seed_draws_one_program() -> None:
    assert all(repr(draw(seed)) == repr(draw(seed)) for seed in range(50))
    assert isinstance(draw(0), Program)

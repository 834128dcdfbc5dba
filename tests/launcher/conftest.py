"""What several tests of the launcher share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..machines import Machine


@pytest.fixture
def started() -> Iterator[list[Machine]]:
    """Machines that a test starts. They end with the test."""
    machines: list[Machine] = []
    yield machines
    for machine in machines:
        machine.kill()

"""What a rank leaves in its folder for the agent that started it."""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from pathlib import Path

PROGRESS = "progress"  # there: the rank has done a step, or saved


@functools.cache
def mark_progress() -> None:
    """Tell the agent, where there is one, that this process has come further than its start: a failure is tried again.

    Once a process; a call after it costs nothing.
    """
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if record:
        with suppress(OSError):
            (Path(record).parent / PROGRESS).touch()

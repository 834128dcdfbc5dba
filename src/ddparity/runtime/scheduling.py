"""How the operating system shares the cores among the threads of a process that exchanges over Gloo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def batch_scheduling() -> Iterator[None]:
    """Let threads that are woken wait for the one that runs, in this thread and those started from it (Linux).

    Gloo's I/O thread polls while another thread holds the lock of a connection. Woken on that thread's core, it takes
    the core and polls until its time slice, 3 to 4 ms, is over: on few cores every sixth small collective takes ten
    times as long. Under SCHED_BATCH a woken thread does not interrupt (benchmarks/RESULTS.md, "Scheduling"). A policy
    that the user has set stays. Source: sched(7).
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

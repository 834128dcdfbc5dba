"""What a rank's stack tells: whether it can only wait."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch.distributed.distributed_c10d as c10d
import torch.utils.data._utils.pin_memory as pin_memory

from ddparity.launcher.diagnosis.late import only_waits
from ddparity.launcher.diagnosis.stacks import Frame, Stack, read_stacks

_PACKAGE = f"{c10d.__file__.partition('/torch/')[0]}/wandb/sender.py"
_COLLECTIVE = (Frame(c10d.__file__, 1, "all_reduce"), Frame("/home/me/train.py", 1, "<module>"))
_AT_END = (Frame(threading.__file__, 1, "_wait_for_tstate_lock"), Frame(threading.__file__, 1, "_shutdown"))
_USERS = (Frame("/home/me/upload.py", 1, "upload"), Frame(threading.__file__, 1, "run"))
_IDLE = (Frame(threading.__file__, 1, "wait"), *_USERS)
_LIBRARYS = (Frame(_PACKAGE, 1, "send"), Frame(threading.__file__, 1, "run"))
_PINS = (Frame(pin_memory.__file__, 1, "_pin_memory_loop"), Frame(threading.__file__, 1, "run"))
_SAVES = (Frame(c10d.__file__.replace("distributed_c10d.py", "checkpoint/filesystem.py"), 1, "write_data"),)

STARTED = """
import asyncio, logging, multiprocessing, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
if sys.argv[1] == "timer":
    timer = threading.Timer(1000, print); timer.daemon = True; timer.start()
elif sys.argv[1] == "event loop":
    loop = asyncio.new_event_loop(); threading.Thread(target=loop.run_forever, daemon=True).start()
elif sys.argv[1] == "idle executor":
    pool = ThreadPoolExecutor(); pool.submit(int).result()
elif sys.argv[1] == "queue":
    queue = multiprocessing.Queue(); queue.put(1); queue.get()
print("ready", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("started", "only"), [("timer", False), ("event loop", False), ("idle executor", True), ("queue", True), ("", True)]
)
def test_a_rank_with_a_thread_that_may_call_a_collective_later_does_not_only_wait(
    started: str, only: bool, tmp_path
) -> None:
    """The threads are real, and each runs code of the standard library alone."""
    with subprocess.Popen([sys.executable, "-c", STARTED, started], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            others = read_stacks({0: process.pid}, {0: tmp_path})[0].others
        finally:
            process.kill()
    if not others and started:
        pytest.skip("py-spy may not read another process here")
    assert Stack(_COLLECTIVE, state="S", others=others).only_waits(agreement=False, idle=True) == only


def test_a_thread_of_a_library_does_not_hide_a_circle() -> None:
    assert Stack(_COLLECTIVE, state="S", others=(_LIBRARYS,)).only_waits(agreement=False, idle=True)


@pytest.mark.parametrize(
    ("main", "others", "only"),
    [
        (_COLLECTIVE, (), True),
        (_COLLECTIVE, (_PINS, _IDLE), True),
        (_COLLECTIVE, (_USERS,), False),
        (_COLLECTIVE, (_SAVES,), False),
        (_AT_END, (), True),
        (_AT_END, (_USERS,), False),
        ((Frame("/home/me/train.py", 1, "save"),), (), False),
    ],
)
def test_a_failed_rank_only_waits_if_none_of_its_threads_works(
    main: tuple[Frame, ...], others: tuple[tuple[Frame, ...], ...], only: bool
) -> None:
    assert only_waits(Stack(main, state="S", others=others)) == only


def test_a_thread_of_a_library_works_only_where_it_may_upload_what_a_failed_rank_left() -> None:
    """A library's thread always runs beside a logger of experiments: other ranks do not get time for it."""
    stack = Stack(_COLLECTIVE, state="S", others=(_LIBRARYS,))
    assert only_waits(stack) and not only_waits(stack, libraries=True)

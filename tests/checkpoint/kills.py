"""Kill processes while they save. Tests use it, and the benchmark uses it with more instants."""

from __future__ import annotations

import io
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ddparity as dp
from tests.ranks import kill_self

PATIENCE_S = 20


class Numbered:
    """An object whose state has the number of its save, as a number and in each of its tensors."""

    def __init__(self, number: int = -1) -> None:
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "tensors": [torch.full((200,), self.number) for _ in range(5)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]
        for tensor in state["tensors"]:
            assert tensor.equal(torch.full((200,), self.number))


def loaded(path: Path) -> int:
    state = Numbered()
    dp.load_checkpoint(path, state=state)
    return state.number


def killed_at_random(folder: str, instants: int, keep: int | None, background: bool) -> int:
    """Kill a process at random instants of its saves, and check each time that the last saved state can be loaded.

    Each killed process is forked from this one, which takes milliseconds. Returns how many of them left a draft.
    """
    path = Path(folder) / "last.safetensors"
    delays = random.Random(instants)
    drafts, number = 0, 0
    shared = mmap.mmap(-1, 8)  # the number of the last save that has returned
    for _ in range(instants):
        shared[:] = struct.pack("q", -1)
        started = time.monotonic()
        pid = _forked(lambda first=number: _save_on(path, first, shared, keep, background))
        deadline = time.monotonic() + PATIENCE_S
        while (returned := struct.unpack("q", shared[:])[0]) < 0:
            assert time.monotonic() < deadline, "the first save did not end"
            time.sleep(0.0005)
        # The kill comes at any point of the next one or two saves.
        time.sleep(delays.uniform(0, 2 * (time.monotonic() - started)))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        (returned,) = struct.unpack("q", shared[:])
        number = loaded(path)
        assert returned <= number <= returned + 1, (
            f"state {number} was loaded, but the last save that returned was {returned}"
        )
        if keep is not None:
            older = [loaded(path.with_name(f"{path.name}.{n}")) for n in _kept(path)]
            assert all(older[i] >= older[i + 1] for i in range(len(older) - 1)) and all(n <= number for n in older)
        drafts += any(path.parent.glob(".*"))
        number += 1
    dp.save_checkpoint(path, state=Numbered(number), keep=keep)
    assert not list(path.parent.glob(".*"))  # the drafts of dead processes are deleted
    return drafts


def _kept(path: Path) -> list[int]:
    return sorted(int(found.name.rpartition(".")[2]) for found in path.parent.glob(f"{path.name}.*"))


def _save_on(path: Path, first: int, shared: mmap.mmap, keep: int | None, background: bool) -> None:
    number = first
    while True:
        saving = dp.save_checkpoint(path, state=Numbered(number), keep=keep, background=background)
        if saving is not None:
            saving.wait()
        shared[:] = struct.pack("q", number)
        number += 1


def killed_at_each_call(folder: str, keep: int | None, after: bool = True) -> list[bool]:
    """Kill a process before each system call of a save. Return for each whether the new state is there.

    after: also after each, when the disk is as before the next one.
    """
    path = Path(folder) / "last.safetensors"
    new: list[bool] = []
    dp.save_checkpoint(path, state=Numbered(0), keep=keep)
    for instant in range(10_000):
        pid = _forked(lambda instant=instant: _die_in_call(path, 2 * instant + 1, instant, keep, after))
        status = os.waitpid(pid, 0)[1]
        number = loaded(path)
        assert number in (2 * instant, 2 * instant + 1)
        new.append(number == 2 * instant + 1)
        older = [loaded(path.with_name(f"{path.name}.{n}")) for n in _kept(path)]
        assert older == sorted(older, reverse=True) and all(n <= number for n in older), older
        # A save after the crash works, too.
        dp.save_checkpoint(path, state=Numbered(2 * instant + 2), keep=keep)
        assert not list(path.parent.glob(".*"))
        if keep is not None:
            assert len(_kept(path)) == min(keep - 1, instant + 1)
        if status == 0:  # the process ended by itself
            return new
        assert status == signal.SIGKILL, status
    raise AssertionError("the save did not end")


def _die_in_call(path: Path, number: int, instant: int, keep: int | None, after: bool) -> None:
    """Save, and kill this process at the `instant`-th time that Python enters, or also leaves, a system call."""
    count, events = 0, ("c_call", "c_return") if after else ("c_call",)

    def watch(frame: Any, event: str, function: Any) -> None:
        nonlocal count
        if event in events and _is_system_call(function):
            if count == instant:
                kill_self()
            count += 1

    sys.setprofile(watch)
    dp.save_checkpoint(path, state=Numbered(number), keep=keep)
    sys.setprofile(None)


def _is_system_call(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    return getattr(function, "__module__", None) in ("posix", "_io") or isinstance(owner, io.IOBase)


def _forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

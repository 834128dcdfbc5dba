"""Begin to record in this process: wait for the script's import of torch, then put recorders around its functions."""

from __future__ import annotations

import atexit
import functools
import multiprocessing.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from .imports import after_import
from .journal import Journal


def begin(folder: str, steps: int) -> Callable[[], None]:
    """Record into `folder`. Training loops end after `steps` optimizer steps. Call it before the script runs.

    Return what records the end. It is called at exit, where Python does that.
    """
    journal = Journal(Path(folder), steps)
    finish = _once(journal)
    atexit.register(finish)
    from . import files

    files.watch_files(journal)

    def after_torch(torch: ModuleType) -> None:
        from . import collectives, loaders, training

        watches = (loaders.watch_loaders, training.watch_training, collectives.watch_collectives, files.watch_saves)
        for watch in watches:
            try:
                watch(journal)
            except Exception as error:  # another version of torch: the script goes on
                journal.write("problem", text=f"{watch.__name__}: {type(error).__name__}: {error}")
        # A process of multiprocessing ends without atexit where it is forked.
        multiprocessing.util.register_after_fork(journal, lambda _: _finalize(finish))

    after_import("torch", after_torch)
    after_import("torchdata.stateful_dataloader.stateful_dataloader", lambda module: journal.watch_loader(module))
    after_import("tqdm.std", lambda module: files.watch_bars(journal, module))
    for name, attribute in files.TRACKERS:
        after_import(name, functools.partial(files.watch_tracker, journal, attribute))
    return finish


def _finalize(finish: Callable[[], None]) -> None:
    multiprocessing.util.Finalize(None, finish, exitpriority=0)


def _once(journal: Journal) -> Callable[[], None]:
    done: set[int] = set()

    def finish() -> None:
        torch = sys.modules.get("torch")
        if torch is None or os.getpid() in done or torch.utils.data.get_worker_info() is not None:
            return
        done.add(os.getpid())
        for task in journal.at_end:
            try:
                task()
            except Exception as error:
                journal.write("problem", text=f"{type(error).__name__}: {error}")

    return finish

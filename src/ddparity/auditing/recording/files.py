"""Watch what a process writes and reads, prints, and which progress bars and trackers it starts."""

from __future__ import annotations

import builtins
import functools
import io
import logging
import os
import sys
import tempfile
import zlib
from types import ModuleType
from typing import Any

from .journal import Journal, frame_above, replace
from .private import system

TRACKERS = (("wandb", "init"), ("torch.utils.tensorboard", "SummaryWriter"), ("mlflow", "start_run"))
_MOST = 5_000  # files that are recorded
# Parts of the paths of libraries whose files are no business of the script's.
_OPEN_FOR_THEMSELVES = (
    "importlib",
    "_inductor",
    "_dynamo",
    "triton",
    "logging",
    "filelock",
    "huggingface",
    f"{os.sep}hydra{os.sep}",
)
_LINES = 1_000  # printed
_DEEPEST = 40  # frames between the user's line and the opening of a file


def watch_files(journal: Journal) -> None:
    """Put the recorder around `open`, `print` and the handlers of logging. Nothing needs torch here."""
    opening, printing, emitting = builtins.open, builtins.print, logging.StreamHandler.emit
    opened, lines = [0], [0]

    def watched(file: Any, mode: Any = "r", *args: Any, **options: Any) -> Any:
        if journal.reading and set(str(mode)) & set("wxa+"):
            raise OSError("a data set's items are read for the audit alone")
        try:
            result = opening(file, mode, *args, **options)
        except FileNotFoundError:  # another rank may be about to write it
            if not journal.hidden and isinstance(file, (str, os.PathLike)) and str(mode).startswith("r"):
                with journal.safely:
                    note_file(journal, file, mode, opened)
            raise
        named = isinstance(file, (str, os.PathLike)) and isinstance(mode, str)
        # With an opener, as `tempfile` has one, the name need not be that of the file.
        if named and not journal.hidden and not options.get("opener") and opened[0] < _MOST:
            with journal.safely:
                note_file(journal, file, mode, opened)
        return result

    def printed(*values: Any, **options: Any) -> None:
        printing(*values, **options)
        file = options.get("file") or sys.stdout
        if file not in (sys.stdout, sys.stderr) or isinstance(file, io.StringIO) or lines[0] > _LINES:
            return
        lines[0] += 1
        text = " ".join(map(str, values)) if all(isinstance(v, (str, int, float)) for v in values) else None
        if text is None or text.strip():
            journal.write(
                "line",
                d=None if text is None else zlib.crc32(text.encode()),
                text=(text or "")[:80],
                site=journal.site(),
            )

    def emitted(self: Any, record: Any) -> None:
        emitting(self, record)
        if lines[0] < _LINES and type(self) is logging.StreamHandler and not journal.is_library(record.pathname):
            lines[0] += 1
            text = str(record.msg)
            journal.write(
                "line", d=zlib.crc32(text.encode()), text=text[:80], site=f"{record.pathname}:{record.lineno}"
            )

    locks = system().fcntl
    for name in ("flock", "lockf") if locks is not None else ():  # not on Windows
        replace(locks, name, _counted_lock(journal, getattr(locks, name)))
    builtins.open = io.open = functools.wraps(opening)(watched)
    builtins.print = functools.wraps(printing)(printed)
    logging.StreamHandler.emit = emitted  # type: ignore[method-assign]  # to see each line


def _counted_lock(journal: Journal, lock: Any) -> Any:
    def call(*args: Any) -> Any:
        result = lock(*args)
        journal.locks += 1
        return result

    return call


def note_file(journal: Journal, file: Any, mode: str, opened: list[int]) -> None:
    """Record that the user's code opened a file. Those that libraries open for themselves are left out."""
    frame, site = frame_above(3), None
    for _ in range(_DEEPEST):
        if frame is None:
            return
        name = frame.f_code.co_filename
        if not journal.is_library(name):
            site = f"{os.path.realpath(name)}:{frame.f_lineno}"
            break
        if any(part in name for part in _OPEN_FOR_THEMSELVES):
            return
        frame = frame.f_back
    if site is None:
        return
    path = os.path.realpath(file)
    if (path.startswith(("/dev/", "/proc/", "/sys/")) and not path.startswith("/dev/shm/")) or path.endswith(
        (".py", ".pyc", ".lock")
    ):
        return
    opened[0] += 1
    how = (
        "append" if "a" in mode else "update" if "+" in mode and "w" not in mode else "read" if "r" in mode else "write"
    )
    journal.write(
        "file",
        path=path,
        how=how,
        locks=journal.locks,
        site=site,
    )


def watch_saves(journal: Journal) -> None:
    """Put the recorder around `torch.save` and `torch.load`, which open files in C++."""
    import torch

    save: Any = torch.save
    load: Any = torch.load

    def note(how: str, file: Any) -> None:
        if isinstance(file, (str, os.PathLike)) and not journal.hidden:
            journal.write(
                "file",
                path=os.path.realpath(file),
                how=how,
                locks=journal.locks,
                site=journal.site(3),
                save=True,
            )

    def saved(obj: Any, f: Any, *args: Any, **options: Any) -> Any:
        if journal.reading:
            raise OSError("a data set's items are read for the audit alone")
        journal.hidden += 1
        try:
            result = save(obj, f, *args, **options)
        finally:
            journal.hidden -= 1
        note("write", f)
        return result

    def loaded(f: Any, *args: Any, **options: Any) -> Any:
        note("read", f)
        journal.hidden += 1
        try:
            return load(f, *args, **options)
        finally:
            journal.hidden -= 1

    for module in (torch, torch.serialization):
        replace(module, "save", saved)
        replace(module, "load", loaded)


def watch_bars(journal: Journal, module: ModuleType) -> None:
    """Record progress bars of tqdm that are shown."""
    make = module.tqdm.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        if not getattr(self, "disable", True):
            journal.write("bar", site=journal.site())

    replace(module.tqdm, "__init__", init)


def watch_tracker(journal: Journal, attribute: str, module: ModuleType) -> None:
    """Record that a tracker of experiments is started."""
    start = getattr(module, attribute)

    def note(name: str) -> None:
        journal.write("tracker", name=name, site=journal.site(3))

    if isinstance(start, type):
        make: Any = start.__init__  # type: ignore[misc]  # of a class known at run time only

        def init(self: Any, *args: Any, **options: Any) -> None:
            note(attribute)
            make(self, *args, **options)

        replace(start, "__init__", init)
    else:

        @functools.wraps(start)
        def call(*args: Any, **options: Any) -> Any:
            note(f"{module.__name__}.{attribute}")
            return start(*args, **options)

        setattr(module, attribute, call)


def is_temporary(path: str) -> bool:
    """Return whether a path lies in the folder for temporary files."""
    return path.startswith(os.path.realpath(tempfile.gettempdir()) + os.sep)

"""Files that are whole or not there."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def replacing(path: Path, keep: int | None = None) -> Iterator[Path]:
    """Yield a draft to write to, which at the end takes the place of `path`; on an exception the old file stays.

    `keep`: of `publish`.
    """
    draft = draft_of(path)
    try:
        yield draft
        publish(draft, path, keep)
    finally:
        draft.unlink(missing_ok=True)


def draft_of(path: Path) -> Path:
    """A hidden name beside `path`, of this process."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def publish(draft: Path, path: Path, keep: int | None = None) -> None:
    """Let a draft take the place of `path`: a crash at any instant leaves the old file or the new one, whole.

    With `keep` the file that it replaces becomes `path.1`, that one `path.2`, and so on; `keep` of them are left in
    all, this one included.
    """
    _flush(draft)
    if keep is not None:
        _step_back(path, keep)
    os.replace(draft, path)
    if keep is not None:
        for number in _earlier(path):
            if number >= keep:
                earlier(path, number).unlink(missing_ok=True)
    _flush(path.parent)


def earlier(path: Path, number: int) -> Path:
    """The file that was at `path` before the `number` last ones."""
    return path.with_name(f"{path.name}.{number}")


def _earlier(path: Path) -> list[int]:
    suffixes = (found.name.removeprefix(f"{path.name}.") for found in path.parent.glob(f"{glob.escape(path.name)}.*"))
    return sorted(int(suffix) for suffix in suffixes if suffix.isascii() and suffix.isdigit())


def _step_back(path: Path, keep: int) -> None:
    """Give the file at `path` the name `path.1`, too, after that one stepped back. `path` is there all the time."""
    before = earlier(path, 1)
    if keep < 2 or not path.exists() or (before.exists() and before.samefile(path)):  # a crash came after this
        return
    room = 1
    while room < keep - 1 and earlier(path, room).exists():
        room += 1
    for number in range(room, 1, -1):
        os.replace(earlier(path, number - 1), earlier(path, number))
    draft = draft_of(before)
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:  # a file system without links
        shutil.copyfile(path, draft)
        _flush(draft)
    os.replace(draft, before)


def clear_drafts(path: Path) -> None:
    """Delete the drafts of `path` that processes of this machine left when they died."""
    for target in (path, earlier(path, 1)):
        for draft in path.parent.glob(f".{glob.escape(target.name)}.*"):
            pid = draft.name.removeprefix(f".{target.name}.")
            if pid.isascii() and pid.isdigit() and not psutil.pid_exists(int(pid)):
                draft.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

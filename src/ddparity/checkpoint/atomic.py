"""Replace files atomically: after a crash at any instant a file has its old content or its new content.

The new content is written to a draft: a hidden file beside the target. The draft is flushed to disk and renamed.
"""

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
    """Yield a draft to write to, which replaces `path` at the end. After an exception the old file stays.

    `keep`: as for `publish`.
    """
    draft = draft_of(path)
    try:
        yield draft
        publish(draft, path, keep)
    finally:
        draft.unlink(missing_ok=True)


def draft_of(path: Path) -> Path:
    """Return the path of this process's draft of `path`: a hidden name beside it that ends with the process id."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def publish(draft: Path, path: Path, keep: int | None = None) -> None:
    """Replace `path` by its draft. A crash at any instant leaves the complete old file or the complete new one.

    With `keep` the replaced file becomes `path.1`, the file before it `path.2`, and so on. `keep` files stay in all,
    the new one included. None: only `path` changes.

    Raises:
        OSError: a file cannot be flushed, renamed or deleted.
    """
    _flush(draft)
    if keep is not None:
        _rotate(path, keep)
    os.replace(draft, path)
    if keep is not None:
        for number in _earlier_numbers(path):
            if number >= keep:
                earlier_file(path, number).unlink(missing_ok=True)
    _flush(path.parent)  # the rename itself is on disk only then


def earlier_file(path: Path, number: int) -> Path:
    """Return the path of an earlier file: number 1 is the file that the newest one replaced, 2 the one before it."""
    return path.with_name(f"{path.name}.{number}")


def remove_stale_drafts(path: Path) -> None:
    """Delete the drafts of `path` whose processes, of this machine, have died."""
    for target in (path, earlier_file(path, 1)):
        for draft in path.parent.glob(f".{glob.escape(target.name)}.*"):
            pid = draft.name.removeprefix(f".{target.name}.")
            if pid.isascii() and pid.isdigit() and not psutil.pid_exists(int(pid)):
                draft.unlink(missing_ok=True)


def _rotate(path: Path, keep: int) -> None:
    """Move `path.1` to `path.2` and so on, and give the file at `path` the second name `path.1`.

    `path` itself exists all the time.
    """
    before = earlier_file(path, 1)
    # If both names are the same file, a crash came after the last rotation: rotating again would lose a file.
    if keep < 2 or not path.exists() or (before.exists() and before.samefile(path)):
        return
    free = 1  # the first number without a file, or the last one
    while free < keep - 1 and earlier_file(path, free).exists():
        free += 1
    for number in range(free, 1, -1):
        os.replace(earlier_file(path, number - 1), earlier_file(path, number))
    draft = draft_of(before)
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:  # the file system has no hard links
        shutil.copyfile(path, draft)
        _flush(draft)
    os.replace(draft, before)


def _earlier_numbers(path: Path) -> list[int]:
    suffixes = (found.name.removeprefix(f"{path.name}.") for found in path.parent.glob(f"{glob.escape(path.name)}.*"))
    return sorted(int(suffix) for suffix in suffixes if suffix.isascii() and suffix.isdigit())


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

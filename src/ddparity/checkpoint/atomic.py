"""Replace files atomically: after a crash at any instant a file has its old content or its new content.

The new content is written to a draft: a new hidden file beside the target, with a random name and a lock. The draft is
flushed to disk and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..system import BINARY, CLOEXEC, DIRECTORY, NOFOLLOW, NONBLOCK, RENAMES_OPEN_FILES, UNSUPPORTED, boot_name, lock

_LONGEST_NAME = 200  # bytes of the target's name in a draft's name; file systems allow 255 in all
_PATIENCE_S = 30.0  # for another process that publishes in the same folder
_STALE_S = 86_400.0  # the age at which a draft of another machine, or of an earlier start of this one, is deleted


@dataclass(frozen=True)
class Draft:
    """A new hidden file beside its target. `file` is open for writing, and locked until it is closed."""

    path: Path
    file: BinaryIO


@contextmanager
def replacing(path: Path, keep: int | None = None) -> Iterator[BinaryIO]:
    """Yield a new file to write to, which replaces `path` at the end. After an exception the old file stays.

    `keep`: as for `publish`.
    """
    if keep is not None:
        _check_earlier(path, keep)  # before much is written
    draft = new_draft(path)
    try:
        yield draft.file
        publish(draft, path, keep)
    finally:
        discard(draft)


def new_draft(path: Path) -> Draft:
    """Create a draft of `path`, with the mode and the owner of the file that it will replace.

    Its name is random, and it is never an existing file or link: jobs in containers have equal process ids, and in a
    shared folder somebody may have put a link there.

    Raises:
        FileExistsError: the target is a device, a pipe, a socket or a folder.
        OSError: the file cannot be created.
    """
    while True:
        draft = path.with_name(f"{_prefix(path.name)}{_machine()}-{secrets.token_hex(8)}")
        replaced = _stat(path)
        if replaced is not None and not stat.S_ISREG(replaced.st_mode):  # root could replace /dev/null
            raise FileExistsError(
                errno.EEXIST, "this is no file, and a new file would replace it: give another path", str(path)
            )
        mode = 0o666 if replaced is None else 0o600  # nobody else reads it before it has the mode of the old file
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW | CLOEXEC | BINARY, mode)
        file = os.fdopen(descriptor, "w+b")
        try:
            lock(descriptor)
            if os.fstat(descriptor).st_nlink:  # else another process took it for the draft of a dead one
                if replaced is not None:
                    _take_over(descriptor, replaced)
                return Draft(draft, file)
        except BaseException:
            discard(Draft(draft, file))
            raise
        file.close()


def discard(draft: Draft) -> None:
    """Delete a draft, if it has not been published."""
    with contextlib.suppress(OSError):  # what a full disk could not take is tried again
        draft.file.close()
    draft.path.unlink(missing_ok=True)


def publish(draft: Draft, path: Path, keep: int | None = None) -> None:
    """Replace `path` by its draft. A crash at any instant leaves the complete old file or the complete new one.

    With `keep` the replaced file becomes `path.1`, the file before it `path.2`, and so on. `keep` files stay in all,
    the new one included: those from `path.<keep>` on are deleted, up to the first number that is no file. None: only
    `path` changes. One process at a time does this in a folder.

    Raises:
        FileExistsError: `path.1`, or another number below `keep`, is a folder or anything else that is no file.
        OSError: a file cannot be flushed, renamed or deleted.
    """
    draft.file.flush()
    os.fsync(draft.file.fileno())
    if not RENAMES_OPEN_FILES:
        draft.file.close()
    with _alone(path.parent):
        if keep is not None:
            _rotate(path, keep)
        os.replace(draft.path, path)
        if keep is not None:
            end = keep
            while earlier_file(path, end).is_file():
                end += 1
            for number in range(end - 1, keep - 1, -1):  # the last one first: a crash leaves no gap
                earlier_file(path, number).unlink(missing_ok=True)
    flush_folder(path.parent)  # the rename itself is on disk only then


def earlier_file(path: Path, number: int) -> Path:
    """Return the path of an earlier file: number 1 is the file that the newest one replaced, 2 the one before it."""
    return path.with_name(f"{path.name}.{number}")


def is_draft_of(path: Path, name: str) -> bool:
    """Return True if a file beside `path` with this name is a draft of it."""
    prefix, (machine, _, token) = _prefix(path.name), name[len(_prefix(path.name)) :].partition("-")
    return name.startswith(prefix) and _is_hex(machine, 8) and _is_hex(token, 16)


def remove_stale_drafts(path: Path) -> None:
    """Delete the drafts of `path` whose processes have died.

    A process of this machine that lives has a lock on its draft. Of other machines this is not known everywhere, so
    their drafts are deleted after a day.
    """
    for target in (path, earlier_file(path, 1)):
        found = path.parent.glob(f"{glob.escape(_prefix(target.name))}*")
        drafts = [draft for draft in found if is_draft_of(target, draft.name)]
        if drafts:
            with _alone(path.parent):  # the second name that `_rotate` gives a file has no lock
                for draft in drafts:
                    _remove_if_stale(draft, here=draft.name.startswith(f"{_prefix(target.name)}{_machine()}-"))


def flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk, where the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY | DIRECTORY | CLOEXEC)
    except PermissionError:  # a folder that may be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _remove_if_stale(draft: Path, here: bool) -> None:
    try:
        descriptor = os.open(draft, os.O_RDWR | NOFOLLOW | NONBLOCK | CLOEXEC)
    except OSError:  # it has gone, or it belongs to somebody else
        return
    try:
        status = os.fstat(descriptor)
        old = time.time() - status.st_mtime > _STALE_S
        locked = lock(descriptor, wait=False)
        if stat.S_ISREG(status.st_mode) and ((here and locked) or (old and locked is not False)):
            draft.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process publishes in this folder. Go on without the lock where that takes too long."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | DIRECTORY | CLOEXEC)
    except PermissionError:
        yield
        return
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while lock(descriptor, wait=False) is False and time.monotonic() < deadline:
            time.sleep(0.001)  # flock has no time-out, and nothing else tells when the lock is free
        yield
    finally:
        os.close(descriptor)


def _take_over(descriptor: int, replaced: os.stat_result) -> None:
    """Give a draft the owner, the group and the mode of the file that it replaces, as far as this user may."""
    if not hasattr(os, "fchown"):  # Windows
        return
    mode, own = stat.S_IMODE(replaced.st_mode), os.fstat(descriptor)
    if (own.st_uid, own.st_gid) != (replaced.st_uid, replaced.st_gid):
        try:
            os.fchown(descriptor, replaced.st_uid, replaced.st_gid)
        except OSError:
            try:
                os.fchown(descriptor, -1, replaced.st_gid)
            except OSError:
                mode &= ~stat.S_IRWXG  # they were the rights of another group
    with contextlib.suppress(PermissionError):  # some file systems have one mode for all files
        os.fchmod(descriptor, mode)


def _rotate(path: Path, keep: int) -> None:
    """Move `path.1` to `path.2` and so on, and give the file at `path` the second name `path.1`.

    `path` itself exists all the time.
    """
    _check_earlier(path, keep)
    before = earlier_file(path, 1)
    # If both names are the same file, a crash came after the last rotation: rotating again would lose a file.
    if keep < 2 or not path.exists() or (before.exists() and before.samefile(path)):
        return
    free = 1  # the first number without a file, or the last one
    while free < keep - 1 and earlier_file(path, free).exists():
        free += 1
    for number in range(free, 1, -1):
        os.replace(earlier_file(path, number - 1), earlier_file(path, number))
    name = before.with_name(f"{_prefix(before.name)}{_machine()}-{secrets.token_hex(8)}")
    try:
        os.link(path, name)
    except OSError:  # the file system has no hard links
        copy = new_draft(before)
        try:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, copy.file, 1 << 20)
            _take_over(copy.file.fileno(), os.stat(path))
            copy.file.flush()
            os.fsync(copy.file.fileno())
            if not RENAMES_OPEN_FILES:
                copy.file.close()
            os.replace(copy.path, before)
        finally:
            discard(copy)
    else:
        os.replace(name, before)


def _check_earlier(path: Path, keep: int) -> None:
    """Raise FileExistsError if a folder or the like has the name of an earlier file: it would be moved or replaced."""
    for found in path.parent.glob(f"{glob.escape(path.name)}.*"):
        suffix = found.name.removeprefix(f"{path.name}.")
        number = int(suffix) if suffix.isascii() and suffix.isdigit() else 0
        if 0 < number < keep and found == earlier_file(path, number) and not _is_file(found):
            raise FileExistsError(
                errno.EEXIST,
                f"keep={keep} renames earlier files to {path.name}.1 and so on, and this is no file: move it, give "
                f"another path, or leave keep out",
                str(found),
            )


def _is_file(path: Path) -> bool:
    """Return True if it is a file or a link to one, or has just been moved by another process."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return True
    return path.is_file() if stat.S_ISLNK(mode) else stat.S_ISREG(mode)


def _prefix(name: str) -> str:
    """Return what the names of the drafts of a file begin with."""
    encoded = os.fsencode(name)
    if len(encoded) > _LONGEST_NAME:
        cut = encoded[: _LONGEST_NAME - 20].decode(errors="ignore")
        name = f"{cut}~{hashlib.sha256(encoded).hexdigest()[:16]}"
    return f".{name}."


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and all(digit in "0123456789abcdef" for digit in text)


@functools.cache
def _machine() -> str:
    """Return 8 digits that all processes of this machine have, also in containers, until it starts again."""
    return hashlib.sha256(boot_name().encode()).hexdigest()[:8]

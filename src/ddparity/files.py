"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a draft to write to, which at the end takes the place of `path`; on an exception the old file stays."""
    draft = draft_of(path)
    try:
        yield draft
        publish(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def draft_of(path: Path) -> Path:
    """A hidden name beside `path`, of this process."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def publish(draft: Path, path: Path) -> None:
    """Let a draft take the place of `path`: a crash at any instant leaves the old file or the new one, whole."""
    _flush(draft)
    os.replace(draft, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Read what another process wrote: as JSON or as text, never as a pickle, and no more of it than it can need."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ...system import NONBLOCK

# In bytes. The largest honest ones that we have seen: 90 kB of 64 collectives, 300 kB of stacks, 150 kB of a machine.
ANSWER = 16 << 20  # of a rank's server
FILE = 4 << 20  # of a rank's folder
SMALL = 1 << 20  # of a rank's folder, about one wait or one end
MESSAGE = 4 << 20  # of another machine's agent; torch's store takes 8 MiB


def read_json(text: bytes | str, limit: int = MESSAGE) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is too long, or it is no JSON.
    """
    if len(text) > limit:
        raise ValueError(f"{len(text):,} bytes, of {limit:,} that it may have")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def read_file(path: Path, limit: int = FILE) -> bytes:
    """Return the content of a file, at most its first `limit` bytes.

    Raises:
        OSError: there is no such file, or it is a pipe or a device, from which a read may never return.
    """
    number = os.open(path, os.O_RDONLY | NONBLOCK)
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(f"{path} is no regular file")
        return file.read(limit)

"""Tell this rank's agent in which agreement a thread waits: a small file in the rank's folder while the wait lasts.

`ddparity run` reads these files as it reads the record of collectives. Without an agent nothing is written.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

WAIT_FILES = "agreement-*.json"  # one for each thread that waits


def note_wait(what: str, key: str, ranks: Sequence[int], since_s: float, timeout_s: float | None) -> Path | None:
    """Write that this thread waits in an agreement, and return the file; None if there is no agent or the disk is full.

    Args:
        what: the agreement, for people.
        key: its name in the store, the same on all ranks.
        ranks: those that must reach it.
        since_s: the time at which the wait began, in seconds since 1970.
        timeout_s: after which this rank gives up; None: never.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return None
    main = threading.current_thread() is threading.main_thread()
    content = {"what": what, "key": key, "ranks": list(ranks), "since": since_s, "timeout": timeout_s, "main": main}
    path = Path(error_file).with_name(WAIT_FILES.replace("*", str(threading.get_native_id())))
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(content))
        partial.rename(path)  # the agent may read at any time
    except OSError:
        return None
    return path


def end_wait(path: Path | None) -> None:
    """Remove the file of a wait that is over."""
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)

"""What the agent starts: runs a script, or a module of ours, and records its exception for the agent.

python -m ddparity.launch.worker SCRIPT ARGS...
python -m ddparity.launch.worker -m MODULE ARGS...
"""

from __future__ import annotations

import io
import os
import runpy
import sys
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from ..errors import RankFailure

_CULPRIT_S = 3.0  # a rank that was killed leaves no record


@record
def main() -> None:
    arguments = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # At once, and in whole lines, also with PYTHONUNBUFFERED: N ranks share one pipe.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except RankFailure as failure:
        _let_the_culprit_end_first(failure.rank)
        raise
    except KeyboardInterrupt:
        # The agent passes Ctrl-C on; the launcher says so once, for all ranks.
        sys.stdout.flush()
        os._exit(130)


def _let_the_culprit_end_first(rank: int) -> None:
    """Wait until the rank that failed, on this machine, has left its record: the agent ends all when one has ended."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    place = rank - int(os.environ.get("RANK", "0")) + int(os.environ.get("LOCAL_RANK", "0"))
    if own is None or not 0 <= place < int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
        return
    record, deadline = Path(own).parent.parent / str(place) / "error.json", time.monotonic() + _CULPRIT_S
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


if __name__ == "__main__":
    main()

"""What the agent starts: runs a script, or a module of ours, and records its exception for the agent.

python -m ddparity.launch.worker SCRIPT ARGS...
python -m ddparity.launch.worker -m MODULE ARGS...
"""

from __future__ import annotations

import io
import os
import runpy
import sys

from torch.distributed.elastic.multiprocessing.errors import record


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
    except KeyboardInterrupt:
        # The agent passes Ctrl-C on; the launcher says so once, for all ranks.
        sys.stdout.flush()
        os._exit(130)


if __name__ == "__main__":
    main()

"""What the agent starts, as a file: runs a script, a module or a pickled function, and leaves word of how it ended.

python worker.py SCRIPT ARGS...
python worker.py -m MODULE ARGS...
python worker.py --call PICKLE

It imports nothing of ddparity, which a script that knows nothing of us would wait for. What it leaves stands in the
rank's folder, that of TORCHELASTIC_ERROR_FILE: `error.json` in the form of torch's own record, `result.pickle`.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import os
import pickle
import runpy
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    arguments = sys.argv[1:]
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(record).parent if record else None
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of ours
    _die_with_the_agent()
    _standard_input()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # At once, and in whole lines, also with PYTHONUNBUFFERED: N ranks may share one pipe.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    if folder is not None:
        _sibling("instruments").install(folder)
    try:
        signal.signal(signal.SIGINT, interrupt)
        _run(arguments, folder)
    except SystemExit as ending:
        if folder is not None and ending.code is not None and not isinstance(ending.code, int):
            _leave(folder, ending, str(ending.code), "")  # sys.exit("a message")
        raise
    except KeyboardInterrupt:
        # The agent passes Ctrl-C on; the launcher says so once, for all ranks.
        sys.stdout.flush()
        os._exit(128 + signal.SIGINT)
    except BaseException as error:
        try:
            _fail(error, folder)
        except Exception as another:  # of a signal's handler, as below
            _fail(another, folder)


def _run(arguments: list[str], folder: Path | None) -> None:
    if arguments[0] == "--call":
        with open(arguments[1], "rb") as file:
            sys.path[:] = pickle.load(file)
            function, values = pickle.load(file)
        result = function(*values)
        if folder is not None:
            import cloudpickle  # as the function: a result's class may stand in the caller's script

            (folder / "result.pickle").write_bytes(cloudpickle.dumps(result))
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


def _fail(error: BaseException, folder: Path | None) -> None:
    """Leave the exception for the agent and end with exit code 1, after what the script registered with atexit."""
    with suppress(AttributeError, ValueError):
        # torch's handler raises when a data-loader worker has died, which may be the reason why we are here.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    trace = _users_part(error.__traceback__)
    if folder is not None:
        _leave(folder, error, f"{type(error).__name__}: {error}", _text(error, trace))
        _sibling("instruments").leave_record(folder)
    # The agent shows the culprit's traceback at the end. Rank 0 speaks to the same terminal: it would say it twice.
    if folder is None or os.environ.get("RANK") != "0":
        sys.excepthook(type(error), error, trace)
    sys.exit(1)


def _leave(folder: Path, error: BaseException, message: str, trace: str) -> None:
    """`error.json`, whole or not there: the agent looks while we write."""
    extra: dict[str, Any] = {"py_callstack": trace, "timestamp": str(int(time.time())), "type": type(error).__name__}
    if type(error).__name__ == "RankFailure":
        extra["rank"] = getattr(error, "rank", -1)  # who failed first, as this rank was told
    partial = folder / "error.json.partial"
    partial.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    try:
        (folder / "error.pickle").write_bytes(pickle.dumps(error))
    except Exception:
        (folder / "error.pickle").unlink(missing_ok=True)  # the text tells the same
    partial.rename(folder / "error.json")


def _text(error: BaseException, trace: TracebackType | None) -> str:
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame on that is not what started the script, or our own command."""
    ours, rest = Path(__file__).parents[1], trace
    starters = (__file__, runpy.__file__, "<frozen runpy>", str(ours / "__main__.py"), str(ours / "cli.py"))
    while rest is not None:
        file = rest.tb_frame.f_code.co_filename
        if file not in starters and "/typer/" not in file and "/click/" not in file:
            break
        rest = rest.tb_next
    return rest if rest is not None else trace


def _die_with_the_agent() -> None:
    """Have the kernel kill this process when the agent ends without a word. Linux only; the guardian does it, too."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _standard_input() -> None:
    """Rank 0 reads what the launcher was given; the others would take lines away from it."""
    if os.environ.get("RANK") != "0":
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)


def _sibling(name: str) -> ModuleType:
    """A module beside this file, as one of a package that has the same files but runs no `__init__`."""
    for package, folder in (("_ddparity", Path(__file__).parents[1]), ("_ddparity.launch", Path(__file__).parent)):
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"_ddparity.launch.{name}")


if __name__ == "__main__":
    main()

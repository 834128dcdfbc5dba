"""What the agent starts, as a file: runs a script, a module or a pickled function, and leaves word of how it ended.
A program takes this process's place. AGENT is the process id of who starts it.

python worker.py AGENT SCRIPT ARGS...
python worker.py AGENT -m MODULE ARGS...
python worker.py AGENT --call PICKLE
python worker.py AGENT --exec PROGRAM ARGS...

It imports nothing of ddparity, which a script that knows nothing of us would wait for. What it leaves stands in the
rank's folder, that of TORCHELASTIC_ERROR_FILE: `error.json` in the form of torch's own record, `result.pickle`.
"""

from __future__ import annotations

import ctypes
import importlib.util
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
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1


def main() -> None:
    agent, *arguments = sys.argv[1:]
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(record).parent if record else None
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of ours
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the agent starts us with
    _die_with(int(agent))
    _standard_input()
    if arguments[0] == "--exec":
        _become(arguments[1:], folder)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # At once, and in whole lines, also with PYTHONUNBUFFERED: N ranks may share one pipe.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    if folder is not None:
        _instruments().install(folder)
    try:
        signal.signal(signal.SIGINT, interrupt)
        _run(arguments, folder)
    except SystemExit as ending:
        if folder is not None and ending.code is not None and not isinstance(ending.code, int):
            _leave(folder, ending, str(ending.code), "")  # sys.exit("a message")
        raise
    except KeyboardInterrupt:
        # The agent passes Ctrl-C on; the launcher says so once, for all ranks.
        sys.exit(128 + signal.SIGINT)
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

            try:
                written = cloudpickle.dumps(result)
            except Exception as error:
                raise TypeError(f"the result cannot be pickled, to go back to the caller: {error}") from error
            (folder / "result.pickle").write_bytes(written)
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
    left = folder is not None and _leave(folder, error, _message(error), _text(error, trace))
    if folder is not None:
        _instruments().write_record(folder)
    # The agent shows the culprit's traceback at the end. Rank 0 speaks to the same terminal: it would say it twice.
    if not left or os.environ.get("RANK") != "0":
        sys.excepthook(type(error), error, trace)
    sys.exit(1)


def _leave(folder: Path, error: BaseException, message: str, trace: str) -> bool:
    """`error.json`, whole or not there: the agent looks while we write. Gives whether there was space for it."""
    extra: dict[str, Any] = {"py_callstack": trace, "timestamp": str(int(time.time())), "type": type(error).__name__}
    extra["before"] = [_message(one) for one in _before(error)]
    if type(error).__name__ == "RankFailure":
        extra["rank"] = getattr(error, "rank", -1)  # who failed first, as this rank was told
    partial = folder / "error.json.partial"
    try:
        partial.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    except OSError:
        return False
    try:
        (folder / "error.pickle").write_bytes(pickle.dumps(error))
    except Exception:
        (folder / "error.pickle").unlink(missing_ok=True)  # the text tells the same
    partial.rename(folder / "error.json")
    return True


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _before(error: BaseException) -> list[BaseException]:
    """The exceptions that led to this one, as its traceback tells them."""
    found = [error]
    while (last := found[-1]).__cause__ or not last.__suppress_context__:
        before = last.__cause__ or last.__context__
        if before is None or before in found:
            break
        found.append(before)
    return found[1:]


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


def _die_with(agent: int) -> None:
    """Have the kernel kill this process when the agent ends without a word. Linux only; the guardian does it, too."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent and not _is_alive(agent):  # it has ended before that call
        os._exit(128 + signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _become(command: list[str], folder: Path | None) -> NoReturn:
    """Run a program in this process, as if the agent had started it."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and the program would inherit that
    try:
        os.execvp(command[0], command)
    except OSError as error:
        said = f"cannot start {command[0]!r}: {error.strerror}"
        if folder is not None:
            _leave(folder, error, said, "")
        sys.exit(said)


def _standard_input() -> None:
    """Rank 0 reads what the launcher was given; the others would take lines away from it."""
    if os.environ.get("RANK") != "0":
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)


def _instruments() -> ModuleType:
    """Load `diagnosis/instruments.py` by its path, so that no `__init__` of ddparity runs. Load it once."""
    name = "_ddparity_instruments"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "diagnosis" / "instruments.py")
        assert spec is not None and spec.loader is not None, "the file is installed with this one"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


if __name__ == "__main__":
    main()

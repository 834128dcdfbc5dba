"""The file that the agent starts in each rank's process. It runs a script, a module, a pickled function or a program.

AGENT is the process id of the agent. A program replaces this process.

python worker.py AGENT SCRIPT ARGS...
python worker.py AGENT -m MODULE ARGS...
python worker.py AGENT --call PICKLE
python worker.py AGENT --exec PROGRAM ARGS...
python worker.py AGENT --batch (one of these)

It does not import ddparity, because a script that does not use ddparity would wait for the import. It writes files for
the agent into the rank's folder, which is that of TORCHELASTIC_ERROR_FILE: `error.json`, in the form of torch's own
record; `error.pickle`, the exception; and `result.pickle`, what a function returned.
"""

from __future__ import annotations

import builtins
import importlib.machinery
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
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

_LONGEST_MESSAGE = 4_000  # characters
_LONGEST_TRACEBACK = 20_000
_HEAD_OF_TRACEBACK = "Traceback (most recent call last):\n"


def main() -> None:
    """Run what the arguments name, and end with its exit code."""
    agent, *arguments = sys.argv[1:]
    if arguments[0] == "--batch":
        del arguments[0]
        _system().schedule_batch()  # for all threads and processes to come
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(record).parent if record else None
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C prints no traceback of this file
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the agent starts ranks with SIGINT blocked
    _end_with(int(agent))
    if folder is not None and arguments[0] != "--exec":
        instruments = _instruments()
        _load("_ddparity_terminal", "terminal.py").follow(
            folder, _system(), instruments.write_prompt, instruments.after_import
        )
    _close_standard_input()
    if arguments[0] == "--exec":
        _replace_process(arguments[1:], folder)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Write whole lines, at once, also with PYTHONUNBUFFERED: several ranks may share one pipe.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    if folder is not None:
        _instruments().install(folder)
    own = _of_this_process(folder)
    try:
        signal.signal(signal.SIGINT, interrupt)
        _run(arguments, own)
        _note_end(own())
    except SystemExit as ending:
        _note_end(own(), well=ending.code in (None, 0))
        if (kept := own()) is not None and ending.code is not None and not isinstance(ending.code, int):
            _write_error(kept, ending, _printed(ending.code), "")  # sys.exit("a message")
        raise
    except KeyboardInterrupt:
        # The agent forwards Ctrl-C to the ranks; the launcher reports it once, for all of them.
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        try:
            _fail(error, own())
        except Exception as another:  # a signal handler may raise here, as `_fail` explains
            _fail(another, own())


def _of_this_process(folder: Path | None) -> Callable[[], Path | None]:
    """Return a function that returns the folder, but None in a child that the script has forked.

    Such a child (os.fork) leaves the script in this file, too. Its end is not that of the rank.
    """
    pid = os.getpid()
    return lambda: folder if os.getpid() == pid else None


def _run(arguments: list[str], own: Callable[[], Path | None]) -> None:
    if arguments[0] == "--call":
        with open(arguments[1], "rb") as file:
            sys.path[:] = pickle.load(file)
            function, values = pickle.load(file)
        result = function(*values)
        if (folder := own()) is not None:
            import cloudpickle  # not pickle: the caller's script may define the class of the result

            try:
                written = cloudpickle.dumps(result)
            except Exception as error:
                raise TypeError(f"the result cannot be pickled to send it to the caller: {error}") from error
            (folder / "result.pickle").write_bytes(written)
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        _set_first_path(os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        if os.path.isdir(arguments[0]) or zipfile.is_zipfile(arguments[0]):
            _run_archive(arguments[0])
        else:
            _set_first_path(os.path.dirname(os.path.realpath(arguments[0])))
            _run_script(arguments[0])


def _set_first_path(folder: str) -> None:
    """Let imports search this folder first, and no longer that of this file."""
    if not sys.flags.safe_path:  # python -P and PYTHONSAFEPATH: neither is searched
        sys.path[0] = folder


def _run_archive(path: str) -> None:
    """Run the `__main__.py` of a folder or of a zip file as `python PATH` does."""
    sys.path[: 0 if sys.flags.safe_path else 1] = [os.path.abspath(path)]
    sys.modules["__main__"] = ModuleType("__main__")
    runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]  # what Python itself calls


def _run_script(path: str) -> None:
    """Run a script as `python SCRIPT` does: in a module `__main__` that stays, with an absolute `__file__`."""
    if path.endswith(".pyc"):
        runpy.run_path(path, run_name="__main__")
        return
    file = os.path.abspath(path)
    module = ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", file)
    vars(module).update(__file__=file, __cached__=None, __loader__=loader, __builtins__=builtins)
    sys.modules["__main__"] = module
    with io.open_code(file) as source:
        code = compile(source.read(), file, "exec", dont_inherit=True)
    exec(code, vars(module))


def _fail(error: BaseException, folder: Path | None) -> None:
    """Write the exception for the agent, and end with its exit code, or 1. The script's atexit functions still run."""
    with suppress(AttributeError, ValueError):
        # torch's handler raises when a data-loader worker has ended. That may be the failure that is being written.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    trace = _users_part(error.__traceback__)
    error = error.with_traceback(trace)  # a hook may print the exception's own
    written = folder is not None and _write_error(folder, error, _message(error), _text(error, trace))
    if folder is not None:
        _instruments().write_record(folder)
    # At the end, the agent prints the traceback of the rank that failed first. Rank 0 writes to the same terminal: the
    # traceback would appear twice. A hook of the user's may do more than print.
    hook = sys.excepthook
    ours_prints = written and os.environ.get("RANK") == "0"
    if not ours_prints or not (hook is sys.__excepthook__ or _of_torch(hook)):
        try:
            hook(type(error), error, trace)
        except Exception:  # as Python does: the script's exception is the failure
            traceback.print_exc()
    sys.exit(_exit_code(error))


def _exit_code(error: BaseException) -> int:
    code = getattr(error, "exit_code", 1)
    return code if isinstance(code, int) and 0 < code < 256 else 1


def _of_torch(function: object) -> bool:
    return str(getattr(function, "__module__", "")).startswith("torch.")


def _write_error(folder: Path, error: BaseException, message: str, trace: str) -> bool:
    """Write `error.json` and `error.pickle`. Return False where the disk is full.

    The agent may read at any time: `error.json` is renamed into place when it is complete.
    """
    extra: dict[str, Any] = {"py_callstack": trace, "timestamp": str(int(time.time())), "type": type(error).__name__}
    extra["exit_code"] = _exit_code(error)
    extra["pid"] = os.getpid()  # a program of the script may write to this file by torch's `record`, without it
    extra["before"] = [_message(one) for one in _earlier(error)[:10]]
    if type(error).__name__ == "RankFailure":
        extra["rank"] = getattr(error, "rank", -1)  # the rank that failed first, according to the error
    if type(error).__name__ == "WrongArithmetic":
        extra["record"] = getattr(error, "record", None)
    partial = folder / "error.json.partial"
    try:
        partial.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    except OSError:
        return False
    try:
        (folder / "error.pickle").write_bytes(pickle.dumps(error))
    except Exception:
        (folder / "error.pickle").unlink(missing_ok=True)  # the text in error.json says the same
    partial.rename(folder / "error.json")
    return True


def _message(error: BaseException) -> str:
    return _shortened(f"{type(error).__name__}: {_printed(error)}", _LONGEST_MESSAGE)


def _printed(value: object) -> str:
    """Return `str(value)`, also where that raises an exception."""
    try:
        return str(value)
    except Exception as error:
        return f"<its __str__ raised {type(error).__name__}>"


def _shortened(text: str, limit: int) -> str:
    """Return a text without its middle if it has more characters than `limit`. The agent does the same."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters are left out … {text[-half:]}"


def _earlier(error: BaseException) -> list[BaseException]:
    """Return the exceptions that led to this one, as its traceback shows them."""
    found = [error]
    while (last := found[-1]).__cause__ or not last.__suppress_context__:
        earlier = last.__cause__ or last.__context__
        if earlier is None or any(earlier is one for one in found):  # not `in`: the user's classes may define ==
            break
        found.append(earlier)
    return found[1:]


def _text(error: BaseException, trace: TracebackType | None) -> str:
    try:
        text = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
    except Exception:  # such as MemoryError, or notes that are no strings
        text = "".join([_HEAD_OF_TRACEBACK, *traceback.format_tb(trace), _message(error)])
    return _shortened(text, _LONGEST_TRACEBACK)


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the user's first frame on: without this file, runpy and ddparity's own command.

    None for a script that is no Python.
    """
    ours, rest = Path(__file__).parents[1], trace
    starters = (__file__, runpy.__file__, "<frozen runpy>", str(ours / "__main__.py"), str(ours / "cli.py"))
    while rest is not None:
        file = rest.tb_frame.f_code.co_filename
        if file not in starters and "/typer/" not in file and "/click/" not in file:
            break
        rest = rest.tb_next
    return rest


def _end_with(agent: int) -> None:
    """Have the kernel kill this process when the agent is killed. Linux only; the agent's guardian also does it."""
    _system().end_with_parent()
    if os.getppid() != agent and _system().process_fields(agent) is None:  # the agent ended before that call
        os._exit(128 + signal.SIGKILL)


def _replace_process(command: list[str], folder: Path | None) -> NoReturn:
    """Run a program in this process, as if the agent had started it."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores these signals, and the program would inherit that
    try:
        os.execvp(command[0], command)
    except OSError as error:
        message = f"cannot start {command[0]!r}: {error.strerror}"
        if folder is not None:
            _write_error(folder, error, message, "")
        sys.exit(message)


def _close_standard_input() -> None:
    """Give ranks other than 0 an empty standard input: they would take lines away from rank 0."""
    if os.environ.get("RANK") != "0":
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)


def _note_end(folder: Path | None, well: bool = True) -> None:
    """Tell the agent that the script has ended, whether with 0, and what may still keep this process."""
    if folder is not None:
        _instruments().write_end(folder, well)


def _system() -> ModuleType:
    return _load("_ddparity_system", "../system.py")


def _instruments() -> ModuleType:
    return _load("_ddparity_instruments", "diagnosis/instruments.py")


def _load(name: str, file: str) -> ModuleType:
    """Load a file by its path from this folder, so that no `__init__` of ddparity runs. Load it once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / file)
        assert spec is not None and spec.loader is not None, "the file is installed with this one"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


if __name__ == "__main__":
    main()

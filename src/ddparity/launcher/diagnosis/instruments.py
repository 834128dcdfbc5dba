"""Install in a rank's process what its agent needs to read the stacks and the collectives of that rank.

The worker loads this file by its path and calls `install` before the user's script runs. While the script runs, nothing
of this file runs: the server answers from its own thread, in C++, without the GIL. Only while a rank waits for
others, it is asked for the exception that it handles and for its groups, which Python answers. Neither ddparity nor
torch is imported, since a script that uses neither would wait for the import: the server starts after the script has
imported torch.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

# How many collectives a rank remembers. The agent sets it for its workers unless the user has set it. One takes about
# 512 bytes, and the agent reads all of them about once a second.
FLIGHT_VARIABLE = "TORCH_FR_BUFFER_SIZE"
FLIGHT_ENTRIES = "64"

SERVER = "server.sock"
FATAL = "fatal.txt"
STACKS = "stacks.txt"
FLIGHT = "flight.json"
ENDED = "ended.json"  # there when the script has ended
EXITED = "exited"  # there when the exit functions of the script have returned, too
PROMPTS = "prompt.*"  # one for each process of the rank that is at a debugger's prompt, with its process id

STATE_HANDLER = "ddparity_state"  # of torch's worker server
_DEEPEST = 50  # frames of a thread that are written
_LONGEST, _HALF = 20_000, 10_000  # characters of a traceback that are sent

_open: list[Any] = []  # files for faulthandler, which writes when Python may be unable to open one


def install(folder: Path) -> None:
    """Let the agent read this process through files in `folder`. Call it once, before the script runs.

    A fatal signal writes the stacks of all threads to `fatal.txt`. SIGABRT then waits up to 6 s, so that the agent can
    read the collectives of this rank. torch's worker server listens on `server.sock`. At exit, the last collectives are
    written to `flight.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FLIGHT).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # no space for another file: the script runs without it
        _dump_stacks(folder)
    _system().allow_tracing()
    os.register_at_fork(after_in_child=_uninstall)
    launched = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    after_import("torch", lambda: _serve(folder, launched))
    atexit.register(_at_exit, folder, os.getpid())


def write_record(folder: Path) -> None:
    """Write the last collectives of this rank to `flight.json`. It never raises: that would hide the first failure."""
    if "torch" not in sys.modules:
        return
    with contextlib.suppress(Exception):
        record = _compat().flight_record()
        if record is not None:
            path = folder / FLIGHT
            written = path.with_suffix(".tmp")
            written.write_bytes(record)
            written.replace(path)


def write_prompt(folder: Path) -> Path:
    """Tell the agent that this process is at a debugger's prompt, and return the file that tells it."""
    path = folder / PROMPTS.replace("*", str(os.getpid()))
    with contextlib.suppress(OSError):  # the disk is full
        partial = folder / f"partial.{path.name}"
        partial.write_text(_started(os.getpid()) or "")
        partial.replace(path)
    return path


def has_prompt(folder: Path) -> bool:
    """Return whether a process that runs has told by `write_prompt` that it is at a prompt. It may have been killed."""
    for path in folder.glob(PROMPTS):
        with contextlib.suppress(OSError, ValueError):
            if _started(int(path.suffix[1:])) == path.read_text():
                return True
    return False


def _started(pid: int) -> str | None:
    """Return when a process was started, in ticks; None if it has ended. Another process may get its id later."""
    if not _system().LINUX:
        return ""
    found = _system().process_fields(pid)
    return None if found is None else found[1][19]


def write_end(folder: Path, well: bool) -> None:
    """Write to `ended.json` when the script has ended, and which threads and child processes Python waits for now.

    `well`: its exit code will be 0.
    """
    threads = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    frames = sys._current_frames() if threads else {}
    content = {
        "at": time.time(),
        "well": well,
        "threads": [[one.native_id, one.name, _where(frames.get(one.ident or 0))] for one in threads],
        "children": [],
    }
    with contextlib.suppress(Exception):  # a script may have replaced what this needs
        if "multiprocessing.process" in sys.modules:
            children = sys.modules["multiprocessing.process"].active_children()
            content["children"] = [[one.pid, one.name] for one in children if not one.daemon]
    with contextlib.suppress(OSError):
        partial = folder / f"{ENDED}.partial"
        partial.write_text(json.dumps(content))
        partial.replace(folder / ENDED)


def _where(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """Return the frames of a stack as (file, line, function), innermost first."""
    found: list[tuple[str, int, str]] = []
    while frame is not None and len(found) < _DEEPEST:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def _answer(launched: list[str | None], request: Any, response: Any) -> None:
    """Answer with the exception that the main thread handles now, and what is known of this process's groups.

    `launched`: the rank and the world size that the launcher gave. A script may form worlds of other ranks.
    """
    content: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        content["exception"] = _handled_exception()
        content["groups"] = _compat().ranks_of_groups()
        content["called"] = _compat().numbers_of_groups()
        place = _compat().place_in_world()
        content["launched"] = place is None or list(map(str, place)) == launched
    response.set_content(json.dumps(content), "application/json")
    response.set_status(200)


def _handled_exception() -> dict[str, Any] | None:
    """Return the exception that the main thread handles: its `finally` or `except` block may wait for other ranks."""
    found: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    error = found[1] if isinstance(found, tuple) else found  # before Python 3.12 it is what exc_info() returns
    if not isinstance(error, BaseException) or error.__traceback__ is None:
        return None
    frame = error.__traceback__.tb_frame
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    return {
        "message": f"{type(error).__name__}: {error}"[:_LONGEST],
        "traceback": trace if len(trace) <= _LONGEST else f"{trace[:_HALF]}\n…\n{trace[-_HALF:]}",
        "file": frame.f_code.co_filename,
        "line": frame.f_lineno,
    }


def _dump_stacks(folder: Path) -> None:
    # The order matters: faulthandler's handler for SIGABRT writes the stacks, and then calls the handler that was there
    # before it.
    _system().hold_aborts()
    fatal = (folder / FATAL).open("w")
    _open.append(fatal)
    faulthandler.enable(fatal)
    if _system().STACK_SIGNAL is not None:
        stacks = (folder / STACKS).open("w")
        _open.append(stacks)
        faulthandler.register(_system().STACK_SIGNAL, stacks, all_threads=True)


def _uninstall() -> None:
    """Restore the handlers in a forked child, such as a data-loader worker: its crash is not a crash of the rank."""
    with contextlib.suppress(Exception):
        faulthandler.disable()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        faulthandler.enable(sys.__stderr__ or 2)


def _serve(folder: Path, launched: list[str | None]) -> None:
    path = folder / SERVER
    with contextlib.suppress(Exception):  # the script's import of torch must succeed, whatever torch has changed
        path.unlink(missing_ok=True)
        with _quiet():
            if _compat().serve_flight_records(str(path)):
                _compat().add_server_handler(STATE_HANDLER, functools.partial(_answer, launched))


def _compat() -> ModuleType:
    return _load("compat")


def _system() -> ModuleType:
    return _load("system")


def _load(file: str) -> ModuleType:
    """Load a file of ddparity's lowest floor by its path, without the package around it."""
    name = f"_ddparity_{file}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / f"{file}.py")
        assert spec is not None and spec.loader is not None, "the file is installed with this one"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def after_import(name: str, action: Callable[[], None]) -> None:
    """Run an action after a module has been imported, or now if it has been imported already."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    """Find one module as the other finders do, once, and run an action after the module has run."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name, self._action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # the script may extend sys.path and import it later
            return None
        loader: Any = spec.loader
        run: Callable[[ModuleType], None] = loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            del loader.exec_module  # the method of the class is in effect again
            with _interrupt_ends():
                run(module)
            self._action()

        loader.exec_module = run_and_act
        return spec


@contextlib.contextmanager
def _interrupt_ends() -> Iterator[None]:
    """Let Ctrl-C end the process at once: a KeyboardInterrupt in a callback from C++ is lost, or ends in an abort."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what C++ writes to standard error: the server writes a warning that it has started."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _at_exit(folder: Path, pid: int) -> None:
    if os.getpid() != pid:
        return
    write_record(folder)
    # The agent must not ask while the interpreter shuts down. The server itself ends with the process.
    (folder / SERVER).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / EXITED).touch()

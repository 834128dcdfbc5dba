"""What a rank carries so that the agent can see where it stands: installed in the worker before the user's script.

Nothing here runs while the script does: the server answers from its own thread, in C++, without the GIL. Nothing of
ddparity or torch is imported, as a script that knows nothing of either would wait for it: the server opens once the
script has imported torch.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import importlib.abc
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# Set by the agent for its workers, unless the user has: how many collectives a rank remembers. Half a kilobyte each,
# read about once a second.
FLIGHT_VARIABLE = "TORCH_FR_BUFFER_SIZE"
FLIGHT_ENTRIES = "64"

SERVER = "server.sock"
FATAL = "fatal.txt"
STACKS = "stacks.txt"
FLIGHT = "flight.json"

# Real-time signals, which no library takes for itself: the first writes stacks, the second only interrupts a sleep.
STACK_SIGNAL: int | None = signal.SIGRTMIN + 7 if sys.platform == "linux" else None
WAKE_SIGNAL: int | None = signal.SIGRTMIN + 8 if sys.platform == "linux" else None
_PR_SET_PTRACER = 0x59616D61
_ANY = ctypes.c_ulong(-1)

_open: list[Any] = []  # files that faulthandler writes to when Python may be past opening any


def install(folder: Path) -> None:
    """Let the agent look into this process through files in `folder`; call it once, before the script runs.

    A fatal signal writes all stacks to `fatal.txt`, and SIGABRT then waits up to 6 s, in which the agent reads the
    collectives of this rank; torch's worker server listens on `server.sock`; at exit `flight.json` stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FLIGHT).unlink(missing_ok=True)
    _dump_stacks(folder)
    if sys.platform == "linux":
        _allow_tracing()
    os.register_at_fork(after_in_child=_as_before)
    _after_import("torch", lambda: _serve(folder))
    atexit.register(_leave, folder, os.getpid())


def leave_record(folder: Path) -> None:
    """Write the last collectives of this rank to `flight.json`, as they are now; never raises."""
    if "torch" not in sys.modules:
        return
    with contextlib.suppress(Exception):  # a second failure must not hide the first
        record = _compat().flight_record()
        if record is not None:
            path = folder / FLIGHT
            written = path.with_suffix(".tmp")
            written.write_bytes(record)
            written.replace(path)


def let_abort(pid: int) -> None:
    """Wake a process of this machine that waits in its held SIGABRT, so that it dies of it now."""
    if WAKE_SIGNAL is None:
        return
    libc = ctypes.CDLL(None)
    with contextlib.suppress(OSError, AttributeError):  # it is gone; a C library without tgkill: it wakes by itself
        for thread in os.listdir(f"/proc/{pid}/task"):
            libc.tgkill(pid, int(thread), WAKE_SIGNAL)


def _dump_stacks(folder: Path) -> None:
    # The order matters: faulthandler's handler for SIGABRT writes the stacks, and then calls the one that was there
    # before it. `sleep` as a handler gets the signal's number as its seconds: 6, with the other threads alive.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        libc.signal(WAKE_SIGNAL, ctypes.cast(libc.abs, ctypes.c_void_p))  # does nothing, but ends that sleep
    fatal = (folder / FATAL).open("w")
    _open.append(fatal)
    faulthandler.enable(fatal)
    if STACK_SIGNAL is not None:
        stacks = (folder / STACKS).open("w")
        _open.append(stacks)
        faulthandler.register(STACK_SIGNAL, stacks, all_threads=True)


def _allow_tracing() -> None:
    """Let py-spy look at this process where the kernel otherwise allows it to parents alone (ptrace_scope 1)."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)


def _as_before() -> None:
    """In a forked child, such as a data-loader worker: its crash is no crash of the rank, and nobody waits for it."""
    with contextlib.suppress(Exception):
        faulthandler.disable()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        faulthandler.enable(sys.__stderr__ or 2)


def _serve(folder: Path) -> None:
    path = folder / SERVER
    with contextlib.suppress(Exception):  # the script's own import must go well, whatever this torch keeps private
        path.unlink(missing_ok=True)
        with _quiet():
            _compat().serve_flight_records(str(path))


def _compat() -> ModuleType:
    """ddparity's seam to torch as a file, without the package around it."""
    name = "_ddparity_compat"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "compat.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _after_import(name: str, action: Callable[[], None]) -> None:
    """Run an action once a module has been imported, or now if it has."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, once, and has something done after it ran."""

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
            sys.meta_path.insert(0, self)  # it may be found later, on another path
            return None
        loader: Any = spec.loader
        run: Callable[[ModuleType], None] = loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            del loader.exec_module  # the class's own again
            with _interrupt_ends():
                run(module)
            self._action()

        loader.exec_module = run_and_act
        return spec


@contextlib.contextmanager
def _interrupt_ends() -> Iterator[None]:
    """Ctrl-C ends the process at once: a KeyboardInterrupt in a callback from C++ is lost, or ends in an abort."""
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
    """Without what C++ writes to standard error: the server announces itself there as a warning."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _leave(folder: Path, pid: int) -> None:
    if os.getpid() != pid:
        return
    leave_record(folder)
    # Nobody may ask while the process takes itself apart; the server itself just goes with it.
    (folder / SERVER).unlink(missing_ok=True)

"""Read where a rank is: the frame of the user's code, and in a few words what the rank does there.

There are two sources: the stacks of a process that runs (`read_stacks`), and the text of a traceback that an ended
process has left (`last_user_frame`, `shorten_traceback`). Both tell the user's frames from those of libraries.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...system import STACK_SIGNAL, proc
from .flight import ask_stacks
from .instruments import STACKS
from .limits import read_file

# Frames, and whose code they are.

_DDPARITY = str(Path(__file__).parents[2])
_STDLIB = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.dirname(os.__file__)})


@dataclass(frozen=True)
class Frame:
    """One frame of a stack or of a traceback."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}, in {self.function}"


def is_users(frame: Frame) -> bool:
    """Return whether a frame is of the user's code, and not of a library, torch, ddparity or Python itself."""
    return not _is_internal(frame) and "site-packages" not in frame.file and "dist-packages" not in frame.file


def _is_internal(frame: Frame) -> bool:
    """Return whether a frame is of torch, ddparity or Python itself."""
    file = frame.file
    if file.startswith("<") or _is_below(file, _DDPARITY):
        return True
    return "/torch/" in file if "site-packages" in file or "dist-packages" in file else _is_below(file, *_STDLIB)


def _is_below(file: str, *folders: str) -> bool:
    return any(file.startswith(folder + os.sep) for folder in folders)


# A stack, and what the process does.

AT_PROMPT = "at a debugger's prompt"
DEBUGGED = (AT_PROMPT, "stopped by a debugger")  # a person thinks
_AGREEMENTS = "ddparity/runtime/agreement.py"

# The innermost frame that matches one of these tells the activity: (part of the path, functions or any, activity).
_ACTIVITIES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("/pdb.py", ("interaction", "cmdloop", "_cmdloop"), AT_PROMPT),
    ("/IPython/terminal/", (), AT_PROMPT),
    ("/code.py", ("interact",), AT_PROMPT),
    ("/pydevd", ("do_wait_suspend", "_do_wait_suspend"), AT_PROMPT),
    ("torch/_dynamo/eval_frame.py", (), ""),  # it is in the stack of every compiled function, also when none compiles
    ("torch/_dynamo/", (), "compiling"),
    ("torch/_inductor/", (), "compiling"),
    ("torch/_functorch/_aot", (), "compiling"),
    ("/triton/", ("compile", "make_cubin", "make_ptx"), "compiling"),
    ("torch/utils/cpp_extension.py", (), "compiling"),
    ("torch/distributed/checkpoint/", (), "saving or loading a checkpoint"),
    ("ddparity/checkpoint/checkpoint.py", (), "saving or loading a checkpoint"),
    ("ddparity/checkpoint/format.py", (), "saving or loading a checkpoint"),
    ("torch/serialization.py", (), "saving or loading a checkpoint"),
    ("safetensors/", (), "saving or loading a checkpoint"),
    (_AGREEMENTS, (), "waiting for other ranks"),
    ("torch/utils/data/dataloader.py", ("_try_get_data", "_get_data"), "waiting for data-loader workers"),
    ("torch/utils/data/dataloader.py", (), "loading data"),
    ("torch/utils/data/_utils/", (), "loading data"),
)
SLOW_ACTIVITIES = ("compiling", "saving or loading a checkpoint")  # a rank that does this for long does not hang
_IN_COLLECTIVE = ("torch/distributed/", "torch/autograd/graph.py", "torch/nn/parallel/distributed.py")
# A collective waits in a function of the first file, or of ours. In the second one a backward waits, or computes.
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_BACKWARD = "torch/autograd/graph.py"
_OURS = ("comm", "gradients", "batchnorm", "compat.py")
_NO_COLLECTIVE = ("new_group", "_new_group_with_tag", "init_process_group", "_store_based_barrier", "monitored_barrier")
_LOCKS = ("wait", "acquire", "join", "_wait_for_tstate_lock", "__enter__")
_SERVING = ("concurrent/futures/", "/multiprocessing/", "/logging/")  # an idle executor, a queue's feeder, a log's
_KERNEL_FILES = ("pipe_", "vfs_", "folio", "nfs", "fuse", "ext4", "xfs")
_KERNEL_SOCKETS = ("sk_", "inet_", "tcp_", "unix_", "skb", "poll", "select")


@dataclass(frozen=True)
class Stack:
    """The main thread of a rank, innermost frame first.

    `state`: the letter of /proc: R, S, D, T, Z. `waits_in`: the function of the kernel that the thread sleeps in.
    `text`: the stacks of all threads, for a file. `others`: the frames of the other threads.
    """

    frames: tuple[Frame, ...] = ()
    holds_gil: bool = False
    running: bool = False
    state: str = "?"
    waits_in: str = ""
    text: str = field(default="", compare=False)
    others: tuple[tuple[Frame, ...], ...] = ()

    def user_frame(self) -> Frame | None:
        """Return the innermost frame of the user's code. If there is none: of a library; if there is none: of any."""
        whose = (is_users, lambda frame: not _is_internal(frame), lambda frame: True)
        return next((frame for is_it in whose for frame in self.frames if is_it(frame)), None)

    def activity(self) -> str:
        """Return in a few words what the rank does; "" if that is not known."""
        if self.state == "T":
            return "stopped (SIGSTOP)"
        if self.state == "t":
            return DEBUGGED[1]
        if self.state == "D":
            return "in uninterruptible sleep, probably in a file system"
        if self.state in "ZX":
            return "ended"
        for frame in self.frames:
            if is_users(frame) and frame is not self.frames[0]:
                continue
            for part, functions, words in _ACTIVITIES:
                if part in frame.file and (not functions or frame.function.rpartition(".")[2] in functions):
                    if words:
                        return words
                    break
        return self._waiting()

    def in_collective(self, agreement: bool = False) -> bool:
        """Return whether the main thread is in torch.distributed or in a backward. Without frames, it is assumed.

        `agreement`: whether it is in an agreement.
        """
        parts = (_AGREEMENTS,) if agreement else _IN_COLLECTIVE
        inside = any(part in frame.file for frame in self.frames for part in parts)
        return self.state not in "TtD" and (inside or not self.frames)

    def only_waits(self, agreement: bool, idle: bool) -> bool:
        """Return whether the main thread can do nothing but wait, and no other thread runs code that could help it.

        `agreement`: it waits in one of ddparity's. `idle`: the process has used no processor for some seconds.
        """
        if not self.frames or self.running or self.state != "S" or any(map(_may_call, self.others)):
            return False
        if agreement:
            return any(frame.file.endswith(_AGREEMENTS) for frame in self.frames)
        if any(frame.function in _NO_COLLECTIVE for frame in self.frames):
            return False
        file = self.frames[0].file
        return file.endswith(_COLLECTIVES) or self.in_our_collective() or (idle and file.endswith(_BACKWARD))

    def in_our_collective(self) -> bool:
        """Return whether the main thread runs C code that ddparity calls, as for a collective of its own."""
        return bool(self.frames) and self.frames[0].file.startswith(
            tuple(os.path.join(_DDPARITY, one) for one in _OURS)
        )

    def _waiting(self) -> str:
        """Return what the main thread waits for, from its innermost frame and the kernel's function."""
        top = self.frames[0] if self.frames else None
        name = top.function.rpartition(".")[2] if top is not None else ""
        if top is not None and top.file.endswith("threading.py") and name in _LOCKS:
            return "waiting for a lock"
        if self.holds_gil and not self.running and self.waits_in:
            return "in C code, holding the GIL"
        if "futex" in self.waits_in:
            return "waiting for a lock"
        if "nanosleep" in self.waits_in:
            return "sleeping"
        if any(word in self.waits_in for word in _KERNEL_FILES):
            return "reading or writing a file"
        if "do_wait" in self.waits_in:
            return "waiting for a child process"
        if any(word in self.waits_in for word in _KERNEL_SOCKETS):
            return "waiting for a connection"
        return "running Python" if top is not None and (self.running or self.state == "R") else ""


def works(frames: tuple[Frame, ...], libraries: bool) -> bool:
    """Return whether a thread runs code of the user, or saves a checkpoint. `libraries`: or runs code of a library.

    It does not while it waits for another thread, as for a queue or a lock.
    """
    top = frames[0] if frames else Frame("", 0, "")
    if top.file.endswith("threading.py") and top.function.rpartition(".")[2] in _LOCKS:
        return False
    if Stack(frames).activity() in SLOW_ACTIVITIES:
        return True
    return any(is_users(frame) or (libraries and not _is_internal(frame)) for frame in frames)


def _may_call(frames: tuple[Frame, ...]) -> bool:
    """Return whether a thread may call a collective, now or later.

    It may if it is in code of the user, of torch.distributed or of ddparity; or if it is in the standard library alone,
    as a timer and an event loop are before they call back. Threads that only serve others do not.
    """
    if any(
        is_users(frame) or "torch/distributed/" in frame.file or _is_below(frame.file, _DDPARITY) for frame in frames
    ):
        return True
    alone = bool(frames) and all(frame.file.startswith("<") or _is_below(frame.file, *_STDLIB) for frame in frames)
    return (
        alone
        and not any("-packages" in frame.file for frame in frames)
        and not any(part in frame.file for frame in frames for part in _SERVING)
    )


# The stacks of processes that run: from py-spy, from torch's server in the process, and from /proc.

_SETTLED_S = 0.1  # a process that py-spy has paused runs for a moment before it waits again


def read_stacks(pids: Mapping[int, int], folders: Mapping[int, Path], timeout_s: float = 3.0) -> dict[int, Stack]:
    """Return the stacks of these ranks of this machine. No process gets a signal.

    A rank that py-spy cannot read is asked through torch's server; one that does not answer has no frames.
    """
    states = _process_states(pids)
    dumps = _py_spy(pids, {rank for rank, (state, _) in states.items() if state in "TtD"}, timeout_s)
    rest = {rank: folders[rank] for rank in pids if rank not in dumps}
    texts = ask_stacks(rest, min(1.0, timeout_s)) if rest else {}
    found = {}
    for rank, (state, waits_in) in states.items():
        if rank in dumps:
            found[rank] = _from_py_spy(dumps[rank], state, waits_in)
        elif rank in texts:
            main, others = _from_faulthandler(texts[rank])
            found[rank] = Stack(main, False, state == "R", state, waits_in, texts[rank], others)
        else:
            found[rank] = Stack(state=state, waits_in=waits_in)
    return found


def signal_for_stacks(pid: int, folder: Path, timeout_s: float = 1.0) -> str:
    """Have faulthandler write the stacks of a rank, which needs no GIL, and return them; "" if it writes none.

    Call it only if the job ends anyway: the signal may crash the process.
    """
    path = folder / STACKS
    if STACK_SIGNAL is None or not path.exists():
        return ""
    before = path.stat().st_size
    with contextlib.suppress(OSError):
        os.kill(pid, STACK_SIGNAL)
        deadline = time.monotonic() + timeout_s
        while path.stat().st_size == before and time.monotonic() < deadline:
            time.sleep(0.02)
        return read_file(path)[before:].decode(errors="replace")
    return ""


def _py_spy(pids: Mapping[int, int], stopped: Set[int], timeout_s: float) -> dict[int, Any]:
    """Return what py-spy reads of each process that it can read."""
    program = _py_spy_program()
    if program is None:
        return {}
    started = {}
    for rank, pid in pids.items():
        # py-spy would wait for ever until it can pause a process that is stopped already.
        how = ["--nonblocking"] if rank in stopped else []
        with contextlib.suppress(OSError):
            started[rank] = subprocess.Popen(
                [program, "dump", "--json", *how, "--pid", str(pid)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
    found = {}
    deadline = time.monotonic() + timeout_s
    for rank, process in started.items():
        try:
            out, _ = process.communicate(timeout=max(0.01, deadline - time.monotonic()))
            found[rank] = json.loads(out)
        except (subprocess.TimeoutExpired, ValueError):  # it has no permission to trace, or the process is gone
            process.kill()
            process.communicate()
    return found


def _py_spy_program() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _from_py_spy(threads: Sequence[Mapping[str, Any]], state: str, waits_in: str) -> Stack:
    main = next((one for one in threads if one["os_thread_id"] == one["pid"]), threads[0] if threads else {})
    lines = []
    for one in threads:
        gil = " holds the GIL" if one["owns_gil"] else ""
        lines.append(f"Thread {one['thread_name']} ({'active' if one['active'] else 'idle'}){gil}")
        lines += [f"    {frame}" for frame in _frames(one)]
    others = tuple(_frames(one) for one in threads if one is not main)
    holds_gil, active = bool(main.get("owns_gil")), bool(main.get("active"))
    return Stack(_frames(main), holds_gil, active, state, waits_in, "\n".join(lines), others)


def _frames(thread: Mapping[str, Any]) -> tuple[Frame, ...]:
    return tuple(Frame(one["filename"], one["line"], one["name"]) for one in thread.get("frames", ()))


_FAULTHANDLER_FRAME = re.compile(r'  File "(.+)", line (\d+|\?\?\?) in (.+)')


def _from_faulthandler(text: str) -> tuple[tuple[Frame, ...], tuple[tuple[Frame, ...], ...]]:
    """Return the frames of the main thread and of the others. The main one is last: the newest thread comes first."""
    threads = [
        tuple(
            Frame(file, int(line) if line.isdigit() else 0, name)
            for file, line, name in _FAULTHANDLER_FRAME.findall(part)
        )
        for part in text.split("hread 0x")[1:]
    ]
    return (threads[-1] if threads else ()), tuple(threads[:-1])


def ask_by_signal(stack: Stack, pid: int, folder: Path) -> Stack:
    """Return a stack with the frames that faulthandler writes, if it has none. Call it as `signal_for_stacks`."""
    return stack if stack.frames else replace(stack, frames=_from_faulthandler(signal_for_stacks(pid, folder))[0])


def _process_states(pids: Mapping[int, int]) -> dict[int, tuple[str, str]]:
    """Return `_process_state` of each process.

    A process that py-spy has paused runs for a moment afterwards, whatever it waits for: a process counts as running
    only if it still runs after `_SETTLED_S`.
    """
    found = {rank: _process_state(pid) for rank, pid in pids.items()}
    deadline = time.monotonic() + _SETTLED_S
    while (running := [rank for rank in pids if found[rank][0] == "R"]) and time.monotonic() < deadline:
        time.sleep(0.01)
        found.update({rank: _process_state(pids[rank]) for rank in running})
    return found


def _process_state(pid: int) -> tuple[str, str]:
    """Return the state letter of a process's main thread and the function of the kernel that it sleeps in."""
    try:
        state = proc(pid, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X", ""
    try:
        waits_in = proc(pid, "wchan").read_text()
    except OSError:
        waits_in = ""
    return state, "" if waits_in == "0" else waits_in


# The text of a traceback.

_SHORT = 10  # lines of a traceback that is shown as it is
_TRACEBACK_FRAME = re.compile(r'(\s+)File "(.+)", line (\d+),? in (.+)')
_UNDERLINE = re.compile(r"\s+[\^~]+\s*")  # of the part of a source line that failed
_INSTALLED = re.compile(r".*/(?:(?:site|dist)-packages|lib/python3\.\d+|(?=ddparity/))/?")


def last_user_frame(traceback: str) -> Frame | None:
    """Return the innermost frame of the user's code in a traceback; None if there is none."""
    found = (_TRACEBACK_FRAME.fullmatch(line) for line in traceback.splitlines())
    frames = [Frame(one[2], int(one[3]), one[4]) for one in found if one is not None]
    return next((frame for frame in reversed(frames) if is_users(frame)), None)


def shorten_traceback(traceback: str) -> str:
    """Return a long traceback without the frames of libraries, and a short one as it is.

    The frames of a traceback that the exception's message quotes are shortened, too. One line replaces frames of
    libraries that follow each other: their number and the last of them.
    """
    lines = traceback.splitlines()
    if len(lines) <= _SHORT:
        return traceback
    kept: list[str] = []
    run: list[Frame] = []  # frames of libraries since the last line that is kept
    depth = -1  # the indentation of the frame whose source lines follow; -1: no frame
    for line in lines:
        found = _TRACEBACK_FRAME.fullmatch(line)
        if found is not None:
            depth = len(found[1])
            frame = Frame(found[2], int(found[3]), found[4])
            if not is_users(frame):
                run.append(frame)
                continue
        elif depth >= 0 and len(line) - len(line.lstrip()) > depth:
            if run or _UNDERLINE.fullmatch(line):
                continue
        else:
            depth = -1
        if run:
            kept.append(_summary(run))
            run = []
        kept.append(line)
    return "\n".join(kept)


def _summary(run: list[Frame]) -> str:
    last = run[-1]
    number = f"{len(run)} frames, to" if len(run) > 1 else "1 frame,"
    return f"  … {number} {_INSTALLED.sub('', last.file)}:{last.line}, in {last.function}"

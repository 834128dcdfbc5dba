"""Where a rank stands: the line of the user's code, and in a few words what it does there."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .flight import ask_traces
from .instruments import STACK_SIGNAL, STACKS

_DDPARITY = str(Path(__file__).parents[2])
_STDLIB = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.dirname(os.__file__)})
# The innermost frame that one of these matches tells what a rank does: (part of the path, functions or any, words).
_ACTIVITIES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("torch/_dynamo/eval_frame.py", (), ""),  # stands below every compiled function that just runs
    ("torch/_dynamo/", (), "compiling"),
    ("torch/_inductor/", (), "compiling"),
    ("torch/_functorch/_aot", (), "compiling"),
    ("/triton/", ("compile", "make_cubin", "make_ptx"), "compiling"),
    ("torch/utils/cpp_extension.py", (), "compiling"),
    ("torch/distributed/checkpoint/", (), "saving or loading a checkpoint"),
    ("ddparity/checkpoint/", (), "saving or loading a checkpoint"),
    ("torch/serialization.py", (), "saving or loading a checkpoint"),
    ("safetensors/", (), "saving or loading a checkpoint"),
    ("ddparity/runtime/agreement.py", (), "waiting for other ranks in first() or world()"),
    ("torch/utils/data/dataloader.py", ("_try_get_data", "_get_data"), "waiting for data-loader workers"),
    ("torch/utils/data/dataloader.py", (), "loading data"),
    ("torch/utils/data/_utils/", (), "loading data"),
)
PATIENT = ("compiling", "saving or loading a checkpoint")  # a long time in these is no hang
_LOCKS = ("wait", "acquire", "join", "_wait_for_tstate_lock", "__enter__")
_SETTLED_S = 0.1  # for a process that was held to wait again
_FILES = ("read", "write", "readinto", "readline", "flush", "fsync", "open")


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}, in {self.function}"


@dataclass(frozen=True)
class Stack:
    """A rank's main thread, innermost frame first. `text`: all its threads, to be kept in a file."""

    frames: tuple[Frame, ...] = ()
    holds_gil: bool = False
    running: bool = False
    state: str = "?"  # of /proc: R, S, D, T, Z
    waits_in: str = ""  # the kernel's function
    text: str = field(default="", compare=False)

    def place(self) -> Frame | None:
        """The innermost frame of the user's code; of a library's, or of any, where there is none."""
        whose = (is_users, lambda frame: not _is_ours(frame), lambda frame: True)
        return next((frame for mine in whose for frame in self.frames if mine(frame)), None)

    def doing(self) -> str:
        """A few words; empty where nothing is known."""
        if self.state in "Tt":
            return "stopped (SIGSTOP)"
        if self.state == "D":
            return "in uninterruptible sleep, probably a file system"
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

    def in_collective(self) -> bool:
        """Whether the main thread is in torch.distributed or in a backward, as far as is known."""
        parts = ("torch/distributed/", "torch/autograd/graph.py", "torch/nn/parallel/distributed.py")
        inside = any(part in frame.file for frame in self.frames for part in parts)
        return self.state not in "TtD" and (inside or not self.frames)

    def _waiting(self) -> str:
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
        if any(word in self.waits_in for word in ("pipe_", "vfs_", "folio", "nfs", "fuse", "ext4", "xfs")):
            return "reading or writing a file"
        if "do_wait" in self.waits_in:
            return "waiting for a process that it started"
        if any(word in self.waits_in for word in ("sk_", "inet_", "tcp_", "unix_", "skb", "poll", "select")):
            return "waiting for a connection"
        return "running Python" if top is not None and (self.running or self.state == "R") else ""


def _is_ours(frame: Frame) -> bool:
    """Whether the frame is torch's, ddparity's or Python's own."""
    file = frame.file
    if file.startswith("<") or _is_below(file, _DDPARITY):
        return True
    return "/torch/" in file if "site-packages" in file or "dist-packages" in file else _is_below(file, *_STDLIB)


def is_users(frame: Frame) -> bool:
    """Whether the frame is none of a library's, torch's, ddparity's or Python's own."""
    return not _is_ours(frame) and "site-packages" not in frame.file and "dist-packages" not in frame.file


def _is_below(file: str, *folders: str) -> bool:
    return any(file.startswith(folder + os.sep) for folder in folders)


def look_at(pids: Mapping[int, int], folders: Mapping[int, Path], timeout_s: float = 3.0) -> dict[int, Stack]:
    """Where these ranks of this machine stand, without a signal to any: by py-spy, torch's server, /proc."""
    states = _processes(pids)
    dumps = _py_spy(pids, {rank for rank, (state, _) in states.items() if state in "TtD"}, timeout_s)
    rest = {rank: folders[rank] for rank in pids if rank not in dumps}
    traces = ask_traces(rest, min(1.0, timeout_s)) if rest else {}
    found = {}
    for rank, (state, waits_in) in states.items():
        if rank in dumps:
            found[rank] = _from_py_spy(dumps[rank], state, waits_in)
        elif rank in traces:
            found[rank] = Stack(_from_trace(traces[rank]), False, state == "R", state, waits_in, traces[rank])
        else:
            found[rank] = Stack(state=state, waits_in=waits_in)
    return found


def signal_for_stacks(pid: int, folder: Path, timeout_s: float = 1.0) -> str:
    """Have faulthandler write a rank's stacks, GIL or not. Only where the job ends anyway: it may crash the process."""
    path = folder / STACKS
    if STACK_SIGNAL is None or not path.exists():
        return ""
    before = path.stat().st_size
    with contextlib.suppress(OSError):
        os.kill(pid, STACK_SIGNAL)
        deadline = time.monotonic() + timeout_s
        while path.stat().st_size == before and time.monotonic() < deadline:
            time.sleep(0.02)
        return path.read_text(errors="replace")[before:]
    return ""


def _py_spy(pids: Mapping[int, int], stopped: Set[int], timeout_s: float) -> dict[int, Any]:
    program = _program()
    if program is None:
        return {}
    started = {}
    for rank, pid in pids.items():
        # A process that is stopped never comes to the point where py-spy would hold it.
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
        except (subprocess.TimeoutExpired, ValueError):  # no right to trace, or a process that is gone
            process.kill()
            process.communicate()
    return found


def _program() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _from_py_spy(threads: Sequence[Mapping[str, Any]], state: str, waits_in: str) -> Stack:
    main = next((one for one in threads if one["os_thread_id"] == one["pid"]), threads[0] if threads else {})
    lines = []
    for one in threads:
        marks = " holds the GIL" if one["owns_gil"] else ""
        lines.append(f"Thread {one['thread_name']} ({'active' if one['active'] else 'idle'}){marks}")
        lines += [f"    {frame}" for frame in _frames(one)]
    return Stack(_frames(main), bool(main.get("owns_gil")), bool(main.get("active")), state, waits_in, "\n".join(lines))


def _frames(thread: Mapping[str, Any]) -> tuple[Frame, ...]:
    return tuple(Frame(one["filename"], one["line"], one["name"]) for one in thread.get("frames", ()))


_LINE = re.compile(r'  File "(.+)", line (\d+|\?\?\?) in (.+)')


def _from_trace(text: str) -> tuple[Frame, ...]:
    """The last thread of faulthandler's text, which is the main one: it writes the newest first."""
    found = _LINE.findall(text.rpartition("hread 0x")[2])
    return tuple(Frame(file, int(line) if line.isdigit() else 0, name) for file, line, name in found)


def _processes(pids: Mapping[int, int]) -> dict[int, tuple[str, str]]:
    """`_process` of each. What py-spy has held runs for a moment afterwards, whatever it waits in: only who goes on
    running does run."""
    found = {rank: _process(pid) for rank, pid in pids.items()}
    deadline = time.monotonic() + _SETTLED_S
    while (running := [rank for rank in pids if found[rank][0] == "R"]) and time.monotonic() < deadline:
        time.sleep(0.01)
        found.update({rank: _process(pids[rank]) for rank in running})
    return found


def _process(pid: int) -> tuple[str, str]:
    """The state letter of a process's main thread and the kernel's function that it sleeps in."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X", ""
    try:
        waits_in = Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        waits_in = ""
    return state, "" if waits_in == "0" else waits_in


_WHOLE = 10  # lines that are shown as they are
_FRAME = re.compile(r'(\s+)File "(.+)", line (\d+),? in (.+)')
_MARKS = re.compile(r"\s+[\^~]+\s*")
_INSTALLED = re.compile(r".*/(?:(?:site|dist)-packages|lib/python3\.\d+|(?=ddparity/))/?")


def shortened(trace: str) -> str:
    """A long traceback without the frames of libraries, also those that its message quotes; a short one as it is.

    Each run of such frames becomes one line, which tells where the last of them stood.
    """
    lines = trace.splitlines()
    if len(lines) <= _WHOLE:
        return trace
    kept: list[str] = []
    run: list[Frame] = []
    depth = -1  # the indentation of the frame whose source lines follow; -1: none
    for line in lines:
        found = _FRAME.fullmatch(line)
        if found is not None:
            depth = len(found[1])
            frame = Frame(found[2], int(found[3]), found[4])
            if not is_users(frame):
                run.append(frame)
                continue
        elif depth >= 0 and len(line) - len(line.lstrip()) > depth:
            if run or _MARKS.fullmatch(line):
                continue
        else:
            depth = -1
        if run:
            kept.append(_told(run))
            run = []
        kept.append(line)
    return "\n".join(kept)


def last_place(trace: str) -> Frame | None:
    """The innermost frame of the user's code; none where there is none."""
    found = (_FRAME.fullmatch(line) for line in trace.splitlines())
    frames = [Frame(one[2], int(one[3]), one[4]) for one in found if one is not None]
    return next((frame for frame in reversed(frames) if is_users(frame)), None)


def _told(run: list[Frame]) -> str:
    last = run[-1]
    number = f"{len(run)} frames, to" if len(run) > 1 else "1 frame,"
    return f"  … {number} {_INSTALLED.sub('', last.file)}:{last.line}, in {last.function}"

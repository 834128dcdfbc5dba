"""Healthy waits, which no launcher may end, and real hangs, which it must name; and a function that runs one."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_HEAD = """
import ctypes, os, pdb, queue, signal, socket, subprocess, sys, threading, time
import multiprocessing as mp
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import torch, torch.distributed as dist, ddparity as dp
from torch.utils.data import DataLoader, Dataset
S = float(os.environ["WAIT_S"])
FOREVER = 1e6

def steps():
    for _ in range(3):
        dist.all_reduce(torch.ones(4))

def until(seconds, work):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        work()

def later(seconds, work):  # in another process
    process = mp.get_context("fork").Process(target=lambda: (time.sleep(seconds), work()), daemon=True)
    process.start()
    return process

WORLDS = []
def again(*ranks):  # leave this world, and make another one of these ranks; of all if none are given
    rank = dist.get_rank()
    ranks = ranks or range(dist.get_world_size())
    dist.barrier()
    dist.destroy_process_group()
    WORLDS.append(ranks)
    file = f"file://{os.getcwd()}/world{len(WORLDS)}of{ranks[0]}"
    dist.init_process_group("gloo", file, rank=ranks.index(rank), world_size=len(ranks))

class Slow(Dataset):
    def __init__(self, seconds): self.seconds = seconds
    def __len__(self): return 4
    def __getitem__(self, index):
        if index == 0: time.sleep(self.seconds)
        return torch.ones(1)

class SlowPickle:
    def __reduce__(self):
        time.sleep(S)
        return int, ()

def main(rank):
    first_lines()
    BODY

def first_lines():
    steps()
    rank = dist.get_rank()
    open(f"ready{rank}", "w").close()

if __name__ == "__main__":
    with dp.world(device="cpu") as world:
        main(world.rank)
        steps()
        dist.barrier()
    print("well", flush=True)
"""


@dataclass(frozen=True)
class Wait:
    """A wait that ends after WAIT_S seconds. `typed`: what a person types at a debugger's prompt after that time.

    `stopped`: what gets SIGSTOP, and SIGCONT after that time.
    """

    body: str
    nproc: int = 2
    ptrace: bool = True
    typed: str = ""
    stopped: str = ""


_ALONE = "if rank == 0:\n    "
_SLOW_SAVE = """
if rank == 0:
    sync = os.fsync
    os.fsync = lambda one: (setattr(os, "fsync", sync), time.sleep(S), sync(one))
dp.save_checkpoint("last.safetensors", model=torch.nn.Linear(2, 2))
"""

WAITS = {
    "a loop in Python": Wait(_ALONE + "until(S, lambda: sum(range(1000)))"),
    "an evaluation": Wait(_ALONE + "until(S, lambda: (torch.randn(64, 64) @ torch.randn(64, 64)).sum().item())", 3),
    "NumPy": Wait(_ALONE + "until(S, lambda: np.linalg.svd(np.ones((64, 64))))", ptrace=False),
    "C that holds the GIL": Wait(_ALONE + "ctypes.PyDLL(None).sleep(int(S))"),
    "C that holds the GIL, no ptrace": Wait(_ALONE + "ctypes.PyDLL(None).sleep(int(S))", ptrace=False),
    "C without the GIL": Wait(_ALONE + "ctypes.CDLL(None).sleep(int(S))"),
    "a sleep": Wait(_ALONE + "time.sleep(S)", 3, ptrace=False),
    "a program": Wait(_ALONE + "subprocess.run(['sleep', str(S)], check=True)"),
    "a program that computes": Wait(
        _ALONE + "subprocess.run(['timeout', str(S), 'sh', '-c', 'while :; do sleep 0.01; done'])"
    ),
    "a shell": Wait(_ALONE + "os.system(f'sleep {S}')", ptrace=False),
    "a thread's end": Wait(_ALONE + "one = threading.Thread(target=time.sleep, args=(S,)); one.start(); one.join()"),
    "a future": Wait(_ALONE + "ThreadPoolExecutor(1).submit(time.sleep, S).result()", ptrace=False),
    "an event": Wait(_ALONE + "one = threading.Event(); threading.Timer(S, one.set).start(); one.wait()", 3),
    "a queue": Wait(_ALONE + "one = queue.Queue(); threading.Timer(S, one.put, (1,)).start(); one.get()"),
    "a socket": Wait(_ALONE + "a, b = socket.socketpair(); later(S, lambda: b.send(b'x')); a.recv(1)"),
    "a pipe": Wait(_ALONE + "r, w = os.pipe(); later(S, lambda: os.write(w, b'x')); os.read(r, 1)", ptrace=False),
    "a disk": Wait(
        _ALONE + "with open('data', 'wb') as file:\n"
        "        until(S, lambda: (file.write(bytes(1 << 16)), os.fsync(file.fileno()), time.sleep(0.05)))"
    ),
    "NumPy files": Wait(
        _ALONE + "until(S, lambda: (np.save('data.npy', np.zeros(1000)), time.sleep(0.05)))", ptrace=False
    ),
    "torch.save": Wait(_ALONE + "torch.save(SlowPickle(), os.devnull)"),
    "a checkpoint": Wait(_SLOW_SAVE),
    "a checkpoint, 3 ranks, no ptrace": Wait(_SLOW_SAVE, 3, ptrace=False),
    "first": Wait("with dp.first() as mine:\n    if mine: time.sleep(S)", 3),
    "first on each node": Wait(
        "with dp.first('node') as mine:\n    if mine: subprocess.run(['sleep', str(S)])", ptrace=False
    ),
    "a loader's first batch": Wait("list(DataLoader(Slow(S if rank == 0 else 0), num_workers=1))"),
    "a loader without workers": Wait("list(DataLoader(Slow(S if rank == 1 else 0)))", 3),
    "a pool of processes": Wait(_ALONE + "mp.get_context('fork').Pool(1).map(time.sleep, [S])", ptrace=False),
    "a compiler": Wait(
        "def compiled(): torch.compile(lambda x: x + time.time(), backend='aot_eager', dynamic=False)(torch.ones(3))\n"
        + _ALONE
        + "until(S, compiled)"
    ),
    "all ranks stopped": Wait("time.sleep(1)\nfor _ in range(10): steps(); time.sleep(0.1)", stopped="ranks"),
    "the job stopped": Wait(
        _ALONE + "time.sleep(3)\nfor _ in range(10): steps(); time.sleep(0.1)", ptrace=False, stopped="all"
    ),
    "breakpoint()": Wait(_ALONE + "breakpoint()", typed="p 6 * 7\nc\n"),
    "dist.breakpoint on rank 1": Wait("dist.breakpoint(rank=1)", typed="p 6 * 7\nc\n", ptrace=False),
    "pdb.post_mortem": Wait(_ALONE + "try: [][1]\n    except IndexError: pdb.post_mortem()", 3, typed="p 6 * 7\nq\n"),
    "collectives in the background": Wait(
        # Each rank has called what the other has not, and neither of them waits.
        "one, two = dist.new_group(), dist.new_group()\n"
        "work = dist.all_reduce(torch.ones(1), group=two if rank else one, async_op=True)\n"
        "time.sleep(S)\n"
        "dist.all_reduce(torch.ones(1), group=one if rank else two)\nwork.wait()"
    ),
    "a thread that communicates": Wait(
        "one, two = dist.new_group(), dist.new_group()\n"
        "def upload(): time.sleep(S); dist.barrier(two)\n"
        "if rank == 0:\n"
        "    thread = threading.Thread(target=upload); thread.start()\n"
        "    dist.all_reduce(torch.ones(1), group=one); thread.join()\n"
        "else:\n"
        "    dist.barrier(two); dist.all_reduce(torch.ones(1), group=one)"
    ),
    "send and recv": Wait(
        "if rank == 0:\n    time.sleep(S); dist.send(torch.ones(1), 1)\nelse: dist.recv(torch.ones(1), 0)"
    ),
    "a new group": Wait(_ALONE + "time.sleep(S)\ndist.new_group([0, 1])", ptrace=False),
    "a second world": Wait("again()\n" + _ALONE + "time.sleep(S)"),
    "a second world, C that holds the GIL": Wait("again()\nif rank == 1:\n    ctypes.PyDLL(None).sleep(int(S))", 3),
    "a world of fewer ranks": Wait(
        "if rank == 2:\n    dist.barrier(); dist.destroy_process_group(); sys.exit()\n"
        "again(0, 1)\nsteps(); steps()\n" + _ALONE + "time.sleep(S)",
        3,
    ),
    "a world of later ranks": Wait(
        "if rank == 0:\n    dist.barrier(); dist.destroy_process_group(); print('well'); sys.exit()\n"
        "again(1, 2)\nsteps(); steps()\nif rank == 1:\n    time.sleep(S)",
        3,
        ptrace=False,
    ),
    "two worlds at once": Wait(
        "again(*((0, 1) if rank < 2 else (2, 3)))\n"
        "for _ in range(5): dist.all_reduce(torch.ones(4 if rank < 2 else 8))\n"
        "if rank in (0, 2): time.sleep(S)\n"
        "dist.all_reduce(torch.ones(4 if rank < 2 else 8))",
        4,
    ),
    "a thread after the end": Wait(_ALONE + "threading.Thread(target=time.sleep, args=(S,)).start()"),
    "work after the others have ended": Wait(_ALONE + "import atexit; atexit.register(time.sleep, S)"),
}


@dataclass(frozen=True)
class Hang:
    """A hang. `said`: what the last lines say of it. `proof`: it cannot end by itself, so it is named in seconds.

    The others are ended after the user's own time.
    """

    body: str
    said: str
    proof: bool = True
    nproc: int = 2
    code: int = 124
    ptrace: bool = True


_TWO = "one, two = dist.new_group(), dist.new_group()\n"
_ABSENT = r"hang: rank 1 has not called all_reduce #4: rank 0 waits.*"

HANGS = {
    "other collective": Hang(
        "dist.all_reduce(torch.ones(4)) if rank else dist.broadcast(torch.ones(4), 0)", "collective #4: "
    ),
    "other collective, 3 ranks": Hang(
        "dist.barrier() if rank == 2 else steps()", r"do not agree.*rank 2 calls barrier", nproc=3
    ),
    "other shape": Hang("dist.all_reduce(torch.ones(4 + rank))", r"rank 1 calls all_reduce of 5 float32"),
    "other dtype": Hang("dist.all_reduce(torch.ones(4, dtype=torch.float64 if rank else torch.float32))", "4 float64"),
    "an additional collective": Hang(_ALONE + "dist.all_reduce(torch.ones(1))", r"do not agree on collective #"),
    "other root's shape": Hang("dist.broadcast(torch.ones(8 - 4 * rank), 0)", r"broadcast of 8 float32", code=124),
    "all_gather of other shapes": Hang(
        "dist.all_gather([torch.ones(3 + rank) for _ in range(2)], torch.ones(3 + rank))",
        r"do not agree on collective #4",
    ),
    "reduce and all_reduce": Hang(
        "dist.all_reduce(torch.ones(4)) if rank else dist.reduce(torch.ones(4), 0)", r"calls reduce of 4"
    ),
    "ends without a record": Hang(
        "if rank == 1: os._exit(0)", r"rank 1 failed: ended with exit code 0 while the others waited for it", code=1
    ),
    "returns early": Hang("if rank == 1: sys.exit(0)", r"rank 1 finished without calling all_reduce #4"),
    "returns early, 3 ranks": Hang("if rank == 1: sys.exit(0)", r"rank 1 finished|rank 1 failed", nproc=3),
    "killed": Hang("if rank == 1: os.kill(os.getpid(), 9)", r"rank 1 failed: ended by SIGKILL", code=137),
    "raises": Hang("if rank == 1: raise ValueError('bad')", r"rank 1 failed: ValueError: bad", code=1),
    "two groups in another order": Hang(
        _TWO + "for group in ((one, two) if rank else (two, one)): dist.all_reduce(torch.ones(1), group=group)",
        r"wait for each other: rank 0 waits in all_reduce #1 of group \d for rank 1; rank 1 waits in all_reduce",
    ),
    "three groups in a ring": Hang(
        "pairs = [dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group([0, 2])]\n"
        "order = {0: (0, 2), 1: (1, 0), 2: (2, 1)}[rank]\n"
        "for number in order: dist.all_reduce(torch.ones(1), group=pairs[number])",
        r"wait for each other: rank 0 waits in .* for rank 1; rank 1 waits in .* for rank 2; rank 2 waits in .* rank 0",
        nproc=3,
    ),
    "two agreements": Hang(
        "if rank == 0:\n    with dp.first(): pass\n"
        "dp.save_checkpoint('last.safetensors', m=torch.nn.Linear(1, 1))\n"
        "if rank == 1:\n    with dp.first(): pass",
        r'wait for each other: rank 0 waits in first\("world"\) for rank 1; rank 1 waits in save_checkpoint',
    ),
    "two agreements, 3 ranks, no ptrace": Hang(
        "if rank != 1:\n    with dp.first(): pass\ndp.save_checkpoint('last.safetensors', m=torch.nn.Linear(1, 1))",
        r'wait for each other: ranks 0, 2 wait in first\("world"\) for rank 1; rank 1 waits in save_checkpoint',
        nproc=3,
        ptrace=False,
    ),
    "an agreement and a collective": Hang(
        "if rank == 0:\n    with dp.first(): pass",
        r'rank 0 waits in first\("world"\) for rank 1; rank 1 waits in all_reduce #4',
    ),
    "a collective inside of first": Hang(
        "with dp.first():\n    dist.barrier()",
        r'rank 0 waits in barrier #4 for rank 1; rank 1 waits in first\("world"\) for',
    ),
    "a collective inside of first, 3 ranks": Hang(
        "with dp.first('node') as mine:\n    if mine: dist.barrier()",
        r"waits in barrier #4 for ranks 1, 2; ranks 1, 2 wait in first",
        nproc=3,
    ),
    "finally: barrier()": Hang(
        "try:\n    if rank == 0: raise KeyError('label')\n    steps()\nfinally:\n    dist.barrier()",
        r"rank 0 failed: KeyError: 'label'(?s:.*)was on its way",
        code=1,
    ),
    "finally: barrier(), large tensors": Hang(
        "try:\n    if rank == 1: raise KeyError('label')\n    dist.all_reduce(torch.ones(10**6))\n"
        "finally:\n    dist.barrier()",
        r"rank 1 failed: KeyError: 'label'(?s:.*)was on its way",
        code=1,
    ),
    "a context manager's end": Hang(
        "class Timed:\n"
        "    def __enter__(self): pass\n"
        "    def __exit__(self, *_): dist.barrier()\n"
        "with Timed():\n    if rank == 1: raise KeyError('label')\n    steps()",
        r"rank 1 failed: KeyError: 'label'(?s:.*)was on its way",
        code=1,
    ),
    "another collective in a second world": Hang(
        "again()\ndist.all_reduce(torch.ones(4)) if rank else dist.barrier()",
        r"do not agree on collective #1: rank 0 calls barrier, rank 1 calls all_reduce of 4",
    ),
    "returns early from a second world": Hang(
        "steps()\nagain()\nif rank == 1: time.sleep(1); sys.exit(0)",
        r"rank 1 finished without calling all_reduce #1",
    ),
    "two groups of a second world in another order, no ptrace": Hang(
        "steps()\nagain()\n" + _TWO + "for group in ((one, two) if rank else (two, one)): dist.barrier(group)",
        r"wait for each other: rank 0 waits in barrier #1 of group \d for rank 1; rank 1 waits in barrier",
        ptrace=False,
    ),
    "an endless loop in a second world": Hang(
        "steps()\ntime.sleep(2)\nagain()\nwhile rank == 1: pass",
        r"hang: rank 1 has not called all_reduce #1: rank 0 waits.*running Python",
        False,
    ),
    "C that holds the GIL in a second world": Hang(
        "steps()\ntime.sleep(2)\nagain()\nif rank == 1: ctypes.PyDLL(None).sleep(10**6)",
        r"hang: rank 1 has not called all_reduce #1: rank 0 waits",
        False,
    ),
    "a lock": Hang(
        "if rank == 1:\n    lock = threading.Lock(); lock.acquire(); lock.acquire()", _ABSENT + "lock", False
    ),
    "an endless loop": Hang("while rank == 1: pass", _ABSENT + "running Python", False),
    "C that holds the GIL": Hang("if rank == 1: ctypes.PyDLL(None).sleep(10**6)", _ABSENT, False),
    "C that holds the GIL, no ptrace": Hang(
        "if rank == 1: ctypes.PyDLL(None).sleep(10**6)", _ABSENT, False, ptrace=False
    ),
    "stopped": Hang("if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)", _ABSENT + r"SIGSTOP", False),
    "an event, 3 ranks": Hang(
        "if rank == 1: threading.Event().wait()", r"hang: rank 1 has not called all_reduce #4: ranks 0, 2", False, 3
    ),
    "a program": Hang("if rank == 1: subprocess.run(['sleep', '1000000'])", _ABSENT + "child", False),
    "a socket": Hang("ends = socket.socketpair()\nif rank == 1: ends[0].recv(1)", _ABSENT, False, ptrace=False),
    "a queue": Hang("if rank == 1: queue.Queue().get()", _ABSENT + "lock", False),
    "a data loader": Hang(
        "list(DataLoader(Slow(FOREVER if rank == 1 else 0), num_workers=1))",
        _ABSENT + r"waiting\s+for(?s:.*)data-loader",
        False,
    ),
    "a thread that stays": Hang(
        "if rank == 1: threading.Thread(target=time.sleep, args=(FOREVER,), name='monitor').start()",
        r"the script of rank 1 has ended, but its process still runs: its thread monitor",
        False,
    ),
    "a child that stays": Hang(
        "if rank == 1: mp.get_context('fork').Process(target=time.sleep, args=(FOREVER,)).start()",
        r"the script of rank 1 has ended, but its process still runs: its child process \d+",
        False,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code, its output, and the seconds from when its ranks were ready until the end."""

    code: int | None
    text: str
    seconds: float


_RUN = "import sys; from ddparity.cli import main; sys.argv[0] = 'ddparity'; main()"
_NO_PTRACE = "from ddparity.launcher.diagnosis import stacks; stacks._py_spy_program = lambda: None; "


def run_wait(case: Wait, folder: Path, wait_s: float) -> Outcome:
    """Run a healthy wait at the launcher's defaults. It must end with 0 and print "well"."""
    return _run(case.body, folder, case.nproc, case.ptrace, (), wait_s, wait_s + 150, case.typed, case.stopped)


def run_hang(case: Hang, folder: Path, hang_timeout_s: float | None) -> Outcome:
    """Run a hang. `hang_timeout_s`: the user's own time; None for a hang that is certain."""
    options = () if hang_timeout_s is None else ("--hang-timeout", str(hang_timeout_s))
    return _run(case.body, folder, case.nproc, case.ptrace, options, 0, 150)


def _run(
    body: str,
    folder: Path,
    nproc: int,
    ptrace: bool,
    options: tuple[str, ...],
    wait_s: float,
    cap_s: float,
    typed: str = "",
    stopped: str = "",
) -> Outcome:
    """Run a job in a new folder, on a terminal, for at most `cap_s`. Afterwards none of its processes run."""
    folder.mkdir()
    (folder / "train.py").write_text(_HEAD.replace("    BODY", textwrap.indent(body, "    ")))
    program = (_NO_PTRACE if not ptrace else "") + _RUN
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, "run", "--nproc", str(nproc), *options, "train.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WAIT_S": str(wait_s)},
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    text, began, ready, prompted, continued = b"", time.monotonic(), 0.0, 0.0, not stopped
    lines = typed.splitlines(keepends=True)
    still: list[int] = []
    try:
        while time.monotonic() - began < cap_s:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    text += os.read(terminal, 1 << 16)
                except OSError:  # all have closed it
                    break
            now = time.monotonic()
            if not ready and all((folder / f"ready{rank}").exists() for rank in range(nproc)):
                ready = now
                if stopped:
                    still = [one.pid for one in psutil.Process(process.pid).children(recursive=True)]
                    still += [process.pid] if stopped == "all" else []
                    _send(still, signal.SIGSTOP)
            if not prompted and b"(Pdb) " in text:
                prompted = now
            if lines and prompted and now > prompted + wait_s and text.endswith(b"(Pdb) "):
                os.write(terminal, lines.pop(0).encode())
            if ready and not continued and now > ready + wait_s:
                _send(still, signal.SIGCONT)
                continued = True
        code = process.wait(10) if time.monotonic() - began < cap_s else None
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _kill(process, folder)
        os.close(terminal)
    return Outcome(code, text.decode(errors="replace").replace("\r", ""), time.monotonic() - (ready or began))


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill the launcher and all that runs in its folder."""
    process.kill()
    process.wait()
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.cwd() == str(folder):
                one.kill()


def problem_of_wait(outcome: Outcome, typed: str = "") -> str:
    """Return why a healthy wait did not go well; "" if it did."""
    well = outcome.code == 0 and "well" in outcome.text and (not typed or "\n42\n" in outcome.text)
    return "" if well else f"exit code {outcome.code}\n{outcome.text[-3000:]}"


def problem_of_hang(case: Hang, outcome: Outcome) -> str:
    """Return what was wrong in the report of a hang; "" if nothing was."""
    named = re.search(case.said, outcome.text) or re.search(case.said, re.sub(r"\s+", " ", outcome.text))
    return "" if named and outcome.code == case.code else f"exit code {outcome.code}\n{outcome.text[-3000:]}"

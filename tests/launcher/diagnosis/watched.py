"""Start ranks over Gloo with the instruments installed, and watch them until a hang is reported or all have ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
from torch.distributed import TCPStore

from ddparity.launcher.diagnosis import instruments
from ddparity.launcher.diagnosis.hang_report import HangReport
from ddparity.launcher.diagnosis.instruments import FLIGHT_ENTRIES, FLIGHT_VARIABLE
from ddparity.launcher.diagnosis.watch import Watch, WatchedRank
from tests.ranks import torchrun_env

_BOOTSTRAP = """
import importlib.util, runpy, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("instruments", sys.argv[3])
instruments = importlib.util.module_from_spec(spec)
spec.loader.exec_module(instruments)
folder = Path(sys.argv[1])
instruments.install(folder)
assert not {"torch", "ddparity"} & set(sys.modules)
try:
    runpy.run_path(sys.argv[2], run_name="__main__")
except BaseException:
    instruments.write_record(folder)
    raise
"""
# `ready` tells the test that the hang begins: all ranks have called the same collective more than once.
_HEAD = """
import ctypes, os, signal, sys, threading, time
import torch, torch.distributed as dist
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
def ready():
    for _ in range(3):
        dist.all_reduce(torch.ones(16))
    print("ready", flush=True)
"""


INSTRUMENTS = str(instruments.__file__)  # the worker loads it by its path, too


@dataclass
class Job:
    """Ranks that run, and what the watch reported about them."""

    watch: Watch
    processes: list[subprocess.Popen[str]]
    folders: list[Path]
    watched: list[WatchedRank] = field(default_factory=list)
    report: HangReport | None = None
    seconds: float = 0.0  # from `ready` to the report
    longest_look_s: float = 0.0
    endings: dict[int, int] = field(default_factory=dict)

    def until_ready(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == "ready\n", f"a rank ended before it was ready: {line!r}"

    def until(self, done: Callable[[Job], bool], timeout_s: float = 40) -> None:
        """Look as the agent does until a hang is reported or `done` returns True; fail after `timeout_s`."""
        begin = time.monotonic()
        while not done(self):
            for rank, process in enumerate(self.processes):
                if rank not in self.endings and process.poll() is not None:
                    self.endings[rank] = process.returncode
                    self.watch.ended(rank, process.returncode)
            looked = time.monotonic()
            self.report = self.watch.look()
            now = time.monotonic()
            self.seconds = now - begin
            if self.report is not None:
                return
            self.longest_look_s = max(self.longest_look_s, now - looked)
            assert self.seconds < timeout_s, f"no report after {timeout_s} s; ended: {self.endings}"
            with contextlib.suppress(subprocess.TimeoutExpired):  # a pause that ends with the process
                self.processes[0].wait(0.1) if 0 not in self.endings else time.sleep(0.05)


@contextlib.contextmanager
def job(
    folder: Path, body: str, nproc: int = 2, hang_timeout_s: float | None = 2.0, head: str = _HEAD
) -> Iterator[Job]:
    """Start ranks that run `body`. At the end of the block they are killed, with all processes that they started."""
    script = folder / "script.py"
    script.write_text(head + textwrap.dedent(body))
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    variables = torchrun_env(nproc, store.port, agent_store=True)
    folders = [folder / str(rank) for rank in range(nproc)]
    processes = []
    common = {**os.environ, FLIGHT_VARIABLE: FLIGHT_ENTRIES, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    for rank in range(nproc):
        with (folder / f"err-{rank}").open("w") as errors:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _BOOTSTRAP, str(folders[rank]), str(script), INSTRUMENTS],
                    env={**common, **variables(rank)},
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            )
    watched = [WatchedRank(rank, process.pid, folders[rank]) for rank, process in enumerate(processes)]
    try:
        yield Job(Watch(watched, hang_timeout_s), processes, folders, watched)
    finally:
        for process in processes:
            family = []
            if process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    family = psutil.Process(process.pid).children(recursive=True)
                process.kill()
            for child in family:
                with contextlib.suppress(psutil.Error):
                    child.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()

"""Runs a command or a function on N processes of this machine through torch's elastic agent."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..compat import shutdown_timeout
from ..errors import RankFailure
from .options import Launch

_GRACE_S = 3  # from a signal to SIGKILL
# What a rank says that was well until another one failed.
_CONSEQUENCES = ("RankFailure:", "DistNetworkError:", "Connection closed by peer", "Connection reset by peer")


def launch(function: Callable[..., Any], *args: Any, nproc: int = 2) -> list[Any]:
    """Run an importable function on `nproc` local processes; returns each rank's result, in rank order.

    Raises:
        ValueError: `nproc` is below 1.
        RankFailure: a rank failed; its traceback is a note.

    Example (in a file, behind `if __name__ == "__main__":`):
        results = launch(train, "config.toml", nproc=4)
    """
    return _launch(function, args, nproc, "spawn")


def launch_forked(function: Callable[..., Any], *args: Any, nproc: int = 2) -> list[Any]:
    """As `launch`, with processes from multiprocessing's fork server: where that has imported torch, 0.1 s each.

    Sets what the server imports when it starts, which is at the first call. Not on Windows.
    """
    # torch._dynamo: an optimizer imports it in its first step, in a second or two.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["ddparity", "torch._dynamo"])
    return _launch(function, args, nproc, "forkserver")


def _launch(function: Callable[..., Any], args: tuple[Any, ...], nproc: int, start_method: str) -> list[Any]:
    with _agent(nproc, start_method) as (config, folder):
        try:
            results = elastic_launch(config, function)(*args)
        except ChildFailedError as error:
            failure = _culprit(error, folder)
            message = f"rank {failure.rank} failed in {function.__name__}: {failure.ending()}"
            problem = RankFailure(message, failure.rank)
            if failure.trace:
                problem.add_note(f"On rank {failure.rank}:\n{failure.trace}")
            raise problem from None
    return [results[rank] for rank in range(nproc)]


def run_command(arguments: Sequence[str], nproc: int) -> int:
    """Run `python ARGUMENTS...` (a script and its arguments, or -m and a module) on `nproc` local processes.

    Returns the exit code: 0, the failed rank's own, 128 + n for a signal n. What failed is the last thing said on
    standard error.
    """
    with _agent(nproc) as (config, folder):
        try:
            elastic_launch(config, sys.executable)("-m", "ddparity.launch.worker", *arguments)
        except ChildFailedError as error:
            failure = _culprit(error, folder)
            said = f"\n{failure.trace.rstrip()}" if failure.trace else ""
            print(f"ddparity: rank {failure.rank} failed: {failure.ending()}{said}", file=sys.stderr)
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        except SignalException as error:
            print(f"ddparity: ended all processes on {signal.Signals(error.sigval).name}", file=sys.stderr)
            return 128 + int(error.sigval)
    return 0


@contextmanager
def _agent(nproc: int, start_method: str = "spawn") -> Iterator[tuple[LaunchConfig, Path]]:
    """An agent's configuration and the folder of its ranks' records; what it needs around it is put back at the end."""
    if nproc < 1:
        raise ValueError(f"nproc={nproc}: start at least 1 process")
    before = dict(os.environ)
    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    with tempfile.TemporaryDirectory(prefix="ddparity-") as errors:
        try:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
            elastic.setLevel(logging.CRITICAL)  # its 30 lines say less than our one
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=nproc,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="127.0.0.1",
                max_restarts=0,
                monitor_interval=0.1,
                start_method=start_method,
                logs_specs=DefaultLogsSpecs(log_dir=errors),
                **shutdown_timeout(LaunchConfig, _GRACE_S),
            )
            yield config, Path(errors)
        finally:
            elastic.setLevel(level)
            for name in os.environ.keys() - before.keys():  # the agent sets some of its own, too
                del os.environ[name]


@dataclass(frozen=True)
class _Failure:
    """How one rank ended. `message` and `trace`: of its exception; empty where it left none."""

    rank: int
    exitcode: int
    message: str
    trace: str

    def ending(self) -> str:
        if self.exitcode < 0:
            name = signal.Signals(-self.exitcode).name
            return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return self.message or f"exit code {self.exitcode}"

    def consequence(self) -> tuple[bool, bool]:
        """Sorts causes first: what another failure brought about, and before it what the agent ended itself, last."""
        return self.exitcode in (-signal.SIGTERM, -signal.SIGINT), any(word in self.message for word in _CONSEQUENCES)


def _culprit(error: ChildFailedError, folder: Path) -> _Failure:
    """The first failure that is no consequence of another.

    The agent knows the ranks that had ended when it looked. One that raised and had not ended yet left its record: a
    victim may well end before the rank that failed.
    """
    ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
    times = {rank: failure.timestamp for rank, failure in error.failures.items()}
    records = {int(path.parent.name): _recorded(path) for path in folder.rglob("error.json")}
    failures = [_Failure(rank, ended.get(rank, 1), *records.get(rank, ("", ""))) for rank in sorted({*ended, *records})]
    return min(failures, key=lambda failure: (*failure.consequence(), times.get(failure.rank, 0)))


def _recorded(path: Path) -> tuple[str, str]:
    """The exception and the traceback that a rank left, the latter without the frames that started it."""
    try:
        message = json.loads(path.read_text())["message"]
        trace: str = message["extraInfo"]["py_callstack"]
        return message["message"], _users_frames(trace)
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""


def _users_frames(trace: str) -> str:
    """A traceback without the launcher's and runpy's frames on top."""
    lines = trace.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    ours = (
        "ddparity/launch/worker.py",
        "ddparity/__main__.py",
        "ddparity/cli.py",
        "/typer/",
        "<frozen runpy>",
        "elastic/multiprocessing/errors/__init__.py",
    )
    for number in frames:
        if not any(part in lines[number] for part in ours):
            return "\n".join([lines[0], *lines[number:]])
    return trace


def run_launch(launch: Launch) -> int:
    """Run what `ddparity run` was asked for; returns the exit code."""
    return run_command(launch.command, launch.config.nproc_per_node)

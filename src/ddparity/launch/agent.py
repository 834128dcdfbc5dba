"""Runs a command or a function on N processes of this machine through torch's elastic agent."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..compat import shutdown_timeout
from ..errors import RankFailure

_GRACE_S = 3  # from a signal to SIGKILL


def launch(function: Callable[..., Any], *args: Any, nproc: int = 2) -> list[Any]:
    """Run an importable function on `nproc` local processes; returns each rank's result, in rank order.

    Raises:
        ValueError: `nproc` is below 1.
        RankFailure: a rank failed; its traceback is a note.

    Example (in a file, behind `if __name__ == "__main__":`):
        results = launch(train, "config.toml", nproc=4)
    """
    with _agent(nproc) as config:
        try:
            results = elastic_launch(config, function)(*args)
        except ChildFailedError as error:
            rank, failure = _culprit(error)
            problem = RankFailure(f"rank {rank} failed in {function.__name__}: {_ending(failure)}", rank)
            if trace := _recorded(failure)[1]:
                problem.add_note(f"On rank {rank}:\n{trace}")
            raise problem from None
    return [results[rank] for rank in range(nproc)]


def run_command(arguments: Sequence[str], nproc: int) -> int:
    """Run `python ARGUMENTS...` (a script and its arguments, or -m and a module) on `nproc` local processes.

    Returns the exit code: 0, the failed rank's own, 128 + n for a signal n. What failed is the last thing said on
    standard error.
    """
    with _agent(nproc) as config:
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "ddparity.launch.worker", *arguments)
        except ChildFailedError as error:
            rank, failure = _culprit(error)
            _, trace = _recorded(failure)
            said = f"\n{trace.rstrip()}" if trace else ""
            print(f"ddparity: rank {rank} failed: {_ending(failure)}{said}", file=sys.stderr)
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        except SignalException as error:
            print(f"ddparity: ended all processes on {signal.Signals(error.sigval).name}", file=sys.stderr)
            return 128 + int(error.sigval)
    return 0


@contextmanager
def _agent(nproc: int) -> Iterator[LaunchConfig]:
    """An agent's configuration, with what it needs around it, put back at the end."""
    if nproc < 1:
        raise ValueError(f"nproc={nproc}: start at least 1 process")
    before = dict(os.environ)
    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    with tempfile.TemporaryDirectory(prefix="ddparity-") as errors:
        try:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
            elastic.setLevel(logging.CRITICAL)  # its 30 lines say less than our one
            yield LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=nproc,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="127.0.0.1",
                max_restarts=0,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=errors),
                **shutdown_timeout(LaunchConfig, _GRACE_S),
            )
        finally:
            elastic.setLevel(level)
            for name in os.environ.keys() - before.keys():  # the agent sets some of its own, too
                del os.environ[name]


def _culprit(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The first failure that is no consequence of another: one that the agent ended itself comes last."""
    ended_by_agent = (-signal.SIGTERM, -signal.SIGINT)
    return min(error.failures.items(), key=lambda item: (item[1].exitcode in ended_by_agent, item[1].timestamp))


def _ending(failure: ProcessFailure) -> str:
    message, _ = _recorded(failure)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return message or f"exit code {failure.exitcode}"


def _recorded(failure: ProcessFailure) -> tuple[str, str]:
    """The exception and the traceback that a rank left, the latter without the frames that started it."""
    try:
        message = json.loads(Path(failure.error_file).read_text())["message"]
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

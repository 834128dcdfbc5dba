"""Starting a job on this machine: a command, or a function; what failed is the last thing said."""

from __future__ import annotations

import functools
import io
import logging
import multiprocessing
import operator
import os
import pickle
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from ..errors import RankFailure, RendezvousError
from ..runtime.network import split_endpoint
from . import worker
from .agent import Agent, Habits, MachineLost
from .diagnosis.exits import read_exit_report, root_cause, signal_name
from .diagnosis.instruments import FLIGHT_ENTRIES, FLIGHT_VARIABLE
from .options import GRACE_S, Launch
from .output import Inherited, RankFiles, say, tell
from .rendezvous import NodeCard, Place, check_nodes, check_rendezvous, explain, node_card
from .resources import decide_threads
from .signals import Signals

HANG_EXIT_CODE = 124  # as `timeout` gives it
RENDEZVOUS_EXIT_CODE = 125  # the machines did not meet: no rank has started
LOST_EXIT_CODE = 137  # a machine has gone: as if its ranks had been killed, which schedulers start again
_LONGEST_PAUSE_S = 1.0  # between two looks, at which signals are answered, too
_ENDING = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
_SIGNALS_VARIABLE = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_LONGEST_FOLDER = 60  # of the 107 bytes that a unix socket's path may have


def run_launch(launch: Launch) -> int:
    """Run a job's part on this machine. Gives the exit code: 0, the failed rank's own, 128 + n for a signal n,
    124 for a hang, 125 where the machines did not meet, 137 also for a machine that has gone. What failed is the last
    thing said on standard error.
    """
    start = time.monotonic()
    try:
        place = check_rendezvous(launch)
        try:
            return _run(launch, place)
        except (RendezvousError, SignalException):
            raise
        except Exception as error:
            if launch.alone or not _is_of_rendezvous(error):
                raise
            raise explain(error, launch, place, time.monotonic() - start) from error
    except MachineLost as error:
        tell(str(error))
        return LOST_EXIT_CODE
    except RendezvousError as error:
        tell(str(error))
        return RENDEZVOUS_EXIT_CODE
    except SignalException as error:
        tell(f"ended all processes on {signal_name(error.sigval)}")
        return 128 + int(error.sigval)


def _run(launch: Launch, place: Place) -> int:
    kind = () if launch.python else ("--exec",)
    command = (sys.executable, worker.__file__, str(os.getpid()), *kind, *launch.command)
    meeting = None if launch.alone else place.config.rdzv_endpoint
    habits = Habits(launch.grace_s, launch.hang_timeout_s, launch.on_hang, meeting)
    files = partial(RankFiles, show=launch.show, logs=launch.logs)
    card = None if launch.alone else node_card(launch)
    with _agent(place.config, command[0], command[1:], habits, files, variables=place.variables, card=card) as agent:
        result = agent.run()
        if not agent.exit_reports:
            if result is not None and result.is_failed():
                tell(f"torch's agent ended the job: {result.state.name}")
                return 1
            if slow := agent.slow():
                tell(slow)
            return 0
        if (number := agent.stopped_by()) is not None:
            tell(f"all ranks stopped on {signal_name(number)}")
            return 128 + number
        say(agent.told())
        return HANG_EXIT_CODE if agent.hang is not None else root_cause(agent.exit_reports).exit_code


def _is_of_rendezvous(error: Exception) -> bool:
    """torch has no class in common for these."""
    return "endezvous" in type(error).__name__ or isinstance(error, DistError)


def run_command(arguments: Sequence[str], nproc: int) -> int:
    """As `run_launch`: `python ARGUMENTS...` (a script and its arguments, or -m and a module) on this machine alone."""
    return run_launch(_alone(nproc, tuple(arguments)))


def launch(function: Callable[..., Any], *args: Any, nproc: int = 2) -> list[Any]:
    """Run a function on `nproc` local processes; returns each rank's result, in rank order.

    The function, its arguments and its results travel by cloudpickle: one that is defined in a notebook or in the
    script that runs works as well. The processes import what it needs anew.

    Raises:
        ValueError: `nproc` is below 1.
        RankFailure: a rank failed, or the ranks hang. Its traceback is a note; the exception itself is the cause, where
            pickle could carry it.

    Example:
        results = launch(train, "config.toml", nproc=4)
    """
    config, signals = _alone(nproc).config, Signals()
    with _passed_on(signals), _folder() as place:
        call = place / "call.pickle"
        call.write_bytes(pickle.dumps(sys.path) + _dumps((function, args)))
        command = (worker.__file__, str(os.getpid()), "--call", str(call))
        with _agent(config, sys.executable, command, Habits(), Inherited, signals=signals) as agent:
            agent.run()
            if agent.exit_reports:
                raise _failure(agent, function)
            return [_result(rank, folder, function) for rank, folder in sorted(agent.folders().items())]


def _result(rank: int, folder: Path, function: Callable[..., Any]) -> Any:
    try:
        written = (folder / "result.pickle").read_bytes()
    except FileNotFoundError:
        raise RankFailure(f"rank {rank} ended with exit code 0 before {_name(function)} returned", rank) from None
    return cloudpickle.loads(written)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or repr(function)


@contextmanager
def _passed_on(signals: Signals) -> Iterator[None]:
    """A signal that ended the ranks is then the caller's, whose handlers are back: KeyboardInterrupt for Ctrl-C."""
    interrupted = None
    try:
        yield
    except SignalException as error:
        interrupted = error
    finally:
        if signals.ending:
            signal.raise_signal(signals.ending[0])
    if interrupted is not None:
        raise InterruptedError(f"all ranks were ended on {signal_name(interrupted.sigval)}") from interrupted


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle gives no types
    """Also takes a function of the caller's script that functools caches, which cloudpickle would import by name."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == "__main__":
            return operator.call, (functools.lru_cache(**value.cache_parameters()), value.__wrapped__)
        return super().reducer_override(value)


def _dumps(value: object) -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(value)
    return written.getvalue()


def launch_forked(function: Callable[..., Any], *args: Any, nproc: int = 2) -> list[Any]:
    """As `launch`, with processes from multiprocessing's fork server: where that has imported torch, 0.1 s each.

    Sets what the server imports when it starts, which is at the first call. Not on Windows.
    """
    # torch._dynamo: an optimizer imports it in its first step, in a second or two.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["ddparity", "torch._dynamo"])
    config, signals = _alone(nproc).config, Signals()
    ranks = _agent(config, function, args, Habits(), Inherited, "forkserver", signals=signals)
    with _passed_on(signals), ranks as agent:
        result = agent.run()
        if result.is_failed():
            agent.exit_reports = [
                read_exit_report(rank, "", folder, failed.exitcode if (failed := result.failures.get(rank)) else 1, 0.0)
                for rank, folder in agent.folders().items()
                if rank in result.failures or (folder / "error.json").exists()
            ]
            raise _failure(agent, function)
        return [result.return_values[rank] for rank in range(nproc)]


def _alone(nproc: int, command: tuple[str, ...] = ()) -> Launch:
    """On this machine, at a free port."""
    if nproc < 1:
        raise ValueError(f"nproc={nproc}: start at least 1 process")
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
    )
    return Launch(config, command, True, None, frozenset({0}), 60.0, "end", GRACE_S, None, False, None)


def _failure(agent: Agent, function: Callable[..., Any]) -> RankFailure:
    if agent.hang is not None:
        return RankFailure(f"{_name(function)} hangs:\n{agent.told()}", min(agent.hang.blamed, default=-1))
    found = root_cause(agent.exit_reports)
    problem = RankFailure(f"rank {found.rank} failed in {_name(function)}: {found.ending()}", found.rank)
    if found.traceback:
        problem.add_note(f"On rank {found.rank}:\n{found.traceback}")
    with suppress(Exception):  # a class that cannot be imported here, or whose pickle is broken
        problem.__cause__ = pickle.loads((agent.folders()[found.rank] / "error.pickle").read_bytes())
    return problem


@contextmanager
def _agent(
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str,
    args: Sequence[Any],
    habits: Habits,
    files: Callable[[Path], RankFiles],
    start_method: str = "spawn",
    variables: dict[str, str] | None = None,
    card: NodeCard | None = None,
    signals: Signals | None = None,
) -> Iterator[Agent]:
    """torch's agent for this configuration; what it needs around it is put back at the end.

    `variables`: for the ranks, of a command. `card`: what the machines of a job compare when they have met.
    """
    before, signals = dict(os.environ), signals or Signals()
    ending = getattr(config, "signals_to_handle", _ENDING)  # earlier versions have no such choice
    levels = _silence("torch.distributed.elastic")  # its 30 lines say less than our one
    threads, line = decide_threads(config.nproc_per_node)
    os.environ.update(threads)
    if line is not None and variables is not None:
        say(line)
    os.environ.update(variables or {})
    os.environ.setdefault(FLIGHT_VARIABLE, FLIGHT_ENTRIES)
    os.environ[_SIGNALS_VARIABLE] = ""  # the handlers that torch's agent sets may raise while a rank is started
    try:
        with _folder() as folder, signals.handled(ending):
            spec = _spec(config, entrypoint, args)
            if card is not None:
                check_nodes(spec.rdzv_handler, card)
            kept = files(folder)
            kept.variables[_SIGNALS_VARIABLE] = before.get(_SIGNALS_VARIABLE, ending)
            agent = Agent(spec, kept, habits, signals, start_method)
            try:
                yield agent
            finally:
                agent.close()
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for name in os.environ.keys() - before.keys():  # the agent sets some of its own, too
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for what the ranks leave, gone at the end; at a path that leaves room for the name of a unix socket."""
    long = len(tempfile.gettempdir()) > _LONGEST_FOLDER and os.access("/tmp", os.W_OK | os.X_OK)
    with tempfile.TemporaryDirectory(prefix="ddparity-", dir="/tmp" if long else None) as folder:
        yield Path(folder)


def _spec(config: LaunchConfig, entrypoint: Callable[..., Any] | str, args: Sequence[Any]) -> WorkerSpec:
    """As torch's `launch_agent` makes it."""
    endpoint = RendezvousParameters(
        config.rdzv_backend,
        config.rdzv_endpoint,
        config.run_id or uuid.uuid4().hex,
        config.min_nodes,
        config.max_nodes,
        config.local_addr,
        **config.rdzv_configs,
    )
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(args),
        rdzv_handler=get_rendezvous_handler(endpoint),
        max_restarts=config.max_restarts,
        monitor_interval=min(config.monitor_interval, _LONGEST_PAUSE_S),
        local_addr=config.local_addr,
    )
    if config.rdzv_backend == "static":
        spec.master_addr, spec.master_port = split_endpoint(config.rdzv_endpoint)
    for name in ("numa_options", "virtual_local_rank"):  # of later versions
        if hasattr(config, name):
            setattr(spec, name, getattr(config, name))
    return spec


def _silence(name: str) -> dict[logging.Logger, int]:
    """Let only critical messages through from this logger and those below it, which have levels of their own."""
    below = [one for one in list(logging.root.manager.loggerDict) if one.startswith(f"{name}.")]
    levels = {logger: logger.level for logger in map(logging.getLogger, (name, *below))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    return levels

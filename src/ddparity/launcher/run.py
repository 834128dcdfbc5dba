"""Run a job's part on this machine: a command, or a function. The last lines of the output say what failed."""

from __future__ import annotations

import errno
import functools
import io
import logging
import math
import multiprocessing
import operator
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.launcher.api import LaunchConfig

from ..errors import DDParityError, RankFailure, RendezvousError
from ..system import run_lacks, run_needs, terminal_restored
from . import worker
from .agent import Agent, AgentOptions, NodeLost
from .diagnosis.exits import read_exit_report, root_cause, signal_name
from .diagnosis.instruments import FLIGHT_ENTRIES, FLIGHT_VARIABLE
from .handlers import rendezvous_handler
from .options import GRACE_S, Launch
from .output import Inherited, RankFiles, printable, say, tell
from .rendezvous import NodeInfo, RendezvousSetup, add_node_check, check_rendezvous, explain, node_info
from .resources import decide_threads
from .signals import Signals

HANG_EXIT_CODE = 124  # that of `timeout`
RENDEZVOUS_EXIT_CODE = 125  # the machines did not meet: no rank has started
LOST_EXIT_CODE = 137  # a machine is lost: the code of killed ranks, after which schedulers start a job again
_LONGEST_INTERVAL_S = 1.0  # between two looks at the ranks, at which signals are answered, too
_ENDING_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
_SIGNALS_VARIABLE = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_LONGEST_FOLDER = 60  # of the 107 bytes that the path of a Unix socket may have


# A command.


def run_launch(launch: Launch) -> int:
    """Run a job's part on this machine and return the exit code.

    0: all ranks ended with 0. 128 + n: signal n ended the job. 124: a hang. 125: the machines did not meet. 137: also
    for a lost machine. Otherwise it is the exit code of the rank that failed. The last lines on standard error say what
    failed.
    """
    start = time.monotonic()
    if problem := run_needs():
        tell(problem)
        return 2
    if lacks := run_lacks():
        tell(lacks)
    try:
        setup = check_rendezvous(launch)
        try:
            with closing(setup):
                return _run(launch, setup)
        except (RendezvousError, SignalException):
            raise
        except Exception as error:
            if launch.alone or not _is_of_rendezvous(error):
                raise
            raise explain(error, launch, setup, time.monotonic() - start) from error
    except OSError as error:
        if not (advice := _advice(error, launch)):
            raise
        tell(advice)
        return 1
    except NodeLost as error:
        tell(str(error))
        return LOST_EXIT_CODE
    except RendezvousError as error:
        tell(str(error))
        return RENDEZVOUS_EXIT_CODE
    except SignalException as error:
        tell(f"ended all processes on {signal_name(error.sigval)}")
        return 128 + int(error.sigval)


def _run(launch: Launch, setup: RendezvousSetup) -> int:
    kinds = [*["--batch"] * (launch.schedule == "batch"), *["--exec"] * (not launch.python)]
    arguments = (worker.__file__, str(os.getpid()), *kinds, *launch.command)
    rendezvous = None if launch.alone else setup.config.rdzv_endpoint
    options = AgentOptions(launch.grace_s, launch.hang_timeout_s, launch.on_hang, rendezvous, launch.children)
    files = partial(RankFiles, show=launch.show, logs=launch.logs)
    info = None if launch.alone else node_info(launch)
    with _agent(setup, sys.executable, arguments, options, files, info=info, announces=True) as agent:
        result = agent.run()
        if not agent.exit_reports:
            if result is not None and result.is_failed():
                tell(f"torch's agent ended the job: {result.state.name}")
                return 1
            if stragglers := agent.straggler_report():
                tell(stragglers)
            return 0
        if (number := agent.preemption_signal()) is not None:
            tell(f"all ranks stopped on {signal_name(number)}")
            return 128 + number
        say(agent.failure_report())
        return HANG_EXIT_CODE if agent.hang is not None else root_cause(agent.exit_reports).exit_code


def _advice(error: OSError, launch: Launch) -> str:
    """Return what to do where the launcher cannot write a file of its own; "" for an error of another kind."""
    if launch.logs is not None and error.filename and Path(error.filename).is_relative_to(launch.logs):
        return f"cannot write {error.filename}: {error.strerror}. Give --logs another folder"
    if error.errno in _NO_SPACE or "No usable temporary directory" in str(error):
        where = error.filename or "in the temporary folder"
        return f"no space for the launcher's own file {where}: {error.strerror}. Set TMPDIR to another folder"
    return ""


def _is_of_rendezvous(error: Exception) -> bool:
    """Return whether torch's rendezvous raised the error. Its errors have no base class of their own."""
    return "endezvous" in type(error).__name__ or isinstance(error, DistError)


def run_command(arguments: Sequence[str], nproc: int) -> int:
    """Run `python ARGUMENTS...` on this machine alone, and return the exit code as `run_launch` does.

    The arguments are a script and its arguments, or -m, a module and its arguments.
    """
    return run_launch(_one_machine(nproc, tuple(arguments)))


# A function.


def launch(function: Callable[..., Any], *args: Any, nproc: int = 2, hang_timeout: float | None = None) -> list[Any]:
    """Run a function on `nproc` local processes and return each rank's result, in rank order.

    cloudpickle carries the function, its arguments and its results, so that the function may be defined in a notebook
    or in the script that runs. Each process imports what the function needs.

    Raises:
        ValueError: `nproc` is below 1.
        DDParityError: this system cannot start and watch processes, as Windows.
        RankFailure: a rank failed, or the ranks hang. The rank's traceback is a note; its exception is the cause, where
            pickle could carry it.

    Example:
        results = launch(train, "config.toml", nproc=4)
    """
    if hang_timeout is not None and not 0 < hang_timeout < math.inf:
        raise ValueError(f"launch(hang_timeout={hang_timeout!r}): give seconds, more than 0")
    _check_system()
    setup, signals = check_rendezvous(_one_machine(nproc)), Signals()
    options = AgentOptions(hang_timeout_s=hang_timeout)
    with _raise_afterwards(signals), _temporary_folder() as folder:
        call = folder / "call.pickle"
        call.write_bytes(pickle.dumps(sys.path) + _dumps((function, args)))
        command = (worker.__file__, str(os.getpid()), "--call", str(call))
        with _agent(setup, sys.executable, command, options, Inherited, signals=signals) as agent:
            agent.run()
            if agent.exit_reports:
                raise _failure(agent, function)
            return [_result(rank, folder, function) for rank, folder in sorted(agent.folders().items())]


def launch_forked(function: Callable[..., Any], *args: Any, nproc: int = 2) -> list[Any]:
    """Run a function as `launch` does, on processes of multiprocessing's fork server.

    Once the server has imported torch, a process starts in 0.1 s. The first call decides what the server imports.

    Raises:
        DDParityError: this system cannot start and watch processes, as Windows.
    """
    _check_system()
    # torch._dynamo: an optimizer imports it in its first step, which takes a second or two.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["ddparity.parity.run", "torch._dynamo"])
    setup, signals = check_rendezvous(_one_machine(nproc)), Signals()
    ranks = _agent(setup, function, args, AgentOptions(), Inherited, "forkserver", signals=signals)
    with _raise_afterwards(signals), ranks as agent:
        result = agent.run()
        if result.is_failed():
            agent.exit_reports = [
                read_exit_report(rank, "", folder, failed.exitcode if (failed := result.failures.get(rank)) else 1, 0.0)
                for rank, folder in agent.folders().items()
                if rank in result.failures or (folder / "error.json").exists()
            ]
            raise _failure(agent, function)
        return [result.return_values[rank] for rank in range(nproc)]


def _check_system() -> None:
    if problem := run_needs():
        raise DDParityError(problem)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle gives no types
    """Also pickles a cached function of the caller's script (functools), which cloudpickle would import by its name."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == "__main__":
            return operator.call, (functools.lru_cache(**value.cache_parameters()), value.__wrapped__)
        return super().reducer_override(value)


def _dumps(value: object) -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(value)
    return written.getvalue()


def _result(rank: int, folder: Path, function: Callable[..., Any]) -> Any:
    try:
        written = (folder / "result.pickle").read_bytes()
    except FileNotFoundError:
        raise RankFailure(f"rank {rank} ended with exit code 0 before {_name(function)} returned", rank) from None
    return cloudpickle.loads(written)


def _failure(agent: Agent, function: Callable[..., Any]) -> RankFailure:
    if agent.hang is not None:
        blamed = min(agent.hang.blamed, default=-1)
        return RankFailure(f"{_name(function)} hangs:\n{agent.failure_report()}", blamed)
    found = root_cause(agent.exit_reports)
    problem = RankFailure(printable(f"rank {found.rank} failed in {_name(function)}: {found.ending()}"), found.rank)
    if found.traceback:
        problem.add_note(printable(f"On rank {found.rank}:\n{found.traceback}"))
    with suppress(Exception):  # this process may not be able to import the class, or its pickle may be broken
        problem.__cause__ = pickle.loads((agent.folders()[found.rank] / "error.pickle").read_bytes())
    return problem


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or repr(function)


@contextmanager
def _raise_afterwards(signals: Signals) -> Iterator[None]:
    """Raise the signal that ended the ranks again, for the caller's own handlers: KeyboardInterrupt for Ctrl-C."""
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


# torch's agent, for both.


def _one_machine(nproc: int, command: tuple[str, ...] = ()) -> Launch:
    """Return a launch on this machine alone, at a free port."""
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
        logs_specs=DefaultLogsSpecs(os.devnull),  # the default would create a folder, and leave it
    )
    return Launch(config, command, True, None, frozenset({0}), None, "end", GRACE_S, None, False, None)


@contextmanager
def _agent(
    setup: RendezvousSetup,
    entrypoint: Callable[..., Any] | str,
    args: Sequence[Any],
    options: AgentOptions,
    files: Callable[[Path], RankFiles],
    start_method: str = "spawn",
    info: NodeInfo | None = None,
    signals: Signals | None = None,
    announces: bool = False,
) -> Iterator[Agent]:
    """Yield torch's agent for this configuration. At the end, variables, log levels and signal handlers are restored.

    `info`: what the machines compare after each rendezvous. `announces`: whether to print the decision on threads.
    """
    config, signals = setup.config, signals or Signals()
    ending = getattr(config, "signals_to_handle", _ENDING_SIGNALS)  # earlier versions of torch do not have this option
    levels = _silence("torch.distributed.elastic")  # torch logs about 30 lines that say less than our report
    threads, line = decide_threads(config.nproc_per_node)
    if line is not None and announces:
        say(line)
    variables = {FLIGHT_VARIABLE: os.environ.get(FLIGHT_VARIABLE, FLIGHT_ENTRIES), **threads, **setup.variables}
    variables[_SIGNALS_VARIABLE] = os.environ.get(_SIGNALS_VARIABLE, ending)
    # Other threads may launch, too, so that this process's own variables stay. A fork server inherits them.
    own = variables if start_method == "forkserver" else {}
    if threading.current_thread() is threading.main_thread():
        own = {**own, _SIGNALS_VARIABLE: ""}  # the handlers of torch's agent may raise while a rank is started
    try:
        with terminal_restored(), _environment(own), _temporary_folder() as folder, signals.handled(ending):
            spec = _spec(setup, entrypoint, args)
            if info is not None:
                add_node_check(spec.rdzv_handler, info)
            rank_files = files(folder)
            rank_files.variables.update(variables)
            agent = Agent(spec, rank_files, options, signals, start_method)
            try:
                yield agent
            finally:
                agent.close()
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these environment variables in this block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a folder for the ranks' files and remove it at the end. Its path is short enough for Unix sockets in it."""
    long = len(tempfile.gettempdir()) > _LONGEST_FOLDER and os.access("/tmp", os.W_OK | os.X_OK)
    with tempfile.TemporaryDirectory(prefix="ddparity-", dir="/tmp" if long else None) as folder:
        yield Path(folder)


def _spec(setup: RendezvousSetup, entrypoint: Callable[..., Any] | str, args: Sequence[Any]) -> WorkerSpec:
    """Return what torch's `launch_agent` would make of the configuration, with our handler of the rendezvous."""
    config = setup.config
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(args),
        rdzv_handler=rendezvous_handler(setup),
        max_restarts=config.max_restarts,
        monitor_interval=min(config.monitor_interval, _LONGEST_INTERVAL_S),
        local_addr=config.local_addr,
    )
    for name in ("numa_options", "virtual_local_rank"):  # only later versions of torch have them
        if hasattr(config, name):
            setattr(spec, name, getattr(config, name))
    return spec


def _silence(name: str) -> dict[logging.Logger, int]:
    """Let only critical messages through from a logger and those below it. Return their levels from before."""
    below = [other for other in list(logging.root.manager.loggerDict) if other.startswith(f"{name}.")]
    levels = {logger: logger.level for logger in map(logging.getLogger, (name, *below))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    return levels

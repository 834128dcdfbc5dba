"""Run a function on real processes over Gloo. A server that has imported torch forks them: 0.1 s each."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
from torch.distributed import TCPStore

import ddparity as dp

_context = multiprocessing.get_context("forkserver")
# Without the preload each process would import these in one or two seconds: torch._dynamo in an optimizer's first
# step, the others with the test module.
_context.set_forkserver_preload(
    [
        "ddparity.auditing.run",
        "ddparity.parity.verify",
        "torch._dynamo",
        "hypothesis",
        "pytest",
        "torchmetrics",
        "pyarrow.dataset",
        "pyarrow.parquet",
        "torch.distributed.fsdp",
        "tests.ranks",
    ]
)


@dataclasses.dataclass
class Outcome:
    """How one rank ended.

    `error` is "Type: message" with the notes, if it raised. A negative `exitcode` is a signal.
    """

    value: Any = None
    error: str | None = None
    trace: str = ""
    exitcode: int | None = None
    seconds: float = 0.0


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    env: Callable[[int], dict[str, str]] | None = None,
    timeout_s: float = 60,
) -> list[Any]:
    """Return each rank's result of `function(*args)` inside `world(device="cpu")`.

    Fail with the traceback of the first rank that failed.
    """
    ended = outcomes(function, world_size, *args, env=env, timeout_s=timeout_s)
    for rank, outcome in enumerate(ended):
        if outcome.error or outcome.exitcode:
            others = [f"rank {r}: {o.error or o.exitcode}" for r, o in enumerate(ended)]
            raise AssertionError(f"rank {rank} failed\n{outcome.trace}\n" + "\n".join(others))
    return [outcome.value for outcome in ended]


def outcomes(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    env: Callable[[int], dict[str, str]] | None = None,
    in_world: bool = True,
    timeout_s: float = 60,
) -> list[Outcome]:
    """Return how each rank ended, by an exception or a signal too.

    After `timeout_s` kill the processes that still run, and fail the test. Without `env` the ranks get torchrun's
    variables, and this process holds the store as torchrun's agent does. `seconds` counts from the time at which all
    ranks have started.
    """
    store = None
    if env is None:
        store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)
        env = torchrun_env(world_size, store.port, agent_store=True)
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_main, args=(theirs, env(rank), function, args, in_world), daemon=False)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    ended = [Outcome() for _ in range(world_size)]
    start, deadline = time.monotonic(), time.monotonic() + timeout_s
    open_pipes: dict[Connection, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and time.monotonic() < deadline:
        for pipe in wait(list(open_pipes), timeout=deadline - time.monotonic()):
            rank = open_pipes.pop(pipe)
            with contextlib.suppress(EOFError):  # the rank was killed
                ended[rank] = pickle.loads(pipe.recv_bytes())
            ended[rank].seconds = time.monotonic() - start
    hung = sorted(open_pipes.values())
    for process in processes:
        if not hung:
            process.join(10)
        if process.exitcode is None:
            process.kill()
            process.join()
    for rank, process in enumerate(processes):
        ended[rank].exitcode = process.exitcode
        pipes[rank].close()
    assert not hung, f"ranks {hung} had not ended after {timeout_s} s; the others: {[o.error for o in ended]}"
    return ended


def torchrun_env(
    world_size: int, port: int, agent_store: bool = False, nodes: int = 1
) -> Callable[[int], dict[str, str]]:
    """Return what torchrun sets on each rank of `nodes` nodes of equal size."""
    local = world_size // nodes

    def env(rank: int) -> dict[str, str]:
        variables = {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank % local,
            "LOCAL_WORLD_SIZE": local,
            "GROUP_RANK": rank // local,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        if agent_store:
            variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        return {name: str(value) for name, value in variables.items()}

    return env


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main(
    pipe: Connection, env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...], in_world: bool
) -> None:
    os.environ.update(env)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for data-loader workers, as in a script on Linux
    outcome = Outcome()
    try:
        if in_world:
            with dp.world(device="cpu"):
                outcome.value = function(*args)
        else:
            outcome.value = function(*args)
    except BaseException as error:
        notes = "\n".join(getattr(error, "__notes__", []))
        outcome = Outcome(error=f"{type(error).__name__}: {error}\n{notes}".rstrip(), trace=traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))  # not `send`: torch would share tensors' memory with a process that ends
    pipe.close()


@contextlib.contextmanager
def nothing_pickled() -> Iterator[None]:
    """Fail if the body pickles something, also through torch's collectives of objects."""
    refuse = mock.Mock(side_effect=AssertionError("something was pickled"))
    with (
        mock.patch("pickle.dumps", refuse),
        mock.patch("pickle.Pickler", refuse),
        mock.patch("torch.distributed.distributed_c10d._object_to_tensor", refuse),
    ):
        yield


def kill_self() -> None:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)

"""The world: this process's rank, device and process group, from whatever started it."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ..compat import PrefixStore, Store, TCPStore
from ..errors import RankFailure, RendezvousError
from .agreement import Agreement, depart, store_root
from .environment import Placement, find_placement
from .members import Card, call_roll, own_card, publish, roster
from .network import find_store, holder, leave_loopback, route_to

_LEAVE_S = 5.0  # how long rank 0 keeps the store for ranks that have not left

# The connection to the store outlives a world: the next one of this process meets there again, while the others may
# still speak to it. Each world of a process has a part of the store of its own.
_stores: dict[tuple[str, int], Store] = {}
# The world that this code runs inside of.
_current: ContextVar[World | None] = ContextVar("world", default=None)


@dataclass(frozen=True)
class World:
    """This process's place among all. `backend` is None where there is no process group."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    device: torch.device
    backend: str | None


@contextmanager
def world(
    backend: str | None = None,
    device: torch.device | str | None = None,
    timeout: float | timedelta | None = None,
) -> Iterator[World]:
    """Join the process group that the launcher describes, and leave it at the end, also on an exception.

    Understands torchrun, Slurm, PyTorchJob, Open MPI and MPICH by their variables. Without a launcher this is
    a world of one, without a process group. Inside another `world()`, or where a process group exists, that one is
    used and left alone. On CUDA each process is bound to its own GPU; over Gloo its threads are scheduled as batch
    work (SCHED_BATCH), which makes small collectives several times faster.

    Args:
        backend: of `torch.distributed.init_process_group`; None: "nccl" on CUDA, "gloo" on the CPU.
        device: None: this process's GPU where there are GPUs, else the CPU. Over Gloo, ranks may share a card that
            is named with its index ("cuda:0").
        timeout: seconds or timedelta, for the rendezvous and for each collective; None: torch's default.

    Raises:
        ValueError: an argument is wrong, the launcher's variables contradict each other, or this local rank has no GPU.
        RankFailure: another rank has no GPU, or two ranks claim the same one; on every rank.
        RendezvousError: the others could not be reached within the time-out.

    Collectives: none but those of `init_process_group`; the roster goes through the store.
    Source: https://pytorch.org/docs/stable/distributed.html#initialization

    Example:
        >>> with world(device="cpu") as w:
        ...     w.rank, w.world_size
        (0, 1)
    """
    backend, timeout_s = _known(backend), _seconds(timeout)
    outer = _current.get()
    if outer is not None and device is None and backend in (None, outer.backend):
        yield outer
        return
    if dist.is_available() and dist.is_initialized():
        yield _existing(backend, device)
        return
    placement = find_placement()
    if placement is None:
        alone = World(0, 0, 1, 1, 0, _bind(device, 0, 1), None)
        token = _current.set(alone)
        try:
            yield alone
        finally:
            _current.reset(token)
        return
    with batch_scheduling() if _is_on_cpu(backend, device) else nullcontext():
        joined, store = _join(placement, backend, device, timeout_s)
        token = _current.set(joined)
        try:
            yield joined
        finally:
            _current.reset(token)
            if dist.is_initialized():
                with suppress(dist.DistError):  # the store may have ended with rank 0
                    depart(store_root(), joined.rank)
                dist.destroy_process_group()
            _leave_last(store, joined)


def _shares(backend: str | None, device: torch.device | str | None) -> bool:
    """Whether the user has named one card for this process, which over Gloo, unlike NCCL, other ranks may use too."""
    return backend == "gloo" and device is not None and torch.device(device).index is not None


def _is_on_cpu(backend: str | None, device: torch.device | str | None) -> bool:
    """Whether this process will exchange over Gloo."""
    if backend is not None:
        return "gloo" in backend
    return str(device) == "cpu" if device is not None else not torch.cuda.is_available()


def _known(backend: str | None) -> str | None:
    """Refuse a wrong name before anybody waits for this rank. torch's own form "cpu:gloo,cuda:nccl" is right, too."""
    if backend is None:
        return None
    names = [name for name in dist.Backend.backend_list if name != "undefined"]
    if any(part.rpartition(":")[2] not in names for part in backend.lower().split(",")):
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(names)}")
    if missing := [name for name in names if name in backend.lower() and not dist.is_backend_available(name)]:
        raise ValueError(f"backend {backend!r}: this build of torch has no {missing[0]}")
    return backend.lower()


def _existing(backend: str | None, device: torch.device | str | None) -> World:
    """The world of a process group that somebody else made."""
    rank, size, actual = dist.get_rank(), dist.get_world_size(), str(dist.get_backend())
    if actual == "undefined":  # init_process_group without a backend makes one a device
        actual = dist.get_backend_config()
    if backend is not None and backend != actual:
        raise ValueError(f"world(backend={backend!r}), but the process group that exists uses {actual!r}")
    card = roster(store_root())[rank] if size > 1 else Card(socket.gethostname(), 0, 1, 0)
    assert card.local_rank is not None and card.local_world_size is not None and card.node_rank is not None
    if device is None:
        on_gpu = "nccl" in actual and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return World(rank, card.local_rank, size, card.local_world_size, card.node_rank, torch.device(device), actual)


def _join(
    placement: Placement, backend: str | None, device: torch.device | str | None, timeout_s: float | None
) -> tuple[World, Store]:
    rank, size = placement.rank, placement.world_size
    limit = timedelta(seconds=timeout_s) if timeout_s is not None else dist.default_pg_timeout
    start = time.monotonic()
    deadline = start + limit.total_seconds()
    card, bound, problem = own_card(placement), None, None
    try:
        bound = _bind(device, placement.local_rank, placement.local_world_size or 1)
        if bound.type == "cuda" and not _shares(backend, device):
            card = replace(card, gpu=str(getattr(torch.cuda.get_device_properties(bound), "uuid", bound)))
    except Exception as error:  # told to the others, who would wait for this rank
        problem = error
        card = replace(card, error=str(error))
    try:
        held = _connect(placement, limit, deadline)
        store = PrefixStore(f"world{held.add(f'worlds/{rank}', 1)}", held)
        cards = call_roll(PrefixStore("ddparity", store), rank, size, card, deadline)
        assert bound is not None, "the roster refuses a card with an error"
        chosen = backend or ("nccl" if bound.type == "cuda" else "gloo")
        if len({card.host for card in cards}) > 1:
            leave_loopback(placement.master_addr)
        dist.init_process_group(
            chosen,
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit if timeout_s is not None else None,
            device_id=bound if chosen == "nccl" else None,
        )
        publish(store_root(), cards)
        # Nobody goes on, and perhaps leaves, while a peer still connects to this process.
        joining = Agreement(store_root(), "joining", rank, range(size), "joining the world")
        joining.arrive()
        try:
            joining.wait(max(deadline - time.monotonic(), 0.0))
        except RankFailure as error:
            raise TimeoutError(str(error)) from error
    except RankFailure:
        if dist.is_initialized():
            dist.destroy_process_group()
        if problem is not None:
            raise problem from None
        raise
    except (dist.DistError, TimeoutError, OSError, RuntimeError) as error:
        _stores.pop((placement.master_addr, placement.master_port), None)
        if dist.is_initialized():
            dist.destroy_process_group()
        if problem is not None:
            raise problem from None
        raise RendezvousError(_unreachable(placement, time.monotonic() - start, error)) from error
    mine = cards[rank]
    assert mine.local_rank is not None and mine.local_world_size is not None and mine.node_rank is not None
    return World(rank, mine.local_rank, size, mine.local_world_size, mine.node_rank, bound, chosen), store


def _connect(placement: Placement, limit: timedelta, deadline: float) -> Store:
    """The store at rank 0, or the one that torchrun's agent holds for its workers."""
    address = (placement.master_addr, placement.master_port)
    if address not in _stores:
        if _serves(placement.rank):
            _stores[address] = _serve(placement.master_port, placement.world_size, limit)
        else:
            find_store(address, deadline)
            _stores[address] = TCPStore(*address, placement.world_size, False, limit, wait_for_workers=False)
    store = _stores[address]
    store.set_timeout(limit)
    if _agent_holds_store():  # it outlives a restart of the workers
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"/worker/attempt_{attempt}", store)
    return store


def _agent_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _serves(rank: int) -> bool:
    return rank == 0 and not _agent_holds_store()


def _serve(port: int, world_size: int, limit: timedelta) -> Store:
    """The store, for the others on all of this machine's addresses; this process speaks to it through the loopback."""
    try:
        return TCPStore("127.0.0.1", port, world_size, True, limit, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise OSError(f"port {port} is taken on this machine{holder(port)}") from None


def _bind(device: torch.device | str | None, local_rank: int, local_world_size: int) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type != "cuda":
        return device
    if device.index is None:
        # A scheduler may show each process one GPU, its own: index 0. The roster finds two that share one.
        count = torch.cuda.device_count()
        if local_rank >= count and count != 1:
            fewer = f"start at most {count} processes a node (--nproc {count}), or " if count else ""
            raise ValueError(
                f"local rank {local_rank} of {local_world_size} has no GPU: this machine shows {count}. To go on, "
                f'{fewer}train on the CPU with world(device="cpu")'
            )
        device = torch.device("cuda", local_rank if local_rank < count else 0)
    torch.cuda.set_device(device)
    return device


def _leave_last(store: Store, joined: World) -> None:
    """Where the store lives in rank 0's process, that leaves when nobody can still be asking it something.

    No barrier: the group is destroyed before, so that a peer that still waits for this rank fails at once.
    """
    left = PrefixStore("ddparity/left", store)
    try:
        left.add("count", 1)
        deadline = time.monotonic() + _LEAVE_S
        while _serves(joined.rank) and left.add("count", 0) < joined.world_size and time.monotonic() < deadline:
            time.sleep(0.001)
    except dist.DistError:
        pass  # rank 0 has gone: it waited long enough


def _unreachable(placement: Placement, waited_s: float, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        route = route_to(placement.master_addr, placement.master_port)
        source, interface = route.address, route.interface or "unknown"
    except OSError as problem:
        source, interface = f"no address (no route to {placement.master_addr}: {problem})", "unknown"
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or interface
    hint = ""
    if placement.engine == "Slurm":
        hint = ". A batch script starts one process: under Slurm, start the ranks with srun"
    return (
        f"rank {placement.rank} of {placement.world_size} ({socket.gethostname()}) found no complete rendezvous at "
        f"{placement.master_addr}:{placement.master_port} from {source} on interface {interface} after "
        f"{waited_s:.1f} s: {reason}. The address and port come from {placement.engine}'s variables; check that rank 0 "
        f"runs, that the port is free there and open, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME where a machine has "
        f"several interfaces{hint}"
    )


def _seconds(timeout: float | timedelta | None) -> float | None:
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not 0 < seconds < math.inf:
        raise ValueError(f"world(timeout={timeout!r}): give a positive number of seconds")
    return seconds


@contextmanager
def batch_scheduling() -> Iterator[None]:
    """Let threads that are woken wait for the one that runs, in this thread and those started from it (Linux).

    Gloo's I/O thread polls while another thread holds the lock of a connection. Woken on that thread's core, it takes
    the core and polls until its time slice, 3 to 4 ms, is over: on few cores every sixth small collective takes ten
    times as long. Under SCHED_BATCH a woken thread does not interrupt (benchmarks/RESULTS.md, "Scheduling"). A policy
    that the user has set stays. Source: sched(7).
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

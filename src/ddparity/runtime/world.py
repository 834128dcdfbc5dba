"""Join and leave the process group that a launcher describes, and give this process its rank and device.

`world` and `join` are the public functions. The others, in their order below: the arguments, a group that exists
already, joining, the store, the device, leaving, scheduling.
"""

from __future__ import annotations

import atexit
import errno
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ..compat import PrefixStore, Store, TCPStore, serve_store
from ..errors import RankFailure, RendezvousError
from ..system import batch_scheduling
from .agreement import Agreement, leave, store_root
from .blocks import block
from .environment import Placement, find_placement
from .members import Member, collect_members, members, publish_members, this_member
from .network import listen_at, own_address, process_at_port, route_to, set_gloo_interface, wait_for_store

_LEAVE_S = 5.0  # how long rank 0 keeps the store for ranks that have not left

# A connection to a store outlives its world: the next world of this process uses the same store, while other ranks may
# still send requests to it. Each world of a process has its own prefix of the store's keys.
_stores: dict[tuple[str, int], Store] = {}
# The world inside of which this code runs.
_current: ContextVar[World | None] = ContextVar("world", default=None)


@dataclass(frozen=True)
class World:
    """This process's rank, node and device. `backend` is None where there is no process group."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    device: torch.device
    backend: str | None


@block("`with ddparity.world() as world:`, or `world = ddparity.join()` in a script without functions")
def world(
    backend: str | None = None,
    device: torch.device | str | None = None,
    timeout: float | timedelta | None = None,
) -> Iterator[World]:
    """Join the process group that the launcher describes, and leave it at the end, also after an exception.

    The launcher may be torchrun, Slurm, a PyTorchJob, Ray Train, Open MPI or MPICH; `world` reads their variables.
    Without a launcher this is a world of one, without a process group. Inside another `world()`, or where a process
    group exists, `world` yields that one and does not change it. On CUDA each process uses its own GPU. Over Gloo the
    process's threads are scheduled as batch work (SCHED_BATCH), which makes small collectives several times faster.

    Args:
        backend: of `torch.distributed.init_process_group`; None: "nccl" on CUDA, "gloo" on the CPU.
        device: None: this process's GPU if the machine has GPUs, else the CPU. Over Gloo, ranks may share a GPU that
            is given with its index ("cuda:0").
        timeout: seconds or timedelta, for the rendezvous and for each collective; None: torch's default.

    Raises:
        ValueError: an argument is wrong, the launcher's variables contradict each other, or this local rank has no GPU.
        RankFailure: another rank has no GPU, or two ranks claim the same one; on every rank.
        RendezvousError: the other ranks could not be reached within the time-out.

    Collectives: only those of `init_process_group`. The list of members goes through the store.
    Source: https://pytorch.org/docs/stable/distributed.html#initialization

    Example:
        >>> with world(device="cpu") as w:
        ...     w.rank, w.world_size
        (0, 1)
    """
    backend, timeout_s = _checked_backend(backend), _seconds(timeout)
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
    # With Gloo, threads that start here are batch work: a woken thread then does not interrupt the running one. Gloo's
    # I/O thread polls while another thread holds the lock of a connection. If it wakes up on that thread's core, it
    # takes the core and polls until its time slice of 3 to 4 ms is over. On few cores every sixth small collective then
    # takes ten times as long (benchmarks/RESULTS.md, "Scheduling"). Source: sched(7).
    with batch_scheduling() if _uses_gloo(backend, device) else nullcontext():
        joined, store = _join(placement, backend, device, timeout_s)
        token = _current.set(joined)
        try:
            yield joined
        finally:
            _current.reset(token)
            if dist.is_initialized():
                with suppress(dist.DistError):  # the store may have ended with rank 0
                    leave(store_root(), joined.rank)
                dist.destroy_process_group()
            _keep_store(store, joined)


def join(
    backend: str | None = None,
    device: torch.device | str | None = None,
    timeout: float | timedelta | None = None,
) -> World:
    """Join as `world` does, and leave when the process ends: for a script whose code is not in a function.

    Arguments, errors and collectives are those of `world`. Call it on the main thread.
    """
    joining = world(backend, device, timeout)
    joined = joining.__enter__()
    atexit.register(joining.__exit__, None, None, None)
    return joined


def check_joined(what: str) -> None:
    """Check that a process which a launcher started as one of several has joined the others.

    Raises:
        RuntimeError: it has not, so it would train alone.
    """
    if not dist.is_available() or dist.is_initialized():
        return
    try:
        placement = find_placement()
    except ValueError:  # variables that contradict each other; `world` tells it
        return
    if placement is not None and placement.world_size > 1:
        raise RuntimeError(
            f"{what} before this process, rank {placement.rank} of {placement.world_size} by the launcher's variables, "
            f"has joined the others, so it would train alone: call it inside of `with ddparity.world():`, or write "
            f"`ddparity.join()` above it"
        )


def _checked_backend(backend: str | None) -> str | None:
    """Return the backend's name in lower case, or in torch's form "cpu:gloo,cuda:nccl".

    Refuse a wrong name here, before other ranks wait for this one.
    """
    if backend is None:
        return None
    names = [name for name in dist.Backend.backend_list if name != "undefined"]
    if any(part.rpartition(":")[2] not in names for part in backend.lower().split(",")):
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(names)}")
    if missing := [name for name in names if name in backend.lower() and not dist.is_backend_available(name)]:
        raise ValueError(f"backend {backend!r}: this build of torch has no {missing[0]}; use another backend")
    return backend.lower()


def _seconds(timeout: float | timedelta | None) -> float | None:
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not 0 < seconds < math.inf:
        raise ValueError(f"world(timeout={timeout!r}): give a positive number of seconds")
    return seconds


def _uses_gloo(backend: str | None, device: torch.device | str | None) -> bool:
    if backend is not None:
        return "gloo" in backend
    return str(device) == "cpu" if device is not None else not torch.cuda.is_available()


def _may_share_gpu(backend: str | None, device: torch.device | str | None) -> bool:
    """Return True if the user gave this process a GPU by its index: Gloo, unlike NCCL, lets other ranks use it too."""
    return backend == "gloo" and device is not None and torch.device(device).index is not None


def _existing(backend: str | None, device: torch.device | str | None) -> World:
    """Return the world of a process group that the user's code made."""
    rank, size, actual = dist.get_rank(), dist.get_world_size(), str(dist.get_backend())
    if actual == "undefined":  # init_process_group without a backend makes one for each device type
        actual = dist.get_backend_config()
    if backend is not None and backend != actual:
        raise ValueError(
            f"world(backend={backend!r}), but the process group that exists uses {actual!r}: leave backend= out, or "
            f"make the group with it"
        )
    member = members(store_root())[rank] if size > 1 else Member(socket.gethostname(), 0, 1, 0)
    if device is None:
        on_gpu = "nccl" in actual and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return _world_of(rank, size, member, torch.device(device), actual)


def _world_of(rank: int, size: int, member: Member, device: torch.device, backend: str) -> World:
    assert member.local_rank is not None and member.local_world_size is not None and member.node_rank is not None
    return World(rank, member.local_rank, size, member.local_world_size, member.node_rank, device, backend)


def _join(
    placement: Placement, backend: str | None, device: torch.device | str | None, timeout_s: float | None
) -> tuple[World, Store]:
    """Make the default process group; return this rank's world and its part of the store. All ranks call it."""
    rank, size = placement.rank, placement.world_size
    limit = timedelta(seconds=timeout_s) if timeout_s is not None else dist.default_pg_timeout
    start = time.monotonic()
    deadline = start + limit.total_seconds()
    member, bound, problem = this_member(placement), None, None
    try:
        bound = _bind(device, placement.local_rank, placement.local_world_size or 1)
        if bound.type == "cuda" and not _may_share_gpu(backend, device):
            member = replace(member, gpu=str(getattr(torch.cuda.get_device_properties(bound), "uuid", bound)))
    except Exception as error:  # sent to the other ranks, which would wait for this one
        problem = error
        member = replace(member, error=str(error))
    try:
        shared = _connect(placement, limit, deadline)
        store = PrefixStore(f"world{shared.add(f'worlds/{rank}', 1)}", shared)
        found = collect_members(PrefixStore("ddparity", store), rank, size, member, deadline)
        assert bound is not None, "collect_members raises if a member has an error"
        chosen = backend or ("nccl" if bound.type == "cuda" else "gloo")
        if len({other.host for other in found}) > 1:
            set_gloo_interface(placement.master_addr)
        dist.init_process_group(
            chosen,
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit if timeout_s is not None else None,
            device_id=bound if chosen == "nccl" else None,
        )
        if rank == 0:
            publish_members(store_root(), found)
        # No rank continues, and perhaps leaves, while another rank still connects to it.
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
    return _world_of(rank, size, found[rank], bound, chosen), store


def _connect(placement: Placement, limit: timedelta, deadline: float) -> Store:
    """Return the store of rank 0, or the one that torchrun's agent holds for its workers. Connect to it once."""
    address = (placement.master_addr, placement.master_port)
    if address not in _stores:
        if _serves(placement.rank):
            _stores[address] = _serve(placement, limit)
        else:
            wait_for_store(address, deadline)
            _stores[address] = TCPStore(*address, placement.world_size, False, limit, wait_for_workers=False)
    store = _stores[address]
    store.set_timeout(limit)
    if _agent_holds_store():  # the store outlives a restart of the workers
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"/worker/attempt_{attempt}", store)
    return store


def _agent_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _serves(rank: int) -> bool:
    return rank == 0 and not _agent_holds_store()


def _serve(placement: Placement, limit: timedelta) -> Store:
    """Open the store at the address of this machine that the other ranks know.

    On one machine it is often the loopback's. Where several machines know only a name that means the loopback here,
    the store opens on all addresses, since nothing says at which one the others look for it.
    """
    port = placement.master_port
    address = own_address(placement.master_addr)
    if address is None and placement.local_world_size == placement.world_size:
        with suppress(OSError):
            address = route_to(placement.master_addr).address
    try:
        if address is None:
            return TCPStore("127.0.0.1", port, None, True, limit, wait_for_workers=False)
        return serve_store(listen_at(address, port), limit)
    except (OSError, dist.DistNetworkError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE and "EADDRINUSE" not in str(error):
            raise
        raise OSError(f"port {port} is taken on this machine{process_at_port(port)}") from None


def _bind(device: torch.device | str | None, local_rank: int, local_world_size: int) -> torch.device:
    """Return this process's device, and make it the current one if it is a GPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type != "cuda":
        return device
    if device.index is None:
        # A scheduler may show each process only its own GPU, as index 0. The list of members shows if two share one.
        count = torch.cuda.device_count()
        if local_rank >= count and count != 1:
            fewer = f"start at most {count} processes on a node (--nproc {count}), or " if count else ""
            raise ValueError(
                f"local rank {local_rank} of {local_world_size} has no GPU: this machine shows {count}. To continue, "
                f'{fewer}train on the CPU with world(device="cpu")'
            )
        device = torch.device("cuda", local_rank if local_rank < count else 0)
    torch.cuda.set_device(device)
    return device


def _keep_store(store: Store, joined: World) -> None:
    """Wait, if rank 0's process holds the store, until no other rank can still send it a request.

    This is no barrier: the group is destroyed before, so that a rank that still waits for this one fails at once.
    """
    left = PrefixStore("ddparity/left", store)
    try:
        left.add("count", 1)
        deadline = time.monotonic() + _LEAVE_S
        while _serves(joined.rank) and left.add("count", 0) < joined.world_size and time.monotonic() < deadline:
            time.sleep(0.001)
    except dist.DistError:
        pass  # rank 0 has waited for its time limit, and has ended


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
        hint = ". A Slurm batch script starts only one process: start the ranks with srun"
    return (
        f"rank {placement.rank} of {placement.world_size} ({socket.gethostname()}) did not complete the rendezvous at "
        f"{placement.master_addr}:{placement.master_port} from {source} on interface {interface} after "
        f"{waited_s:.1f} s: {reason}. The address and port come from {placement.engine}'s variables: check that rank 0 "
        f"runs, that its machine has this port free and its firewall leaves it open, and, on a machine with several "
        f"interfaces, that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is right{hint}"
    )

"""The world: this process's rank, device and process group, from whatever started it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from .compat import PrefixStore, Store, TCPStore
from .environment import Placement, find_placement
from .errors import RankFailure, RendezvousError
from .meeting import store_root
from .roster import Card, call_roll, own_card, roster

_LEAVE_S = 5.0  # how long rank 0 keeps the store for ranks that have not left


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

    Understands torchrun, Slurm, Kubernetes PyTorchJob and Open MPI by their variables. Without a launcher this is a
    world of one, without a process group. Inside another `world()`, or where a process group exists, that one is used
    and left alone. On CUDA each process is bound to its own GPU.

    Args:
        backend: of `torch.distributed.init_process_group`; None: "nccl" on CUDA, "gloo" on the CPU.
        device: None: this process's GPU where there are GPUs, else the CPU.
        timeout: seconds or timedelta, for the rendezvous and for each collective; None: torch's default.

    Raises:
        ValueError: the launcher's variables contradict each other, or more local ranks than GPUs (on every rank).
        RendezvousError: the others could not be reached within the time-out.

    Collectives: none but those of `init_process_group`; the roster goes through the store.
    Source: https://pytorch.org/docs/stable/distributed.html#initialization

    Example:
        >>> with world(device="cpu") as w:
        ...     w.rank, w.world_size
        (0, 1)
    """
    if dist.is_available() and dist.is_initialized():
        yield _existing(backend, device)
        return
    placement = find_placement()
    if placement is None:
        if backend is not None and backend not in dist.Backend.backend_list:
            raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(dist.Backend.backend_list)}")
        yield World(0, 0, 1, 1, 0, _bind(device, 0, 1), None)
        return
    joined, store = _join(placement, backend, device, _seconds(timeout))
    try:
        yield joined
    finally:
        dist.destroy_process_group()
        _leave_last(store, joined)


def _existing(backend: str | None, device: torch.device | str | None) -> World:
    """The world of a process group that somebody else made."""
    rank, size, actual = dist.get_rank(), dist.get_world_size(), str(dist.get_backend())
    if backend is not None and backend != actual:
        raise ValueError(f"world(backend={backend!r}), but the process group that exists uses {actual!r}")
    card = roster(store_root())[rank] if size > 1 else Card(socket.gethostname(), 0, 1, 0)
    assert card.local_rank is not None and card.local_world_size is not None and card.node_rank is not None
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in actual else torch.device("cpu")
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
        if bound.type == "cuda":
            card = replace(card, gpu=str(getattr(torch.cuda.get_device_properties(bound), "uuid", bound)))
    except ValueError as error:  # told to the others, who would wait for this rank
        problem = error
        card = replace(card, error=str(error))
    try:
        store = _connect(placement, limit, deadline)
        cards = call_roll(PrefixStore("ddparity", store), rank, size, card, deadline)
        assert bound is not None
        chosen = backend or ("nccl" if bound.type == "cuda" else "gloo")
        dist.init_process_group(
            chosen,
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit if timeout_s is not None else None,
            device_id=bound if chosen == "nccl" else None,
        )
    except RankFailure:
        if problem is not None:
            raise problem from None
        raise
    except (dist.DistError, TimeoutError, OSError, RuntimeError) as error:
        raise RendezvousError(_unreachable(placement, time.monotonic() - start, error)) from error
    mine = cards[rank]
    assert mine.local_rank is not None and mine.local_world_size is not None and mine.node_rank is not None
    return World(rank, mine.local_rank, size, mine.local_world_size, mine.node_rank, bound, chosen), store


def _connect(placement: Placement, limit: timedelta, deadline: float) -> Store:
    """The store at rank 0, or the one that torchrun's agent holds for its workers.

    A client first knocks with a plain socket: torch's own waits longer than its time-out and prints C++ frames.
    """
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = (placement.master_addr, placement.master_port)
    serves = placement.rank == 0 and not agent_store
    if not serves:
        _knock(address, deadline)
    store: Store = TCPStore(*address, placement.world_size, serves, limit, wait_for_workers=False)
    if agent_store:  # it outlives a restart of the workers
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"/worker/attempt_{attempt}", store)
    return store


def _knock(address: tuple[str, int], deadline: float) -> None:
    pause = 0.02
    while True:
        remaining = deadline - time.monotonic()
        try:
            socket.create_connection(address, timeout=max(remaining, 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise TimeoutError(str(error)) from error
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


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
            raise ValueError(
                f"local rank {local_rank} of {local_world_size} has no GPU: this machine shows {count}. Start at most "
                f'{count} processes a node (--nproc {count}), or train on the CPU with world(device="cpu")'
            )
        device = torch.device("cuda", local_rank if local_rank < count else 0)
    torch.cuda.set_device(device)
    return device


def _leave_last(store: Store, joined: World) -> None:
    """The store may live in rank 0's process, which leaves when nobody can still be asking it something.

    No barrier: the group is destroyed before, so that a peer that still waits for this rank fails at once.
    """
    left = PrefixStore("ddparity/left", store)
    try:
        left.add("count", 1)
        deadline = time.monotonic() + _LEAVE_S
        while joined.rank == 0 and left.add("count", 0) < joined.world_size and time.monotonic() < deadline:
            time.sleep(0.001)
    except dist.DistError:
        pass  # rank 0 has gone: it waited long enough


def _unreachable(placement: Placement, waited_s: float, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    source, interface = _route(placement.master_addr, placement.master_port)
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


def _route(host: str, port: int) -> tuple[str, str]:
    """The own address and interface from which `host` is reached; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            source = probe.getsockname()[0]
    except OSError as error:
        return f"no address (no route to {host}: {error})", os.environ.get("GLOO_SOCKET_IFNAME", "unknown")
    interfaces = [
        name for name, addresses in psutil.net_if_addrs().items() for entry in addresses if entry.address == source
    ]
    return source, os.environ.get("GLOO_SOCKET_IFNAME") or (interfaces[0] if interfaces else "unknown")


def _seconds(timeout: float | timedelta | None) -> float | None:
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not seconds > 0:
        raise ValueError(f"world(timeout={timeout!r}): give a positive number of seconds")
    return seconds

"""`ddparity doctor`: what a job would find on this machine, and whether two processes can form a process group.

`examine` returns one finding per row of the table that `doctor` prints.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import DDParityError
from ..runtime.environment import detect_engine, find_node_placement, find_placement
from ..runtime.network import (
    describe_os_error,
    external_route_to,
    hostname_address,
    hostname_is_loopback,
    interface_variables,
    interfaces,
    is_loopback,
    split_endpoint,
)
from ..runtime.world import world
from ..system import bound_cores, proc, run_lacks, run_needs
from .resources import cgroup_cores, cores
from .run import launch

_SHM_BYTES = 1 << 30  # a container has 64 MiB by default; a few batches of images fill it
_GROUP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Finding:
    """One row of the table. State `wrong`: a job would fail here; `look`: it may fail."""

    subject: str
    found: str
    why: str
    state: Literal["ok", "look", "wrong"] = "ok"


def examine(rendezvous: str | None = None, measure: Callable[[], float] | None = None) -> list[Finding]:
    """Return all findings; the group of two processes is the last.

    `rendezvous`: the HOST:PORT of a job on several machines. `measure`: returns the seconds of an all-reduce between
    two processes; None: `all_reduce_seconds`.

    Raises:
        ValueError: `rendezvous` is not HOST:PORT.
    """
    host = split_endpoint(rendezvous)[0] if rendezvous is not None else None
    parts = (_engine, lambda: _network(host), _cores, _gpus, _versions, _diagnosis, _shared_memory)
    return [finding for part in parts for finding in part()] + [_group(measure or all_reduce_seconds)]


def doctor(rendezvous: str | None = None) -> int:
    """Print the findings. Return 1 if one is wrong, else 0."""
    found = examine(rendezvous)
    table = Table("", "found", "why", box=box.SIMPLE_HEAD, title=socket.gethostname(), title_justify="left")
    states = {"ok": "", "look": "[yellow]look[/]", "wrong": "[red]wrong[/]"}
    table.add_column("")
    for finding in found:
        table.add_row(finding.subject, finding.found, finding.why, states[finding.state])
    Console(soft_wrap=False).print(table)
    wrong = [finding.subject for finding in found if finding.state == "wrong"]
    print(f"wrong: {', '.join(wrong)}" if wrong else "two processes of this machine can train together")
    return 1 if wrong else 0


def _engine() -> Iterator[Finding]:
    try:
        engine = detect_engine()
        if engine is not None and engine.name != "Slurm":
            placement = find_placement()
            assert placement is not None
            where = f"rank 0 at {placement.master_addr}:{placement.master_port}"
            ranks = f"rank {placement.rank} of {placement.world_size}"
            yield Finding("launcher", engine.name, f"{engine.rank} and {engine.world_size} are set")
            yield Finding("rank", ranks, f"{where}; the ranks run already: run the script itself")
            return
        nodes = find_node_placement()
    except ValueError as error:
        yield Finding("launcher", "contradictory", str(error), "wrong")
        return
    if nodes is None:
        kubeflow = [name for name in ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR") if name in os.environ]
        if kubeflow:
            values = ", ".join(f"{name}={os.environ[name]}" for name in kubeflow)
            yield Finding("scheduler", "Kubeflow Trainer", f"{values}: `ddparity run` reads them as its options")
        else:
            yield Finding(
                "scheduler", "none", "no scheduler's variables are set: `ddparity run` uses this machine alone"
            )
        return
    through = " through submitit" if "SUBMITIT_EXECUTOR" in os.environ and nodes.engine == "Slurm" else ""
    why = f"machine {nodes.node_rank} of {nodes.nnodes}, which meet at {nodes.address}:{nodes.port}"
    yield Finding("scheduler", nodes.engine + through, why)


def _network(host: str | None) -> Iterator[Finding]:
    name, address = socket.gethostname(), hostname_address()
    others = [f"{interface} {', '.join(addresses)}" for interface, addresses in interfaces().items()]
    yield Finding("interfaces", "; ".join(others) or "loopback only", "those that are up, without the loopback")
    if address is None:
        yield Finding("host name", f"{name} has no address", "torch needs one: add the name to /etc/hosts", "look")
    elif hostname_is_loopback():
        why = "other machines cannot reach it; with several, `run` and `world` use the route's interface instead"
        yield Finding("host name", f"{name} is {address}", why)
    else:
        yield Finding("host name", f"{name} is {address}", "Gloo listens there, unless GLOO_SOCKET_IFNAME is set")
    try:
        route = external_route_to(host or "192.0.2.1")
    except OSError as error:
        if host is None:
            yield Finding("route", "none", "this machine has no default route: it can only train alone")
        else:
            yield Finding("route", "none", f"to {host}: {describe_os_error(error)}", "wrong")
    else:
        variables = " ".join(f"{name}={value}" for name, value in interface_variables(route).items())
        target = f"to {host}" if host else "the default route"
        loopback = ": only the loopback" if is_loopback(route.address) else ""
        needed = f"; with several machines `run` sets {variables}" if variables else ""
        yield Finding("route", f"{route.address} on {route.interface or 'unknown'}", f"{target}{loopback}{needed}")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if value := os.environ.get(variable):
            there = value.lstrip("=^") in interfaces() or value.lstrip("=^") == "lo" or "," in value
            why = "set by the user, and not changed" if there else "no such interface is up on this machine"
            yield Finding(variable, value, why, "ok" if there or variable.startswith("NCCL") else "wrong")
    with socket.socket() as probe:
        probe.bind(("", 0))
        yield Finding(
            "port", str(probe.getsockname()[1]), "free now, on all addresses; `run` takes a port like this one"
        )


def _cores() -> Iterator[Finding]:
    bound = bound_cores()
    quota = cgroup_cores()
    limit = f"; the control group allows {quota:g}" if quota is not None else ""
    yield Finding("cores", str(cores()), f"{os.cpu_count()} in the machine, {bound} for this process{limit}")
    if threads := os.environ.get("OMP_NUM_THREADS"):
        yield Finding("threads", threads, "OMP_NUM_THREADS is set, and not changed")
    else:
        yield Finding("threads", f"{cores()} / N", "the cores, divided among N processes")


def _gpus() -> Iterator[Finding]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}; "
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
        yield Finding("GPUs", str(count), f"{shown}{', '.join(names)}; one process each")
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        yield Finding("GPUs", "none", f"{shown}{built}; one process, unless --nproc gives more")


def _versions() -> Iterator[Finding]:
    yield Finding("versions", f"ddparity {metadata.version('ddparity')}", f"Python {platform.python_version()}")
    yield Finding("torch", torch.__version__, "the same on every machine of a job")
    nccl = "none"
    if dist.is_nccl_available() and torch.cuda.is_available():
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    gloo = dist.is_gloo_available()
    state: Literal["ok", "wrong"] = "ok" if gloo else "wrong"
    yield Finding("backends", f"Gloo {'yes' if gloo else 'no'}, NCCL {nccl}", "of this torch", state)


def _diagnosis() -> Iterator[Finding]:
    """Return whether the launcher can start processes here, and read their stacks."""
    if missing := run_needs() or run_lacks():
        yield Finding("system", platform.system(), missing, "wrong" if run_needs() else "look")
        return
    scope = proc("sys", "kernel", "yama", "ptrace_scope")
    level = int(scope.read_text()) if scope.is_file() else 0
    setting = f"ptrace_scope is {level}"
    spy = shutil.which("py-spy") is not None or Path(sys.executable).with_name("py-spy").is_file()
    if level >= 2 and not _may_trace():
        yield Finding("stacks", "not readable", f"{setting}: a hang's report names the rank, without the line", "look")
    else:
        yield Finding(
            "stacks", "readable", f"{setting}; py-spy {'is' if spy else 'is not'} installed", "ok" if spy else "look"
        )


def _may_trace() -> bool:
    """Return whether this process has the capability CAP_SYS_PTRACE (19)."""
    try:
        status = proc("self", "status").read_text()
        effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
        return bool(int(effective, 16) >> 19 & 1)
    except (OSError, StopIteration):
        return False


def _shared_memory() -> Iterator[Finding]:
    if not Path("/dev/shm").is_dir():
        return
    usage = shutil.disk_usage("/dev/shm")
    size = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    small = usage.free < _SHM_BYTES
    why = "data-loader workers send batches through it" + ("; docker run --shm-size=8g gives more" if small else "")
    yield Finding("/dev/shm", size, why, "look" if small else "ok")


def _group(measure: Callable[[], float]) -> Finding:
    start = time.monotonic()
    try:
        seconds = measure()
    except (DDParityError, OSError, RuntimeError) as error:
        return Finding("two processes", "no group", str(error).splitlines()[0], "wrong")
    why = f"an all-reduce over Gloo; with the start, {time.monotonic() - start:.1f} s"
    return Finding("two processes", f"{1000 * seconds:.1f} ms", why)


def all_reduce_seconds() -> float:
    """Return the seconds of a small all-reduce between two processes of this machine."""
    return float(max(launch(_all_reduce, nproc=2)))


def _all_reduce() -> float:
    with world(device="cpu", timeout=_GROUP_TIMEOUT_S) as joined:
        value = torch.full((1000,), float(joined.rank + 1))
        dist.all_reduce(value)  # the first one opens the connections
        start = time.perf_counter()
        dist.all_reduce(value)
        seconds = time.perf_counter() - start
        if float(value[0]) != 6.0:  # 1 + 2, twice
            raise DDParityError(f"an all-reduce of 3 over two processes gave {float(value[0])}, not 6")
        return seconds

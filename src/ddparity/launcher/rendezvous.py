"""What one of several machines checks around torch's rendezvous, and how a rendezvous that failed is reported.

Before the rendezvous, `check_rendezvous` waits for the way to the store, or for the port where this machine opens it:
torch reports a wrong name, route or port only after its whole time-out, in C++ frames. After the rendezvous,
`check_nodes` compares what the machines were started with.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import platform
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

import torch
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.launcher.api import LaunchConfig

from ..compat import PrefixStore, Store, guesses_own_host, is_store
from ..errors import RendezvousError
from ..runtime.network import (
    Route,
    can_listen,
    describe_os_error,
    external_route_to,
    interface_variables,
    is_this_machine,
    join_endpoint,
    process_at_port,
    route_to,
    split_endpoint,
    unreachable_interface,
    wait_for_store,
)
from .options import Launch
from .output import tell

_QUIET_S = 3.0  # a wait is reported after this: machines of a job rarely start at the same moment
_NODE_INFO_S = 30.0  # from the rendezvous until each machine has described itself
_LEAVE_S = 5.0  # how long a machine that found a mistake stays for those that still read


@dataclass(frozen=True)
class RendezvousSetup:
    """torch's configuration, completed for this machine, and variables for its ranks."""

    config: LaunchConfig
    variables: dict[str, str]
    route: Route | None  # to the store; None: this machine is alone, or the rendezvous does not use torch's store


def check_rendezvous(launch: Launch, say: Callable[[str], None] = tell) -> RendezvousSetup:
    """Wait until this machine can reach the job's store, or can open it where this is the machine that holds it.

    After 3 s, `say` receives what the machine waits for, and again whenever the reason changes. The address and the
    interface towards the store go into the configuration and the ranks' variables, unless the user has set them.

    Raises:
        RendezvousError: within the rendezvous' time-out. The name has no address; no route leads there; nothing or
            another program listens there; the port is taken on this machine; GLOO_SOCKET_IFNAME names an interface
            that other machines cannot reach; another machine has number 0.
    """
    config = launch.config
    if launch.alone or config.rdzv_backend not in ("static", "c10d"):
        return RendezvousSetup(config, {}, None)
    start = time.monotonic()
    deadline = start + _timeout_s(config)
    host, port = split_endpoint(config.rdzv_endpoint)
    wait = _Wait(launch, start, say)
    wait.route = route = _find_route(host, deadline, wait)
    if config.max_nodes > 1 and not route.loopback and (problem := unreachable_interface()):
        raise RendezvousError(f"{wait.who()}: {problem}")
    conf = dict(config.rdzv_configs)
    if config.rdzv_backend == "static":
        opens, chosen = launch.node_rank == 0, True
    else:
        is_host = conf.get("is_host")
        chosen = is_host is not None
        opens = str(is_host).lower() in ("1", "true", "t", "yes", "y") if chosen else is_this_machine(host)
    if opens:
        opens = _can_open_store(launch, host, port, chosen)
        if opens and not chosen and not guesses_own_host(host):
            conf["is_host"] = "1"
    if not opens:
        if not chosen and guesses_own_host(host):
            conf["is_host"] = "0"
        try:
            wait_for_store((host, port), deadline, wait)
        except TimeoutError as error:
            raise RendezvousError(wait.failure(str(error))) from None
    local_addr = config.local_addr or route.address
    completed = dataclasses.replace(config, rdzv_configs=conf, local_addr=local_addr)
    return RendezvousSetup(completed, interface_variables(route) if config.max_nodes > 1 else {}, route)


def explain(error: Exception, launch: Launch, setup: RendezvousSetup, waited_s: float) -> RendezvousError:
    """Return torch's error of an incomplete rendezvous as one that says in one sentence what was tried."""
    wait = _Wait(launch, time.monotonic() - waited_s, tell, setup.route)
    config = launch.config
    joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
    if joined:
        reason = f"{joined[1]} of {joined[2]} machines came"
    elif "RendezvousTimeout" in type(error).__name__:
        reason = f"fewer than {config.min_nodes} machines came"
    elif "RendezvousClosed" in type(error).__name__:
        return RendezvousError(
            f"{wait.who()}: the job at {config.rdzv_endpoint} is over: another machine ended it. Start it again on "
            f"every machine"
        )
    else:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RendezvousError(
        f"{wait.failure(reason)}, and that each machine was started with the same --nnodes and --rendezvous or "
        f"--master-addr, and with its own --node-rank where you give one"
    )


def _timeout_s(config: LaunchConfig) -> float:
    """Return how long the machines wait for each other (`--rdzv-conf timeout=…`; torch's default is 15 minutes)."""
    return float(config.rdzv_configs.get("join_timeout", config.rdzv_configs["timeout"]))


class _Wait:
    """Call it with the reason of a wait: it reports the wait after a while, and when the reason changes."""

    def __init__(self, launch: Launch, start: float, say: Callable[[str], None], route: Route | None = None) -> None:
        self.launch, self.start, self.say, self.route = launch, start, say, route
        self.reported = ""

    def __call__(self, reason: str) -> None:
        if time.monotonic() - self.start < _QUIET_S or reason == self.reported:
            return
        self.reported = reason
        self.say(f"{self.who()} waits for {self.where()}, up to {_timeout_s(self.launch.config):.0f} s: {reason}")

    def who(self) -> str:
        number = "this machine" if self.launch.node_rank is None else f"machine {self.launch.node_rank}"
        return f"{number} ({socket.gethostname()})"

    def where(self) -> str:
        source = ""
        if self.route is not None:
            source = f" from {self.route.address} on interface {self.route.interface or 'unknown'}"
        return f"the job's machines at {self.launch.config.rdzv_endpoint}{source}"

    def failure(self, reason: str) -> str:
        source = f"{self.launch.engine}'s variables" if self.launch.engine else "the options"
        return (
            f"{self.who()} did not meet {self.where()} after {time.monotonic() - self.start:.1f} s: {reason}. The "
            f"address and port come from {source}; check that the launcher runs on the first machine, that the port is "
            f"right and open there"
        )


def _find_route(host: str, deadline: float, wait: _Wait) -> Route:
    """Wait for a route to the store's host. A name may get its address after the job starts, as in Kubernetes."""
    try:  # at a loopback address, all machines of the job are this one
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    while True:
        try:
            return route_to(host) if local else external_route_to(host)
        except OSError as error:
            reason = describe_os_error(error)
        if time.monotonic() + 0.5 > deadline:
            raise RendezvousError(wait.failure(reason))
        wait(reason)
        time.sleep(0.5)


def _can_open_store(launch: Launch, host: str, port: int, chosen: bool) -> bool:
    """Return True if this machine can open the store, False if another launcher of the job on it has opened it.

    `chosen`: the user or a number says that this machine opens it; then no other launcher may have.
    """
    endpoint = join_endpoint(host, port)
    try:
        answers = is_store((host, port), 1.0)
    except OSError:
        answers = False
    if answers and not chosen:
        return False
    if answers and not is_this_machine(host):
        raise RendezvousError(
            f"two machines have number 0: {endpoint} is another machine's address, and the job's store runs there "
            f"already; give this one ({socket.gethostname()}) its own --node-rank"
        )
    if not can_listen(port):
        what = "the store of another job" if answers else "another program"
        raise RendezvousError(
            f"port {port} is taken on this machine ({socket.gethostname()}){process_at_port(port)}: {what} listens "
            f"there. Give another port on every machine, as in --rendezvous {join_endpoint(host, port + 1)}"
        )
    return True


@dataclass(frozen=True)
class NodeInfo:
    """What one machine was started with. The names of the fields are JSON keys in the job's store."""

    host: str
    nproc: int
    nproc_given: bool  # as a number: then it is meant to be the same everywhere
    nnodes: str
    torch: str
    python: str
    ddparity: str


def node_info(launch: Launch) -> NodeInfo:
    """Return what this machine was started with."""
    config = launch.config
    return NodeInfo(
        socket.gethostname(),
        config.nproc_per_node,
        launch.nproc_given,
        f"{config.min_nodes}:{config.max_nodes}",
        torch.__version__,
        platform.python_version(),
        metadata.version("ddparity"),
    )


def add_node_check(handler: RendezvousHandler, info: NodeInfo, timeout_s: float = _NODE_INFO_S) -> RendezvousHandler:
    """Have `handler` run `check_nodes` after each rendezvous. Return the same handler."""
    rendezvous = handler.next_rendezvous
    checked = False

    def next_rendezvous() -> RendezvousInfo:
        nonlocal checked
        found = rendezvous()
        # A static rendezvous has one store for all rounds, and after a failure each machine starts again by itself.
        if handler.get_backend() != "static" or not checked:
            checked = True
            check_nodes(found.store, found.rank, found.world_size, info, timeout_s)
        return found

    setattr(handler, "next_rendezvous", next_rendezvous)  # noqa: B010 - mypy refuses to assign to a method
    return handler


def check_nodes(store: Store, node_rank: int, nnodes: int, info: NodeInfo, timeout_s: float) -> None:
    """Compare what all machines of a rendezvous were started with. Each machine calls it once in a round.

    `store`: of this round alone.

    Raises:
        RendezvousError: machines differ, two have the same number, or one did not describe itself within the time-out;
            on every machine that did.
    """
    own = PrefixStore("ddparity/nodes", store)
    position = own.add(f"{node_rank}/count", 1) - 1
    own.set(f"{node_rank}/{position}", json.dumps(asdict(info)))
    own.add("came", 1)
    deadline = time.monotonic() + timeout_s
    while (came := own.add("came", 0)) < nnodes and time.monotonic() < deadline:
        time.sleep(0.02)  # a store cannot wait for a number to change
    counts = {rank: own.add(f"{rank}/count", 0) for rank in range(nnodes)}
    infos = {
        rank: [NodeInfo(**json.loads(own.get(f"{rank}/{position}"))) for position in range(count)]
        for rank, count in counts.items()
    }
    problem = _wrong_number(infos) or compare_nodes([found[0] for _, found in sorted(infos.items())])
    own.add("read", 1)
    if problem is None:
        return
    # The store ends with the machine that opened it, and another machine may still read.
    deadline = time.monotonic() + _LEAVE_S
    while own.add("read", 0) < came and time.monotonic() < deadline:
        time.sleep(0.02)
    raise RendezvousError(problem)


def compare_nodes(infos: Sequence[NodeInfo]) -> str | None:
    """Return in one sentence how the machines of a job differ where they must not; None if they do not."""
    for what, values, solution in (
        # Builds for CUDA and for the CPU may work together; versions may not.
        ("torch", [info.torch.partition("+")[0] for info in infos], "install the same version on every machine"),
        ("ddparity", [info.ddparity for info in infos], "install the same version on every machine"),
        ("--nnodes", [info.nnodes.replace(":", " to ") for info in infos], "give the same on every machine"),
    ):
        if len(set(values)) > 1:
            return f"the machines differ in {what}: {_by_value(infos, values)}; {solution}"
    given = [info for info in infos if info.nproc_given]
    if len({info.nproc for info in given}) > 1:
        found = _by_value(given, [str(info.nproc) for info in given])
        return (
            f"the machines differ in --nproc: {found}; give the same on every machine, or --nproc auto where machines "
            f"differ"
        )
    return None


def _wrong_number(infos: dict[int, list[NodeInfo]]) -> str | None:
    """Return which number two machines have, or which number none has; None where each number has one machine."""
    absent = ", ".join(str(rank) for rank, found in infos.items() if not found)
    for rank, found in infos.items():
        if len(found) > 1:
            nobody = f", and none has {absent}" if absent else ""
            hosts = " and ".join(info.host for info in found)
            return f"{len(found)} machines have number {rank} ({hosts}){nobody}: give each its own --node-rank"
    if absent:
        return f"machine {absent} met the others but did not say what it was started with: did its launcher fail?"
    return None


def _by_value(infos: Sequence[NodeInfo], values: Sequence[str]) -> str:
    hosts: dict[str, list[str]] = defaultdict(list)
    for info, value in zip(infos, values):
        hosts[value].append(info.host)
    return ", ".join(f"{value} on {' and '.join(names)}" for value, names in hosts.items())

"""What one of several machines checks around torch's rendezvous, and how a rendezvous that failed is reported.

Before the rendezvous, `check_rendezvous` waits for the way to the store, or for the port where this machine opens it:
torch reports a wrong name, route or port only after its whole time-out, in C++ frames. After the rendezvous,
`check_nodes` compares what the machines were started with.
"""

from __future__ import annotations

import dataclasses
import errno
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

from ..compat import PrefixStore, Store, append, is_store
from ..errors import RendezvousError
from ..runtime.network import (
    LOOPBACK,
    Route,
    describe_os_error,
    external_route_to,
    interface_variables,
    is_loopback,
    is_this_machine,
    join_endpoint,
    listen_at,
    loopback_variables,
    own_address,
    process_at_port,
    route_to,
    split_endpoint,
    unreachable_interface,
    wait_for_store,
)
from .diagnosis.limits import read_json
from .options import Launch
from .output import tell

_QUIET_S = 3.0  # a wait is reported after this: machines of a job rarely start at the same moment
_NODE_INFO_S = 30.0  # from the rendezvous until each machine has described itself
_SAME_MACHINE_S = 3.0  # until another launcher of this machine, which has the port, has opened the store
_LEAVE_S = 5.0  # how long a machine that found a mistake stays for those that still read


@dataclass(frozen=True)
class RendezvousSetup:
    """torch's configuration, completed for this machine, and variables for its ranks.

    `address`: where this machine reaches the store; None: it is alone, or the rendezvous does not use torch's store.
    `listener`: on the machine that opens the store, the socket at which it will listen.
    """

    config: LaunchConfig
    variables: dict[str, str]
    alone: bool = False
    route: Route | None = None  # to the store
    address: str | None = None
    listener: socket.socket | None = None

    def close(self) -> None:
        """Close the listener, where the store has not taken it."""
        if self.listener is not None:
            self.listener.close()


def check_rendezvous(launch: Launch, say: Callable[[str], None] = tell) -> RendezvousSetup:
    """Wait until this machine can reach the job's store, or can open it where this is the machine that holds it.

    After 3 s, `say` receives what the machine waits for, and again whenever the reason changes. The address and the
    interface towards the store go into the configuration and the ranks' variables, unless the user has set them. A
    store of one machine listens on the loopback; one of several, at this machine's address towards the others.

    Raises:
        RendezvousError: within the rendezvous' time-out. The name has no address; no route leads there; nothing or
            another program listens there; the port is taken on this machine; GLOO_SOCKET_IFNAME names an interface
            that other machines cannot reach; another machine has number 0.
    """
    config = launch.config
    if launch.alone:
        return RendezvousSetup(config, loopback_variables(), alone=True)
    if config.rdzv_backend not in ("static", "c10d"):
        return RendezvousSetup(config, {})
    start = time.monotonic()
    deadline = start + _timeout_s(config)
    host, port = split_endpoint(config.rdzv_endpoint)
    wait = _Wait(launch, start, say)
    one_machine = config.max_nodes == 1 and (config.rdzv_backend == "static" or is_this_machine(host))
    if one_machine:
        host = LOOPBACK
    wait.route = route = _find_route(host, deadline, wait)
    if config.max_nodes > 1 and not route.loopback and (problem := unreachable_interface()):
        raise RendezvousError(f"{wait.who()}: {problem}")
    here = is_this_machine(host)
    address = _store_address(host, route, config.local_addr)
    if config.rdzv_backend == "static":
        opens, chosen = launch.node_rank == 0, True
    else:
        is_host = config.rdzv_configs.get("is_host")
        chosen = is_host is not None
        opens = str(is_host).lower() in ("1", "true", "t", "yes", "y") if chosen else here
    listener = _listen(launch, host, address, port, chosen) if opens else None
    if listener is None:
        address = address if here else host
        try:
            wait_for_store((address, port), deadline, wait)
        except TimeoutError as error:
            raise RendezvousError(wait.failure(str(error))) from None
    local_addr = _own_address(config.local_addr, route) if config.local_addr and not one_machine else route.address
    completed = dataclasses.replace(config, local_addr=local_addr)
    variables = loopback_variables() if one_machine else interface_variables(route) if config.max_nodes > 1 else {}
    return RendezvousSetup(completed, variables, False, route, address, listener)


def _store_address(host: str, route: Route, local_addr: str | None) -> str:
    """Return at which address of this machine others reach it by the name `host`.

    Its own name often has the loopback's address here. Then the user's --local-addr says it, or the route.
    """
    if local_addr is None or route.loopback or own_address(host) is not None:
        return route.address
    return _own_address(local_addr, route)


def _own_address(name: str, route: Route) -> str:
    """Return the address of a name of this machine. Where the name has only the loopback's, return the route's."""
    try:
        found = route_to(name).address
    except OSError:
        return name  # torch announces it as it is
    return route.address if is_loopback(found) else found


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


def _listen(launch: Launch, host: str, address: str, port: int, chosen: bool) -> socket.socket | None:
    """Return a socket for the store; None if another launcher of the job on this machine has opened the store.

    `chosen`: the user or a number says that this machine opens it; then no other launcher may have.
    """
    endpoint, here = join_endpoint(host, port), is_this_machine(host)
    answers = _is_store(address if here else host, port)
    if answers and not chosen:
        return None
    if answers and not here:
        raise RendezvousError(
            f"two machines have number 0: {endpoint} is another machine's address, and the job's store runs there "
            f"already; give this one ({socket.gethostname()}) its own --node-rank"
        )
    try:
        return listen_at(address, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise RendezvousError(
                f"this machine ({socket.gethostname()}) cannot open the job's store at "
                f"{join_endpoint(address, port)}: {error.strerror}. Give another port on every machine, or this "
                f"machine's own address with --local-addr"
            ) from None
    if not chosen:
        deadline = time.monotonic() + _SAME_MACHINE_S  # another launcher may be about to open it
        while time.monotonic() < deadline:
            if _is_store(address, port):
                return None
            time.sleep(0.05)
    what = "the store of another job" if answers or _is_store(address, port) else "another program"
    raise RendezvousError(
        f"port {port} is taken on this machine ({socket.gethostname()}){process_at_port(port)}: {what} listens "
        f"there. Give another port on every machine, as in --rendezvous {join_endpoint(host, port + 1)}"
    )


def _is_store(host: str, port: int) -> bool:
    try:
        return is_store((host, port), 1.0)
    except OSError:
        return False


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

    `store`: of this round alone. Traffic: three requests a machine and a poll; the last machine to come compares.

    Raises:
        RendezvousError: machines differ, two have the same number, or one did not describe itself within the time-out;
            on every machine that did.
    """
    own = PrefixStore("ddparity/nodes", store)
    append(own, "all", json.dumps([node_rank, asdict(info)]) + "\n")
    deadline, pause = time.monotonic() + timeout_s, 0.01
    is_last = own.add("came", 1) >= nnodes
    while not is_last and not own.check(["verdict"]) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(1.5 * pause, 0.2)
    if not own.check(["verdict"]):
        own.compare_set("verdict", "", json.dumps(_compare(own.get("all"), nnodes)))
    problem = read_json(own.get("verdict"))
    if problem is None:
        return
    came = own.add("came", 0)
    own.add("read", 1)
    # The store ends with the machine that opened it, and another machine may still read.
    deadline = time.monotonic() + _LEAVE_S
    while own.add("read", 0) < came and time.monotonic() < deadline:
        time.sleep(0.05)
    raise RendezvousError(str(problem))


def _compare(text: bytes, nnodes: int) -> str | None:
    """Return what is wrong with the descriptions that the machines wrote, a line each; None if nothing is."""
    infos: dict[int, list[NodeInfo]] = {rank: [] for rank in range(nnodes)}
    try:
        for line in text.splitlines():
            rank, fields = read_json(line)
            infos.setdefault(int(rank), []).append(NodeInfo(**fields))
    except (ValueError, TypeError) as error:
        return f"a machine described itself in a way that cannot be read ({error}): does another program use the port?"
    return _wrong_number(infos) or compare_nodes([found[0] for _, found in sorted(infos.items())])


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

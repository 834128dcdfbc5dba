"""Before the agent of one of several machines starts: the way to where they meet, and who opens the store there.

torch's own rendezvous tells of a wrong name, route or port after its whole time-out, in C++ frames.
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

_QUIET_S = 3.0  # machines of a job rarely start at the same moment


@dataclass(frozen=True)
class Place:
    """Where this machine stands before the rendezvous: torch's configuration, completed, and variables for workers."""

    config: LaunchConfig
    variables: dict[str, str]
    route: Route | None  # None: this machine is alone, or a store of another kind is asked


def rendezvous_timeout_s(config: LaunchConfig) -> float:
    """How long the machines wait for each other (`--rdzv-conf timeout=…`; torch's default is 15 minutes)."""
    return float(config.rdzv_configs.get("join_timeout", config.rdzv_configs["timeout"]))


def check_rendezvous(launch: Launch, say: Callable[[str], None] = tell) -> Place:
    """Wait until the machines' meeting place can be reached, or can be opened here where it is this machine.

    What it waits for is said after 3 s, and again whenever the reason changes. The address and the interface towards
    the meeting place go into the configuration and the workers' variables, unless the user has set them.

    Raises:
        RendezvousError: within the rendezvous' time-out: the name has no address, no route leads there, nothing or
            another program listens there, the port is taken on this machine, GLOO_SOCKET_IFNAME names an interface
            that other machines cannot reach, or another machine has number 0.
    """
    config = launch.config
    if launch.alone or config.rdzv_backend not in ("static", "c10d"):
        return Place(config, {}, None)
    start = time.monotonic()
    deadline = start + rendezvous_timeout_s(config)
    host, port = split_endpoint(config.rdzv_endpoint)
    waiting = _Waiting(launch, start, say)
    route = _route(host, deadline, waiting)
    waiting.route = route
    if config.max_nodes > 1 and not route.loopback and (wrong := unreachable_interface()):
        raise RendezvousError(f"{waiting.who()}: {wrong}")
    conf = dict(config.rdzv_configs)
    if config.rdzv_backend == "static":
        opens, hosts_said = launch.node_rank == 0, True
    else:
        said = conf.get("is_host")
        hosts_said = said is not None
        opens = str(said).lower() in ("1", "true", "t", "yes", "y") if hosts_said else is_this_machine(host)
    if opens:
        opens = _opens(launch, host, port, hosts_said)
        if opens and not hosts_said and not guesses_own_host(host):
            conf["is_host"] = "1"
    if not opens:
        if not hosts_said and guesses_own_host(host):
            conf["is_host"] = "0"
        try:
            wait_for_store((host, port), deadline, waiting)
        except TimeoutError as error:
            raise RendezvousError(waiting.failed(str(error))) from None
    local = config.local_addr or route.address
    completed = dataclasses.replace(config, rdzv_configs=conf, local_addr=local)
    return Place(completed, interface_variables(route) if config.max_nodes > 1 else {}, route)


def explain(error: Exception, launch: Launch, place: Place, waited_s: float) -> RendezvousError:
    """torch's error of a rendezvous that was not complete, as one sentence that says what was tried."""
    waiting = _Waiting(launch, time.monotonic() - waited_s, tell, place.route)
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    config = launch.config
    came = re.search(r"(\d+)/(\d+) clients joined", str(error))
    if came:
        reason = f"{came[1]} of {came[2]} machines came"
    elif "RendezvousTimeout" in type(error).__name__:
        reason = f"fewer than {config.min_nodes} machines came"
    elif "RendezvousClosed" in type(error).__name__:
        return RendezvousError(
            f"{waiting.who()}: the job at {config.rdzv_endpoint} is over: another machine ended it. Start it again on "
            f"every machine"
        )
    else:
        reason = first
    return RendezvousError(
        f"{waiting.failed(reason)}, and that each machine was started with the same --nnodes and --rendezvous or "
        f"--master-addr, and a --node-rank of its own where one is given"
    )


class _Waiting:
    """Says what is waited for: after a while, and when the reason changes."""

    def __init__(self, launch: Launch, start: float, say: Callable[[str], None], route: Route | None = None) -> None:
        self.launch, self.start, self.say, self.route = launch, start, say, route
        self.said = ""

    def __call__(self, reason: str) -> None:
        if time.monotonic() - self.start < _QUIET_S or reason == self.said:
            return
        self.said = reason
        limit = rendezvous_timeout_s(self.launch.config)
        self.say(f"{self.who()} waits for {self.where()}, up to {limit:.0f} s: {reason}")

    def who(self) -> str:
        number = "this machine" if self.launch.node_rank is None else f"machine {self.launch.node_rank}"
        return f"{number} ({socket.gethostname()})"

    def where(self) -> str:
        way = ""
        if self.route is not None:
            way = f" from {self.route.address} on interface {self.route.interface or 'unknown'}"
        return f"the job's machines at {self.launch.config.rdzv_endpoint}{way}"

    def failed(self, reason: str) -> str:
        source = f"{self.launch.engine}'s variables" if self.launch.engine else "the options"
        return (
            f"{self.who()} did not meet {self.where()} after {time.monotonic() - self.start:.1f} s: {reason}. The "
            f"address and port come from {source}; check that the launcher runs on the first machine, that the port is "
            f"right and open there"
        )


def _route(host: str, deadline: float, waiting: _Waiting) -> Route:
    """The way to the meeting place; a name may get its address a while after the job starts, as in Kubernetes."""
    try:  # all machines of the job are this one
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = False
    while True:
        try:
            return route_to(host) if here else external_route_to(host)
        except OSError as error:
            reason = describe_os_error(error)
        if time.monotonic() + 0.5 > deadline:
            raise RendezvousError(waiting.failed(reason))
        waiting(reason)
        time.sleep(0.5)


def _opens(launch: Launch, host: str, port: int, hosts_said: bool) -> bool:
    """Whether this machine opens the store; False: another launcher of the job on this machine has opened it."""
    where = join_endpoint(host, port)
    try:
        answers = is_store((host, port), 1.0)
    except OSError:
        answers = False
    if answers and not hosts_said:
        return False
    if answers and not is_this_machine(host):
        raise RendezvousError(
            f"two machines have number 0: {where} is another machine's address, and the job's store runs there "
            f"already; give this one ({socket.gethostname()}) its own --node-rank"
        )
    if not can_listen(port):
        what = "the store of another job" if answers else "another program"
        raise RendezvousError(
            f"port {port} is taken on this machine ({socket.gethostname()}){process_at_port(port)}: {what} listens "
            f"there. Give another port on every machine, as in --rendezvous {join_endpoint(host, port + 1)}"
        )
    return True


_COME_S = 30.0  # from the rendezvous to the card of each machine
_LEAVE_S = 5.0  # how long a machine that found a mistake stays for those that still read


@dataclass(frozen=True)
class NodeCard:
    """What one machine was started with."""

    host: str
    nproc: int
    nproc_given: bool  # as a number: then it is meant to be the same everywhere
    nnodes: str
    torch: str
    python: str
    ddparity: str


def node_card(launch: Launch) -> NodeCard:
    config = launch.config
    return NodeCard(
        socket.gethostname(),
        config.nproc_per_node,
        launch.nproc_given,
        f"{config.min_nodes}:{config.max_nodes}",
        torch.__version__,
        platform.python_version(),
        metadata.version("ddparity"),
    )


def compare_cards(cards: Sequence[NodeCard]) -> str | None:
    """What is wrong between the machines of a job, in one sentence; None: nothing."""
    for what, values, way in (
        # Builds for CUDA and for the CPU may work together; versions may not.
        ("torch", [card.torch.partition("+")[0] for card in cards], "install the same version on every machine"),
        ("ddparity", [card.ddparity for card in cards], "install the same version on every machine"),
        ("--nnodes", [card.nnodes.replace(":", " to ") for card in cards], "give the same on every machine"),
    ):
        if len(set(values)) > 1:
            return f"the machines differ in {what}: {_by_value(cards, values)}; {way}"
    given = [card for card in cards if card.nproc_given]
    if len({card.nproc for card in given}) > 1:
        found = _by_value(given, [str(card.nproc) for card in given])
        return (
            f"the machines differ in --nproc: {found}; give the same on every machine, or --nproc auto where machines "
            f"differ"
        )
    return None


def exchange_cards(store: Store, group_rank: int, group_world_size: int, card: NodeCard, timeout_s: float) -> None:
    """Compare the cards of all machines of a rendezvous. Each of them calls it once, with a store of its own round.

    Raises:
        RendezvousError: machines differ, two have the same number, or one did not come within the time-out; on every
            machine that came in time.
    """
    own = PrefixStore("ddparity/nodes", store)
    place = own.add(f"{group_rank}/count", 1) - 1
    own.set(f"{group_rank}/{place}", json.dumps(asdict(card)))
    own.add("came", 1)
    deadline = time.monotonic() + timeout_s
    while (came := own.add("came", 0)) < group_world_size and time.monotonic() < deadline:
        time.sleep(0.02)  # a store wakes nobody when a number changes
    counts = {rank: own.add(f"{rank}/count", 0) for rank in range(group_world_size)}
    cards = {
        rank: [NodeCard(**json.loads(own.get(f"{rank}/{place}"))) for place in range(count)]
        for rank, count in counts.items()
    }
    problem = _miscounted(cards) or compare_cards([found[0] for _, found in sorted(cards.items())])
    own.add("read", 1)
    if problem is None:
        return
    # The store ends with the machine that opened it, and another may still be reading.
    deadline = time.monotonic() + _LEAVE_S
    while own.add("read", 0) < came and time.monotonic() < deadline:
        time.sleep(0.02)  # a store wakes nobody when a number changes
    raise RendezvousError(problem)


def check_nodes(handler: RendezvousHandler, card: NodeCard, timeout_s: float = _COME_S) -> RendezvousHandler:
    """Have the machines compare their cards whenever they have met through `handler`."""
    meet = handler.next_rendezvous
    met: list[int] = []

    def next_rendezvous() -> RendezvousInfo:
        info = meet()
        # A static rendezvous has one store for all rounds, and after a failure its machines start again by themselves.
        if handler.get_backend() != "static" or not met:
            met.append(info.rank)
            exchange_cards(info.store, info.rank, info.world_size, card, timeout_s)
        return info

    setattr(handler, "next_rendezvous", next_rendezvous)  # noqa: B010 - mypy lets no method be assigned
    return handler


def _miscounted(cards: dict[int, list[NodeCard]]) -> str | None:
    """Two machines with one number, or none with another."""
    absent = ", ".join(str(rank) for rank, found in cards.items() if not found)
    for rank, found in cards.items():
        if len(found) > 1:
            nobody = f", and none has {absent}" if absent else ""
            hosts = " and ".join(card.host for card in found)
            return f"{len(found)} machines have number {rank} ({hosts}){nobody}: give each its own --node-rank"
    if absent:
        return f"machine {absent} met the others but did not say what it was started with: did its launcher fail?"
    return None


def _by_value(cards: Sequence[NodeCard], values: Sequence[str]) -> str:
    hosts: dict[str, list[str]] = defaultdict(list)
    for card, value in zip(cards, values):
        hosts[value].append(card.host)
    return ", ".join(f"{value} on {' and '.join(names)}" for value, names in hosts.items())

"""Addresses, interfaces and ports of this machine, and the way from it to the machine where a job meets."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from ..compat import can_tell_stores, is_store

# Never assigned to a machine (RFC 5737): the way there is the default route.
_ANYWHERE = "192.0.2.1"


@dataclass(frozen=True)
class Route:
    """How this machine reaches a host: its own address there, and the interface that has it, where one does."""

    host: str
    address: str
    interface: str | None

    @property
    def loopback(self) -> bool:
        return is_loopback(self.address)


def route_to(host: str, port: int = 1) -> Route:
    """The own address and interface from which `host` is reached. Nothing is sent to it.

    Raises:
        OSError: the host has no address, or no route leads there; says which.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        source = str(probe.getsockname()[0])
    return Route(host, source, interface_of(source))


def routable(host: str) -> Route:
    """As `route_to`, from an address that other machines can reach: never the loopback's, where there is another.

    On the machine that `host` names, its own name may have the loopback's address: there the default route counts, and
    without one the first interface that is up.

    Raises:
        OSError: the host has no address, or no route leads there.
    """
    found = route_to(host)
    if not found.loopback:
        return found
    with suppress(OSError):
        default = route_to(_ANYWHERE)
        if not default.loopback:
            return default
    for name, addresses in interfaces().items():
        if addresses:
            return Route(host, addresses[0], name)
    return found


def interfaces() -> dict[str, list[str]]:
    """The interfaces that are up, each with its addresses (IPv4 first), without the loopback's and link-local ones."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in sorted(entries, key=lambda entry: entry.family != socket.AF_INET):
            internet = entry.family in (socket.AF_INET, socket.AF_INET6)
            if name in up and internet and "%" not in entry.address and not is_loopback(entry.address):
                found.setdefault(name, []).append(entry.address)
    return found


def interface_of(address: str) -> str | None:
    """The interface that has this address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def is_own(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine. False where the name has no address."""
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    with suppress(OSError):
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        return any(address in own or is_loopback(address) for address in found)
    return False


def hostname_address() -> str | None:
    """The address that this machine's own name has here, at which Gloo listens unless told otherwise; None: none."""
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return None


def hostname_is_loopback() -> bool:
    """Whether this machine's own name leads nowhere that another machine could reach."""
    address = hostname_address()
    return address is None or is_loopback(address)


def interface_variables(route: Route, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that keep Gloo and NCCL on the interface of `route`, where they would not find it themselves.

    Gloo listens at the host name's address, NCCL takes the first interface. So these are needed where the name has the
    loopback's address or the machine has several interfaces. What the user has set is left alone.
    """
    if route.interface is None or route.loopback:
        return {}
    if not hostname_is_loopback() and len(interfaces()) < 2:
        return {}
    # "=": NCCL takes a plain name as a prefix, and eth1 would also be eth10.
    wanted = {"GLOO_SOCKET_IFNAME": route.interface, "NCCL_SOCKET_IFNAME": f"={route.interface}"}
    return {name: value for name, value in wanted.items() if name not in environ}


def unreachable_interface(environ: Mapping[str, str] = os.environ) -> str | None:
    """What is wrong with the user's GLOO_SOCKET_IFNAME in a job of several machines; None: nothing."""
    up = interfaces()
    for name in filter(None, environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in up:
            theirs = "; ".join(f"{interface} ({', '.join(addresses)})" for interface, addresses in up.items())
            what = "is the loopback, which no other machine reaches" if name == "lo" else "is not up on this machine"
            return f"GLOO_SOCKET_IFNAME={name}: that interface {what}. Leave it out, or give one of {theirs or 'none'}"
    return None


def leave_loopback(master_addr: str) -> None:
    """Let Gloo, in this process, listen where other machines reach it, unless GLOO_SOCKET_IFNAME says where.

    It listens at the host name's address, which on many systems is the loopback's. The variable stays set: groups that
    are made later need it as well.
    """
    if not hostname_is_loopback():
        return
    with suppress(OSError):
        route = routable(master_addr)
        if route.interface is not None and not route.loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", route.interface)


def split_endpoint(endpoint: str, default_port: int | None = None) -> tuple[str, int]:
    """The host and port of "host:port" or "[address]:port".

    Raises:
        ValueError: there is no port and no default, or it is none.
    """
    host, colon, port = endpoint.strip().rpartition(":")
    if not colon or "]" in port:
        host, port = endpoint.strip(), "" if default_port is None else str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 <= int(port) < 65536:
        raise ValueError(f"{endpoint!r} is not HOST:PORT: give a name or an address and a port, as in node0:29400")
    return host, int(port)


def join_endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def can_listen(port: int) -> bool:
    """Whether a server may open this port on all of this machine's addresses now; 0: any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does: a port in TIME_WAIT is free
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """Who listens at the port, as " by process 12 (python)"; empty where that cannot be seen."""
    with suppress(psutil.Error):  # other users' processes
        for connection in psutil.net_connections("tcp"):
            here = connection.laddr and connection.laddr.port == port
            if here and connection.status == psutil.CONN_LISTEN and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def plainly(error: OSError) -> str:
    """Why a machine is not reached, and what that usually means."""
    meanings = {
        errno.ECONNREFUSED: "nothing listens at that port there",
        errno.EHOSTUNREACH: "that machine does not answer in this network",
        errno.ENETUNREACH: "no interface of this machine leads there",
        errno.ENODEV: "no interface of this machine leads there",
    }
    if isinstance(error, socket.gaierror):
        return f"{error}: that name has no address on this machine"
    if isinstance(error, TimeoutError):
        return "no answer: the wrong address, or a firewall drops what is sent there"
    meaning = meanings.get(error.errno or 0)
    return f"{error}: {meaning}" if meaning else str(error)


def find_store(address: tuple[str, int], deadline: float, waiting: Callable[[str], None] | None = None) -> None:
    """Wait until a store answers. torch's own client waits for longer than its time-out and prints C++ frames.

    `waiting` is called with the reason after each look that found none.

    Raises:
        TimeoutError: at the deadline, with the reason.
    """
    pause, patience_s = 0.02, 1.0
    while True:
        try:
            if is_store(address, max(min(patience_s, deadline - time.monotonic()), 0.1)) or not can_tell_stores():
                return
            reason = "another program holds that port, or a store too busy to answer"
        except OSError as error:
            reason = plainly(error)
        if time.monotonic() + pause > deadline:
            raise TimeoutError(reason)
        if waiting is not None:
            waiting(reason)
        time.sleep(pause)
        pause, patience_s = min(2 * pause, 0.5), 2 * patience_s


def holds_store(port: int) -> bool:
    """Whether this very process listens at a port. False where the system does not tell."""
    return any(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for connection in _own_sockets(port, -1))


def bound_waits(port: int, limit_s: float) -> None:
    """Have this process's connections to a port of any machine fail when nothing comes back for that long. Linux only.

    torch's store waits for an answer for as long as the kernel tries to deliver the question: a quarter of an hour.
    """
    for connection in _own_sockets(-1, port):
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limit_s * 1000))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 5)):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _own_sockets(port: int, peers_port: int) -> Iterator[socket.socket]:
    """The sockets of this process, by their own or their peer's port, whoever in it opened them."""
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    for name in os.listdir("/proc/self/fd"):
        try:
            # A copy of the descriptor: options set on it are the connection's.
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed by now, or no socket
            continue
        with connection, suppress(OSError):
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            listens = connection.getsockname()[1] == port
            if listens or (peers_port >= 0 and connection.getpeername()[1] == peers_port):
                yield connection

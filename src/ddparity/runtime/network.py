"""Read this machine's addresses, interfaces and ports, find routes to other machines, and wait for torch's store."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from ..compat import is_store, recognises_stores
from ..system import own_descriptors

LOOPBACK = "127.0.0.1"
# An address that no machine has (RFC 5737): the route to it is the default route.
_ANYWHERE = "192.0.2.1"


@dataclass(frozen=True)
class Route:
    """How this machine reaches a host: the source address, and the interface that has it, if one does."""

    host: str
    address: str
    interface: str | None

    @property
    def loopback(self) -> bool:
        return is_loopback(self.address)


def route_to(host: str, port: int = 1) -> Route:
    """Return the source address and interface from which this machine reaches `host`. Nothing is sent.

    Raises:
        OSError: the host has no address, or there is no route to it; the error says which.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        source = str(probe.getsockname()[0])
    return Route(host, source, interface_of(source))


def external_route_to(host: str) -> Route:
    """Return a route as `route_to` does, but with a source address that other machines can reach, if there is one.

    On the machine that `host` names, that name may have the loopback's address. Then the default route counts, and
    without a default route the first interface that is up.

    Raises:
        OSError: the host has no address, or there is no route to it.
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
    """Return the interfaces that are up, each with its addresses, IPv4 first.

    Loopback and link-local addresses are left out, and so are interfaces that have no others.
    """
    import psutil  # here, since importing ddparity need not take longer for it

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in sorted(entries, key=lambda entry: entry.family != socket.AF_INET):
            internet = entry.family in (socket.AF_INET, socket.AF_INET6)
            if name in up and internet and "%" not in entry.address and not is_loopback(entry.address):
                found.setdefault(name, []).append(entry.address)
    return found


def interface_of(address: str) -> str | None:
    """Return the interface that has this address; None where there is none."""
    import psutil  # here, since importing ddparity need not take longer for it

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def is_this_machine(host: str) -> bool:
    """Return True if `host`, a name or an address, is this machine; False if the name has no address."""
    import psutil  # here, since importing ddparity need not take longer for it

    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    with suppress(OSError):
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        return any(address in own or is_loopback(address) for address in found)
    return False


def own_address(host: str) -> str | None:
    """Return the address of this machine that `host` names; None: it names another machine, or only the loopback."""
    own = {address for addresses in interfaces().values() for address in addresses}
    with suppress(OSError):
        return next((str(one[4][0]) for one in socket.getaddrinfo(host, None) if one[4][0] in own), None)
    return None


def hostname_address() -> str | None:
    """Return the address of this machine's own name, or None. Gloo listens there unless a variable says otherwise."""
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return None


def hostname_is_loopback() -> bool:
    """Return True if this machine's own name has no address that another machine can reach."""
    address = hostname_address()
    return address is None or is_loopback(address)


def interface_variables(route: Route, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that make Gloo and NCCL use the interface of `route`; empty where they need none.

    Gloo listens at the host name's address, and NCCL takes the first interface. The variables are needed if the name
    has the loopback's address, or if the machine has several interfaces. A variable that the user has set stays.
    """
    if route.interface is None or route.loopback:
        return {}
    if not hostname_is_loopback() and len(interfaces()) < 2:
        return {}
    # "=": NCCL reads a plain name as a prefix, and eth1 would also match eth10.
    wanted = {"GLOO_SOCKET_IFNAME": route.interface, "NCCL_SOCKET_IFNAME": f"={route.interface}"}
    return {name: value for name, value in wanted.items() if name not in environ}


def loopback_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that make Gloo and NCCL listen on the loopback alone, for a job on one machine.

    Gloo listens at the host name's address otherwise. A variable that the user has set stays.
    """
    name = interface_of(LOOPBACK)
    wanted = {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    return {name: value for name, value in wanted.items() if name not in environ}


def unreachable_interface(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return why the user's GLOO_SOCKET_IFNAME is wrong in a job of several nodes; None: it is right or not set."""
    up = interfaces()
    for name in filter(None, environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in up:
            theirs = "; ".join(f"{interface} ({', '.join(addresses)})" for interface, addresses in up.items())
            what = "is the loopback, which no other machine reaches" if name == "lo" else "is not up on this machine"
            instead = f", or give one of {theirs}" if theirs else ""
            return f"GLOO_SOCKET_IFNAME={name}: that interface {what}. Leave it out{instead}"
    return None


def set_gloo_interface(master_addr: str) -> None:
    """Make Gloo, in this process, listen where other machines can reach it, unless GLOO_SOCKET_IFNAME is set.

    Without the variable Gloo listens at the host name's address, which on many systems is the loopback's. The variable
    stays set, because process groups that are made later need it as well.
    """
    if not hostname_is_loopback():
        return
    with suppress(OSError):
        route = external_route_to(master_addr)
        if route.interface is not None and not route.loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", route.interface)


def split_endpoint(endpoint: str, default_port: int | None = None) -> tuple[str, int]:
    """Return the host and port of "host:port" or "[address]:port".

    Raises:
        ValueError: the port is not valid, or it is missing and there is no default.
    """
    host, colon, port = endpoint.strip().rpartition(":")
    if not colon or "]" in port:
        host, port = endpoint.strip(), "" if default_port is None else str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 <= int(port) < 65536:
        raise ValueError(f"{endpoint!r} is not HOST:PORT: give a name or an address, and a port, as in node0:29400")
    return host, int(port)


def join_endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen_at(address: str, port: int) -> socket.socket:
    """Return a socket that listens at one address of this machine. Port 0 is any free port.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT counts as free
        listener.bind((address, port))
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener


def process_at_port(port: int) -> str:
    """Return which process listens at the port, as " by process 12 (python)"; "" where the system does not show it."""
    import psutil  # here, since importing ddparity need not take longer for it

    with suppress(psutil.Error):  # other users' processes
        for connection in psutil.net_connections("tcp"):
            here = connection.laddr and connection.laddr.port == port
            if here and connection.status == psutil.CONN_LISTEN and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def describe_os_error(error: OSError) -> str:
    """Return why a machine could not be reached, with the usual meaning of that error."""
    meanings = {
        errno.ECONNREFUSED: "nothing listens at that port there",
        errno.EHOSTUNREACH: "that machine does not answer in this network",
        errno.ENETUNREACH: "no interface of this machine leads there",
        errno.ENODEV: "no interface of this machine leads there",
    }
    if isinstance(error, socket.gaierror):
        return f"{error}: that name has no address on this machine"
    if isinstance(error, TimeoutError):
        return "no answer: the address is wrong, or a firewall drops what is sent there"
    meaning = meanings.get(error.errno or 0)
    return f"{error}: {meaning}" if meaning else str(error)


def wait_for_store(address: tuple[str, int], deadline: float, waiting: Callable[[str], None] | None = None) -> None:
    """Wait until torch's store answers at (host, port).

    torch's own client waits for longer than its time-out, and prints C++ frames.

    Args:
        address: host and port.
        deadline: the latest time, of `time.monotonic`.
        waiting: called with the reason after each attempt that found no store.

    Raises:
        TimeoutError: there is no store at the deadline; the error gives the reason.
    """
    pause, patience_s = 0.02, 1.0
    while True:
        try:
            if is_store(address, max(min(patience_s, deadline - time.monotonic()), 0.1)) or not recognises_stores():
                return
            reason = "another program holds that port, or its store is too busy to answer"
        except OSError as error:
            reason = describe_os_error(error)
        if time.monotonic() + pause > deadline:
            raise TimeoutError(reason)
        if waiting is not None:
            waiting(reason)
        time.sleep(pause)
        pause, patience_s = min(2 * pause, 0.5), 2 * patience_s


def is_listening_at(port: int) -> bool:
    """Return True if this process listens at the port; False also where the system does not show it."""
    return any(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for connection in _own_sockets(port, -1))


def limit_tcp_waits(port: int, limit_s: float) -> None:
    """Make this process's connections to this port of any machine fail after `limit_s` without an answer. Linux only.

    Without it, torch's store waits for an answer as long as the kernel tries to deliver the request: 15 minutes.
    """
    for connection in _own_sockets(-1, port):
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limit_s * 1000))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 5)):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _own_sockets(port: int, peers_port: int) -> Iterator[socket.socket]:
    """Yield the sockets of this process that have this port of their own or this port at the peer.

    They include sockets that torch opened in C++.
    """
    for descriptor in own_descriptors():
        try:
            # A copy of the descriptor: an option set on it applies to the connection.
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed in the meantime, or not a socket
            continue
        with connection, suppress(OSError):
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            has_port = connection.getsockname()[1] == port
            if has_port or (peers_port >= 0 and connection.getpeername()[1] == peers_port):
                yield connection

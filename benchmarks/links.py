"""Networks of up to four machines on this one: namespaces joined by a link of a rate and a delay. It needs root.

The kernel's `tbf` limits the rate of a bridged pair of interfaces. It cannot delay packets, and `netem`, which can, is
a module that many kernels do not have. So a link with a delay is a process of this file that carries packets between
TUN devices: each leaves when those before it have been sent at the link's rate, and arrives after the delay.

python benchmarks/links.py --carry RATE DELAY NAMESPACE... (started by `joined`)
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

DEVICE = "link0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_CLONE_NEWNET = 0x40000000
_PACKET_BYTES = 65_000
_LONGEST_QUEUE_S = 1.0


@dataclass(frozen=True)
class Wire:
    """What joins the machines: bits a second that one can send, and the delay of a packet one way."""

    name: str
    bits_per_s: float
    delay_s: float = 0.0


@contextmanager
def joined(wire: Wire, count: int, prefix: str = "ddp") -> Iterator[list[tuple[str, str]]]:
    """Join `count` network namespaces, and yield the name and the address of each."""
    ends = [(f"{prefix}{number}", f"10.79.0.{number + 1}") for number in range(count)]
    hub, carrier = f"{prefix}hub", None
    try:
        for name, _ in ends:
            _run(f"ip netns add {name}")
            _run(f"ip -n {name} link set lo up")
        if wire.delay_s:
            carrier = _carrier(wire, [name for name, _ in ends])
        else:
            _bridge(wire, hub, [name for name, _ in ends])
        for name, address in ends:
            _run(f"ip -n {name} address add {address}/24 dev {DEVICE}")
            _run(f"ip -n {name} link set {DEVICE} up")
        yield ends
    finally:
        if carrier is not None:
            carrier.kill()
            carrier.wait()
        for name in (hub, *(name for name, _ in ends)):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, timeout=20)


def _bridge(wire: Wire, hub: str, names: Sequence[str]) -> None:
    _run(f"ip netns add {hub}")
    _run(f"ip -n {hub} link add bridge0 type bridge")
    _run(f"ip -n {hub} link set bridge0 up")
    for number, name in enumerate(names):
        _run(f"ip link add port{number} netns {hub} type veth peer name {DEVICE} netns {name}")
        _run(f"ip -n {hub} link set port{number} master bridge0 up")
        rate = f"rate {wire.bits_per_s:.0f}bit burst 256kb latency 50ms"
        _run(f"tc -n {name} qdisc add dev {DEVICE} root tbf {rate}")


def _carrier(wire: Wire, names: Sequence[str]) -> subprocess.Popen[bytes]:
    words = ["--carry", str(wire.bits_per_s), str(wire.delay_s), *names]
    carrier = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE)
    assert carrier.stdout is not None
    if carrier.stdout.readline() != b"ready\n":
        raise OSError("no TUN devices here: a link with a delay needs /dev/net/tun and root")
    return carrier


def carry(bits_per_s: float, delay_s: float, names: Sequence[str]) -> None:
    """Carry packets between the namespaces until this process is killed."""
    devices = [_open_device(name) for name in names]
    print("ready", flush=True)
    poll = select.epoll()
    for device in devices:
        poll.register(device, select.EPOLLIN)
    free = dict.fromkeys(devices, 0.0)  # when a machine has sent what it has
    under_way: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else -1
        for device, _ in poll.poll(wait):
            packet = os.read(device, _PACKET_BYTES + 100)
            now = time.monotonic()
            target = packet[19] - 1 if packet[0] >> 4 == 4 else -1  # the last byte of an IPv4 address
            if not 0 <= target < len(devices) or free[device] - now > _LONGEST_QUEUE_S:
                continue
            free[device] = max(free[device], now) + 8 * len(packet) / bits_per_s
            heapq.heappush(under_way, (free[device] + delay_s, number, devices[target], packet))
            number += 1
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(under_way)
            os.write(target, packet)


def _open_device(name: str) -> int:
    """Make a TUN device in a namespace, and return its descriptor; this process stays in that namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {name}")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    _run(f"ip link set {DEVICE} mtu {_PACKET_BYTES} up")
    return device


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--carry", nargs="+", required=True, metavar=("RATE DELAY", "NAMESPACE"))
    rate, delay, *namespaces = parser.parse_args().carry
    carry(float(rate), float(delay), namespaces)

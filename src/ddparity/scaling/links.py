"""What a collective moves, and how long that takes over a link. Pure functions of sizes and times.

N ranks reduce n bytes; a round is a message that must arrive before the next one is sent.

    kind         rounds            bytes that a rank sends
    all-to-all   1                 (N - 1) n                  whole copies, directly: short tensors on the CPU
    all-gather   N - 1             (N - 1) n                  whole copies, from rank to rank
    ring         2 (N - 1)         2 (N - 1) / N · n          all-reduce, as of Gloo, and of NCCL on few ranks
    tree         2 ceil(log2 N)    2 (N - 1) / N · n          all-reduce of NCCL on many ranks: a double binary tree
    slices       2                 (rows + 1) (N - 1) / N · n the strict reduction's exchange of a tree's slices
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all-to-all", "all-gather", "ring", "tree", "slices"]


@dataclass(frozen=True)
class Link:
    """How a rank reaches the others: `latency_s` for one message one way, `bytes_per_s` that one rank can send."""

    name: str
    bytes_per_s: float
    latency_s: float


HERE = Link("this machine", math.inf, 0.0)  # what was measured between its processes, and nothing on top

_BITS = {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_LINK = re.compile(r"([\d.]+) ?([A-Za-z]+)(?:/s)? ?, ?([\d.]+) ?([a-zµμ]+)")


def read_link(text: str) -> Link:
    """Return the link that a text such as "25Gbit,20us" describes: the bandwidth, in bits or bytes, and the latency.

    Raises:
        ValueError: the text is none, or a number of it is not positive.
    """
    found = _LINK.fullmatch(text.strip())
    example = "give a bandwidth and the latency of one message, as in 25Gbit,20us or 3GB/s,20us"
    if found is None:
        raise ValueError(f"--link {text}: {example}")
    number, unit, latency, time_unit = found.groups()
    plain = f"{unit[:-3]}bit" if unit.endswith("bps") else unit.removesuffix("ps")  # a small b is a bit
    bits = _BITS.get(plain.lower())
    size = _BYTES.get(plain.lower()) if plain.endswith("B") else None
    if (bits is None and size is None) or time_unit not in _SECONDS:
        unknown = unit if bits is None and size is None else time_unit
        raise ValueError(
            f"--link {text}: the unit {unknown} is unknown: bandwidths are in Mbit, Gbit, MB or GB a second, "
            f"latencies in s, ms, us or ns"
        )
    try:
        rate = float(number) * (bits / 8 if bits is not None else float(size or 0))
        seconds = float(latency) * _SECONDS[time_unit]
    except ValueError:
        raise ValueError(f"--link {text}: {example}") from None
    if rate <= 0:
        raise ValueError(f"--link {text}: a bandwidth must be more than 0")
    return Link(text.strip(), rate, seconds)


@dataclass(frozen=True)
class Traffic:
    """What one collective does. `rounds` follow each other; `messages` and `sent_bytes` are those of one rank."""

    kind: Kind
    rounds: int
    messages: int
    sent_bytes: float


def all_to_all(size: float, ranks: int) -> Traffic:
    return Traffic("all-to-all", min(1, ranks - 1), ranks - 1, (ranks - 1) * size)


def all_gather(size: float, ranks: int) -> Traffic:
    return Traffic("all-gather", ranks - 1, ranks - 1, (ranks - 1) * size)


def ring(size: float, ranks: int) -> Traffic:
    return Traffic("ring", 2 * (ranks - 1), 2 * (ranks - 1), 2 * (ranks - 1) / ranks * size)


def tree(size: float, ranks: int) -> Traffic:
    rounds = 2 * math.ceil(math.log2(ranks))
    return Traffic("tree", rounds, rounds, 2 * (ranks - 1) / ranks * size)


def slices(size: float, ranks: int, rows: int = 1) -> Traffic:
    """`rows`: whole subtrees of the strict reduction's tree in one rank's share, each as large as the gradients."""
    return Traffic("slices", 2 * min(1, ranks - 1), 2 * (ranks - 1), (rows + 1) * (ranks - 1) / ranks * size)


def halves(size: float, ranks: int, rows: int = 1) -> tuple[Traffic, Traffic]:
    """The two rounds of `slices`: those of the subtrees, and that of their sum."""
    rounds, share = min(1, ranks - 1), (ranks - 1) / ranks * size
    return Traffic("slices", rounds, ranks - 1, rows * share), Traffic("slices", rounds, ranks - 1, share)


@dataclass(frozen=True)
class Cost:
    """What a kind of collective took on this machine, in seconds: `fixed_s` + `byte_s` for each byte that a rank sent.

    `rounds`, `messages`: those of the measured collective.
    """

    fixed_s: float
    byte_s: float
    rounds: int
    messages: int


@dataclass(frozen=True)
class Machine:
    """How fast this machine's processes exchange tensors.

    `costs`: by kind; "tree" has those of "ring". `message_s`: what one more message of an exchange takes.
    `gloo`: whether tensors are on the CPU.
    """

    costs: Mapping[Kind, Cost]
    message_s: float
    gloo: bool

    def slowed(self, factor: float) -> Machine:
        """Return this machine with all its work taking `factor` times as long, as where processes share cores."""
        costs = {
            kind: dataclasses.replace(one, fixed_s=one.fixed_s * factor, byte_s=one.byte_s * factor)
            for kind, one in self.costs.items()
        }
        return dataclasses.replace(self, costs=costs, message_s=self.message_s * factor)


@dataclass(frozen=True)
class Time:
    """The seconds of a collective: `software_s` of the processes' own work, `latency_s` and `wire_s` of the link.

    `wire_s` is what the link's bandwidth adds to the processes' own time for the bytes, since both go on at once.
    """

    software_s: float = 0.0
    latency_s: float = 0.0
    wire_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.software_s + self.latency_s + self.wire_s

    def __add__(self, other: Time) -> Time:
        return Time(self.software_s + other.software_s, self.latency_s + other.latency_s, self.wire_s + other.wire_s)

    def times(self, factor: float) -> Time:
        return Time(self.software_s * factor, self.latency_s * factor, self.wire_s * factor)


def time_of(traffic: Traffic, machine: Machine, link: Link) -> Time:
    """Return the time of a collective over a link.

    Rounds take the machine's time each, one after the other. An exchange's messages are sent together: each one above
    those of the measurement takes `message_s`.
    """
    if traffic.rounds == 0:
        return Time()
    cost = machine.costs["ring" if traffic.kind == "tree" else traffic.kind]
    fixed = cost.fixed_s * traffic.rounds / cost.rounds
    if traffic.kind in ("all-to-all", "slices"):
        fixed += max(0, traffic.messages - cost.messages * traffic.rounds / cost.rounds) * machine.message_s
    own = cost.byte_s * traffic.sent_bytes
    wire = traffic.sent_bytes / link.bytes_per_s
    # Gloo sends once the other rank has said that it receives: in each exchange, in a ring before the first message.
    ready = 0 if not machine.gloo else traffic.rounds if traffic.kind in ("all-to-all", "slices") else 1
    return Time(fixed + own, (traffic.rounds + ready) * link.latency_s, max(0.0, wire - own))

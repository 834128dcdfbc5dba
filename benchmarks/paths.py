"""Measure what each fast path of a training step wins: a step without it over a step with it, on two processes.

python benchmarks/paths.py [--rounds 5] [--launches 3] [--wire] [--quick]

`--wire` measures a large model between two network namespaces, too (as root): over loopback on two cores a backward has
no idle core to hide an exchange behind.

The other fast paths have rows in the sections of the other scripts: the compiled batch norm ("reference" in
sync_batchnorm.py), the Triton kernels (on a GPU), and how a wait is spent (scheduling.py).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from contenders import WITHOUT, Contender
from links import joined
from results import machine, publish, table
from sizes import WIRES, Times, measured_anew, ratio

MODELS = ("MLP", "MLP of 67 k", "CNN", "MLP of 1 M", "ResNet-18")
OF_WIRE = "ResNet-18"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of a launch")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--wire", action="store_true", help="also between two network namespaces")
    parser.add_argument(
        "--quick", action="store_true", help="run one launch of two short rounds, and print the results only"
    )
    options = parser.parse_args()
    rounds, launches = (2, 1) if options.quick else (options.rounds, options.launches)
    facts = machine()

    def measure(models: Sequence[str], hosts: Sequence[tuple[str, str]] | None = None) -> dict[str, Times]:
        names = ("plain", "ddparity", *WITHOUT)
        start = {name: functools.partial(Contender, name, 2, hosts=hosts) for name in names}
        return measured_anew(start, models, rounds, launches, options.quick)

    found = measure(MODELS)
    if options.wire:
        wire = WIRES[0]
        with joined(wire, 2) as hosts:
            found[f"{OF_WIRE}, {wire.name}"] = measure([OF_WIRE], hosts)[OF_WIRE]
    rows = [[name, *(ratio(times, name, "ddparity") for times in found.values())] for name in WITHOUT]
    how = (
        f"`paths.py`, 2 processes over Gloo, medians of {rounds * launches} rounds with quartiles, {launches} "
        f"launches: the time of a step without one of the fast paths, over that with all of them, of the same round. "
        f"Above 1: what the path wins."
    )
    publish("paths", ["## What each fast path wins", facts, how, table(["", *found], rows)], options.quick)


if __name__ == "__main__":
    main()

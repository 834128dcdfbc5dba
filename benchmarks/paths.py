"""Measure what each fast path of a training step wins: a step without it over a step with it, on two processes.

python benchmarks/paths.py [--rounds 5] [--launches 3] [--quick]

The other fast paths have rows in the sections of the other scripts: the compiled batch norm ("reference" in
sync_batchnorm.py), the Triton kernels (on a GPU), and how a wait is spent (scheduling.py).
"""

from __future__ import annotations

import argparse
import functools

from contenders import WITHOUT, Contender
from results import machine, publish, table
from sizes import measured_anew, ratio

MODELS = ("MLP", "MLP of 67 k", "CNN", "MLP of 1 M", "ResNet-18")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of a launch")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="run one launch of two short rounds, and print the results only"
    )
    options = parser.parse_args()
    rounds, launches = (2, 1) if options.quick else (options.rounds, options.launches)
    facts = machine()
    start = {name: functools.partial(Contender, name, 2) for name in ("plain", "ddparity", *WITHOUT)}
    found = measured_anew(start, MODELS, rounds, launches, options.quick)
    rows = [[name, *(ratio(found[model], name, "ddparity") for model in MODELS)] for name in WITHOUT]
    how = (
        f"`paths.py`, 2 processes over Gloo, medians of {rounds * launches} rounds with quartiles, {launches} "
        f"launches: the time of a step without one of the fast paths, over that with all of them, of the same round. "
        f"Above 1: what the path wins."
    )
    publish("paths", ["## What each fast path wins", facts, how, table(["", *MODELS], rows)], options.quick)


if __name__ == "__main__":
    main()

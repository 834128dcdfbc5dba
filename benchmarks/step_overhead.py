"""Measure the time of a whole training step: DDP written by hand, ddparity, Accelerate and Lightning Fabric.

python benchmarks/step_overhead.py [--rounds 20] [--steps 30] [--quick]

A round runs a number of steps of each contender (contenders.py), in an order that rotates from round to round. A
contender's ratio is its time over that of plain DDP in the same round, so a load on the machine that is longer than a
round slows both. Plain DDP runs twice: the ratio of the second to the first is the noise. `--quick` checks that
everything runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time

from contenders import KINDS, Case, Contender, measured
from results import COSTS_PAGE, machine, spread, table, write_section

BEFORE = "ddparity before"
MODELS = ("MLP", "CNN")
CONTENDERS = ("plain", "plain again", "ddparity", "Accelerate", "Fabric")


def measure(cases: list[Case], nproc: int, rounds: int, before: str | None = None) -> list[dict[str, list[float]]]:
    """Return the milliseconds of a step, for each case, by contender and round."""
    contenders = {name: Contender(name, nproc) for name in CONTENDERS}
    if before is not None:
        contenders[BEFORE] = Contender("ddparity", nproc, before)
    try:
        return [measured(contenders, case, rounds) for case in cases]
    finally:
        for contender in contenders.values():
            contender.close()


def report(
    facts: str, measured: dict[int, list[dict[str, list[float]]]], cases: list[Case], rounds: int, steps: int
) -> str:
    sizes = ", ".join(f"{name} {KINDS[name].parameters():,}" for name in MODELS)
    parts = [
        "## Cost of a training step",
        facts,
        f"`step_overhead.py`, medians of {rounds} interleaved rounds with quartiles; a round is an epoch of {steps} "
        f"steps; each contender has processes of its own. Milliseconds a step of DDP written by hand, then each "
        f"contender's time over this time in the same round; “plain again” is the first column once more, and shows "
        f"the noise. Micro-batches of {KINDS['MLP'].micro_batch}, K of them a step on each rank, Gloo, SGD; "
        f"parameters: {sizes}. One process does not use DDP.",
    ]
    names = list(itertools.islice(next(iter(measured.values()))[0], 1, None))
    for loads, title in ((True, "Loader included"), (False, "Batches in memory")):
        rows = []
        for nproc, results in measured.items():
            for case, times in zip(cases, results, strict=True):
                if case.loads == loads:
                    cells = [f"{case.model}, {nproc} process{'es' if nproc > 1 else ''}, K = {case.micro_batches}"]
                    cells.append(spread(times["plain"]))
                    for name in itertools.islice(times, 1, None):
                        cells.append(spread([a / b for a, b in zip(times[name], times["plain"], strict=True)]))
                    rows.append(cells)
        parts += [f"### {title}", table(["", "plain, ms", *names], rows)]
    return "\n\n".join(parts)


def summary(text: str) -> str:
    """Return the part of `report` that docs/costs.md shows: steps with the loader, on 2 processes."""
    loaded = re.search(r"### Loader included\n\n(.*?)(?=\n\n|\Z)", text, re.DOTALL)
    assert loaded
    return "\n".join(line for line in loaded[1].splitlines() if "1 process," not in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30, help="steps of a round")
    parser.add_argument("--nproc", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="run two short rounds, and print the results only")
    parser.add_argument("--before", metavar="SRC", help="an older ddparity's folder, as one more contender")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 2, 3
    cases = [
        Case(model, count, loads, options.steps) for model in MODELS for count in (1, 4) for loads in (True, False)
    ]
    facts, start = machine("accelerate", "lightning-fabric"), time.monotonic()
    measured = {nproc: measure(cases, nproc, options.rounds, options.before) for nproc in options.nproc}
    text = report(facts, measured, cases, options.rounds, options.steps)
    print(text)
    print(f"\n{time.monotonic() - start:.0f} s")
    if not options.quick and options.before is None:
        write_section("step_overhead", text)
        write_section("step_overhead", summary(text), COSTS_PAGE)


if __name__ == "__main__":
    main()

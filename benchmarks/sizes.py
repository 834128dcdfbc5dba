"""Measure a training step by the size of the model: two processes, against DDP by hand and against one process.

python benchmarks/sizes.py [--rounds 5] [--launches 3] [--busy] [--wires] [--models "MLP of 1 M,GPT of 10 M"] [--quick]

The contenders of contenders.py, each in processes of its own, train the same batches in turns. Each launch starts them
anew: where a process's memory lies, and on which core it runs, moves its times for as long as it lives. Of DDP's
exposed communication, which is its step less that of one process, a share is left of ours. `--busy` measures beside a
loop that keeps the first core busy; `--wires` between two network namespaces, joined by 1 Gbit/s and by 200 Mbit/s (as
root).
`--quick` checks that everything runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from contenders import KINDS, Case, Contender, measured
from links import Wire, joined
from results import machine, publish, spread, table

WIRES = (Wire("1 Gbit/s", 1e9), Wire("200 Mbit/s", 200e6))
OF_WIRES = ("MLP of 67 k", "MLP of 1 M", "GPT of 10 M")
ROUND_S = 0.5  # of plain DDP, about
CONTENDERS = ("plain", "ddparity", "strict", "Accelerate", "Fabric")
OVER_WIRES = ("plain", "ddparity", "strict")
ALONE = {"one process": "plain", "ours alone": "ddparity"}
Times = dict[str, list[float]]


def measure(models: Sequence[str], rounds: int, launches: int, quick: bool) -> dict[str, Times]:
    """Return the milliseconds of a step by model, contender and round of all launches, on this machine."""
    several = {name: functools.partial(Contender, name, 2) for name in CONTENDERS}
    alone = {name: functools.partial(Contender, one, 1) for name, one in ALONE.items()}
    return measured_anew(several | alone, models, rounds, launches, quick)


def measure_between(wire: Wire, models: Sequence[str], rounds: int, launches: int, quick: bool) -> dict[str, Times]:
    """As `measure`, with the two ranks in two network namespaces."""
    with joined(wire, 2) as hosts:
        several = {name: functools.partial(Contender, name, 2, hosts=hosts) for name in OVER_WIRES}
        alone = {"one process": functools.partial(Contender, "plain", 1)}
        return measured_anew(several | alone, models, rounds, launches, quick)


def measured_anew(
    start: dict[str, Callable[[], Contender]], models: Sequence[str], rounds: int, launches: int, quick: bool
) -> dict[str, Times]:
    """Return the milliseconds by model and contender, which `start` makes anew for each launch."""
    found: dict[str, Times] = {model: {name: [] for name in start} for model in models}
    for _ in range(launches):
        contenders: dict[str, Contender] = {}
        try:
            contenders.update((name, begin()) for name, begin in start.items())
            for model in models:
                steps = 2 if quick else _steps(contenders, model)
                # In one process there are half of the samples, so its weights are others.
                case = Case(model, 1, False, steps)
                for name, times in measured(contenders, case, rounds, ("one process", "ours alone")).items():
                    found[model][name] += times
        finally:
            for contender in contenders.values():
                contender.close()
    return found


def _steps(contenders: dict[str, Contender], model: str) -> int:
    """Return how many steps make a round."""
    times = measured({"plain": contenders["plain"]}, Case(model, 1, False, 3), 2)
    return max(3, min(200, round(ROUND_S * 1e3 / min(times["plain"]))))


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep the first core busy."""
    loop = subprocess.Popen(["taskset", "-c", "0", sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def ratio(times: Times, one: str, other: str) -> str:
    """Return the spread of one contender's times over another's."""
    return spread([a / b for a, b in zip(times[one], times[other], strict=True)])


def _exposed(times: Times) -> str:
    """Return how much of DDP's exposed communication is left of ours; a dash where DDP's is not above the noise."""
    rows = zip(times["ddparity"], times["plain"], times["one process"], strict=True)
    shares = [(ours - alone) / (plain - alone) for ours, plain, alone in rows if plain > 1.05 * alone]
    return spread(shares) if len(shares) > len(times["plain"]) / 2 else "–"


def report(found: dict[str, Times]) -> str:
    """Return the table of steps on this machine."""
    head = ["", "parameters", "plain, ms", "ddparity", "exposed", "strict / fast", "alone / plain loop"]
    rows = [
        [
            model,
            f"{KINDS[model].parameters():,}",
            spread(times["plain"]),
            ratio(times, "ddparity", "plain"),
            _exposed(times),
            ratio(times, "strict", "ddparity"),
            ratio(times, "ours alone", "one process"),
            ratio(times, "Accelerate", "plain"),
            ratio(times, "Fabric", "plain"),
        ]
        for model, times in found.items()
    ]
    return table([*head, "Accelerate", "Fabric"], rows)


def report_between(wire: Wire, found: dict[str, Times]) -> str:
    """Return the table of steps over a wire: the time over the larger of computing and sending the gradients once."""
    rows = []
    for model, times in found.items():
        # Of two ranks each sends its gradients once, whole, in an all-reduce.
        sent_ms = 4 * KINDS[model].parameters() * 8 / wire.bits_per_s * 1e3
        least = [max(sent_ms, alone) for alone in times["one process"]]
        cells = [
            spread([a / b for a, b in zip(times[one], least, strict=True)]) for one in ("plain", "ddparity", "strict")
        ]
        rows.append([model, spread(times["one process"]), f"{sent_ms:.2f}", *cells])
    return table(["", "one process, ms", "sending, ms", "plain", "ddparity", "strict"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of a launch")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--models", type=lambda text: text.split(","), default=[one for one in KINDS if one != "CNN"])
    parser.add_argument("--busy", action="store_true", help="beside a loop that keeps the first core busy")
    parser.add_argument("--wires", action="store_true", help="between two network namespaces")
    parser.add_argument(
        "--quick", action="store_true", help="run one launch of two short rounds, and print the results only"
    )
    options = parser.parse_args()
    rounds, launches = (2, 1) if options.quick else (options.rounds, options.launches)
    facts, start = machine("accelerate", "lightning-fabric"), time.monotonic()
    how = (
        f"medians of {rounds * launches} rounds with quartiles, {launches} launches; contenders in "
        f"processes of their own, in turns. One micro-batch a "
        f"rank and step, batches in memory, Gloo, SGD."
    )
    if options.wires:
        parts = ["## A step between two machines, by size", facts]
        parts.append(
            f"`sizes.py --wires`, {how} A step's time over the larger of two: that of one process, and that of sending "
            f"the gradients once at the link's rate."
        )
        for wire in WIRES:
            models = [model for model in options.models if model in OF_WIRES]
            parts += [
                f"### {wire.name}",
                report_between(wire, measure_between(wire, models, rounds, launches, options.quick)),
            ]
        name = "sizes_wires"
    else:
        name = "sizes_busy" if options.busy else "sizes"
        beside = " beside a busy loop on one core" if options.busy else ""
        parts = [f"## A step{beside}, by size", facts]
        parts.append(
            f"`sizes.py{' --busy' if options.busy else ''}`, {how} Two processes, times over plain DDP's of the same "
            f"round. “exposed” is what of DDP's time beyond one process is left of ours; the last ones are the same "
            f"work by Accelerate and Fabric."
        )
        with busy() if options.busy else contextlib.nullcontext():
            parts.append(report(measure(options.models, rounds, launches, options.quick)))
    publish(name, parts, options.quick)
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

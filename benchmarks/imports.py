"""Measure how long `import ddparity` takes over `import torch`.

python benchmarks/imports.py [--rounds 15]

Each import is in a process of its own, in turns. Processor time is that of the process, in the program and in the
system; other programs that run on the machine change it little.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from results import machine, spread, table, write_section

CONTENDERS = {
    "torch": "import torch",
    "torch again": "import torch",
    "ddparity": "import torch, ddparity",
    "ddparity and all that it imports later": "import torch; from ddparity import *",
}


def measured(program: str) -> tuple[float, float]:
    """Return the seconds of the clock and of the processor that a program takes."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    clock, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return clock, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    where = machine()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for number in range(options.rounds + 1):
        for name, program in list(CONTENDERS.items())[:: 1 if number % 2 else -1]:
            times = measured(program)
            if number:  # the first round reads the files from the disk
                found[name].append(times)
    base = found["torch"]
    rows = []
    for name, times in found.items():
        cells = [name]
        for kind in (1, 0):
            cells.append(spread([one[kind] for one in times]))
            cells.append(spread([one[kind] / of_torch[kind] for one, of_torch in zip(times, base, strict=True)]))
        rows.append(cells)
    head = ["import", "processor, s", "to torch's", "clock, s", "to torch's"]
    text = "\n\n".join(
        [
            "## Import",
            f"{where} `imports.py`, each in a process of its own: medians and quartiles of {options.rounds} "
            f"interleaved rounds.",
            table(head, rows),
        ]
    )
    print(text)
    write_section("imports", text)


if __name__ == "__main__":
    main()

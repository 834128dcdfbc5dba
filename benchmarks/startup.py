"""Measure how long a job takes that does nothing, with `ddparity run` and torchrun, from the command to its end.

python benchmarks/startup.py [--rounds 15]

The script imports torch, joins a group over Gloo, all-reduces one number and ends. One round starts each contender once
for 1, 2 and 4 processes, in turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from results import machine, spread, table, write_section

SCRIPT = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
"""
BIN = Path(sys.executable).parent
CONTENDERS = {
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node"],
    "torchrun again": [str(BIN / "torchrun"), "--nproc-per-node"],
    "ddparity run": [str(BIN / "ddparity"), "run", "--nproc"],
}
SIZES = (1, 2, 4)


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    where = machine()
    measured: dict[tuple[str, int], list[float]] = {(name, size): [] for name in CONTENDERS for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "nothing.py"
        script.write_text(SCRIPT)
        for number in range(options.rounds + 1):
            for size in SIZES:
                for name, command in list(CONTENDERS.items())[:: 1 if number % 2 else -1]:
                    took = seconds([*command, str(size), str(script)])
                    if number:  # the first round reads the files from the disk
                        measured[name, size].append(took)
    rows = []
    for size in SIZES:
        base = np.array(measured["torchrun", size])
        ratios = [spread(np.array(measured[name, size]) / base) for name in list(CONTENDERS)[1:]]
        rows.append([f"{size} process{'es' * (size > 1)}", f"{spread(base)} s", *ratios])
    text = (
        f"## Start-up: a job that does nothing (`startup.py`)\n\n{where} Medians and quartiles of {options.rounds} "
        f"interleaved rounds, from the command to its end; ratios are to torchrun of the same round.\n\n"
        + table(["", "torchrun", *list(CONTENDERS)[1:]], rows)
    )
    write_section("startup", text)
    print(text)


if __name__ == "__main__":
    main()

"""Measure the cost of the strict reduction: the time of a whole step beside fast, bytes on the wire, peak memory.

python benchmarks/strict.py [--rounds 30] [--steps 20] [--link] [--quick]

There are two processes. The contenders run in the same processes, each with its own copy of one model, and take turns
in each round. A ratio is that of two times of the same round; a second copy of fast shows the noise. Bytes are those
that the kernel counts on the TCP connections of a process. Peak memory is measured in new processes, above the memory
before the first step. `--link` (as root) repeats the times between two network namespaces, joined by a link of 200
Mbit/s, which are like two machines. `--quick` checks that everything runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ddparity as dp
from contenders import KINDS, cnn, mlp
from ddparity.comm.allreduce import exchange
from ddparity.compat import all_gather_single
from results import machine, publish, spread, table

MICRO_BATCH = KINDS["MLP"].micro_batch
CONTENDERS = {"fast": "fast", "fast again": "fast", "strict": "strict"}
RATE_MBIT = 200


def cnn_with_batch_norm() -> nn.Module:
    layers = list(cnn())
    return nn.Sequential(layers[0], nn.BatchNorm2d(16), *layers[1:4], nn.BatchNorm2d(32), *layers[4:])


def wide() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.Linear(1500, 10))


MODELS = {"MLP": mlp, "CNN": cnn, "CNN, BatchNorm": cnn_with_batch_norm, "wide MLP": wide}


@dataclass(frozen=True)
class Case:
    """One row of the table. `micro_batches`: on each rank in a step."""

    model: str
    micro_batches: int


CASES = [Case(model, count) for model in MODELS for count in (1, 4)]
Measured = dict[str, dict[str, Any]]  # contender: "ms", a step's time in each round; "bytes", received in a step


SIZES = [300_000, 2_400_000]  # floats


def measure_exchange(rounds: int) -> list[Measured]:
    """Return, for each size, the milliseconds of an all-reduce, and of two ways to exchange slices and their sums."""
    torch.set_num_threads(1)
    with dp.world(device="cpu"):
        return [_exchange_measured(numel, rounds) for numel in SIZES]


def _exchange_measured(numel: int, rounds: int) -> Measured:
    own, parts, total = torch.randn(3, dist.get_world_size(), numel // dist.get_world_size())
    group = dist.group.WORLD
    assert group is not None

    def all_reduce() -> None:
        dist.all_reduce(own.zero_())

    def reference() -> None:
        dist.all_to_all_single(parts.view(-1), own.view(-1))
        all_gather_single(total.view(-1), parts[0])

    def point_to_point() -> None:
        exchange([[one] for one in own], [[one] for one in parts], group)
        exchange([[parts[0]]] * len(total), [[one] for one in total], group)

    ways = {"all-reduce": all_reduce, "all-to-all, all-gather": reference, "point to point": point_to_point}
    found: Measured = {name: {"ms": []} for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            way()
            dist.barrier()
            found[name]["ms"].append((time.perf_counter() - start) * 1e3)
    return {name: {"ms": values["ms"][1:]} for name, values in found.items()}


class Training:
    """One contender: its model, its optimizer, and the batches of a step in memory."""

    def __init__(self, case: Case, reduction: Any, first: nn.Module) -> None:
        self.model = dp.replicate(copy.deepcopy(first), reduction)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        x = torch.randn(case.micro_batches, MICRO_BATCH, 1, 8, 8)
        self.batches = list(zip(x, torch.randint(10, (case.micro_batches, MICRO_BATCH)), strict=True))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            for micro in dp.accumulate(self.model, self.batches, equal_counts=True):
                x, y = micro.data
                (F.cross_entropy(self.model(x), y) * micro.weight).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def measure(cases: list[Case], rounds: int, steps: int) -> list[Measured]:
    """Return the measurements of each case. Every rank calls it."""
    torch.set_num_threads(1)
    with dp.world(device="cpu"):
        return [_measured(case, rounds, steps) for case in cases]


def _measured(case: Case, rounds: int, steps: int) -> Measured:
    torch.manual_seed(0)
    first = MODELS[case.model]()
    runs = {name: Training(case, reduction, first) for name, reduction in CONTENDERS.items()}
    found: Measured = {}
    for name, training in runs.items():
        training.run(3)  # DDP orders its buckets in the first steps
        before = received()
        training.run(2)
        found[name] = {"ms": [], "bytes": (received() - before) / 2}
    order = list(runs)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            dist.barrier()
            start = time.perf_counter()
            runs[name].run(steps)
            found[name]["ms"].append((time.perf_counter() - start) * 1e3 / steps)
    return found


def received() -> int:
    """Return how many bytes all TCP connections of this process have received, as counted by the kernel (TCP_INFO)."""
    total = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        if not (descriptor.is_symlink() and os.readlink(descriptor).startswith("socket:")):
            continue
        with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                total += int.from_bytes(info[128:136], sys.byteorder)  # tcpi_bytes_received
    return total


def peak_mib(case: Case, reduction: str) -> float:
    """Return the peak of resident memory in three steps, in MiB, above the memory before the first step."""
    torch.set_num_threads(1)
    with dp.world(device="cpu"):
        training = Training(case, reduction, MODELS[case.model]())
        gc.collect()
        before = _status_kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # set VmHWM to the present size
        training.run(3)
        return (_status_kib("VmHWM") - before) / 1024


def _status_kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


@contextlib.contextmanager
def link() -> Iterator[list[tuple[str, str]]]:
    """Join two network namespaces by a slow link, and yield the name and the address of each."""
    ends = [(f"strict{number}", f"10.77.0.{number + 1}") for number in range(2)]

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True)

    try:
        for name, _ in ends:
            run(f"ip netns add {name}")
        run(f"ip link add veth0 netns {ends[0][0]} type veth peer name veth0 netns {ends[1][0]}")
        for name, address in ends:
            run(f"ip -n {name} address add {address}/24 dev veth0")
            for device in ("lo", "veth0"):
                run(f"ip -n {name} link set {device} up")
            run(f"tc -n {name} qdisc add dev veth0 root tbf rate {RATE_MBIT}mbit burst 256kb latency 50ms")
        yield ends
    finally:
        for name, _ in ends:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def measure_over_link(cases: list[Case], rounds: int, steps: int) -> dict[str, list[Measured]]:
    """Run `measure` and `measure_exchange` with one process in each namespace, and return the results of rank 0."""
    with tempfile.TemporaryDirectory() as folder, link() as ends:
        processes = []
        for rank, (name, _) in enumerate(ends):
            job = {
                "cases": [asdict(case) for case in cases],
                "rounds": rounds,
                "steps": steps,
                "out": f"{folder}/{rank}",
            }
            placement = {
                "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank,
                "MASTER_ADDR": ends[0][1], "MASTER_PORT": 29511, "GLOO_SOCKET_IFNAME": "veth0", "OMP_NUM_THREADS": 1,
            }  # fmt: skip
            command = ["ip", "netns", "exec", name, sys.executable, __file__, "--job", json.dumps(job)]
            env = {**os.environ, **{key: str(value) for key, value in placement.items()}}
            processes.append(subprocess.Popen(command, env=env))
        try:
            assert [process.wait(600) for process in processes] == [0, 0], "a process failed"
        finally:
            for process in processes:
                process.kill()
        return json.loads(Path(f"{folder}/0").read_text())  # type: ignore[no-any-return]  # what `_work` wrote


def _work(job: dict[str, Any]) -> None:
    """Measure in one process of a namespace, and write the results to a file."""
    cases = [Case(**case) for case in job["cases"]]
    found = {"steps": measure(cases, job["rounds"], job["steps"]), "exchange": measure_exchange(job["rounds"])}
    Path(job["out"]).write_text(json.dumps(found))


def times_table(cases: list[Case], measured: list[Measured]) -> str:
    rows = []
    for case, found in zip(cases, measured, strict=True):
        fast = found["fast"]["ms"]
        cells = [f"{case.model}, K = {case.micro_batches}", spread(fast)]
        for name in ("fast again", "strict"):
            cells.append(spread([a / b for a, b in zip(found[name]["ms"], fast, strict=True)]))
        gradients = 4 * sum(parameter.numel() for parameter in MODELS[case.model]().parameters())
        ring = 2 * gradients * (2 - 1) / 2  # each of N processes receives 2 n (N - 1) / N bytes for n bytes
        cells += [f"{value / 1e3:,.0f}" for value in (ring, found["fast"]["bytes"], found["strict"]["bytes"])]
        rows.append(cells)
    head = ["", "fast, ms", "fast again", "strict", "ring, kB", "fast, kB", "strict, kB"]
    return table(head, rows)


def exchange_table(measured: list[Measured]) -> str:
    names = list(measured[0])
    rows = [
        [f"{numel:,} floats", *(spread(found[name]["ms"], 1) for name in names)]
        for numel, found in zip(SIZES, measured, strict=True)
    ]
    return table(["", *(f"{name}, ms" for name in names)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--link", action="store_true", help=f"also over {RATE_MBIT} Mbit/s (needs root)")
    parser.add_argument("--quick", action="store_true", help="run two short rounds, and print the results only")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        _work(options.job)
        return
    if options.quick:
        options.rounds, options.steps = 2, 3
    facts = machine()
    measured = dp.launch(measure, CASES, options.rounds, options.steps, nproc=2)[0]
    parts = [
        "## Strict reduction",
        facts,
        f"`strict.py`, 2 processes over Gloo, medians of {options.rounds} interleaved rounds of {options.steps} steps "
        f"with quartiles. Milliseconds of a whole step with the fast reduction, then the other times divided by it, "
        f"of the same round; “fast again” is a second copy, and shows the noise. Micro-batches of {MICRO_BATCH}, K of "
        f"them on each rank, SGD. kB that a rank receives in a step: for a ring all-reduce of the gradients, and as "
        f"counted by the kernel. Small gradients are gathered, because this waits less.",
        times_table(CASES, measured),
        "The exchange alone: the sum of a buffer, by Gloo's all-reduce, and slice by slice in a fixed order (without "
        "the additions).",
        exchange_table(dp.launch(measure_exchange, options.rounds, nproc=2)[0]),
    ]
    if options.link:
        rounds, steps = (2, 1) if options.quick else (7, 3)
        over_link = measure_over_link(CASES, rounds, steps)
        parts += [
            f"### Between two machines, {RATE_MBIT} Mbit/s",
            f"Two network namespaces, a veth pair and `tc tbf`; {rounds} rounds of {steps} steps.",
            times_table(CASES, over_link["steps"]),
            exchange_table(over_link["exchange"]),
        ]
    rows = []
    for count in (1, 4, 16):
        case = Case("wide MLP", count)
        peaks = [max(dp.launch(peak_mib, case, reduction, nproc=2)) for reduction in ("fast", "strict")]
        rows.append([f"wide MLP, K = {count}", *(f"{peak:.1f}" for peak in peaks)])
    gradients = 4 * sum(parameter.numel() for parameter in wide().parameters()) / 2**20
    parts += [
        f"### Peak memory\n\nMiB of resident memory in three steps, above the memory before; gradients take "
        f"{gradients:.1f}.",
        table(["", "fast", "strict"], rows),
    ]
    publish("strict", parts, options.quick)


if __name__ == "__main__":
    main()

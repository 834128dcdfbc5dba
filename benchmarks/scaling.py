"""Check the predictions of `ddparity bench`: the time of a step on 1 to 4 processes, over three links.

python benchmarks/scaling.py [--seconds 10] [--quick] [--tables]

What two processes over loopback show is all that the model knows of collectives. From this it predicts a step on 2 to 4
processes over loopback, over 1 Gbit/s and over 200 Mbit/s with 5 ms of delay (network namespaces, as root; see
links.py). Four processes share this machine's cores, so what a micro-batch takes without other ranks is measured for
each number of processes, and given to the model. It writes the table of RESULTS.md, and the tables and the plot of
docs/scaling.md. `--tables` writes only the tables of the docs that need no measurement. `--quick` checks that all runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import ddparity as dp
from ddparity.scaling.links import HERE, Cost, Link, Machine
from ddparity.scaling.measure import Measurement, measure
from ddparity.scaling.model import Fit, Part, Variant, Work, fitted, most_ranks, one_process_s, predict
from ddparity.task.train import build
from links import DEVICE, Wire, joined
from results import machine, table, write_section

DOCS = Path(__file__).parent.parent / "docs"
LOOPBACK = Wire("loopback", math.inf)
WIRES = (LOOPBACK, Wire("1 Gbit/s", 1e9), Wire("200 Mbit/s, 5 ms", 200e6, 5e-3))
COUNTS = (2, 3, 4)
MICRO_BATCHES = 12  # of a step: 12, 6, 4 or 3 a rank


def loss(model: nn.Module, data: list[torch.Tensor]) -> torch.Tensor:
    x, y = data
    return F.cross_entropy(model(x), y)


def task(net: Any, micro_batch: int, *shape: int) -> dp.Task:
    def dataset(split: str) -> torch.utils.data.TensorDataset:
        generator = torch.Generator().manual_seed(0)
        samples = 8 * MICRO_BATCHES * micro_batch
        x = torch.randn(samples, *shape, generator=generator)
        return torch.utils.data.TensorDataset(x, torch.randint(10, (samples,), generator=generator))

    return dp.Task(
        model=net, dataset=dataset, loss=loss, global_batch=MICRO_BATCHES * micro_batch, micro_batch=micro_batch,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    )  # fmt: skip


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


TASKS = {
    "MLP, 67,000 parameters": lambda: task(lambda: mlp(225), 16, 64),
    "MLP, 1.07 million": lambda: task(lambda: mlp(1000), 32, 64),
    "CNN with batch norm": lambda: task(cnn, 16, 3, 32, 32),
}


# Measure


def work(seconds: float, out: str) -> None:
    """Measure all Tasks in one rank of a job, and write the measurements of rank 0."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with dp.world(device="cpu") as here:
        for name, make in TASKS.items():
            one = make()
            train_set = one.dataset("train")
            if here.world_size == 1:
                found[name] = _alone(one, here, train_set, seconds)
            else:
                found[name] = measure(one, here, train_set, 0, seconds)
        if here.rank == 0:
            Path(out).write_bytes(pickle.dumps(found))


def _alone(one: dp.Task, here: dp.World, train_set: Any, seconds: float) -> float:
    """Return the median seconds of a whole step on one process."""
    model, loader = build(one, here, train_set)
    optimizer = one.optimizer(model.parameters())
    steps = list(loader.epoch(0))
    times, end = [], time.perf_counter() + seconds / 3
    while len(times) < 12 or time.perf_counter() < end:
        began = time.perf_counter()
        for micro in dp.accumulate(model, steps[len(times) % len(steps)]):
            (one.loss(model, micro.data) * micro.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return statistics.median(times[4:])


@contextmanager
def places(wire: Wire, count: int) -> Iterator[list[tuple[list[str], str, dict[str, str]]]]:
    """Yield for each rank: what its command begins with, the address of rank 0, and its variables."""
    if wire is LOOPBACK:
        yield [([], "127.0.0.1", {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}) for rank in range(count)]
        return
    with joined(wire, count) as ends:
        variables = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": DEVICE}
        yield [
            (["ip", "netns", "exec", name], ends[0][1], {**variables, "GROUP_RANK": str(rank)})
            for rank, (name, _) in enumerate(ends)
        ]


def measured_over(wire: Wire, count: int, seconds: float, port: int) -> dict[str, Any]:
    """Return rank 0's measurement of each Task, or on one process the seconds of a step."""
    with tempfile.TemporaryDirectory() as folder, places(wire, count) as listed:
        processes = []
        for rank, (before, address, own) in enumerate(listed):
            variables = {
                "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": address, "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "GROUP_RANK": "0", **own,
            }  # fmt: skip
            job = json.dumps({"seconds": seconds, "out": f"{folder}/found"})
            command = [*before, sys.executable, __file__, "--job", job]
            processes.append(subprocess.Popen(command, env={**os.environ, **variables}))
        try:
            codes = [process.wait(1200) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"{count} processes over {wire.name} ended with {codes}")
        return pickle.loads(Path(f"{folder}/found").read_bytes())  # type: ignore[no-any-return]  # what `work` wrote


# Compare


@dataclass(frozen=True)
class Row:
    """One step, predicted and measured."""

    task: str
    variant: Variant
    wire: str
    ranks: int
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def compared(base: Measurement, here: Measurement, wire: Wire, name: str) -> list[Row]:
    """Return the predictions for a measurement, from one of two processes over loopback."""
    fit = fitted(base.work, base.machine, {one: base.median_s(one) for one in base.steps_s}, base.shares)
    slower = statistics.median(here.work.micro_s) / statistics.median(base.work.micro_s)
    known = dataclasses.replace(
        base.work, micro_s=here.work.micro_s, update_s=here.work.update_s, load_s=0.0,
        backward_s=base.work.backward_s * slower,
    )  # fmt: skip
    extra = {variant: seconds * slower for variant, seconds in fit.extra_s.items()}
    link = HERE if wire is LOOPBACK else Link(wire.name, wire.bits_per_s / 8, wire.delay_s)
    return [
        Row(
            name, variant, wire.name, len(here.shares),
            predict(known, base.machine.slowed(slower), Fit(fit.hidden, extra), variant, here.shares, link).step_s,
            here.median_s(variant),
        )
        for variant in here.steps_s
    ]  # fmt: skip


def all_rows(seconds: float, wires: Sequence[Wire], counts: Sequence[int]) -> list[Row]:
    rows: list[Row] = []
    base: dict[str, Measurement] = {}
    port = 29_620
    for wire in wires:
        for count in counts:
            port += 1
            found = measured_over(wire, count, seconds, port)
            if wire is LOOPBACK and count == counts[0]:
                base = found
                for name, step_s in measured_over(LOOPBACK, 1, seconds, 29_619).items():
                    known = dataclasses.replace(base[name].work, load_s=0.0)
                    rows.append(Row(name, "fast", wire.name, 1, one_process_s(known, MICRO_BATCHES), step_s))
            for name, one in found.items():
                rows += compared(base[name], one, wire, name)
            print(f"{wire.name}, {count} processes: done", file=sys.stderr, flush=True)
    return rows


def error_table(rows: Sequence[Row]) -> str:
    """Return the table: predicted and measured milliseconds, and the difference in per cent."""
    counts = sorted({row.ranks for row in rows})
    lines = []
    for key in dict.fromkeys((row.task, row.variant, row.wire) for row in rows):
        cells = [", ".join(key)]
        for count in counts:
            (found,) = [r for r in rows if (r.task, r.variant, r.wire, r.ranks) == (*key, count)] or [None]
            shown = "–" if found is None else (
                f"{1e3 * found.predicted_s:.2f} / {1e3 * found.measured_s:.2f} ({100 * found.error:+.0f} %)"
            )  # fmt: skip
            cells.append(shown)
        lines.append(cells)
    return table(
        ["step, ms: predicted / measured", *(f"{count} process{'es' * (count > 1)}" for count in counts)], lines
    )


def errors_said(rows: Sequence[Row]) -> str:
    """Return how large the errors are, without those of what the model was fitted to."""
    free = [row for row in rows if (row.wire, row.ranks) != (LOOPBACK.name, 2)]
    errors = [abs(row.error) for row in free]
    parts = []
    for wire in dict.fromkeys(row.wire for row in free):
        own = [abs(row.error) for row in free if row.wire == wire]
        parts.append(f"{wire}: {100 * statistics.median(own):.0f} % (largest {100 * max(own):.0f} %)")
    good = sum(error < 0.1 for error in errors)
    return f"Median error over {'; '.join(parts)}. {good} of {len(errors)} predictions are within 10 %."


def plot(rows: Sequence[Row]) -> str:
    """Return the predictions over the measurements as SVG, both in milliseconds on logarithmic axes."""
    size, left, top = 420, 60, 20
    low = math.floor(math.log10(1e3 * min(min(r.predicted_s, r.measured_s) for r in rows)))
    high = math.ceil(math.log10(1e3 * max(max(r.predicted_s, r.measured_s) for r in rows)))

    def at(milliseconds: float) -> float:
        return size * (math.log10(milliseconds) - low) / (high - low)

    def dot(row: Row) -> tuple[float, float]:
        return left + at(1e3 * row.measured_s), top + size - at(1e3 * row.predicted_s)

    def text(x: float, y: float, said: str, anchor: str = "start") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222">{said}</text>'

    colours = dict(zip(dict.fromkeys(row.wire for row in rows), ("#24466f", "#3b7a57", "#c2571a"), strict=False))
    shift = size * math.log10(1.1) / (high - low)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {size + top + 50}" font-family="sans-serif" '
        f'font-size="13">',
        f'<rect width="700" height="{size + top + 50}" fill="#fff"/>',
        f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#aaa"/>',
        f'<polygon points="{left},{top + size} {left},{top + size - shift:.1f} {left + size - shift:.1f},{top} '
        f'{left + size},{top} {left + size},{top + shift:.1f} {left + shift:.1f},{top + size}" fill="#e8edf3"/>',
        f'<line x1="{left}" y1="{top + size}" x2="{left + size}" y2="{top}" stroke="#999"/>',
        text(left + size / 2, top + size + 40, "measured, ms a step", "middle"),
        f'<text transform="translate(16 {top + size / 2}) rotate(-90)" text-anchor="middle" fill="#222">'
        f"predicted, ms a step</text>",
    ]
    for power in range(low, high + 1):
        where = at(10.0**power)
        lines.append(text(left + where, top + size + 18, f"{10.0**power:,g}", "middle"))
        lines.append(text(left - 6, top + size - where + 4, f"{10.0**power:,g}", "end"))
    for row in rows:
        x, y = dot(row)
        said = f"{row.task}, {row.variant}, {row.ranks} processes, {row.wire}: {100 * row.error:+.0f} %"
        lines.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colours[row.wire]}" fill-opacity="0.75">'
            f"<title>{said}</title></circle>"
        )
    for number, (wire, colour) in enumerate(colours.items()):
        y = top + 20 + 22 * number
        lines.append(f'<circle cx="{left + size + 20}" cy="{y - 4}" r="4.5" fill="{colour}"/>')
        lines.append(text(left + size + 32, y, wire))
    lines.append(
        f'<rect x="{left + size + 14}" y="{top + 20 + 22 * len(colours) - 11}" width="12" height="12" fill="#e8edf3"/>'
    )
    lines.append(text(left + size + 32, top + 20 + 22 * len(colours), "within 10 %"))
    return "\n".join([*lines, "</svg>\n"])


# What holds for large models, from the model alone


_MODELS = {  # parameters, and a common time of a step's computing on one GPU, seconds
    "ResNet-18": (11_700_000, 0.05),
    "ResNet-50": (25_600_000, 0.15),
    "GPT-2 small": (124_000_000, 0.25),
    "1.3 billion": (1_300_000_000, 1.0),
}
_LINKS = (
    Link("1 Gbit/s, 100 µs", 1e9 / 8, 100e-6),
    Link("10 Gbit/s, 50 µs", 10e9 / 8, 50e-6),
    Link("25 Gbit/s, 20 µs", 25e9 / 8, 20e-6),
    Link("100 Gbit/s, 5 µs", 100e9 / 8, 5e-6),
    Link("400 Gbit/s, 5 µs", 400e9 / 8, 5e-6),
)
_PIECES = 8


def promise_table() -> str:
    """Return how many ranks have 90 % efficiency, by model and link, with no cost but the link's.

    One micro-batch a rank, float32 gradients, reduced in parts as the backward, two thirds of the time, goes on.
    """
    free = Cost(0.0, 0.0, 2, 2)
    ideal = Machine({"ring": free, "slices": free, "all-gather": free, "all-to-all": free}, 0.0, False)
    rows = []
    for name, (parameters, seconds) in _MODELS.items():
        parts = tuple(
            Part(4 * parameters // _PIECES, number / _PIECES, number < _PIECES) for number in range(1, _PIECES + 1)
        )
        whole = (Part(4 * parameters, 1.0, False),)
        known = Work((seconds,), seconds, 0.0, 0.0, 0.0, 0, seconds * 2 / 3, parts, whole, (), (0, 0), 1)
        cells = [f"{name}, {parameters / 1e6:,.1f} million, {1e3 * seconds:.0f} ms"]
        for link in _LINKS:
            found = {
                variant: most_ranks(known, ideal, Fit(1.0, {}), variant, 1, link, 0.9, 1024)
                for variant in ("fast", "strict")
            }
            cells.append(" / ".join("–" if most == 1 else f"{most:,}" for most in found.values()))
        rows.append(cells)
    return table(["model, parameters, computing of a step", *(link.name for link in _LINKS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one Task on one number of processes")
    parser.add_argument("--quick", action="store_true", help="measure briefly over loopback, and only print the result")
    parser.add_argument("--tables", action="store_true", help="write the table that needs no measurement")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        work(**options.job)
        return
    page = DOCS / "scaling.md"
    if not options.quick:
        write_section("promise", promise_table(), page)
    if options.tables:
        return
    facts = machine()
    quick = (1.0, WIRES[:1], COUNTS[:1])
    rows = all_rows(*(quick if options.quick else (options.seconds, WIRES, COUNTS)))
    shown = error_table(rows)
    text = "\n\n".join(
        [
            "## Predictions of a step's time",
            facts,
            f"`scaling.py`: a step of {MICRO_BATCHES} micro-batches, shared among the processes. The model knows of "
            f"collectives what 2 processes over loopback show. Medians of about {options.seconds:g} s for each Task. "
            + errors_said(rows),
            shown,
        ]
    )
    print(text)
    if not options.quick:
        write_section("scaling", text)
        picture = "![The predicted time of a step over the measured one, for each Task, link and number](scaling.svg)"
        write_section("scaling", f"{facts} {errors_said(rows)}\n\n{shown}\n\n{picture}", page)
        (DOCS / "scaling.svg").write_text(plot(rows))


if __name__ == "__main__":
    main()

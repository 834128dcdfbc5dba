"""Write what the speeds should be beside what was measured: the section "Goals" of RESULTS.md, from its other sections.

python benchmarks/goals.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from results import RESULTS, rows_of, table, write_section


@dataclass(frozen=True)
class Goal:
    """A figure, what it should be, and where it stands: section, rows, their column, command, and heading."""

    figure: str
    goal: str
    section: str
    label: str
    column: int
    command: str
    under: str = ""


SIZES, BUSY, WIRES = "sizes.py", "sizes.py --busy", "sizes.py --wires"
NORMS = "sync_batchnorm.py"
EVERY = r"MLP.*|ResNet-18|GPT.*"  # model of sizes.py
GOALS = (
    Goal("a step over DDP's by hand, 2 processes", "≤ 0.45", "sizes", r"MLP|MLP of 67 k", 3, SIZES),
    Goal(
        "a step over DDP's by hand, 2 processes", "≤ 0.80", "sizes", r"MLP of 1 M|ResNet-18|GPT.*|MLP of 50 M", 3, SIZES
    ),
    Goal("a step over DDP's, beside a busy loop on one core", "≤ 0.65", "sizes_busy", r"MLP|MLP of 67 k", 3, BUSY),
    Goal("exposed communication over DDP's", "≤ 0.30", "sizes", r"MLP of 67 k", 4, SIZES),
    Goal("exposed communication over DDP's", "≤ 0.60", "sizes", r"MLP of 1 M", 4, SIZES),
    *(
        Goal(
            f"a step over the larger of computing and sending, {wire}",
            "≤ 1.15",
            "sizes_wires",
            r"MLP.*|GPT.*",
            4,
            WIRES,
            wire,
        )
        for wire in ("1 Gbit/s", "200 Mbit/s")
    ),
    Goal("strict over fast", "≤ 1.05", "sizes", EVERY, 5, SIZES),
    Goal("one process over the plain loop", "≤ 1.02", "sizes", EVERY, 6, SIZES),
    Goal("SyncBatchNorm over the local layer", "≤ 1.0", "sync_batchnorm_cpu", r"\((?:32|64).*channels_last", 3, NORMS),
    Goal("SyncBatchNorm over the local layer", "≤ 1.2", "sync_batchnorm_cpu", r"\(16, .*channels_last", 3, NORMS),
    Goal("a step, synchronised over local norms", "≤ 1.02", "sync_batchnorm_cpu", r"ResNet-18.*", 3, NORMS),
    Goal("Accelerate over DDP by hand", "", "sizes", EVERY, 7, SIZES),
    Goal("Fabric over DDP by hand", "", "sizes", EVERY, 8, SIZES),
    Goal("Loader over DataLoader", "≤ 1.0", "loading", r".*JPEG.*", 2, "loading.py"),
    Goal(
        "predict over independent copies", "≥ 0.99", "predict", r"share of it that 2 processes reach", 1, "predict.py"
    ),
    Goal("import over torch's, processor time", "≤ 1.1", "imports", "ddparity", 2, "imports.py"),
)


def report(results: str) -> str:
    """Return a row for each goal and each row of figures that it is about."""
    lines = []
    for goal in GOALS:
        found = [row for row in rows_of(results, goal.section, goal.under) if re.fullmatch(goal.label, row[0])]
        assert found, f"{goal.section} has no row {goal.label}"
        lines += [[goal.figure, row[0], goal.goal, row[goal.column], f"`{goal.command}`"] for row in found]
    return table(["figure", "of", "goal", "measured", "command"], lines)


def main() -> None:
    text = report(RESULTS.read_text(encoding="utf-8"))
    print(text)
    write_section(
        "goals",
        f"## Goals\n\n`goals.py`, from the sections that the commands write, which have the machine and the date. On a "
        f"GPU, only what [SyncBatchNorm on CUDA](#syncbatchnorm-on-cuda) has is measured.\n\n{text}",
    )


if __name__ == "__main__":
    main()

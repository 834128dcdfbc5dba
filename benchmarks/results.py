"""Write RESULTS.md: each script rewrites its own section and does not change the others.

`python benchmarks/results.py` writes the four figures of the README again, in both languages, from RESULTS.md.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "RESULTS.md"
ROOT = Path(__file__).parent.parent
READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh-CN.md"}
DOCS = ROOT / "docs"
COSTS_PAGE = DOCS / "costs.md"
_HEAD = "# Measured\n\nWritten by the scripts of this folder, each its own section.\n"


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put `text` between the markers of section `name`, also of a page in Chinese. If there is none, append it."""
    section = f"<!-- {name} -->\n{text.strip()}\n<!-- /{name} -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else _HEAD
    marked = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- /{re.escape(name)} -->", re.DOTALL)
    whole, found = marked.subn(lambda _: section, whole)
    if not found:
        whole = f"{whole.rstrip()}\n\n{section}\n"
    # A reader or an interrupted run must never see half a file.
    draft = path.with_suffix(".tmp")
    draft.write_text(whole, encoding="utf-8")
    draft.replace(path)
    if path == RESULTS:
        write_costs(whole)
    if path.parent == DOCS and (DOCS / "zh" / path.name).exists():
        # Pictures, and files outside docs/, are one folder further away.
        text = re.sub(r"\]\((?=\.\./|[^):]*\.(?:svg|png)\))", "](../", text)
        write_section(name, text, DOCS / "zh" / path.name)


def publish(name: str, parts: Sequence[str], quick: bool) -> None:
    """Print the parts of a section, and write it but after a quick run."""
    text = "\n\n".join(parts)
    print(text)
    if not quick:
        write_section(name, text)


def write_costs(results: str) -> None:
    """Write the four figures of the README, in both languages."""
    for language, readme in READMES.items():
        write_section("costs", costs(results, language), readme)


def costs(results: str, language: str = "en") -> str:
    """Return the table of the README: what ddparity costs, in four figures of RESULTS.md."""
    steps = _medians([row for row in rows_of(results, "sizes") if row[1][:1].isdigit()])
    strict = _medians([row for row in rows_of(results, "strict") if ", K = " in row[0]][:8])
    starts = _medians([row for row in rows_of(results, "startup") if "process" in row[0]])
    (predict,) = [row[1].split()[0] for row in rows_of(results, "predict") if row[0] == "throughput, 2 processes to 1"]
    figures = {
        "en": [
            [
                "a training step, 2 processes",
                f"{_range(steps)} times plain DistributedDataParallel's, from small models to large ones",
            ],
            ["the same bits on any number of processes", f"{_range(strict)} times the step without"],
            ["`predict` on 2 processes", f"{predict} times the samples a second of one process"],
            ["`ddparity run`, start to end", f"{_range(starts)} times torchrun's"],
        ],
        "zh": [
            ["一个训练步，2 个进程", f"原生 DistributedDataParallel 的 {_range(steps, '到')} 倍（从小模型到大模型）"],
            ["任意进程数下逐比特相同", f"单步耗时为不作此要求时的 {_range(strict, '到')} 倍"],
            ["2 个进程上的 `predict`", f"每秒样本数为单进程的 {predict} 倍"],
            ["`ddparity run`，从启动到结束", f"torchrun 的 {_range(starts, '到')} 倍"],
        ],
    }
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {what} | {cost} |" for what, cost in figures[language])


def rows_of(results: str, section: str, under: str = "") -> list[list[str]]:
    """Return the cells of all rows of tables in a section, or of those under one of its headings."""
    (text,) = re.findall(rf"<!-- {section} -->(.*?)<!-- /{section} -->", results, re.DOTALL)
    if under:
        (text,) = re.findall(rf"\n### {re.escape(under)}\n(.*?)(?:\n### |\Z)", text, re.DOTALL)
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "]


def _medians(rows: Sequence[Sequence[str]]) -> list[float]:
    """Return the medians of the fourth column, which has ours."""
    return [float(row[3].split()[0]) for row in rows]


def _range(values: Sequence[float], to: str = "to") -> str:
    return f"{min(values):.2f} {to} {max(values):.2f}"


def machine(*packages: str) -> str:
    """Return one line of what the figures depend on. Call it before the measurement, while only others cause load."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    load = os.getloadavg()[0]
    return (
        f"{datetime.date.today()}; {len(os.sched_getaffinity(0))} cores ({platform.machine()}), one thread a process, "
        f"load average {load:.1f} before the start; Python {platform.python_version()}, {versions}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text, and whose others are figures."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, with the quartiles behind it."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    write_costs(RESULTS.read_text())

"""Write RESULTS.md: each script rewrites its own section and does not change the others."""

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
README = Path(__file__).parent.parent / "README.md"
_HEAD = "# Measured\n\nWritten by the scripts of this folder, each its own section.\n"


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put `text` between the markers of section `name`. If the file has no such section, append it."""
    section = f"<!-- {name} -->\n{text.strip()}\n<!-- /{name} -->"
    whole = path.read_text() if path.exists() else _HEAD
    marked = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- /{re.escape(name)} -->", re.DOTALL)
    whole, found = marked.subn(lambda _: section, whole)
    if not found:
        whole = f"{whole.rstrip()}\n\n{section}\n"
    # A reader or an interrupted run must never see half a file.
    draft = path.with_suffix(".tmp")
    draft.write_text(whole)
    draft.replace(path)


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

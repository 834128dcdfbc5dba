"""Show a report: on the terminal, as JSON, as annotations of GitHub, and the catalogue."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .catalogue import CATALOGUE, Finding, counted
from .run import Report

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def show(report: Report) -> None:
    """Print the findings and what was looked at."""
    console = Console(soft_wrap=True, highlight=False)
    for one in report.findings:
        head = Text(f"{one.severity} {one.code}", style=_COLOURS[one.severity])
        head.append(f"  {one.title}" + (" (likely)" if one.certainty == "likely" else ""), style="bold")
        console.print(head)
        console.print(Text(f"  {place(one.file, one.line)}", style="dim").append(_cause(one)))
        console.print(Text(f"  {one.message}"))
        console.print(Text(f"  Repair: {one.fix}"))
        console.print(Text(f"  {one.page}", style="dim"))
        console.print()
    console.print(Text(summary(report)))


def summary(report: Report) -> str:
    """Say how many findings there are, and what was looked at."""
    seen = report.seen
    counts = {name: sum(one.severity == name for one in report.findings) for name in _COLOURS}
    told = [counted(count, name) for name, count in counts.items() if count]
    lines = [f"ddparity audit {report.script}: {', '.join(told) or 'no findings'}"]
    if seen.get("world_size"):
        lines.append(
            "  looked at: "
            + ", ".join(
                counted(seen[key], word)
                for key, word in (
                    ("world_size", "process"),
                    ("steps", "step"),
                    ("epochs", "epoch"),
                    ("evaluations", "evaluation"),
                    ("loaders", "loader"),
                    ("collectives", "collective"),
                )
            )
        )
    if seen.get("cut"):
        lines.append(f"  cut short: {', '.join(place(*_split(one)) for one in seen['cut'])}")
    lines += [f"  no chance to see: {one}" for one in seen["blind"]]
    if report.failed:
        lines.append(f"  the script ended with exit code {report.run.exit_code}")
        if report.failure:
            lines.append(f"  {report.failure.removeprefix('ddparity: ')}")
    return "\n".join(lines)


def to_json(report: Report) -> dict[str, Any]:
    """Return the JSON document of a report."""
    return {
        "findings": [
            {
                "code": one.code,
                "title": one.title,
                "severity": one.severity,
                "certainty": one.certainty,
                "ranks": list(one.ranks),
                "file": one.file,
                "line": one.line,
                "cause_file": one.cause_file,
                "cause_line": one.cause_line,
                "message": one.message,
                "fix": one.fix,
                "page": one.page,
            }
            for one in report.findings
        ],
        "seen": report.seen,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def github_lines(report: Report) -> str:
    """Return the findings as annotations of GitHub's workflows, a line each."""
    kinds = {"error": "error", "warning": "warning", "note": "notice"}
    return "\n".join(
        f"::{kinds[one.severity]} file={_escaped(_relative(one.file), True)},line={one.line},"
        f"title={_escaped(f'{one.code} {one.title}', True)}::{_escaped(f'{one.message} {one.fix}')}"
        for one in report.findings
    )


def _escaped(text: str, in_property: bool = False) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if in_property else text


def show_catalogue() -> None:
    """Print the table of codes."""
    table = Table("code", "severity", "finding", box=None, pad_edge=False)
    for code in sorted(CATALOGUE):
        row = CATALOGUE[code]
        table.add_row(code, Text(row.severity, style=_COLOURS[row.severity]), row.title)
    Console().print(table)


def write_json(report: Report, path: Path) -> None:
    path.write_text(json.dumps(to_json(report), indent=1) + "\n")


def place(file: str, line: int) -> str:
    return f"{_relative(file)}:{line}" if line else _relative(file)


def _split(site: str) -> tuple[str, int]:
    file, _, line = site.rpartition(":")
    return (file, int(line)) if file and line.isdigit() else (site, 0)


def _relative(file: str) -> str:
    """Return a path relative to this folder, where it is inside."""
    found = os.path.relpath(file) if os.path.isabs(file) else file
    return file if found.startswith("..") else found


def _cause(one: Finding) -> str:
    if (one.cause_file, one.cause_line) == (one.file, one.line):
        return ""
    return f"  caused at {place(one.cause_file, one.cause_line)}"

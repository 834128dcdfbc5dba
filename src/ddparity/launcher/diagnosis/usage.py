"""Measure what a process and its children have used: processor time, reads and writes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from ...system import clock_ticks, proc, process_fields

_NAMED = 2  # names of children that are told


@dataclass(frozen=True)
class Usage:
    """What a process has used since its start. `children`: process ids and names of its descendants that run now.

    `read`, `written`: bytes of all reads and writes, also of pipes and of sockets where a program uses them as files.
    """

    cpu_s: float = 0.0
    children_cpu_s: float = 0.0
    read: int = 0
    written: int = 0
    children: tuple[tuple[int, str], ...] = ()


def runs(pid: int) -> bool:
    """Return whether a process of this machine runs."""
    return _stat(pid) is not None


def read_usages(pids: Iterable[int]) -> dict[int, Usage]:
    """Return what each of these processes of this machine has used. One that cannot be read has used nothing."""
    stats = {pid: stat for name in _processes() if (stat := _stat(pid := int(name))) is not None}
    below: dict[int, list[int]] = {}
    for pid, (_, parent, _) in stats.items():
        below.setdefault(parent, []).append(pid)
    found = {}
    for pid in pids:
        children, waiting = [], list(below.get(pid, []))
        while waiting:
            children.append(one := waiting.pop())
            waiting += below.get(one, [])
        io = [_read_and_written(one) for one in (pid, *children)]
        found[pid] = Usage(
            cpu_s=stats[pid][2] if pid in stats else 0.0,
            children_cpu_s=sum(stats[one][2] for one in children),
            read=sum(one[0] for one in io),
            written=sum(one[1] for one in io),
            children=tuple((one, stats[one][0]) for one in sorted(children)),
        )
    return found


def describe_usage(before: Usage, now: Usage) -> str:
    """Return in a few words what a process has used between two measurements, like "58 s of CPU, 1.2 GB written"."""
    parts = [f"{max(0.0, now.cpu_s - before.cpu_s):.0f} s of CPU"]
    for name, more in (("read", now.read - before.read), ("written", now.written - before.written)):
        if more > 0:
            parts.append(f"{_bytes(more)} {name}")
    if now.children:
        names = list(dict.fromkeys(name for _, name in now.children))
        shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
        cpu_s = max(0.0, now.children_cpu_s - before.children_cpu_s)
        number = f"{len(now.children)} child process{'es' if len(now.children) > 1 else ''}"
        parts.append(f"{number} ({shown}) with {cpu_s:.0f} s of CPU")
    return ", ".join(parts)


def _processes() -> list[str]:
    try:
        return [name for name in os.listdir(proc()) if name.isdigit()]
    except OSError:
        return []


def _stat(pid: int) -> tuple[str, int, float] | None:
    """Return the name of a process, its parent and its CPU seconds; None if it is gone or has ended."""
    try:
        found = process_fields(pid)
        if found is None:
            return None
        name, fields = found
        return name, int(fields[1]), (int(fields[11]) + int(fields[12])) / clock_ticks()
    except (ValueError, IndexError):
        return None


def _read_and_written(pid: int) -> tuple[int, int]:
    with suppress(OSError, ValueError, IndexError):
        lines = proc(pid, "io").read_text().splitlines()
        return int(lines[0].split()[1]), int(lines[1].split()[1])
    return 0, 0


def _bytes(number: int) -> str:
    size, units = float(number), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "bytes" else f"{size:.1f} {units[0]}"

"""Whether memory ran out: what the kernel counts for this process's control group."""

from __future__ import annotations

from pathlib import Path

from .cgroups import MOUNT, own_groups


class MemoryWatch:
    """Counts the kernel's out-of-memory kills in the control group since it was made. cgroup v2 and v1."""

    def __init__(self) -> None:
        self._before = _kills()
        self._said: dict[int, str] = {}

    def evidence(self, pid: int) -> str:
        """What speaks for it that this process was killed because memory ran out. Each kill is one process's."""
        if pid not in self._said:
            kills = _kills()
            if kills is None or self._before is None:
                self._said[pid] = "out of memory, unless somebody sent it"
            elif kills > self._before:
                self._said[pid] = f"out of memory: the kernel ended a process of this control group{_limit()}"
                self._before += 1
            else:
                self._said[pid] = "somebody sent it: by the kernel's count, memory has not run out"
        return self._said[pid]


def _folders() -> list[Path]:
    """The own control group, of each hierarchy; in a container it is often the root that is seen."""
    folders = [MOUNT, MOUNT / "memory"]
    for controllers, path in own_groups():
        if controllers in ("", "memory"):
            folders.insert(0, MOUNT / controllers / path.lstrip("/"))
    return folders


def _kills() -> int | None:
    """None where the kernel shows no count."""
    for folder in _folders():
        for name in ("memory.events", "memory.oom_control"):
            try:
                for line in (folder / name).read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
            except (OSError, ValueError):
                continue
    return None


def _limit() -> str:
    for folder in _folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                return f", whose limit is {int((folder / name).read_text()) / 2**30:.1f} GiB"
            except (OSError, ValueError):  # "max": none
                continue
    return ""

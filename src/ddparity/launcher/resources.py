"""How many cores this process may use, and how many threads each of its processes gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")


def cores() -> int:
    """The cores that this process may use: those it is bound to, and no more than its cgroup's quota of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cores()
    return bound if quota is None else max(1, min(bound, int(quota)))


def cgroup_cores(root: Path = MOUNT, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cores' worth of time that the control groups allow, as a container's limit sets it; None: no limit."""
    limits: list[float] = []
    for controllers, path in own_groups(own):
        if not controllers:
            limits += _limits(root, path, _quota_v2)
        elif "cpu" in controllers.split(","):
            for mounted in (root / "cpu", root / "cpu,cpuacct"):
                limits += _limits(mounted, path, _quota_v1)
    return min(limits, default=None)


def _limits(mounted: Path, path: str, quota: Callable[[Path], float | None]) -> list[float]:
    """The limits of a group and of those around it. Inside a container its own group is the mount itself."""
    group = mounted / path.lstrip("/")
    found = [quota(folder) for folder in (group, *group.parents) if folder == mounted or mounted in folder.parents]
    return [limit for limit in found if limit is not None]


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return None if quota <= 0 else quota / period
    except (OSError, ValueError):
        return None


def threads_a_process(nproc: int) -> int:
    """The threads of each of `nproc` processes that share this machine's cores: at least one."""
    return max(1, cores() // nproc)


def decide_threads(nproc: int, environ: Mapping[str, str] = os.environ) -> tuple[dict[str, str], str | None]:
    """The variables for the processes, and a line that says so; nothing where the user has set OMP_NUM_THREADS.

    torch would start as many threads in each process as the machine has cores.
    """
    if environ.get("OMP_NUM_THREADS"):
        return {}, None
    threads, many = threads_a_process(nproc), "" if nproc == 1 else "es"
    found = cores()
    line = (
        f"ddparity: {nproc} process{many}, {threads} thread{'s' * (threads > 1)} {'each ' if many else ''}"
        f"({found} core{'s' * (found > 1)})"
    )
    return {"OMP_NUM_THREADS": str(threads)}, line


def own_groups(own: Path = Path("/proc/self/cgroup")) -> list[tuple[str, str]]:
    """Controllers, joined by commas and empty in version 2, and the path below where these are mounted."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    return [(line[1], line[2]) for line in lines if len(line) == 3]


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

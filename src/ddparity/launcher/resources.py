"""What this machine gives the job: the cores and threads of each process, and whether memory ran out.

All limits come from the process's CPU affinity and its control groups (cgroups, versions 1 and 2), as a container sets
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ..system import bound_cores, proc

MOUNT, OWN = Path("/sys/fs/cgroup"), proc("self", "cgroup")


def own_groups(own: Path = OWN) -> list[tuple[str, str]]:
    """Return this process's control groups: the controllers and the path below their mount.

    The controllers are joined by commas; in version 2 the string is empty.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    return [(line[1], line[2]) for line in lines if len(line) == 3]


def cores() -> int:
    """Return how many cores this process may use: those of its affinity, at most its control groups' quota."""
    bound = bound_cores()
    quota = cgroup_cores()
    return bound if quota is None else max(1, min(bound, int(quota)))


def cgroup_cores(root: Path = MOUNT, own: Path = OWN) -> float | None:
    """Return the CPU quota of the control groups, in cores; None if there is no limit."""
    limits: list[float] = []
    for controllers, path in own_groups(own):
        if not controllers:
            limits += _quotas(root, path, _quota_v2)
        elif "cpu" in controllers.split(","):
            for mount in (root / "cpu", root / "cpu,cpuacct"):
                limits += _quotas(mount, path, _quota_v1)
    return min(limits, default=None)


def _quotas(mount: Path, path: str, quota: Callable[[Path], float | None]) -> list[float]:
    """Return the quotas of a group and of its parents. Inside a container, the process's group is the mount itself."""
    group = mount / path.lstrip("/")
    found = [quota(folder) for folder in (group, *group.parents) if folder == mount or mount in folder.parents]
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


def threads_per_process(nproc: int) -> int:
    """Return how many threads each of `nproc` processes gets from this machine's cores: at least one."""
    return max(1, cores() // nproc)


def decide_threads(nproc: int, environ: Mapping[str, str] = os.environ) -> tuple[dict[str, str], str | None]:
    """Return the variables that set the processes' threads, and a line that reports the decision.

    If the user has set OMP_NUM_THREADS, return no variables and no line. Without the variable, torch starts as many
    threads in each process as the machine has cores.
    """
    if environ.get("OMP_NUM_THREADS"):
        return {}, None
    threads, several = threads_per_process(nproc), nproc > 1
    found = cores()
    line = (
        f"ddparity: {nproc} process{'es' * several}, {threads} thread{'s' * (threads > 1)} {'each ' * several}"
        f"({found} core{'s' * (found > 1)})"
    )
    return {"OMP_NUM_THREADS": str(threads)}, line


class MemoryWatch:
    """Counts how many processes the kernel has killed in this control group because memory ran out, from now on."""

    def __init__(self) -> None:
        self._before = _out_of_memory_kills()
        self._evidence: dict[int, str] = {}

    def evidence(self, pid: int) -> str:
        """Return what is known about the SIGKILL that ended a process. Each kill of the kernel explains one process."""
        if pid not in self._evidence:
            kills = _out_of_memory_kills()
            if kills is None or self._before is None:
                self._evidence[pid] = "out of memory, unless a user or program sent it"
            elif kills > self._before:
                self._evidence[pid] = (
                    f"out of memory: the kernel ended a process of this control group{_memory_limit()}"
                )
                self._before += 1
            else:
                self._evidence[pid] = "a user or program sent it: the kernel counts no out-of-memory kill"
        return self._evidence[pid]


def _memory_folders() -> list[Path]:
    """Return folders that may have this process's memory limits; in a container, often the root of the mount."""
    folders = [MOUNT, MOUNT / "memory"]
    for controllers, path in own_groups():
        if controllers in ("", "memory"):
            folders.insert(0, MOUNT / controllers / path.lstrip("/"))
    return folders


def _out_of_memory_kills() -> int | None:
    """Return the kernel's count; None where it shows none."""
    for folder in _memory_folders():
        for name in ("memory.events", "memory.oom_control"):
            try:
                for line in (folder / name).read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
            except (OSError, ValueError):
                continue
    return None


def _memory_limit() -> str:
    for folder in _memory_folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                return f", whose limit is {int((folder / name).read_text()) / 2**30:.1f} GiB"
            except (OSError, ValueError):  # "max" means no limit
                continue
    return ""

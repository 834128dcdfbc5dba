"""The control groups that this process is in: what a container or a scheduler allows it."""

from __future__ import annotations

from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")


def own_groups(own: Path = Path("/proc/self/cgroup")) -> list[tuple[str, str]]:
    """Controllers, joined by commas and empty in version 2, and the path below where these are mounted."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    return [(line[1], line[2]) for line in lines if len(line) == 3]

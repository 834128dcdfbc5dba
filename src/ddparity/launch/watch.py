from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDED_COLLECTIVES = 64


@dataclass(frozen=True)
class Watched:
    rank: int
    pid: int
    folder: Path


@dataclass(frozen=True)
class Verdict:
    odd: tuple[int, ...] = ()
    left: tuple[int, ...] = ()


class Watch:
    progressed = True

    def __init__(self, ranks: Any, hang_timeout_s: float, exchange: Any = None) -> None: ...
    def look(self) -> Verdict | None:
        return None

    def ended(self, rank: int, code: int) -> None: ...


def describe(v: Verdict) -> str:
    return ""

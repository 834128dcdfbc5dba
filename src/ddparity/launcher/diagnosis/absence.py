"""When to report ranks that others wait for, and in which words. Such a rank may be healthy: it is not ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .desync import Finding, describe_ranks
from .hang_report import HangReport, Row, short

REPORT_S = 60.0  # without progress, until the first report
_LONGER = 1.5  # times an earlier wait at the same place
_FACTOR, _LONGEST_S = 5.0, 3600.0  # each report comes after five times the time of the one before, or an hour later


@dataclass(frozen=True)
class Notice:
    """A report on ranks that others wait for: two lines for the terminal, and the whole report for a file."""

    lines: tuple[str, str]
    report: HangReport


class Schedule:
    """Tell when a wait is to be reported: after `first_s`, then rarely.

    A wait at the same place as an earlier one is first reported when it lasts clearly longer than that one did: rank 0
    may evaluate after each epoch.
    """

    def __init__(self, first_s: float = REPORT_S) -> None:
        self._first_s = first_s
        self._next: dict[object, float] = {}  # by wait
        self._longest: dict[object, float] = {}  # by place

    def due(self, wait: object, place: object, waited_s: float) -> bool:
        """Return whether a wait of this length is to be reported now. Called again and again while it lasts."""
        if waited_s < self._first_s:
            return False
        due_s = self._next.setdefault(wait, max(self._first_s, _LONGER * self._longest.get(place, 0.0)))
        self._longest[place] = max(waited_s, self._longest.get(place, 0.0))
        return waited_s >= due_s

    def reported(self, wait: object, waited_s: float) -> None:
        """Note that a wait was reported when it had lasted for so long."""
        self._next[wait] = min(waited_s * _FACTOR, waited_s + _LONGEST_S)


def describe_absence(
    finding: Finding, said: str, rows: Sequence[Row], waited_s: float, hang_timeout_s: float | None
) -> tuple[str, str]:
    """Return two lines: which ranks are waited for, what they do and have used since; and what happens next.

    `said`: the headline of the finding. `rows`: of all ranks. `waited_s`: how long the others have waited.
    """
    awaited = [row for row in rows if row.rank in finding.blamed]
    groups: dict[str, list[int]] = {}
    for row in awaited:
        groups.setdefault(_doing(row), []).append(row.rank)
    what = [f"{describe_ranks(ranks)}: {doing}" for doing, ranks in groups.items() if doing]
    more = f"; and {len(what) - 2} others" if len(what) > 2 else ""
    first = f"for {say_time(waited_s)}: {said}" + "".join(f". {one}" for one in what[:2]) + more
    return first, f"the job goes on{_end(finding, hang_timeout_s)}. Ctrl-\\ (SIGQUIT) shows all ranks"


def describe_unended(said: str, waited_s: float, hang_timeout_s: float | None) -> tuple[str, str]:
    """Return two lines on a rank whose script has ended but whose process runs. `said`: what keeps it."""
    limit = f" until --hang-timeout ({say_time(hang_timeout_s)})" if hang_timeout_s is not None else " until it ends"
    return (
        f"for {say_time(waited_s)}: {said}",
        f"the job goes on{limit}. Python waits for threads without daemon=True, and for child processes",
    )


def _doing(row: Row) -> str:
    where = f"{short(row.where)}, in {row.function}" if row.where else ""
    return ", ".join(part for part in (where, row.activity, f"since then {row.used}" if row.used else "") if part)


def _end(finding: Finding, hang_timeout_s: float | None) -> str:
    limit_s = finding.timeout_s()
    group = f"the time-out of its process group ({say_time(limit_s)})" if limit_s is not None else ""
    if finding.agreement:  # whether it has come, only the ranks themselves know
        group = f"{group}, if it has not come to it until then" if group else ""
    if hang_timeout_s is not None:
        own = f"--hang-timeout ({say_time(hang_timeout_s)})"
        return f" until {own}" + (f" or {group}" if group else "")
    return (f" until {group}" if group else "") + "; --hang-timeout SECONDS would end it earlier"


def say_time(seconds: float) -> str:
    """Return a time like "90 s", "30 min" or "2 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

"""Read how each rank ended, find the root cause, and describe both."""

from __future__ import annotations

import json
import os
import re
import signal
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from ...runtime.progress import PROGRESS_MARKER
from .desync import describe_ranks
from .stacks import shorten_traceback

# What a rank reports if another rank failed, and it has no error of its own.
_CONSEQUENCE = re.compile(
    r"RankFailure:|RendezvousError:|DistNetworkError:|Connection (closed|reset) by peer|Broken pipe|Socket closed"
    r"|Timed out waiting|timed out after|NCCL communicator was aborted|remote process exited|recvValue failed"
)
_MEANING: dict[int, str] = {
    signal.SIGKILL: "killed",
    signal.SIGSEGV: "a segmentation fault, in C code",
    signal.SIGBUS: "a bus error: often /dev/shm is full, or a memory-mapped file was truncated",
    signal.SIGABRT: "an abort, after an error in C++ code",
    signal.SIGFPE: "an arithmetic error in C code",
    signal.SIGILL: "an instruction that this processor does not have",
    signal.SIGTERM: "another process sent it",
    signal.SIGINT: "another process sent it",
    signal.SIGXCPU: "the limit of processor time is reached",
}
# An exception that was raised from one of these has its cause in the network between ranks. An exception of another
# type may come from a file or a web server.
_OF_THE_GROUP = re.compile(r"(RankFailure|RendezvousError|RuntimeError|Dist\w*Error):")
_LOADER_WORKER = re.compile(r"DataLoader worker.*(killed|exited)")
_CLOSED = re.compile(r"(Connection(Reset|Refused)|BrokenPipe|EOF|FileNotFound)Error:")


def signal_name(number: int) -> str:
    """Return the name of a signal, like "SIGTERM". Real-time signals have no names: return "signal 37"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Cause(IntEnum):
    """Why a rank ended. A lower value is more likely the root cause of the whole failure."""

    KILLED = 0  # SIGKILL, which the kernel sends if memory is full
    CRASHED = 1
    FAILED = 2  # an exception or an exit code of the rank itself
    LEFT_EARLY = 3  # exit code 0 while other ranks waited for it
    LOST = 4  # together with its machine, or with the network to that machine
    CONSEQUENCE = 5  # a closed connection, a time-out, the failure of another rank
    ENDED_BY_US = 6
    FINISHED = 7


@dataclass(frozen=True)
class ExitReport:
    """How one rank ended.

    `code`: the exit code, negative for a signal. `at`: when the agent saw the end, in seconds since 1970.
    `message`: the exception, as "Type: text". `traceback`: of the exception or of the crash. `blames`: the rank that
    failed first, as this rank was told. `evidence`: what else is known, such as full memory or the last lines of a
    crash. `left_early`: it ended with exit code 0 while other ranks waited for it. `lost`: why nothing is known of the
    rank. `progressed`: it had finished a step or saved a checkpoint. `consequence`: its exception was raised from one
    that another rank's end had caused. `interrupted`: its exception was on its way while it waited for other ranks.
    """

    rank: int
    host: str
    code: int
    at: float
    ended_by_us: bool = False
    message: str = ""
    traceback: str = ""
    blames: int | None = None
    evidence: str = ""
    left_early: bool = False
    lost: str = ""
    progressed: bool = False
    consequence: bool = False
    interrupted: bool = False

    @property
    def cause(self) -> Cause:
        if self.lost:
            return Cause.LOST
        if self.left_early:
            return Cause.LEFT_EARLY
        if self.code == 0:
            return Cause.FINISHED
        if self.ended_by_us:
            return Cause.ENDED_BY_US
        if self.code < 0:
            return Cause.KILLED if self.code == -signal.SIGKILL else Cause.CRASHED
        follows = self.consequence or bool(_CONSEQUENCE.search(self.message))
        return Cause.CONSEQUENCE if follows and not self.lost_worker else Cause.FAILED

    @property
    def lost_worker(self) -> bool:
        """Whether a data-loader worker ended. torch says so, or the rank finds its connection to the worker closed."""
        reads = "torch/utils/data/dataloader.py" in self.traceback and "/multiprocessing/" in self.traceback
        return bool(_LOADER_WORKER.search(self.message) or (reads and _CLOSED.match(self.message)))

    @property
    def exit_code(self) -> int:
        """The exit code as a shell shows it: 128 + n for a signal n; 1 for a rank that left early."""
        return 128 - self.code if self.code < 0 else self.code or 1

    def ending(self) -> str:
        """Return in a few words how the rank ended."""
        if self.lost:
            return self.lost
        if self.left_early:
            return "ended with exit code 0 while the others waited for it"
        if self.code < 0:
            meaning = _MEANING.get(-self.code)
            said = f"ended by {signal_name(-self.code)}" + (f" ({meaning})" if meaning else "")
            return f"{said}: {self.evidence}" if self.evidence else said
        return self.message.partition("\n")[0] or f"exit code {self.code}"


def read_exit_report(
    rank: int, host: str, folder: Path, code: int, at: float, ended_by_us: bool = False, logs: Path | None = None
) -> ExitReport:
    """Return how a rank ended, from the files in its folder and, for a crash, from its output.

    `logs`: the folder of its output, if that is another one.
    """
    report = ExitReport(rank, host, code, at, ended_by_us, progressed=(folder / PROGRESS_MARKER).exists())
    try:
        record = json.loads((folder / "error.json").read_text())["message"]
        extra: dict[str, Any] = record["extraInfo"]
        blames = extra.get("rank")
        report = replace(
            report,
            message=record["message"],
            traceback=extra["py_callstack"],
            blames=blames if blames != rank else None,
            consequence=any(
                _OF_THE_GROUP.match(text) and _CONSEQUENCE.search(text) for text in extra.get("before", [])
            ),
        )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if code < 0 and not ended_by_us and report.message:
        # The exception came first. The process crashed when it ended: threads of torch may run while Python shuts down.
        return replace(report, code=1)
    if code < 0 and not ended_by_us and code != -signal.SIGKILL:
        words = " ".join(line.strip() for line in _last_lines((logs or folder) / "stderr.log", 3))
        report = replace(report, traceback=_read_crash(folder / "fatal.txt"), evidence=words[-300:])
    if report.lost_worker:
        evidence = "a data-loader worker ended: often the memory, or the shared memory in /dev/shm, is full"
        report = replace(report, evidence=evidence)
    return report


def _last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a file that are not empty; none if there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-count:]


def _read_crash(path: Path) -> str:
    """Return the stack that faulthandler wrote of the thread that crashed, as a traceback: outermost frame first."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    parts = re.split(r"\n\s*\n", text)
    current = next((part for part in parts if part.lstrip().startswith("Current thread")), None)
    if current is None:
        current = next((part for part in parts if "most recent call first" in part), "")
    frames = [line for line in current.splitlines() if line.startswith("  File ")]
    frames = [frame for frame in frames if "runpy" not in frame and "ddparity/launcher/worker.py" not in frame]
    return "\n".join(["Traceback (most recent call last):", *reversed(frames)]) if frames else ""


def is_own_failure(message: str) -> bool:
    """Return whether an exception, as "Type: text", is a rank's own failure: no end of another rank caused it."""
    return not _CONSEQUENCE.search(message) and not message.startswith(("SystemExit:", "KeyboardInterrupt:"))


def add_exception(report: ExitReport, message: str, traceback: str, waited: str) -> ExitReport:
    """Return the report of a rank that was ended while its exception was on its way: that exception is the failure.

    `waited`: the headline of the hang in which the rank waited.
    """
    evidence = (
        f"this exception was on its way when the rank waited for others, in a finally block or the like: {waited}"
    )
    return replace(
        report,
        code=1,
        ended_by_us=False,
        left_early=False,
        consequence=False,
        message=message,
        traceback=traceback,
        evidence=evidence,
        interrupted=True,
    )


def lost_reports(ranks: Iterable[int], host: str, reason: str, at: float) -> list[ExitReport]:
    """Return reports of the ranks of a lost machine. For the exit code, they count as killed."""
    return [ExitReport(rank, host, -signal.SIGKILL, at, lost=reason) for rank in ranks]


def mark_left_early(reports: Iterable[ExitReport]) -> list[ExitReport]:
    """Return the reports. If all failures are consequences, ranks that finished before them are marked `left_early`."""
    reports = list(reports)
    failed = [report for report in reports if report.cause not in (Cause.FINISHED, Cause.ENDED_BY_US)]
    if not failed or any(report.cause is not Cause.CONSEQUENCE or report.blames is not None for report in failed):
        return reports
    first = min(report.at for report in failed)
    return [replace(report, left_early=report.cause is Cause.FINISHED and report.at <= first) for report in reports]


def root_cause(reports: Iterable[ExitReport]) -> ExitReport:
    """Return the report of the rank that caused the others to end: the first by kind of cause, then by time.

    Among reports with the same cause, a rank that others blame goes first: it told them of its exception.
    """
    reports = list(reports)
    blamed = {report.blames for report in reports if report.blames is not None}
    return min(reports, key=lambda report: (report.cause, report.rank not in blamed, report.at, report.rank))


def is_settled(reports: Sequence[ExitReport], waited_s: float, patience_s: float, pause_s: float) -> bool:
    """Return whether the agent can stop waiting for other ranks to end by themselves.

    If the root cause has not been reported, the agent waits `patience_s`: the rank that failed may still be writing its
    traceback while a rank that failed as a consequence has ended. Otherwise it waits `pause_s`: ranks that fail for the
    same reason end within moments of each other.
    """
    found = root_cause(reports)
    ended = {report.rank for report in reports}
    if found.cause <= Cause.LEFT_EARLY and (found.blames is None or found.blames in ended):
        return waited_s >= pause_s
    return waited_s >= patience_s


def describe_exits(reports: Sequence[ExitReport], world_size: int) -> str:
    """Return the root cause with its traceback, then one line for each other rank; ranks that ended alike share one.

    A long traceback comes first, in full. It follows again with the user's frames only, because people read the end of
    the output first.
    """
    found = root_cause(reports)
    several = len({report.host for report in reports}) > 1
    alike = [
        report
        for report in reports
        if report is not found and (report.message or report.traceback or report.lost) and _is_alike(report, found)
    ]
    ranks = sorted([found.rank, *(report.rank for report in alike)])
    head = f"ddparity: {describe_ranks(ranks)} failed: {found.ending()}" + (f" (on {found.host})" if several else "")
    lines = [head]
    if found.traceback:
        lines.append(brief := shorten_traceback(found.traceback))
        if brief != found.traceback:
            lines = [f"ddparity: the full traceback of {describe_ranks(ranks)}:\n{found.traceback}\n", *lines]
    if found.evidence and found.code >= 0:
        lines.append(f"({found.evidence})")
    others = [report for report in reports if report is not found and report not in alike]
    lines = [*_traceback_of_rank_0(others), *lines]
    lines += [f"ddparity: {line}" for line in _describe_others(others, several)]
    if missing := sorted(set(range(world_size)) - {report.rank for report in reports}):
        lines.append(f"ddparity: {describe_ranks(missing)}: no exit report")
    return "\n".join(lines)


def _traceback_of_rank_0(others: Iterable[ExitReport]) -> list[str]:
    """Return the traceback of rank 0, which rank 0 itself does not print, unless it only tells of another's failure."""
    for report in others:
        if report.rank == 0 and report.traceback and (report.cause is Cause.FAILED or report.consequence):
            return [f"ddparity: the traceback of rank 0:\n{report.traceback}\n"]
    return []


def _describe_others(reports: Iterable[ExitReport], several: bool) -> list[str]:
    groups: dict[str, list[int]] = {}
    for report in sorted(reports, key=lambda report: (report.cause, report.rank)):
        host = f" (on {report.host})" if several else ""
        groups.setdefault(_describe_other(report) + host, []).append(report.rank)
    return [f"{describe_ranks(ranks)}: {text}" for text, ranks in groups.items()]


def _describe_other(report: ExitReport) -> str:
    if report.cause is Cause.ENDED_BY_US:
        return "ended by the launcher"
    if report.cause is Cause.FINISHED:
        return "finished"
    said = textwrap.shorten(report.ending(), 160, placeholder=" …")
    return f"failed as a consequence: {said}" if report.cause is Cause.CONSEQUENCE else said


def _is_alike(report: ExitReport, other: ExitReport) -> bool:
    def shown(one: ExitReport) -> tuple[object, ...]:
        return one.message, one.traceback, one.code, one.lost

    return shown(report) == shown(other)


def pack_reports(reports: Iterable[ExitReport]) -> str:
    """Return the reports as JSON, for the agents of other machines; `unpack_reports` is the inverse."""
    return json.dumps([asdict(report) for report in reports])


def unpack_reports(text: str | bytes) -> list[ExitReport]:
    """Return the reports that `pack_reports` wrote."""
    return [ExitReport(**fields) for fields in json.loads(text)]

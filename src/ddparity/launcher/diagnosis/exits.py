"""Read how each rank ended, find the root cause, and describe both."""

from __future__ import annotations

import json
import re
import signal
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from ...runtime.progress import PROGRESS_MARKER
from .desync import describe_ranks
from .limits import FILE, MESSAGE, read_file, read_json
from .stacks import shorten_traceback

ERROR = "error.json"  # in the folder of a rank: its exception
_OF_WORKER = "pid"  # a field of it that the worker writes, and torch's `record` does not

# What a rank reports if another rank failed, and it has no error of its own.
_CONSEQUENCE = re.compile(
    r"RankFailure:|RendezvousError:|DistNetworkError:|Connection (closed|reset) by peer|Broken pipe|Socket closed"
    r"|Timed out waiting|timed out after|NCCL communicator was aborted|remote process exited|recvValue failed"
)
_MEANING = {
    "SIGKILL": "killed",
    "SIGSEGV": "a segmentation fault, in C code",
    "SIGBUS": "a bus error: often /dev/shm is full, or a memory-mapped file was truncated",
    "SIGABRT": "an abort, after an error in C++ code",
    "SIGFPE": "an arithmetic error in C code",
    "SIGILL": "an instruction that this processor does not have",
    "SIGTERM": "another process sent it",
    "SIGINT": "another process sent it",
    "SIGXCPU": "the limit of processor time is reached",
}
# Only these, or what was raised inside of torch.distributed, have their cause in the network between ranks. An
# exception of another type may come from a file, a program or a web server.
_OF_THE_GROUP = re.compile(r"([\w.]+\.)?(RankFailure|RendezvousError|RuntimeError|Dist\w*Error):")
_FILES = re.compile(r'^ *File "(.+?)"', re.MULTILINE)
_LOADER_WORKER = re.compile(r"DataLoader worker.*(killed|exited)")
_CLOSED = re.compile(r"(Connection\w+|BrokenPipe|EOF|FileNotFound|Authentication)Error:")


# What torch puts before each line of a traceback, what its C++ code logs, and what Python prints.
_RANK_PREFIX = re.compile(r"\[rank\d+\]: ?")
_OF_TORCH = re.compile(r"(\[rank\d+\]:)?\[[WEIF]\d{4} ")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
_UNDERLINE = re.compile(r"\s+[\^~]+\s*")
_LAST_OUTPUT = 1 << 14  # characters
_LAST_LINES = 10
_LONGEST_LINE = 300
_LONGEST_HEAD = 300
_LONGEST_MESSAGE = 4_000
_LONGEST_TRACEBACK = 20_000
_IN_HEAD = 3  # last lines of the output that stand in for a missing exception


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

    `code`: the exit code, negative for a signal. `at`: when its script ended, in seconds since 1970.
    `message`: the exception, as "Type: text". `traceback`: of the exception or of the crash. `blames`: the rank that
    failed first, as this rank was told. `evidence`: what else is known, such as full memory. `said`: the last lines of
    its output, without its traceback. `left_early`: it ended with exit code 0 while other ranks waited for it. `lost`:
    why nothing is known of the rank. `progressed`: it had finished a step or saved a checkpoint. `consequence`: its
    exception was raised from one that another rank's end had caused. `interrupted`: its exception was on its way while
    it waited for other ranks.
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
    said: str = ""
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
        follows = self.consequence or _is_of_another_rank(self.message, self.traceback)
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
            meaning = _MEANING.get(signal_name(-self.code))
            how = f"ended by {signal_name(-self.code)}" + (f" ({meaning})" if meaning else "")
        elif self.message:
            return shortened(self.message.partition("\n")[0], _LONGEST_HEAD)
        else:
            how = f"exit code {self.code}"
        why = self.evidence if self.code < 0 else ""
        why = why or " ".join(line.strip() for line in self.said.splitlines()[-_IN_HEAD:])[-_LONGEST_HEAD:]
        return f"{how}: {why}" if why else how

    @property
    def is_explained(self) -> bool:
        """Whether it is known why the rank failed. 1 is Python's exit code for any exception."""
        return self.code != 1 or bool(self.message)


def read_exit_report(
    rank: int, host: str, folder: Path, code: int, at: float, ended_by_us: bool = False, output: str = ""
) -> ExitReport:
    """Return how a rank ended, from the files in its folder and from the end of its output."""
    report = ExitReport(rank, host, code, at, ended_by_us, progressed=(folder / PROGRESS_MARKER).exists())
    try:
        record = read_exception(folder)
        extra: dict[str, Any] = record["extraInfo"]
        if code != 1 and _OF_WORKER not in extra:
            raise KeyError(_OF_WORKER)  # torch's `record` raises the exception again: it was that of another process
        blames = extra.get("rank")
        report = replace(
            report,
            message=shortened(record["message"], _LONGEST_MESSAGE),
            traceback=shortened(extra["py_callstack"], _LONGEST_TRACEBACK),
            blames=blames if blames != rank else None,
            consequence=any(_is_of_another_rank(text) for text in extra.get("before", [])),
        )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if ended_by_us or code == 0:
        return report
    if code == 1 and not report.message:  # the script has replaced its process, or the disk is full
        message, traceback = find_traceback(output)
        report = replace(report, message=message, traceback=traceback)
    report = replace(report, said=last_lines(output, f"{report.message}\n{report.traceback}"))
    if code < 0 and report.message:
        # The exception came first. The process crashed when it ended: threads of torch may run while Python shuts down.
        return replace(report, code=1)
    if code < 0 and code != -signal.SIGKILL:
        report = replace(report, traceback=_read_crash(folder / "fatal.txt"))
    if report.lost_worker:
        evidence = "a data-loader worker ended: often the memory, or the shared memory in /dev/shm, is full"
        report = replace(report, evidence=evidence)
    return report


def read_exception(folder: Path) -> dict[str, Any]:
    """Return the record of a rank's exception, in torch's form.

    Raises:
        OSError, ValueError, LookupError, TypeError: there is none that can be read.
    """
    record: dict[str, Any] = read_json(read_file(folder / ERROR), FILE)["message"]
    return record


def has_exception(folder: Path) -> bool:
    """Return whether a rank has written its exception.

    A program that the rank has started may have written there, by torch's `record`. Such a rank goes on.
    """
    with suppress(OSError, ValueError, LookupError, TypeError):
        return _OF_WORKER in read_exception(folder)["extraInfo"]
    return False


def find_traceback(output: str) -> tuple[str, str]:
    """Return the message and the traceback of the exception with which an output ends; "" and "" if there is none.

    An exception that was only logged, with other lines after it, is not what ended the process.
    """
    lines = [line for line in _shown_lines(output) if not _OF_TORCH.match(line)]
    lines = [_RANK_PREFIX.sub("", line) for line in lines]
    begins = [number for number, line in enumerate(lines) if line == _TRACEBACK]
    if not begins:
        return "", ""
    begin = begins.pop()
    end = next((number for number in range(begin + 1, len(lines)) if not lines[number].startswith(" ")), len(lines))
    if end != len(lines) - 1:
        return "", ""
    while begins and lines[begin - 1] in _CHAINED:  # blank lines are not among them
        begin = begins.pop()
    return lines[end], shortened("\n".join(lines[begin:]), _LONGEST_TRACEBACK)


def last_lines(output: str, told: str) -> str:
    """Return the last lines of an output without those that are told anyway: the process prints its traceback, too."""
    known = {line.strip() for line in told.splitlines()}
    lines = [_RANK_PREFIX.sub("", line) for line in _shown_lines(output[-_LAST_OUTPUT:])]
    if len(output) >= _LAST_OUTPUT:
        del lines[:1]  # its begin may be missing
    rest = [line for line in lines if line.strip() not in known and not _UNDERLINE.fullmatch(line)]
    return "\n".join(shortened(line, _LONGEST_LINE) for line in rest[-_LAST_LINES:])


def shortened(text: str, limit: int) -> str:
    """Return a text without its middle if it has more characters than `limit`."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters are left out … {text[-half:]}"


def _shown_lines(text: str) -> list[str]:
    """Return the lines that a terminal would show: of a progress bar, its last state. Empty lines are left out."""
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in lines if line]


def _read_crash(path: Path) -> str:
    """Return the stack that faulthandler wrote of the thread that crashed, as a traceback: outermost frame first."""
    try:
        text = read_file(path).decode(errors="replace")
    except OSError:
        return ""
    parts = re.split(r"\n\s*\n", text)
    current = next((part for part in parts if part.lstrip().startswith("Current thread")), None)
    if current is None:
        current = next((part for part in parts if "most recent call first" in part), "")
    frames = [line for line in current.splitlines() if line.startswith("  File ")]
    frames = [frame for frame in frames if "runpy" not in frame and "ddparity/launcher/worker.py" not in frame]
    return "\n".join(["Traceback (most recent call last):", *reversed(frames)]) if frames else ""


def _is_of_another_rank(message: str, traceback: str = "") -> bool:
    """Return whether the end of another rank caused an exception, by its text and by its type or its traceback."""
    of_the_group = bool(_OF_THE_GROUP.match(message)) or _raised_in_the_group(message, traceback)
    return of_the_group and bool(_CONSEQUENCE.search(message))


def _raised_in_the_group(message: str, traceback: str) -> bool:
    """Return whether torch.distributed itself raised an exception.

    It also calls others, as a checkpoint's storage does that uploads. The message may quote a traceback itself.
    """
    text = message.partition(": ")[2] or message
    frames = _FILES.findall((traceback.rpartition(text)[0] if text else "") or traceback)
    return bool(frames) and "/torch/distributed/" in frames[-1] and "/torch/distributed/checkpoint/" not in frames[-1]


def is_own_failure(message: str) -> bool:
    """Return whether an exception, as "Type: text", is a rank's own failure: no end of another rank caused it."""
    return not _is_of_another_rank(message) and not message.startswith(("SystemExit:", "KeyboardInterrupt:"))


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

    Among reports with the same cause, a rank that others blame goes first: it told them of its exception. A rank whose
    exception is not known goes last: it may be a consequence.
    """
    reports = list(reports)
    blamed = {report.blames for report in reports if report.blames is not None}

    def order(report: ExitReport) -> tuple[object, ...]:
        return report.cause, report.rank not in blamed, not report.is_explained, report.at, report.rank

    return min(reports, key=order)


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
    if found.said and (found.message or len(found.said.splitlines()) > _IN_HEAD):  # the head has fewer lines
        lines = [f"ddparity: the last lines of the output of rank {found.rank}:", _indented(found.said), *lines]
    others = [report for report in reports if report is not found and report not in alike]
    lines = [*_traceback_of_rank_0(others), *lines]
    lines += [f"ddparity: {line}" for line in _describe_others(others, several)]
    if missing := sorted(set(range(world_size)) - {report.rank for report in reports}):
        lines.append(f"ddparity: {describe_ranks(missing)}: no exit report")
    return "\n".join(lines)


def _indented(text: str) -> str:
    return textwrap.indent(text, "  ")


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
    """Return the reports as JSON, for the agents of other machines; `unpack_reports` is the inverse.

    Where they are longer than a store takes, only the ends of their texts stay.
    """
    reports = list(reports)
    text = json.dumps([asdict(report) for report in reports])
    if len(text) <= MESSAGE:
        return text
    length = MESSAGE // (20 * len(reports))  # a character may be six bytes in JSON
    short = [replace(one, message=one.message[:length], traceback=one.traceback[-length:]) for one in reports]
    return json.dumps([asdict(replace(one, evidence=one.evidence[-length:])) for one in short])


def unpack_reports(text: str | bytes) -> list[ExitReport] | None:
    """Return the reports that `pack_reports` wrote; None where the text is something else."""
    try:
        return [ExitReport(**fields) for fields in read_json(text)]
    except (ValueError, TypeError):
        return None

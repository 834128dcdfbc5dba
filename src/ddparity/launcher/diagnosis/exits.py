"""How each rank ended, which of them is the cause, and how that is told."""

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

from ...runtime.environment import PROGRESS
from .desync import describe_ranks
from .stacks import shortened

# What a rank says that was well until another one failed.
_CONSEQUENCE = re.compile(
    r"RankFailure:|RendezvousError:|DistNetworkError:|Connection (closed|reset) by peer|Broken pipe|Socket closed"
    r"|Timed out waiting|timed out after|NCCL communicator was aborted|remote process exited|recvValue failed"
)
_MEANING: dict[int, str] = {
    signal.SIGKILL: "killed",
    signal.SIGSEGV: "a segmentation fault, in C code",
    signal.SIGBUS: "a bus error: often a full /dev/shm or a truncated file that is mapped",
    signal.SIGABRT: "aborted, by C++ code that met an error",
    signal.SIGFPE: "an arithmetic error in C code",
    signal.SIGILL: "an instruction that this processor lacks",
    signal.SIGTERM: "told to end, from outside",
    signal.SIGINT: "interrupted, from outside",
    signal.SIGXCPU: "out of processor time",
}
# Where an exception is raised from one of these, the network between ranks was its cause, and no file or web server.
_OF_THE_GROUP = re.compile(r"(RankFailure|RendezvousError|RuntimeError|Dist\w*Error):")
_LOADER_WORKER = re.compile(r"DataLoader worker.*(killed|exited)")
_CLOSED = re.compile(r"(Connection(Reset|Refused)|BrokenPipe|EOF|FileNotFound)Error:")


def signal_name(number: int) -> str:
    """Such as "SIGTERM"; real-time signals have no names of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Cause(IntEnum):
    """What a rank's end may be, the likeliest cause of all others first."""

    KILLED = 0  # SIGKILL, which the kernel sends when memory is out
    CRASHED = 1
    FAILED = 2  # an exception or an exit code of its own
    LEFT = 3  # exit code 0, while others wait for it
    LOST = 4  # with its machine, or with the network to it
    VICTIM = 5  # a closed connection, a time-out, another rank's failure
    ENDED = 6  # by us
    FINISHED = 7


@dataclass(frozen=True)
class Fate:
    """How one rank ended. `code`: negative for a signal. `at`: when that was seen (time.time)."""

    rank: int
    host: str
    code: int
    at: float
    ended_by_us: bool = False
    message: str = ""  # of its exception, as "Type: text"
    trace: str = ""  # its traceback, or where it crashed
    named: int | None = None  # the rank that it was told had failed
    evidence: str = ""  # what else is known: that memory was out, the last words of a crash
    left: bool = False  # with exit code 0, while others waited for it
    lost: str = ""  # why nothing is known of it
    progressed: bool = False  # it had done a step, or saved
    consequence: bool = False  # its exception was raised from that of another rank's end

    @property
    def cause(self) -> Cause:
        if self.lost:
            return Cause.LOST
        if self.left:
            return Cause.LEFT
        if self.code == 0:
            return Cause.FINISHED
        if self.ended_by_us:
            return Cause.ENDED
        if self.code < 0:
            return Cause.KILLED if self.code == -signal.SIGKILL else Cause.CRASHED
        follows = self.consequence or bool(_CONSEQUENCE.search(self.message))
        return Cause.VICTIM if follows and not self.lost_worker else Cause.FAILED

    @property
    def lost_worker(self) -> bool:
        """Whether a data-loader worker ended: the rank is told so, or finds the connection to it closed."""
        reads = "torch/utils/data/dataloader.py" in self.trace and "/multiprocessing/" in self.trace
        return bool(_LOADER_WORKER.search(self.message) or (reads and _CLOSED.match(self.message)))

    @property
    def exit_code(self) -> int:
        """A shell's: 128 + n for a signal n; 1 for a rank that left too early."""
        return 128 - self.code if self.code < 0 else self.code or 1

    def ending(self) -> str:
        """In a few words."""
        if self.lost:
            return self.lost
        if self.left:
            return "ended with exit code 0 while the others waited for it"
        if self.code < 0:
            meaning = _MEANING.get(-self.code)
            said = f"ended by {signal_name(-self.code)}" + (f" ({meaning})" if meaning else "")
            return f"{said}: {self.evidence}" if self.evidence else said
        return self.message.partition("\n")[0] or f"exit code {self.code}"


def read_fate(
    rank: int, host: str, folder: Path, code: int, at: float, ended_by_us: bool = False, logs: Path | None = None
) -> Fate:
    """A rank's end, with what it left in its folder and, at `logs`, among its output."""
    fate = Fate(rank, host, code, at, ended_by_us, progressed=(folder / PROGRESS).exists())
    try:
        record = json.loads((folder / "error.json").read_text())["message"]
        extra: dict[str, Any] = record["extraInfo"]
        named = extra.get("rank")
        fate = replace(
            fate,
            message=record["message"],
            trace=extra["py_callstack"],
            named=named if named != rank else None,
            consequence=any(
                _OF_THE_GROUP.match(text) and _CONSEQUENCE.search(text) for text in extra.get("before", [])
            ),
        )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if code < 0 and not ended_by_us and fate.message:
        return replace(fate, code=1)  # it crashed on its way out: torch's threads may go on while Python ends
    if code < 0 and not ended_by_us and code != -signal.SIGKILL:
        crash, words = _crash(folder / "fatal.txt"), _last_lines((logs or folder) / "stderr.log", 3)
        fate = replace(fate, trace=crash, evidence=" ".join(line.strip() for line in words)[-300:])
    if fate.lost_worker:
        fate = replace(fate, evidence="a data-loader worker ended: often memory, or shared memory in /dev/shm, ran out")
    return fate


def _last_lines(path: Path, count: int = 5) -> list[str]:
    """The last lines of a file that say something; none where it is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-count:]


def _crash(path: Path) -> str:
    """Python's own account of a fatal signal: the thread that met it, outermost frame first as in a traceback."""
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


def lost(ranks: Iterable[int], host: str, reason: str, at: float) -> list[Fate]:
    """The fates of a machine's ranks that nobody tells: for exit codes, as if they had been killed."""
    return [Fate(rank, host, -signal.SIGKILL, at, lost=reason) for rank in ranks]


def with_leavers(fates: Iterable[Fate]) -> list[Fate]:
    """Where only victims failed, a rank that had finished before is what they waited for."""
    fates = list(fates)
    failed = [fate for fate in fates if fate.cause not in (Cause.FINISHED, Cause.ENDED)]
    if not failed or any(fate.cause is not Cause.VICTIM or fate.named is not None for fate in failed):
        return fates
    first = min(fate.at for fate in failed)
    return [replace(fate, left=fate.cause is Cause.FINISHED and fate.at <= first) for fate in fates]


def culprit(fates: Iterable[Fate]) -> Fate:
    """The rank whose end brought about the others': by the kind of cause, then by time.

    A rank that others name, because it told them of its exception, goes before one that merely ended earlier.
    """
    fates = list(fates)
    named = {fate.named for fate in fates if fate.named is not None}
    return min(fates, key=lambda fate: (fate.cause, fate.rank not in named, fate.at, fate.rank))


def settled(fates: Sequence[Fate], waited_s: float, patience_s: float, pause_s: float) -> bool:
    """Whether to stop waiting for more ranks to end by themselves.

    A victim may end before the rank that failed, which is still writing its traceback; and ranks that fail alike do so
    within moments of each other.
    """
    found = culprit(fates)
    ended = {fate.rank for fate in fates}
    if found.cause <= Cause.LEFT and (found.named is None or found.named in ended):
        return waited_s >= pause_s
    return waited_s >= patience_s


def report(fates: Sequence[Fate], world_size: int) -> str:
    """The culprit with its traceback, then a line for each other rank; those that ended alike share one.

    A long traceback stands above, whole, and in the report with the user's frames only: the end is read first.
    """
    found = culprit(fates)
    several = len({fate.host for fate in fates}) > 1
    alike = [
        fate for fate in fates if fate is not found and (fate.message or fate.trace or fate.lost) and _same(fate, found)
    ]
    ranks = sorted([found.rank, *(fate.rank for fate in alike)])
    head = f"ddparity: {describe_ranks(ranks)} failed: {found.ending()}" + (f" (on {found.host})" if several else "")
    lines = [head]
    if found.trace:
        lines.append(brief := shortened(found.trace))
        if brief != found.trace:
            lines = [f"ddparity: the whole traceback of {describe_ranks(ranks)}:\n{found.trace}\n", *lines]
    if found.evidence and found.code >= 0:
        lines.append(f"({found.evidence})")
    others = [fate for fate in fates if fate is not found and fate not in alike]
    lines = [*_of_rank_0(others), *lines]
    lines += [f"ddparity: {line}" for line in _others(others, several)]
    if missing := sorted(set(range(world_size)) - {fate.rank for fate in fates}):
        lines.append(f"ddparity: {describe_ranks(missing)}: no word")
    return "\n".join(lines)


def _of_rank_0(others: Iterable[Fate]) -> list[str]:
    """Its traceback, which it leaves to the launcher, where that is more than another rank's failure."""
    for fate in others:
        if fate.rank == 0 and fate.trace and (fate.cause is Cause.FAILED or fate.consequence):
            return [f"ddparity: the traceback of rank 0:\n{fate.trace}\n"]
    return []


def _others(fates: Iterable[Fate], several: bool) -> list[str]:
    groups: dict[str, list[int]] = {}
    for fate in sorted(fates, key=lambda fate: (fate.cause, fate.rank)):
        host = f" (on {fate.host})" if several else ""
        groups.setdefault(_fate_of_another(fate) + host, []).append(fate.rank)
    return [f"{describe_ranks(ranks)}: {text}" for text, ranks in groups.items()]


def _fate_of_another(fate: Fate) -> str:
    if fate.cause is Cause.ENDED:
        return "ended by the launcher"
    if fate.cause is Cause.FINISHED:
        return "finished"
    said = textwrap.shorten(fate.ending(), 160, placeholder=" …")
    return f"failed in consequence: {said}" if fate.cause is Cause.VICTIM else said


def _same(fate: Fate, other: Fate) -> bool:
    return (fate.message, fate.trace, fate.code, fate.lost) == (other.message, other.trace, other.code, other.lost)


def to_json(fates: Iterable[Fate]) -> str:
    return json.dumps([asdict(fate) for fate in fates])


def from_json(text: str | bytes) -> list[Fate]:
    return [Fate(**fields) for fields in json.loads(text)]

"""Send the output of rank 0 to the terminal, and keep that of other ranks, which can be shown, too."""

from __future__ import annotations

import itertools
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, TextIO

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from .pipes import PipeReader, RankPipe

Show = Literal["all"] | frozenset[int]
JOB_VARIABLE = "DDPARITY_JOB"  # in all that a rank starts: the folders of the launchers above it
_OF_RUNS = ("rank[0-9]*", "attempt[0-9]*", "waits.txt", "stacks-rank-*.txt")  # in a folder of logs
_PAUSE_S = 0.1  # between two reads of the files
_CHUNK = 1 << 16  # bytes that are read at once
_LONGEST_LINE = 1 << 20  # a longer one is shown in parts
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# All that moves the cursor, rings, or changes the direction or the number of the lines.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def tell(line: str) -> None:
    """Print a line of the launcher to standard error."""
    say(f"ddparity: {line}")


def say(text: str) -> None:
    """Print a text to standard error. If that is closed, the job goes on. It may quote what ranks wrote."""
    with suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return a text without colours, and with other control characters in it as escapes, like \\x07."""
    text = _COLOUR.sub("", text.replace("\r\n", "\n"))
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class RankFiles(LogsSpecs):
    """Where the output of each local rank goes, and its folder for its agent. Each start of the ranks has new ones.

    `folder`: for folders like `rank1`; its path must be short, since sockets are in it. The launcher reads the output
    from pipes and keeps its end. `logs`: a folder for all of it, in files like `rank1/stderr.log`.
    `show`: the ranks whose output goes to the terminal. If that is rank 0 alone, it writes to the terminal itself. The
    lines of several ranks are forwarded, with their host and rank in front.
    """

    def __init__(self, folder: Path, show: Show, logs: Path | None = None) -> None:
        super().__init__()
        self._folder = folder
        self._logs = self.kept = logs  # it stays after the job has ended
        self._show = show
        self._attempts = 0
        self._lost = False  # it was told that logs cannot be written
        self._forwarders: list[Forwarder] = []
        self._reader: PipeReader | None = None
        self._outputs: dict[str, dict[int, RankPipe]] = {}  # by stream, then by local rank
        self.folders: dict[int, Path] = {}  # of each local rank, in the current attempt
        above = os.environ.get(JOB_VARIABLE)
        self.variables = {JOB_VARIABLE: f"{above}:{folder}" if above else str(folder)}  # not for this process

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        attempt = f"attempt{self._attempts}" if self._attempts else ""
        self._attempts += 1
        self.folders = {local: self._folder / attempt / f"rank{rank}" for local, rank in ranks.items()}
        for local, folder in self.folders.items():
            folder.mkdir(parents=True)
            envs[local].update(self.variables)
            envs[local]["TORCHELASTIC_ERROR_FILE"] = str(folder / "error.json")
        logs = self.kept / attempt if self.kept else None
        self._outputs = {
            stream: {
                local: self._pipe(self.folders[local], logs, rank, stream)
                for local, rank in ranks.items()
                if not self._writes_itself(rank)
            }
            for stream in ("stdout", "stderr")
        }
        pipes = [one for of_ranks in self._outputs.values() for one in of_ranks.values()]
        self._reader = PipeReader(pipes) if pipes else None
        for stream, terminal in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            shown = {ranks[local]: one for local, one in self._outputs[stream].items() if self._is_shown(ranks[local])}
            if shown:
                self._forwarders.append(Forwarder(shown, terminal))
        paths = {
            stream: {local: str(of_ranks[local].path) if local in of_ranks else "" for local in ranks}
            for stream, of_ranks in self._outputs.items()
        }
        # torch would read a whole error file, and end this process where it is not one of its own.
        errors = dict.fromkeys(ranks, "")
        return LogsDest(stdouts=paths["stdout"], stderrs=paths["stderr"], error_files=errors)

    def free_run(self) -> int:
        """Return the number of the first run for which the folder of the logs has no output of an earlier job."""
        if self._logs is None or not any(found for name in _OF_RUNS for found in self._logs.glob(name)):
            return 1
        return next(number for number in itertools.count(2) if not (self._logs / f"run{number}").exists())

    def begin_run(self, number: int) -> None:
        """Write to a folder like `run2` in that of the logs, from the second run on. Machines agree on the number."""
        if self._logs is not None and number > 1:
            self.kept = self._logs / f"run{number}"
            tell(f"the logs go to {self.kept}, since those of an earlier run are in {self._logs}")

    def end_of(self, local_rank: int) -> str:
        """Return the end of what a rank has written to standard error, or if that is nothing, to standard output.

        A rank that writes to the terminal itself has "".
        """
        for stream in ("stderr", "stdout"):
            source = self._outputs.get(stream, {}).get(local_rank)
            if source is not None and (text := source.end(_CHUNK)):
                return text.decode(errors="replace")
        return ""

    def close(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Forward the rest of the output after the ranks have ended. Stop if `hurry()`: a pager may not read."""
        if self._reader is not None:
            self._reader.close()
        for forwarder in self._forwarders:
            forwarder.close(hurry)
        for stream, number in (("stdout", 1), ("stderr", 2)):
            for source in self._outputs.get(stream, {}).values():
                source.close(number if source.shown else None)
        self._forwarders.clear()
        self._reader, self._outputs = None, {}

    def _pipe(self, folder: Path, logs: Path | None, rank: int, stream: str) -> RankPipe:
        if logs is None:
            return RankPipe(folder / stream, self._is_shown(rank))
        (logs / f"rank{rank}").mkdir(parents=True, exist_ok=True)
        return RankPipe(folder / stream, self._is_shown(rank), logs / f"rank{rank}" / f"{stream}.log", self.lose)

    def lose(self, path: Path, error: OSError) -> None:
        """Tell once that a file of the logs cannot be written. The job goes on."""
        if not self._lost:
            self._lost = True
            tell(f"cannot write {path} (--logs): {error.strerror}. The job goes on, and what does not fit is lost")

    def _writes_itself(self, rank: int) -> bool:
        return rank == 0 and self._show == frozenset({0})

    def _is_shown(self, rank: int) -> bool:
        return self._show == "all" or rank in self._show


class Inherited(RankFiles):
    """Files as in `RankFiles`, but every rank writes its output to that of the launcher."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, frozenset())

    def _writes_itself(self, rank: int) -> bool:
        return True


class Forwarder:
    """Copy the lines that ranks write to the terminal, with host and rank in front of each.

    `terminal`: None if it is closed, as in `>&-`. Then the lines are read and left out.
    """

    def __init__(self, sources: Mapping[int, RankPipe], terminal: TextIO | None) -> None:
        host = socket.gethostname()
        self._prefixes = {rank: f"[{host} r{rank}] ".encode() for rank in sources}
        self._sources, self._terminal = sources, terminal
        self._begun = dict.fromkeys(sources, b"")  # of each rank's line that has no end yet
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._forward, name="ddparity-output", daemon=True)
        self._thread.start()

    def close(self, hurry: Callable[[], bool] = lambda: False) -> None:
        self._ended.set()
        while self._thread.is_alive() and not hurry():
            self._thread.join(_PAUSE_S)

    def _forward(self) -> None:
        try:
            if self._terminal is None:
                raise ValueError("the terminal is closed")
            while not self._ended.wait(_PAUSE_S):
                while sum(self._show(rank, source.next()) for rank, source in self._sources.items()):
                    if self._ended.is_set():
                        break
            for rank, source in self._sources.items():
                while self._show(rank, source.rest()):
                    pass
                if self._begun[rank]:
                    self._show(rank, b"\n")
        except (OSError, ValueError) as error:  # the terminal is closed, or the disk behind it is full: the job goes on
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                name = "standard output" if self._terminal is sys.stdout else "standard error"
                tell(f"cannot write what the ranks write to {name}: {error.strerror}. The job goes on without it")
            while not self._ended.wait(_PAUSE_S):
                for source in self._sources.values():
                    source.next()

    def _show(self, rank: int, text: bytes) -> bool:
        """Write the whole lines, and keep the begin of another for the next time. Return whether there was a text."""
        if not text or self._terminal is None:
            return False
        text = self._begun[rank] + text
        end = _end_of_lines(text) or (len(text) if len(text) > _LONGEST_LINE else 0)
        self._begun[rank] = text[end:]
        lines = text[:end].splitlines(keepends=True)
        prefixed = b"".join(self._prefixes[rank] + line for line in lines)
        encoding = self._terminal.encoding or "utf-8"
        shown = prefixed.decode(errors="replace").encode(encoding, "backslashreplace").decode(encoding)
        self._terminal.write(shown)
        self._terminal.flush()
        return True


def _end_of_lines(text: bytes) -> int:
    """Return where the last whole line ends. Progress bars end their lines with a carriage return."""
    return max(text.rfind(b"\n"), text.rfind(b"\r")) + 1

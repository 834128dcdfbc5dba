"""Send the output of rank 0 to the terminal, and that of other ranks to files, which can be shown, too."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, TextIO

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

Show = Literal["all"] | frozenset[int]
_PAUSE_S = 0.1  # between two reads of the files
_CHUNK = 1 << 16  # bytes that are read at once


def tell(line: str) -> None:
    """Print a line of the launcher to standard error."""
    say(f"ddparity: {line}")


def say(text: str) -> None:
    """Print a text to standard error. If that is closed, the job goes on."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class RankFiles(LogsSpecs):
    """The files of each local rank: its output, and what it writes for the agent. Each start of the ranks has new ones.

    `folder`: for folders like `rank1`, with `stdout.log` and `stderr.log`; its path must be short, since sockets are
    in it. `logs`: another folder for the output, which stays after the job. `show`: the ranks whose output goes to the
    terminal. If that is rank 0 alone, it writes to the terminal itself. The lines of several ranks are forwarded, with
    their host and rank in front.
    """

    def __init__(self, folder: Path, show: Show, logs: Path | None = None) -> None:
        super().__init__()
        self._folder = folder
        self._logs = logs or folder
        self.kept = logs  # it stays after the job has ended
        self._show = show
        self._attempts = 0
        self._forwarders: list[Forwarder] = []
        self.folders: dict[int, Path] = {}  # of each local rank, in the current attempt
        self.logs: dict[int, Path] = {}
        self.variables: dict[str, str] = {}  # for the ranks only, not for this process

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        attempt = f"attempt{self._attempts}" if self._attempts else ""
        self._attempts += 1
        self.folders = {local: self._folder / attempt / f"rank{rank}" for local, rank in ranks.items()}
        self.logs = {local: self._logs / attempt / f"rank{rank}" for local, rank in ranks.items()}
        for local, folder in self.folders.items():
            folder.mkdir(parents=True)
            self.logs[local].mkdir(parents=True, exist_ok=True)
            envs[local].update(self.variables)
            envs[local]["TORCHELASTIC_ERROR_FILE"] = str(folder / "error.json")
        files = {
            stream: {local: "" if self._writes_itself(rank) else str(self.logs[local] / f"{stream}.log")
                     for local, rank in ranks.items()}
            for stream in ("stdout", "stderr")
        }  # fmt: skip
        for stream, terminal in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            shown = {rank: Path(files[stream][local]) for local, rank in ranks.items() if self._is_forwarded(rank)}
            if shown:
                self._forwarders.append(Forwarder(shown, terminal))
        errors = {local: str(folder / "error.json") for local, folder in self.folders.items()}
        return LogsDest(stdouts=files["stdout"], stderrs=files["stderr"], error_files=errors)

    def close(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Forward the rest of the output after the ranks have ended. Stop if `hurry()`: a pager may not read."""
        for forwarder in self._forwarders:
            forwarder.close(hurry)
        self._forwarders.clear()

    def _writes_itself(self, rank: int) -> bool:
        return rank == 0 and self._show == frozenset({0})

    def _is_forwarded(self, rank: int) -> bool:
        return not self._writes_itself(rank) and (self._show == "all" or rank in self._show)


class Inherited(RankFiles):
    """Files as in `RankFiles`, but every rank writes its output to that of the launcher."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, frozenset())

    def _writes_itself(self, rank: int) -> bool:
        return True


class Forwarder:
    """Copy the lines that ranks append to their files to the terminal, with host and rank in front of each."""

    def __init__(self, files: Mapping[int, Path], terminal: TextIO) -> None:
        host = socket.gethostname()
        self._prefixes = {rank: f"[{host} r{rank}] ".encode() for rank in files}
        self._files, self._terminal = files, terminal
        self._offsets = dict.fromkeys(files, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._forward, name="ddparity-output", daemon=True)
        self._thread.start()

    def close(self, hurry: Callable[[], bool] = lambda: False) -> None:
        self._ended.set()
        while self._thread.is_alive() and not hurry():
            self._thread.join(_PAUSE_S)

    def _forward(self) -> None:
        with suppress(OSError, ValueError):  # the terminal is closed: the job goes on and writes its files
            while not self._ended.wait(_PAUSE_S):
                self._copy(whole=True)
            self._copy(whole=False)

    def _copy(self, whole: bool) -> None:
        for rank, path in self._files.items():
            while (text := self._next(rank, path, whole)) is not None:
                lines = text.splitlines(keepends=True)
                prefixed = b"".join(self._prefixes[rank] + line for line in lines)
                encoding = self._terminal.encoding or "utf-8"
                shown = prefixed.decode(errors="replace").encode(encoding, "backslashreplace").decode(encoding)
                self._terminal.write(shown)
                self._terminal.flush()

    def _next(self, rank: int, path: Path, whole: bool) -> bytes | None:
        """Return the next lines of a file, None if there are none. `whole`: leave a last line that has no end yet."""
        try:
            with open(path, "rb") as file:
                file.seek(self._offsets[rank])
                text = file.read(_CHUNK)
                while text and _end_of_lines(text) == 0 and (more := file.read(_CHUNK)):
                    text += more
        except FileNotFoundError:
            return None
        end = _end_of_lines(text)
        if end == 0 and not whole and text:
            end, text = len(text), text + b"\n"
            self._offsets[rank] += end
            return text
        self._offsets[rank] += end
        return text[:end] or None


def _end_of_lines(text: bytes) -> int:
    """Return where the last whole line ends. Progress bars end their lines with a carriage return."""
    return max(text.rfind(b"\n"), text.rfind(b"\r")) + 1

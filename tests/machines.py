"""Start `ddparity run` for tests, on this machine or in network namespaces that stand for several machines."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

SRC = Path(__file__).parent.parent / "src"


def run_threads(function: Callable[..., object], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Call a function in a thread for each tuple of arguments, all at once; wait for 30 s each."""
    threads = [threading.Thread(target=function, args=one) for one in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


class Machine:
    """One `ddparity run` and all processes that it started. A thread reads the lines of both streams."""

    def __init__(self, arguments: Sequence[str], namespace: str | None = None, **variables: str) -> None:
        within = ["ip", "netns", "exec", namespace] if namespace is not None else []
        clean = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
        path = os.pathsep.join(filter(None, (str(SRC), os.environ.get("PYTHONPATH"))))
        threads = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [*within, sys.executable, "-m", "ddparity", "run", *arguments],
            env=clean | threads | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 40.0, start: int = 0) -> re.Match[str]:
        """Return the first match in a line from number `start` on; fail with all lines if none appears in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for line in self.lines[start:]:
                    if (found := re.search(pattern, line)) is not None:
                        return found
                start = len(self.lines)
                left = deadline - time.monotonic()
                assert left > 0 and not self._ended, f"no {pattern!r} in:\n{self.text}"
                self._changed.wait(min(left, 1.0))

    def end(self, timeout_s: float = 60.0) -> int:
        """Wait for the end, and return the exit code."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {timeout_s:g} s:\n{self.text}") from None
        self._thread.join(10)
        return code

    def family(self) -> list[psutil.Process]:
        """Return the launcher and all processes that it has started; none after its end."""
        with suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.process.pid)
            return [agent, *agent.children(recursive=True)]
        return []

    def ranks(self) -> list[psutil.Process]:
        """Return the main processes of the ranks that run."""
        found = []
        for child in self.family()[1:]:
            with suppress(psutil.Error):
                if any(part.endswith("launcher/worker.py") for part in child.cmdline()[:3]):
                    found.append(child)
        return [child for child in found if child.ppid() == self.process.pid]

    def kill(self) -> None:
        """Kill all processes of the machine at once, as a power cut does."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        self._thread.join(20)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Network:
    """Two machines, connected by a pair of virtual interfaces with a delay and a rate. They meet at `addresses[0]`."""

    addresses = ("10.78.1.1", "10.78.1.2")

    def __init__(self, prefix: str) -> None:
        self.names = (f"{prefix}a", f"{prefix}b")
        self._ends = (f"{prefix}x", f"{prefix}y")

    def open(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        pair = ["type", "veth", "peer", "name", self._ends[1], "netns", self.names[1]]
        _ip("link", "add", self._ends[0], "netns", self.names[0], *pair)
        for name, end, address in zip(self.names, self._ends, self.addresses):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", end, "up")

    def listening(self, machine: Machine) -> set[str]:
        """Return the IPv4 addresses at which anything listens in the namespace of a machine; for IPv6, the lines."""
        found = set()
        for file in ("tcp", "tcp6"):
            for line in Path(f"/proc/{machine.process.pid}/net/{file}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == "0A":  # TCP_LISTEN
                    address = local.partition(":")[0]
                    found.add(".".join(map(str, bytes.fromhex(address)[::-1])) if file == "tcp" else line)
        return found

    def shape(self, rate: str = "200mbit", latency: str = "50ms") -> None:
        """Limit the rate at each end; data that exceeds it waits in a queue, at most `latency`."""
        for name, end in zip(self.names, self._ends):
            queue = f"tc qdisc replace dev {end} root tbf rate {rate} burst 256kb latency {latency}"
            _ip("netns", "exec", name, *queue.split())

    def cut(self, machine: int = 1) -> None:
        _ip("-n", self.names[machine], "link", "set", self._ends[machine], "down")

    def mend(self, machine: int = 1) -> None:
        _ip("-n", self.names[machine], "link", "set", self._ends[machine], "up")

    def cut_for(self, seconds: float) -> None:
        self.cut()
        threading.Event().wait(seconds)
        self.mend()

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def network(prefix: str) -> Iterator[Network]:
    """Yield a network of two machines; raise OSError, with the reason, if namespaces are not permitted."""
    if shutil.which("ip") is None or shutil.which("tc") is None or os.geteuid() != 0:
        raise OSError("network namespaces need root and the ip and tc commands")
    found = Network(prefix)
    try:
        try:
            found.open()
            found.shape()
        except subprocess.SubprocessError as error:
            raise OSError(f"no network namespaces here: {getattr(error, 'stderr', None) or error}") from error
        yield found
    finally:
        found.close()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)

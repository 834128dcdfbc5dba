"""Start `ddparity run` from a process that has imported it already: a fork takes no time, the imports two seconds."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

_LONGEST = 1 << 20  # bytes of a request


class Started:
    """A launcher that runs, with what the tests use of subprocess.Popen. Its standard input is empty.

    `output`: a file for all of its output. Without, `stdout` and `stderr` are pipes.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | None = None,
    ) -> None:
        status, status_end = os.pipe()
        ends = [os.open(os.devnull, os.O_RDONLY)]
        if output is not None:
            ends += [os.dup(output.fileno()), os.dup(output.fileno())]
        else:
            (out, out_end), (err, err_end) = os.pipe(), os.pipe()
            ends += [out_end, err_end]
            self.stdout, self.stderr = open(out), open(err)  # noqa: SIM115 - the test closes them
        ends.append(status_end)
        request = json.dumps([arguments, dict(os.environ if env is None else env), str(cwd or os.getcwd())]).encode()
        assert len(request) < _LONGEST, "a request is one packet"
        socket.send_fds(_server(), [request], ends)
        for number in ends:
            os.close(number)
        self._status = open(status, "rb", buffering=0)  # noqa: SIM115 - closed with the streams
        self.args = arguments
        self.returncode: int | None = None
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else 3600)
        while (code := self.poll()) is None:
            left_s = deadline - time.monotonic()
            if left_s < 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            select.select([self._status], [], [], left_s)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        found = ["", ""]

        def read(index: int, stream: IO[str]) -> None:
            if not stream.closed:
                found[index] = stream.read()
                stream.close()

        readers = [threading.Thread(target=read, args=one) for one in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + (timeout if timeout is not None else 3600)
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(max(1.0, deadline - time.monotonic()))
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def _server() -> socket.socket:
    """Start the process that has imported ddparity. It ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = f"from tests.launcher.warm import _serve; _serve({theirs.fileno()})"
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait(10)

    atexit.register(end)
    return ours


def _serve(number: int) -> None:
    import ddparity.cli
    import ddparity.launcher  # noqa: F401 - what a launcher needs

    requests = socket.socket(fileno=number)
    while True:
        text, numbers, _, _ = socket.recv_fds(requests, _LONGEST, 4)
        if not text:
            return
        if os.fork() == 0:
            requests.close()
            _tend(json.loads(text), numbers)
        for one in numbers:
            os.close(one)
        while True:  # those that have ended
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def _tend(request: Any, numbers: list[int]) -> NoReturn:
    """Fork the launcher, wait for it, and tell its process id and its exit code."""
    *streams, status = numbers
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _become(request, streams)
    for one in streams:
        os.close(one)
    os.write(status, f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, f"{code}\n".encode())
    os._exit(0)


def _become(request: Any, streams: list[int]) -> NoReturn:
    arguments, environment, folder = request
    for number, one in enumerate(streams):
        os.dup2(one, number)
        os.close(one)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["ddparity", *arguments]
    from ddparity.cli import main

    code = 1
    try:
        main()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

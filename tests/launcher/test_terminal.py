"""A debugger's prompt, on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

from ddparity.launcher.diagnosis.instruments import has_prompt, write_prompt


def _prompt_of_another_process(folder: Path) -> subprocess.Popen[bytes]:
    """Return a process that has told that it is at a prompt, and that waits."""
    code = f"""if True:
        from pathlib import Path
        from ddparity.launcher.diagnosis.instruments import write_prompt
        write_prompt(Path({str(folder)!r}))
        print("ready", flush=True)
        input()"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def test_a_prompt_ends_with_its_process_and_no_earlier(tmp_path: Path) -> None:
    """Two processes of a rank, as two workers of a data loader, are at a prompt."""
    assert not has_prompt(tmp_path)
    with _prompt_of_another_process(tmp_path) as other:
        own = write_prompt(tmp_path)
        own.unlink()  # this one's has ended
        assert has_prompt(tmp_path)
        (left,) = tmp_path.glob("prompt.*")
        other.kill()
        other.wait()
    assert left.exists() and not has_prompt(tmp_path)
    own.write_text("1")  # of an earlier process with this id
    assert not has_prompt(tmp_path)


SCRIPT = """
import os, sys, time
if os.environ["RANK"] == "0":
    if sys.argv[1] == "after continue":
        breakpoint()
    breakpoint()
time.sleep(600)
"""


def _read_until(terminal: int, text: bytes, times: int = 1) -> bytes:
    found, deadline = b"", time.monotonic() + 60
    while found.count(text) < times:
        assert time.monotonic() < deadline, found.decode()
        if select.select([terminal], [], [], 0.1)[0]:
            found += os.read(terminal, 1 << 16)
    return found


def test_ctrl_c_at_a_prompt_ends_the_job_and_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    terminal, inner = pty.openpty()
    before = termios.tcgetattr(inner)
    command = [sys.executable, "-m", "ddparity", "run", "--nproc", "2", "script.py", "after continue"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        try:
            _read_until(terminal, b"(Pdb) ")
            os.write(terminal, b"continue\n")
            _read_until(terminal, b"(Pdb) ")
            pressed = time.monotonic()
            os.write(terminal, b"\x03")
            said = _read_until(terminal, b"ended all processes on SIGINT")
            assert process.wait(20) == 130, said
            assert time.monotonic() - pressed < 20  # --shutdown-timeout is 30 s
        finally:
            process.kill()
    assert termios.tcgetattr(inner) == before
    os.close(terminal)
    os.close(inner)

"""A debugger's prompt, on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

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
import os, time
if os.environ["RANK"] == "0":
    print("rank 0 is", os.getpid(), "and stops", flush=True)
    breakpoint()
    breakpoint()
time.sleep(600)
"""


def _read_until(terminal: int, text: bytes) -> bytes:
    found, deadline = b"", time.monotonic() + 60
    while text not in found:
        assert time.monotonic() < deadline, found.decode()
        if select.select([terminal], [], [], 0.1)[0]:
            found += os.read(terminal, 1 << 16)
    return found


@pytest.mark.parametrize(
    ("how", "said", "code"),
    [("Ctrl-C", b"ended all processes on SIGINT", 130), ("SIGKILL", b"rank 0 failed: ended by SIGKILL", 137)],
)
def test_a_job_that_ends_at_a_prompt_leaves_the_terminal_as_it_was(
    how: str, said: bytes, code: int, tmp_path: Path
) -> None:
    """The prompt is the second one, after `continue`: pdb handles Ctrl-C itself from there on."""
    (tmp_path / "script.py").write_text(SCRIPT)
    terminal, inner = pty.openpty()
    before = termios.tcgetattr(inner)
    command = [sys.executable, "-m", "ddparity", "run", "--nproc", "2", "script.py"]
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
            text = _read_until(terminal, b"(Pdb) ")
            os.write(terminal, b"continue\n")
            _read_until(terminal, b"(Pdb) ")
            assert termios.tcgetattr(inner) != before  # without echo: readline shows what is typed
            pressed = time.monotonic()
            if how == "Ctrl-C":
                os.write(terminal, b"\x03")
            else:
                os.kill(int(text.partition(b"rank 0 is ")[2].split()[0]), signal.SIGKILL)
            end = _read_until(terminal, said)
            assert process.wait(20) == code, end
            assert time.monotonic() - pressed < 20  # --shutdown-timeout is 30 s
        finally:
            process.kill()
    assert termios.tcgetattr(inner) == before
    os.close(terminal)
    os.close(inner)

"""What ranks write: the end of it is in the report, none of it fills the disk, and reports are readable text."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import ddparity as dp
from ddparity.launcher.diagnosis.exits import ExitReport, find_traceback, last_lines, root_cause, shortened
from ddparity.launcher.output import printable
from ddparity.launcher.pipes import KEPT_BYTES, RankPipe

from ..ranks import free_port
from .test_launch import _run, _script

ASSERTION = "IndexKernel.cu:93: Assertion `t < n_classes` failed."


@pytest.mark.parametrize(
    ("end", "code", "report"),
    [
        (
            'raise RuntimeError("device-side assert")',
            1,
            rf"the last lines of the output of rank 1:\n  {re.escape(ASSERTION)}\n"
            r"ddparity: rank 1 failed: RuntimeError: device-side assert\nTraceback ",
        ),
        ("os._exit(3)", 3, rf"rank 1 failed: exit code 3: {re.escape(ASSERTION)}\n"),
        ("os.abort()", 134, rf"rank 1 failed: ended by SIGABRT \(.*\): {re.escape(ASSERTION)}\n"),
        ('sys.exit("no licence")', 1, rf"{re.escape(ASSERTION)}\nddparity: rank 1 failed: no licence\n(?!.*licence)"),
    ],
    ids=["exception", "exit", "abort", "message"],
)
@pytest.mark.parametrize("logs", [False, True], ids=["pipe", "logs"])
def test_the_last_lines_of_standard_error_are_in_the_report(
    tmp_path: Path, end: str, code: int, report: str, logs: bool
) -> None:
    if logs and "raise" not in end:
        pytest.skip("one case shows that log files are read, too")
    body = f"""
        if rank == 1:
            os.write(2, b"{ASSERTION}\\n")
            {end}
        time.sleep(600)
    """
    options = ["--logs", str(tmp_path / "logs")] if logs else []
    found, _, err = _run("--nproc", "2", *options, _script(tmp_path, body))
    assert found == code
    assert re.search(report, err), err


def test_standard_output_is_in_the_report_where_standard_error_is_empty(tmp_path: Path) -> None:
    body = "print('FATAL: no licence', flush=True) if rank else time.sleep(600)\nos._exit(5)"
    code, _, err = _run("--nproc", "2", _script(tmp_path, body))
    assert (code, err.splitlines()[0]) == (5, "ddparity: rank 1 failed: exit code 5: FATAL: no licence")


TRACE = """Traceback (most recent call last):
  File "train.py", line 8, in <module>
    train()
    ~~~~~^^
KeyError: 'image'"""
CHAINED = f"""{TRACE}

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "train.py", line 9, in <module>
    raise ValueError("bad batch")
ValueError: bad batch"""
OF_TORCH = "[rank1]:[W1127 06:12:13.1 ProcessGroupNCCL.cpp:1250] Warning: WARNING: process group has NOT been destroyed"


@pytest.mark.parametrize(
    ("output", "message", "traceback"),
    [
        (f"a warning\n{TRACE}\n", "KeyError: 'image'", TRACE),
        (f"{TRACE}\n{OF_TORCH}\n\n", "KeyError: 'image'", TRACE),
        ("".join(f"[rank1]: {line}\n" for line in TRACE.splitlines()), "KeyError: 'image'", TRACE),
        (f"{TRACE}\nretrying\nFATAL: no licence\n", "", ""),
        (f"{TRACE}\nretrying\n{CHAINED}", "ValueError: bad batch", CHAINED.replace("\n\n", "\n")),
        ("Traceback (most recent call last):\n  File", "", ""),
        ("", "", ""),
    ],
)
def test_a_traceback_at_the_end_of_the_output_is_found(output: str, message: str, traceback: str) -> None:
    assert find_traceback(output) == (message, traceback)


def test_the_last_lines_are_without_the_traceback_and_old_states_of_progress_bars() -> None:
    printed = "".join(f"[rank1]: {line}\n" for line in TRACE.splitlines())
    output = f"one\r\n\n{printed}  0%|   | 0/2\r 50%|## | 1/2\r100%|###| 2/2\ntwo\n"
    assert last_lines(output, TRACE).splitlines() == ["one", "100%|###| 2/2", "two"]
    many = last_lines("".join(f"line {number}\n" for number in range(10_000)), "").splitlines()
    assert many == [f"line {number}" for number in range(9_990, 10_000)]
    assert len(last_lines("x" * 5_000_000, "")) < 1000


def test_a_rank_whose_exception_is_not_known_is_not_the_first_to_blame() -> None:
    unknown = ExitReport(0, "node0", 1, 1.0)
    known = ExitReport(1, "node0", 1, 2.0, message="ValueError: bad batch")
    assert root_cause([unknown, known]) is known
    assert root_cause([ExitReport(0, "node0", 3, 1.0), known]).rank == 0


# Exceptions that are hard to tell.

HARD = {
    "long": (
        "ValueError('x' * 5_000_000 + 'the end')",
        r"rank 1 failed: ValueError: xxx+ … [\d,]+ characters .*the end",
    ),
    "lines": ("ValueError('\\n'.join(map(str, range(900_000))))", r"rank 1 failed: ValueError: 0\n"),
    "no str": ("Silent() from Silent()", r"rank 1 failed: Silent: <its __str__ raised ZeroDivisionError>\n"),
    "control": (
        r"ValueError('\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b \u202e \ud800 a\rb')",
        r"ValueError: red \\x1b\]0;title\\x07 \\x9b \\u202e \\ud800 a\\rb\n",
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_any_exception_is_told(tmp_path: Path, name: str) -> None:
    raised, report = HARD[name]
    body = f"""
        class Silent(Exception):
            def __str__(self):
                return str(1 / 0)

            def __eq__(self, other):
                raise TypeError("compared")

        if rank == 1:
            print("\\033[2J\\a", file=sys.stderr)
            raise {raised}
        time.sleep(600)
    """
    code, _, err = _run("--nproc", "2", _script(tmp_path, body))
    assert code == 1
    assert re.search(report, err), err[-3000:]
    assert "script.py" in err
    assert len(err) < 100_000
    assert printable(err) == err


def test_launch_raises_readable_text() -> None:
    with pytest.raises(dp.RankFailure) as caught:
        dp.launch(_raises, nproc=1)
    assert r"ValueError: \x07bell" in str(caught.value)
    assert all(printable(text) == text for text in (str(caught.value), *caught.value.__notes__))


def _raises() -> None:
    raise ValueError("\abell")


def test_a_hook_of_the_script_is_called_on_every_rank_and_cannot_hide_the_exception(tmp_path: Path) -> None:
    body = """
        def hook(kind, error, trace):
            open(f"{sys.argv[1]}/hook{rank}", "w").write(str(error))
            raise KeyError("in the hook")
        sys.excepthook = hook
        raise ValueError(f"bad batch")
    """
    code, _, err = _run("--nproc", "2", _script(tmp_path, body), str(tmp_path))
    assert code == 1
    assert "ddparity: ranks 0, 1 failed: ValueError: bad batch\n" in err
    assert [(tmp_path / f"hook{rank}").read_text() for rank in range(2)] == ["bad batch"] * 2


def test_what_is_shortened_keeps_both_ends() -> None:
    assert shortened("a" * 10, 10) == "a" * 10
    assert shortened("ab" + "x" * 996 + "cd", 4) == "ab … 996 characters are left out … cd"


# Output that nobody keeps.


def test_a_pipe_keeps_the_end_of_what_was_written(tmp_path: Path) -> None:
    pipe = RankPipe(tmp_path / "stderr", shown=False)
    with open(pipe.path, "wb", buffering=0) as writer:
        for number in range(4000):
            writer.write(b"%01023d\n" % number)
            pipe.read()
            assert len(pipe._kept) <= 2 * KEPT_BYTES
        assert pipe.end(1024) == b"%01023d\n" % 3999
    pipe.close(None)


def test_a_closed_standard_output_does_not_stop_a_job(tmp_path: Path) -> None:
    script = _script(tmp_path, 'print("x" * 100_000)')
    command = f"exec '{sys.executable}' -m ddparity run --nproc 2 --show all '{script}' >&-"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr


SMALL = """
mount -t tmpfs -o size=1m,nr_inodes=$2,mode=1777 tmpfs "$1" || exit 77
export TMPDIR="$1"
shift 2
exec "$@"
"""


def _in_small_folder(folder: Path, *arguments: str, files: int = 1000) -> subprocess.CompletedProcess[str]:
    """Run `ddparity run` with a temporary folder of 1 MB, `small`. Skip the test where no mount is permitted."""
    small = folder / "small"
    small.mkdir()
    alone = ["unshare", "-rm", "sh", "-c", SMALL, "sh", str(small), str(files)]
    command = [*alone, sys.executable, "-m", "ddparity", "run", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if ended.returncode == 77 or "unshare" in ended.stderr:
        pytest.skip(f"not permitted here: {ended.stderr}")
    return ended


FILLS = """
    import tempfile
    if rank == 0:
        with open(os.path.join(tempfile.gettempdir(), "full"), "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        open(sys.argv[1], "w").close()
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    for number in range(20_000):
        print("x" * 1000, file=sys.stderr if number % 2 and rank else sys.stdout)
    if len(sys.argv) > 2 and rank == 1:
        raise ValueError("bad batch")
"""


@pytest.mark.parametrize("logs", [False, True], ids=["pipe", "logs"])
def test_a_full_disk_does_not_end_a_job(logs: bool, tmp_path: Path) -> None:
    """20 MB are written by each of 3 ranks, where the temporary folder and the logs are on a disk of 1 MB."""
    options = ["--logs", str(tmp_path / "small" / "logs")] if logs else []
    script, filled = _script(tmp_path, FILLS), str(tmp_path / "filled")
    ended = _in_small_folder(tmp_path, "--nproc", "3", *options, script, filled)
    said = r"ddparity: cannot write \S+small/logs/rank\d/std\w+\.log \(--logs\): No space left.* The job goes on.*\n"
    assert ended.returncode == 0
    assert re.fullmatch(said if logs else "", ended.stderr), ended.stderr
    assert len(ended.stdout) == 20_000 * 1001


def test_a_failure_is_told_where_the_temporary_folder_is_full(tmp_path: Path) -> None:
    ended = _in_small_folder(tmp_path, "--nproc", "2", _script(tmp_path, FILLS), str(tmp_path / "filled"), "fail")
    assert ended.returncode == 1
    assert "ddparity: rank 1 failed: ValueError: bad batch\nTraceback" in ended.stderr


def test_a_job_without_room_for_the_launchers_own_files_ends_with_a_message(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as short:  # where sockets may have longer paths, the launcher uses /tmp
        ended = _in_small_folder(Path(short), "--nproc", "2", _script(tmp_path, "print(rank)"), files=3)
    assert ended.returncode == 1
    assert re.search(r"no space for the launcher's own file .*small/\S+: No space left.* Set TMPDIR", ended.stderr)
    assert "Traceback" not in ended.stderr


def test_logs_that_cannot_be_written_end_a_job_with_a_message(tmp_path: Path) -> None:
    script = _script(tmp_path, "print(rank)")
    code, _, err = _run("--nproc", "2", "--logs", f"{script}/logs", script)
    assert code == 1
    assert err.endswith(f"ddparity: cannot write {script}/logs/rank1: Not a directory. Give --logs another folder\n")


def test_a_full_disk_behind_standard_output_is_told_once(tmp_path: Path) -> None:
    script = _script(tmp_path, "for number in range(100): print(number, flush=True)")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ddparity", "run", "--nproc", "2", "--show", "all", script]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    said = "cannot write what the ranks write to standard output: No space left on device. The job goes on without it"
    assert (ended.returncode, ended.stderr.count(said)) == (0, 1), ended.stderr
    assert "Exception ignored" not in ended.stderr


def test_the_logs_of_an_earlier_run_stay(tmp_path: Path) -> None:
    script, logs = _script(tmp_path, "print(sys.argv[1])"), tmp_path / "logs"
    for word in ("first", "second"):
        ended = _run("--nproc", "2", "--logs", str(logs), script, word)
        assert ended[0] == 0
    assert f"ddparity: the logs go to {logs / 'run2'}, since those of an earlier run are in {logs}" in ended[2]
    kept = [logs / "rank1", logs / "run2" / "rank1"]
    assert [(one / "stdout.log").read_text() for one in kept] == ["first\n", "second\n"]


def test_machines_that_share_a_folder_write_to_one_run_of_it(tmp_path: Path) -> None:
    """The earlier run had another number of ranks, and one machine has other ranks than any of it."""
    script, logs, port = _script(tmp_path, "print(sys.argv[1])"), tmp_path / "logs", str(free_port())
    (logs / "rank1").mkdir(parents=True)
    (logs / "rank1" / "stdout.log").write_text("first\n")
    machines = []
    for node in ("0", "1"):
        options = ["--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        options += ["--nproc", "2", "--logs", str(logs), script, "second"]
        command = [sys.executable, "-m", "ddparity", "run", *options]
        machines.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        said = [machine.communicate(timeout=60)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sorted(str(path.relative_to(logs)) for path in logs.glob("**/stdout.log")) == [
        "rank1/stdout.log",
        "run2/rank1/stdout.log",
        "run2/rank2/stdout.log",
        "run2/rank3/stdout.log",
    ]

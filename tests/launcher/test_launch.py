"""`ddparity run` and `launch`: real processes on torch's elastic agent."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

import ddparity as dp

from ..ranks import free_port
from .warm import Started

CHEAP = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


def _script(folder: Path, body: str) -> str:
    path = folder / "script.py"
    path.write_text(CHEAP + textwrap.dedent(body))
    return str(path)


@contextmanager
def _started(*arguments: str) -> Iterator[Started]:
    """Start `ddparity run ARGUMENTS`. At the end of the block, kill it and all that it started."""
    process = Started(("run", *arguments))
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for child in family:
            child.kill()
        process.communicate()


def _run(*arguments: str) -> tuple[int, str, str]:
    with _started(*arguments) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_script_gets_its_arguments_and_variables(tmp_path: Path) -> None:
    body = """
        print(f"{rank} of {os.environ['WORLD_SIZE']}: {sys.argv[1:]} {__name__} {sys.path[0]}\\n", end="")
        print(f"threads {os.environ['OMP_NUM_THREADS']}, batch {os.sched_getscheduler(0) == os.SCHED_BATCH}\\n", end="")
    """
    script = _script(tmp_path, body)
    code, out, err = _run("--nproc", "2", "--show", "all", "--schedule", "batch", script, "--nproc", "9", "-x", "a b")
    out = re.sub(r"^\[\S+ r\d\] ", "", out, flags=re.MULTILINE)
    assert (code, err) == (0, "")
    lines = sorted(out.splitlines())
    expected = f"['--nproc', '9', '-x', 'a b'] __main__ {tmp_path}"
    assert [line for line in lines if "of" in line] == [f"0 of 2: {expected}", f"1 of 2: {expected}"]
    assert lines[-2:] == [f"threads {os.environ.get('OMP_NUM_THREADS', 1)}, batch True"] * 2


def test_a_ranks_exception_is_the_end_of_the_output(tmp_path: Path) -> None:
    body = """
        def deep():
            print(time.time(), flush=True)
            raise OSError("disk full")
        if rank == 1:
            deep()
        time.sleep(60)
    """
    script = _script(tmp_path, body)
    code, out, err = _run("--nproc", "2", "--show", "0,1", script)
    assert code == 1
    assert time.time() - float(out.split()[-1]) < 10  # since the fault, without the start of the processes
    end = err[err.index("ddparity: rank 1 failed") :].splitlines()
    assert end[0] == "ddparity: rank 1 failed: OSError: disk full"
    assert end[-2:] == ["OSError: disk full", "ddparity: rank 0: ended by the launcher"]
    assert any(f'File "{script}", line 6, in deep' in line for line in end)
    assert not any("runpy" in line or "launcher/worker" in line for line in end)


@pytest.mark.parametrize(
    ("body", "code", "report"),
    [
        ("sys.exit(42 * rank)", 42, "rank 1 failed: exit code 42"),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)", 137, "rank 1 failed: ended by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV) if rank else time.sleep(60)", 139, "rank 1 failed: ended by SIGSEGV"),
    ],
)
def test_the_exit_code_is_the_failed_ranks(tmp_path: Path, body: str, code: int, report: str) -> None:
    found, _, err = _run("--nproc", "2", _script(tmp_path, body))
    assert found == code
    assert report in err


def test_the_report_names_the_rank_that_failed_first(tmp_path: Path) -> None:
    body = """
        import ddparity as dp
        with dp.world(device="cpu"), dp.first():
            if rank == 1:
                raise OSError("the cause")
    """
    code, _, err = _run("--nproc", "2", _script(tmp_path, body))
    assert code == 1
    assert err[err.index("ddparity: ") :].startswith("ddparity: rank 1 failed: OSError: the cause")


WAITS = """
    import torch, torch.distributed as dist
    from torch.utils.data import DataLoader
    if __name__ == "__main__":
        dist.init_process_group("gloo")
        workers = iter(DataLoader(range(1000), num_workers=2, persistent_workers=True))
        next(workers)
        dist.barrier()
        print(f"ready {rank}", flush=True)
        if rank == 0:
            dist.recv(torch.zeros(1), 1)  # stuck in C++
        time.sleep(600)
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything_within_five_seconds(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    with _started("--nproc", "2", "--show", "all", _script(tmp_path, WAITS)) as process:
        assert process.stdout is not None
        assert sorted(process.stdout.readline()[-8:] for _ in range(2)) == ["ready 0\n", "ready 1\n"]
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 6  # two ranks with two workers each
        begin = time.monotonic()
        process.send_signal(sent)
        _, err = process.communicate(timeout=20)
        # In a container whose first process does not reap, an orphan that has ended stays as a zombie.
        ends = psutil.wait_procs(family, timeout=max(0.0, begin + 5 - time.monotonic()))
        assert all(child.status() == psutil.STATUS_ZOMBIE for child in ends[1])
        assert process.returncode == code
        assert err.splitlines()[-1] == f"ddparity: ended all processes on {sent.name}"
        assert "Traceback" not in err


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    body = """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(600)
    """
    with _started("--nproc", "2", "--shutdown-timeout", "60", "--show", "all", _script(tmp_path, body)) as process:
        assert process.stdout is not None
        assert all("ready" in process.stdout.readline() for _ in range(2))
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # the ranks ignore the signal and have a minute
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert not psutil.wait_procs(ranks, timeout=5)[1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ranks_are_started_leaves_no_rank(sent: signal.Signals) -> None:
    with _started("--nproc", "8", "--no-python", "sleep", "600") as process:
        family = psutil.Process(process.pid)
        while len(ranks := family.children()) < 3:  # the guardian, and two ranks
            assert process.poll() is None
        process.send_signal(sent)
        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (128 + sent, f"ddparity: ended all processes on {sent.name}\n")
        assert not psutil.wait_procs(ranks, timeout=5)[1]


def test_a_program_gets_its_input_and_its_exit_code_is_the_launchers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddparity", "run", "--nproc", "1", "--no-python", "sh", "-c", "cat; exit 7"]
    ended = subprocess.run(command, input="a line", capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (7, "a line")
    broken = tmp_path / "program"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    code, _, err = _run("--nproc", "2", "--no-python", str(broken))
    assert code == 1
    assert err.endswith(f"ddparity: ranks 0, 1 failed: cannot start {str(broken)!r}: Exec format error\n")


def test_only_rank_0_reads_the_standard_input(tmp_path: Path) -> None:
    script = _script(tmp_path, "print(f'{rank} read {sys.stdin.read()!r}\\n', end='')")
    command = [sys.executable, "-m", "ddparity", "run", "--nproc", "2", "--show", "all", script]
    ended = subprocess.run(command, input="a line", capture_output=True, text=True, timeout=60)
    assert sorted(line.split("] ")[1] for line in ended.stdout.splitlines()) == ["0 read 'a line'", "1 read ''"]


def test_rank_0_writes_to_the_terminal_and_the_others_to_files(tmp_path: Path) -> None:
    script = _script(tmp_path, "print(f'out {rank}')\nprint(f'err {rank}', file=sys.stderr)")
    code, out, err = _run("--nproc", "2", "--logs", str(tmp_path / "logs"), script)
    assert (code, out) == (0, "out 0\n")
    assert err.splitlines()[-1] == "err 0"
    kept = tmp_path / "logs" / "rank1"
    assert (kept / "stdout.log").read_text() == "out 1\n"
    assert (kept / "stderr.log").read_text() == "err 1\n"


def test_lines_of_several_ranks_stay_whole(tmp_path: Path) -> None:
    body = """
        for number in range(1000):
            print(str(rank) * 300, number)
    """
    code, out, _ = _run("--nproc", "4", "--show", "1,3", _script(tmp_path, body))
    assert code == 0
    lines = out.splitlines()
    for rank in "13":
        own = [line for line in lines if f" r{rank}] " in line]
        assert [line.split("] ")[1] for line in own] == [f"{rank * 300} {number}" for number in range(1000)]
    assert len(lines) == 2000


def test_equal_failures_are_reported_once(tmp_path: Path) -> None:
    code, _, err = _run("--nproc", "3", _script(tmp_path, "raise OSError('no data')"))
    assert code == 1
    assert "ddparity: ranks 0-2 failed: OSError: no data" in err
    assert err.count("Traceback") == 1


def test_two_runs_at_once(tmp_path: Path) -> None:
    body = """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor(rank)
        dist.all_reduce(total)
        print(int(total))
    """
    script = _script(tmp_path, body)
    with _started("--nproc", "2", script) as one, _started("--nproc", "2", script) as other:
        assert [process.communicate(timeout=60)[0] for process in (one, other)] == ["1\n", "1\n"]


STEPS = """
    import torch, torch.distributed as dist
    import ddparity as dp
    with dp.world(device="cpu"), dp.preemption() as stopping:
        for step in range(1_000_000):
            dist.all_reduce(torch.ones(2))
            if step == 5:
                print(f"ready {rank}", flush=True)
            if number := stopping():
                print(f"stopped {step}", flush=True)
                sys.exit(128 + number)
"""


def test_a_preemption_signal_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    with _started("--nproc", "3", "--show", "all", _script(tmp_path, STEPS)) as process:
        assert process.stdout is not None
        assert all("ready" in process.stdout.readline() for _ in range(3))
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=30)
    steps = re.findall(r"stopped (\d+)", out)
    assert len(steps) == 3 and len(set(steps)) == 1
    assert process.returncode == 128 + signal.SIGUSR1
    assert err.splitlines()[-1] == "ddparity: all ranks stopped on SIGUSR1"


def test_a_script_without_a_handler_ends_on_a_preemption_signal(tmp_path: Path) -> None:
    with _started("--nproc", "1", _script(tmp_path, "print('ready', flush=True)\ntime.sleep(600)")) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGUSR2)
        assert process.wait(20) == 128 + signal.SIGUSR2


def test_ranks_that_stop_on_a_warning_have_the_time_to_save(tmp_path: Path) -> None:
    body = """
        def stop(number, frame):
            if rank == 0:
                time.sleep(5)  # longer than the agent waits for a rank after others have failed
                print("saved", flush=True)
            sys.exit(128 + number)
        signal.signal(signal.SIGUSR1, stop)
        print("ready", flush=True)
        time.sleep(600)
    """
    with _started("--nproc", "2", "--show", "all", _script(tmp_path, body)) as process:
        assert process.stdout is not None
        assert all("ready" in process.stdout.readline() for _ in range(2))
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=30)
    assert "saved" in out
    assert (process.returncode, err) == (128 + signal.SIGUSR1, "ddparity: all ranks stopped on SIGUSR1\n")


def test_a_failure_after_a_warning_is_reported_as_a_failure(tmp_path: Path) -> None:
    body = """
        if rank == 1:
            signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(3))
        print("ready", flush=True)
        time.sleep(600)
    """
    with _started("--nproc", "2", "--show", "all", _script(tmp_path, body)) as process:
        assert process.stdout is not None
        assert all("ready" in process.stdout.readline() for _ in range(2))
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "all ranks stopped" not in err


def test_a_warning_is_not_sent_again_after_a_restart(tmp_path: Path) -> None:
    body = """
        signal.signal(signal.SIGUSR1, lambda number, frame: print("saved", flush=True))
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        print(f"ready {attempt}", flush=True)
        if attempt == "0":
            time.sleep(600)
        print("finished", flush=True)
    """
    line = ["--nproc", "2", "--max-restarts", "1", "--show", "all", _script(tmp_path, body)]
    with _started(*line) as process:
        assert process.stdout is not None
        assert all("ready 0" in process.stdout.readline() for _ in range(2))
        process.send_signal(signal.SIGUSR1)
        assert all("saved" in process.stdout.readline() for _ in range(2))
        ranks = [child for child in psutil.Process(process.pid).children() if "script.py" in str(child.cmdline())]
        ranks[1].kill()
        out, err = process.communicate(timeout=30)
    assert out.count("finished") == 2 and "saved" not in out
    assert process.returncode == 0, err


def test_machines_whose_ranks_stop_on_a_warning_wait_for_those_that_save(tmp_path: Path) -> None:
    body = """
        def stop(number, frame):
            if rank == 1:
                time.sleep(6)  # longer than a failed machine waits for the others
                print("saved", flush=True)
            sys.exit(128 + number)
        signal.signal(signal.SIGUSR1, stop)
        print("ready", flush=True)
        time.sleep(600)
    """
    line = ["--nnodes", "2", "--nproc", "1", "--show", "all", "--rendezvous", f"127.0.0.1:{free_port()}"]
    line += ["--max-restarts", "1", _script(tmp_path, body)]
    with _started(*line) as one, _started(*line) as other:
        for process in (one, other):
            assert process.stdout is not None and "ready" in process.stdout.readline()
        one.send_signal(signal.SIGUSR1)
        outputs = [process.communicate(timeout=40) for process in (one, other)]
    assert "".join(out for out, _ in outputs).count("saved") == 1
    assert [process.returncode for process in (one, other)] == [128 + signal.SIGUSR1] * 2
    assert [err.splitlines()[-1] for _, err in outputs] == ["ddparity: all ranks stopped on SIGUSR1"] * 2


def test_a_signal_ends_a_launcher_whose_report_nobody_reads(tmp_path: Path) -> None:
    body = """
        print(os.getpid(), flush=True)
        raise ValueError("x" * 2**20)  # its report is more than the pipe holds
    """
    with _started("--nproc", "1", _script(tmp_path, body)) as process:
        assert process.stdout is not None and process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        rank = psutil.Process(int(process.stdout.readline()))
        psutil.wait_procs([rank], timeout=20)
        for _ in range(10):  # whichever wait the first signal meets, a later signal ends it
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.6)
                break
        # The second where the signal comes after the report, when the earlier handlers are back.
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)


def test_a_restart_needs_no_terminal(tmp_path: Path) -> None:
    body = """
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        print("again", flush=True)
    """
    with _started("--nproc", "1", "--max-restarts", "1", _script(tmp_path, body)) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stderr.close()
        assert process.stdout.readline() == "again\n"
        assert process.wait(30) == 0


def test_a_closed_terminal_does_not_end_the_job(tmp_path: Path) -> None:
    body = """
        print("ready", flush=True)
        go = __import__("pathlib").Path(sys.argv[1])
        while not go.exists():
            time.sleep(0.01)
        for number in range(3):
            print("x" * 100, flush=True)
            time.sleep(0.3)
        go.with_name(f"done{rank}").touch()
    """
    script, go = _script(tmp_path, body), tmp_path / "go"
    with _started("--nproc", "2", "--show", "1", script, str(go)) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "ready" in process.stdout.readline()
        process.stdout.close()
        go.touch()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


def test_a_hang_is_found_with_a_long_path_of_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    body = """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(2 + 2 * rank)) if rank else dist.broadcast(torch.ones(2), 0)
        dist.barrier()
    """
    code, _, err = _run("--nproc", "2", _script(tmp_path, body))
    assert code == 124
    assert "all_reduce" in err and "broadcast" in err


def _where() -> tuple[int, int]:
    with dp.world(device="cpu") as world:
        return world.rank, world.world_size


def _fails(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        raise OSError("disk full")


def test_launch_returns_each_ranks_result() -> None:
    assert dp.launch(_where, nproc=2) == [(0, 2), (1, 2)]


def _leaves() -> None:
    sys.exit(0)


def test_launch_reports_a_function_that_did_not_return() -> None:
    with pytest.raises(dp.RankFailure, match="rank 0 ended with exit code 0 before _leaves returned"):
        dp.launch(_leaves, nproc=1)


def test_launch_names_a_rank_that_hangs() -> None:
    with pytest.raises(
        dp.RankFailure, match=r"_hangs hangs:\nddparity: hang: rank 1 has not called barrier #4"
    ) as caught:
        dp.launch(_hangs, hang_timeout=1)
    assert caught.value.rank == 1


def _hangs() -> None:
    with dp.world(device="cpu") as world:
        for _ in range(3):
            dist.all_reduce(torch.ones(1))
        if world.rank == 1:
            time.sleep(600)
        dist.barrier()


def test_launch_takes_a_callable_without_a_name() -> None:
    with pytest.raises(dp.RankFailure, match=r"rank 0 failed in functools\.partial\("):
        dp.launch(partial(_fails, 0), nproc=1)


def test_launch_reports_a_result_that_cannot_be_pickled() -> None:
    with pytest.raises(dp.RankFailure, match="rank 0 failed in allocate_lock: TypeError: the result cannot be pickled"):
        dp.launch(threading.Lock, nproc=1)


def test_launch_leaves_no_file_open_and_no_variable_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by launches of several threads at once."""
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    dp.launch(_where, nproc=1)
    files, variables = psutil.Process().num_fds(), dict(os.environ)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(dp.launch, _where, nproc=1)
        dp.launch(_where, nproc=1)
        other.result()
    assert psutil.Process().num_fds() == files
    assert dict(os.environ) == variables


# A caller of launch() with a signal handler of its own. Rank 1, if there is one, fails. SIGTERM does not end rank 0.
CALLER = """
import os, signal, sys, time
import ddparity as dp

def work():
    if os.environ["RANK"] == "1":
        raise OSError("disk full")
    if os.environ["WORLD_SIZE"] == "2":
        signal.signal(signal.SIGTERM, lambda number, frame: print("ending", flush=True))
    print("ready", flush=True)
    time.sleep(600)

def handle(number, frame):
    print("received", number, flush=True)
    sys.exit(9)

signal.signal(signal.SIGTERM, handle)
dp.launch(work, nproc=int(sys.argv[1]))
"""


@pytest.mark.parametrize(("nproc", "lines"), [(1, ["ready\n"]), (2, ["ready\n", "ending\n"])])
def test_the_caller_receives_a_signal_once_the_ranks_have_ended(tmp_path: Path, nproc: int, lines: list[str]) -> None:
    """Also a signal that comes while launch ends the ranks after a failure."""
    path = tmp_path / "main.py"
    path.write_text(CALLER)
    command = [sys.executable, str(path), str(nproc)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in lines] == lines
        process.terminate()
        assert process.communicate(timeout=20)[0] == f"received {signal.SIGTERM:d}\n"
        assert process.returncode == 9
    finally:
        process.kill()
        process.communicate()


def test_launch_raises_what_a_rank_raised() -> None:
    with pytest.raises(dp.RankFailure, match="rank 1 failed in _fails: OSError: disk full") as caught:
        dp.launch(_fails, 1, nproc=2)
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, OSError)
    assert "in _fails" in "".join(caught.value.__notes__)
    with pytest.raises(ValueError, match="nproc=0"):
        dp.launch(_where, nproc=0)


def test_launch_takes_a_function_of_the_script_that_runs(tmp_path: Path) -> None:
    """As in a notebook: the function is in __main__, which cannot be imported, and there is no guard."""
    path = tmp_path / "main.py"
    path.write_text(
        textwrap.dedent("""
        import functools
        import os
        import ddparity as dp

        @functools.cache
        def factor():
            return 10

        class Found:
            def __init__(self, rank):
                self.rank = rank

        def work(offset):
            return Found(int(os.environ["RANK"]) * factor() + offset)

        print([found.rank for found in dp.launch(work, 3, nproc=2)])
        """)
    )
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("[3, 13]\n", "")

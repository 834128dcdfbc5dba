"""How jobs end: what a signal, a failure and a good end do to the processes of a job, and what is told of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from ..ranks import free_port
from .test_launch import _run, _script, _started

TERMINATED = 128 + signal.SIGTERM


def _until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Return whether a process runs. In a container whose first process does not reap, an orphan stays as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _line_with(stream, text: str) -> str:
    """Return the next line of a stream that has a text in it."""
    return next(line for line in stream if text in line)


# What a script leaves running.

BACKGROUND = """
    import subprocess
    wait = f'''
        echo $$ > {sys.argv[1]}/pid{rank}.new && mv {sys.argv[1]}/pid{rank}.new {sys.argv[1]}/pid{rank}
        until [ -e {sys.argv[1]}/go ]; do sleep 0.05; done; echo uploading; echo done > {sys.argv[1]}/uploaded{rank}
    '''
    subprocess.Popen(["sh", "-c", wait], start_new_session=bool(rank % 2))
    while not os.path.exists(f"{sys.argv[1]}/pid{rank}"):
        time.sleep(0.01)
"""


@pytest.mark.parametrize("shown", ["0", "all"])
def test_a_background_process_of_a_script_that_ended_well_lives_on(tmp_path: Path, shown: str) -> None:
    """It may also write to its standard output: the pipe of rank 1 outlives the launcher."""
    with _started("--nproc", "2", "--show", shown, _script(tmp_path, BACKGROUND), str(tmp_path)) as process:
        assert process.wait(60) == 0
        (tmp_path / "go").touch()
        _until(lambda: all((tmp_path / f"uploaded{rank}").exists() for rank in range(2)))
        out, err = process.communicate(timeout=20)
    assert err == ""
    assert out.count("uploading") == (2 if shown == "all" else 1)


def test_a_background_process_ends_with_a_word_if_asked(tmp_path: Path) -> None:
    code, _, err = _run("--nproc", "2", "--children", "end", _script(tmp_path, BACKGROUND), str(tmp_path))
    assert code == 0
    left = [(tmp_path / f"pid{rank}").read_text().strip() for rank in range(2)]
    assert "which the script had left running (--children end)" in err
    assert all(f"sh ({pid})" in err and not _runs(int(pid)) for pid in left)


FAMILY = """
    import subprocess
    from multiprocessing.shared_memory import SharedMemory
    if rank == 1:
        memory = SharedMemory(create=True, size=8)  # named: a process of Python's removes it, which rank 1 has started
        started = [subprocess.Popen(["sleep", "600"], start_new_session=apart).pid for apart in (False, True)]
        started.append(subprocess.Popen(["sleep", "600"], env={}).pid)
        started.append(int(subprocess.check_output(["setsid", "sh", "-c", "exec 2>&-; sleep 600 >&- & echo $!"])))
        print("started", os.environ["DDPARITY_JOB"], memory.name, *started, flush=True)
        if sys.argv[1] == "failure":
            raise ValueError("bad batch")
    time.sleep(600)
"""


@pytest.mark.parametrize(("how", "code"), [("failure", 1), ("SIGTERM", TERMINATED), ("SIGKILL", -signal.SIGKILL)])
def test_all_that_a_rank_started_ends_after_a_failure_or_a_signal(tmp_path: Path, how: str, code: int) -> None:
    with _started("--nproc", "2", "--show", "1", _script(tmp_path, FAMILY), how) as process:
        assert process.stdout is not None
        folder, memory, *pids = _line_with(process.stdout, "started").split()[-6:]
        if how != "failure":
            process.send_signal(signal.Signals[how])
        assert process.wait(30) == code
        _until(lambda: not any(_runs(int(pid)) for pid in pids), 20)
        _until(lambda: not Path("/dev/shm", memory).exists() and not Path(folder).exists(), 20)


# The time to end.

SAVES = """
    def save():
        print("saving", flush=True)
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.1)
        print("saved", flush=True)

    def stop(number, frame):
        if rank == 0:
            save()
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(600)
"""
PREEMPTED = """
    import torch, torch.distributed as dist
    import ddparity as dp
    with dp.world(device="cpu"), dp.preemption("SIGTERM") as stopping:
        for step in range(1_000_000):
            dist.all_reduce(torch.ones(2))
            if step == 5:
                print("ready", flush=True)
            if number := stopping():
                if rank == 0:
                    while not os.path.exists(sys.argv[1]):
                        time.sleep(0.01)
                    print("saved", flush=True)
                sys.exit(128 + number)
"""


@pytest.mark.parametrize("body", [SAVES, PREEMPTED], ids=["handler", "preemption"])
def test_sigterm_leaves_the_time_to_save(tmp_path: Path, body: str) -> None:
    """The rank saves for longer than the 3 s after which the launcher tells what it waits for."""
    script = _script(tmp_path, body)
    with _started("--nproc", "2", "--show", "all", script, str(tmp_path / "go")) as process:
        assert process.stdout is not None and process.stderr is not None
        assert all("ready" in process.stdout.readline() for _ in range(2))
        process.terminate()
        said = _line_with(process.stderr, "waiting")
        (tmp_path / "go").touch()
        out, err = process.communicate(timeout=30)
    assert re.match(
        r"ddparity: waiting up to 27 s for rank 0 \(sleeping.*\).*: a signal \(Ctrl-C\) ends this now\n", said
    )
    assert "saved" in out
    assert (process.returncode, err) == (TERMINATED, "ddparity: ended all processes on SIGTERM\n")


def test_a_rank_that_had_to_be_killed_is_told(tmp_path: Path) -> None:
    script = _script(tmp_path, SAVES)
    with _started("--nproc", "2", "--shutdown-timeout", "1", "--show", "0,1", script, "never") as process:
        assert process.stdout is not None
        assert all("ready" in process.stdout.readline() for _ in range(2))
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == TERMINATED
    *_, said, last = err.splitlines()  # the first may be of the number of threads
    late = r"which had not ended 1 s after SIGTERM \(--shutdown-timeout\)"
    assert re.fullmatch(rf"ddparity: killed rank 0 \(sleeping, {re.escape(script)}:\d+, in save\), {late}", said)
    assert last == "ddparity: ended all processes on SIGTERM"


def test_a_failure_is_told_while_another_rank_saves(tmp_path: Path) -> None:
    body = SAVES.replace(
        'print("ready"', 'while rank and not os.path.exists("ready"): time.sleep(0.01)\n    print("ready"'
    )
    body = body.replace(
        "time.sleep(600)", 'if rank: raise ValueError("bad batch")\n    open("ready", "w"); time.sleep(600)'
    )
    script = _script(
        tmp_path, body.replace('"ready")', f'"{tmp_path}/ready")').replace('"ready", "w"', f'"{tmp_path}/ready", "w"')
    )
    with _started("--nproc", "2", script, str(tmp_path / "go")) as process:
        assert process.stderr is not None
        said = _line_with(process.stderr, "waiting")
        (tmp_path / "go").touch()
        out, err = process.communicate(timeout=30)
    assert said.startswith("ddparity: rank 1 failed: ValueError: bad batch; waiting up to 27 s for rank 0 (sleeping,")
    assert "saved" in out
    assert err.splitlines()[0] == "ddparity: rank 1 failed: ValueError: bad batch"


# As under python.

SHOWN = """
import atexit, json, sys
def annotated(x: 1 + 1): pass
def show(when):
    main = sys.modules["__main__"]
    names = ("__file__", "__name__", "__package__", "__cached__", "__doc__")
    found = {name: getattr(main, name) for name in names}
    found |= {"spec": main.__spec__ and main.__spec__.name, "loader": type(main.__loader__).__name__}
    found |= {"argv": sys.argv, "path": sys.path[0], "annotated": str(annotated.__annotations__), "own": main is own}
    print(json.dumps({when: found}))
own = sys.modules["__main__"]
atexit.register(show, "at the end")
show("now")
raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("command", "safe"),
    [(["link.py", "a"], ""), (["-m", "folder.shown", "a"], ""), (["folder/shown.py"], "1"), (["app", "a"], "")],
    ids=["link", "module", "safe path", "folder"],
)
def test_a_script_finds_what_it_finds_under_python(tmp_path: Path, command: list[str], safe: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "shown.py").write_text(SHOWN)
    (tmp_path / "link.py").symlink_to("folder/shown.py")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").write_text(SHOWN)
    starts = ([], ["-m", "ddparity", "run", "--nproc", "1"])
    outputs = []
    for start in starts:
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
        ended = subprocess.run(
            [sys.executable, *start, *command], env=os.environ | {"PYTHONSAFEPATH": safe}, check=True, **options
        )
        outputs.append([json.loads(line) for line in ended.stdout.splitlines()])
    if command[0] == "-m":  # runpy's module ends with the script
        outputs = [output[:1] for output in outputs]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == (1 if command[0] == "-m" else 2)


def test_a_script_that_executes_itself_again_keeps_its_traceback(tmp_path: Path) -> None:
    body = """
        if "AGAIN" not in os.environ:
            os.environ["AGAIN"] = "1"
            os.execv(sys.executable, [sys.executable, *sys.argv])
        def train():
            raise ValueError("bad batch")
        if rank == 1:
            train()
        time.sleep(600)
    """
    code, _, err = _run("--nproc", "2", script := _script(tmp_path, body))
    lines = err.splitlines()
    assert code == 1
    assert lines[0] == "ddparity: rank 1 failed: ValueError: bad batch"
    assert f'  File "{script}", line 8, in train' in lines
    assert lines[-2:] == ["ValueError: bad batch", "ddparity: rank 0: ended by the launcher"]


def test_what_a_child_of_a_script_raises_is_not_the_end_of_its_rank(tmp_path: Path) -> None:
    """A forked child leaves the script as its rank does; a program may write torch's record to the rank's file."""
    body = """
        import json, pathlib
        record = pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        for end in (ValueError("in the child"), SystemExit("no data"), SystemExit(0)):
            if (child := os.fork()) == 0:
                raise end
            print(os.waitpid(child, 0)[1] >> 8, end=" ", flush=True)
        print(sorted(one.name for one in record.parent.glob("e*.json")), flush=True)
        record.write_text(json.dumps({"message": {"message": "KeyError: 7", "extraInfo": {"py_callstack": ""}}}))
        os.kill(os.getpid(), 9)
    """
    code, out, err = _run("--nproc", "1", _script(tmp_path, body))
    assert (code, out) == (137, "1 1 0 []\n")
    assert "ValueError: in the child\n" in err and "\nno data\n" in err
    assert err.splitlines()[-1].startswith("ddparity: rank 0 failed: ended by SIGKILL")


def test_a_pod_of_a_pytorch_job_starts_several_processes(tmp_path: Path) -> None:
    body = "print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'GROUP_RANK')))"
    script, port = _script(tmp_path, body), str(free_port())
    pods = []
    for rank in ("0", "1"):
        job = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        options = ["--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command = [sys.executable, "-m", "ddparity", "run", *options, "--nproc", "2", "--show", "all", script]
        pods.append(subprocess.Popen(command, env=os.environ | job, stdout=subprocess.PIPE, text=True))
    try:
        lines = [line.split("] ")[1] for pod in pods for line in pod.communicate(timeout=60)[0].splitlines()]
    finally:
        for pod in pods:
            pod.kill()
            pod.wait()
    assert sorted(lines) == ["0 4 0 0", "1 4 1 0", "2 4 0 1", "3 4 1 1"]


# What a rank that has failed still does.

LINGERS = """
    import atexit, subprocess, threading

    def upload():
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.01)
        print("uploaded", flush=True)

    how = sys.argv[2]
    if rank == 1:
        if how == "others fail":
            threading.Thread(target=upload).start()
        elif how == "child":  # the main thread waits for a thread that does nothing
            work = "until [ -e $0 ]; do echo; sleep 0.01; done >> $0.log; echo uploaded; kill $PPID"
            subprocess.Popen(["sh", "-c", work, sys.argv[1]])
            threading.Thread(target=time.sleep, args=(600,)).start()
        else:
            atexit.register(upload)
        raise ValueError("bad batch")
    if how == "others fail":
        while not any("error.json" in files for _, _, files in os.walk(os.environ["DDPARITY_JOB"].split(":")[-1])):
            time.sleep(0.01)
        raise KeyError("as a rank that waited for rank 1")
    time.sleep(600)
"""


def test_a_rank_that_has_failed_has_the_time_to_save(tmp_path: Path) -> None:
    """All jobs run at once, since each one is told after 3 s."""
    script, go = _script(tmp_path, LINGERS), tmp_path / "go"
    hows = ("others fail", "child", "Ctrl-C", "never")
    with ExitStack() as stack:
        jobs = {}
        for how in hows:
            options = ["--nproc", "2", "--show", "1", *(["--shutdown-timeout", "4"] if how == "never" else [])]
            arguments = [*options, script, str(tmp_path / how if how == "never" else go), how]
            jobs[how] = stack.enter_context(_started(*arguments))
        said = {how: _line_with(jobs[how].stderr, "waiting up to") for how in hows[:3]}
        jobs["Ctrl-C"].send_signal(signal.SIGINT)
        ended = {"Ctrl-C": jobs["Ctrl-C"].communicate(timeout=30)}
        go.touch()
        ended |= {how: jobs[how].communicate(timeout=30) for how in hows if how != "Ctrl-C"}
        codes = {how: job.returncode for how, job in jobs.items()}
    start = r"ddparity: rank 1 failed: ValueError: bad batch; waiting up to \d+ s for rank 1 \("
    assert all(re.match(start + r".*\): a signal \(Ctrl-C\) ends this now\n", line) for line in said.values()), said
    assert codes == dict.fromkeys(hows, 1)
    assert [how for how in hows if "uploaded" in ended[how][0]] == ["others fail", "child"]
    head = "ddparity: rank 1 failed: ValueError: bad batch\nTraceback (most recent call last):\n"
    assert [how for how in hows if head in ended[how][1]] == list(hows), ended
    late = r"which still ran 4 s after its exception \(--shutdown-timeout\)"
    doing = rf"ddparity: ending rank 1 \(sleeping, {re.escape(script)}:\d+, in upload\), {late}\n"
    assert re.search(doing, ended["never"][1])

"""Ways in which a job fails, and a function that runs one. For tests and for the benchmark that writes the page."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.launcher.warm import Started

NOT_PERMITTED = 77  # the exit code of a preparation that this machine does not permit
PORT = "PORT"  # in options: stands for a port at which another program listens

# A rank calls `fault` just before its failure. The seconds count from then on.
_HEAD = """
import os, sys, time
rank = int(os.environ["RANK"])
def fault():
    with open("fault", "a") as file:
        file.write(f"{time.time()}\\n")
"""
_GLOO = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
"""
# `# here` marks the line that fails.
_STEPS = """
def train():
    for step in range(5):
        dist.all_reduce(torch.ones(4))
    {change}
    for step in range(5):
        dist.all_reduce(torch.ones(4))
train()
"""


def _in_step(change: str) -> str:
    """Return a script in which both ranks reduce, and rank 1 does something else in the middle."""
    inside = "if rank == 1:\n    fault()\n" + textwrap.indent(textwrap.dedent(change).strip(), "    ")
    return _GLOO + _STEPS.format(change=textwrap.indent(inside, "    ").strip())


def _without_torch(what: str) -> str:
    """Return a script in which rank 1 does something while rank 0 computes. The import of torch takes seconds."""
    return f"if rank == 1:\n    fault()\n    {what}\ntime.sleep(1000)"


_LOADER = """
from torch.utils.data import DataLoader, Dataset
class Images(Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        if rank == 1 and index == 20:
            fault()
            {change}
        return torch.ones(3)
if __name__ == "__main__":
    dist.init_process_group("gloo")
    for batch in DataLoader(Images(), batch_size=4, num_workers=1):  # loop
        dist.all_reduce(batch.sum())
"""
_CHECKPOINT = """
import torch, ddparity as dp
with dp.world(device="cpu"):
    model = torch.nn.Linear(500, 500)
    dp.save_checkpoint("{path}", model=torch.nn.Linear(5, 5))
    {change}
    dp.save_checkpoint("{path}", model=model)  {here}
"""
_WAITS = _GLOO + "dist.barrier()\nfault()\nif rank == 0:\n    dist.recv(torch.zeros(1), 1)\ntime.sleep(1000)"

# Scripts that run the launcher, whose command is in "$@".
_MEMORY_LIMIT = """
group=/sys/fs/cgroup/memory limit=memory.limit_in_bytes
[ -d $group ] || { group=/sys/fs/cgroup limit=memory.max; }
group=$group/ddparity-$$
mkdir $group && echo 1G > $group/$limit && echo $$ > $group/cgroup.procs || exit 77
exec "$@"
"""
_SMALL_DISK = """
unshare -rm true || exit 77
exec unshare -rm sh -c 'mkdir disk && mount -t tmpfs -o size=512k tmpfs disk || exit 77; exec "$@"' sh "$@"
"""
_NO_NETWORK = """
unshare -rn true || exit 77
exec unshare -rn sh -c 'ip link set lo up || exit 77; exec "$@"' sh "$@"
"""
# Two machines on one: network namespaces joined by virtual interfaces. The output of the second goes to a file.
_TWO_MACHINES = """
unshare -rn ip link set lo up || exit 77
exec unshare -rn sh -c '
    unshare -n sh -c "
        until ip link set lo up && ip addr add 10.77.3.2/24 dev right && ip link set right up; do sleep 0.05; done
        PET_NODE_RANK=1 exec \\"\\$@\\"
    " sh "$@" > second.txt 2>&1 &
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do :; done
    ip link set lo up && ip link add left type veth peer name right && ip link set right netns $! || exit 77
    ip addr add 10.77.3.1/24 dev left && ip link set left up || exit 77
    exec 9< /proc/$!/ns/net  # the interfaces exist for as long as one of the two runs
    PET_NODE_RANK=0 exec "$@"
' sh "$@"
"""
_RENDEZVOUS = "--nnodes 2 --master-addr 10.77.3.1 --master-port 29500 --rdzv-conf timeout=10"


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to fail. `report` matches our last lines; `cause` matches any launcher's output that names the cause."""

    name: str
    failure: str  # its name on the page
    script: str
    report: str
    cause: str
    code: int = 1
    culprit: int | None = 1
    options: str = ""  # torchrun's names, which both launchers understand
    nproc: int = 2
    before: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    send: signal.Signals | None = None  # to the launcher, once a rank has called `fault`
    rest_s: float = 3.0  # processes that run for longer than this after the launcher count as left behind
    while_starting: bool = False  # send the signal while the launcher imports torch
    program: str = "train.py"

    def line(self) -> int | None:
        """Return the number of the script's line that fails."""
        numbers = [number for number, line in enumerate(self.text().splitlines(), 1) if line.endswith("# here")]
        return numbers[0] if numbers else None

    def text(self) -> str:
        return (_HEAD + self.script).lstrip()


def _interrupted(name: str, failure: str, script: str) -> Case:
    """Return a case of Ctrl-C after the start of the ranks."""
    return Case(
        name,
        failure,
        script,
        r"^ddparity: ended all processes on SIGINT$",
        r"SignalException|KeyboardInterrupt",
        code=130,
        culprit=None,
        send=signal.SIGINT,
    )


def _hang(name: str, failure: str, change: str, report: str) -> Case:
    return Case(name, failure, _in_step(change), report, r"hang: |enforce fail", code=124)


CASES = (
    Case(
        "raise",
        "A rank raises an exception",
        _in_step('raise ValueError("bad batch")  # here'),
        r"rank 1 failed: ValueError: bad batch\n",
        r"ValueError: bad batch",
    ),
    Case(
        "raise-everywhere",
        "All ranks raise the same exception",
        '\nfault()\nraise ValueError("lr must be positive")  # here',
        r"ranks 0, 1 failed: ValueError: lr must be positive\n(?!.*rank 1)",
        r"ValueError: lr must be positive",
        culprit=None,
    ),
    Case(
        "thread-goes-on",
        "A rank raises an exception while another thread of it runs",
        _in_step(
            "import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
            'raise ValueError("bad batch")  # here'
        ),
        r"rank 1 failed: ValueError: bad batch\n",
        r"ValueError: bad batch",
    ),
    Case(
        "import-error",
        "An import fails on one rank",
        _without_torch("import apex_of_my_own  # here"),
        r"rank 1 failed: ModuleNotFoundError: No module named 'apex_of_my_own'\n",
        r"ModuleNotFoundError",
    ),
    Case(
        "message",
        '`sys.exit("no data at /data")`',
        _without_torch('sys.exit("no data at /data")'),
        r"rank 1 failed: no data at /data",
        r"no data at /data",
    ),
    Case(
        "exit-code",
        "`os._exit(3)`",
        _without_torch("os._exit(3)"),
        r"rank 1 failed: exit code 3\n",
        r"exitcode +: 3|exit code 3",
        code=3,
    ),
    Case(
        "no-script",
        "There is no such script",
        "",
        r"there is no script trian.py$",
        r"[Nn]o such file|no script",
        code=2,
        culprit=None,
        program="trian.py",
    ),
    Case(
        "first",
        "An exception inside `first`",
        """
import ddparity as dp
with dp.world(device="cpu"), dp.first() as mine:
    if mine:
        fault()
        raise OSError("no such data set")  # here
""",
        r"rank 0 failed: OSError: no such data set\n",
        r"OSError: no such data set",
        culprit=0,
    ),
    Case(
        "predict",
        "An exception inside `predict`",
        """
import torch, ddparity as dp
def score(batch):
    if 6 in batch:
        fault()
        raise ValueError("a sample without a label")  # here
    return batch
with dp.world(device="cpu"):
    dp.predict(score, torch.arange(12), batch_size=2)
""",
        r"rank 1 failed: DDParityError: the model failed for the data-set indices 6 to 7: ValueError: a sample without",
        r"ValueError: a sample without a label",
    ),
    Case(
        "loader-raises",
        "An exception inside a data-loader worker",
        _GLOO.replace('dist.init_process_group("gloo")', "")
        + _LOADER.format(change='raise KeyError("image 20 is not there")  # here'),
        r"rank 1 failed: KeyError.*image 20 is not there",
        r"image 20 is not there",
    ),
    Case(
        "loader-killed",
        "A data-loader worker is killed",
        _GLOO.replace('dist.init_process_group("gloo")', "") + _LOADER.format(change="os.kill(os.getpid(), 9)"),
        # The worker may end while its rank fetches a tensor from it.
        r"rank 1 failed: (RuntimeError: DataLoader|Connection|BrokenPipe|EOF|FileNot|Authentic).*"
        r"a data-loader worker ended: .*memory",
        r"DataLoader worker \(pid",
    ),
    Case(
        "segfault",
        "A segmentation fault",
        _without_torch("import ctypes; ctypes.string_at(0)  # here"),
        r"rank 1 failed: ended by SIGSEGV \(a segmentation fault, in C code\)",
        r"SIGSEGV",
        code=139,
    ),
    Case(
        "abort",
        "C++ code aborts",
        _without_torch("os.abort()  # here"),
        r"rank 1 failed: ended by SIGABRT",
        r"SIGABRT",
        code=134,
    ),
    Case(
        "kill",
        "A rank is killed by SIGKILL",
        _in_step("os.kill(os.getpid(), 9)"),
        r"rank 1 failed: ended by SIGKILL \(killed\): (out of memory, unless )?a user or program sent it",
        r"SIGKILL",
        code=137,
    ),
    Case(
        "out-of-memory",
        "The kernel kills a rank because the memory is full",
        _in_step("memory = []\nwhile True:\n    memory.append(b'x' * 2**28)"),
        r"rank 1 failed: ended by SIGKILL.*out of memory: the kernel ended .* whose limit is 1.0 GiB",
        r"out of memory",
        code=137,
        before=_MEMORY_LIMIT,
    ),
    Case(
        "allocation",
        "A rank asks for more memory than the machine has",
        _in_step("torch.ones(10**15)  # here"),
        r"rank 1 failed: RuntimeError: .*can't allocate memory: you tried to allocate 4000000000000000 bytes",
        r"can't allocate memory",
    ),
    _hang(
        "other-collective",
        "Ranks call different collectives",
        "dist.broadcast(torch.ones(4), 0)  # here",
        r"agree on collective #6: rank 0 calls all_reduce of \S* ?4 float32, rank 1 calls broadcast of \S* ?4 float32",
    ),
    _hang(
        "other-shape",
        "Tensors of different shapes",
        "dist.all_reduce(torch.ones(8))  # here",
        r"agree on collective #6: rank 0 calls all_reduce of \S* ?4 float32, rank 1 calls all_reduce of \S* ?8 float32",
    ),
    _hang(
        "other-dtype",
        "Tensors of different dtypes",
        "dist.all_reduce(torch.ones(4, dtype=torch.float64))  # here",
        r"agree on collective #6: rank 0 calls all_reduce of \S* ?4 float32, rank 1 calls all_reduce of \S* ?4 float64",
    ),
    Case(
        "missing-collective",
        "Only one rank calls an additional collective",
        _GLOO
        + """
def train():
    for step in range(5):
        dist.all_reduce(torch.ones(4))
    if rank == 0:
        fault()
        dist.all_reduce(torch.zeros(()))  # a metric, for the log
    for step in range(5):
        dist.all_reduce(torch.ones(4))  # here
train()
""",
        r"agree on collective #6: rank 0 calls all_reduce of .*float32, rank 1 calls all_reduce of .*4 float32",
        r"hang: ",
        code=124,
    ),
    _hang(
        "returns-early",
        "A rank has fewer batches and returns early",
        "return",
        r"rank 1 finished without calling all_reduce #6: rank 0 waits .* \(collective #6\), .* was all_reduce #5",
    ),
    _hang(
        "dead-lock",
        "A deadlock on a lock",
        "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()  # here",
        r"rank 1 has not called all_reduce #6: rank 0 waits in all_reduce .*waiting for a lock",
    ),
    _hang(
        "infinite-loop",
        "An infinite loop",
        "while True: pass  # here",
        r"rank 1 has not called all_reduce #6: rank 0 waits in all_reduce .*running Python",
    ),
    _hang(
        "holds-the-gil",
        "C code that holds the GIL",
        "import ctypes\nctypes.PyDLL(None).sleep(1000)  # here",
        r"rank 1 has not called all_reduce #6: rank 0 waits in all_reduce .*in C code, holding\s+the GIL",
    ),
    _hang(
        "stopped",
        "A rank is stopped (SIGSTOP)",
        "import signal\nos.kill(os.getpid(), signal.SIGSTOP)  # here",
        r"rank 1 has not called all_reduce #6: rank 0 waits in all_reduce .*stopped \(SIGSTOP\)",
    ),
    Case(
        "loader-stuck",
        "A data-loader worker never returns",
        _GLOO.replace('dist.init_process_group("gloo")', "")
        + _LOADER.format(change="time.sleep(1000)").replace("# loop", "# here"),
        r"rank 1 has not called all_reduce #6: rank 0 waits in all_reduce .*waiting for\s+data-loader",
        r"hang: ",
        code=124,
    ),
    Case(
        "port-taken",
        "The port is in use",
        _in_step(""),
        r"port \d+ is taken on this machine.*\(python.*\): another program listens there. Give another port",
        r"EADDRINUSE|address already in use|is taken",
        code=125,
        culprit=None,
        options=f"--master-port {PORT}",
    ),
    Case(
        "no-route",
        "No route to the first machine",
        _in_step(""),
        r"did not meet the job's machines at 10.77.3.9:29500 .*Network is unreachable: no interface of this machine",
        r"[Nn]etwork is unreachable|[Nn]o route",
        code=125,
        culprit=None,
        options="--nnodes 2 --node-rank 1 --master-addr 10.77.3.9 --master-port 29500 --rdzv-conf timeout=5",
        before=_NO_NETWORK,
    ),
    Case(
        "wrong-interface",
        "The network interface reaches no other machine (`GLOO_SOCKET_IFNAME=lo`)",
        _in_step(""),
        r"GLOO_SOCKET_IFNAME=lo: that interface .* give one of left \(10.77.3.1",
        r"GLOO_SOCKET_IFNAME|connectFullMesh failed",
        code=125,
        culprit=None,
        nproc=1,
        options=_RENDEZVOUS,
        before=_TWO_MACHINES,
        variables=(("GLOO_SOCKET_IFNAME", "lo"),),
        rest_s=30,  # the launcher of the second machine ends by itself
    ),
    Case(
        "disk-full",
        "The disk is full at a checkpoint",
        _CHECKPOINT.format(path="disk/last.safetensors", change="if rank == 0: fault()", here="# here"),
        r"rank 0 failed: OSError: \[Errno 28\] the checkpoint could not be written .No space left on device.: 'disk",
        r"No space left on device",
        culprit=0,
        before=_SMALL_DISK,
    ),
    Case(
        "ctrl-c-at-start",
        "Ctrl-C while the launcher starts",
        _in_step(""),
        r"^KeyboardInterrupt$",
        r"SignalException|KeyboardInterrupt",
        code=-2,
        culprit=None,
        send=signal.SIGINT,
        while_starting=True,
    ),
    _interrupted(
        "ctrl-c-at-import",
        "Ctrl-C while the ranks import",
        _GLOO.replace("import", "fault()\nimport", 1),
    ),
    _interrupted(
        "ctrl-c-in-a-step",
        "Ctrl-C in a step",
        _GLOO
        + """
dist.all_reduce(torch.ones(4))
fault()
while True:
    dist.all_reduce(torch.ones(4))
""",
    ),
    _interrupted(
        "ctrl-c-in-a-save",
        "Ctrl-C in a save",
        _CHECKPOINT.format(
            path="last.safetensors",
            change="os.fsync = lambda descriptor: (fault(), time.sleep(1000))  # a slow disk",
            here="",
        ),
    ),
    Case(
        "terminated",
        "The launcher gets SIGTERM",
        _WAITS,
        r"^ddparity: ended all processes on SIGTERM$",
        r"SignalException",
        code=143,
        culprit=None,
        send=signal.SIGTERM,
    ),
    Case(
        "launcher-killed",
        "The launcher is killed by SIGKILL",
        _WAITS,
        r"^$",
        r"SIGKILL",
        code=-9,
        culprit=None,
        send=signal.SIGKILL,
    ),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run of a case ended. `code`: None where the launcher did not end before the cap."""

    code: int | None
    seconds: float  # from the fault until the launcher and all that it started have ended
    from_start: bool  # no rank called `fault`: the seconds count from the start of the launcher
    text: str  # the output of the launcher
    left: tuple[str, ...]  # command lines of processes that it left behind
    folder: Path

    def end(self, lines: int = 15) -> str:
        return "\n".join(self.text.rstrip().splitlines()[-lines:])


class NotPermittedError(Exception):
    """This machine does not permit the preparation of the case."""


OURS = (sys.executable, "-m", "ddparity", "run")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def run_case(case: Case, launcher: Sequence[str], folder: Path, cap_s: float, warm: bool = False) -> Outcome:
    """Run a case's job in a new folder, for at most `cap_s` after the fault. Afterwards none of its processes run.

    `warm`: a launcher of ours that gets no signal and needs no preparation is forked from a process that has imported
    it.

    Raises:
        NotPermittedError: this process lacks the rights for a control group or a namespace.
    """
    folder.mkdir()
    (folder / "train.py").write_text(case.text())
    with _taken_port() as port, open(folder / "output.txt", "wb") as output:
        prefix = ("sh", "-c", case.before, "sh") if case.before else ()
        if case.send is not None:  # processes that a shell starts in the background ignore SIGINT
            prefix = ("env", "--default-signal=INT", *prefix)
        options = case.options.replace(PORT, str(port)).split()
        # Both launchers have this name for the number of processes.
        command = [*prefix, *launcher, "--nproc-per-node", str(case.nproc), *options, case.program]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(case.variables)}
        process: subprocess.Popen[bytes] | Started
        if warm and not prefix:
            process = Started(command[len(OURS) - 1 :], folder, environment, output)
        else:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        begin = time.time()
        left: list[psutil.Process] = []
        try:
            fault = _send(case, process, folder)
            while process.poll() is None and time.time() - (fault or begin) < cap_s:
                time.sleep(0.02)
                fault = fault or _fault(folder)
            code, left = process.poll(), _family(folder)
            ended = time.time()
            while code is not None and left and time.time() - ended < case.rest_s:
                time.sleep(0.02)
                left = _family(folder)
            # Processes that ended by themselves count, too.
            ended = time.time() if code is not None and not left else ended
            names = tuple(_command(one) for one in left) if code is not None else ()
        finally:
            _clear(process, folder)
    text = (folder / "output.txt").read_text(errors="replace").replace(f"{folder}/", "")
    if code == NOT_PERMITTED:
        raise NotPermittedError(text.strip())
    fault = fault or _fault(folder)
    return Outcome(code, ended - (fault or begin), fault is None, text, names, folder)


def _fault(folder: Path) -> float | None:
    """Return when the first rank called `fault`."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return float((folder / "fault").read_text().splitlines()[0])
    return None


def _send(case: Case, process: subprocess.Popen[bytes] | Started, folder: Path) -> float | None:
    """Send the launcher the case's signal, and return when."""
    if case.send is None:
        return None
    deadline = time.time() + 60
    while not (_imports_torch(process.pid) if case.while_starting else _fault(folder)):
        assert process.poll() is None and time.time() < deadline, (folder / "output.txt").read_text()
        time.sleep(0.005)
    process.send_signal(case.send)
    return time.time()


def _imports_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def _family(folder: Path) -> list[psutil.Process]:
    """Return all processes that run in a folder: those that the launcher started, whatever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[-3:])
    except psutil.Error:
        return str(process.pid)


def _clear(process: subprocess.Popen[bytes] | Started, folder: Path) -> None:
    for one in _family(folder):
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.kill()
    process.wait()
    for mount in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup"):
        group = Path(mount) / f"ddparity-{process.pid}"
        if group.exists():
            psutil.wait_procs(_family(folder), timeout=5)
            group.rmdir()


@contextlib.contextmanager
def _taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]

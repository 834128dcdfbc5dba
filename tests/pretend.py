"""Run ddparity in this process as if the system were another one: `python -m tests.pretend darwin win32`.

What the system would not have is taken away: attributes of `os`, `signal` and `socket`, modules, and /proc, for
ddparity's own calls. For each name a fork of this process imports every module, trains, saves, loads and predicts on
one process, launches two, and prints one line. Libraries are imported before, since they ask for the platform, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import pkgutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle  # noqa: F401
import psutil  # noqa: F401
import pyarrow.dataset
import pyarrow.parquet  # noqa: F401
import rich.console
import rich.progress
import rich.table  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.elastic.agent.server.local_elastic_agent
import torch.distributed.elastic.rendezvous.registry
import torch.distributed.launcher.api
import torch.distributed.run
import typer.testing

# The names of ddparity that must not have been seen by the time that something is taken away.
assert not [name for name in sys.modules if name == "ddparity" or name.startswith("ddparity.")]

NOT_ON_MAC = {
    os: ["SCHED_BATCH", "SCHED_OTHER", "sched_getaffinity", "sched_getscheduler", "sched_setscheduler", "sched_yield"],
    signal: ["SIGRTMIN", "SIGRTMAX"],
    socket: ["TCP_USER_TIMEOUT", "TCP_KEEPIDLE"],
}
NOT_ON_WINDOWS = {
    os: [
        *[
            "O_CLOEXEC",
            "O_NOFOLLOW",
            "O_NONBLOCK",
            "O_DIRECTORY",
            "O_NOCTTY",
            "O_ACCMODE",
            "WEXITED",
            "WNOWAIT",
            "P_PID",
        ],
        *["fork", "mkfifo", "posix_spawnp", "killpg", "waitid", "getpgrp", "tcgetpgrp", "ttyname", "sysconf", "uname"],
        *["fchown", "fchmod", "preadv", "pread", "pwrite", "pwritev", "register_at_fork", "set_blocking", "nice"],
    ],
    signal: [
        *["SIGKILL", "SIGBUS", "SIGXCPU", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGXFSZ", "SIGCONT"],
        *["pthread_sigmask", "SIG_BLOCK", "SIG_UNBLOCK", "SIG_SETMASK"],
    ],
    socket: ["AF_UNIX"],
}
_STANDARD = os.path.dirname(os.__file__)


def pretend(platform: str) -> None:
    """Take away what a system does not have."""
    sys.platform = platform
    gone = [NOT_ON_MAC] + [NOT_ON_WINDOWS] * (platform == "win32")
    for module, names in ((module, names) for one in gone for module, names in one.items()):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    if platform == "win32":
        sys.modules.update(dict.fromkeys(["fcntl", "termios", "resource", "pwd", "grp"]))  # importing raises
    real = ctypes.CDLL.__getattr__

    def without(library: ctypes.CDLL, name: str) -> Any:
        if name in ("prctl", "tgkill") and _asks_for(sys._getframe(1)):
            raise AttributeError(name)
        return real(library, name)

    ctypes.CDLL.__getattr__ = without
    sys.addaudithook(_no_proc)


def _no_proc(event: str, arguments: tuple[Any, ...]) -> None:
    looks = event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith("/proc")
    if looks and _asks_for(sys._getframe(1)):
        raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))


def _asks_for(frame: FrameType | None) -> bool:
    """Return whether ddparity itself, perhaps through the standard library, asks here."""
    while frame is not None and frame.f_code.co_filename.startswith((_STANDARD, "<frozen")):
        if "site-packages" in frame.f_code.co_filename:
            return False
        frame = frame.f_back
    return frame is not None and "ddparity" in Path(frame.f_code.co_filename).parts


def main(platform: str, folder: str) -> None:
    pretend(platform)
    import ddparity as dp

    modules = [one.name for one in pkgutil.walk_packages(dp.__path__, "ddparity.")]
    for name in modules:
        if name not in ("ddparity.__main__", "ddparity.batchnorm.triton_kernels") and not name.endswith("._fused"):
            importlib.import_module(name)
    from ddparity import system
    from ddparity.launcher.options import parse
    from ddparity.launcher.run import run_launch
    from ddparity.task.train import CheckpointOptions, train

    assert not system.LINUX and system.process_fields(os.getpid()) is None and not system.own_descriptors()
    task = dp.Task(
        model=lambda: torch.nn.Linear(2, 1),
        dataset=lambda split: torch.arange(20.0).reshape(10, 2),
        loss=lambda model, data: model(data).square().mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        global_batch=4,
        micro_batch=2,
        metric=lambda outputs, dataset: outputs.mean(),
    )
    checkpoint = Path(folder) / "checkpoint.safetensors"
    with contextlib.redirect_stdout(io.StringIO()):
        for reduction in ("fast", "strict"):
            train(task, checkpoint, reduction=reduction, saving=CheckpointOptions(every=1, keep=3))
        result = train(task, checkpoint, saving=CheckpointOptions(resume=True))
    with dp.world(), dp.first(), dp.preemption() as stopping:
        assert stopping() == 0
    model = task.model()
    dp.load_checkpoint(checkpoint, model=model)
    assert dp.fingerprint(model) == result.fingerprint
    dp.predict(model, task.dataset("test"), to=Path(folder) / "outputs", batch_size=4)
    assert len(dp.read_predictions(Path(folder) / "outputs")) == 10
    assert not [path for path in Path(folder).rglob(".*") if path.is_file()], "drafts are left"

    script = Path(folder) / "script.py"
    script.write_text("import os; print('rank', os.environ['RANK'])")
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = run_launch(parse(["--nproc", "2", str(script)]))
    shown = typer.testing.CliRunner().invoke(importlib.import_module("ddparity.cli").app, ["--version"]).stdout
    launched = ""
    if platform == "win32":
        try:
            dp.launch(print, nproc=2)
        except dp.DDParityError as error:
            launched = f"; launch: {type(error).__name__}"
    print(f"{platform}: code {code}, {len(modules)} modules, {shown.strip()}{launched}: {told.getvalue().strip()}")


if __name__ == "__main__":
    fork, waitpid = os.fork, os.waitpid
    for chosen in sys.argv[1:]:
        sys.stdout.flush()
        child = fork()
        if not child:
            with tempfile.TemporaryDirectory() as temporary:
                main(chosen, temporary)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        if status := waitpid(child, 0)[1]:
            sys.exit(f"{chosen}: status {status}")

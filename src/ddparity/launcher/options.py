"""The options of `ddparity run`: how they are read, what they mean, and what the help says.

The parser is torchrun's own, with our options added. The options, torchrun's PET_* variables and the scheduler's
variables together decide what runs and where the machines of a job meet (the rendezvous).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.distributed.run as torchrun
from torch.distributed.launcher.api import LaunchConfig

from ..compat import shutdown_timeout
from ..runtime.environment import (
    PYTORCH_JOB,
    Engine,
    NodePlacement,
    detect_engine,
    find_node_placement,
    find_placement,
)
from ..runtime.network import join_endpoint, split_endpoint
from .resources import cores

GRACE_S = 30  # from a signal to SIGKILL, as torchrun and Kubernetes have it
# For torch's c10d rendezvous, in seconds. The other machines wait for a lost one until its heartbeats are overdue, and
# clocks may be some seconds apart. A restart lets late machines join: no need to wait half a minute for them.
_C10D_TIMES = {"keep_alive_interval": 2, "keep_alive_max_attempt": 5, "last_call_timeout": 5, "read_timeout": 30}
_STATIC_PORT, _C10D_PORT = 29500, 29400  # torchrun's defaults


@dataclass(frozen=True)
class Launch:
    """What to start, and how. `logs` and `show` hold here, not `config.logs_specs`."""

    config: LaunchConfig
    command: tuple[str, ...]  # a script and its arguments; "-m", a module and its arguments; or a program
    python: bool  # False: the command is a program
    logs: Path | None  # a folder for the ranks' output
    show: Literal["all"] | frozenset[int]  # ranks whose output goes to the terminal
    hang_timeout_s: float | None  # None: the time-out of the process group
    on_hang: Literal["end", "report"]
    grace_s: int
    node_rank: int | None  # None: the rendezvous decides
    nproc_given: bool  # as a number: then it is meant to be the same on all machines
    engine: str | None  # the scheduler whose variables describe the machines
    children: Literal["live", "end"] = "live"  # what a script that ends well leaves running
    schedule: Literal["normal", "batch"] = "normal"  # the ranks' processes, by the operating system

    @property
    def alone(self) -> bool:
        """Whether this machine is the only one and needs no address that others can reach."""
        return self.config.max_nodes == 1 and self.config.rdzv_endpoint == "localhost:0"


def parse(arguments: Sequence[str]) -> Launch:
    """Read the arguments of `ddparity run`, torchrun's PET_* variables, and those of Slurm and SkyPilot.

    On one machine, no option is needed: the job takes a free port and starts one process per GPU. An option wins over a
    PET_* variable, and a PET_* variable wins over the scheduler's.

    Raises:
        ValueError: an option is unknown or its value is not valid; options contradict each other; the script does not
            exist; or a launcher has already started this process as a rank.
    """
    given, unknown = read_options(arguments)
    if unknown:
        refuse_unknown(unknown[0])
    if given.slurm or given.kubernetes:
        raise ValueError("--slurm and --kubernetes submit a job: there is nothing to launch here")
    if given.dry_run:
        raise ValueError("--dry-run: prints a job, with --slurm or --kubernetes")
    nodes = _scheduled_nodes(given)
    command = _command(given)
    nproc = _nproc(given.nproc_per_node, nodes)
    minimum, maximum = read_nnodes(given.nnodes if given.nnodes is not None else str(nodes.nnodes if nodes else 1))
    backend, endpoint, node_rank, run_id = _rendezvous(given, nodes, minimum, maximum)
    alone = endpoint == "localhost:0" and maximum == 1
    grace_s = GRACE_S if given.shutdown_timeout is None else given.shutdown_timeout
    if grace_s < 0:
        raise ValueError(f"--shutdown-timeout {grace_s}: give seconds, 0 or more")
    if given.max_restarts < 0:
        raise ValueError(f"--max-restarts {given.max_restarts}: give a number of restarts, 0 or more")
    if given.hang_timeout is not None and not 0 < given.hang_timeout < math.inf:
        raise ValueError(f"--hang-timeout {given.hang_timeout:g}: give seconds, more than 0")
    if given.schedule == "batch" and not hasattr(os, "SCHED_BATCH"):
        raise ValueError("--schedule batch: this system has no such policy, which is Linux's: leave it out")
    filled = argparse.Namespace(**vars(given))
    filled.nnodes, filled.nproc_per_node = f"{minimum}:{maximum}", str(nproc)
    filled.rdzv_backend, filled.rdzv_endpoint, filled.rdzv_id = backend, endpoint, run_id
    filled.node_rank, filled.master_addr, filled.master_port = node_rank or 0, "", 0
    filled.log_dir, filled.redirects, filled.tee, filled.local_ranks_filter = os.devnull, "0", "0", ""
    with _default_variable("OMP_NUM_THREADS", "1"):  # without it, torch decides the threads and prints a banner
        config, _, _ = torchrun.config_from_args(filled)
    config = dataclasses.replace(config, **shutdown_timeout(LaunchConfig, grace_s))
    _complete_rendezvous(config, given, node_rank, alone)
    return Launch(
        config=config,
        command=command,
        python=not given.no_python,
        logs=next((Path(folder) for folder in (given.logs, given.log_dir) if folder is not None), None),
        show=_shown_ranks(given),
        hang_timeout_s=given.hang_timeout,
        on_hang=given.on_hang,
        grace_s=grace_s,
        node_rank=node_rank if backend == "static" else None,
        nproc_given=str(given.nproc_per_node).isdigit(),
        engine=nodes.engine if nodes is not None else None,
        children=given.children,
        schedule=given.schedule,
    )


def _scheduled_nodes(given: argparse.Namespace) -> NodePlacement | None:
    """Return the machines that a scheduler describes; None if the user gives the rendezvous, or there is no scheduler.

    Raises ValueError where a launcher has already started this process as a rank.
    """
    engine = detect_engine()
    # A Slurm task may be a rank or a launcher: find_node_placement tells. Else the user's options win over variables.
    if engine is not None and engine.name != "Slurm" and not _says_where(given, engine):
        placement = find_placement()
        assert placement is not None
        hint = "run the script itself"
        if engine is PYTORCH_JOB:
            hint += ", or several processes in each pod with --nproc N --nnodes $WORLD_SIZE --node-rank $RANK " + (
                "--master-addr $MASTER_ADDR --master-port $MASTER_PORT"
            )
        raise ValueError(
            f"{engine.name} started this process already, as rank {placement.rank} of {placement.world_size}: {hint}"
        )
    if given.standalone or given.rendezvous or given.rdzv_endpoint or given.master_addr:
        return None
    return find_node_placement(nnodes=given.nnodes)


def _says_where(given: argparse.Namespace, engine: Engine) -> bool:
    """Return whether the user's options say which machines start ranks, and where they meet.

    A PyTorchJob's pods also get PET_* variables, for a launcher. A rank inherits those of its own launcher.
    """
    found = [name for name in ("standalone", "rendezvous", "rdzv_endpoint", "master_addr") if vars(given)[name]]
    if given.nnodes in ("1", "1:1"):
        found.append("nnodes")
    return any(engine is PYTORCH_JOB or f"PET_{name.upper()}" not in os.environ for name in found)


def _command(given: argparse.Namespace) -> tuple[str, ...]:
    script, arguments = given.training_script, given.training_script_args
    if given.no_python and given.module:
        raise ValueError("--no-python and --module: give one of the two")
    if given.module:
        return ("-m", script, *arguments)
    if given.no_python:
        if shutil.which(script) is None:
            raise ValueError(f"there is no program {script}")
    elif Path(script).is_dir():
        if not (Path(script) / "__main__.py").is_file():
            raise ValueError(f"there is no __main__.py in the folder {script}")
    elif not Path(script).is_file():
        hint = f" (an option is written --{script})" if "=" in script else ""
        raise ValueError(f"there is no script {script}{hint}")
    return (script, *arguments)


def _nproc(text: str | None, nodes: NodePlacement | None) -> int:
    if text is None:
        return (nodes.nproc if nodes is not None else None) or max(1, torch.cuda.device_count())
    if text == "cpu" or (text == "auto" and not torch.accelerator.is_available()):
        return cores()  # torch counts the cores of the machine, which a container may not use
    try:
        found = int(torchrun.determine_local_world_size(text))
    except ValueError:
        raise ValueError(
            f"--nproc {text}: give a number of processes, or auto, cpu or gpu where there are any"
        ) from None
    if found < 1:
        raise ValueError(f"--nproc {text}: start at least 1 process")
    return found


def read_nnodes(text: str) -> tuple[int, int]:
    """Return the smallest and the largest number of machines that a value of `--nnodes` allows."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if found is None or not 0 < int(found[1]) <= int(found[2] or found[1]):
        raise ValueError(f"--nnodes {text}: give a number of machines, or MIN:MAX, as in 1:4")
    return int(found[1]), int(found[2] or found[1])


def _rendezvous(
    given: argparse.Namespace, nodes: NodePlacement | None, minimum: int, maximum: int
) -> tuple[str, str, int | None, str]:
    """Return the backend, the endpoint, this machine's number and the job's name, for torch's rendezvous.

    A static rendezvous keeps the numbers that the user or the scheduler gives to the machines. c10d numbers them itself
    and can form a new group of machines after a failure.
    """
    backend, node_rank, run_id = given.rdzv_backend, given.node_rank, given.rdzv_id or "none"
    if given.standalone or (
        maximum == 1
        and backend in (None, "static")
        and not (given.rendezvous or given.rdzv_endpoint)
        and (given.master_port is None or "PET_MASTER_PORT" in os.environ)
    ):
        if maximum > 1:
            raise ValueError(
                f"--standalone --nnodes {given.nnodes}: --standalone means one machine; give one of the two"
            )
        return "c10d", "localhost:0", None, str(uuid.uuid4())
    if backend not in (None, "static", "c10d"):  # etcd and others: torch checks them
        return backend, given.rdzv_endpoint or "", node_rank, run_id
    endpoint = given.rendezvous or given.rdzv_endpoint
    if given.rendezvous and given.rdzv_endpoint:
        raise ValueError(f"--rendezvous {given.rendezvous} --rdzv-endpoint {given.rdzv_endpoint}: give one of the two")
    if endpoint:
        host, port = split_endpoint(endpoint, None if given.rendezvous else _C10D_PORT)
    elif given.master_addr:
        host, port = given.master_addr, given.master_port if given.master_port is not None else _STATIC_PORT
    elif nodes is not None:
        host, port, node_rank, run_id = nodes.address, nodes.port, nodes.node_rank, nodes.job
    elif maximum == 1:
        host, port = "127.0.0.1", given.master_port or _STATIC_PORT
    else:
        raise ValueError(
            f"--nnodes {given.nnodes}: say where the machines meet, the same on each of them: --rendezvous HOST:PORT, "
            f"with the name or address of the first machine and a port that is free there"
        )
    if node_rank is not None and not 0 <= node_rank < maximum:
        raise ValueError(
            f"--node-rank {node_rank} --nnodes {given.nnodes}: machines are numbered from 0 to {maximum - 1}"
        )
    fixed = minimum == maximum
    if backend == "static" and not fixed:
        raise ValueError(
            f"--rdzv-backend static --nnodes {given.nnodes}: a range of machines needs --rendezvous HOST:PORT"
        )
    if backend == "static" and node_rank is None and maximum > 1:
        raise ValueError("--rdzv-backend static: give each machine its number with --node-rank, from 0")
    if backend is None:
        numbered = node_rank is not None or maximum == 1
        backend = "static" if fixed and numbered and given.max_restarts == 0 else "c10d"
    return backend, join_endpoint(host, port), 0 if node_rank is None and maximum == 1 else node_rank, run_id


def _complete_rendezvous(config: LaunchConfig, given: argparse.Namespace, node_rank: int | None, alone: bool) -> None:
    """Set what torch's rendezvous also needs, unless the user's --rdzv-conf and --local-addr set it."""
    if alone and config.local_addr is None:
        config.local_addr = "127.0.0.1"
    if config.rdzv_backend != "c10d" or alone:
        return
    for name, value in {"join_timeout": config.rdzv_configs["timeout"], **_C10D_TIMES}.items():
        config.rdzv_configs.setdefault(name, value)
    # torch guesses from the host name which machine holds the store. Number 0 does, unless the user chose c10d with
    # torchrun's own option: then a machine's number says nothing about the store.
    if node_rank is not None and given.rdzv_backend is None:
        config.rdzv_configs.setdefault("is_host", "1" if node_rank == 0 else "0")


def _shown_ranks(given: argparse.Namespace) -> Literal["all"] | frozenset[int]:
    """Return the ranks on the terminal, from --show or torchrun's --tee, --redirects and --local-ranks-filter."""
    text = given.show
    if text is None:
        if given.local_ranks_filter:
            text = given.local_ranks_filter
        elif given.tee != "0":
            text = "all" if given.tee in "123" else ",".join(re.findall(r"(\d+):[123]", given.tee))
        elif given.redirects == "3":
            return frozenset()
        else:
            text = "0"
    if text == "all":
        return "all"
    if re.fullmatch(r"\d+(,\d+)*", text) is None:
        raise ValueError(f"--show {text}: give all, or ranks, as in 0,2")
    return frozenset(int(rank) for rank in text.split(","))


@contextmanager
def _default_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while, unless it is set."""
    before = os.environ.get(name)
    os.environ[name] = value if before is None else before
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


# The parser.

# Where one of these is absent, we decide. torchrun's defaults would hide that it is absent.
_NONE_IF_ABSENT = (
    "nnodes",
    "nproc_per_node",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
    "node_rank",
    "master_addr",
    "master_port",
    "shutdown_timeout",
)


def read_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the arguments before the script that the parser does not know."""
    parser = _parser()
    known = {name for action in parser._actions for name in action.option_strings}
    hidden = [_hide_spaces(argument) if argument.partition("=")[0] not in known else argument for argument in arguments]
    given, unknown = parser.parse_known_args(hidden)
    unknown = [_show_spaces(argument) for argument in unknown]
    given.training_script = _show_spaces(given.training_script)
    given.training_script_args = [_show_spaces(argument) for argument in given.training_script_args]
    given.last_dry_run = False
    # Users who repeat an earlier command add --dry-run at its end, behind the script's arguments.
    if (given.slurm or given.kubernetes) and given.training_script_args[-1:] == ["--dry-run"]:
        given.training_script_args = given.training_script_args[:-1]
        given.dry_run = given.last_dry_run = True
    return given, unknown


_SPACE = "\U000f0020"  # of a private area of Unicode


def _hide_spaces(argument: str) -> str:
    """Return --name=value without spaces: argparse takes an unknown option with a space for the script."""
    return argument.replace(" ", _SPACE) if re.match(r"--[a-z][a-z0-9_-]*=", argument) else argument


def _show_spaces(argument: str) -> str:
    return argument.replace(_SPACE, " ")


def _parser() -> argparse.ArgumentParser:
    try:
        parser = torchrun.get_args_parser()
    except ValueError as error:  # torch reads the variables of its flags while it builds the parser
        flags = [name for name, value in os.environ.items() if name.startswith("PET_") and not value.isdigit()]
        raise ValueError(f"one of {', '.join(sorted(flags))} is a flag: set it to 0 or 1 ({error})") from None
    parser.allow_abbrev = False  # --signal=… is sbatch's option, not --signals-to-handle
    parser.set_defaults(**{name: None for name in _NONE_IF_ABSENT if f"PET_{name.upper()}" not in os.environ})
    parser.add_argument("--nproc", "-n", dest="nproc_per_node", default=argparse.SUPPRESS)
    parser.add_argument("--rendezvous")
    parser.add_argument("--logs")
    parser.add_argument("--show", default=None)
    parser.add_argument("--hang-timeout", type=float, default=None)
    parser.add_argument("--on-hang", choices=["end", "report"], default="end")
    parser.add_argument("--children", choices=["live", "end"], default="live")
    parser.add_argument("--schedule", choices=["normal", "batch"], default="normal")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--kubernetes", metavar="IMAGE")
    parser.add_argument("--dry-run", action="store_true")
    # Earlier versions of torch do not have these.
    for name, default, kind in (("shutdown-timeout", None, int), ("signals-to-handle", "", str)):
        if not any(f"--{name}" in action.option_strings for action in parser._actions):
            parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", type=kind, default=default)
    # torch makes the parser, so that no subclass can have our help and our errors. mypy refuses to assign to a method.
    setattr(parser, "format_help", help_text)  # noqa: B010 - see above
    setattr(parser, "error", _refuse)  # noqa: B010 - see above
    return parser


def refuse_unknown(option: str) -> NoReturn:
    """Raise a ValueError that proposes the known option with the most similar name."""
    known = [name for action in _parser()._actions for name in action.option_strings if "_" not in name]
    close = difflib.get_close_matches(option.partition("=")[0], known, 1)
    hint = f"did you mean {close[0]}?" if close else "ddparity run --help shows the options"
    raise ValueError(f"there is no option {option}: {hint} (give the script's own options after the script)")


def _refuse(message: str) -> NoReturn:
    """Raise argparse's error in our words."""
    if "required" in message and "training_script" in message:
        raise ValueError("which script? ddparity run [OPTIONS] SCRIPT [ARGUMENTS]...; --help shows the options")
    kinds = {"int": "a whole number", "float": "a number"}
    if found := re.fullmatch(r"argument ([^:]+): invalid (\w+) value: '(.*)'", message):
        option, kind, value = found[1].split("/")[0], found[2], found[3]
        variable = f"PET_{option.lstrip('-').replace('-', '_').upper()}"
        source = f"{variable}={value}" if os.environ.get(variable) == value else f"{option} {value}"
        raise ValueError(f"{source}: give {kinds.get(kind, kind)}")
    if found := re.fullmatch(r"argument ([^:]+): expected one argument", message):
        raise ValueError(f"{found[1].split('/')[0]}: give a value")
    raise ValueError(message.removeprefix("argument "))


_HELP = """\
Usage: ddparity run [OPTIONS] SCRIPT [ARGUMENTS]...

Run any script on N processes, on one machine or several, with torch's elastic agent.

  --nproc, -n N|auto       Processes on this machine. Default: one per GPU, or one.
  -m, --module             SCRIPT is a module, as in python -m.
  --no-python              SCRIPT is any program.
  --show 0|all|1,2         Ranks whose output goes to the terminal. Default: 0.
  --logs DIR               Write the output of ranks to files in DIR: of rank 0 only with --show all or the like.
  --hang-timeout SECONDS   End the job if the others wait for a rank for SECONDS. Default: the time-out of its group.
  --on-hang end|report     End the job after a diagnosed hang, or only report it. Default: end.
  --max-restarts N         Start again after a failure, up to N times. Default: 0.
  --shutdown-timeout S     Seconds from a signal to SIGKILL. Default: 30.
  --children live|end      Processes that the script leaves running when it ends well. Default: live.
  --schedule normal|batch  How Linux schedules the ranks. batch: small Gloo collectives are faster. Default: normal.

Several machines: run the same command on each.
  --nnodes M               Number of machines. MIN:MAX: the job continues with the machines that are left.
  --rendezvous HOST:PORT   Where the machines meet: the first machine, and a port that is free there.
  --node-rank I            This machine's number, from 0. Default: the order of the machines' addresses.
  Under `srun --ntasks-per-node 1 ddparity run …`, SkyPilot and the Kubeflow Trainer these are known.

A job for a scheduler:
  --slurm [--NAME=VALUE]…  Submit an sbatch script. Options that ddparity does not know are sbatch's.
  --kubernetes IMAGE       Create a TrainJob of the Kubeflow Trainer.
  --dry-run                Print the script or the TrainJob, and submit nothing.

All of torchrun's options and PET_* variables are accepted. These are not described above:
{torchruns}

The exit code is that of the rank that failed, or 128 + n if signal n ended it."""


def help_text() -> str:
    """Return what `ddparity run --help` prints."""
    parser = _parser()
    names = sorted(
        {max(action.option_strings, key=len).replace("_", "-") for action in parser._actions if action.option_strings}
    )
    ours = {*re.findall(r"--[a-z-]+", _HELP), "--help", "--print-completion"}
    return _HELP.format(torchruns=_in_lines([name for name in names if name not in ours]))


def _in_lines(names: list[str], width: int = 110) -> str:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += f"  {name}"
    return "\n".join(lines)

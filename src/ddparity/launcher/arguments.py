"""The arguments of `ddparity run`: torchrun's own parser, with our options added and its complaints in our words."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from typing import NoReturn

import torch.distributed.run as torchrun

# Options whose absence has a meaning of its own: torchrun's defaults would hide it.
_UNLESS_GIVEN = (
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


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those before the script that the parser does not know."""
    given, unknown = _parser().parse_known_args(list(arguments))
    given.last_dry_run = False
    # As it is typed when an earlier command is called up again: behind everything.
    if (given.slurm or given.kubernetes) and given.training_script_args[-1:] == ["--dry-run"]:
        given.training_script_args = given.training_script_args[:-1]
        given.dry_run = given.last_dry_run = True
    return given, unknown


def unknown_option(option: str) -> NoReturn:
    known = [name for action in _parser()._actions for name in action.option_strings if "_" not in name]
    close = difflib.get_close_matches(option.partition("=")[0], known, 1)
    hint = f"did you mean {close[0]}?" if close else "ddparity run --help shows them"
    raise ValueError(f"there is no option {option}: {hint} (the script's own options stand after it)")


def machines(said: str) -> tuple[int, int]:
    """The least and the greatest number of machines that `--nnodes` says."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", said)
    if found is None or not 0 < int(found[1]) <= int(found[2] or found[1]):
        raise ValueError(f"--nnodes {said}: give a number of machines, or MIN:MAX, as in 1:4")
    return int(found[1]), int(found[2] or found[1])


def help_text() -> str:
    """What `ddparity run --help` prints."""
    parser = _parser()
    names = sorted(
        {max(action.option_strings, key=len).replace("_", "-") for action in parser._actions if action.option_strings}
    )
    ours = set(re.findall(r"--[a-z-]+", _HELP))
    return _HELP.format(
        torchruns=_wrapped([name for name in names if name not in {*ours, "--help", "--print-completion"}])
    )


_HELP = """\
Usage: ddparity run [OPTIONS] SCRIPT [ARGUMENTS]...

Run any script on N processes, of one machine or several, on torch's elastic agent.

  --nproc, -n N|auto       Processes on this machine. Default: one a GPU, or one.
  -m, --module             SCRIPT is a module, as in python -m.
  --no-python              SCRIPT is any program.
  --show 0|all|1,2         Ranks whose output goes to the terminal. Default: 0.
  --logs DIR               The output of all ranks goes there, one file a rank.
  --hang-timeout SECONDS   A rank that the others wait for is named after that time without progress. Default: 60.
  --on-hang end|report     Whether a diagnosed hang ends the job. Default: end.
  --max-restarts N         Start again after a failure, up to N times. Default: 0.
  --shutdown-timeout S     Seconds from a signal to SIGKILL. Default: 3.

Several machines: the same command on each.
  --nnodes M               Machines; MIN:MAX for a job that goes on with those that are left.
  --rendezvous HOST:PORT   Where they meet: the first machine, and a port that is free there.
  --node-rank I            This machine's number, from 0; without it the order is that of their addresses.
  Under `srun --ntasks-per-node 1 ddparity run …`, SkyPilot and the Kubeflow Trainer these are known.

A job for a scheduler:
  --slurm [--NAME=VALUE]…  Submit an sbatch script; options that are not known here are sbatch's.
  --kubernetes IMAGE       Create a TrainJob of the Kubeflow Trainer.
  --dry-run                Print it instead.

All of torchrun's options and PET_* variables are understood; these, too:
{torchruns}

The exit code is the failed rank's own, or 128 + n where a signal n ended it."""


def _wrapped(names: list[str], width: int = 110) -> str:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += f"  {name}"
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    try:
        parser = torchrun.get_args_parser()
    except ValueError as error:  # torch reads the flags' variables while it builds the parser
        flags = [name for name, value in os.environ.items() if name.startswith("PET_") and not value.isdigit()]
        raise ValueError(f"one of {', '.join(sorted(flags))} is a flag: set it to 0 or 1 ({error})") from None
    parser.allow_abbrev = False  # --signal=… is sbatch's, and not short for --signals-to-handle
    parser.set_defaults(**{name: None for name in _UNLESS_GIVEN if f"PET_{name.upper()}" not in os.environ})
    parser.add_argument("--nproc", "-n", dest="nproc_per_node", default=argparse.SUPPRESS)
    parser.add_argument("--rendezvous")
    parser.add_argument("--logs")
    parser.add_argument("--show", default=None)
    parser.add_argument("--hang-timeout", type=float, default=60.0)
    parser.add_argument("--on-hang", choices=["end", "report"], default="end")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--kubernetes", metavar="IMAGE")
    parser.add_argument("--dry-run", action="store_true")
    # What earlier versions of torch lack.
    for name, default, kind in (("shutdown-timeout", None, int), ("signals-to-handle", "", str)):
        if not any(f"--{name}" in action.option_strings for action in parser._actions):
            parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", type=kind, default=default)
    # An assignment to a method is a type error; the parser is torch's, and no class of ours. Not argparse's pages:
    setattr(parser, "format_help", help_text)  # noqa: B010 - see above
    setattr(parser, "error", _refuse)  # noqa: B010 - see above
    return parser


def _refuse(message: str) -> NoReturn:
    """argparse's complaints in our words."""
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

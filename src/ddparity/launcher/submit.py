"""A job for a scheduler: what `--slurm` and `--kubernetes` ask for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .arguments import machines, read, unknown_option


@dataclass(frozen=True)
class Submission:
    """A job for a scheduler, in which each machine runs `ddparity run ARGUMENTS`."""

    to: Literal["slurm", "kubernetes"]
    arguments: tuple[str, ...]  # without those of the submission itself
    nnodes: int
    nproc: str | None
    script: str
    image: str | None  # of the container, in Kubernetes
    options: tuple[str, ...]  # of sbatch
    dry_run: bool


def find_submission(arguments: Sequence[str]) -> Submission | None:
    """The job that `--slurm` or `--kubernetes` asks for; None where neither is there.

    Raises:
        ValueError: an option is unknown or has no sensible value.
    """
    given, unknown = read(arguments)
    if not given.slurm and given.kubernetes is None:
        return None
    if given.slurm and given.kubernetes is not None:
        raise ValueError("--slurm and --kubernetes: give one of the two")
    if unknown and (given.kubernetes is not None or not unknown[0].startswith("--")):
        unknown_option(unknown[0])
    elsewhere = [name for name in ("rendezvous", "rdzv_endpoint", "master_addr", "node_rank") if vars(given)[name]]
    if elsewhere:
        raise ValueError(f"--{elsewhere[0].replace('_', '-')}: where the machines meet is known inside the job only")
    minimum, maximum = machines(given.nnodes or "1")
    if minimum != maximum:
        raise ValueError(f"--nnodes {given.nnodes}: a job has a fixed number of machines, as in --nnodes {maximum}")
    script = [given.training_script, *given.training_script_args]
    before = list(arguments)[: len(arguments) - len(script) - given.last_dry_run]
    for name, value in (("--nnodes", given.nnodes), ("--kubernetes", given.kubernetes)):
        before = _without(before, name, value)
    kept = [argument for argument in before if argument not in ("--slurm", "--dry-run", *unknown)]
    return Submission(
        to="slurm" if given.slurm else "kubernetes",
        arguments=(*kept, *script),
        nnodes=maximum,
        nproc=given.nproc_per_node,
        script=given.training_script,
        image=given.kubernetes,
        options=tuple(unknown),
        dry_run=given.dry_run,
    )


def hand_over(text: str, command: Sequence[str], dry_run: bool, otherwise: str) -> int:
    """Give a job's text to a scheduler's command, or print it; returns the exit code.

    Raises:
        ValueError: there is no such command on this machine; says `otherwise`, what can be done then.
    """
    if dry_run:
        print(text, end="")
        return 0
    if shutil.which(command[0]) is None:
        raise ValueError(f"there is no {command[0]} on this machine: {otherwise}")
    return subprocess.run(command, input=text, text=True, check=False).returncode


def _without(arguments: list[str], name: str, value: Any) -> list[str]:
    """The arguments without an option and its value, as "--name value" and "--name=value"."""
    kept: list[str] = []
    for argument in arguments:
        if kept and kept[-1] == name and argument == value:
            kept.pop()
        elif argument != f"{name}={value}":
            kept.append(argument)
    return kept

"""A job for a scheduler: what `--slurm` and `--kubernetes` ask for."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .options import machines, read, unknown_option


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


# Slurm's own, of which a job here has exactly one a machine; --nnodes says how many machines.
_DECIDED = ("--nodes", "--ntasks", "--ntasks-per-node", "--array")


def sbatch_script(job: Submission) -> str:
    """The script. A minute before the time limit every launcher gets SIGUSR1, and the job goes back into the queue.

    Raises:
        ValueError: an option of sbatch contradicts one task a machine, or its --signal cannot be read.
    """
    said = {option.partition("=")[0]: option.partition("=")[2] for option in job.options}
    if clash := next((name for name in _DECIDED if name in said), None):
        raise ValueError(f"{clash}: the job has one task a machine; give the number of machines with --nnodes")
    options = {
        "--job-name": Path(job.script).stem,
        "--nodes": str(job.nnodes),
        "--ntasks-per-node": "1",
        "--signal": "B:USR1@60",
        "--requeue": "",
        "--open-mode": "append",
    }
    # A task has one core unless more are asked for.
    if not said.keys() & {"--cpus-per-task", "--cpus-per-gpu", "--exclusive"}:
        options["--exclusive"] = ""
    options |= said
    found = re.fullmatch(r"(?:[BR]+:)?(?:SIG)?([A-Z]+[0-9]?)(@\d+)?", options["--signal"])
    if found is None:
        raise ValueError(f"--signal={options['--signal']}: give a signal and seconds before the end, as in USR1@60")
    signal = found[1]
    options["--signal"] = f"B:{signal}{found[2] or '@60'}"
    cpus = ["--cpus-per-task", said["--cpus-per-task"]] if "--cpus-per-task" in said else []
    command = shlex.join(["ddparity", "run", *job.arguments])
    step = shlex.join(["srun", "--kill-on-bad-exit=1", "--cpu-bind=none", *cpus])
    heads = "\n".join(f"#SBATCH {name}{'=' if value else ''}{value}" for name, value in options.items())
    return _SCRIPT.format(heads=heads, signal=signal, step=step, command=command)


# The signal goes to this shell alone (B:), and from it through srun to its tasks, which are the launchers: a process
# without a handler for it, such as a data-loader worker, would end.
_SCRIPT = """\
#!/bin/bash
{heads}

preempted=
trap 'preempted=yes; kill -{signal} "$step"' {signal}

{step} \\
    {command} &
step=$!

# A signal ends `wait` before the step has ended.
code=0
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    code=$?
done

# The ranks have saved their checkpoint and stopped: go on when the job's turn comes again.
if [ -n "$preempted" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def submit_to_slurm(job: Submission) -> int:
    """Submit the script, or print it with `--dry-run`; returns the exit code.

    Raises:
        ValueError: there is no sbatch on this machine, or an option is wrong.
    """
    otherwise = "submit from a login node, or see the script with --dry-run"
    return hand_over(sbatch_script(job), ["sbatch"], job.dry_run, otherwise)


def manifest(job: Submission) -> str:
    """The TrainJob, for the Trainer's runtime `torch-distributed`, as YAML.

    The Trainer sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT in each pod, which `run` reads.
    Source: https://www.kubeflow.org/docs/components/trainer/

    Raises:
        ValueError: no image was given.
    """
    if not job.image:
        raise ValueError("--kubernetes IMAGE: give the container image that has ddparity and the script")
    # Strings in JSON are strings in YAML, whatever they contain.
    nproc = f"\n    numProcPerNode: {int(job.nproc)}" if job.nproc is not None and job.nproc.isdigit() else ""
    command = "\n".join(f"      - {json.dumps(word)}" for word in ("ddparity", "run", *job.arguments))
    return _MANIFEST.format(
        name=_name(job.script), image=json.dumps(job.image), nnodes=job.nnodes, nproc=nproc, command=command
    )


_MANIFEST = """\
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {name}
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: {image}
    numNodes: {nnodes}{nproc}
    # GPUs: resourcesPerNode, limits, nvidia.com/gpu, as many as processes.
    command:
{command}
"""


def _name(script: str) -> str:
    """A name as Kubernetes takes it: letters, digits and dashes, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", Path(script).stem.lower()).strip("-")
    return (words if words[:1].isalpha() else f"train-{words}")[:50].strip("-")


def submit_to_kubernetes(job: Submission) -> int:
    """Create the TrainJob, or print it with `--dry-run`; returns the exit code.

    Raises:
        ValueError: there is no kubectl on this machine.
    """
    otherwise = "see the manifest with --dry-run, and create it elsewhere"
    return hand_over(manifest(job), ["kubectl", "create", "-f", "-"], job.dry_run, otherwise)


def submit_job(job: Submission) -> int:
    """Hand a job to its scheduler, or print it with `--dry-run`; return the exit code."""
    return submit_to_slurm(job) if job.to == "slurm" else submit_to_kubernetes(job)

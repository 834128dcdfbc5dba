"""A job for a scheduler: what `--slurm` and `--kubernetes` submit.

The command line becomes a `Submission`. From it come an sbatch script for Slurm, or a TrainJob for Kubernetes. In the
job, each machine runs `ddparity run` with the arguments that are not those of the submission.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .options import read_nnodes, read_options, refuse_unknown


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
    gpus: int | None  # of each machine, in Kubernetes; None: the job asks for none
    dry_run: bool


def find_submission(arguments: Sequence[str]) -> Submission | None:
    """Return the job that `--slurm` or `--kubernetes` submits; None where neither is given.

    Raises:
        ValueError: an option is unknown or its value is not valid.
    """
    given, unknown = read_options(arguments)
    if not given.slurm and given.kubernetes is None:
        return None
    if given.slurm and given.kubernetes is not None:
        raise ValueError("--slurm and --kubernetes: give one of the two")
    gpus = _gpus(given.nproc_per_node, unknown) if given.kubernetes is not None else None
    if given.kubernetes is not None:
        refused = [option for option in unknown if not option.startswith(_GPUS)]
    else:
        refused = [option for option in unknown if re.match(r"--[a-z][a-z0-9_-]*(=|$)", option) is None]
    if refused:
        refuse_unknown(refused[0])
    if given.slurm and (broken := next((one for one in unknown if not one.isprintable()), None)):
        raise ValueError(f"{broken!r}: an option of sbatch is one line of printable characters")
    inside = [name for name in ("rendezvous", "rdzv_endpoint", "master_addr", "node_rank") if vars(given)[name]]
    if inside:
        raise ValueError(f"--{inside[0].replace('_', '-')}: leave it out; the job itself knows where its machines meet")
    minimum, maximum = read_nnodes(given.nnodes or "1")
    if minimum != maximum:
        raise ValueError(f"--nnodes {given.nnodes}: a job has a fixed number of machines, as in --nnodes {maximum}")
    script = [given.training_script, *given.training_script_args]
    before = list(arguments)[: len(arguments) - len(script) - given.last_dry_run]
    flag = before[-1]
    is_file = given.slurm and not (given.module or given.no_python)
    if is_file and flag in unknown and "=" not in flag and not Path(script[0]).exists():
        raise ValueError(f"there is no script {script[0]}: an option of sbatch is written {flag}={script[0]}")
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
        options=tuple(unknown) if given.slurm else (),
        gpus=gpus,
        dry_run=given.dry_run,
    )


_GPUS = "--gpus-per-node="  # as sbatch's


def _gpus(nproc: str | None, unknown: Sequence[str]) -> int | None:
    """Return how many GPUs a machine needs: what the user says, or one for each process of a number of processes."""
    said = next((option.removeprefix(_GPUS) for option in unknown if option.startswith(_GPUS)), nproc)
    if said is not None and said is not nproc and not (said.isascii() and said.isdigit()):
        raise ValueError(f"{_GPUS}{said}: give a number of GPUs, 0 for a training on the CPU")
    return int(said) if said is not None and said.isascii() and said.isdigit() else None


def _without(arguments: list[str], name: str, value: str | None) -> list[str]:
    """Return the arguments without an option and its value, given as "--name value" or "--name=value"."""
    kept: list[str] = []
    for argument in arguments:
        if kept and kept[-1] == name and argument == value:
            kept.pop()
        elif argument != f"{name}={value}":
            kept.append(argument)
    return kept


def submit_job(job: Submission) -> int:
    """Hand a job to its scheduler, or print it with `--dry-run`. Return the exit code.

    Raises:
        ValueError: the scheduler's command is not on this machine, or an option is wrong.
    """
    if job.to == "slurm":
        text, command = sbatch_script(job), ["sbatch"]
        advice = "submit from a login node, or print the script with --dry-run"
    else:
        text, command = manifest(job), ["kubectl", "create", "-f", "-"]
        advice = "print the manifest with --dry-run, and create it on another machine"
    if job.dry_run:
        print(text, end="")
        return 0
    if shutil.which(command[0]) is None:
        raise ValueError(f"there is no {command[0]} on this machine: {advice}")
    return subprocess.run(command, input=text, text=True, check=False).returncode


# Slurm.

# The script sets these: a job has one task per machine, and --nnodes says how many machines.
_DECIDED = ("--nodes", "--ntasks", "--ntasks-per-node", "--array")


def sbatch_script(job: Submission) -> str:
    """Return the script. A minute before the time limit each launcher gets SIGUSR1, and the job is queued again.

    Raises:
        ValueError: an option of sbatch contradicts one task per machine, or its --signal cannot be read.
    """
    given = {option.partition("=")[0]: option.partition("=")[2] for option in job.options}
    if clash := next((name for name in _DECIDED if name in given), None):
        raise ValueError(f"{clash}: the job has one task per machine; give the number of machines with --nnodes")
    options = {
        "--job-name": re.sub(r"[^\w.+-]+", "-", Path(job.script).stem),
        "--nodes": str(job.nnodes),
        "--ntasks-per-node": "1",
        "--signal": "B:USR1@60",
        "--requeue": "",
        "--open-mode": "append",
    }
    # Without one of these, a task gets one core.
    if not given.keys() & {"--cpus-per-task", "--cpus-per-gpu", "--exclusive"}:
        options["--exclusive"] = ""
    options |= given
    found = re.fullmatch(r"(?:[BR]+:)?(?:SIG)?([A-Z]+[0-9]?)(@\d+)?", options["--signal"])
    if found is None:
        raise ValueError(f"--signal={options['--signal']}: give a signal and seconds before the end, as in USR1@60")
    signal = found[1]
    options["--signal"] = f"B:{signal}{found[2] or '@60'}"
    cpus = ["--cpus-per-task", given["--cpus-per-task"]] if "--cpus-per-task" in given else []
    command = " ".join(map(_in_bash, ["ddparity", "run", *job.arguments]))
    step = " ".join(map(_in_bash, ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none", *cpus]))
    directives = "\n".join(
        f"#SBATCH {name}{'=' if value else ''}{_in_sbatch(value)}" for name, value in options.items()
    )
    return _SCRIPT.format(directives=directives, signal=signal, step=step, command=command)


def _in_sbatch(value: str) -> str:
    """Quote a value for a line of #SBATCH: a space would end it, and # would begin a comment.

    In such a line a backslash escapes the next character, also between quotes.
    """
    if re.fullmatch(r"[\w@%+=:,./-]*", value, re.ASCII):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _in_bash(word: str) -> str:
    """Quote a word for bash, on one line."""
    if word.isprintable():
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    written = "".join(one if one.isprintable() else _escaped(one) for one in plain)
    return f"$'{written}'"


def _escaped(character: str) -> str:
    raw = character.encode(errors="surrogateescape")
    return "".join(f"\\x{byte:02x}" for byte in raw)


# Slurm sends the signal to this shell alone (B:), which sends it through srun to its tasks, the launchers. A process
# without a handler for the signal, such as a data-loader worker, would end.
_SCRIPT = """\
#!/bin/bash
{directives}

preempted=
trap 'preempted=yes; kill -{signal} "$!"' {signal}

{step} \\
    {command} &
step=$!

# A signal ends `wait` before the step has ended. bash remembers the code of a step that has.
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
done
wait "$step"
code=$?

# The ranks have saved their checkpoint and stopped: queue the job again, to continue later.
if [ -n "$preempted" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


# Kubernetes.


def manifest(job: Submission) -> str:
    """Return the TrainJob for the Trainer's runtime `torch-distributed`, as YAML.

    The Trainer sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT in each pod, and `run`
    reads them. Source: https://www.kubeflow.org/docs/components/trainer/

    Raises:
        ValueError: no image is given.
    """
    if not job.image:
        raise ValueError("--kubernetes IMAGE: give the container image that has ddparity and the script")
    # A string in JSON is the same string in YAML.
    gpus = f'\n    resourcesPerNode:\n      limits:\n        nvidia.com/gpu: "{job.gpus}"' if job.gpus else ""
    nproc = f"\n    numProcPerNode: {int(job.nproc)}" if job.nproc is not None and job.nproc.isdigit() else ""
    command = "\n".join(f"      - {json.dumps(word)}" for word in ("ddparity", "run", *job.arguments))
    return _MANIFEST.format(
        name=_name(job.script), image=json.dumps(job.image), nnodes=job.nnodes, nproc=nproc, gpus=gpus, command=command
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
    numNodes: {nnodes}{nproc}{gpus}
    command:
{command}
"""


def _name(script: str) -> str:
    """Return a name that Kubernetes accepts: letters, digits and dashes, beginning with a letter."""
    words = re.sub(r"[^a-z0-9]+", "-", Path(script).stem.lower()).strip("-")
    return (words if words[:1].isalpha() else f"train-{words}")[:50].strip("-")

"""The batch script of a Slurm job in which each machine runs one `ddparity run`, and its submission."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .submit import Submission, hand_over

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

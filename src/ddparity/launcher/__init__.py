"""Starting processes, on torch's own elastic agent."""

from .options import Launch, parse
from .run import launch, launch_forked, run_command, run_launch
from .submit import Submission, find_submission, submit_to_kubernetes, submit_to_slurm

__all__ = [
    "Launch",
    "find_submission",
    "launch",
    "launch_forked",
    "parse",
    "run_command",
    "run_launch",
    "submit",
]


def submit(job: Submission) -> int:
    """Hand a job to its scheduler, or print it with `--dry-run`; returns the exit code."""
    return submit_to_slurm(job) if job.to == "slurm" else submit_to_kubernetes(job)

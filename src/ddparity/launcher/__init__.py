"""Starting processes, on torch's own elastic agent."""

from .options import Launch, parse
from .run import launch, launch_forked, run_command, run_launch
from .submit import Submission, find_submission, submit_job

__all__ = [
    "Launch",
    "Submission",
    "find_submission",
    "launch",
    "launch_forked",
    "parse",
    "run_command",
    "run_launch",
    "submit_job",
]

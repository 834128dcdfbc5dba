"""Starting processes, on torch's own elastic agent."""

from .agent import launch, launch_forked, run_command, run_launch
from .options import Launch, parse
from .submission import Submission, find_submission

__all__ = [
    "Launch",
    "Submission",
    "find_submission",
    "launch",
    "launch_forked",
    "parse",
    "run_command",
    "run_launch",
]

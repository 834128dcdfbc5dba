"""Starting processes, on torch's own elastic agent."""

from .options import parse
from .run import launch, launch_forked, run_command, run_launch

__all__ = ["launch", "launch_forked", "parse", "run_command", "run_launch"]

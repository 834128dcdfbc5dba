"""Starting processes, on torch's own elastic agent."""

from .agent import launch, launch_forked, run_command

__all__ = ["launch", "launch_forked", "run_command"]

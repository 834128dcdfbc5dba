"""Starting processes, on torch's own elastic agent."""

from .agent import launch, run_command

__all__ = ["launch", "run_command"]

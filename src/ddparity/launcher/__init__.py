"""Start the processes of a job, watch them and end them, on torch's own elastic agent.

Read `run` first: a job's life on one machine, from its options to its exit code. `options` reads the command line;
`submit` hands a job to Slurm or Kubernetes. `rendezvous` checks the way to the other machines; `agent` starts, watches
and restarts the ranks; `exchange` carries messages between agents; `ending` ends processes; `signals` handles the
launcher's signals; `output` forwards the ranks' output; `resources` counts cores and out-of-memory kills. `worker`
runs in each rank's process. `doctor` examines a machine. `diagnosis` finds out which rank hangs or failed first, and
why.
"""

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

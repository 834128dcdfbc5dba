"""What a scheduler says about the machines of a job, where it starts one `ddparity run` on each of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .environment import first_host, port_of_job


@dataclass(frozen=True)
class NodeEngine:
    """The names of the variables that one scheduler sets on each machine; of several names, the first that is set."""

    name: str
    nnodes: tuple[str, ...]
    node_rank: str
    hosts: tuple[str, ...]
    gpus: str | None  # on each machine
    job: tuple[str, ...]  # together they name the job


# First match wins: SkyPilot may itself run on Slurm.
NODE_ENGINES = (
    NodeEngine(
        "SkyPilot",
        ("SKYPILOT_NUM_NODES",),
        "SKYPILOT_NODE_RANK",
        ("SKYPILOT_NODE_IPS",),
        "SKYPILOT_NUM_GPUS_PER_NODE",
        ("SKYPILOT_TASK_ID",),
    ),
    NodeEngine(
        "Slurm",
        ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"),
        "SLURM_NODEID",
        ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
        None,
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
)
# Slurm's numbers for a batch script and an interactive shell, which run on the first machine only.
_NO_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Nodes:
    """This machine's place among those of a job, and where they meet. `nproc`: one a GPU; None: it does not say."""

    engine: str
    nnodes: int
    node_rank: int
    address: str
    port: int
    job: str
    nproc: int | None


def find_nodes(environ: Mapping[str, str] = os.environ, nnodes: str | None = None) -> Nodes | None:
    """Read the scheduler's variables; None where none started this process, or it has one machine and says no more.

    `nnodes` is what the user asked for, and must fit.

    Raises:
        ValueError: a variable is missing or has no sensible value; this is not one process a machine; the user asks
            for another number of machines.
    """
    for engine in NODE_ENGINES:
        if engine.node_rank in environ and any(name in environ for name in engine.nnodes):
            break
    else:
        return None
    count_name = next(name for name in engine.nnodes if name in environ)
    count, rank = _integer(environ, count_name, engine), _integer(environ, engine.node_rank, engine)
    if engine.name == "Slurm" and not _in_step(environ):
        if count > 1 and nnodes != "1":
            raise ValueError(
                f"Slurm gave this job {count} machines ({count_name}), but a batch script runs on the first only: "
                f"start one launcher a machine with `srun --ntasks-per-node 1 ddparity run …`, or use this machine "
                f"alone with --nnodes 1"
            )
        return None
    if engine.name == "Slurm":
        _one_task_a_node(environ, count)
    if nnodes is not None and nnodes not in (str(count), f"{count}:{count}"):
        raise ValueError(
            f"--nnodes {nnodes}, but {engine.name} started this on {count} machine{'s' * (count > 1)} ({count_name}): "
            f"leave --nnodes out, or say with --rendezvous HOST:PORT where other machines meet"
        )
    if not 0 <= rank < count:
        raise ValueError(
            f"{engine.node_rank}={rank} and {count_name}={count} contradict each other: the number of a machine is at "
            f"least 0 and below their count. {engine.name} sets both; was one set by hand?"
        )
    hosts_name = next((name for name in engine.hosts if environ.get(name, "").strip()), None)
    if hosts_name is None:
        raise ValueError(
            f"{engine.name} started this on {count} machines, but {engine.hosts[0]} is not set: say where they meet "
            f"with --rendezvous HOST:PORT"
        )
    hosts = environ[hosts_name]
    address = first_host(hosts) if engine.name == "Slurm" else hosts.split()[0]
    job = ".".join(environ[name] for name in engine.job if name in environ)
    gpus = _integer(environ, engine.gpus, engine) if engine.gpus is not None and engine.gpus in environ else 0
    return Nodes(engine.name, count, rank, address, port_of_job(job), job or engine.name, gpus or None)


def _in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task, and not as an interactive shell."""
    step = environ.get("SLURM_STEP_ID", "")
    interactive = environ.get("SLURM_JOB_NAME") in ("bash", "sh", "zsh", "interactive")
    shell = interactive and environ.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    return step.isdigit() and int(step) < _NO_STEP and not shell


def _one_task_a_node(environ: Mapping[str, str], nodes: int) -> None:
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")
    if tasks is not None and tasks != str(nodes):
        raise ValueError(
            f"Slurm started {tasks} tasks on {nodes} machine{'s' * (nodes > 1)}, and each of them is this launcher: "
            f"start one a machine with `srun --ntasks-per-node 1 ddparity run --nproc N SCRIPT`, or the ranks "
            f"themselves with `srun python SCRIPT`"
        )


def _integer(environ: Mapping[str, str], name: str, engine: NodeEngine) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name}={environ[name]!r} is not an integer ({engine.name} started this process)") from None

"""Read the variables with which a launcher or a scheduler describes a job: this process's rank, or this machine's node.

Each launcher and each scheduler has one table of variable names below.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """The names of the variables that one launcher sets on each rank. None: the launcher does not give that value."""

    name: str
    rank: str
    world_size: str
    local_rank: str | None
    local_world_size: str | None
    node_rank: str | None


TORCHRUN = Engine("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
# torchrun inside a Ray worker sets GROUP_RANK as well.
RAY_TRAIN = Engine("Ray Train", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
# A PyTorchJob sets no LOCAL_RANK: a pod is a node with one process.
PYTORCH_JOB = Engine("PyTorchJob", "RANK", "WORLD_SIZE", None, None, None)
OPEN_MPI = Engine(
    "Open MPI",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    None,  # OMPI_COMM_WORLD_NODE_RANK is the rank within the node, over all jobs
)
SLURM = Engine("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", None, "SLURM_NODEID")
MPICH = Engine("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", None)  # and Intel MPI


@dataclass(frozen=True)
class NodeEngine:
    """The names of the variables that one scheduler sets on each node. Of several names, the first that is set counts.

    None: the scheduler does not give that value.
    """

    name: str
    nnodes: tuple[str, ...]
    node_rank: str
    hosts: tuple[str, ...]
    gpus: str | None  # on each node
    job: tuple[str, ...]  # together they identify the job


SKYPILOT_NODE = NodeEngine(
    "SkyPilot",
    ("SKYPILOT_NUM_NODES",),
    "SKYPILOT_NODE_RANK",
    ("SKYPILOT_NODE_IPS",),
    "SKYPILOT_NUM_GPUS_PER_NODE",
    ("SKYPILOT_TASK_ID",),
)
SLURM_NODE = NodeEngine(
    "Slurm",
    ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"),
    "SLURM_NODEID",
    ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
    None,
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
# Slurm's step numbers for a batch script and an interactive shell, which run on the first node only.
_NO_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Placement:
    """This process's rank in a launched job. None: the launcher does not give it; ranks find it out together."""

    engine: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    node_rank: int | None
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class NodePlacement:
    """This machine's node in a scheduled job, and the address where the nodes meet.

    `nproc`: processes to start here, one for each GPU. None: the scheduler does not give it.
    """

    engine: str
    nnodes: int
    node_rank: int
    address: str
    port: int
    job: str
    nproc: int | None


def find_placement(environ: Mapping[str, str] = os.environ) -> Placement | None:
    """Return the rank that a launcher's variables give this process. None: no launcher started it.

    Raises:
        ValueError: a variable has no valid value, or is not set although the launcher sets the others.
    """
    engine = detect_engine(environ)
    if engine is None:
        return None
    rank = _integer(environ, engine.rank, engine)
    size_name = engine.world_size
    if engine is SLURM and "SLURM_STEP_NUM_TASKS" in environ:  # SLURM_NTASKS may still be the whole job's
        size_name = "SLURM_STEP_NUM_TASKS"
    world_size = _integer(environ, size_name, engine)
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"{engine.rank}={rank} and {size_name}={world_size} contradict each other: a rank is at least 0 and below "
            f"the world size. {engine.name} sets both variables: do not set one of them by hand"
        )
    local_rank = _integer(environ, engine.local_rank, engine) if engine.local_rank else 0
    local_world_size = _optional(environ, engine.local_world_size, engine)
    node_rank = _optional(environ, engine.node_rank, engine)
    if node_rank is not None and node_rank < 0:
        raise ValueError(f"{engine.node_rank}={node_rank} is not the number of a node: set a number of at least 0")
    if engine is PYTORCH_JOB:
        local_world_size, node_rank = 1, rank
    elif engine is SLURM:
        local_world_size = _slurm_tasks_on_node(environ, node_rank, world_size)
    processes_here = world_size if local_world_size is None else local_world_size
    if not 0 <= local_rank < processes_here <= world_size:
        raise ValueError(
            f"{engine.local_rank}={local_rank} does not fit {processes_here} processes on this node, of "
            f"{size_name}={world_size}. {engine.name} sets {engine.local_rank} and "
            f"{engine.local_world_size or 'the number of processes'}: do not set one of them by hand"
        )
    address, port = _master(environ, engine, world_size, local_world_size)
    return Placement(engine.name, rank, world_size, local_rank, local_world_size, node_rank, address, port)


def detect_engine(environ: Mapping[str, str] = os.environ) -> Engine | None:
    """Return the launcher that started this process as a rank; None where no launcher did.

    The order matters: torchrun inside a Slurm or MPI job is still torchrun.

    Raises:
        ValueError: only one of RANK and WORLD_SIZE is set.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        if "LOCAL_RANK" not in environ:
            return PYTORCH_JOB
        of_ray = "RAY_JOB_ID" in environ and "NODE_RANK" in environ and "GROUP_RANK" not in environ
        return RAY_TRAIN if of_ray else TORCHRUN
    if OPEN_MPI.rank in environ:
        return OPEN_MPI
    if SLURM.rank in environ and not _is_interactive_shell(environ, "SLURM_STEP_NUM_TASKS"):
        return SLURM
    if MPICH.rank in environ and not _is_interactive_shell(environ, MPICH.world_size):  # after Slurm: --mpi=pmi2
        return MPICH
    for present, absent in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if present in environ:
            raise ValueError(
                f"{present}={environ[present]} is set but {absent} is not. torchrun and PyTorchJob set both: "
                f"set {absent} too, or unset {present} to run as a single process"
            )
    return None


def find_node_placement(environ: Mapping[str, str] = os.environ, nnodes: str | None = None) -> NodePlacement | None:
    """Return the node that a scheduler's variables give this machine.

    None: no scheduler started this process, or it runs on one node only and its variables say no more.

    Args:
        environ: the variables.
        nnodes: the user's `--nnodes`, which must agree with the scheduler; None where the user gave none.

    Raises:
        ValueError: a variable is not set or has no valid value; the scheduler started more than one process on a
            node; or the user asks for another number of nodes.
    """
    for engine in (SKYPILOT_NODE, SLURM_NODE):  # SkyPilot may itself run on Slurm
        if engine.node_rank in environ and any(name in environ for name in engine.nnodes):
            break
    else:
        return None
    count_name = next(name for name in engine.nnodes if name in environ)
    count, rank = _integer(environ, count_name, engine), _integer(environ, engine.node_rank, engine)
    if engine is SLURM_NODE and not _is_slurm_task(environ):
        if count > 1 and nnodes != "1":
            raise ValueError(
                f"Slurm gave this job {count} nodes ({count_name}), but a batch script runs on the first only: "
                f"start one launcher on each node with `srun --ntasks-per-node 1 ddparity run …`, or use this node "
                f"alone with --nnodes 1"
            )
        return None
    if engine is SLURM_NODE:
        _check_one_task_per_node(environ, count)
    if nnodes is not None and nnodes not in (str(count), f"{count}:{count}"):
        raise ValueError(
            f"--nnodes {nnodes}, but {engine.name} started this on {count} node{'s' * (count > 1)} ({count_name}): "
            f"leave --nnodes out, or give the address where other nodes meet with --rendezvous HOST:PORT"
        )
    if not 0 <= rank < count:
        raise ValueError(
            f"{engine.node_rank}={rank} and {count_name}={count} contradict each other: the number of a node is at "
            f"least 0 and below the number of nodes. {engine.name} sets both variables: do not set one of them by hand"
        )
    hosts_name = next((name for name in engine.hosts if environ.get(name, "").strip()), None)
    if hosts_name is None:
        raise ValueError(
            f"{engine.name} started this on {count} nodes, but {engine.hosts[0]} is not set: give the address where "
            f"the nodes meet with --rendezvous HOST:PORT"
        )
    hosts = environ[hosts_name]
    address = first_host(hosts) if engine is SLURM_NODE else hosts.split()[0]
    job = ".".join(environ[name] for name in engine.job if name in environ)
    gpus = _integer(environ, engine.gpus, engine) if engine.gpus is not None and engine.gpus in environ else 0
    return NodePlacement(engine.name, count, rank, address, port_of_job(job), job or engine.name, gpus or None)


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: `first_host("gpu[003-005,9],login")` is "gpu003"."""
    first = re.split(r",(?![^\[]*\])", nodelist.strip())[0]
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
    if not host or "[" in host or "]" in host:
        raise ValueError(f"cannot read the Slurm node list {nodelist!r}: set MASTER_ADDR to the host of rank 0")
    return host


def port_of_job(job: object) -> int:
    """Return a port below the ephemeral range: the same on all ranks of a job, rarely the same for two jobs."""
    return 12_000 + zlib.crc32(str(job).encode()) % 20_000


def _master(
    environ: Mapping[str, str], engine: Engine, world_size: int, local_world_size: int | None
) -> tuple[str, int]:
    """Return the address and port of rank 0. MASTER_ADDR and MASTER_PORT win over the launcher's other variables."""
    address = environ.get("MASTER_ADDR") or None
    port = _optional(environ, "MASTER_PORT", engine)
    if engine is SLURM:
        nodes = next((environ[name] for name in SLURM_NODE.hosts if environ.get(name)), None)
        address = address or (first_host(nodes) if nodes else None)
        if port is None:
            port = port_of_job(f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}")
    elif engine in (OPEN_MPI, MPICH) and local_world_size == world_size:  # all ranks run on this machine
        address = address or "127.0.0.1"
        if port is None:
            port = port_of_job(environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or os.getppid())
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if value is None]
    if missing:
        raise ValueError(
            f"{engine.name} started {world_size} processes, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: export the address and a free port of the machine of "
            f"rank 0 to every process (Open MPI: mpirun -x MASTER_ADDR -x MASTER_PORT; MPICH: mpiexec "
            f"-genvlist MASTER_ADDR,MASTER_PORT)"
        )
    assert address is not None and port is not None
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT={port} is not a port: set a number from 1 to 65535")
    return address, port


def _slurm_tasks_on_node(environ: Mapping[str, str], node_rank: int | None, world_size: int) -> int | None:
    """Return this node's number of tasks, which Slurm lists as "2(x3),1". None: the list is not that of this step."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if tasks is None or node_rank is None:
        return None
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"cannot read SLURM_TASKS_PER_NODE={tasks!r}: expected a list like '2(x3),1'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node_rank] if node_rank < len(counts) and sum(counts) == world_size else None


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Return True where srun started this process as a task, and not as an interactive shell."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _NO_STEP and not _is_interactive_shell(environ, "SLURM_STEP_NUM_TASKS")


def _is_interactive_shell(environ: Mapping[str, str], tasks_name: str) -> bool:
    """Return True in a shell that `srun --pty bash` started: it has the variables of a task, but no other task starts.

    An `srun` inside that shell inherits the job's name (Lightning#20776), but its step has several tasks.
    """
    named = environ.get("SLURM_JOB_NAME") in ("bash", "sh", "zsh", "interactive")
    return named and environ.get(tasks_name, "1") == "1"


def _check_one_task_per_node(environ: Mapping[str, str], nodes: int) -> None:
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")
    if tasks is not None and tasks != str(nodes):
        raise ValueError(
            f"Slurm started {tasks} tasks on {nodes} node{'s' * (nodes > 1)}, and each task is this launcher: start "
            f"one launcher on each node with `srun --ntasks-per-node 1 ddparity run --nproc N SCRIPT`, or start the "
            f"ranks themselves with `srun python SCRIPT`"
        )


def _integer(environ: Mapping[str, str], name: str, engine: Engine | NodeEngine) -> int:
    if name not in environ:
        raise ValueError(
            f"{name} is not set, though {engine.name} started this process and sets it: pass all of its variables on"
        )
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(
            f"{name}={environ[name]!r} is not an integer: {engine.name} started this process, so do not set it by hand"
        ) from None


def _optional(environ: Mapping[str, str], name: str | None, engine: Engine) -> int | None:
    return _integer(environ, name, engine) if name is not None and name in environ else None

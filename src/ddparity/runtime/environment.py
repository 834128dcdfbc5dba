"""What a launcher says about this process: one table of variables an engine, read once."""

from __future__ import annotations

import functools
import os
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Engine:
    """The names of the variables that one launcher sets. None: it does not say."""

    name: str
    rank: str
    world_size: str
    local_rank: str | None
    local_world_size: str | None
    node_rank: str | None


# First match wins: torchrun inside a Slurm or MPI job is still torchrun.
ENGINES = (
    Engine("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    # Ray's workers; a torchrun that is started in one of them sets GROUP_RANK.
    Engine("Ray Train", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    # A PyTorchJob sets no LOCAL_RANK: a pod is a node with one process.
    Engine("PyTorchJob", "RANK", "WORLD_SIZE", None, None, None),
    Engine(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        None,  # OMPI_COMM_WORLD_NODE_RANK is the rank within the node, over all jobs
    ),
    Engine("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", None, "SLURM_NODEID"),
    # Last: `srun --mpi=pmi2` sets PMI_RANK, too.
    Engine("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", None),  # and Intel MPI
)
_MPI = ("Open MPI", "MPICH")


@dataclass(frozen=True)
class Placement:
    """This process's place in a launched job. None: the launcher does not say, the ranks find out together."""

    engine: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    node_rank: int | None
    master_addr: str
    master_port: int


def find_placement(environ: Mapping[str, str] = os.environ) -> Placement | None:
    """Read the launcher's variables; None where no launcher started this process.

    Raises:
        ValueError: a variable is missing beside the others or has no sensible value.
    """
    engine = detect_engine(environ)
    if engine is None:
        return None
    rank = _integer(environ, engine.rank, engine)
    size_name = engine.world_size
    if engine.name == "Slurm" and "SLURM_STEP_NUM_TASKS" in environ:  # SLURM_NTASKS may still be the whole job's
        size_name = "SLURM_STEP_NUM_TASKS"
    world_size = _integer(environ, size_name, engine)
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"{engine.rank}={rank} and {size_name}={world_size} contradict each other: "
            f"a rank is at least 0 and below the world size. {engine.name} sets both; was one set by hand?"
        )
    local_rank = _integer(environ, engine.local_rank, engine) if engine.local_rank else 0
    local_world_size = _optional(environ, engine.local_world_size, engine)
    node_rank = _optional(environ, engine.node_rank, engine)
    if node_rank is not None and node_rank < 0:
        raise ValueError(f"{engine.node_rank}={node_rank} is not the number of a node: at least 0")
    if engine.name == "PyTorchJob":
        local_world_size, node_rank = 1, rank
    elif engine.name == "Slurm":
        local_world_size = _slurm_tasks_on_node(environ, node_rank, world_size)
    here = world_size if local_world_size is None else local_world_size
    if not 0 <= local_rank < here <= world_size:
        raise ValueError(
            f"{engine.local_rank}={local_rank} does not fit {here} processes on this node, of "
            f"{size_name}={world_size}. {engine.name} sets {engine.local_rank} and "
            f"{engine.local_world_size or 'the number of processes'}; was one set by hand?"
        )
    address, port = _master(environ, engine, world_size, local_world_size)
    return Placement(engine.name, rank, world_size, local_rank, local_world_size, node_rank, address, port)


def detect_engine(environ: Mapping[str, str] = os.environ) -> Engine | None:
    """The launcher that started this process as a rank; None where there is none.

    Raises:
        ValueError: one of RANK and WORLD_SIZE is set without the other.
    """
    torchrun, ray_train, pytorch_job, open_mpi, slurm, mpich = ENGINES
    if "RANK" in environ and "WORLD_SIZE" in environ:
        if "LOCAL_RANK" not in environ:
            return pytorch_job
        of_ray = "RAY_JOB_ID" in environ and ray_train.node_rank in environ and "GROUP_RANK" not in environ
        return ray_train if of_ray else torchrun
    if open_mpi.rank in environ:
        return open_mpi
    # `srun --pty bash` puts its variables into an interactive shell, where no other task will ever come. An `srun` from
    # there inherits the job's name (Lightning#20776), but its step has several tasks.
    interactive = environ.get("SLURM_JOB_NAME") in ("bash", "sh", "zsh", "interactive")
    if slurm.rank in environ and not (interactive and environ.get("SLURM_STEP_NUM_TASKS", "1") == "1"):
        return slurm
    if mpich.rank in environ and not (interactive and environ.get(mpich.world_size, "1") == "1"):
        return mpich
    for present, absent in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if present in environ:
            raise ValueError(
                f"{present}={environ[present]} is set but {absent} is not. torchrun and PyTorchJob set both: "
                f"set {absent} too, or unset {present} to run as a single process."
            )
    return None


def _integer(environ: Mapping[str, str], name: str, engine: Engine | NodeEngine) -> int:
    if name not in environ:
        raise ValueError(f"{name} is not set, though {engine.name} started this process and sets it")
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name}={environ[name]!r} is not an integer ({engine.name} started this process)") from None


def _optional(environ: Mapping[str, str], name: str | None, engine: Engine) -> int | None:
    return _integer(environ, name, engine) if name is not None and name in environ else None


def _master(
    environ: Mapping[str, str], engine: Engine, world_size: int, local_world_size: int | None
) -> tuple[str, int]:
    """The address and port of rank 0. MASTER_ADDR and MASTER_PORT win over what the engine implies."""
    address = environ.get("MASTER_ADDR") or None
    port = _optional(environ, "MASTER_PORT", engine)
    if engine.name == "Slurm":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
        address = address or (first_host(nodes) if nodes else None)
        if port is None:
            port = port_of_job(f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}")
    elif engine.name in _MPI and local_world_size == world_size:  # all on this machine
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
        raise ValueError(f"MASTER_PORT={port} is not a port: 1 to 65535")
    return address, port


def port_of_job(job: object) -> int:
    """A port that all ranks of a job derive alike and two jobs on a machine rarely share, below the ephemeral range."""
    return 12_000 + zlib.crc32(str(job).encode()) % 20_000


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `first_host("gpu[003-005,9],login")` is "gpu003"."""
    first = re.split(r",(?![^\[]*\])", nodelist.strip())[0]
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
    if not host or "[" in host or "]" in host:
        raise ValueError(f"cannot read the Slurm node list {nodelist!r}: set MASTER_ADDR to the host of rank 0")
    return host


def _slurm_tasks_on_node(environ: Mapping[str, str], node_rank: int | None, world_size: int) -> int | None:
    """Slurm gives the tasks of each node as "2(x3),1". None where these are not the tasks of this step."""
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


PROGRESS = "progress"  # there: the rank has done a step, or saved


@functools.cache
def mark_progress() -> None:
    """Tell the agent, where there is one, that this process has come further than its start: a failure is tried again.

    Once a process; a call after it costs nothing.
    """
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if record:
        with suppress(OSError):
            (Path(record).parent / PROGRESS).touch()


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

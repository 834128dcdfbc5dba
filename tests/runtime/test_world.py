from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

import ddparity as dp
from ddparity import World
from tests.ranks import free_port, kill_self, outcomes, run_ranks, torchrun_env

Env = Callable[[int], dict[str, str]]


def _joined(timeout: float | None = None) -> tuple[World, float, bool]:
    """Return the world, a sum over its ranks, and whether a group is left."""
    with dp.world(device="cpu", timeout=timeout) as world:
        one = torch.ones(1)
        if world.backend is not None:
            dist.all_reduce(one)
    return world, float(one), dist.is_initialized()


def _cpu(rank: int, local_rank: int, size: int, local_size: int, node: int, backend: str | None = "gloo") -> World:
    return World(rank, local_rank, size, local_size, node, torch.device("cpu"), backend)


def _pytorch_job(port: int) -> Env:
    return lambda rank: _strings(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def _open_mpi(port: int) -> Env:
    """Return what `mpirun` on one node sets; it needs no address."""
    return lambda rank: _strings(
        OMPI_COMM_WORLD_RANK=rank,
        OMPI_COMM_WORLD_SIZE=3,
        OMPI_COMM_WORLD_LOCAL_RANK=rank,
        OMPI_COMM_WORLD_LOCAL_SIZE=3,
        PMIX_NAMESPACE=f"prterun-{port}@1",
        MASTER_PORT=port,
    )


def _slurm(port: int) -> Env:
    """Return what `srun` sets on two nodes, with two tasks on the first and one on the second."""
    return lambda rank: _strings(
        SLURM_JOB_ID=port,
        SLURM_STEP_ID=0,
        SLURM_JOB_NAME="train",
        SLURM_PROCID=rank,
        SLURM_NTASKS=3,
        SLURM_STEP_NUM_TASKS=3,
        SLURM_LOCALID=rank % 2,
        SLURM_NODEID=rank // 2,
        SLURM_STEP_TASKS_PER_NODE="2,1",
        SLURM_STEP_NODELIST="localhost,other",
        MASTER_PORT=port,
    )


def _strings(**variables: object) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items()}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (lambda port: torchrun_env(4, port, nodes=2), [_cpu(r, r % 2, 4, 2, r // 2) for r in range(4)]),
        (_pytorch_job, [_cpu(r, 0, 2, 1, r) for r in range(2)]),
        (_open_mpi, [_cpu(r, r, 3, 3, 0) for r in range(3)]),
        (_slurm, [_cpu(0, 0, 3, 2, 0), _cpu(1, 1, 3, 2, 0), _cpu(2, 0, 3, 1, 1)]),
    ],
    ids=["torchrun", "PyTorchJob", "Open MPI", "Slurm"],
)
def test_launchers(env: Callable[[int], Env], expected: list[World]) -> None:
    size = len(expected)
    ended = outcomes(_joined, size, env=env(free_port()), in_world=False)
    assert [outcome.value for outcome in ended] == [(world, size, False) for world in expected], ended


def test_the_agents_store_is_used() -> None:
    """Under torchrun rank 0 does not listen: only the agent's store is at the address that the variables give."""
    assert run_ranks(_joined_again, 2) == [_cpu(0, 0, 2, 2, 0), _cpu(1, 1, 2, 2, 0)]


def _joined_again() -> World:
    with dp.world() as inner:
        return inner


def test_without_a_launcher_there_is_no_group() -> None:
    with dp.world(device="cpu") as world:
        assert world == _cpu(0, 0, 1, 1, 0, backend=None)
        assert not dist.is_initialized()


def test_a_launched_world_of_one_has_a_group() -> None:
    assert outcomes(_joined, 1, in_world=False)[0].value == (_cpu(0, 0, 1, 1, 0), 1.0, False)


def _repeated(times: int) -> list[float]:
    return [_joined(20)[1] for _ in range(times)]


@pytest.mark.parametrize("agent", [True, False], ids=["store of the agent", "store of rank 0"])
def test_worlds_one_after_the_other(agent: bool) -> None:
    env = None if agent else torchrun_env(3, free_port())
    ended = outcomes(_repeated, 3, 4, env=env, in_world=False)
    assert [outcome.value for outcome in ended] == [[3.0] * 4] * 3, ended


def _nested() -> tuple[World, World, bool]:
    with dp.world(device="cpu") as outer:
        if outer.rank == 1:  # on one rank only: the inner world needs no other rank
            with dp.world() as inner:
                pass
        else:
            inner = outer
        alive = dist.is_initialized()
        dist.barrier()
    return outer, inner, alive


def test_a_nested_world_is_the_outer_one() -> None:
    for outcome in outcomes(_nested, 3, env=torchrun_env(3, free_port()), in_world=False):
        assert outcome.error is None, outcome
        outer, inner, alive = outcome.value
        assert inner == outer
        assert alive


def _foreign(backend: str | None) -> tuple[World, bool, float]:
    dist.init_process_group(backend)
    with dp.world(device="cpu") as world, dp.world() as inner:
        assert inner == world
    alive = dist.is_initialized()
    one = torch.ones(1)
    dist.all_reduce(one)
    dist.destroy_process_group()
    return world, alive, float(one)


@pytest.mark.parametrize("backend", ["gloo", None])
def test_a_group_of_the_users_is_used_and_not_changed(backend: str | None) -> None:
    ended = outcomes(_foreign, 2, backend, env=torchrun_env(2, free_port(), nodes=2), in_world=False)
    for rank, outcome in enumerate(ended):
        assert outcome.error is None, outcome
        world, alive, total = outcome.value
        assert (world.rank, world.node_rank, world.world_size, alive, total) == (rank, rank, 2, True, 2.0)
        assert "gloo" in world.backend


def _disagrees() -> None:
    with dp.world(backend="nccl"):
        pass


def test_another_backend_than_the_groups_is_refused() -> None:
    for outcome in outcomes(_disagrees, 2):
        assert outcome.error == (
            "ValueError: world(backend='nccl'), but the process group that exists uses 'gloo': leave backend= out, or "
            "make the group with it"
        )


def _raises(where: int) -> str:
    try:
        with dp.world(device="cpu") as world:
            dist.barrier()  # all have joined
            if world.rank == where or where < 0:
                raise OSError("disk full")
            one = torch.ones(1)
            dist.all_reduce(one)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__} {dist.is_initialized()}"
    return "none"


@pytest.mark.parametrize("agent", [True, False], ids=["store of the agent", "store of rank 0"])
@pytest.mark.parametrize("where", [-1, 0, 2])
def test_an_exception_leaves_no_group_and_fails_the_others(where: int, agent: bool) -> None:
    """The other ranks are inside Gloo's all-reduce."""
    env = None if agent else torchrun_env(3, free_port())
    for rank, outcome in enumerate(outcomes(_raises, 3, where, env=env, in_world=False)):
        assert outcome.value == ("OSError False" if rank == where or where < 0 else "RuntimeError False")
        assert outcome.seconds < 10


def _ends_early(how: str, rank: int) -> None:
    with dp.world(device="cpu") as world:
        dist.barrier()  # all have joined
        if world.rank == rank:
            if how == "killed":
                kill_self()
            sys.exit(0)
        dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("how", ["killed", "exit"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_early_fails_the_others(how: str, rank: int) -> None:
    """Failures 4. The rank may be the one whose process holds the store."""
    ended = outcomes(_ends_early, 3, how, rank, env=torchrun_env(3, free_port()), in_world=False)
    for other, outcome in enumerate(ended):
        assert outcome.seconds < 10
        if other != rank:
            assert (outcome.error or "").startswith("RuntimeError"), outcome
        elif how == "killed":
            assert outcome.exitcode == -9


def _users_own_end() -> bool:
    with dp.world(device="cpu"):
        dist.destroy_process_group()
    return dist.is_initialized()


def test_a_group_that_the_user_has_destroyed_is_no_error() -> None:
    assert [outcome.value for outcome in outcomes(_users_own_end, 2, in_world=False)] == [False, False]


@pytest.fixture
def occupied() -> Iterator[int]:
    """Yield a port at which a program accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


TIMEOUT_S = 1.5


def _not_joined() -> tuple[str, float]:
    """Return the error's text and its time in this process: on a busy machine the start may take as long."""
    start = time.monotonic()
    with pytest.raises(dp.RendezvousError) as caught:
        _joined(TIMEOUT_S)
    return str(caught.value), time.monotonic() - start


def _errors(ranks: int, env: Env, place: str) -> list[str]:
    """Return the error of each rank that runs; it comes within the time-out and 2 s."""
    errors = []
    for outcome in outcomes(_not_joined, ranks, env=env, in_world=False):
        assert outcome.error is None, outcome
        error, seconds = outcome.value
        assert seconds < TIMEOUT_S + 2
        assert re.match(rf"rank \d of \d \(.+\) did not complete the rendezvous at {re.escape(place)}", error)
        assert "from torchrun's variables" in error and "GLOO_SOCKET_IFNAME" in error
        errors.append(error)
    return errors


def test_no_process_listens() -> None:
    port = free_port()
    errors = _errors(2, lambda r: torchrun_env(3, port)(r + 1), f"127.0.0.1:{port} from 127.0.0.1 on interface lo")
    assert all("Connection refused" in error for error in errors)


@pytest.mark.parametrize("agent", [True, False], ids=["store of the agent", "store of rank 0"])
def test_a_rank_that_does_not_join_is_named_on_every_rank(agent: bool) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False) if agent else None
    port = store.port if store else free_port()
    env = torchrun_env(3, port, agent_store=agent)
    errors = _errors(2, env, f"127.0.0.1:{port} from 127.0.0.1 on interface lo")
    assert all("rank 2 did not join" in error for error in errors)


def test_a_port_that_another_program_holds(occupied: int) -> None:
    errors = _errors(2, torchrun_env(2, occupied), f"127.0.0.1:{occupied} from 127.0.0.1 on interface lo")
    assert f"port {occupied} is taken on this machine by process {os.getpid()}" in errors[0]
    assert "another program holds that port" in errors[1]


def test_a_host_without_an_address() -> None:
    env = torchrun_env(2, free_port())
    errors = _errors(2, lambda rank: env(rank) | {"MASTER_ADDR": "no-such-host.invalid"}, "no-such-host.invalid:")
    assert all("no route to no-such-host.invalid" in error for error in errors)
    assert "rank 1 did not join" in errors[0]


def test_the_error_of_a_batch_script_says_to_use_srun() -> None:
    [outcome] = outcomes(_joined, 1, TIMEOUT_S, env=_slurm(free_port()), in_world=False)
    assert "start the ranks with srun" in (outcome.error or "")


def _with_stderr_in(path: str) -> None:
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 2)
    _joined(TIMEOUT_S)


@pytest.mark.parametrize("what", ["nobody", "occupied", "no host"])
def test_torch_prints_no_stack_frames(what: str, occupied: int, tmp_path: Path) -> None:
    """torch's C++ does not write through sys.stderr. Rank 0 runs alone in a world of two, then rank 1 in another."""
    for rank in (0, 1):
        env = torchrun_env(2, occupied if what == "occupied" else free_port())(rank)
        if what == "no host":
            env["MASTER_ADDR"] = "no-such-host.invalid"
        [outcome] = outcomes(_with_stderr_in, 1, str(tmp_path / "stderr"), env=lambda _, env=env: env, in_world=False)
        assert (outcome.error or "").startswith(f"RendezvousError: rank {rank} of 2")
    assert (tmp_path / "stderr").read_text() == ""


def test_the_last_line_of_a_script_is_the_error() -> None:
    script = 'import ddparity as dp\nwith dp.world(device="cpu", timeout=0.5):\n    pass'
    env = os.environ | torchrun_env(2, free_port())(1)
    ended = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("ddparity.errors.RendezvousError: rank 1 of 2")


def _scripts(script: str) -> list[tuple[int, str, str]]:
    """Run a script as two ranks, and return the exit code and the output of each."""
    env_of = torchrun_env(2, free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"import ddparity as dp\n{script}"],
            env=os.environ | env_of(rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [one.communicate(timeout=100) for one in started]
        return [(one.returncode, *output) for one, output in zip(started, outputs, strict=True)]
    finally:
        for one in started:
            one.kill()
            one.wait()


def test_a_script_without_functions_joins_and_leaves() -> None:
    script = 'world = dp.join(device="cpu")\nassert dp.world().__enter__() == world\nprint(dp.reduce(world.rank + 1))'
    assert _scripts(script) == [(0, "3\n", "")] * 2


JOINED_AND_FAILS = """
world = dp.join(device="cpu")
if world.rank == 1:
    raise OSError("lost")
try:
    dp.reduce(1)  # a collective
except RuntimeError as error:
    print("reduce failed")
with dp.first():  # an agreement through the store
    pass
"""


def test_ranks_that_wait_are_told_that_a_rank_has_failed_after_join() -> None:
    """Without a launcher that ends them, and long before the group's time-out."""
    waiting, failed = _scripts(JOINED_AND_FAILS)
    assert failed[0] == 1 and "OSError: lost" in failed[2].splitlines()[-1]
    assert waiting[:2] == (1, "reduce failed\n")
    assert "RankFailure: rank 1 " in waiting[2].splitlines()[-1]


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: dp.world().rank, AttributeError, r"world\(\) has no 'rank' before it is entered: write `with .*join"),
        (lambda: 1 if dp.first() else 0, TypeError, r"first\(\) has no truth value before it is entered: write `with"),
        (
            lambda: dp.world(test_a_world_that_was_never_entered_is_told),
            TypeError,
            r"write `@ddparity.world\(\)`, with",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:ddparity")
def test_a_context_manager_without_with_is_named(use: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        use()


def test_a_world_that_was_never_entered_is_told() -> None:
    with pytest.warns(RuntimeWarning, match=r"ddparity.world\(\) does nothing before it is entered") as told:
        dp.world()
    assert told[0].filename == __file__

    @dp.world(device="cpu")
    def twice(depth: int) -> int:
        return dp.world().__enter__().rank + (twice(depth - 1) if depth else 5)

    assert (twice(2), twice(0)) == (5, 5)


def _replicates_alone() -> None:
    dp.replicate(torch.nn.Linear(2, 1))


def test_a_rank_that_has_not_joined_may_not_train_alone() -> None:
    for rank, outcome in enumerate(outcomes(_replicates_alone, 2, in_world=False)):
        assert outcome.error is not None
        assert outcome.error.startswith(f"RuntimeError: replicate() was called before this process, rank {rank} of 2")


def _on_two_gpus(timeout: float) -> None:
    """Join as one of four processes of a machine that shows two GPUs."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_properties = lambda device: device
    with dp.world(timeout=timeout):
        pass


def test_more_local_ranks_than_gpus() -> None:
    ended = outcomes(_on_two_gpus, 4, 30, in_world=False)
    for rank, outcome in enumerate(ended):
        error = outcome.error or ""
        own = min(max(rank, 2), 3)  # ranks 0 and 1 get the error of the first rank that has none
        assert error.startswith("ValueError" if rank >= 2 else "RankFailure: rank 2"), error
        assert f"local rank {own} of 4 has no GPU: this machine shows 2" in error
        assert "--nproc 2" in error and 'world(device="cpu")' in error
        assert outcome.seconds < 10


def _on_one_gpu(backend: str | None, device: str | None) -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_properties = lambda device: device  # without a UUID: the index is used instead
    with dp.world(backend, device, timeout=30) as w:
        assert w.device == torch.device("cuda", 0)


def test_two_ranks_that_see_the_same_single_gpu() -> None:
    """A scheduler may show each process its own GPU as index 0; the list of members shows if two share one."""
    for outcome in outcomes(_on_one_gpu, 2, None, None, in_world=False):
        assert "RankFailure: ranks 0 and 1 both claim GPU cuda:0 of" in (outcome.error or "")
        assert outcome.seconds < 10


def test_over_gloo_ranks_may_share_a_gpu_that_is_given_by_index() -> None:
    assert [outcome.error for outcome in outcomes(_on_one_gpu, 2, "gloo", "cuda:0", in_world=False)] == [None, None]
    for outcome in outcomes(_on_one_gpu, 2, "gloo", "cuda", in_world=False):
        assert "RankFailure: ranks 0 and 1 both claim GPU cuda:0 of" in (outcome.error or "")


def _wrong_device_on(rank: int) -> None:
    device = "no-such-device" if int(os.environ["RANK"]) == rank else "cpu"
    with dp.world(device=device, timeout=30):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_device_on_one_rank_fails_all(rank: int) -> None:
    for other, outcome in enumerate(outcomes(_wrong_device_on, 2, rank, in_world=False)):
        assert (outcome.error or "").startswith("RuntimeError" if other == rank else f"RankFailure: rank {rank}")
        assert "no-such-device" in (outcome.error or "")
        assert outcome.seconds < 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpus() -> None:
    found = r"this machine shows 0\. To continue, train on the CPU"
    with pytest.raises(ValueError, match=found), dp.world(device="cuda"):
        pass


@pytest.mark.parametrize("timeout", [0, -1, 0.0, float("nan"), float("inf"), timedelta(0), timedelta(seconds=-3)])
def test_a_timeout_must_be_positive(timeout: float | timedelta) -> None:
    with pytest.raises(ValueError, match=r"timeout=.*positive number of seconds"), dp.world(timeout=timeout):
        pass


@pytest.mark.parametrize("backend", ["glue", "", "cpu:glue", "undefined"])
def test_an_unknown_backend_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"backend '{backend}' is unknown: use one of gloo, nccl"), dp.world(backend):
        pass


def _with_wrong(name: str, value: object) -> None:
    with dp.world(**{name: value}):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(("name", "value"), [("timeout", 0), ("backend", "glue")])
def test_a_wrong_argument_is_refused_before_any_wait(name: str, value: object) -> None:
    """There is no store, and the other rank never joins."""
    [outcome] = outcomes(_with_wrong, 1, name, value, env=torchrun_env(2, free_port()), in_world=False)
    assert (outcome.error or "").startswith("ValueError")
    assert outcome.seconds < 5


@pytest.mark.parametrize("backend", ["GLOO", "cpu:gloo", "gloo"])
def test_torchs_own_names_of_backends(backend: str) -> None:
    ended = outcomes(_with_backend, 2, backend, in_world=False)
    assert [outcome.value for outcome in ended] == [(2.0, backend.lower())] * 2, ended


def _with_backend(backend: str) -> tuple[float, str | None]:
    with dp.world(backend, device="cpu", timeout=timedelta(seconds=30)) as world:
        one = torch.ones(1)
        dist.all_reduce(one)
    return float(one), world.backend


def _two_hosts(interface: str | None) -> tuple[str | None, float]:
    """Join as ranks on two machines with different names, whose names have the loopback's address."""
    name = f"host{os.environ['RANK']}"
    socket.gethostname = lambda: name
    socket.gethostbyname = lambda host: "127.0.1.1"
    del os.environ["GLOO_SOCKET_IFNAME"]
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    with dp.world(device="cpu", timeout=20) as world:
        assert world.node_rank == world.rank
        one = torch.ones(1)
        dist.all_reduce(one)
    return os.environ.get("GLOO_SOCKET_IFNAME"), float(one)


@pytest.mark.parametrize("own", [None, "lo"])
def test_machines_do_not_meet_at_the_loopback(own: str | None) -> None:
    """Failures 13. The user's interface wins."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))  # nothing is sent
        except OSError:
            pytest.skip("this machine has the loopback only")
        address = probe.getsockname()[0]
    names = [name for name, entries in psutil.net_if_addrs().items() if address in [entry.address for entry in entries]]
    env = torchrun_env(2, free_port(), nodes=2)
    ended = outcomes(_two_hosts, 2, own, env=lambda rank: env(rank) | {"MASTER_ADDR": address}, in_world=False)
    assert [outcome.value for outcome in ended] == [(own or names[0], 2.0)] * 2, ended


def _policy() -> int:
    return os.sched_getscheduler(0)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux only")
def test_over_gloo_threads_are_scheduled_as_batch_work_until_the_world_ends() -> None:
    assert run_ranks(_policy, 2) == [os.SCHED_BATCH] * 2
    ended = outcomes(_policies, 1, in_world=False)[0].value
    assert ended == [os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_OTHER]


def _policies() -> list[int]:
    found = [_policy()]
    with dp.world(device="cpu"):
        found.append(_policy())
    return [*found, _policy()]

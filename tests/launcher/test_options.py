"""The options of `ddparity run`: torchrun's options and variables, ours, and the variables of schedulers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddparity.launcher import resources
from ddparity.launcher.options import Launch, parse
from ddparity.launcher.resources import cgroup_cores, cores, decide_threads, threads_per_process
from ddparity.launcher.submit import find_submission
from ddparity.runtime.environment import NodePlacement, find_node_placement

# Task 1 of `srun --nodes 3 --ntasks-per-node 1` in a larger job.
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_NUM_NODES": "8",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
    "SLURM_JOB_NODELIST": "gpu[001-008]",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n",
    "SKYPILOT_NUM_GPUS_PER_NODE": "4",
    "SKYPILOT_TASK_ID": "sky-2026-train-7",
}
KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "3",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}
BATCH = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_NODEID": "0"}


@pytest.fixture(autouse=True)
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a script t.py, and remove the variables of schedulers and launchers."""
    for name in os.environ:
        if name.startswith(("PET_", "SLURM_", "SKYPILOT_", "RANK", "WORLD_SIZE", "LOCAL_RANK")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.py").write_text("")
    return tmp_path / "t.py"


def _parse(line: str) -> Launch:
    return parse(line.split())


def test_no_option_is_needed_on_one_machine() -> None:
    launch = _parse("t.py --lr 0.1 -- --nproc 9")
    assert launch.command == ("t.py", "--lr", "0.1", "--", "--nproc", "9")
    config = launch.config
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (1, 1, 1)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.local_addr) == ("c10d", "localhost:0", "127.0.0.1")
    assert (config.max_restarts, launch.grace_s, launch.hang_timeout_s, launch.on_hang) == (0, 30, None, "end")
    assert (launch.show, launch.logs, launch.python) == (frozenset({0}), None, True)
    assert launch.alone
    # Each launch is a job of its own.
    assert config.run_id != _parse("t.py").config.run_id


def test_torch_sets_no_threads_and_prints_no_banner(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our default, torch sets OMP_NUM_THREADS=1 and prints five lines."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _parse("--nproc 4 t.py")
    assert "OMP_NUM_THREADS" not in os.environ
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("spelling", ["--nproc 3", "--nproc=3", "-n 3", "--nproc-per-node 3", "--nproc_per_node=3"])
def test_the_number_of_processes(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = _parse(f"{spelling} t.py")
    assert (launch.config.nproc_per_node, launch.nproc_given) == (3, True)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    assert _parse("t.py").config.nproc_per_node == 2
    assert _parse(f"{spelling} t.py").config.nproc_per_node == 3


def test_processes_from_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert _parse("--nproc auto t.py").config.nproc_per_node == cores()
    assert _parse("--nproc cpu t.py").config.nproc_per_node == cores()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    launch = _parse("t.py")
    assert (launch.config.nproc_per_node, launch.nproc_given) == (5, False)


@pytest.mark.parametrize(
    ("line", "command", "python"),
    [
        ("-m package.module -m x", ("-m", "package.module", "-m", "x"), True),
        ("--module package.module", ("-m", "package.module"), True),
        ("--no-python sh -c true", ("sh", "-c", "true"), False),
        ("--run-path t.py a", ("t.py", "a"), True),
    ],
)
def test_commands(line: str, command: tuple[str, ...], python: bool) -> None:
    launch = _parse(line)
    assert (launch.command, launch.python) == (command, python)


@pytest.mark.parametrize(
    ("line", "backend", "endpoint", "nodes", "rank", "conf"),
    [
        ("--rendezvous a:1 --nnodes 2", "c10d", "a:1", (2, 2), None, {}),
        ("--rendezvous [fd00::7]:1 --nnodes 1:4", "c10d", "[fd00::7]:1", (1, 4), None, {}),
        # A given number holds; torch's c10d numbers machines by their addresses.
        ("--rendezvous a:1 --nnodes 2 --node-rank 1", "static", "a:1", (2, 2), 1, {"rank": 1}),
        ("--nnodes 2 --node_rank 0 --master_addr a", "static", "a:29500", (2, 2), 0, {"rank": 0}),
        ("--nnodes 2 --node-rank 1 --master-addr a --master-port 7", "static", "a:7", (2, 2), 1, {"rank": 1}),
        # A range of machines, or restarts, need c10d; number 0 opens the store.
        ("--nnodes 2 --node-rank 1 --master-addr a --max-restarts 3", "c10d", "a:29500", (2, 2), None,
         {"is_host": "0"}),
        ("--nnodes 1:4 --node-rank 0 --master-addr a", "c10d", "a:29500", (1, 4), None, {"is_host": "1"}),
        ("--nnodes 2 --master-addr a", "c10d", "a:29500", (2, 2), None, {}),
        # The examples of torchrun's documentation.
        ("--nnodes=2 --node_rank=1 --rdzv_backend=c10d --rdzv_endpoint=a:3", "c10d", "a:3", (2, 2), None, {}),
        ("--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=a", "c10d", "a:29400", (2, 2), None, {}),
        ("--nnodes 2 --rdzv-endpoint a:3", "c10d", "a:3", (2, 2), None, {}),
        ("--nnodes 2 --rdzv-backend etcd-v2 --rdzv-endpoint a:3", "etcd-v2", "a:3", (2, 2), None, {}),
        ("--standalone", "c10d", "localhost:0", (1, 1), None, {}),
        ("--nnodes 1 --node-rank 0", "c10d", "localhost:0", (1, 1), None, {}),
        ("--master-port 7", "static", "127.0.0.1:7", (1, 1), 0, {"rank": 0}),
    ],
)  # fmt: skip
def test_rendezvous(
    line: str, backend: str, endpoint: str, nodes: tuple[int, int], rank: int | None, conf: dict[str, object]
) -> None:
    launch = _parse(f"{line} t.py")
    config = launch.config
    assert (config.rdzv_backend, config.rdzv_endpoint, launch.node_rank) == (backend, endpoint, rank)
    assert (config.min_nodes, config.max_nodes) == nodes
    times = ("timeout", "interval", "max_attempt")
    rest = {name: value for name, value in config.rdzv_configs.items() if not name.endswith(times)}
    assert rest == conf
    assert launch.alone == (endpoint == "localhost:0")


def test_the_rendezvous_timeout_holds_for_both_backends() -> None:
    config = _parse("--nnodes 2 --rendezvous a:1 --rdzv-conf timeout=20,last_call_timeout=1 t.py").config
    expected = {"timeout": 20, "join_timeout": 20, "last_call_timeout": 1}
    assert {name: int(config.rdzv_configs[name]) for name in expected} == expected


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_kubeflow(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, KUBEFLOW)
    launch = _parse("t.py")
    assert (launch.config.rdzv_backend, launch.config.rdzv_endpoint) == ("static", "job-node-0-0.job:29400")
    assert (launch.config.max_nodes, launch.config.nproc_per_node, launch.node_rank) == (2, 3, 1)
    restarts = _parse("--max-restarts 2 t.py")
    assert (restarts.config.rdzv_backend, restarts.config.rdzv_configs["is_host"]) == ("c10d", "0")
    monkeypatch.setenv("PET_NNODES", "1")
    monkeypatch.setenv("PET_NODE_RANK", "0")
    assert _parse("t.py").alone


def test_slurm_starts_one_launcher_per_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SLURM)
    launch = _parse("--nproc 2 t.py")
    assert (launch.config.max_nodes, launch.node_rank, launch.engine) == (3, 1, "Slurm")
    assert launch.config.rdzv_backend == "static"
    host, port = launch.config.rdzv_endpoint.split(":")
    assert host == "gpu003" and 12_000 <= int(port) < 32_000
    assert launch.config.run_id == "77.0"
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert _parse("t.py").config.rdzv_endpoint == launch.config.rdzv_endpoint
    # The user's rendezvous wins. Another number of machines without a rendezvous is refused.
    assert _parse("--nnodes 4 --rendezvous a:1 t.py").config.rdzv_endpoint == "a:1"
    assert _parse("--nnodes 3 t.py").config.max_nodes == 3
    with pytest.raises(ValueError, match=r"--nnodes 4, but Slurm started this on 3 nodes .SLURM_STEP_NUM_NODES"):
        _parse("--nnodes 4 t.py")


def test_skypilot(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SKYPILOT)
    launch = _parse("t.py")
    assert (launch.config.nproc_per_node, launch.config.max_nodes, launch.node_rank) == (4, 2, 1)
    assert launch.config.rdzv_endpoint.startswith("10.0.0.4:")
    assert _parse("--nproc 2 t.py").config.nproc_per_node == 2


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, None),
        (BATCH | {"SLURM_JOB_NUM_NODES": "1"}, None),
        # An interactive shell on one machine uses this machine alone.
        (SLURM | {"SLURM_JOB_NAME": "bash", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        (SLURM | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (SKYPILOT | SLURM, "SkyPilot"),
        (SLURM, "Slurm"),
    ],
)
def test_engines(variables: dict[str, str], found: str | None) -> None:
    nodes = find_node_placement(variables)
    assert (nodes.engine if isinstance(nodes, NodePlacement) else None) == found


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (SLURM | {"SLURM_STEP_NUM_TASKS": "6"}, "Slurm started 6 tasks on 3 nodes.*--ntasks-per-node 1"),
        (BATCH, "Slurm gave this job 8 nodes .SLURM_JOB_NUM_NODES.*first only.*srun"),
        (SLURM | {"SLURM_NODEID": "3"}, "SLURM_NODEID=3 and SLURM_STEP_NUM_NODES=3 contradict"),
        (SLURM | {"SLURM_NODEID": "x"}, "SLURM_NODEID='x' is not an integer"),
        ({k: v for k, v in SLURM.items() if "NODELIST" not in k}, "SLURM_STEP_NODELIST is not set.*--rendezvous"),
        (SKYPILOT | {"SKYPILOT_NODE_IPS": "\n"}, "SKYPILOT_NODE_IPS is not set"),
    ],
)
def test_contradictions_of_schedulers(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        _parse("t.py")


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "engine"),
    [
        (LAUNCHED, "torchrun"),
        (LAUNCHED | {"RAY_JOB_ID": "02000000", "NODE_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "Ray Train"),
        (LAUNCHED | SLURM, "torchrun"),
    ],
)
def test_a_rank_launches_no_ranks(variables: dict[str, str], engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, variables)
    with pytest.raises(ValueError, match=f"{engine} started this process already, as rank 1 of 2: run the script"):
        _parse("t.py")


POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


def test_options_win_over_a_rank_that_was_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod of a PyTorchJob is a rank, unless the user starts several processes in it."""
    _set(monkeypatch, POD)
    with pytest.raises(
        ValueError, match=r"run the script itself, or several .*--nnodes \$WORLD_SIZE --node-rank \$RANK"
    ):
        _parse("--nproc 8 t.py")
    place = "--nnodes=2 --node_rank=1 --master_addr=job-master-0 --master_port=23456"
    config = _parse(f"{place} --nproc_per_node=8 t.py").config
    assert (config.min_nodes, config.nproc_per_node, config.rdzv_endpoint) == (2, 8, "job-master-0:23456")
    assert _parse(f"{place} t.py").node_rank == 1
    assert _parse("--standalone t.py").alone
    _set(monkeypatch, {f"PET_{name[2:].upper()}": value for name, value in (one.split("=") for one in place.split())})
    assert _parse("t.py").node_rank == 1


@pytest.mark.parametrize("line", ["--standalone t.py", "--nnodes 1 t.py", "--rendezvous a:1 --nnodes 2 t.py"])
def test_a_rank_launches_a_job_of_its_own_if_the_options_say_where(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, LAUNCHED)
    assert _parse(line).command == ("t.py",)
    # Variables are those of the launcher that started this rank.
    _set(monkeypatch, {"PET_MASTER_ADDR": "a", "PET_NNODES": "1", "PET_STANDALONE": "0"})
    with pytest.raises(ValueError, match="torchrun started this process already"):
        _parse("t.py")


@pytest.mark.parametrize(
    ("line", "show"),
    [
        ("", frozenset({0})),
        ("--show all", "all"),
        ("--show 1,3", frozenset({1, 3})),
        ("--tee 3", "all"),
        ("-t 0:1,2:3", frozenset({0, 2})),
        ("--local-ranks-filter 0,1", frozenset({0, 1})),
        ("--redirects 3", frozenset()),
        ("--tee 3 --show 0", frozenset({0})),
    ],
)
def test_whose_output_is_shown(line: str, show: object) -> None:
    assert _parse(f"{line} t.py").show == show


def test_logs(tmp_path: Path) -> None:
    assert _parse("--logs a t.py").logs == Path("a")
    assert _parse("--log-dir b t.py").logs == Path("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.py"]  # no folder is made yet


def test_torchruns_other_options_reach_torch() -> None:
    config = _parse(
        "--role r --monitor-interval 0.5 --max-restarts 2 --rdzv-id job --signals-to-handle SIGTERM t.py"
    ).config
    assert (config.role, config.monitor_interval, config.max_restarts) == ("r", 0.5, 2)
    assert getattr(config, "signals_to_handle", "SIGTERM") == "SIGTERM"
    launch = _parse("--shutdown-timeout 20 --hang-timeout 5 --on-hang report t.py")
    assert (launch.grace_s, launch.hang_timeout_s, launch.on_hang) == (20, 5.0, "report")
    assert getattr(launch.config, "shutdown_timeout", 20) == 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"which script\? ddparity run \[OPTIONS\] SCRIPT"),
        ("gone.py", "there is no script gone.py"),
        ("--no-python no-such-program", "there is no program no-such-program"),
        ("--no-python -m t.py", "--no-python and --module: give one of the two"),
        ("--nproc 0 t.py", "--nproc 0: start at least 1 process"),
        ("--nproc two t.py", "--nproc two: give a number of processes, or auto"),
        ("--nproc", "--nproc: give a value|--nproc.*: give a value"),
        ("--nporc 2 t.py", "there is no option --nporc: did you mean --nproc?"),
        ("--xyz t.py", "there is no option --xyz: ddparity run --help"),
        ("--max-restarts x t.py", "--max-restarts x: give a whole number"),
        ("--max-restarts -1 t.py", "--max-restarts -1|--max-restarts: give a value"),
        ("--max-restarts=-1 t.py", "--max-restarts -1: give a number of restarts"),
        ("--hang-timeout 0 t.py", "--hang-timeout 0: give seconds, more than 0"),
        ("--hang-timeout soon t.py", "--hang-timeout soon: give a number"),
        ("--shutdown-timeout=-1 t.py", "--shutdown-timeout -1: give seconds"),
        ("--on-hang wait t.py", "--on-hang: invalid choice: 'wait'"),
        ("--show one t.py", "--show one: give all, or ranks"),
        ("--nnodes 2 t.py", "--nnodes 2: say where the machines meet.*--rendezvous HOST:PORT"),
        ("--nnodes 4:2 --rendezvous a:1 t.py", "--nnodes 4:2: give a number of machines, or MIN:MAX"),
        ("--nnodes 0 --rendezvous a:1 t.py", "--nnodes 0: give a number"),
        ("--nnodes 2 --rendezvous a t.py", "'a' is not HOST:PORT"),
        ("--nnodes 2 --rendezvous a:b t.py", "'a:b' is not HOST:PORT"),
        ("--nnodes 2 --rendezvous a:1 --rdzv-endpoint b:1 t.py", "give one of the two"),
        ("--nnodes 2 --rendezvous a:1 --node-rank 2 t.py", "--node-rank 2 --nnodes 2: .* from 0 to 1"),
        ("--nnodes 2 --standalone t.py", "--standalone --nnodes 2"),
        ("--nnodes 1:2 --rdzv-backend static --node-rank 0 --master-addr a t.py", "a range .* needs --rendezvous"),
        ("--nnodes 2 --rdzv-backend static --master-addr a t.py", "give each machine its number with --node-rank"),
        ("--dry-run t.py", "--dry-run: prints a job, with --slurm"),
    ],
)  # fmt: skip
def test_an_error_names_the_value_and_the_solution(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _parse(line)


def test_an_error_in_a_variable_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NODE_RANK", "first")
    with pytest.raises(ValueError, match="PET_NODE_RANK=first: give a whole number"):
        _parse("--nnodes 2 --rendezvous a:1 t.py")
    monkeypatch.delenv("PET_NODE_RANK")
    monkeypatch.setenv("PET_STANDALONE", "yes")
    with pytest.raises(ValueError, match="PET_STANDALONE is a flag: set it to 0 or 1"):
        _parse("t.py")


def test_no_submission_without_its_option() -> None:
    assert find_submission(["--nproc", "2", "t.py", "--slurm"]) is None


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cores", lambda: 8)
    assert [threads_per_process(nproc) for nproc in (1, 3, 8, 9)] == [8, 2, 1, 1]
    assert decide_threads(4, {}) == ({"OMP_NUM_THREADS": "2"}, "ddparity: 4 processes, 2 threads each (8 cores)")
    assert decide_threads(1, {}) == ({"OMP_NUM_THREADS": "8"}, "ddparity: 1 process, 8 threads (8 cores)")
    assert decide_threads(8, {})[1] == "ddparity: 8 processes, 1 thread each (8 cores)"
    assert decide_threads(4, {"OMP_NUM_THREADS": "3"}) == ({}, None)


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(resources, "cgroup_cores", lambda: None)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores() == len(before)
    monkeypatch.setattr(resources, "cgroup_cores", lambda: 0.5)
    assert cores() == 1


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/job/task\n", {"job/task/cpu.max": "max 100000", "job/cpu.max": "250000 100000"}, 2.5),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, None),
        # Inside a container, the process's group is the mount itself.
        ("0::/docker/7\n", {"cpu.max": "400000 100000"}, 4.0),
        ("4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "150000", "cpu/job/cpu.cfs_period_us": "100000"}, 1.5),
        ("4:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_the_cpu_quota_of_a_container(own: str, files: dict[str, str], limit: float | None, tmp_path: Path) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cgroup_cores(tmp_path / "cgroup", tmp_path / "own") == limit

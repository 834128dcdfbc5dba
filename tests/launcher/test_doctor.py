"""`ddparity doctor`: what it finds, and when it reports that something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ddparity.errors import RankFailure
from ddparity.launcher import doctor, resources
from ddparity.launcher.doctor import Finding, examine


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of schedulers and launchers."""
    for name in os.environ:
        if name.startswith(("PET_", "SLURM_", "SKYPILOT_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_", "NCCL_")):
            monkeypatch.delenv(name)


def _found(subject: str, rendezvous: str | None = None) -> Finding:
    (finding,) = [finding for finding in examine(rendezvous, lambda: 0.001) if finding.subject == subject]
    return finding


def test_a_real_group_and_a_table() -> None:
    command = [sys.executable, "-m", "ddparity", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert "two processes of this machine can train together" in done.stdout
    for subject in ("scheduler", "interfaces", "host name", "port", "cores", "threads", "GPUs", "torch", "backends"):
        assert subject in done.stdout


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[1-2]",
}
RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "subject", "found", "why"),
    [
        ({}, "scheduler", "none", "no scheduler's variables are set"),
        (SLURM, "scheduler", "Slurm", "machine 1 of 2, which meet at gpu1:"),
        (SLURM | {"SUBMITIT_EXECUTOR": "slurm"}, "scheduler", "Slurm through submitit", "machine 1 of 2"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "scheduler", "Kubeflow Trainer", "PET_NNODES=2, PET_NODE_RANK=0"),
        (RANK, "launcher", "torchrun", "RANK and WORLD_SIZE are set"),
        (RANK, "rank", "rank 1 of 2", "rank 0 at a:1; the ranks run already: run the script itself"),
        ({"OMP_NUM_THREADS": "3"}, "threads", "3", "is set, and not changed"),
    ],
)
def test_what_is_detected_and_why(
    variables: dict[str, str], subject: str, found: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = _found(subject)
    assert (finding.found, finding.state) == (found, "ok")
    assert why in finding.why


@pytest.mark.parametrize(
    ("variables", "subject", "reason"),
    [
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, "launcher", "Slurm started 8 tasks on 2 nodes"),
        ({"RANK": "1"}, "launcher", "RANK=1 is set but WORLD_SIZE is not"),
        ({"GLOO_SOCKET_IFNAME": "eth99"}, "GLOO_SOCKET_IFNAME", "no such interface is up"),
    ],
)
def test_what_is_wrong_is_reported(
    variables: dict[str, str], subject: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = _found(subject)
    assert finding.state == "wrong"
    assert reason in finding.why


def test_a_host_that_has_no_address() -> None:
    finding = _found("route", "no-such-host.invalid:1")
    assert (finding.found, finding.state) == ("none", "wrong")
    assert "to no-such-host.invalid" in finding.why
    with pytest.raises(ValueError, match="'x' is not HOST:PORT"):
        examine("x", lambda: 0.0)


def test_a_group_that_does_not_form_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> float:
        raise RankFailure("rank 1 failed in _all_reduce: OSError: no\nmore", 1)

    finding = examine(None, fails)[-1]
    assert finding == Finding("two processes", "no group", "rank 1 failed in _all_reduce: OSError: no", "wrong")
    monkeypatch.setattr(doctor, "all_reduce_seconds", fails)
    assert doctor.doctor() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "wrong: two processes"


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 60 << 20, "total": 64 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    finding = _found("/dev/shm")
    assert (finding.found, finding.state) == ("0.1 of 0.1 GiB free", "look")
    assert "--shm-size" in finding.why


def test_the_cpu_quota_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (resources, doctor):
        monkeypatch.setattr(module, "cgroup_cores", lambda: 1.0)
    finding = _found("cores")
    assert finding.found == "1"
    assert "the control group allows 1" in finding.why

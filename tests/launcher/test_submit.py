"""Jobs for Slurm and Kubernetes: the generated texts, read as the schedulers read them, and run with fake commands."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ddparity.cli import app
from ddparity.launcher.submit import Submission, find_submission, manifest, sbatch_script

ROOT = Path(__file__).parents[2]


def _job(line: str) -> Submission:
    job = find_submission(shlex.split(line))
    assert job is not None
    return job


def _directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH (--[a-z-]+)=?(.*)$", script, re.MULTILINE))


def _run_line(script: str) -> list[str]:
    step = re.search(r"^srun .*?&$", script, re.MULTILINE | re.DOTALL)
    assert step is not None
    return shlex.split(step[0].removesuffix("&").replace("\\\n", " "))


def _as_sbatch_reads(script: str) -> list[str]:
    """Return the options that sbatch finds (Slurm's src/sbatch/opt.c): up to the first line that is no comment.

    A backslash escapes the next character, also between quotes; # begins a comment outside of quotes.
    """
    found = []
    for line in script.split("\n"):
        if line and not line.startswith("#"):
            break
        words, quote, escaped, word = [], "", False, ""
        for character in line.removeprefix("#SBATCH") + "\n" if line.startswith("#SBATCH") else "":
            if escaped:
                word, escaped = word + character, False
            elif character == "\\":
                escaped = True
            elif quote:
                quote, word = ("", word) if character == quote else (quote, word + character)
            elif character in "'\"":
                quote = character
            elif character == "#":
                break
            elif character.isspace():
                words, word = words + [word] * bool(word), ""
            else:
                word += character
        assert not quote, line
        found += words
    return found


@pytest.mark.parametrize("value", ["two words", 'a "b" \\ c', "50% # of it", "it's", "a#b", "=x", "é ü"])
def test_an_option_of_sbatch_keeps_its_value(value: str) -> None:
    job = find_submission(["--slurm", f"--comment={value}", "--nproc", "2", "t.py", "--comment=x y"])
    assert job is not None
    assert f"--comment={value}" in _as_sbatch_reads(sbatch_script(job))
    assert job.arguments == ("--nproc", "2", "t.py", "--comment=x y")


@pytest.mark.parametrize("name", ["a\n#SBATCH --uid=0.py", "a\r\n#SBATCH --uid=0", "$(id).py", "it's `id`.py"])
def test_a_name_adds_no_line_and_no_command(name: str, cluster: dict[str, str], tmp_path: Path) -> None:
    """The launcher gets each argument as it was given; sbatch finds the options that it would find anyway."""
    plain, given = find_submission(["--slurm", "a.py"]), find_submission(["--slurm", name, name, "\u2028\x1bé"])
    assert plain is not None and given is not None
    script = sbatch_script(given)
    assert len(script.split("\n")) == len(sbatch_script(plain).split("\n"))
    assert [one.partition("=")[0] for one in _as_sbatch_reads(script)] == [
        one.partition("=")[0] for one in _as_sbatch_reads(sbatch_script(plain))
    ]
    _program(tmp_path, "ddparity", "printf '%s\\0' \"$@\"")
    job = subprocess.run(["bash"], input=script.encode(), env=cluster, capture_output=True, timeout=20, check=False)
    assert job.stdout.decode().split("\0") == ["run", name, name, "\u2028\x1bé", ""]


def test_an_option_of_sbatch_cannot_add_a_line() -> None:
    with pytest.raises(ValueError, match="an option of sbatch is one line of printable characters"):
        find_submission(["--slurm", "--comment=a\n#SBATCH --uid=0", "t.py"])


def test_one_launcher_per_machine() -> None:
    script = sbatch_script(_job("--slurm --nnodes 2 --nproc 8 train.py --lr 'a b' --dry-run"))
    directives = _directives(script)
    assert directives["--nodes"] == "2"
    assert directives["--ntasks-per-node"] == "1"
    assert directives["--signal"] == "B:USR1@60"
    assert "--requeue" in directives and "--exclusive" in directives
    line = _run_line(script)
    assert line[line.index("ddparity") :] == ["ddparity", "run", "--nproc", "8", "train.py", "--lr", "a b"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # The options of sbatch come before the commands.
    assert script.index("#SBATCH") < script.index("trap") and script.startswith("#!/bin/bash\n#SBATCH")


def test_options_of_sbatch() -> None:
    script = sbatch_script(
        _job("--slurm --time=2:00:00 --partition=gpu --gpus-per-node=8 --cpus-per-task=32 --signal=USR2@300 -n 8 t.py")
    )
    directives = _directives(script)
    assert (directives["--time"], directives["--partition"], directives["--gpus-per-node"]) == ("2:00:00", "gpu", "8")
    assert directives["--signal"] == "B:USR2@300"
    assert "trap 'preempted=yes; kill -USR2 \"$!\"' USR2" in script
    assert "--exclusive" not in directives
    assert _run_line(script)[:5] == ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none", "--cpus-per-task", "32"]
    assert "--time" not in " ".join(_run_line(script))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--slurm --nodes=2 t.py",
            "--nodes: the job has one task per machine; give the number of machines with --nnodes",
        ),
        ("--slurm --ntasks-per-node=8 t.py", "--ntasks-per-node: the job has one task per machine"),
        ("--slurm --signal=soon t.py", "--signal=soon: give a signal and seconds"),
        ("--slurm --time 2:00 t.py", "there is no script 2:00: an option of sbatch is written --time=2:00"),
        ("--slurm --nnodes 1:4 t.py", "--nnodes 1:4: a job has a fixed number of machines"),
        ("--slurm --rendezvous a:1 t.py", "--rendezvous: leave it out; the job itself knows where its machines meet"),
        ("--slurm --kubernetes i t.py", "--slurm and --kubernetes: give one of the two"),
        ("--kubernetes i --time=1 t.py", "there is no option --time=1"),
        ("--kubernetes i --gpus-per-node=many t.py", "--gpus-per-node=many: give a number of GPUs, 0 for a training"),
        ("--slurm t.py", "there is no sbatch on this machine"),
        ("--kubernetes i t.py", "there is no kubectl on this machine"),
    ],
)
def test_errors(line: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["run", *shlex.split(line)])
    assert (result.exit_code, result.stdout) == (2, "")
    (said,) = result.stderr.splitlines()
    assert message in said


def test_dry_run_prints_and_submits_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for line in ("--slurm --dry-run t.py", "--slurm t.py --dry-run"):
        result = CliRunner().invoke(app, ["run", *line.split()])
        assert result.exit_code == 0
        assert result.stdout == sbatch_script(_job("--slurm t.py"))
    result = CliRunner().invoke(app, ["run", *["--kubernetes", "i", "t.py", "--dry-run"]])
    assert result.stdout == manifest(_job("--kubernetes i t.py"))


def _program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_sbatch_gets_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(tmp_path, "sbatch", f"cat > {tmp_path}/got; exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = CliRunner().invoke(app, ["run", "--slurm", "--nnodes", "2", "t.py"])
    assert result.exit_code == 3
    assert (tmp_path / "got").read_text() == sbatch_script(_job("--slurm --nnodes 2 t.py"))


# A launcher that ends by itself on USR1, like one whose ranks have saved. The test reads "ready" from a pipe.
LAUNCHER = "trap 'echo saved; exit 0' USR1; echo ready; while :; do sleep 0.1; done"


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Fake commands of Slurm. This srun forwards its signals, as Slurm's does."""
    options = r'while [ "${1#-}" != "$1" ]; do shift; done'
    # The launcher may be ready before this shell knows its process id: then the signal waits.
    forward = """trap 'sent=yes; [ "$child" ] && kill -USR1 "$child"' USR1"""
    start = '"$@" & child=$!\n[ "$sent" ] && kill -USR1 "$child"'
    wait = 'while kill -0 "$child" 2>/dev/null; do wait "$child"; done; wait "$child"'
    _program(tmp_path, "srun", f"{options}\nsent= child=\n{forward}\n{start}\n{wait}")
    _program(tmp_path, "scontrol", 'echo "scontrol $@"')
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}


def test_the_signal_reaches_the_launcher_and_the_job_is_queued_again(tmp_path: Path, cluster: dict[str, str]) -> None:
    _program(tmp_path, "ddparity", LAUNCHER)
    script = tmp_path / "job.sh"
    script.write_text(sbatch_script(_job("--slurm t.py")))
    with subprocess.Popen(["bash", script], env=cluster, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        try:
            assert job.stdout.readline() == "ready\n"
            job.send_signal(signal.SIGUSR1)
            out, _ = job.communicate(timeout=20)
        finally:
            job.kill()
    assert out.splitlines() == ["saved", "scontrol requeue 77"]
    assert job.returncode == 0


@pytest.mark.parametrize("code", [0, 42])
def test_the_exit_code_is_the_launchers(code: int, tmp_path: Path, cluster: dict[str, str]) -> None:
    _program(tmp_path, "ddparity", f'echo "$@"; exit {code}')
    script = sbatch_script(_job("--slurm --nproc 2 t.py 'a  b'"))
    job = subprocess.run(["bash"], input=script, env=cluster, capture_output=True, text=True, timeout=20, check=False)
    assert (job.returncode, job.stdout) == (code, "run --nproc 2 t.py a  b\n")


def test_a_train_job_for_the_kubeflow_trainer() -> None:
    job = _job("--kubernetes registry/im:1 --nnodes 2 --nproc 4 My_train.v2.py --note 'a: \"b\" #' --x=1")
    found = yaml.safe_load(manifest(job))
    assert found == {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": "my-train-v2"},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {
                "image": "registry/im:1",
                "numNodes": 2,
                "numProcPerNode": 4,
                "resourcesPerNode": {"limits": {"nvidia.com/gpu": "4"}},
                "command": ["ddparity", "run", "--nproc", "4", "My_train.v2.py", "--note", 'a: "b" #', "--x=1"],
            },
        },
    }
    assert "numProcPerNode" not in yaml.safe_load(manifest(_job("--kubernetes i t.py")))["spec"]["trainer"]
    for line, gpus in (("--nproc 8 --gpus-per-node=2", "2"), ("--gpus-per-node=8", "8"), ("--nproc 8", "8")):
        trainer = yaml.safe_load(manifest(_job(f"--kubernetes i {line} t.py")))["spec"]["trainer"]
        assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": gpus}}
        assert "--gpus-per-node" not in " ".join(trainer["command"])
    for line in ("--nproc 8 --gpus-per-node=0", "--nproc auto", ""):
        assert "resourcesPerNode" not in manifest(_job(f"--kubernetes i {line} t.py"))
    assert re.fullmatch(
        r"[a-z]([-a-z0-9]*[a-z0-9])?", yaml.safe_load(manifest(_job("--kubernetes i 7_.py")))["metadata"]["name"]
    )


def test_the_examples_manifest_is_what_the_command_prints() -> None:
    text = (ROOT / "examples" / "kubernetes.yaml").read_text()
    head, _, body = text.partition("\n")
    command = shlex.split(head.removeprefix("# "))
    assert command[:2] == ["ddparity", "run"]
    assert manifest(_job(shlex.join(command[2:]))) == body
    inside = yaml.safe_load(body)["spec"]["trainer"]["command"]
    assert (ROOT / inside[-1]).is_file()


def test_what_is_submitted_is_what_runs(tmp_path: Path) -> None:
    """The same parser reads the arguments inside of the job."""
    from ddparity.launcher.options import parse

    script = tmp_path / "t.py"
    script.write_text("")
    job = _job(f"--slurm --time=1 --nnodes=1 --nproc 2 --show all {script} --slurm --dry-run x")
    launch = parse(job.arguments)
    assert launch.command == (str(script), "--slurm", "--dry-run", "x")
    assert (launch.show, launch.config.nproc_per_node) == ("all", 2)

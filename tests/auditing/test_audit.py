"""The corpus of faulty and clean scripts, shortened; the command; what silences a finding; the page."""

from __future__ import annotations

import ast
import builtins
import fcntl
import functools
import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddparity as dp
from ddparity.auditing.catalogue import CATALOGUE, Finding, finding
from ddparity.auditing.recording.install import begin
from ddparity.auditing.recording.journal import Journal
from ddparity.auditing.run import inspect_script, starts_processes
from ddparity.auditing.selection import check_prefixes, chosen, read_options
from tests.auditing.cases import CLEAN, FAULTY, SCRIPTS, Case, all_cases, judge, looks_like
from tests.auditing.cut_loops import CUT
from tests.auditing.look_alikes import LOOK_ALIKES
from tests.auditing.near_misses import NEAR
from tests.ranks import outcomes

PAGE = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()


def covering(cases: list[Case]) -> list[Case]:
    """Return the fewest cases that have all codes, those with most codes first."""
    chosen: list[Case] = []
    known: set[str] = set()
    for one in sorted(cases, key=lambda case: -len(case.expected)):
        if not one.expected <= known:
            known |= one.expected
            chosen.append(one)
    return chosen


# Launched as the command does it, they take some seconds each: `make audit-corpus` runs all.
QUICK = [one for one in (*CLEAN, *FAULTY) if one.script != "spawned" and not one.hangs]
BESIDE = (
    *("402-beside-another-reduction", "303-two-losses", "106-chosen", "201-added", "309-projected"),
    *("103-cut", "103-cut-near", "204-another-copy"),
)
ALIKE = (
    "clean-autograd",
    "clean-functions-3",
    "clean-short-tail",
    "clean-trainer-tail",
    "clean-weighted-sampler",
)  # as others of SHORT
SHORT = [
    *(one for one in QUICK if not one.expected and one.name not in ALIKE),
    *covering([one for one in QUICK if one.expected]),
    *(one for one in (*NEAR, *LOOK_ALIKES, *CUT) if one.name in BESIDE),
]


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_what_is_planted_is_found_and_nothing_else(case: Case) -> None:
    wrong, words = judge(case)
    assert not wrong, "\n".join(words)


def test_the_corpus_has_two_faulty_and_two_clean_scripts_for_each_code() -> None:
    """The clean ones look like the fault, and both kinds come from at least two scripts."""
    cases = all_cases()
    assert len({one.name for one in cases}) == len(cases)
    for code in CATALOGUE:
        for kind in ([c for c in cases if code in c.expected], [c for c in cases if code in looks_like(c)]):
            assert len({one.script for one in kind}) >= 2, (code, [one.name for one in kind])


def test_a_script_that_spawns_its_ranks(tmp_path: Path) -> None:
    case = next(one for one in FAULTY if one.name == "308-clip-scaled")
    path = tmp_path / "train.py"
    path.write_text(case.text())
    found = dp.audit(path)
    assert {one.code for one in found if one.severity != "note"} == {"DDP308"}
    [one] = [one for one in found if one.code == "DDP308"]
    assert "clip_grad_norm_" in path.read_text().splitlines()[one.line - 1]
    assert one.ranks == (0, 1) and one.certainty == "proved" and Path(one.file) == path.resolve()


def test_processes_that_share_a_model_without_a_group_are_not_compared() -> None:
    report = inspect_script(SCRIPTS / "hogwild.py")
    assert not report.findings and report.seen["steps"] == 16
    assert any("no process group: nothing could be compared" in one for one in report.seen["blind"])


def test_the_command(tmp_path: Path) -> None:
    """A hang is ended, its cause is the finding, and JSON, HTML and annotations say the same."""
    case = next(one for one in FAULTY if one.name == "503-one-rank")
    (tmp_path / "train.py").write_text(case.text())
    command = [
        sys.executable,
        "-m",
        "ddparity",
        "audit",
        "--github",
        "--json",
        "o.json",
        "--html",
        "o.html",
        "train.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1, done.stderr
    document = json.loads((tmp_path / "o.json").read_text())
    assert [one["code"] for one in document["findings"] if one["severity"] == "error"] == ["DDP503"]
    assert document["seen"]["world_size"] == 2 and document["seen"]["epochs"] == 2
    assert document["versions"]["torch"] == torch.__version__
    assert re.search(r"^::error file=train.py,line=\d+,title=DDP503", done.stdout, re.MULTILINE)
    page = (tmp_path / "o.html").read_text()
    assert "DDP503" in page and "<svg" in page and "http" not in page


def test_a_script_that_fails(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise KeyError('lost')\n")
    report = inspect_script(tmp_path / "train.py")
    assert report.exit_code == 3
    assert "KeyError: 'lost'" in report.failure


def _train(folder: str | None, script: str) -> list[str]:
    finish = begin(folder, 50) if folder is not None else lambda: None
    prints: list[str] = []
    runpy.run_path(script, init_globals={"print": lambda *values: prints.append(repr(values))}, run_name="__main__")
    finish()
    return prints


@pytest.mark.parametrize("name", ["trainer", "by_hand"])
def test_a_script_computes_the_same_bits_as_without_the_audit(name: str, tmp_path: Path) -> None:
    text = (SCRIPTS / f"{name}.py").read_text()
    end = "    dist.destroy_process_group()\n"
    weights = "Trainer(model, options)" if name == "trainer" else "model"
    show = "    print(torch.get_rng_state().sum(), [p.detach().double().sum().item() for p in model.parameters()])\n"
    assert weights in text
    (tmp_path / "train.py").write_text(
        text.replace(end, show + end).replace("parser.parse_args()", "parser.parse_args([])")
    )
    (tmp_path / "records").mkdir()
    script = str(tmp_path / "train.py")
    plain = [one.value for one in outcomes(_train, 2, None, script, in_world=False)]
    audited = [one.value for one in outcomes(_train, 2, str(tmp_path / "records"), script, in_world=False)]
    assert plain == audited
    assert all(plain)


@pytest.mark.parametrize(("steps", "told"), [(2, True), (50, False)])
def test_no_evaluation_after_a_cut_epoch_is_told(steps: int, told: bool) -> None:
    """A loop that counts batches evaluates after the last one, which a cut epoch does not have."""
    report = inspect_script(SCRIPTS / "counting.py", steps=steps)
    assert report.seen["evaluations"] == (1 if told else 3)
    assert any("after an epoch that was cut: DDP4" in line for line in report.seen["blind"]) == told
    assert report.exit_code == 0


def test_an_error_of_the_recorder_is_a_record_and_no_error_of_the_script(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 50)
    with journal.safely:
        raise TypeError("not a tensor")
    [_, problem] = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert problem["k"] == "problem" and problem["text"] == "TypeError: not a tensor"
    with pytest.raises(SystemExit), journal.safely:  # the end after enough steps
        raise SystemExit(0)


def test_the_module_says_how_a_script_starts(tmp_path: Path) -> None:
    assert starts_processes(SCRIPTS / "spawned.py")
    assert not starts_processes(SCRIPTS / "functions.py")
    (tmp_path / "both.py").write_text("mp.spawn(f) if 'RANK' not in os.environ else f(int(os.environ['RANK']))")
    assert not starts_processes(tmp_path / "both.py")
    (tmp_path / "helper.py").write_text(
        "import torch.multiprocessing as mp\ndef go(f):\n    mp.spawn(f)\ndef f(r):\n    os.environ['RANK'] = str(r)\n"
    )
    (tmp_path / "main.py").write_text("from helper import go, f\ngo(f)\nprint(os.environ['RANK'])\n")
    assert starts_processes(tmp_path / "main.py")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").write_text("from .launch import go\n")
    (tmp_path / "lib" / "launch.py").write_text("import torch\ndef go(f):\n    torch.multiprocessing.spawn(f)\n")
    (tmp_path / "package.py").write_text("from lib import go\ngo(f)\n")
    assert starts_processes(tmp_path / "package.py")
    text = "# -*- coding: latin-1 -*-\n# \u00e9t\u00e9\nimport torch\ntorch.multiprocessing.spawn(f)\n"
    (tmp_path / "latin.py").write_bytes(text.encode("latin-1"))
    assert starts_processes(tmp_path / "latin.py")


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("import psutil\nimport torch.multiprocessing as mp\npsutil.Process().memory_info()\n", False),
        ("import numpy as np\nimport multiprocessing\nnp.random.SeedSequence(5).spawn(3)\n", False),
        ("import torch.multiprocessing as mp\nmp.spawn(f)\n", True),
        ("import torch\ntorch.multiprocessing.spawn(f)\n", True),
        ("from multiprocessing import Process\nProcess(target=f).start()\n", True),
        ("import multiprocessing as m\ncontext = m.get_context('spawn')\ncontext.Process(target=f).start()\n", True),
        ("import multiprocessing as m\nm.get_context('spawn').Process(target=f).start()\n", True),
    ],
)
def test_only_multiprocessing_starts_processes(text: str, alone: bool, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(text)
    assert starts_processes(tmp_path / "train.py") is alone


def test_a_recorder_takes_the_names_of_what_it_stands_for(tmp_path: Path) -> None:
    """A call by keyword works under the audit: parameters have the names that torch gives them."""
    [one] = outcomes(_wrong_names, 1, str(tmp_path), in_world=False)
    assert one.value == [], one.trace


def _wrong_names(folder: str) -> list[str]:
    from torch.distributed import fsdp

    begin(folder, 50)
    kinds = (
        torch,
        torch.autograd,
        torch.distributed,
        torch.nn.utils,
        torch.nn.Module,
        torch.nn.SyncBatchNorm,
        torch.nn.parallel.DistributedDataParallel,
        torch.optim.Optimizer,
        torch.amp.GradScaler,
        fsdp,
        fsdp.FSDPModule,
        builtins,
        fcntl,
    )
    found = [
        (name, value, value.__wrapped__)
        for kind in kinds
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and hasattr(value, "__wrapped__") and "recording" in value.__code__.co_filename
    ]
    assert len(found) > 30
    wrong = []
    for name, value, plain in found:
        try:
            theirs = list(inspect.signature(plain).parameters)
        except ValueError:  # of C
            continue
        kinds_of = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        own = inspect.signature(value, follow_wrapped=False).parameters.values()
        wrong += [f"{name}({one.name})" for one in own if one.kind not in kinds_of and one.name not in theirs]
    return wrong


def _found(file: Path, code: str = "DDP304", line: int = 2) -> Finding:
    return finding(code, [0, 1], f"{file}:{line}", f"{file}:1", "message", "fix", certainty="likely")


@pytest.mark.parametrize(
    ("comment", "shown"),
    [
        ("", True),
        ("  # ddparity: ignore", False),
        ("  # ddparity: ignore[DDP304]", False),
        ("  # why # ddparity:ignore[DDP1, ddp3]", False),
        ("  # ddparity: ignore[DDP305]", True),
    ],
)
def test_a_comment_silences_a_finding(comment: str, shown: bool, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(f"import torch\nloss.backward(){comment}\n")
    assert bool(chosen([_found(path)], (), ())) is shown


def test_a_comment_on_any_line_of_a_statement_silences_it(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("def f():\n    g(\n        1,\n    )  # ddparity: ignore[DDP304]\n    h()\n")
    assert [bool(chosen([_found(path, line=line)], (), ())) for line in (2, 3, 5)] == [False, False, True]


def test_select_and_ignore_take_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    codes = ["DDP601", "DDP304", "DDP301", "DDP106"]
    found = [finding(code, [0], f"{path}:1", None, "m", "f") for code in codes]
    assert [one.code for one in chosen(found, (), ())] == ["DDP301", "DDP304", "DDP106", "DDP601"]
    assert [one.code for one in chosen(found, ("DDP3", "DDP1"), ("DDP304",))] == ["DDP301", "DDP106"]


def test_what_is_likely_is_never_an_error(tmp_path: Path) -> None:
    likely = finding("DDP307", [0], f"{tmp_path}/a.py:1", None, "m", "f", certainty="likely")
    assert likely.severity == "warning"


WRONG = [
    ("--select DDP9 train.py", "select DDP9: no code begins so"),
    ("missing.py", "missing.py: there is no such script"),
    ("--epochs 2 train.py", "--epochs: the audit has no such option"),
    ("--nproc 0 train.py", "nproc=0: start at least 1 process"),
    ("--steps 0 train.py", "steps=0: give at least 1 step"),
    ("--json no/where.json train.py", "there is no folder"),
    ("", "name a script"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_argument_is_refused(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from ddparity.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    done = CliRunner().invoke(app, ["audit", *arguments.split()])
    assert done.exit_code == 2
    assert message in done.output


def test_options_of_pyproject(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.ddparity.audit]\nignore = ["DDP6"]\nnproc = 3\n')
    assert read_options(tmp_path / "src" / "train.py") == {"ignore": ["DDP6"], "nproc": 3}
    (tmp_path / "pyproject.toml").write_text('[tool.ddparity.audit]\nignore = "DDP6"\n')
    with pytest.raises(ValueError, match="ignore = 'DDP6': give a list of codes"):
        read_options(tmp_path / "train.py")
    (tmp_path / "pyproject.toml").write_text("[tool.ddparity.audit]\nnproc = true\n")
    with pytest.raises(ValueError, match="nproc = True: give a list"):
        read_options(tmp_path / "train.py")
    with pytest.raises(ValueError, match="DDP8: no code begins so"):
        check_prefixes(["DDP8"], "ignore")


def test_a_repair_names_what_this_torch_has() -> None:
    """The texts of repairs name functions of torch: each is there, in the oldest and the newest torch of the tests."""
    folder = Path(inspect.getfile(finding)).parent
    constants = [
        node.value
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    modules = {"torch": torch, "dist": torch.distributed}
    named = {
        tuple(name.split(".")) for text in constants for name in re.findall(r"\b((?:torch|dist)(?:\.\w+)+)\(", text)
    }
    assert ("dist", "destroy_process_group") in named and len(named) >= 6
    for first, *rest in named:
        functools.reduce(getattr, rest, modules[first])


def test_the_page_has_a_section_for_each_code() -> None:
    assert set(re.findall(r"^## (DDP\d+)$", PAGE, re.MULTILINE)) == set(CATALOGUE)


SNIPPETS = re.findall(r"<!-- (faulty|right) (\S+) -->\n```\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("kind", "name", "snippet"), SNIPPETS, ids=[f"{kind}-{name}" for kind, name, _ in SNIPPETS])
def test_the_snippets_of_the_page_are_those_of_the_corpus(kind: str, name: str, snippet: str) -> None:
    case = next(one for one in (*CLEAN, *FAULTY, *NEAR, *LOOK_ALIKES) if one.name == name)
    right = kind == "right" and case.expected
    text = (SCRIPTS / f"{case.script}.py").read_text() if right else case.text()
    assert all(line.strip() in text for line in snippet.splitlines())

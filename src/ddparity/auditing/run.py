"""Run a script with recorders in its processes, and compare what its ranks did."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from ..errors import RankFailure
from ..launcher import parse, run_launch
from .catalogue import Finding
from .data import check_data
from .evaluation import check_evaluation
from .files import check_collectives, check_files
from .gradients import check_gradients
from .model import check_model
from .output import check_output
from .records import Run, read_run
from .selection import check_prefixes, chosen, read_options
from .speed import check_speed

STEPS = 50  # of an epoch
_HANG_S = 300  # longer than an evaluation on one rank; hangs that cannot end are known at once
_CHECKS = (
    check_model,
    check_data,
    check_gradients,
    check_collectives,
    check_files,
    check_evaluation,
    check_output,
    check_speed,
)
_SPAWNERS = {"start_processes", "notebook_launcher", "elastic_launch"}
_OF_MULTIPROCESSING = {"spawn", "Process", "start_processes"}
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")

_SITE = '''"""Begins to record in each Python process of an audited script, then runs another sitecustomize."""
import importlib.util
import os
import sys


def _load(name, path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load("_ddparity_recording", os.path.join({recording!r}, "__init__.py"), submodule_search_locations=[{recording!r}])
from _ddparity_recording.install import begin

begin({folder!r}, {steps!r})
for _path in sys.path:
    _file = os.path.join(_path, "sitecustomize.py")
    if os.path.realpath(_path) != os.path.dirname(os.path.realpath(__file__)) and os.path.isfile(_file):
        _load("sitecustomize", _file)
        break
'''


@dataclass(frozen=True)
class Report:
    """What an audit found, and what it has seen."""

    script: Path
    findings: list[Finding]
    seen: dict[str, Any]
    run: Run
    failure: str = ""  # what the launcher says of a script that failed, in a line

    @property
    def failed(self) -> bool:
        """Whether the script itself failed."""
        return self.run.exit_code != 0

    @property
    def exit_code(self) -> int:
        """1: an error was proved. 3: the script failed. 0: neither."""
        if any(one.severity == "error" and one.certainty == "proved" for one in self.findings):
            return 1
        return 3 if self.failed else 0


def audit(script: str | os.PathLike[str], *args: str, nproc: int = 2) -> list[Finding]:
    """Run a training script on `nproc` processes, as it is, and return what is wrong with its data parallelism.

    The script starts as under `ddparity run`, or on its own where it starts its processes itself. Training loops end
    after 50 optimizer steps of an epoch; evaluations are not cut. The findings have a `code`, `severity`, `certainty`,
    `ranks`, `file`, `line`, `cause_line`, `message` and `fix`, what costs the model most first; docs/audit.md explains
    the codes. No collective is added to the script's.

    Raises:
        ValueError: there is no such script, `nproc` is below 1, or [tool.ddparity.audit] of pyproject.toml is wrong.
        RankFailure: the script failed, and no error was proved that may be the cause.

    Example:
        assert not [one for one in ddparity.audit("train.py") if one.severity == "error"]
    """
    report = inspect_script(Path(script), [str(one) for one in args], nproc=nproc)
    if report.exit_code == 3:
        reason = report.failure.removeprefix("ddparity: ") or "the reason is in its output"
        raise RankFailure(f"{script} failed with exit code {report.run.exit_code}: {reason}", -1)
    return report.findings


def inspect_script(
    script: Path,
    arguments: Sequence[str] = (),
    *,
    nproc: int | None = None,
    steps: int | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Report:
    """Run a script and return the report. Options that are not given come from pyproject.toml."""
    module = str(script) == "-m" and bool(arguments)
    if not module and not script.is_file():
        if str(script).startswith("-"):
            raise ValueError(f"{script}: the audit has no such option; options of the script stand behind the script")
        raise ValueError(f"{script}: there is no such script")
    options: dict[str, Any] = read_options(script)
    processes = nproc if nproc is not None else options.get("nproc", 2)
    limit = steps if steps is not None else options.get("steps", STEPS)
    if processes < 1:
        raise ValueError(f"nproc={processes}: start at least 1 process")
    if limit < 1:
        raise ValueError(f"steps={limit}: give at least 1 step")
    wanted = check_prefixes(select or options.get("select", ()), "select")
    unwanted = check_prefixes([*ignore, *options.get("ignore", ())], "ignore")
    with tempfile.TemporaryDirectory(prefix="ddparity-audit-") as name:
        folder = Path(name)
        heard = _Heard(sys.stderr)
        run = None
        with _recording(folder, limit):
            if not module and starts_processes(script):
                code = _run_alone(script, arguments, folder / "records")
                run = read_run(folder / "records", script, code)
                if code == 0 and not _has_started(run):
                    run = None
                    for path in (folder / "records").glob("*.jsonl"):  # it runs again
                        path.unlink()
            if run is None:
                command = ["--nproc", str(processes), "--hang-timeout", str(_HANG_S), str(script), *arguments]
                launch = parse(command)
                with redirect_stderr(heard):
                    code = run_launch(launch)
                run = read_run(folder / "records", Path(f"-m {arguments[0]}") if module else script, code)
        run.failed = heard.failed()
    return replace(compare(run, wanted, unwanted), failure=heard.failure() if code else "")


def compare(run: Run, select: Sequence[str] = (), ignore: Sequence[str] = ()) -> Report:
    """Compare the ranks of a run by their records."""
    found = _findings(run)
    for other in run.others:  # the same fault counts once
        known = {(one.code, one.file, one.line) for one in found}
        found += [one for one in _findings(other) if (one.code, one.file, one.line) not in known]
    return Report(run.script, chosen(found, select, ignore), _seen(run), run)


def _findings(run: Run) -> list[Finding]:
    return [one for check in _CHECKS for one in check(run)] if run.ranks else []


class _Heard:
    """Standard error that also keeps the launcher's lines: the last one says what failed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._lines: list[str] = []

    def write(self, text: str) -> int:
        self._lines += [line for line in text.splitlines() if line.startswith("ddparity: ")]
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def failed(self) -> frozenset[int]:
        """Return the ranks that an exception ended, as the launcher says."""
        found = (re.match(r"ddparity: ranks? ([\d, ]+) failed: \w", line) for line in self._lines)
        return frozenset(int(rank) for one in found if one is not None for rank in one[1].split(","))

    def failure(self) -> str:
        return next((one for one in reversed(self._lines) if " failed" in one or "hang" in one), "")


@contextmanager
def _recording(folder: Path, steps: int) -> Iterator[None]:
    """Let Python processes that are started meanwhile record what they do."""
    records, site = folder / "records", folder / "site"
    records.mkdir()
    site.mkdir()
    recording = str(Path(__file__).parent / "recording")
    (site / "sitecustomize.py").write_text(_SITE.format(recording=recording, folder=str(records), steps=steps))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(site) if not before else f"{site}{os.pathsep}{before}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def starts_processes(script: Path) -> bool:
    """Return whether a script starts its ranks itself: it calls mp.spawn or alike, and reads no rank of a launcher.

    Modules beside the script that it imports count as parts of it.
    """
    nodes = _nodes(script.resolve(), set())
    calls: dict[str, list[ast.Call]] = {}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            calls.setdefault(name, []).append(node)
    modules = _imported(nodes)
    spawns = any(
        _is_of_multiprocessing(call.func, modules) for name in _OF_MULTIPROCESSING for call in calls.get(name, [])
    )
    launches = any(isinstance(n, ast.Attribute) and n.attr == "launch" and _is_ours(n.value) for n in nodes)
    if not launches and not spawns and not calls.keys() & _SPAWNERS:
        return False
    if any(map(_sets_rank, nodes)):
        return True
    joins = calls.get("init_process_group", [])
    given = any(len(one.args) > 2 or any(keyword.arg in ("rank", None) for keyword in one.keywords) for one in joins)
    return (given or not joins) and not any(map(_reads_rank, nodes))


def _nodes(path: Path, seen: set[Path]) -> list[ast.AST]:
    """Return the nodes of a file's syntax tree, and of the modules in its folder that it imports."""
    seen.add(path)
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, OSError):
        return []
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    for name in sorted(names):
        beside = path.parent / name.replace(".", "/")
        for inner in (beside.with_name(f"{beside.name}.py"), beside / "__init__.py"):
            if inner not in seen and inner.is_file():
                nodes += _nodes(inner, seen)
    return nodes


def _imported(nodes: list[ast.AST]) -> dict[str, str]:
    """Return the modules, or what comes from them, by the names that import statements give them."""
    found: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _is_of_multiprocessing(function: ast.expr, modules: dict[str, str]) -> bool:
    """Return whether `spawn` or `Process` is multiprocessing's: `mp.spawn`, `self.context.Process`.

    Not that of an imported module beside it, such as psutil.Process, nor of a call, such as SeedSequence(5).spawn(n).
    """
    owner = function
    while isinstance(owner, ast.Attribute):
        if owner.attr == "multiprocessing":
            return True
        owner = owner.value
    if not any("multiprocessing" in module for module in modules.values()):
        return False
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, (ast.Attribute, ast.Name)) and ast.unparse(owner.func).endswith("get_context")
    return not isinstance(owner, ast.Name) or "multiprocessing" in modules.get(owner.id, "multiprocessing")


def _sets_rank(node: ast.AST) -> bool:
    """Return whether a node sets RANK in the environment, as functions do that mp.spawn starts."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Store):
        return False
    return isinstance(node.slice, ast.Constant) and node.slice.value in _RANK_VARIABLES[:2]


def _is_ours(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("dp", "ddparity")


def _reads_rank(node: ast.AST) -> bool:
    """Return whether a node reads RANK, LOCAL_RANK or WORLD_SIZE from the environment."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        return isinstance(node.slice, ast.Constant) and node.slice.value in _RANK_VARIABLES
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "getenv"):
        return bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value in _RANK_VARIABLES
    if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
        return node.left.value in _RANK_VARIABLES
    return False


def _has_started(run: Run) -> bool:
    """Return whether a script that ran alone has started ranks, or processes that share a model without a group."""
    return run.world > 1 or run.uses("joined") or _shares_memory(run)


def _shares_memory(run: Run) -> bool:
    """Return whether a process that the script started trains a model in shared memory and no group (Hogwild)."""
    first = run.ranks[0] if len(run.ranks) == 1 else None
    if first is None or first.head["rank"] is not None or first.of("joined") or first.head["parent"] == os.getpid():
        return False
    return any(one["shared"] for one in first.of("parameters"))


def _run_alone(script: Path, arguments: Sequence[str], records: Path) -> int:
    """Run a script that starts its processes itself. End them all if none records anything for long."""
    process = subprocess.Popen([sys.executable, str(script), *arguments])
    last, changed = -1, time.monotonic()
    try:
        while True:
            try:
                code = process.wait(timeout=0.5)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                size = sum(path.stat().st_size for path in records.glob("*.jsonl"))
                if size != last:
                    last, changed = size, time.monotonic()
                elif time.monotonic() - changed > 2 * _HANG_S:
                    return 124
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                one.kill()
            process.wait()


def _seen(run: Run) -> dict[str, Any]:
    """Return what the audit looked at, and which checks had nothing to look at."""
    if not run.ranks:
        return {"world_size": 0, "blind": ["no process recorded a training"]}
    first = run.ranks[0]
    training = [one for one in first.passes if one.training]
    evaluations = [one for one in first.passes if not one.training and (one.how != "left" or one.given > 1)]
    cut = sorted({str(one.site) for one in training if one.how == "cut"})
    steps = len(first.of("step"))
    blind = []
    if _shares_memory(run):
        blind.append("processes that share a model and are in no process group: nothing could be compared")
    elif run.world < 2:
        blind.append("one process: nothing could be compared between ranks")
    if not steps:
        blind.append("no optimizer step: DDP2 and DDP3")
    if first.of("ours"):
        blind.append("loaders of ddparity: their plan shares the samples out, and their epochs are not counted")
    elif not first.passes:
        blind.append("no pass over a data loader: DDP1, but for the model's inputs, and DDP4")
    elif not any(len([p for p in training if p.loader["site"] == one.loader["site"]]) > 1 for one in training):
        blind.append("no second epoch of a loader: DDP103 and DDP113")
    counting = [one.end for one in training if one.how == "cut" and one.handled]  # their loops may count batches
    if counting and not any(one.begin > counting[0] for one in evaluations):
        blind.append(
            "no evaluation after an epoch that was cut: DDP4. A loop that counts batches, as Lightning's Trainer does, "
            "evaluates and steps epoch-wise schedulers with more --steps than an epoch has"
        )
    elif first.passes and not evaluations:
        blind.append("no evaluation: DDP4")
    if not run.uses("ddp"):
        blind.append("no DistributedDataParallel: DDP211, DDP302 and DDP701")
    if not run.uses("file"):
        blind.append("no file of the script's: DDP501 and DDP502")
    if run.others:
        blind.append(f"the script started its ranks {len(run.others) + 1} times: these figures are of the longest run")
    blind += sorted({f"the recorder failed: {one['text']}" for rank in run.ranks for one in rank.of("problem")})
    return {
        "world_size": run.world,
        "steps": steps,
        "epochs": len(training),
        "evaluations": len(evaluations),
        "loaders": len(first.of("loader")),
        "collectives": len(first.of("collective")),
        "cut": cut + (["the script, after enough steps"] if first.of("enough") else []),
        "exit_code": run.exit_code,
        "blind": blind,
    }

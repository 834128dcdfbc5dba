"""Mutation testing: change one operator, number or statement of a core module, and see whether a test fails.

`make mutants` does it for the modules of `mutants.toml`. cosmic-ray makes the mutants, and one operator of our own. A
process that has imported torch is forked for each, so a mutant takes the time of its tests; no file is changed. Of the
mutants of a module a sample is tried. It is always the same: those of the least hashes.

It fails if a mutant survives for which `mutants.toml` states no reason, or if `mutants.toml` states one for a mutant
that a test kills or that does not exist. For all modules together it also fails if fewer than 90 % are killed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import gc
import hashlib
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import tomllib
import traceback
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing import forkserver, util
from multiprocessing.connection import arbitrary_address
from pathlib import Path
from typing import Any

import parso.python.tree
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parents[1]
LEAST_KILLED = 0.9  # the others cannot be told from the module by any test, as mutants.toml explains

# Of the replacements that cosmic-ray knows for an operator, those that differ least from it. All would be ten times as
# many mutants, and the tests that kill these kill those.
_OPERATORS = [
    *(f"core/ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_FloorDiv", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul",
        "RShift_LShift", "LShift_RShift", "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitOr",
    )),
    *(f"core/ReplaceComparisonOperator_{pair}" for pair in (
        "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt",
        "Is_IsNot", "IsNot_Is",
    )),
    "core/ReplaceUnaryOperator_Delete_USub", "core/ReplaceUnaryOperator_Delete_Invert",
    "core/ReplaceUnaryOperator_Delete_Not", "core/AddNot",
    "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue", "core/ReplaceAndWithOr", "core/ReplaceOrWithAnd",
    "core/ReplaceBreakWithContinue", "core/ReplaceContinueWithBreak",
    "core/ExceptionReplacer", "core/NumberReplacer", "core/RemoveDecorator", "core/ZeroIterationForLoop",
]  # fmt: skip

# What tests import besides ddparity. ddparity itself is imported in each fork, with its mutant.
_PRELOAD = [
    *("torch._dynamo", "torch.distributed.run", "safetensors.torch", "rich.console", "typer", "cloudpickle"),
    *("hypothesis", "torchmetrics", "pyarrow.dataset", "pyarrow.parquet", "psutil"),
]


class DeleteStatement(Operator):
    """Replace with `pass`: a call whose result is not used, an assignment in place or to an attribute or item."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.parent is not None and node.parent.type == "simple_stmt" and self._has_effect(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return parso.python.tree.Keyword("pass", node.start_pos, node.get_first_leaf().prefix)

    @staticmethod
    def _has_effect(node: Any) -> bool:
        if node.type == "expr_stmt":
            target, sign = node.children[:2]
            return target.type in ("atom_expr", "power") or (sign.type == "operator" and sign != "=")
        return node.type in ("atom_expr", "power")

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class Mutant:
    """One change of a module. `was` and `becomes` are the changed lines without their indentation."""

    module: str
    line: int
    was: str
    becomes: str
    source: str


def mutants_of(module: str) -> list[Mutant]:
    """Return the mutants of a module, in the order of its lines, without those that change only text for readers."""
    source = (ROOT / "src/ddparity" / module).read_text()
    tree, meaning = get_ast(source), _meaning(source)
    found: dict[str, Mutant] = {}
    for operator in [*(get_operator(name)() for name in _OPERATORS), DeleteStatement()]:
        count = sum(len(list(operator.mutation_positions(node))) for node in ast_nodes(tree))
        for occurrence in range(count):
            mutated = mutate_code(source, operator, occurrence)
            if mutated is not None and (changed := _meaning(mutated)) != meaning:
                found.setdefault(changed, _described(module, source, mutated))
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.becomes))


def sampled(mutants: list[Mutant], count: int) -> list[Mutant]:
    """Return `count` of the mutants, or all if there are fewer; a change elsewhere in the module does not matter."""

    def draw(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{mutant.was}\n{mutant.becomes}".encode()).digest()

    return sorted(sorted(mutants, key=draw)[:count], key=lambda mutant: mutant.line)


def _described(module: str, source: str, mutated: str) -> Mutant:
    before, after = source.splitlines(), mutated.splitlines()
    changes = [c for c in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes() if c[0] != "equal"]
    _, low, high, low_after, high_after = changes[0]
    was, becomes = (
        " ".join(line.strip() for line in lines) for lines in (before[low:high], after[low_after:high_after])
    )
    return Mutant(module, low + 1, was, becomes, mutated)


_OPPOSITES: dict[type, type] = {ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.Lt: ast.GtE, ast.Gt: ast.LtE}
_OPPOSITES |= {opposite: one for one, opposite in _OPPOSITES.items()}


class _OnlyMeaning(ast.NodeTransformer):
    """Remove what is not tried: annotations, the text of errors, and checks of what always holds.

    These are `assert`, and zip's `strict`. Functions without a body are overloads. `not a == b` becomes `a != b`.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        if isinstance(node.body[0], ast.Expr) and getattr(node.body[0].value, "value", None) is Ellipsis:
            return None
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.Pass()

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        return None if node.arg == "strict" else self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        inner = node.operand
        simple = isinstance(node.op, ast.Not) and isinstance(inner, ast.Compare) and len(inner.ops) == 1
        if simple and type(inner.ops[0]) in _OPPOSITES:
            return ast.Compare(inner.left, [_OPPOSITES[type(inner.ops[0])]()], inner.comparators)
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        for call in ast.walk(node):
            if isinstance(call, ast.Call):
                call.args = [
                    ast.Constant("") if isinstance(part, (ast.JoinedStr, ast.Constant)) else part for part in call.args
                ]
        return self.generic_visit(node)


def _meaning(source: str) -> str | None:
    try:
        return ast.dump(_OnlyMeaning().visit(ast.parse(source)))
    except SyntaxError:
        return None


class _MutatedModule(SourceFileLoader):
    """Import one module from a mutant's source instead of its file."""

    def __init__(self, mutant: Mutant) -> None:
        path = ROOT / "src/ddparity" / mutant.module
        parts = ("ddparity", *Path(mutant.module).with_suffix("").parts)
        super().__init__(".".join(part for part in parts if part != "__init__"), str(path))
        self._source = mutant.source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self._source, self.path, "exec", dont_inherit=True)


class _Observer:
    """A plugin of pytest: run the quickest tests first, and those that have killed; note what failed and the times."""

    def __init__(self, cost: dict[str, float]) -> None:
        self.cost = cost
        self.seconds: dict[str, float] = {}
        self.failed: str | None = None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.cost.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid


@dataclass
class Result:
    """How the tests of a mutant ended. `killed_by` is a test, "time-out", "import", or None if all passed."""

    killed_by: str | None
    seconds: float
    tests: dict[str, float]


def run_tests(mutant: Mutant | None, tests: Sequence[str], cost: dict[str, float], timeout_s: float) -> Result:
    """Run test files on a mutant (None: on the source as it is) in a fork of this process, until the first failure.

    `cost`: the seconds of each test; the quickest run first, and a test ends that takes ten times as long as the
    slowest. `timeout_s`: for all together.
    """
    start = time.monotonic()
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        os.setsid()
        _test(mutant, tests, cost, theirs)
    os.close(theirs)
    text = b""
    try:
        while select.select([ours], [], [], max(0.0, start + timeout_s - time.monotonic()))[0]:
            part = os.read(ours, 65536)
            text += part
            if not part:
                break
        timed_out = time.monotonic() >= start + timeout_s
    finally:
        os.close(ours)
        os.killpg(pid, signal.SIGKILL)  # the group that the child has made: its ranks and its fork server, too
        os.waitpid(pid, 0)
    seconds = time.monotonic() - start
    if timed_out:
        return Result("time-out", seconds, {})
    if not text:
        return Result("import", seconds, {})
    failed, durations = json.loads(text)
    return Result(failed, seconds, durations)


def _test(mutant: Mutant | None, tests: Sequence[str], cost: dict[str, float], pipe: int) -> None:
    """Run pytest, write what failed and the times to the pipe, and end this process."""
    try:
        if mutant is not None:
            output = os.open(os.devnull, os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))  # a loop that does not end may fill the memory
            sys.meta_path.insert(0, _MutatedModule(mutant))  # type: ignore[arg-type]
        sys.modules["__main__"] = types.ModuleType("__main__")  # else each rank would import this module again
        importlib.import_module("tests.ranks")  # and ddparity
        _serve_forks()
        observer = _Observer(cost)
        preloaded = "ignore::pytest.PytestAssertRewriteWarning"  # of hypothesis, whose asserts need no rewriting
        limit = 20 + 10 * max(cost.values(), default=60)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-W", preloaded, f"--timeout={limit}"]
        code = pytest.main([*options, *tests], plugins=[observer])
        failed = observer.failed or (None if code == 0 else f"pytest: {code!r}")
        os.write(pipe, json.dumps([failed, observer.seconds]).encode())
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def _serve_forks() -> None:
    """Let the fork server of `multiprocessing` be a fork of this process, which has the mutant and torch imported."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    listener = socket.socket(socket.AF_UNIX)
    address = arbitrary_address("AF_UNIX")
    listener.bind(address)
    listener.listen()
    alive_r, alive_w = os.pipe()
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:  # a grandchild: tests/conftest.py looks for children that a test has left
            os.close(alive_w)
            with contextlib.suppress(SystemExit):
                forkserver.main(listener.fileno(), alive_r, [])
        os._exit(0)
    os.waitpid(middle, 0)
    os.close(alive_r)
    listener.close()
    util.Finalize(None, os.unlink, args=(address,), exitpriority=0)
    server._forkserver_address, server._forkserver_alive_fd = address, alive_w
    server.ensure_running = lambda: None


def try_module(module: str, tests: Sequence[str], mutants: Iterable[Mutant], verbose: bool) -> list[tuple[Mutant, str]]:
    """Print and return the mutants of a module with what killed each, "" for a survivor."""
    plain = run_tests(None, tests, {}, 600)
    if plain.killed_by is not None or not plain.tests:
        sys.exit(f"{module}: its tests fail without a mutant: {plain.killed_by}")
    print(f"{module}: its tests take {plain.seconds:.1f} s", flush=True)
    cost, ended = dict(plain.tests), []
    for mutant in mutants:
        result = run_tests(mutant, tests, cost, timeout_s=60 + 5 * plain.seconds)
        if result.killed_by in cost:
            cost[result.killed_by] /= 2  # type: ignore[index]
        ended.append((mutant, result.killed_by or ""))
        if verbose or result.killed_by in (None, "time-out"):
            what = f"killed by {result.killed_by}" if result.killed_by else "SURVIVES"
            print(f"{module}:{mutant.line}: {mutant.was}\n    {mutant.becomes}\n    {what}, {result.seconds:.1f} s")
            sys.stdout.flush()
    return ended


def main() -> None:
    table = tomllib.loads((ROOT / "tests/mutants.toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="modules or folders below src/ddparity; default: all of the table")
    parser.add_argument("--count", action="store_true", help="only count the mutants")
    parser.add_argument("--verbose", action="store_true", help="print each mutant and the test that kills it")
    parser.add_argument("--match", default="", help="only mutants that have this text in their changed lines")
    parser.add_argument("--sample", type=int, default=25, help="mutants of each module (default: 25)")
    arguments = parser.parse_args()
    chosen = {
        module: tests
        for module, tests in table["modules"].items()
        if not arguments.modules or any(module.startswith(name) for name in arguments.modules)
    }
    if not chosen:
        sys.exit(f"{arguments.modules}: no such module in tests/mutants.toml")
    os.chdir(ROOT)
    for name in () if arguments.count else _PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each fork would search these objects, and copy their memory
    reasons = {(one["module"], one["was"], one["becomes"]) for one in table.get("survivors", []) if one["reason"]}
    deselect = [f"--deselect={test}" for test in table["left_out"]]
    there: set[tuple[str, str, str]] = set()
    ended: list[tuple[Mutant, str]] = []
    for module, tests in chosen.items():
        start = time.monotonic()
        mutants = mutants_of(module)
        there.update((module, one.was, one.becomes) for one in mutants)
        if arguments.count:
            print(f"{module}: {len(mutants)} mutants")
            continue
        chosen_ones = sampled([one for one in mutants if arguments.match in one.was + one.becomes], arguments.sample)
        results = try_module(module, [*tests, f"src/ddparity/{module}", *deselect], chosen_ones, arguments.verbose)
        killed = sum(bool(by) for _, by in results)
        slow = sum(by == "time-out" for _, by in results)
        print(
            f"{module}: {killed} of {len(results)} mutants killed ({slow} by the time-out), "
            f"{time.monotonic() - start:.0f} s"
        )
        ended += results
    if not arguments.count:
        whole = not arguments.modules and not arguments.match
        _judge(ended, {key for key in reasons if key[0] in chosen}, there, LEAST_KILLED if whole else 0.0)


def _judge(
    ended: list[tuple[Mutant, str]], reasons: set[tuple[str, str, str]], there: set[tuple[str, str, str]], least: float
) -> None:
    """Print what is wrong, and end this process with 1 if anything is."""
    survivors = {(one.module, one.was, one.becomes) for one, by in ended if not by}
    tried = {(one.module, one.was, one.becomes) for one, _ in ended}
    share = sum(bool(by) for _, by in ended) / len(ended) if ended else 1.0
    print(f"{share:.1%} of {len(ended)} mutants killed")
    wrong = {
        "it survives, and tests/mutants.toml has no reason": survivors - reasons,
        "tests/mutants.toml has a reason, but a test kills it": reasons & tried - survivors,
        "tests/mutants.toml has a reason, but there is no such mutant": reasons - there,
    }
    for what, keys in wrong.items():
        for module, was, becomes in sorted(keys):
            print(f"{module}: {what}:\n    {was}\n    {becomes}")
    sys.exit(1 if any(wrong.values()) or share < least else 0)


if __name__ == "__main__":
    main()

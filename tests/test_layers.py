"""A folder imports only from folders on floors below its own; the imports themselves say so."""

from __future__ import annotations

import ast
import importlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import ddparity

SOURCE = Path(ddparity.__file__).parent

FLOORS = {
    0: ["errors", "compat", "system"],
    1: ["runtime", "comm"],
    2: ["data", "batchnorm", "checkpoint", "launcher"],
    3: ["gradients", "inference", "testing"],
    4: ["task"],
    5: ["auditing", "parity", "scaling"],
    6: [""],  # the public names
    7: ["cli", "__main__"],
}
FLOOR_OF = {folder: floor for floor, folders in FLOORS.items() for folder in folders}
# Pure functions: no torch.distributed, so that tests can run through all of their inputs.
PURE = ("data.lengths", "data.orders", "data.permutation", "data.plan", "data.rng", "data.sizes")
PER_TRAINING = ("errors", "compat", "system", "runtime", "comm", "data", "batchnorm", "gradients", "task")
# These need what only some machines have.
NEEDS_TRITON = "batchnorm.triton_kernels"


def _name(path: Path) -> str:
    """A file's module, without "ddparity."; "" for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def _at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: none of functions, or for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        later = isinstance(node, (ast.FunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        )
        if not later:
            yield node
            yield from _at_once(node)


def _imports(module: str, nodes: Callable[[ast.AST], Iterable[ast.AST]] = ast.walk) -> set[str]:
    """The modules of ddparity that a module imports, anywhere in its file or in the `nodes` of its tree."""
    path = PATHS[module]
    inside = path.relative_to(SOURCE).parent.parts
    found = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            named = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = inside[: len(inside) - node.level + 1] + named
            elif named[:1] == ("ddparity",):
                base = named[1:]
            else:
                continue
            for alias in node.names:
                whole = ".".join((*base, alias.name))
                if not (SOURCE / Path(*base) / f"{alias.name}.pyi").exists():  # a C extension
                    found.add(whole if whole in PATHS else ".".join(base))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name.removeprefix("ddparity").removeprefix(".") for name in names if name.startswith("ddparity")}
    return found - {module}


def _folder(module: str) -> str:
    return module.partition(".")[0]


def test_every_folder_has_a_floor() -> None:
    assert {_folder(module) for module in PATHS} == set(FLOOR_OF)


def test_a_folder_imports_only_from_floors_below() -> None:
    wrong = [
        f"{module} (floor {FLOOR_OF[_folder(module)]}) imports {name} (floor {FLOOR_OF[_folder(name)]})"
        for module in PATHS
        for name in _imports(module)
        if _folder(name) != _folder(module)
        and FLOOR_OF[_folder(name)] >= FLOOR_OF[_folder(module)]
        and module != "__main__"
    ]
    assert not wrong


def test_the_diagnosis_imports_nothing_from_the_launcher_around_it() -> None:
    inside = [module for module in PATHS if module.startswith("launcher.diagnosis")]
    assert inside
    found = {name for module in inside for name in _imports(module) if _folder(name) == "launcher"}
    assert all(name.startswith("launcher.diagnosis") for name in found)


def test_no_module_needs_itself() -> None:
    needs = {module: _imports(module) for module in PATHS}

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            new = needs[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    assert not [module for module in PATHS if module in reached(module)]


def test_importing_the_package_imports_no_more_than_a_training_needs() -> None:
    """What starts processes, predicts or saves is imported when it is first used; so are the libraries for that."""
    seen, waiting = {""}, [""]
    others: set[str] = set()
    while waiting:
        module = waiting.pop()
        parents = {name.rpartition(".")[0] for name in _imports(module, _at_once)}
        new = {name for name in _imports(module, _at_once) | parents if name in PATHS} - seen
        seen |= new
        waiting += new
        for node in _at_once(ast.parse(PATHS[module].read_text())):
            if isinstance(node, ast.Import):
                others |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                others.add(node.module.partition(".")[0])
    assert {_folder(module) for module in seen} <= {"", *PER_TRAINING}
    assert "gradients.window" in seen and "runtime.world" in seen
    assert others - sys.stdlib_module_names <= {"torch", "numpy"}


def test_plans_and_random_streams_know_no_process_group() -> None:
    for module in PURE:
        assert "torch.distributed" not in PATHS[module].read_text()
        assert _imports(module) <= {*PURE, "compat"}


@pytest.mark.parametrize("module", [module for module in PATHS if module not in ("", "__main__", NEEDS_TRITON)])
def test_importing_a_module_gives_the_module(module: str) -> None:
    """`import ddparity.x.y as z` looks each name up in its package, where a function of that name would hide it."""
    importlib.import_module(f"ddparity.{module}")
    found: object = ddparity
    for name in module.split("."):
        found = getattr(found, name)
    assert isinstance(found, types.ModuleType)


def test_no_module_of_the_package_itself_bears_a_public_name() -> None:
    assert not {_folder(module) for module in PATHS} & set(ddparity.__all__)


def test_the_test_sees_relative_imports() -> None:
    assert "data.sizes" in _imports("inference.source")
    assert "errors" in _imports("launcher.run")
    assert "launcher" in _imports("parity.verify")

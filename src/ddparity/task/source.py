"""What a Python file has, without running it: a script that has no Task must not begin to train."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path


def path_of(source: str) -> Path | None:
    """Return the Python file of "file.py" or "package.module"; None if there is none, or none that is not compiled.

    Of a module inside of a package, the package is imported.
    """
    path = Path(source)
    if path.suffix == ".py" or "/" in source:
        return path if path.is_file() else None
    try:
        spec = importlib.util.find_spec(source)
    except (ImportError, ValueError, AttributeError):
        return None
    origin = None if spec is None or spec.origin is None else Path(spec.origin)
    return origin if origin is not None and origin.suffix == ".py" and origin.is_file() else None


def check_source(path: Path, source: str, name: str) -> None:
    """Check that a file can have the Task or function of this name, or any Task where `name` is empty.

    Raises:
        ValueError: it cannot.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return  # the import tells where
    if name:
        bound = _bound(tree)
        if name not in bound and not bound & {"*", "__getattr__"}:
            raise ValueError(f"{source} has no {name!r} at its top level, so it was not run")
    elif not _may_have_task(path, tree, {path.resolve()}):
        functions = [one.name for one in tree.body if isinstance(one, ast.FunctionDef)]
        hint = f"; or a function to verify, as in {source}:{functions[-1]}" if functions else ""
        raise ValueError(
            f"{source} has no Task, and was not run: give it a ddparity.Task, or a function task() that returns one, "
            f"or name it, as in {source}:NAME, if it comes from a library{hint}"
        )


def _bound(tree: ast.AST) -> set[str]:
    """Return the names that a module may bind outside of its functions and classes; "*" if others may be, too."""
    found: set[str] = set()
    waiting = list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
            found.update(name for part in ast.walk(node) if isinstance(part, ast.Global) for name in part.names)
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Name) and node.id in ("globals", "exec", "setattr", "vars"):
            found.add("*")
        waiting += ast.iter_child_nodes(node)
    return found


def _may_have_task(path: Path, tree: ast.Module, seen: set[Path]) -> bool:
    """Return True if a file may have a Task.

    It mentions one, calls something with "task" in its name, has a function `task`, or imports from such a file. Of
    installed libraries this is not known; a name is needed then.
    """
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and "Task" in _name(node):
            return True
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
            if "*" in names or any("task" in name.lower() for name in names):
                return True
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "task":
            return True
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            names = [_name(one).lower() for one in (node.value.func, *node.targets)]
            if any("task" in name for name in names):
                return True
    return any(_import_may(path, name, seen) for name in _imported(tree))


def _imported(tree: ast.Module) -> list[str]:
    """Return the modules that a file imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return names


def _import_may(path: Path, name: str, seen: set[Path]) -> bool:
    """Return True if a module that a file imports may have a Task that the file then has, too."""
    top = name.partition(".")[0]
    beside = path.parent.joinpath(*name.split("."))
    for other in (beside.with_suffix(".py"), beside / "__init__.py"):
        if other.is_file():
            if other.resolve() in seen:
                return False
            seen.add(other.resolve())
            try:
                return _may_have_task(other, ast.parse(other.read_bytes()), seen)
            except SyntaxError:
                return True
    if top == "ddparity" or top in sys.stdlib_module_names or (path.parent / top).is_dir():
        return False
    try:
        spec = importlib.util.find_spec(top)  # imports nothing
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return True  # the file may put another folder into sys.path
    places = [spec.origin or "", *(spec.submodule_search_locations or ())]
    return not any("-packages" in part for place in places for part in Path(place).parts)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""

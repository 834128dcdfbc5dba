"""What a Python file has, without running it: a script that has no Task must not begin to train."""

from __future__ import annotations

import ast
import importlib.util
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
        hint = f", or a function to verify, as in {source}:{functions[-1]}" if functions else ""
        raise ValueError(
            f"{source} has no Task, and was not run: give it a ddparity.Task, or a function task() that returns "
            f"one{hint}"
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

    It mentions one, or calls something with "task" in its name, has a function `task`, or imports from such a file that
    is beside it.
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
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module] if node.module else [alias.name for alias in node.names]
    for name in names:
        beside = path.parent.joinpath(*name.split("."))
        for other in (beside.with_suffix(".py"), beside / "__init__.py"):
            if other.is_file() and other.resolve() not in seen:
                seen.add(other.resolve())
                try:
                    if _may_have_task(other, ast.parse(other.read_bytes()), seen):
                        return True
                except SyntaxError:
                    return True
    return False


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""

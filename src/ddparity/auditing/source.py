"""Read the script's source, for what its records cannot tell. What rests on it is likely, not proved."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_WORLD = re.compile(
    r"(?:(?<!/)/=?|\*=?|\b(?:div|mul|true_divide)_?\()\s*\(?\s*(?:float\(\s*)?(?:\w+\.)*"
    r"(?:\w*world\w*|num_processes|n_?procs?|num_gpus|n_?gpus?|num_replicas)\b",
    re.IGNORECASE,
)
_TRANSPOSES = ("stack", "T", "mT", "t", "transpose", "permute", "scatter_", "index_copy_")
_LABELS = ("tensors", "targets", "labels", "target", "y")
_LABEL = re.compile(r"(?:\w+_)?(?:y|ys|labels?|targets?|truth)(?:_\w+)?", re.IGNORECASE)  # a variable's name
_COMPARISONS = ("eq", "ne", "equal", "array_equal", "accuracy_score", "f1_score")
_KEEPS_ORDER = ("view_as", "view", "reshape", "flatten", "squeeze", "cpu", "numpy", "to", "long", "float")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def parsed(site: str | Path | None) -> ast.Module:
    """Return the syntax tree of the file of a site, file:line, or of a path; an empty one where it cannot be read."""
    path = site if isinstance(site, Path) else Path(str(site).rpartition(":")[0])
    try:
        return ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def divides_by_world(site: str | None, after: int = 0) -> bool:
    """Return whether a line, or one of the 12 before or `after` it, multiplies or divides by the number of ranks."""
    lines = _lines(site)
    if not lines:
        return False
    near = "\n".join(lines[max(0, _line(site) - 12) : _line(site) + after])
    names = "|".join(map(re.escape, _world_names(parsed(site))))
    return _WORLD.search(near) is not None or (names != "" and re.search(rf"[*/]=?\s*(?:{names})\b", near) is not None)


def divides_gradients(site: str | None) -> bool:
    """Return whether a line of a file scales what its name says is a gradient by the number of ranks."""
    return any("grad" in line and _WORLD.search(line) for line in _lines(site))


def _lines(site: str | None) -> list[str]:
    """Return the lines of the file of a site; none where it cannot be read."""
    try:
        return Path(str(site).rpartition(":")[0]).read_text().splitlines()
    except (OSError, ValueError):
        return []


def _world_names(tree: ast.Module) -> set[str]:
    """Return the names to which a file gives the number of ranks, or a share that is a constant over that number."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts) if several else [(target, value)]  # type: ignore[attr-defined]
            found |= {
                one.id
                for one, of in pairs
                if isinstance(one, ast.Name) and (_called(of) == "get_world_size" or any(map(_is_share, ast.walk(of))))
            }
    return found


def _is_share(node: ast.AST) -> bool:
    """Return whether a node divides a constant by the number of ranks."""
    over = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.left, ast.Constant)
    return over and _WORLD.search(f"/ {ast.unparse(node.right)}") is not None  # type: ignore[attr-defined]  # see above


def trims(site: str | None) -> bool:
    """Return whether a file cuts a sequence to a length, `outputs[: len(data)]`, or Accelerate does.

    Also where it compares with the length of a data set, or pairs a result with whole labels by `zip`.
    """
    for node in ast.walk(parsed(site)):
        if isinstance(node, ast.Compare) and any(map(_is_length, (node.left, *node.comparators))):
            return True
        paired = node.args if isinstance(node, ast.Call) and _called(node) == "zip" else []
        if any(isinstance(one, ast.Name) and _LABEL.fullmatch(one.id) for one in paired):
            return True
        if isinstance(node, ast.Delete) and any(
            isinstance(one, ast.Subscript) and isinstance(one.slice, ast.Slice) for one in node.targets
        ):
            return True
        if isinstance(node, ast.Attribute) and node.attr == "gather_for_metrics":
            return True
        cut = node.slice if isinstance(node, ast.Subscript) else None
        if (
            isinstance(cut, ast.Slice)
            and (cut.lower is None or (isinstance(cut.lower, ast.Constant) and cut.lower.value == 0))
            and isinstance(cut.upper, (ast.Call, ast.Name, ast.Attribute, ast.BinOp))
        ):
            return True
        if _method(node) in ("unique", "scatter_", "index_copy_"):
            return True
    return False


def divides_by_length(*sites: str | None) -> bool:
    """Return whether a function around one of the lines divides by the length of a data set, `len(loader.dataset)`.

    Not one that also compares the length or subtracts from it: it may leave padding out by hand.
    """
    divides = False
    for site in sites:
        function = _function(parsed(site), _line(site)) if site is not None else None
        nodes = list(ast.walk(function)) if function is not None else []
        assigned = [node for node in nodes if isinstance(node, ast.Assign) and _is_length(node.value)]
        names = {ast.unparse(target) for node in assigned for target in node.targets}

        def has_length(*parts: ast.AST, names: set[str] = names) -> bool:
            inner = [one for part in parts for one in ast.walk(part) if isinstance(one, ast.expr)]
            return any(_is_length(one) or ast.unparse(one) in names for one in inner)

        for node in nodes:
            if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Sub, ast.Mod)) and has_length(node):
                return False
            if (isinstance(node, ast.Compare) or _called(node) in ("min", "clamp", "where")) and has_length(node):
                return False
            divisor = getattr(node, "right", getattr(node, "value", None))
            if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Div) and divisor is not None:
                divides = divides or has_length(divisor)
    return divides


def _is_length(node: ast.AST) -> bool:
    """Return whether a node is the length of what its name says is a data set."""
    if _called(node) != "len" or not isinstance(node, ast.Call) or len(node.args) != 1:
        return False
    name = ast.unparse(node.args[0]).rpartition(".")[2].lower()
    return re.search("data|set|test|val|samples", name) is not None and re.search("loader|batch", name) is None


def compares_by_order(site: str | None) -> bool:
    """Return whether a file reads a data set's labels as a whole, and has no line that may restore the order."""
    tree, reads = parsed(site), _compares_labels(site)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in _TRANSPOSES:
                return False
            of_itself = isinstance(node.value, ast.Name) and node.value.id == "self"
            reads = reads or (node.attr in _LABELS and not of_itself)
        elif (
            isinstance(node, ast.Slice)
            and node.step is not None
            and not isinstance(node.step, (ast.Constant, ast.UnaryOp))
            and isinstance(node.lower, (ast.Name, ast.Attribute, ast.Call))
        ):
            return False  # it reads a shard
    return reads


def _compares_labels(site: str | None) -> bool:
    """Return whether the function of a line, or one that calls it, compares with labels of no loop."""
    tree = parsed(site)
    own = _function(tree, _line(site))
    name = getattr(own, "name", None)
    others = [n for n in ast.walk(tree) if isinstance(n, _FUNCTIONS) and any(_called(c) == name for c in ast.walk(n))]
    for function in (own, *(others if name is not None else [])):
        nodes = list(ast.walk(function)) if function is not None else []
        loops = [node for node in nodes if isinstance(node, (ast.For, ast.While))]
        bound = {one for loop in loops for node in ast.walk(loop) for one in _changed(node)}
        bound |= {one for node in nodes if _picks(node) for one in _changed(node)}
        bound |= {one for node in nodes if isinstance(node, ast.comprehension) for one in _names(node.target)}
        for node in nodes:
            names = {one.id for one in map(_kept_order, _operands(node)) if isinstance(one, ast.Name)}
            if any(_LABEL.fullmatch(one) for one in names - bound):
                return True
    return False


def _operands(node: ast.AST) -> list[ast.expr]:
    """Return what a node compares row by row, as an operator, a method or a function; none if it compares nothing."""
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Call) and _called(node) in _COMPARISONS:
        return [*([node.func.value] if isinstance(node.func, ast.Attribute) else []), *node.args]
    return []


def _kept_order(node: ast.expr) -> ast.expr:
    """Return the value without the calls around it that leave its rows in their order."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _KEEPS_ORDER:
        node = node.func.value
    return node


def _picks(node: ast.AST) -> bool:
    """Return whether an assignment takes a value by an index that is computed: perhaps labels in another order."""
    value = node.value if isinstance(node, ast.Assign) else None
    return isinstance(value, ast.Subscript) and not isinstance(value.slice, (ast.Slice, ast.Constant))


def reads_in_loop(backward: str) -> str | None:
    """Return the line of a .item() that is called for each call of a backward, a site: beside it, not under an `if`.

    Beside it: in the innermost loop around it, or in its function where no loop in it is around the backward.
    """
    file, _, line = backward.rpartition(":")
    for around in ast.walk(parsed(backward)):
        if not isinstance(around, (ast.For, ast.While, *_FUNCTIONS)):
            continue
        own = [n for n in _unless(around, (ast.For, ast.While, *_FUNCTIONS)) if _method(n) == "backward"]
        if any(isinstance(n, ast.Call) and _spans(n, int(line)) for n in own):
            for n in _unless(around, (ast.For, ast.While, ast.If, ast.IfExp, *_FUNCTIONS)):
                if isinstance(n, ast.Call) and _method(n) == "item":
                    return f"{file}:{n.lineno}"
    return None


def _unless(node: ast.AST, kinds: tuple[type[ast.AST], ...]) -> Iterator[ast.AST]:
    """Yield the nodes below a node; of statements of these kinds, the iterable or the test alone."""
    for one in ast.iter_child_nodes(node):
        inside = getattr(one, "test", getattr(one, "iter", None)) if isinstance(one, kinds) else one
        if inside is not None:
            yield inside
            yield from _unless(inside, kinds)


def is_unrelated(loop: str | None, call: str | None) -> bool:
    """Return whether nothing that the loop at one line computes can reach the call at another.

    Both are sites. The call must be in the function of the loop, or in one that calls that by its name; elsewhere,
    and for what is kept in attributes, the answer is False.
    """
    tree = parsed(loop)
    if str(loop).rpartition(":")[0] != str(call).rpartition(":")[0]:
        return False
    around, at = _function(tree, _line(loop)), _function(tree, _line(call))
    for_loop = _innermost(around, _line(loop))
    if around is None or at is None or for_loop is None:
        return False
    modules = _imported(tree)
    names = {one for node in ast.walk(for_loop) for one in _changed(node)} - modules
    first = for_loop.lineno
    if at is not around:
        if not isinstance(around, _FUNCTIONS):
            return False
        assigned = [
            node
            for node in ast.walk(at)
            if isinstance(node, ast.Assign) and any(_called(n) == around.name for n in ast.walk(node.value))
        ]
        names = {one for node in assigned for one in _changed(node)}
        if not names:
            return False
        first = min(node.lineno for node in assigned)
    calls = [node for node in ast.walk(at) if isinstance(node, ast.Call) and _spans(node, _line(call))]
    used = {one for node in calls for one in _names(*_read(node))} - modules
    between = range(first, _line(call) + 1) or range(sys.maxsize)  # the call of the next turn of an outer loop
    return bool(used) and not used & _reached(at, names, modules, between)


def _reached(function: ast.AST, names: set[str], modules: set[str], lines: range) -> set[str]:
    """Return the names that may hold something of `names`, by the assignments of a function in these lines."""
    found, grown = set(names), True
    while grown:
        before = len(found)
        for node in ast.walk(function):
            if getattr(node, "lineno", -1) in lines and _names(*_read(node)) & found:
                found |= _changed(node) - modules
        grown = len(found) > before
    return found


def _changed(node: ast.AST) -> set[str]:
    """Return the names that a statement binds or may change: its targets, and the object of a method."""
    if isinstance(node, ast.Assign):
        return _names(*(one.value if isinstance(one, ast.Subscript) else one for one in node.targets))
    if isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For, ast.NamedExpr)):
        return _names(node.target)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        return _names(node.value.func.value)
    return set()


def _read(node: ast.AST) -> list[ast.AST]:
    """Return what a statement or call reads, without the body of a loop."""
    if isinstance(node, ast.For):
        return [node.iter]
    if isinstance(node, ast.Call):
        return [*node.args, *(one.value for one in node.keywords)]
    if isinstance(node, ast.Expr):
        return _read(node.value)
    value = getattr(node, "value", None) if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else None
    return [value] if value is not None else []


def _imported(tree: ast.Module) -> set[str]:
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}


def _names(*nodes: ast.AST) -> set[str]:
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}


def _function(tree: ast.Module, line: int) -> ast.AST | None:
    """Return the innermost function around a line; the module where there is none."""
    around = [n for n in ast.walk(tree) if isinstance(n, _FUNCTIONS) and _spans(n, line)]
    return max(around, key=lambda n: n.lineno, default=None) or (tree if tree.body else None)


def _innermost(function: ast.AST | None, line: int) -> ast.For | None:
    """Return the loop that begins at a line."""
    found = [] if function is None else ast.walk(function)
    return next((n for n in found if isinstance(n, ast.For) and n.lineno <= line <= (n.iter.end_lineno or 0)), None)


def _spans(node: ast.stmt | ast.expr, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _line(site: str | None) -> int:
    return int(str(site).rpartition(":")[2])


def _method(node: ast.AST) -> str | None:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    return node.func.attr if called else None  # type: ignore[attr-defined]  # it is a call, see above


def _called(node: ast.AST) -> str | None:
    """Return the name of the function or method that a node calls."""
    if not isinstance(node, ast.Call):
        return None
    return node.func.id if isinstance(node.func, ast.Name) else _method(node)

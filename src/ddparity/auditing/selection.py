"""What the user wants to see: --select and --ignore, comments on lines, and [tool.ddparity.audit] in pyproject.toml."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from .catalogue import CATALOGUE, Finding

_COMMENT = re.compile(r"#\s*ddparity:\s*ignore(?:\[([\w\s,]*)\])?", re.IGNORECASE)
_OPTIONS = {"select", "ignore", "nproc", "steps"}


def read_options(script: Path) -> dict[str, object]:
    """Return [tool.ddparity.audit] of the nearest pyproject.toml above the script; an empty dict without one.

    Raises:
        ValueError: the file is not TOML, or the table has an unknown name or a value of a wrong type.
    """
    for folder in script.resolve().parents:
        path = folder / "pyproject.toml"
        if not path.is_file():
            continue
        try:
            table = tomllib.loads(path.read_text()).get("tool", {}).get("ddparity", {}).get("audit", {})
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        for name, value in table.items():
            if name not in _OPTIONS:
                raise ValueError(f"{path}: [tool.ddparity.audit] has no {name}: it has {', '.join(sorted(_OPTIONS))}")
            listed = isinstance(value, list) and all(isinstance(one, str) for one in value)
            if not (listed if name in ("select", "ignore") else type(value) is int and value >= 1):
                raise ValueError(f"{path}: [tool.ddparity.audit] {name} = {value!r}: give a list of codes or a number")
        return dict(table)
    return {}


def check_prefixes(prefixes: Iterable[str], option: str) -> tuple[str, ...]:
    """Return the prefixes of codes, each of which must begin a code of the catalogue."""
    found = tuple(one.strip().upper() for one in prefixes if one.strip())
    for one in found:
        if not any(code.startswith(one) for code in CATALOGUE):
            raise ValueError(f"{option} {one}: no code begins so; `ddparity audit --list` shows them")
    return found


def chosen(findings: Iterable[Finding], select: Sequence[str], ignore: Sequence[str]) -> list[Finding]:
    """Return the findings that the user wants to see, what costs the model most first."""
    kept = [
        one
        for one in findings
        if (not select or one.code.startswith(tuple(select)))
        and not (ignore and one.code.startswith(tuple(ignore)))
        and not _silenced(one)
    ]
    severities = ("error", "warning", "note")
    return sorted(kept, key=lambda one: (severities.index(one.severity), CATALOGUE[one.code].cost, one.file, one.line))


def _silenced(one: Finding) -> bool:
    return any(_says(file, line, one.code) for file, line in ((one.file, one.line), (one.cause_file, one.cause_line)))


def _says(file: str, line: int, code: str) -> bool:
    try:
        text = Path(file).read_text()
        first, last = _statement(text, line)
    except (OSError, ValueError, SyntaxError):
        return False
    for match in map(_COMMENT.search, text.splitlines()[max(0, first - 1) : last]):
        listed = match[1] if match is not None else ""
        if listed is None or any(code.startswith(p.strip().upper()) for p in listed.split(",") if p.strip()):
            return True
    return False


def _statement(text: str, line: int) -> tuple[int, int]:
    """Return the first and the last line of the statement at a line; of one with a body, those of its head."""
    around = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    if not around:
        return line, line
    inner = max(around, key=lambda node: node.lineno)
    body = getattr(inner, "body", None)
    return inner.lineno, body[0].lineno - 1 if body else inner.end_lineno or line

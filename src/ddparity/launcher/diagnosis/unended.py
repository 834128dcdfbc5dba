"""What the agent reads of a rank beside its collectives: a script that has ended, and an exception on its way."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...system import proc
from .flight import ask
from .instruments import ENDED, STATE_HANDLER
from .limits import ANSWER, SMALL, read_file, read_json
from .stacks import Frame, is_users
from .usage import runs

_ANSWER_S = 1.0  # for a rank to answer, which needs its GIL


@dataclass(frozen=True)
class Ended:
    """The script of a rank has ended, at `at_s` (seconds since 1970), but its process runs.

    `keeps`: what keeps it. `well`: its exit code will be 0.
    """

    at_s: float
    keeps: str
    well: bool


def read_ended(pid: int, folder: Path) -> Ended | None:
    """Return what keeps the process of a rank whose script has ended; None if it has not ended."""
    try:
        content = read_json(read_file(folder / ENDED, SMALL))
        threads = [
            f"its thread {name}" + _at(where)
            for number, name, where in content["threads"]
            if proc(pid, "task", int(number)).exists()
        ]
        children = [
            f"its child process {int(child)} ({name})" for child, name in content["children"] if runs(int(child))
        ]
        return Ended(float(content["at"]), ", ".join((threads + children)[:3]), bool(content["well"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _at(where: list[list[str]]) -> str:
    frames = [Frame(str(file), int(line), str(function)) for file, line, function in where]
    frame = next(filter(is_users, frames), frames[0] if frames else None)
    return f" ({os.path.basename(frame.file)}:{frame.line}, in {frame.function})" if frame is not None else ""


@dataclass(frozen=True)
class Handled:
    """An exception that a rank handles. `leaves`: it is on its way out: a finally block or a context manager runs."""

    message: str
    traceback: str
    leaves: bool


def ask_exceptions(folders: Mapping[int, Path]) -> dict[int, Handled]:
    """Return the exceptions that the main threads of ranks handle now. A rank that holds its GIL does not answer."""
    found = {}
    for rank, text in ask(folders, STATE_HANDLER, _ANSWER_S).items():
        try:
            content = read_json(text, ANSWER)["exception"]
            if content is not None:
                leaves = _leaves(str(content["file"]), int(content["line"]))
                found[rank] = Handled(str(content["message"]), str(content["traceback"]), leaves)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _leaves(file: str, line: int) -> bool:
    """Return whether an exception that is handled at this line goes on afterwards.

    It does in a finally block, at the end of a with block, and in an except block that raises.
    """
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    leaves = False
    for node in ast.walk(tree):  # outer blocks come first: the innermost one decides
        if isinstance(node, ast.Try):
            if _holds(node.finalbody, line):
                leaves = True
            elif handler := next((one for one in node.handlers if _holds(one.body, line)), None):
                raises = [one for one in ast.walk(handler) if isinstance(one, ast.Raise)]
                leaves = any(one.lineno > line for one in raises)
        elif isinstance(node, (ast.With, ast.AsyncWith)) and node.lineno <= line < node.body[0].lineno:
            leaves = True
    return leaves


def _holds(body: list[ast.stmt], line: int) -> bool:
    return bool(body) and body[0].lineno <= line <= (body[-1].end_lineno or body[-1].lineno)

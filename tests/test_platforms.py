"""ddparity where there is no Linux, as far as one can pretend it, and with other versions of Python."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layers import PATHS, SOURCE

ROOT = SOURCE.parent.parent
_ONLY_SOMEWHERE = re.compile(
    r"platform|sched_\w+|SCHED_\w+|AF_UNIX|prctl|O_(?:CLOEXEC|NOFOLLOW|DIRECTORY|NONBLOCK)|preadv|pwrite"
)
_SEAM = "system"
# A filter of the files that an audited script writes, and a program of the shell that asks whether there is /proc.
_OTHER_TEXTS = ("auditing.recording.files", "launcher.ending")


def _uses(module: str) -> list[str]:
    """What a module asks of one operating system alone."""
    tree = ast.parse(PATHS[module].read_text())
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name in ("fcntl", "termios", "resource", "pwd", "grp")]
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner != "system" and _ONLY_SOMEWHERE.fullmatch(node.attr):
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            found += ["/proc"] * ("/proc" in node.value and module not in _OTHER_TEXTS)
    return found


def test_one_module_asks_for_what_only_some_systems_have() -> None:
    assert {"fcntl", "termios", "os.sched_getaffinity", "socket.AF_UNIX"} <= set(_uses(_SEAM))
    wrong = {module: uses for module in PATHS if module != _SEAM and (uses := _uses(module))}
    assert not wrong, f"put it into {_SEAM}.py"


def test_import_and_one_process_work_without_linux() -> None:
    """tests/pretend.py trains, saves, predicts and launches as if on macOS and on Windows."""
    command = [sys.executable, "-W", "error", "-m", "tests.pretend", "darwin", "win32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r"(darwin|win32): ", line)]
    mac, windows = lines
    assert re.match(r"darwin: code 0, \d+ modules, ddparity [\d.]+: ddparity: darwin is not Linux: a hang is ", mac)
    assert re.match(
        r"win32: code 2, \d+ modules, ddparity [\d.]+; launch: DDParityError: ddparity: win32 has no", windows
    )
    assert "start the script with torchrun" in windows


_LOOK = """
import pathlib, sys, warnings
warnings.simplefilter("error")
for path in map(pathlib.Path, sys.argv[1:]):
    for file in path.rglob("*.py"):
        compile(file.read_text(), str(file), "exec", dont_inherit=True)
print(*sys.stdlib_module_names)
"""


def _interpreters() -> list[str]:
    """The Pythons of this machine that pyproject.toml allows, beside this one."""
    found = {}
    for folder in (Path.home() / ".pyenv" / "versions", Path("/usr/bin"), Path("/usr/local/bin")):
        for path in [*folder.glob("*/bin/python3.*"), *folder.glob("python3.*")]:
            match = re.fullmatch(r"python3\.(\d+)", path.name)
            if match and 11 <= int(match[1]) != sys.version_info.minor:
                found.setdefault(match[1], str(path))
    return list(found.values())


@pytest.mark.parametrize("python", _interpreters(), ids=lambda path: Path(path).name)
def test_another_python_reads_the_source_and_has_its_modules(python: str) -> None:
    command = [python, "-c", _LOOK, str(SOURCE), str(ROOT / "examples")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    text = "".join(path.read_text() for path in PATHS.values())
    found = re.findall(r"^ *(?:from (\w+)[\w.]* import |import (\w+)[\w.]*(?: as \w+)?$)", text, re.MULTILINE)
    ours = {one or other for one, other in found} & set(sys.stdlib_module_names)
    assert len(ours) > 30
    assert ours <= set(done.stdout.split())


def test_the_versions_of_python_are_the_same_everywhere() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert len(re.findall(r'python_version = "3.11"|target-version = "py311"|requires-python = ">=3.11"', text)) == 3
    assert shutil.which("python3.11") or sys.version_info >= (3, 11)

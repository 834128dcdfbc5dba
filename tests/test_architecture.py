"""The page on the architecture names what is there: the floors, the picture, each file and function."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from docs import architecture

from tests.test_layers import FLOORS, SOURCE

DOCS = Path(architecture.__file__).parent
PAGE = (DOCS / "architecture.md").read_text()
FUNCTIONS = re.findall(r"`([\w/]+\.py)`\s+`([\w.]+)`", PAGE)
FILES = re.findall(r"`([\w/]+(?:\.py|/))`", PAGE)


def _names(path: Path) -> set[str]:
    """Return the functions and classes of a file, and the methods of its classes as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return found


def test_the_floors_are_those_of_the_layers() -> None:
    floors = [[folder or "__init__" for folder in folders if folder != "__main__"] for folders in FLOORS.values()]
    assert [sorted(folders) for folders in architecture.floors()] == [sorted(folders) for folders in floors]


def test_the_picture_is_that_of_the_imports() -> None:
    assert (DOCS / "architecture.svg").read_text() == architecture.picture(), "run `make docs-picture`"


@pytest.mark.parametrize(("file", "function"), sorted(set(FUNCTIONS)))
def test_each_function_named_exists(file: str, function: str) -> None:
    assert function in _names(SOURCE / file)


def test_each_file_and_folder_named_exists() -> None:
    assert not [name for name in FILES if not (SOURCE / name).exists() and not (DOCS.parent / name).exists()]


def test_the_test_finds_what_the_page_names() -> None:
    assert len(FUNCTIONS) > 40
    assert {file.partition("/")[0] for file, _ in FUNCTIONS} >= {
        "data",
        "gradients",
        "inference",
        "checkpoint",
        "launcher",
    }

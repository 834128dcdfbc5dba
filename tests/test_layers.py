"""A module imports only from layers below its own, read off the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import ddparity

SOURCE = Path(ddparity.__file__).parent

LAYERS = {
    0: [
        "errors", "compat", "files", "environment", "network", "roster", "meeting", "scheduling", "world", "order",
        "marks", "console",
    ],
    1: [
        "permutation", "plan", "seeds", "random_state", "batches", "trees", "sampling",
        "summation", "reduction", "strict", "batchnorm", "replicate", "accumulate", "wire", "gather", "fingerprint",
        "preemption",
    ],
    2: ["keyed", "loader", "predict", "statefile", "checkpoint"],
    3: ["task", "train", "verify"],
    4: ["launch", "verification", "cli", "__main__", "__init__"],
}  # fmt: skip
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
# Pure functions, testable to exhaustion: no torch.distributed.
PURE = ("permutation", "plan", "seeds")


def _imports(path: Path) -> list[str]:
    """The top modules of ddparity that a file imports."""
    inside = path.relative_to(SOURCE).parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:  # relative
                base = list(inside[: len(inside) - node.level])
                names = parts or [alias.name for alias in node.names]
                found.append((base + names)[0])
            elif parts[:1] == ["ddparity"]:
                found.append(parts[1] if len(parts) > 1 else "__init__")
        elif isinstance(node, ast.Import):
            found += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ddparity.")]
    return found


def _module(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


FILES = sorted(SOURCE.rglob("*.py"))


def test_every_module_has_a_layer() -> None:
    assert {_module(path) for path in FILES} == set(LAYER_OF)


def test_no_module_imports_from_a_layer_above() -> None:
    wrong = [
        f"{_module(path)} (layer {LAYER_OF[_module(path)]}) imports {name} (layer {LAYER_OF[name]})"
        for path in FILES
        for name in _imports(path)
        if LAYER_OF[name] > LAYER_OF[_module(path)]
    ]
    assert not wrong


def test_no_two_modules_import_each_other() -> None:
    edges = {_module(path): set(_imports(path)) - {_module(path)} for path in FILES if _module(path) != "__init__"}

    def reaches(module: str, target: str, seen: frozenset[str] = frozenset()) -> bool:
        return any(
            name == target or (name not in seen and reaches(name, target, seen | {name}))
            for name in edges.get(module, ())
        )

    assert not [module for module in edges if reaches(module, module)]


def test_the_plan_knows_no_process_group() -> None:
    for name in PURE:
        text = (SOURCE / f"{name}.py").read_text()
        assert "torch.distributed" not in text
        assert set(_imports(SOURCE / f"{name}.py")) <= {*PURE, "compat"}


def test_the_test_sees_relative_imports(tmp_path: Path) -> None:
    assert "plan" in _imports(SOURCE / "predict" / "source.py")
    assert "errors" in _imports(SOURCE / "launch" / "run.py")
    assert {"seeds", "permutation"} <= set(_imports(SOURCE / "plan.py"))

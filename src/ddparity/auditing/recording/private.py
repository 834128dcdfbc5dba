"""ddparity's modules of the lowest floor, in processes that do not import ddparity."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any


def private() -> Any:
    """Return compat.py, by way of which we use what torch keeps private."""
    return _loaded("compat")


def system() -> Any:
    """Return system.py, which has what only some systems have."""
    return _loaded("system")


@functools.cache
def _loaded(name: str) -> Any:
    """Return a module. Without ddparity it is loaded by its path, under another name."""
    for known in (f"ddparity.{name}", f"_ddparity_{name}"):
        if known in sys.modules:
            return sys.modules[known]
    spec = importlib.util.spec_from_file_location(f"_ddparity_{name}", Path(__file__).parents[2] / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module

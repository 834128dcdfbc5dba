"""What torch keeps private, by way of ddparity's compat.py, in processes that do not import ddparity."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

_NAME = "ddparity.compat"


@functools.cache
def private() -> Any:
    """Return the module compat.py. Without ddparity it is loaded by its path, under another name."""
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    spec = importlib.util.spec_from_file_location("_ddparity_compat", Path(__file__).parents[2] / "compat.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module

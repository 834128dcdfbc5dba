"""Call a function once the script has imported a module, and not before: an import may take long."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, function: Callable[[ModuleType], Any]) -> None:
    """Call the function with a module once it has been imported."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _After(name, function))


class _After(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, function: Callable[[ModuleType], Any]) -> None:
        self.name, self.function = name, function
        self._asks = False  # the other finders

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or self._asks:
            return None
        self._asks = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asks = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def and_then(module: ModuleType) -> None:
            # Not before: a library may only look whether there is such a module.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            self.function(module)

        spec.loader.exec_module = and_then  # type: ignore[method-assign]  # run after the import
        return spec

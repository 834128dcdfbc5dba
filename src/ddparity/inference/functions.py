"""Find the modules that a function uses, so that they are evaluated as a module that is given itself.

No user code runs: a property, for example, is searched as a function and not read.
"""

from __future__ import annotations

import functools
import sysconfig
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .metrics import is_metric

_DEPTH = 8  # functions and containers inside of each other
_ENTRIES = 1000  # of a list, tuple or dict; a larger one is data, not modules
# Functions of installed libraries name no module of the user; they may enclose one, or have one as an attribute.
_LIBRARIES = ("/site-packages/", "/dist-packages/", sysconfig.get_path("stdlib"))
_NOTHING = object()


def modules_in(function: Callable[..., Any]) -> dict[str, nn.Module]:
    """Return the modules that a function uses, by their names in it, in an order that is the same on every rank.

    Searched are: what the function encloses, its default values, the globals that its code names, the object of a bound
    method, the arguments of a partial, and `__call__` of another object; in these, lists, tuples and dicts of at most
    1,000 entries, further functions, and attributes that the code names. Of a function of an installed library the
    globals are not searched. A module is left out if another one contains it, or if it is a metric, whose states are
    the user's.
    """
    found: dict[str, nn.Module] = {}
    _visit(function, _Place("", (), 0), found, {})
    inside = {id(one) for root in found.values() for one in root.modules() if one is not root}
    return {path: module for path, module in found.items() if id(module) not in inside}


class _Place:
    """Where a value was found: its name in the function, the names that the code there uses, and the depth."""

    def __init__(self, path: str, names: tuple[str, ...], depth: int) -> None:
        self.path, self.names, self.depth = path, names, depth

    def below(self, path: str, names: tuple[str, ...] | None = None) -> _Place:
        return _Place(path, self.names if names is None else names, self.depth + 1)

    def attribute(self, name: str) -> _Place:
        return self.below(f"{self.path}.{name}" if self.path else name)


def _visit(value: Any, place: _Place, found: dict[str, nn.Module], seen: dict[Any, Any]) -> None:
    if isinstance(value, nn.Module):
        if not is_metric(value) and all(value is not one for one in found.values()):
            found[place.path or type(value).__name__] = value
        return
    # An object is searched once for each set of names. `seen` holds it, so that no other object gets its id.
    key = (id(value), place.names)
    if place.depth > _DEPTH or key in seen:
        return
    seen[key] = value
    for inner, where in _inside(value, place):
        _visit(inner, where, found, seen)


def _inside(value: Any, place: _Place) -> Iterator[tuple[Any, _Place]]:
    """Yield the values that a value holds, as far as the code at this place can use them."""
    if isinstance(value, types.FunctionType):
        yield from _of_function(value, place)
    elif isinstance(value, types.MethodType):
        yield value.__func__, place.below(place.path)
        names = _names(value.__func__.__code__) if isinstance(value.__func__, types.FunctionType) else place.names
        owner = place.path.rpartition(".")[0] or "self"
        yield value.__self__, place.below(owner, names)
    elif isinstance(value, functools.partial):
        yield value.func, place.below(place.path)
        yield value.args, place.below(place.path)
        yield value.keywords, place.below(place.path)
    elif isinstance(value, (list, tuple)):
        if len(value) <= _ENTRIES:
            yield from ((item, place.below(f"{place.path}[{number}]")) for number, item in enumerate(value))
    elif isinstance(value, dict):
        if len(value) <= _ENTRIES:
            yield from ((item, place.below(f"{place.path}[{key!r}]")) for key, item in dict.items(value))
    elif isinstance(value, types.ModuleType):
        held = vars(value)
        if not _is_library(str(held.get("__file__", ""))):
            yield from ((held[name], place.attribute(name)) for name in place.names if name in held)
    elif not isinstance(value, type):
        yield from _of_object(value, place)


def _of_function(function: types.FunctionType, place: _Place) -> Iterator[tuple[Any, _Place]]:
    code = function.__code__
    names = _names(code)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield cell.cell_contents, place.below(name, names)
        except ValueError:  # the variable has no value yet
            continue
    defaults = function.__defaults__ or ()
    arguments = code.co_varnames[: code.co_argcount]
    yield from (
        (value, place.below(name, names))
        for name, value in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
    )
    yield from ((value, place.below(name, names)) for name, value in (function.__kwdefaults__ or {}).items())
    if not _is_library(code.co_filename):
        held = function.__globals__
        yield from ((held[name], place.below(name, names)) for name in names if name in held)


def _of_object(value: Any, place: _Place) -> Iterator[tuple[Any, _Place]]:
    if (wrapped := _attribute(value, "__wrapped__")) is not _NOTHING:  # of functools.cache, for example
        yield wrapped, place.below(place.path)
    for name in (*place.names, "__call__"):
        if (found := _attribute(value, name)) is not _NOTHING:
            yield found, place.attribute(name)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute without running code of its type; a method is bound, a property is that of its function."""
    held = getattr(value, "__dict__", {})
    if name in held:
        return held[name]
    found = next((vars(cls)[name] for cls in type(value).__mro__ if name in vars(cls)), _NOTHING)
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, (staticmethod, classmethod)):
        return found.__func__
    if isinstance(found, types.FunctionType):
        return types.MethodType(found, value)
    if isinstance(found, types.MemberDescriptorType):  # of __slots__
        return getattr(value, name, _NOTHING)
    return found


def _is_library(file: str) -> bool:
    return any(part in file for part in _LIBRARIES)


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes that a function's code uses, with the functions inside of it."""
    inner = (name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant))
    return tuple(dict.fromkeys((*code.co_names, *inner)))

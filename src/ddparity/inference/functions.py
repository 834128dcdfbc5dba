"""Find the modules that a function uses, so that they are evaluated as a module that is given itself.

No user code runs: a property, for example, is searched as a function and not read.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import types
import warnings
import weakref
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint.fingerprint import fingerprint
from .metrics import is_metric

_VALUES = 100_000  # that are searched
_ENTRIES = 1000  # of a list, dict or other container; a larger one is data, not modules
_DATA = (str, bytes, int, float, complex, torch.Tensor, types.NoneType)
_CONTAINERS = (list, tuple, deque, set, frozenset, dict)
# Functions of installed libraries name no module of the user; they may enclose one, or have one as an attribute.
_LIBRARIES = ("/site-packages/", "/dist-packages/", sysconfig.get_path("stdlib"))
_SPECIAL = ("__call__", "__getattr__", "__getitem__")  # methods that code uses without their names
_NOTHING = object()


def modules_in(function: Callable[..., Any]) -> dict[str, nn.Module]:
    """Return the modules that a function uses, by their names in it, in an order that is the same on every rank.

    Searched are: what the function encloses, its default values, the globals that its code names, the object or class
    of a bound method, the arguments of a partial, what a weak reference refers to, and `__call__`, `__getattr__` and
    `__getitem__` of another object; in these, containers of at most 1,000 entries, further functions, and attributes
    that the code names, of objects and of classes. An object may be an argument of further functions, so the names are
    those of all code that was found, and the search is repeated until there are no new ones. Of an installed library,
    the globals of functions and the attributes of classes are not searched. A module is left out if another one
    contains it, or if it is a metric, whose states are the user's. What is nearest to the function is searched first; a
    warning says that the search ended at 100,000 values.
    """
    names: dict[str, None] = {}
    while True:
        before = len(names)
        found, complete = _search(function, names)
        if not complete:
            _warn(function)
        if not complete or len(names) == before:
            break
    inside = {id(one) for root in found.values() for one in root.modules() if one is not root}
    return {path: module for path, module in found.items() if id(module) not in inside}


def _search(function: Callable[..., Any], names: dict[str, None]) -> tuple[dict[str, nn.Module], bool]:
    """Return the modules that are found, and whether all was searched. Add the names that the user's code uses."""
    found: dict[str, nn.Module] = {}
    known: set[int] = set()
    everywhere = _Everywhere(names)
    # An object is searched once for each set of names. `seen` holds it, so that no other object gets its id.
    seen: dict[Any, Any] = {}
    pending: deque[Iterator[tuple[Any, _Place]]] = deque([iter([(function, _Place("", (), everywhere))])])
    while pending:
        for value, place in pending.popleft():
            if isinstance(value, nn.Module):
                if id(value) not in known and not is_metric(value):
                    known.add(id(value))
                    found[_free(place.path or type(value).__name__, found)] = value
            elif not isinstance(value, _DATA) and (key := (id(value), place.names)) not in seen:
                if len(seen) == _VALUES:
                    return found, False
                seen[key] = value
                if isinstance(value, types.FunctionType) and not _is_library(value.__code__.co_filename):
                    names.update(dict.fromkeys(_names(value.__code__)))
                pending.append(_inside(value, place))
    return found, True


def _warn(function: Any) -> None:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    warnings.warn(
        f"{name} reaches so many objects that only {_VALUES:,} of them were searched for modules: call .eval() on each "
        f"module that it uses, and let it use fewer objects",
        stacklevel=3,
    )


def _free(path: str, taken: dict[str, nn.Module]) -> str:
    """Return a name that no other module has: two functions may call different ones alike."""
    return next(name for name in (path, *(f"{path} ({n})" for n in range(2, len(taken) + 3))) if name not in taken)


class _Everywhere:
    """The names that all code uses. They may be attributes of any object, which may be an argument of any function."""

    def __init__(self, names: Iterable[str]) -> None:
        self._order = {name: number for number, name in enumerate(names)}
        self._of_classes: dict[type, list[str]] = {}

    def of_class(self, cls: type) -> list[str]:
        """Return those that a class or its bases have."""
        if cls not in self._of_classes:
            self._of_classes[cls] = self._sorted({name for one in cls.__mro__ for name in vars(one)})
        return self._of_classes[cls]

    def of_object(self, value: Any) -> list[str]:
        """Return those that an object or its class has."""
        return [*self._sorted(getattr(value, "__dict__", ())), *self.of_class(type(value))]

    def _sorted(self, names: Iterable[Any]) -> list[str]:
        return sorted((name for name in names if name in self._order), key=self._order.__getitem__)


class _Place:
    """Where a value was found: its name in the function, the names that the code there uses, and those of all code."""

    def __init__(self, path: str, names: tuple[str, ...], everywhere: _Everywhere) -> None:
        self.path, self.names, self.everywhere = path, names, everywhere

    def below(self, path: str, names: tuple[str, ...] | None = None) -> _Place:
        return _Place(path, self.names if names is None else names, self.everywhere)

    def attribute(self, name: str) -> _Place:
        return self.below(f"{self.path}.{name}" if self.path else name)


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
    elif isinstance(value, weakref.ref):
        yield value(), place.below(place.path)
    elif isinstance(value, (*_CONTAINERS, UserDict, UserList)):
        yield from ((item, place.below(f"{place.path}[{key}]")) for key, item in _entries(value))
        if type(value) not in _CONTAINERS:
            yield from _of_object(value, place)
    elif isinstance(value, types.ModuleType):
        held = vars(value)
        if not _is_library(str(held.get("__file__", ""))):
            yield from ((held[name], place.attribute(name)) for name in place.names if name in held)
    elif isinstance(value, type):
        yield from _of_class(value, place)
    else:
        yield from _of_object(value, place)


def _entries(value: Any) -> Iterable[tuple[str, Any]]:
    """Return the entries of a container, by their names, in an order that is the same on every rank."""
    if isinstance(value, (UserDict, UserList)):
        value = vars(value).get("data", ())
    if not isinstance(value, _CONTAINERS) or len(value) > _ENTRIES:
        return []
    if isinstance(value, dict):
        return [(repr(key), item) for key, item in dict.items(value)]
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=_sort_key) if len(value) > 1 else value
    return [(str(number), item) for number, item in enumerate(value)]


def _sort_key(entry: Any) -> tuple[str, ...]:
    """Return a key to sort the entries of a set by: their own order depends on addresses."""
    name = entry.__qualname__ if isinstance(entry, (types.FunctionType, type)) else ""
    return type(entry).__qualname__, name, _digest_of(entry) if isinstance(entry, nn.Module) else ""


def _digest_of(module: nn.Module) -> str:
    try:
        return fingerprint({**dict(module.named_parameters()), **dict(module.named_buffers())})
    except Exception:  # a type of tensor that has no bytes
        return ""


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


def _of_class(cls: type, place: _Place) -> Iterator[tuple[Any, _Place]]:
    own = [one for one in cls.__mro__ if not _is_of_library(one)]
    for name in dict.fromkeys((*place.names, *_SPECIAL, *place.everywhere.of_class(cls))):
        for found in _of_bases(own, name, place):
            yield _bound(found, cls), place.attribute(name)


def _of_object(value: Any, place: _Place) -> Iterator[tuple[Any, _Place]]:
    if (wrapped := _attribute(value, "__wrapped__")) is not _NOTHING:  # of functools.cache, for example
        yield wrapped, place.below(place.path)
    for name in dict.fromkeys((*place.names, *_SPECIAL, *place.everywhere.of_object(value))):
        if (found := _attribute(value, name)) is not _NOTHING:
            yield found, place.attribute(name)
        for other in _of_bases(type(value).__mro__, name, place)[1:]:
            yield _bound(other, value), place.attribute(name)


def _of_bases(classes: Sequence[type], name: str, place: _Place) -> list[Any]:
    """Return the entries of this name in classes: the first one, and where the code uses super(), the others."""
    found = [vars(one)[name] for one in classes if name in vars(one)]
    return found if "super" in place.names else found[:1]


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute without running code of its type; a method is bound, a property is that of its function."""
    held = getattr(value, "__dict__", {})
    if name in held:
        return held[name]
    found = next((vars(cls)[name] for cls in type(value).__mro__ if name in vars(cls)), _NOTHING)
    if isinstance(found, types.MemberDescriptorType):  # of __slots__
        return getattr(value, name, _NOTHING)
    return _bound(found, value)


def _bound(found: Any, owner: Any) -> Any:
    """Return an entry of a class's dict as a function, or a method of an object or class."""
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, functools.cached_property):
        found = found.func
    elif isinstance(found, staticmethod):
        return found.__func__
    elif isinstance(found, classmethod):
        found, owner = found.__func__, owner if isinstance(owner, type) else type(owner)
    return types.MethodType(found, owner) if isinstance(found, types.FunctionType) else found


def _is_of_library(cls: type) -> bool:
    if cls.__module__.partition(".")[0] in sys.stdlib_module_names:  # builtins have no file
        return True
    return _is_library(str(getattr(sys.modules.get(cls.__module__), "__file__", "")))


def _is_library(file: str) -> bool:
    return any(part in file for part in _LIBRARIES)


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes that a function's code uses, with the functions inside of it."""
    inner = (name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant))
    return tuple(dict.fromkeys((*code.co_names, *inner)))

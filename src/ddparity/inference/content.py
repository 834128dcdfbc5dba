"""What a value holds, as a digest: equal only where two values compute the same, in any process.

Nothing in it depends on addresses, on the order of a set, or on the names' hashes. The walk keeps a list of what is
still to be looked at instead of recursing, looks at each object once, and at no more than a number of them.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import io
import itertools
import sys
import threading
import types
import weakref
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..comm.trees import byte_view
from ..compat import uncompiled, unwrapped
from ..runtime.world import World

_OBJECTS = 5_000_000  # a few seconds' work
_NESTED_SETS = 20
_LONG = 1024  # characters
_ATOMS = (str, bytes, int, float, complex, bool, type(None), type(...), type(NotImplemented))
# Where and how something runs, not what it computes: they count by their type.
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_PLACES = (World, dist.ProcessGroup, torch.device, io.IOBase, weakref.ref, *_LOCKS)
_OWN_OF_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}  # what torch itself keeps in a module
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

Parts = tuple[list[str], list[Any]]  # words about an object, and what it holds
Seen = ChainMap[int, tuple[str, Any]]  # by id: when it was come to, and the object, lest the id be used again


class Contents:
    """Digests of values.

    Attributes:
        unknown: the first thing whose content could not be found out: values that hold it may differ all the same.
    """

    def __init__(self) -> None:
        self.unknown: str | None = None
        self._left = _OBJECTS
        self._tensors: dict[int, tuple[str, torch.Tensor]] = {}

    def digest(self, value: Any) -> str:
        return self._digest(value, ChainMap())

    def _digest(self, value: Any, seen: Seen) -> str:
        found, waiting = hashlib.sha256(), [value]
        while waiting:
            self._left -= 1
            if self._left < 0:
                self._unknown(f"more than {_OBJECTS:,} objects")
                break
            one = waiting.pop()
            if isinstance(one, nn.Module):
                one = unwrapped(one)  # whether it is inside of DDP depends on the number of processes
            words, held = self._parts(one, seen)
            for word in (type(one).__qualname__, str(len(held)), *words):
                data = word.encode("utf-8", "surrogatepass")
                found.update(b"%d:" % len(data) + data)  # where a word ends must not be a matter of its letters
            waiting += reversed(held)
        return found.hexdigest()

    def _parts(self, value: Any, seen: Seen) -> Parts:
        if type(value) in _ATOMS:
            text = repr(value)
            return [text if len(text) < _LONG else _hashed(text.encode())], []
        if isinstance(value, torch.Tensor):
            return [self._of_tensor(value)], []
        if type(value) is tuple:  # may be one object or two by the compiler's whim; a circle passes through others
            return [], list(value)
        if id(value) in seen:
            return [f"as {seen[id(value)][0]}"], []
        seen[id(value)] = f"{len(seen.maps)}.{len(seen.maps[0])}", value
        if isinstance(value, (set, frozenset)):
            return self._of_set(value, seen)
        try:
            parts = _known_parts(value)
            return _reduced(value) if parts is None else parts
        except Exception:
            if type(value).__module__ != "multiprocessing.synchronize":  # a lock, as those above
                self._unknown(f"a {type(value).__qualname__}")
            return [], []

    def _of_set(self, value: Any, seen: Seen) -> Parts:
        if len(seen.maps) > _NESTED_SETS:
            self._unknown("sets within sets")
            return [], []
        # What an element is the first to hold is not there for the next one, which may come first in another process.
        digests = [self._digest(one, seen.new_child()) for one in value]
        return sorted(digests), [getattr(value, "__dict__", None)]

    def _of_tensor(self, value: torch.Tensor) -> str:
        """Also of one that many objects share: it is read once."""
        if id(value) not in self._tensors:
            whole = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            word = f"{whole.dtype} {tuple(whole.shape)} {_hashed(byte_view(whole).numpy())}"
            self._tensors[id(value)] = word, value
        return self._tensors[id(value)][0]

    def _unknown(self, what: str) -> None:
        self.unknown = self.unknown or what


def _hashed(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _known_parts(value: Any) -> Parts | None:
    """Of what Python or torch would not take apart as we need it; None: of another kind."""
    if isinstance(value, _PLACES):
        return [], []
    if type(value) in (list, dict):
        return [], list(value) if type(value) is list else list(itertools.chain.from_iterable(value.items()))
    if isinstance(value, nn.Module):
        return _of_module(value)
    if isinstance(value, type):
        return _of_class(value)
    if isinstance(value, types.ModuleType):
        return [value.__name__], []
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), repr(value.co_names)], list(value.co_consts)
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.MethodType):
        return [], [value.__self__, value.__func__]
    if isinstance(value, types.MappingProxyType):
        return [], [dict(value)]
    if isinstance(value, types.CellType):
        return [], [_in_cell(value)]
    if isinstance(value, functools._lru_cache_wrapper):
        return [], [value.__wrapped__]
    if isinstance(value, (staticmethod, classmethod)):
        return [], [value.__func__]
    if isinstance(value, property):
        return [], [value.fget]
    if isinstance(value, functools.cached_property):  # beside it a lock
        return [], [value.func]
    if type(value) is np.ndarray or isinstance(value, np.generic):
        if value.dtype.hasobject:  # its bytes are addresses
            return [str(value.shape)], [value.tolist()]
        return [str(value.dtype), str(value.shape), _hashed(value.tobytes())], []
    if hasattr(value, "tobytes") and not isinstance(value, np.ndarray):  # an image
        return [str(getattr(value, "size", "")), _hashed(value.tobytes())], [type(value)]
    return None


def _reduced(value: Any) -> Parts:
    """What a copy would be made from, as pickle asks for it: a function, its arguments, attributes, slots, entries.

    Raises:
        Exception: it cannot be copied: a generator, or a type of an extension that does not say what it holds.
    """
    own = copyreg.dispatch_table.get(type(value))
    found = own(value) if own is not None else value.__reduce_ex__(4)
    if isinstance(found, str):
        return [type(value).__module__, found], []
    make, arguments, state, entries, items = (*found, None, None, None)[:5]
    return [], [make, arguments, state, list(entries or ()), [list(pair) for pair in items or ()]]


def _of_module(module: nn.Module) -> Parts:
    """Not `training`, which the mode decides."""
    if isinstance(module, torch.jit.ScriptModule):
        saved = io.BytesIO()
        torch.jit.save(module, saved)
        return [_hashed(saved.getvalue())], []
    if uncompiled(module) is not module:
        return [], [uncompiled(module)]
    held = vars(module)
    own = {name: one for name, one in held.items() if name not in _OWN_OF_MODULE}
    hooks = [list(held[name].values()) for name in _HOOKS]  # their keys are counted over the process
    named = [dict(module._parameters), dict(module._buffers), dict(module._modules)]
    return [], [type(module), *named, *hooks, dict(sorted(own.items()))]


def _of_class(value: type) -> Parts:
    """The user's own with what it defines, for that may be edited; an installed one by its name."""
    if _is_installed(value.__module__):
        return [value.__module__, value.__qualname__], []
    defined = {name: one for name, one in vars(value).items() if _counts(name, one)}
    return [value.__qualname__], [value.__bases__, dict(sorted(defined.items()))]


def _counts(name: str, member: Any) -> bool:
    if isinstance(member, (types.MemberDescriptorType, types.GetSetDescriptorType)) or name == "_abc_impl":
        return False
    is_hidden = name.startswith("__") and name.endswith("__")
    return not is_hidden or isinstance(member, (types.FunctionType, staticmethod, classmethod))


def _of_function(function: types.FunctionType) -> Parts:
    compiled = getattr(function, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        return [], [compiled]
    given = [function.__code__, function.__defaults__, function.__kwdefaults__]
    cells = [_in_cell(cell) for cell in function.__closure__ or ()]
    named = {} if _is_installed(function.__module__) else _named_by(function)
    return [function.__qualname__], [*given, cells, dict(vars(function)), named]


def _in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _named_by(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function uses, also in the functions and comprehensions inside of it."""
    codes = list(_codes(function.__code__))
    attributes = {name for code in codes for name in code.co_names}
    steps = itertools.chain.from_iterable(dis.get_instructions(code) for code in codes)
    used = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    found = {name: function.__globals__[name] for name in sorted(used) if name in function.__globals__}
    return {name: _of_namespace(one, attributes, 0) for name, one in found.items()}


def _of_namespace(value: Any, names: set[str], depth: int) -> Any:
    """Of a module of the user's the names that a function may mean by `module.name`; anything else is itself."""
    if not isinstance(value, types.ModuleType) or depth == 3 or _is_installed(value.__name__):
        return value
    meant = sorted(names & set(vars(value)))
    return [value.__name__, {name: _of_namespace(vars(value)[name], names, depth + 1) for name in meant}]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_installed(name: str | None) -> bool:
    """Whether a module is Python's, a package's or ours, and not one of those that the user edits."""
    if name is None or name == "__main__" or name not in sys.modules:
        return False
    if name.partition(".")[0] in (*sys.stdlib_module_names, "torch", "ddparity"):
        return True
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)

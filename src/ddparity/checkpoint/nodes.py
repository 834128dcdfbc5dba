"""States as JSON and flat tensors, of a closed list of kinds and types: no file decides what is imported or called.

None, a bool, an int, a finite float and a string stand for themselves. Every other value is a node, an object with a
"kind":

    tensor          name, dtype, shape; parameter (of an nn.Parameter): requires_grad; chunks (of a sharded tensor)
    array, number   name, dtype, shape: a NumPy array, a NumPy number
    float           text: "nan", "inf" or "-inf"
    complex         parts: the real and the imaginary part
    list, tuple     items; type: "Size" (torch.Size)
    dict            keys, items; type: "OrderedDict", "Counter" or "defaultdict", which has a factory
    record, fields  type, keys, items: a named tuple, a dataclass
    enum            type, member
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import math
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..comm.nesting import check_dense, nesting_kind
from ..compat import is_dtensor

Node = Any  # JSON
# By name and fields; the fields of an enum are empty. None: there are several.
Types = dict[tuple[str, tuple[str, ...]], type | None]

DEPTH = 100  # how deeply values may be nested
_MOST_PLACES = 1 << 22  # values of a state; the header of a file has no room for more
_PLAIN = (type(None), bool, int, str)
_LEAVES = {*_PLAIN, float, complex, torch.Tensor, nn.Parameter, np.ndarray}  # some that have no values inside
_DIMS = 64
# What built values take in CPython, at most. A tuple and a dict are made from a list, and an OrderedDict has links.
_TENSOR_BYTES = 900
_BUILT_BYTES = {"float": 32, "complex": 112, "enum": 0, "list": 120, "tuple": 180, "dict": 460}
_ENTRY_BYTES = {"list": 10, "tuple": 20, "dict": 240}
KEYS = ("kind", "name", "dtype", "shape", "items", "keys", "type", "text", "parts", "member", "parameter", "chunks")
_FACTORIES: dict[str, Callable[[], Any]] = {
    cls.__name__: cls for cls in (int, float, bool, str, list, dict, set, tuple)
}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for name, dtype in sorted(vars(torch).items())
    if isinstance(dtype, torch.dtype) and not name.startswith("q")
}


# Take apart


def check_places(value: Any) -> None:
    """Refuse a value that is nested too deeply, or has too many values, as a part that is in many places has.

    In a file each place has its own copy: 40 lists with two references each to the next one would be 2**40 lists. This
    takes the time of the distinct parts alone.

    Raises:
        TypeError: the value is refused.
    """
    level, total, types = {id(value): (value, 1)}, 1, Types()  # with the number of places at this depth
    for _ in range(DEPTH + 1):
        below: dict[int, tuple[Any, int]] = {}
        for one, count in level.values():
            items = _entries(one, types)
            total += count * len(items)
            for item in items:
                if type(item) not in _LEAVES:
                    below[id(item)] = (item, below.get(id(item), (item, 0))[1] + count)
        level = below
    if any(len(_entries(one, {})) for one, _ in level.values()):
        raise TypeError(f"it is nested more than {DEPTH} levels deep, or contains itself: give a flatter state")
    if total > _MOST_PLACES:
        raise TypeError(
            f"it has {total:,} values, counting what is in several places each time, and a file holds at most "
            f"{_MOST_PLACES:,}: put each part into one place, or numbers into tensors"
        )
    if alike := [name for (name, _), cls in types.items() if cls is None]:
        raise TypeError(f"it has two types {alike[0]} with the same fields, which a file cannot tell apart: rename one")


def describe(value: Any, path: str, name: str, tensors: dict[str, torch.Tensor], depth: int = 0) -> Node:
    """Return the node of a value, and put its tensors into `tensors` by their names in the file.

    Args:
        path: where the value is, for errors, such as "model['0.weight']".
        name: the name of its tensor, or what the names of its tensors begin with, such as "model".

    Raises:
        TypeError: something in the value cannot be saved; names its path.
    """
    cls = type(value)
    if cls in _PLAIN:
        return value
    if cls is float:
        return value if math.isfinite(value) else {"kind": "float", "text": repr(value)}
    if cls is complex:
        return {"kind": "complex", "parts": [describe(part, path, name, tensors) for part in (value.real, value.imag)]}
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _describe_dense(value, path, name, tensors)
    if isinstance(value, enum.Enum):
        if value.name is None or cls.__members__.get(value.name) is not value:
            raise TypeError(f"{path} is a combination of flags, {value!r}: give its .value")
        return {"kind": "enum", "type": cls.__qualname__, "member": value.name}
    if depth == DEPTH:
        raise TypeError(
            f"{path[:200]} is nested more than {DEPTH} levels deep, or contains itself: give a flatter state"
        )
    described = _nesting(value, path)
    items = _items_of(value, described)
    keys: Sequence[Any] = described.get("keys", range(len(items)))
    by_name = described["kind"] in ("record", "fields")
    described["items"] = [
        describe(item, f"{path}.{key}" if by_name else f"{path}[{key!r}]", f"{name}.{key}", tensors, depth + 1)
        for item, key in zip(items, keys, strict=True)
    ]
    return described


def _nesting(value: Any, path: str) -> dict[str, Any]:
    """Return the node of a list, tuple, mapping, named tuple or dataclass, without its items."""
    cls: Any = type(value)
    if cls is list:
        return {"kind": "list"}
    if isinstance(value, (tuple, dict)) and nesting_kind(cls) != "fields":
        for name in getattr(value, "__dict__", ()):
            if name != "_metadata":  # the versions of a module's layers, which have their place in a file
                raise TypeError(
                    f"{path} is a {cls.__name__} with the attribute {name}, which would not be saved: make it an entry"
                )
    if cls in (tuple, torch.Size):
        return {"kind": "tuple"} if cls is tuple else {"kind": "tuple", "type": "Size"}
    if cls in (dict, OrderedDict, Counter, defaultdict):
        for key in value:
            if type(key) not in (str, int):
                kind = type(key).__name__
                raise TypeError(f"{path} has the key {key!r}, a {kind}: keys must be strings or integers")
        node: dict[str, Any] = {"kind": "dict", "keys": list(value)}
        if cls is not dict:
            node["type"] = cls.__name__
        if cls is defaultdict:
            factory = value.default_factory
            node["factory"] = None if factory is None else getattr(factory, "__name__", "")
            if factory is not None and _FACTORIES.get(node["factory"]) is not factory:
                raise TypeError(
                    f"{path} is a defaultdict of {factory!r}, and a file cannot hold a function: use one of "
                    f"{', '.join(_FACTORIES)}, or give a dict"
                )
        return node
    if isinstance(value, tuple) and hasattr(cls, "_fields"):
        return {"kind": "record", "type": cls.__qualname__, "keys": list(cls._fields)}
    if nesting_kind(cls) == "fields":
        keys = [field.name for field in dataclasses.fields(cls)]
        _check_fields(value, keys, path)
        return {"kind": "fields", "type": cls.__qualname__, "keys": keys}
    way_out = "use tensors, arrays, numbers, strings or None, in dicts, lists, tuples or dataclasses"
    if isinstance(value, Mapping):
        way_out = "it would come back as a dict, so give a dict: dict(…)"
    elif isinstance(value, (list, tuple, int, float, str)):
        base = next(base for base in (list, tuple, int, float, str) if isinstance(value, base))
        way_out = f"it would come back as a {base.__name__}, so give one: {base.__name__}(…)"
    raise TypeError(f"{path} is a {cls.__name__}, which cannot be saved: {way_out}")


def _check_fields(value: Any, fields: list[str], path: str) -> None:
    """Refuse a dataclass that has more than its fields: only they are saved.

    Raises:
        TypeError: it is also a list or an exception, or has other attributes, or a field has no value.
    """
    cls: Any = type(value)
    if cls.__new__ is not object.__new__:
        raise TypeError(
            f"{path} is a {cls.__name__}, a dataclass with a __new__ of its own or of {cls.__mro__[1].__name__}, and "
            f"only its fields would be saved: give {{field: value}}, or a dataclass without it"
        )
    if unset := [name for name in fields if not hasattr(value, name)]:
        raise TypeError(f"{path} is a {cls.__name__} whose field {unset[0]} has no value: give it one, such as None")
    known = {*fields, "__orig_class__"}  # which typing sets: C[int](…)
    for name in getattr(value, "__dict__", {}):
        if name not in known and not isinstance(inspect.getattr_static(cls, name, None), functools.cached_property):
            raise TypeError(
                f"{path} is a {cls.__name__} with the attribute {name}, which is none of its fields and would not be "
                f"saved: make it a field, such as field(init=False), or a cached_property"
            )


def _items_of(value: Any, node: dict[str, Any]) -> list[Any]:
    if node["kind"] == "fields":
        return [getattr(value, name) for name in node["keys"]]
    return list(value.values()) if node["kind"] == "dict" else list(value)


def _describe_dense(value: Any, path: str, name: str, tensors: dict[str, torch.Tensor]) -> Node:
    node: dict[str, Any] = {"kind": "tensor"}
    if is_dtensor(value):
        return {
            **node,
            "name": _new_name(name, value, tensors),
            "dtype": _dtype_of(value, path),
            "shape": [*value.shape],
        }
    check_dense(value, path)
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, nn.Parameter):
            raise TypeError(
                f"{path} is a {type(value).__name__}, a subclass of Tensor, which would come back as a Tensor: give "
                f".as_subclass(torch.Tensor), or what it is made of"
            )
        # Names with an underscore are marks that libraries put on tensors.
        if marks := [name for name in vars(value) if not name.startswith("_")]:
            raise TypeError(
                f"{path} is a tensor with the attribute {marks[0]}, which would not be saved: give .detach(), and save "
                f"the attribute as a value of its own"
            )
        if value.is_meta:
            raise TypeError(f"{path} is on the meta device, where a tensor has no data: materialise it first")
        if isinstance(value, nn.Parameter):
            node["parameter"] = value.requires_grad
        tensor = value.detach()
    else:
        if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
            raise TypeError(
                f"{path} is a {type(value).__name__}, which would come back as an array: give .view(ndarray)"
            )
        node["kind"] = "array" if isinstance(value, np.ndarray) else "number"
        tensor = _from_numpy(np.asarray(value), path)
    if tensor.ndim > _DIMS:
        raise TypeError(f"{path} has {tensor.ndim} dimensions, and a file allows {_DIMS}: reshape it")
    dtype = _dtype_of(tensor, path)
    return {**node, "name": _new_name(name, tensor, tensors), "dtype": dtype, "shape": [*tensor.shape]}


def _new_name(name: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    """Put a tensor into `tensors` under a name that no other one has, and return the name."""
    unique = name if name not in tensors and name != "__metadata__" else f"{name}#{len(tensors)}"
    while unique in tensors:
        unique += "#"
    tensors[unique] = tensor
    return unique


def _dtype_of(tensor: torch.Tensor, path: str) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise TypeError(f"{path} has the dtype {dtype}, which cannot be saved: convert it with .to()")
    return dtype


def _from_numpy(array: np.ndarray[Any, Any], path: str) -> torch.Tensor:
    try:
        # A copy, since torch refuses or warns about read-only arrays, negative strides and foreign byte orders.
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))
    except TypeError:
        raise TypeError(
            f"{path} is an array of {array.dtype}, which cannot be saved: use a numeric or bool array"
        ) from None


# Look into a node that a file has


def leaves(node: Node, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Check a node of a file, and yield the nodes of its tensors and arrays.

    Raises:
        ValueError: it is not a node that `describe` writes.
    """
    if type(node) in _PLAIN or (type(node) is float and math.isfinite(node)):
        return
    if type(node) is not dict or depth > DEPTH:
        raise ValueError(f"no value begins with {str(node)[:40]!r}")
    kind, items = node.get("kind"), node.get("items")
    if kind in ("tensor", "array", "number"):
        _check_dense(node)
        yield node
        return
    if kind == "float" and node.get("text") in ("nan", "inf", "-inf"):
        return
    if kind == "enum" and type(node.get("type")) is type(node.get("member")) is str:
        return
    if kind == "complex":
        items = node.get("parts")
    known = {
        "complex": type(items) is list and len(items) == 2,
        "list": True,
        "tuple": node.get("type") in (None, "Size"),
        "dict": _is_dict(node),
        "record": type(node.get("type")) is str,
        "fields": type(node.get("type")) is str,
    }
    if type(kind) is not str or not known.get(kind) or type(items) is not list:
        raise ValueError(f"there is no kind of value {str(kind)[:40]!r} like this")
    if kind in ("dict", "record", "fields"):
        keys = node.get("keys")
        allowed = (str, int) if kind == "dict" else (str,)
        if type(keys) is not list or not all(type(key) in allowed for key in keys) or len(set(keys)) != len(keys):
            raise ValueError(f"the keys of a {kind} are {str(keys)[:40]!r}")
        if len(keys) != len(items):
            raise ValueError(f"a {kind} has {len(keys)} keys and {len(items)} values")
    if node.get("type") == "Size" and not all(type(item) is int and 0 <= item < 2**63 for item in items):
        raise ValueError(f"the sizes of a torch.Size are {str(items)[:40]}")
    if kind == "complex" and not all(type(i) is float or (type(i) is dict and i.get("kind") == "float") for i in items):
        raise ValueError(f"the parts of a complex number are {str(items)[:40]}")
    for item in items:
        yield from leaves(item, depth + 1)


def _is_dict(node: dict[str, Any]) -> bool:
    factory = node.get("factory")
    if factory is not None and (type(factory) is not str or factory not in _FACTORIES):
        return False
    return node.get("type") in (None, "OrderedDict", "Counter", "defaultdict")


def _check_dense(node: dict[str, Any]) -> None:
    name, dtype, shape = node.get("name"), node.get("dtype"), node.get("shape")
    if type(name) is not str or type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"a tensor has the name {str(name)[:80]!r} and the dtype {str(dtype)[:40]!r}")
    if type(shape) is not list or len(shape) > _DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has the shape {str(shape)[:80]}")
    if math.prod(size or 1 for size in shape) * DTYPES[dtype].itemsize >= 2**63:  # strides count empty dimensions, too
        raise ValueError(f"{name} has the shape {str(shape)[:80]}")
    learnt = node.get("parameter", False)
    exact = not (DTYPES[dtype].is_floating_point or DTYPES[dtype].is_complex)
    if type(learnt) is not bool or (learnt and exact) or (node["kind"] == "number" and shape):
        raise ValueError(f"{name} is no {node['kind']}")


def leaf_keys(node: Node, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the nodes of the tensors in a checked node, each with the keys and positions that lead to it."""
    if type(node) is dict and "name" in node:
        yield keys, node
    elif type(node) is dict:
        items = node.get("items", ())
        for key, item in zip(node.get("keys", range(len(items))), items, strict=True):
            yield from leaf_keys(item, (*keys, key))


def bytes_of(node: dict[str, Any]) -> int:
    """Return how many bytes a described tensor has."""
    return int(math.prod(node["shape"])) * DTYPES[node["dtype"]].itemsize


def built_bytes(node: Node) -> int:
    """Return how many bytes of memory the value of a checked node takes at most, with the bytes of its tensors.

    Numbers and strings in lists and dicts are those of the node. A sharded tensor has its bytes in other files.
    """
    if type(node) is not dict:
        return 0
    if "name" in node:
        return _TENSOR_BYTES + (0 if "chunks" in node else bytes_of(node))
    kind, items = node["kind"], node.get("items", ())
    kind = "dict" if kind in ("record", "fields") else kind
    inside = sum(built_bytes(item) for item in items if type(item) is dict)
    return _BUILT_BYTES[kind] + len(items) * _ENTRY_BYTES.get(kind, 0) + inside


def check_chunks(node: dict[str, Any], files: int) -> None:
    """Check that the chunks of a sharded tensor cover it, each element once.

    A chunk is the number of its file, where in the tensor it begins, and its sizes. A file has at most one of them.

    Raises:
        ValueError: they do not.
    """
    shape, chunks = node["shape"], node["chunks"]
    if type(chunks) is not list or node["kind"] != "tensor":
        raise ValueError(f"{node['name']} has no list of chunks")
    places = set()
    for chunk in chunks:
        file, offsets, sizes = chunk
        numbers = [file, *offsets, *sizes]
        if not all(type(number) is int and number >= 0 for number in numbers) or file >= files:
            raise ValueError(f"{node['name']} has the chunk {str(chunk)[:80]}")
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        if not all(end <= size for end, size in zip(ends, shape, strict=True)):
            raise ValueError(f"{node['name']} of shape {shape} has the chunk {str(chunk)[:80]}")
        places.add(tuple(offsets))
    if len({chunk[0] for chunk in chunks}) != len(chunks):
        raise ValueError(f"{node['name']} has two chunks in one file")
    edges = [sorted({0, size, *(chunk[1][dim] for chunk in chunks)}) for dim, size in enumerate(shape)]
    edges += [[0, 1]] if not shape else []
    if math.prod(map(len, edges)) > 10**6 or len(places) != len(chunks):
        raise ValueError(f"{node['name']} has chunks that are no grid")
    covered = np.zeros([max(len(edge) - 1, 0) for edge in edges], np.int32)
    left = covered.size
    for _, offsets, sizes in chunks:
        box = tuple(
            slice(bisect_left(edge, offset), bisect_left(edge, offset + size))
            for edge, offset, size in zip(edges, offsets, sizes, strict=False)
        )
        left -= covered[box].size
        if left < 0:  # many large chunks over one another would take hours
            break
        covered[box] += 1
    if left or not (covered == 1).all() or sum(math.prod(sizes) for _, _, sizes in chunks) != math.prod(shape):
        raise ValueError(f"the chunks of {node['name']} do not cover it, each element once")


def named_types(node: Node) -> set[str]:
    """Return the names of the named tuples, dataclasses and enums in a node."""
    found, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if type(one) is dict:
            if one["kind"] in ("record", "fields", "enum"):
                found.add(one["type"])
            waiting += [item for item in one.get("items", ()) if type(item) is dict]
    return found


# Put together


def types_in(value: Any) -> Types:
    """Return the named tuples, dataclasses and enums that a value has. A value in several places is looked at once."""
    found: Types = {}
    known: dict[int, Any] = {}  # by id; it keeps them alive, so that no other value gets the id
    level = [value]
    while level:
        new = {id(one): one for one in level if type(one) not in _PLAIN and id(one) not in known}
        known |= new
        level = [item for one in new.values() for item in _entries(one, found)]
    return found


def _entries(value: Any, found: Types) -> Sequence[Any]:
    """Return the values in a value, and put its type into `found` if it is one of those that `build` asks for."""
    cls: Any = type(value)
    if isinstance(value, enum.Enum):
        _found(cls, (), found)
        return ()
    if nesting_kind(cls) == "fields":
        names = tuple(field.name for field in dataclasses.fields(cls))
        _found(cls, names, found)
        return [getattr(value, name, None) for name in names]
    if isinstance(value, tuple) and hasattr(cls, "_fields"):
        _found(cls, tuple(cls._fields), found)
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, (list, tuple)) else ()


def _found(cls: type, fields: tuple[str, ...], found: Types) -> None:
    key = (cls.__qualname__, fields)
    found[key] = cls if found.get(key, cls) is cls else None


def build(
    node: Node, tensors: Mapping[str, torch.Tensor], types: Types, name: str, keys: tuple[str | int, ...] = ()
) -> Any:
    """Return the value of a node that `leaves` has checked.

    Args:
        tensors: by name; each is given away as it is.
        types: the only named tuples, dataclasses and enums that can be made.
        name, keys: where the value is, for errors: the name of the object, and the keys that lead to the value in it.

    Raises:
        ValueError: the node has a named tuple, dataclass or enum that is not in `types`, or with other fields.
    """
    if type(node) is not dict:
        return node
    kind = node["kind"]
    if kind in ("tensor", "array", "number"):
        return _built_dense(node, tensors[node["name"]], name, keys)
    if kind == "float":
        return float(node["text"])
    if kind == "complex":
        return complex(*(build(part, tensors, types, name, keys) for part in node["parts"]))
    if kind == "enum":
        cls = _type_of(node, (), types, name, keys)
        if node["member"] not in cls.__members__:
            raise ValueError(
                f"{_path(name, keys)} is {node['type']}.{node['member'][:80]} in the file, which {cls} here does not "
                f"have"
            )
        return cls.__members__[node["member"]]
    own_keys = node.get("keys", range(len(node["items"])))
    inside = zip(node["items"], own_keys, strict=True)
    items = [build(item, tensors, types, name, (*keys, key)) for item, key in inside]
    if kind == "list":
        return items
    if kind == "tuple":
        return torch.Size(items) if node.get("type") == "Size" else tuple(items)
    if kind == "dict":
        return _built_dict(node, dict(zip(own_keys, items, strict=True)))
    cls = _type_of(node, tuple(own_keys), types, name, keys)
    if kind == "record":
        return tuple.__new__(cls, items)
    if cls.__new__ is not object.__new__:
        raise ValueError(f"{_path(name, keys)} is a {cls.__name__}, a dataclass with more than its fields")
    value: Any = object.__new__(cls)  # as copy and pickle do: no code of the class runs
    for key, item in zip(own_keys, items, strict=True):
        object.__setattr__(value, key, item)
    return value


def _path(name: str, keys: tuple[str | int, ...]) -> str:
    """Return where a value is. It is made for an error only: a hostile file can have long keys on many levels."""
    path = name[:80] + "".join(f"[{(key[:80] if isinstance(key, str) else key)!r}]" for key in keys)
    return path if len(path) <= 300 else f"{path[:300]}…"


def _built_dense(node: dict[str, Any], tensor: torch.Tensor, name: str, keys: tuple[str | int, ...]) -> Any:
    if node["kind"] == "tensor":
        return nn.Parameter(tensor, node["parameter"]) if "parameter" in node else tensor
    try:
        array = tensor.numpy()
    except TypeError as error:
        raise ValueError(f"{_path(name, keys)} is an array of {node['dtype']}, which NumPy does not have") from error
    return array if node["kind"] == "array" else array[()]


def _built_dict(node: dict[str, Any], value: dict[Any, Any]) -> dict[Any, Any]:
    kind, factory = node.get("type"), node.get("factory")
    if kind == "defaultdict":
        return defaultdict(None if factory is None else _FACTORIES[factory], value)
    if kind == "Counter":
        counter: Counter[Any] = Counter()
        dict.update(counter, value)  # its own update would add
        return counter
    return OrderedDict(value) if kind == "OrderedDict" else value


def _type_of(
    node: dict[str, Any], fields: tuple[str, ...], types: Types, name: str, keys: tuple[str | int, ...]
) -> Any:
    key = (node["type"], fields)
    found = types.get(key)
    if found is None and key in types:
        raise ValueError(
            f"{_path(name, keys)} is a {node['type'][:80]}, and there are two such types here, with the same fields: "
            f"rename one, and save again"
        )
    if found is None:
        others = [theirs for known, theirs in types if known == node["type"]]
        reason = f"the one here has the fields {', '.join(others[0])}" if others else "no type is imported for a file"
        own = f" with the fields {', '.join(fields)[:200]}" if fields else ""
        kind = node["type"][:80]
        raise ValueError(
            f"{_path(name, keys)} is a {kind}{own}, and {reason}: give load_checkpoint an object or a value that has "
            f"such a {kind}"
        )
    return found

"""Nested values: walk dicts, tuples, named tuples and dataclasses, and compare what they are built of.

`walk` is the only way into a value: what travels between ranks (trees.py) and what a model returns (inference/) are
described with it. `difference` is the only comparison of two descriptions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ..compat import is_dtensor

Description = dict[str, Any]  # JSON: "kind", and what trees.py and inference/columns.py put beside it
Keys = tuple[str | int, ...]
T = TypeVar("T")


class Nesting(NamedTuple):
    """A dict, tuple, named tuple or dataclass: its kind, its keys, positions or names of fields, and its values."""

    kind: str
    keys: list[str | int]
    values: list[Any]

    def paths(self, path: str) -> list[str]:
        """Return the path of each value, for errors."""
        by_name = self.kind in ("record", "fields")
        return [f"{path}.{key}" if by_name else f"{path}[{key!r}]" for key in self.keys]


def walk(
    value: Any,
    leaf: Callable[[Any, str, Keys], T],
    nest: Callable[[Any, str, Nesting, list[T]], T],
    path: str,
    keys: Keys = (),
) -> T:
    """Call `leaf` for each value in nested dicts, tuples, named tuples and dataclasses, and `nest` for each of these.

    Args:
        leaf: is called with a value that is none of these, its path, for errors, and the keys that lead to it.
        nest: is called with a dict, tuple, named tuple or dataclass, its path, its nesting, and the results for its
            values.

    Raises:
        TypeError: a key is neither a string nor an integer; or from `leaf` or `nest`.
    """
    nesting = nesting_of(value, path)
    if nesting is None:
        return leaf(value, path, keys)
    inside = zip(nesting.values, nesting.paths(path), nesting.keys, strict=True)
    return nest(value, path, nesting, [walk(item, leaf, nest, below, (*keys, key)) for item, below, key in inside])


# The usual types. Lists ask for each entry, and a look at abstract base classes takes longer.
_KINDS: dict[type, str | None] = {
    dict: "dict",
    tuple: "tuple",
    **dict.fromkeys((torch.Tensor, np.ndarray, list, str, int, float, bool, complex, type(None))),
}


def nesting_kind(cls: type) -> str | None:
    """Return "dict", "tuple", "record" or "fields" for a type whose values are nestings, else None."""
    if cls in _KINDS:
        return _KINDS[cls]
    if issubclass(cls, (torch.Tensor, np.ndarray, np.generic)):
        return None
    if issubclass(cls, Mapping):
        return "dict"
    if issubclass(cls, tuple):
        return "record" if hasattr(cls, "_fields") else "tuple"
    return "fields" if dataclasses.is_dataclass(cls) else None


def nesting_of(value: Any, path: str) -> Nesting | None:
    """Return the nesting of a dict, tuple, named tuple or dataclass, None of any other value.

    Raises:
        TypeError: a key is neither a string nor an integer.
    """
    kind = nesting_kind(type(value))
    if kind == "dict":
        if bad := [key for key in value if not isinstance(key, (str, int)) or isinstance(key, bool)]:
            kind_of_key = type(bad[0]).__name__
            raise TypeError(f"{path} has the key {bad[0]!r}, a {kind_of_key}: keys must be strings or integers")
        return Nesting(kind, list(value), list(value.values()))
    if kind == "tuple":
        return Nesting(kind, list(range(len(value))), list(value))
    if kind == "record":
        return Nesting(kind, list(value._fields), list(value))
    if kind == "fields":
        names = [field.name for field in dataclasses.fields(value)]
        return Nesting(kind, list(names), [getattr(value, name) for name in names])
    return None


def check_dense(value: torch.Tensor | np.ndarray[Any, Any] | np.generic, path: str) -> None:
    """Check that a tensor or array holds one number an element, and nothing else.

    Raises:
        TypeError: it is quantized, nested or sparse, a DTensor, or a masked array.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{path} is a masked array, whose mask would be lost: give .filled() and the mask")
    if not isinstance(value, torch.Tensor):
        return
    if is_dtensor(value):
        raise TypeError(
            f"{path} is a DTensor, as is the norm that clip_grad_norm_() returns for a model of fully_shard(), and "
            f"this rank has only its part: give .full_tensor(), which every rank calls"
        )
    if value.is_quantized:
        raise TypeError(f"{path} is a quantized tensor: give a dense one, .dequantize()")
    if value.is_nested:
        raise TypeError(f"{path} is a nested tensor: give a list with one tensor a sample, list(x.unbind())")
    if value.layout != torch.strided:
        raise TypeError(f"{path} is a {value.layout} tensor: give a dense one, .to_dense()")


def cannot_travel(value: Any, path: str) -> TypeError:
    return TypeError(
        f"{path} is a {type(value).__name__}, which cannot travel between processes: use tensors, arrays, numbers, "
        f"strings or None, in dicts, lists, tuples or dataclasses"
    )


def structure(description: Description, rows: bool = False, plain: str = "plain") -> Description:
    """Return what must be alike in values that belong together: nesting, types, keys, dtypes.

    Args:
        rows: also the shapes of rows, without the first dimension.
        plain: the kind that the result gives None, a number or a string.
    """
    kind = description["kind"]
    if kind in ("list", "plain list"):
        return {"kind": "list"}
    if kind == "plain":
        return {"kind": plain}
    if kind in ("tensor", "array"):
        dense = {"kind": kind, "dtype": description["dtype"]}
        return {**dense, "row": description["shape"][1:]} if rows else dense
    own = {name: description[name] for name in ("kind", "type", "keys")}
    return {**own, "items": [structure(item, rows, plain) for item in description["items"]]}


def difference(one: Description, other: Description, path: str, lenient: bool = False) -> str | None:
    """Return a text of the first difference between two structures, "`path`['a'] is …, not …"; None if they are alike.

    Args:
        lenient: for columns that may be absent: None is like anything, an integer is like a float, and the order of
            keys does not matter.
    """
    if "items" not in one and "items" not in other and _alike(one, other, lenient):
        return None
    if "items" in one and "items" in other and _same_keys(one, other, lenient):
        expected = dict(zip(_keys(other), other["items"], strict=True))
        inside = zip(_keys(one), one["items"], strict=True)
        found = (difference(item, expected[key], f"{path}[{key!r}]", lenient) for key, item in inside)
        return next(filter(None, found), None)
    where = f"column {one['column']!r}" if "column" in one else path
    return f"{where} is {text_of(one)}, not {text_of(other)}"


def _alike(one: Description, other: Description, lenient: bool) -> bool:
    kinds = {one["kind"], other["kind"]}
    if lenient and ("none" in kinds or kinds == {"int", "float"}):
        return True
    if any(one.get(name) != other.get(name) for name in ("kind", "dtype", "dims", "row")):
        return False
    if "entry" in one:
        return _alike(one["entry"], other["entry"], lenient)
    if "items" not in one:
        return True
    items = dict(zip(_keys(other), other["items"], strict=True))
    return _same_keys(one, other, lenient) and all(
        _alike(item, items[key], lenient) for key, item in zip(_keys(one), one["items"], strict=True)
    )


def _same_keys(one: Description, other: Description, lenient: bool) -> bool:
    if (one["kind"], one.get("type")) != (other["kind"], other.get("type")):
        return False
    ours, theirs = _keys(one), _keys(other)
    return ours == theirs or (lenient and set(ours) == set(theirs))


def _keys(description: Description) -> list[str | int]:
    keys = description["keys"]
    return list(range(keys)) if isinstance(keys, int) else list(keys)


_NOUNS = {"none": "None", "plain": "None, a number or a string", "record": "named tuple", "fields": "dataclass"}


def text_of(description: Description) -> str:
    """Return what a value of this description is: "a tensor of float32", "a dict with the keys ['a']"."""
    kind = description["kind"]
    noun = _NOUNS.get(kind, kind)
    if kind in ("none", "plain"):
        return str(noun)
    if "items" not in description:
        return f"{'an' if kind == 'array' else 'a'} {noun}{_content(description)}"
    name = f"{noun} {description['type']}" if description.get("type") else noun
    by_position = kind in ("tuple", "record")
    return f"a {name} of {len(description['items'])}" if by_position else f"a {name} with the keys {_keys(description)}"


def text_of_entries(description: Description) -> str:
    """Return what the entries of a list are: "tensors of float32 with 1 dimensions a sample"."""
    kind = description["kind"]
    if "items" in description:
        inside = zip(_keys(description), description["items"], strict=True)
        return "dicts of " + ", ".join(f"{key!r}: {text_of_entries(item)}" for key, item in inside)
    plural = "s" if "dtype" in description or "entry" in description else ""
    return f"{_NOUNS.get(kind, kind)}{plural}{_content(description)}"


def _content(description: Description) -> str:
    if "entry" in description:
        return f" of {text_of_entries(description['entry'])}"
    if "dtype" not in description:
        return ""
    dims = f" with {description['dims']} dimensions a sample" if "dims" in description else ""
    rows = f" with rows of shape {tuple(description['row'])}" if "row" in description else ""
    return f" of {description['dtype']}{dims}{rows}"


def to_device(data: Any, device: torch.device) -> Any:
    """Move the tensors in nested dicts, lists and tuples, and anything with a `.to` method, to a device."""
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=True)
    if hasattr(data, "to"):
        return data.to(device)
    if isinstance(data, Mapping):
        return {key: to_device(value, device) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(to_device(value, device) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(to_device(value, device) for value in data)
    return data

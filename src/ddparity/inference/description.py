"""Describe a model's outputs as columns: their names, kinds and dtypes, in JSON that names no type to import.

One description is of all batches of a data set. `comm.trees` describes one value as it travels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..comm.nesting import Description, Keys, Nesting, check_dense, nesting_kind, nesting_of, text_of_entries, walk

INDEX = "index"
# Parquet does not have these floats. Each fits exactly into the float that it is stored as.
STORED = {
    "bfloat16": "float32",
    "float8_e8m0fnu": "float32",
    "float8_e4m3fn": "float16",
    "float8_e5m2": "float16",
    "float8_e4m3fnuz": "float16",
    "float8_e5m2fnuz": "float16",
}
COMPLEX = {"complex64": "float32", "complex128": "float64"}
ARRAYS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
           "float64", *COMPLEX)  # fmt: skip
_TENSORS = (*ARRAYS, *STORED)
_KINDS = {bool: "bool", int: "int", float: "float", str: "str", np.str_: "str", complex: "complex", list: "list"}
_INSTEAD = {
    "O": "a list with one entry a sample, .tolist()",
    "U": "a list with one entry a sample, .tolist()",
    "M": 'integers, .astype("int64")',
    "m": 'integers, .astype("int64")',
}


def flatten(output: Any) -> list[tuple[str, Any]]:
    """Return the leaves of an output with the names of their columns: the keys that lead to it, joined by dots.

    An output that is one leaf is the column "output".

    Raises:
        TypeError: a key is neither a string nor an integer.
        ValueError: two leaves have one name, or a leaf has the name of the samples' index.
    """
    leaves: list[tuple[str, Any]] = []
    paths: dict[str, str] = {}

    def leaf(value: Any, path: str, keys: Keys) -> None:
        name = ".".join(map(str, keys)) if keys else "output"
        if name == INDEX:
            raise ValueError(f"{path} would be the column {INDEX!r}, which holds the samples' index: give another key")
        if name in paths:
            raise ValueError(f"{paths[name]} and {path} would both be the column {name!r}: give one another key")
        paths[name] = path
        leaves.append((name, value))

    walk(output, leaf, lambda value, path, nesting, items: None, "output")
    return leaves


def describe(output: Any, start: int | None = None) -> Description:
    """Return what rebuilds an output from its columns: JSON, equal for batches of any size and trailing shapes.

    Named tuples and dataclasses are described as dicts, so reading a data set imports nothing that a file names.

    Args:
        start: the data-set index of the batch's first sample, for errors.

    Raises:
        TypeError, ValueError: a leaf cannot be a column; names the column and the sample. Also as `flatten`.
    """
    names = iter([name for name, _ in flatten(output)])

    def leaf(value: Any, path: str, keys: Keys) -> Description:
        name = next(names)
        return {**located(value, start, lambda part: leaf_of(part, f"column {name!r}")), "column": name}

    return walk(output, leaf, _described, "output")


def _described(value: Any, path: str, nesting: Nesting, items: list[Description]) -> Description:
    return {"kind": "tuple" if nesting.kind == "tuple" else "dict", "keys": nesting.keys, "items": items}


def leaves_of(description: Description) -> list[Description]:
    """Return the descriptions of the columns."""
    if "column" in description:
        return [description]
    return [leaf for item in description["items"] for leaf in leaves_of(item)]


def rebuilt(description: Description, value: Callable[[Description], Any]) -> Any:
    """Return an output of this description, with `value` of each column's description in its leaves."""
    if "column" in description:
        return value(description)
    items = [rebuilt(item, value) for item in description["items"]]
    return tuple(items) if description["kind"] == "tuple" else dict(zip(description["keys"], items, strict=True))


# Kinds of leaves and of their entries


def leaf_of(leaf: Any, where: str) -> Description:
    """Describe a leaf: None, a tensor, an array, or a list with one entry a sample."""
    if leaf is None:
        return {"kind": "none"}
    if isinstance(leaf, list):
        return {"kind": "list", "entry": _entry(leaf, where)}
    dense: Description = _dense(leaf, where) if isinstance(leaf, (torch.Tensor, np.ndarray)) else {"dims": 0}
    if not dense["dims"]:
        scalar = " of shape ()" if "dtype" in dense else ""
        raise TypeError(
            f"{where} is a {type(leaf).__name__}{scalar}: give a tensor or an array with one row a sample, or a list "
            f"with one entry a sample"
        )
    return {**dense, "dims": dense["dims"] - 1}


def _entry(values: Iterable[Any], where: str) -> Description:
    """Describe what all entries have in common. None is ignored; integers among floats are floats."""
    values = list(values)
    classes = dict.fromkeys(map(type, values))
    kinds = list(dict.fromkeys(_kind(cls, where) for cls in classes if cls is not type(None)))
    if not kinds:
        return {"kind": "none"}
    if set(kinds) == {"int", "float"}:
        return {"kind": "float"}
    if len(kinds) > 1:
        raise TypeError(f"{where} holds {kinds[-1]} besides {kinds[0]}: give one type throughout, or None")
    present = [value for value in values if value is not None] if type(None) in classes else values
    if kinds[0] in ("tensor", "array"):
        found = [_dense(value, where) for value in present]
        if odd := [one for one in found if one != found[0]]:
            raise ValueError(
                f"{where} holds {text_of_entries(odd[0])} besides {text_of_entries(found[0])}: give one dtype and "
                f"number of dimensions"
            )
        return found[0]
    if kinds[0] in ("list", "tuple"):
        return {"kind": kinds[0], "entry": _entry(chain.from_iterable(present), where)}
    if kinds[0] != "dict":
        return {"kind": kinds[0]}
    rows = [fields_of(value, where) for value in present]
    keys = list(rows[0])
    if others := [row for row in rows if row.keys() != rows[0].keys()]:
        raise ValueError(f"{where} has the keys {list(others[0])} besides {keys}: give None for what is absent")
    if not keys or len(set(map(str, keys))) < len(keys):
        raise ValueError(f"{where} has the keys {keys}: give one at least, and no integer that is also a string")
    items = [_entry([row[key] for row in rows], f"{where}[{key!r}]") for key in keys]
    return {"kind": "dict", "keys": keys, "items": items}


def fields_of(value: Any, where: str) -> dict[str | int, Any]:
    """Return the values of a dict, named tuple or dataclass by their keys or names of fields."""
    nesting = nesting_of(value, where)
    assert nesting is not None, "entries of the kind dict are nestings"
    return dict(zip(nesting.keys, nesting.values, strict=True))


def _kind(cls: type, where: str) -> str:
    if cls in _KINDS:
        return _KINDS[cls]
    if issubclass(cls, torch.Tensor):
        return "tensor"
    if issubclass(cls, (np.ndarray, np.generic)):
        return "array"
    if (kind := nesting_kind(cls)) is not None:
        return "tuple" if kind == "tuple" else "dict"
    raise TypeError(
        f"{where} holds {cls.__name__}: give strings, numbers, bools, None, tensors or arrays, in dicts, lists or "
        f"tuples"
    )


def _dense(value: Any, where: str) -> Description:
    check_dense(value, where)
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name not in _TENSORS:
            raise TypeError(f"{where} is a tensor of {name}: give a usual dtype, .to(), e.g. torch.float32")
        return {"kind": "tensor", "dtype": name, "dims": value.ndim}
    if value.dtype.name not in ARRAYS:
        instead = _INSTEAD.get(value.dtype.kind, "a usual dtype, .astype(), e.g. float64")
        raise TypeError(f"{where} is an array of {value.dtype.name}: give {instead}")
    return {"kind": "array", "dtype": value.dtype.name, "dims": value.ndim}


def located(leaf: Any, start: int | None, make: Callable[[Any], Any]) -> Any:
    """Return make(leaf). If that raises, name the first sample that raises in the error."""
    try:
        return make(leaf)
    except OverflowError as error:  # it is about the whole batch
        raise ValueError(f"index {start}: {error}") from None
    except (TypeError, ValueError) as error:
        kind, text = TypeError if isinstance(error, TypeError) else ValueError, str(error)
    rows = length_of(leaf)

    def fails(count: int) -> bool:
        try:
            make(leaf[:count])
        except Exception:  # also if this kind of tensor has no slices
            return True
        return False

    # If the first samples raise, more of them also raise.
    row = bisect_left(range(1, rows or 0), True, key=fails)
    raise kind(f"{'entry' if start is None else 'index'} {row + (start or 0)}: {text}" if rows else text)


def length_of(leaf: Any) -> int | None:
    """Return the number of rows of a leaf; None if it has none."""
    if isinstance(leaf, torch.Tensor) and leaf.is_nested:
        return leaf.size(0)  # it has no length
    return len(leaf) if isinstance(leaf, list) or getattr(leaf, "ndim", 0) > 0 else None

"""What a model's outputs look like as columns: their names, kinds and dtypes, in JSON that names no type to import."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch

Node = dict[str, Any]

INDEX = "index"
# Parquet has no such floats; each fits into this one exactly.
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
    """The leaves of an output with their columns' names: the keys on the way, joined by dots; a bare leaf is "output".

    Raises:
        TypeError: a key that is neither a string nor an integer.
        ValueError: two leaves have one name, or one has that of the samples' index.
    """
    leaves: list[tuple[str, Any]] = []
    places: dict[str, str] = {}

    def visit(path: tuple[Any, ...], leaf: Any) -> Node:
        name, place = _name(path), "output" + "".join(f"[{key!r}]" for key in path)
        if name == INDEX:
            raise ValueError(f"{place} would be the column {INDEX!r}, which holds the samples' index: give another key")
        if name in places:
            raise ValueError(f"{places[name]} and {place} would both be the column {name!r}: give one another key")
        places[name] = place
        leaves.append((name, leaf))
        return {}

    _walk(output, (), visit)
    return leaves


def describe(output: Any, start: int | None = None) -> Node:
    """What rebuilds an output from its columns: JSON, the same for each batch whatever its size and trailing shapes.

    Named tuples and dataclasses are described as dicts, so that reading a data set imports nothing that a file names.

    Args:
        start: the data-set index of the batch's first sample, for errors.

    Raises:
        TypeError, ValueError: what has no column; names the column, the sample and the way out. Also as `flatten`.
    """
    flatten(output)

    def visit(path: tuple[Any, ...], leaf: Any) -> Node:
        where = f"column {_name(path)!r}"
        return {**located(leaf, start, lambda part: leaf_of(part, where)), "column": _name(path)}

    return _walk(output, (), visit)


def check_like(description: Node, first: Node, start: int) -> None:
    """Check a batch's description against the first batch's, for what the types of columns do not tell.

    Entries that were all None in either batch may be anything, and integers fit in with floats.

    Raises:
        ValueError: names the column and the data-set index of the batch's first sample.
    """
    if _skeleton(description) != _skeleton(first):
        raise ValueError(
            f"index {start}: the output is built as {_skeleton(description)} where the first batch's was "
            f"{_skeleton(first)}: give the same keys throughout, and None for what is absent"
        )
    expected = {leaf["column"]: leaf for leaf in leaves_of(first)}
    for leaf in leaves_of(description):
        if not _alike(leaf, expected[leaf["column"]]):
            raise ValueError(
                f"index {start}: column {leaf['column']!r} holds {_text(leaf)} where the first batch held "
                f"{_text(expected[leaf['column']])}: give the same kind, dtype and number of dimensions throughout"
            )


def _walk(value: Any, path: tuple[Any, ...], visit: Callable[[tuple[Any, ...], Any], Node]) -> Node:
    fields = fields_of(value, "output" + "".join(f"[{key!r}]" for key in path))
    kind = "tuple" if fields is None else "dict"
    if fields is None and isinstance(value, tuple):
        fields = dict(enumerate(value))
    if fields is None:
        return visit(path, value)
    items = [_walk(item, (*path, key), visit) for key, item in fields.items()]
    return {"kind": kind, "keys": list(fields), "items": items}


def fields_of(value: Any, where: str) -> dict[Any, Any] | None:
    if isinstance(value, Mapping):
        if bad := [key for key in value if type(key) not in (str, int)]:
            raise TypeError(f"{where} has the key {bad[0]!r}: keys must be strings or integers")
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) if path else "output"


def leaves_of(node: Node) -> list[Node]:
    return [node] if "column" in node else [leaf for item in node["items"] for leaf in leaves_of(item)]


def rebuilt(node: Node, value: Callable[[Node], Any]) -> Any:
    if "column" in node:
        return value(node)
    items = [rebuilt(item, value) for item in node["items"]]
    return tuple(items) if node["kind"] == "tuple" else dict(zip(node["keys"], items, strict=True))


def _skeleton(node: Node) -> Any:
    return rebuilt(node, lambda leaf: leaf["column"])


# Kinds of leaves and of their entries


def leaf_of(leaf: Any, where: str) -> Node:
    if leaf is None:
        return {"kind": "none"}
    if isinstance(leaf, list):
        return {"kind": "list", "entry": _entry(leaf, where)}
    dense: Node = _dense(leaf, where) if isinstance(leaf, (torch.Tensor, np.ndarray)) else {"dims": 0}
    if not dense["dims"]:
        scalar = " of shape ()" if "dtype" in dense else ""
        raise TypeError(
            f"{where} is a {type(leaf).__name__}{scalar}: give a tensor or an array with one row a sample, or a list "
            f"with one entry a sample"
        )
    return {**dense, "dims": dense["dims"] - 1}


def _entry(values: Iterable[Any], where: str) -> Node:
    """What all entries have in common; None is left out, and integers among floats are floats."""
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
        nodes = [_dense(value, where) for value in present]
        if odd := [node for node in nodes if node != nodes[0]]:
            raise ValueError(
                f"{where} holds {_text(odd[0])} besides {_text(nodes[0])}: give one dtype and number of dimensions"
            )
        return nodes[0]
    if kinds[0] in ("list", "tuple"):
        return {"kind": kinds[0], "entry": _entry(chain.from_iterable(present), where)}
    if kinds[0] != "dict":
        return {"kind": kinds[0]}
    rows = [fields_of(value, where) or {} for value in present]
    keys = list(rows[0])
    if others := [row for row in rows if row.keys() != rows[0].keys()]:
        raise ValueError(f"{where} has the keys {list(others[0])} besides {keys}: give None for what is absent")
    if not keys or len(set(map(str, keys))) < len(keys):
        raise ValueError(f"{where} has the keys {keys}: give one at least, and no integer that is also a string")
    items = [_entry([row[key] for row in rows], f"{where}[{key!r}]") for key in keys]
    return {"kind": "dict", "keys": keys, "items": items}


def _kind(cls: type, where: str) -> str:
    if cls in _KINDS:
        return _KINDS[cls]
    if issubclass(cls, torch.Tensor):
        return "tensor"
    if issubclass(cls, (np.ndarray, np.generic)):
        return "array"
    if issubclass(cls, Mapping) or hasattr(cls, "_fields") or dataclasses.is_dataclass(cls):
        return "dict"
    if issubclass(cls, tuple):
        return "tuple"
    raise TypeError(
        f"{where} holds {cls.__name__}: give strings, numbers, bools, None, tensors or arrays, in dicts, lists or "
        f"tuples"
    )


def _dense(value: Any, where: str) -> Node:
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if value.is_quantized:
            raise TypeError(f"{where} is a quantized tensor: give a dense one, .dequantize()")
        if value.is_nested:
            raise TypeError(f"{where} is a nested tensor: give a list with one tensor a sample, list(x.unbind())")
        if value.layout != torch.strided:
            raise TypeError(f"{where} is a {value.layout} tensor: give a dense one, .to_dense()")
        if name not in _TENSORS:
            raise TypeError(f"{where} is a tensor of {name}: give a usual dtype, .to(), e.g. torch.float32")
        return {"kind": "tensor", "dtype": name, "dims": value.ndim}
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{where} is a masked array: give a plain one, .filled()")
    if value.dtype.name not in ARRAYS:
        instead = _INSTEAD.get(value.dtype.kind, "a usual dtype, .astype(), e.g. float64")
        raise TypeError(f"{where} is an array of {value.dtype.name}: give {instead}")
    return {"kind": "array", "dtype": value.dtype.name, "dims": value.ndim}


def _alike(node: Node, other: Node) -> bool:
    kinds = {node["kind"], other["kind"]}
    if "none" in kinds or kinds == {"int", "float"}:
        return True
    if len(kinds) > 1 or node.get("dtype") != other.get("dtype") or node.get("dims") != other.get("dims"):
        return False
    if "entry" in node:
        return _alike(node["entry"], other["entry"])
    if "items" in node:
        items = dict(zip(other["keys"], other["items"], strict=True))
        return set(node["keys"]) == set(items) and all(
            _alike(item, items[key]) for key, item in zip(node["keys"], node["items"], strict=True)
        )
    return True


def _text(node: Node) -> str:
    if "dtype" in node:
        return f"{node['kind']}s of {node['dtype']} with {node['dims']} dimensions a sample"
    if "entry" in node:
        return f"{node['kind']}s of {_text(node['entry'])}"
    if "items" in node:
        return "dicts of " + ", ".join(
            f"{key!r}: {_text(item)}" for key, item in zip(node["keys"], node["items"], strict=True)
        )
    return str(node["kind"])


def located(leaf: Any, start: int | None, make: Callable[[Any], Any]) -> Any:
    """make(leaf), whose error gets the first sample with which it arises."""
    try:
        return make(leaf)
    except OverflowError as error:  # of the whole batch
        raise ValueError(f"index {start}: {error}") from None
    except (TypeError, ValueError) as error:
        kind, text = TypeError if isinstance(error, TypeError) else ValueError, str(error)
    rows = length_of(leaf)

    def fails(count: int) -> bool:
        try:
            make(leaf[:count])
        except Exception:  # also of a kind of tensor that has no slices
            return True
        return False

    # It also arises with each longer part, as a sample never mends what those before it have broken.
    row = bisect_left(range(1, rows or 0), True, key=fails)
    raise kind(f"{'entry' if start is None else 'index'} {row + (start or 0)}: {text}" if rows else text)


def length_of(leaf: Any) -> int | None:
    if isinstance(leaf, torch.Tensor) and leaf.is_nested:
        return leaf.size(0)  # it has no length
    return len(leaf) if isinstance(leaf, list) or getattr(leaf, "ndim", 0) > 0 else None

"""A model's outputs as Arrow columns, one row a sample, and back: what a Parquet data set of predictions holds.

An output is a nesting of dicts, tuples, named tuples and dataclasses. Its leaves are the columns:

    tensor or array (N, d1, ..., dk)    k times list<> of its numbers; (N,) is a plain column of numbers
    list with one entry a sample        string, int64, double, bool; list<> of lists, tuples, tensors and arrays, whose
                                        sizes may differ; struct<> of dicts, named tuples and dataclasses; None is null
    None                                null: absent for the whole batch

bfloat16 and float8 are stored in the next larger float, exactly; complex numbers are struct<real, imag>. What Arrow
does not tell, e.g. tensor or array, stands in the description, which is JSON and names no type to import.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

Node = dict[str, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

INDEX = "index"
# Parquet has no such floats; each fits into this one exactly.
_STORED = {
    "bfloat16": "float32",
    "float8_e8m0fnu": "float32",
    "float8_e4m3fn": "float16",
    "float8_e5m2": "float16",
    "float8_e4m3fnuz": "float16",
    "float8_e5m2fnuz": "float16",
}
_COMPLEX = {"complex64": "float32", "complex128": "float64"}
_ARRAYS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
           "float64", *_COMPLEX)  # fmt: skip
_TENSORS = (*_ARRAYS, *_STORED)
_KINDS = {bool: "bool", int: "int", float: "float", str: "str", np.str_: "str", complex: "complex", list: "list"}
_INSTEAD = {
    "O": "a list with one entry a sample, .tolist()",
    "U": "a list with one entry a sample, .tolist()",
    "M": 'integers, .astype("int64")',
    "m": 'integers, .astype("int64")',
}


# The output's nesting


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
        return {**_located(leaf, start, lambda part: _leaf(part, where)), "column": _name(path)}

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
    expected = {leaf["column"]: leaf for leaf in _leaves(first)}
    for leaf in _leaves(description):
        if not _alike(leaf, expected[leaf["column"]]):
            raise ValueError(
                f"index {start}: column {leaf['column']!r} holds {_text(leaf)} where the first batch held "
                f"{_text(expected[leaf['column']])}: give the same kind, dtype and number of dimensions throughout"
            )


def _walk(value: Any, path: tuple[Any, ...], visit: Callable[[tuple[Any, ...], Any], Node]) -> Node:
    fields = _fields(value, "output" + "".join(f"[{key!r}]" for key in path))
    kind = "tuple" if fields is None else "dict"
    if fields is None and isinstance(value, tuple):
        fields = dict(enumerate(value))
    if fields is None:
        return visit(path, value)
    items = [_walk(item, (*path, key), visit) for key, item in fields.items()]
    return {"kind": kind, "keys": list(fields), "items": items}


def _fields(value: Any, where: str) -> dict[Any, Any] | None:
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


def _leaves(node: Node) -> list[Node]:
    return [node] if "column" in node else [leaf for item in node["items"] for leaf in _leaves(item)]


def _rebuilt(node: Node, value: Callable[[Node], Any]) -> Any:
    if "column" in node:
        return value(node)
    items = [_rebuilt(item, value) for item in node["items"]]
    return tuple(items) if node["kind"] == "tuple" else dict(zip(node["keys"], items, strict=True))


def _skeleton(node: Node) -> Any:
    return _rebuilt(node, lambda leaf: leaf["column"])


# Kinds of leaves and of their entries


def _leaf(leaf: Any, where: str) -> Node:
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
    rows = [_fields(value, where) or {} for value in present]
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
    if value.dtype.name not in _ARRAYS:
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


# To Arrow

_NUMBERS = {name: pa.from_numpy_dtype(name) for name in _ARRAYS if name not in _COMPLEX}
_PLAIN = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
_MOST = 2**31 - 1  # of the 32-bit offsets of list<>


def schema_of(description: Node, overrides: pa.Schema | None = None) -> pa.Schema:
    """The types of the columns of outputs of that description, "index" first; no metadata.

    Args:
        overrides: types of some of the columns, e.g. of one that was None for the whole first batch.

    Raises:
        ValueError: `overrides` names a column that the output does not have.
    """
    types = {leaf["column"]: _type(leaf["entry"] if leaf["kind"] == "list" else leaf) for leaf in _leaves(description)}
    if unknown := [name for name in (overrides.names if overrides is not None else []) if name not in types]:
        raise ValueError(f"schema= has the column {unknown[0]!r}, but the output has {list(types)}")
    given = {field.name: field.type for field in (overrides if overrides is not None else [])}
    return pa.schema([(INDEX, pa.int64()), *(types | given).items()])


def to_table(output: Any, start: int, size: int, schema: pa.Schema | None = None) -> pa.Table:
    """A batch's output as a table of `size` rows, with the samples' data-set index, `start` and following, first.

    Columns of tensors on the CPU and arrays share their memory where Arrow can: write or copy the table before the
    model may reuse it.

    Args:
        schema: of `schema_of` the first batch; None: the batch's own.

    Raises:
        TypeError, ValueError: as `describe`; a leaf without one row a sample; columns or types other than in `schema`
            (which may be wider: integers fit into larger ones and into floats that hold them exactly, None into
            anything). Names the column, the data-set index and the way out.
    """
    leaves = flatten(output)
    names = [INDEX, *(name for name, _ in leaves)]
    if schema is not None and set(names) != set(schema.names):
        raise ValueError(
            f"index {start}: the output has the columns {names[1:]} where the first batch, or schema=, has "
            f"{[name for name in schema.names if name != INDEX]}: give the same keys throughout, and None for what "
            f"is absent"
        )
    arrays = [
        _column(name, leaf, start, size, None if schema is None else schema.field(name).type) for name, leaf in leaves
    ]
    arrays.insert(0, pa.array(np.arange(start, start + size, dtype=np.int64)))
    table = pa.table(arrays, names=names)
    return table if schema is None else table.select(schema.names).cast(schema)


def _located(leaf: Any, start: int | None, make: Callable[[Any], Any]) -> Any:
    """make(leaf), whose error gets the first sample with which it arises."""
    try:
        return make(leaf)
    except OverflowError as error:  # of the whole batch
        raise ValueError(f"index {start}: {error}") from None
    except (TypeError, ValueError) as error:
        kind, text = TypeError if isinstance(error, TypeError) else ValueError, str(error)
    rows = _length(leaf)

    def fails(count: int) -> bool:
        try:
            make(leaf[:count])
        except Exception:  # also of a kind of tensor that has no slices
            return True
        return False

    # It also arises with each longer part, as a sample never mends what those before it have broken.
    row = bisect_left(range(1, rows or 0), True, key=fails)
    raise kind(f"{'entry' if start is None else 'index'} {row + (start or 0)}: {text}" if rows else text)


def _length(leaf: Any) -> int | None:
    if isinstance(leaf, torch.Tensor) and leaf.is_nested:
        return leaf.size(0)  # it has no length
    return len(leaf) if isinstance(leaf, list) or getattr(leaf, "ndim", 0) > 0 else None


def _column(name: str, leaf: Any, start: int, size: int, to: pa.DataType | None) -> pa.Array:
    where = f"column {name!r}"
    if (rows := _length(leaf)) not in (None, size):
        raise ValueError(
            f"index {start}: {where} has {rows} rows for a batch of {size} samples: give one row a sample, or where "
            f"their number differs a list with one entry a sample"
        )

    def make(part: Any) -> pa.Array:
        node = _leaf(part, where)
        if node["kind"] == "none":
            array = pa.nulls(size)
        elif node["kind"] == "list":
            array = _entries(part, node["entry"], where)
        else:
            shapes = np.tile(np.array(part.shape[1:], dtype=np.int64), (len(part), 1))
            array = _nested([part], shapes, where)
        return array if to is None else _cast(array, to, where)

    return _located(leaf, start, make)


def _type(node: Node) -> pa.DataType:
    kind = node["kind"]
    if kind == "none":
        return pa.null()
    if kind in ("list", "tuple"):
        return pa.list_(_type(node["entry"]))
    if kind == "dict":
        return pa.struct([(str(key), _type(item)) for key, item in zip(node["keys"], node["items"], strict=True)])
    dtype = "complex128" if kind == "complex" else node.get("dtype", "")
    if dtype in _COMPLEX:
        part = _NUMBERS[_COMPLEX[dtype]]
        found = pa.struct([("real", part), ("imag", part)])
    else:
        found = _NUMBERS[_STORED.get(dtype, dtype)] if dtype else _PLAIN[kind]
    for _ in range(node.get("dims", 0)):
        found = pa.list_(found)
    return found


def _entries(values: list[Any], node: Node, where: str) -> pa.Array:
    kind = node["kind"]
    if kind in _PLAIN:
        try:
            return pa.array(values, _PLAIN[kind])
        except (ValueError, OverflowError) as error:  # too large an integer, half a surrogate pair
            raise ValueError(f"{where} has a value that is no {_PLAIN[kind]}: {error}: give another type") from None
    present = [row for row, value in enumerate(values) if value is not None]
    if not present:
        return pa.nulls(len(values), _type(node))
    if len(present) < len(values):
        places: list[int | None] = [None] * len(values)
        for place, row in enumerate(present):
            places[row] = place
        return _entries([values[row] for row in present], node, where).take(pa.array(places, pa.int64()))
    if "dtype" in node:
        shapes = np.array([value.shape for value in values], dtype=np.int64).reshape(len(values), node["dims"])
        return _nested(values, shapes, where)
    if kind == "dict":
        rows = [_fields(value, where) or {} for value in values]
        columns = [
            _entries([row[key] for row in rows], item, f"{where}[{key!r}]")
            for key, item in zip(node["keys"], node["items"], strict=True)
        ]
        return pa.StructArray.from_arrays(columns, names=[str(key) for key in node["keys"]])
    if kind in ("list", "tuple"):
        inner = _entries(list(chain.from_iterable(values)), node["entry"], where)
        return pa.ListArray.from_arrays(
            _offsets(np.array([len(value) for value in values], dtype=np.int64), where), inner
        )
    return _numbers(np.array(values, dtype=np.complex128))


def _flat(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """The numbers of tensors or arrays, one after the other; on a device they are joined before the one transfer."""
    if not isinstance(values[0], torch.Tensor):
        rows = [np.asarray(value).reshape(-1) for value in values]
        flat = rows[0] if len(rows) == 1 else np.concatenate(rows)
        return flat.astype(flat.dtype.newbyteorder("="), copy=False)
    parts = [value.detach().reshape(-1) for value in values]
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    stored = _STORED.get(str(joined.dtype).removeprefix("torch."))
    return (joined.to(getattr(torch, stored)) if stored else joined).cpu().resolve_conj().resolve_neg().numpy()


def _numbers(flat: np.ndarray[Any, Any]) -> pa.Array:
    if flat.dtype.kind == "c":
        return pa.StructArray.from_arrays([pa.array(flat.real), pa.array(flat.imag)], names=["real", "imag"])
    return pa.array(flat)


def _nested(values: Sequence[Any], shapes: Ints, where: str) -> pa.Array:
    """Rows of those shapes, (rows, dims), out of tensors or arrays; the innermost lists first."""
    _check_count(int(shapes.prod(axis=1).sum()), where)
    array = _numbers(_flat(values))
    for level in reversed(range(shapes.shape[1])):
        array = pa.ListArray.from_arrays(
            _offsets(np.repeat(shapes[:, level], shapes[:, :level].prod(axis=1)), where), array
        )
    return array


def _offsets(lengths: Ints, where: str) -> pa.Array:
    offsets = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    _check_count(int(offsets[-1]), where)
    return pa.array(offsets.astype(np.int32))


def _check_count(count: int, where: str) -> None:
    if count > _MOST:
        raise OverflowError(f"{where} has {count} numbers, more than 2**31 - 1 in one batch: use a smaller batch_size")


def _cast(array: pa.Array, to: pa.DataType, where: str) -> pa.Array:
    """The array as another type that holds it exactly."""
    held, types = array.type, pa.types
    if held == to:
        return array
    if types.is_null(held):
        return pa.nulls(len(array), to)
    mask = array.is_null() if array.null_count else None
    if types.is_list(held) and types.is_list(to):
        values = _cast(array.values, to.value_type, where)
        return pa.ListArray.from_arrays(array.offsets, values, type=to, mask=mask)
    if types.is_struct(held) and types.is_struct(to) and {f.name for f in held} == {f.name for f in to}:
        columns = [_cast(array.field(field.name), field.type, f"{where}[{field.name!r}]") for field in to]
        return pa.StructArray.from_arrays(columns, fields=list(to), mask=mask)
    widens = (types.is_integer(held) and (types.is_integer(to) or types.is_float32(to) or types.is_float64(to))) or (
        types.is_floating(held) and types.is_floating(to) and held.bit_width < to.bit_width
    )
    try:
        if widens:
            return array.cast(to)
    except ValueError as error:
        raise ValueError(f"{where} does not fit into {to}: {error}: pass a wider type in schema=") from None
    raise TypeError(
        f"{where} holds {held} where the first batch, or schema=, has {to}: give one type throughout, or pass schema= "
        f"with one that holds both"
    )


# From Arrow


def from_table(table: pa.Table, description: Node) -> Any:
    """The outputs of a whole data set, in the table's order.

    A tensor or array comes back whole, (rows, ...), in its dtype, on the CPU, where all rows have one shape; else as a
    list with one tensor or array a sample, views of one, and None where a batch had None. A list comes back as a list
    with its entries as they were, 0-d arrays as NumPy scalars, integers that shared a column with floats as floats.
    Named tuples and dataclasses are dicts. A size behind a dimension of size 0 is not stored: it is the one that the
    column's other rows have, else 0.

    Raises:
        ValueError: the table lacks a column, or one is not as described.
    """
    if lacking := [leaf["column"] for leaf in _leaves(description) if leaf["column"] not in table.column_names]:
        raise ValueError(f"the table has no column {lacking[0]!r}: it has {table.column_names}")

    def value(leaf: Node) -> Any:
        column = table.column(leaf["column"])
        if leaf["kind"] == "list":
            return _restored(column.chunks, leaf["entry"], leaf["column"])
        if leaf["kind"] == "none" and column.null_count == len(column):
            return None
        if leaf["kind"] == "none" or column.null_count:
            return _restored(column.chunks, leaf, leaf["column"])
        values, shapes = _dense_rows(column.chunks, leaf, leaf["column"])
        if (shapes == shapes[:1]).all():
            return values.reshape(len(column), *(shapes[0] if len(shapes) else [0] * leaf["dims"]))
        return _cut(values, shapes)

    return _rebuilt(description, value)


def _restored(chunks: list[pa.Array], node: Node, name: str) -> list[Any]:
    kind = node["kind"]
    if kind == "none" or kind in _PLAIN:
        return [value for chunk in chunks for value in chunk.to_pylist()]
    if any(chunk.null_count for chunk in chunks):
        valid = chain.from_iterable(chunk.is_valid().to_pylist() for chunk in chunks)
        present = iter(_restored([chunk.drop_null() for chunk in chunks], node, name))
        return [next(present) if here else None for here in valid]
    if "dtype" in node:
        return _cut(*_dense_rows(chunks, node, name))
    if kind == "dict":
        columns = [
            _restored([chunk.field(str(key)) for chunk in chunks], item, name)
            for key, item in zip(node["keys"], node["items"], strict=True)
        ]
        return [dict(zip(node["keys"], row, strict=True)) for row in zip(*columns, strict=True)]
    if kind in ("list", "tuple"):
        inner = iter(_restored([chunk.flatten() for chunk in chunks], node["entry"], name))
        lengths = chain.from_iterable(chunk.value_lengths().to_pylist() for chunk in chunks)
        return [(list if kind == "list" else tuple)(islice(inner, length)) for length in lengths]
    return [value for chunk in chunks for value in _to_numpy(chunk, "complex128").tolist()]


def _dense_rows(chunks: list[pa.Array], node: Node, name: str) -> tuple[Any, Ints]:
    """The numbers of all rows, as a flat tensor or array of the described dtype, and the rows' shapes, (rows, dims)."""
    pairs = [_unnested(chunk, node["dims"], name) for chunk in chunks]
    shapes = np.concatenate([np.empty((0, node["dims"]), np.int64), *(shapes for shapes, _ in pairs)])
    for sizes in shapes.T:
        known = np.unique(sizes[sizes >= 0])
        sizes[sizes < 0] = known[0] if len(known) == 1 else 0
    dtype = node["dtype"]
    empty = np.empty(0, _STORED.get(dtype, dtype))
    # The one copy: Arrow's memory is read-only.
    flat = np.concatenate([_to_numpy(numbers, dtype) for _, numbers in pairs] or [empty])
    if node["kind"] == "array":
        return flat.astype(dtype, copy=False), shapes
    return torch.from_numpy(flat).to(getattr(torch, dtype)), shapes


def _unnested(array: pa.Array, dims: int, name: str) -> tuple[Ints, pa.Array]:
    """The shapes of rows, (rows, dims), with -1 for what no list tells, and their numbers."""
    shapes = np.full((len(array), dims), -1, dtype=np.int64)
    counts = np.ones(len(array), dtype=np.int64)  # of each row's lists at this level
    for level in range(dims):
        if array.null_count:
            break
        lengths = array.value_lengths().to_numpy()
        first = counts.cumsum() - counts
        shapes[counts > 0, level] = lengths[first[counts > 0]]
        if not np.array_equal(np.repeat(shapes[:, level], counts), lengths):
            raise ValueError(f"column {name!r} has a row that is not rectangular, as tensors are")
        counts = counts * shapes[:, level]  # -1 only where there are 0
        array = array.flatten()
    if array.null_count:
        raise ValueError(f"column {name!r} has null inside of a tensor")
    return shapes, array


def _to_numpy(array: pa.Array, dtype: str) -> np.ndarray[Any, Any]:
    if dtype not in _COMPLEX:
        return np.asarray(array.to_numpy(zero_copy_only=False))
    numbers = np.empty(len(array), dtype)
    numbers.real, numbers.imag = (array.field(part).to_numpy(zero_copy_only=False) for part in ("real", "imag"))
    return numbers


def _cut(values: Any, shapes: Ints) -> list[Any]:
    if not shapes.shape[1]:
        return list(values)  # NumPy's scalars, or 0-d tensors
    counts = shapes.prod(axis=1)
    ends = counts.cumsum()
    starts = ends - counts
    return [values[a:b].reshape(tuple(shape)) for a, b, shape in zip(starts, ends, shapes.tolist(), strict=True)]

"""A model's outputs as Arrow columns, one row a sample, and back: what a Parquet data set of predictions holds.

An output is a nesting of dicts, tuples, named tuples and dataclasses. Its leaves are the columns:

    tensor or array (N, d1, ..., dk)    k times list<> of its numbers; (N,) is a plain column of numbers
    list with one entry a sample        string, int64, double, bool; list<> of lists, tuples, tensors and arrays, whose
                                        sizes may differ; struct<> of dicts, named tuples and dataclasses; None is null
    None                                null: absent for the whole batch

bfloat16 and float8 are stored exactly in the next larger float; complex numbers are struct<real, imag>. The description
holds what Arrow's types do not say, e.g. tensor or array. It is JSON and names no type to import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..comm.nesting import Description
from .description import (
    ARRAYS,
    COMPLEX,
    INDEX,
    STORED,
    fields_of,
    flatten,
    leaf_of,
    leaves_of,
    length_of,
    located,
    rebuilt,
)

Ints = np.ndarray[Any, np.dtype[np.int64]]


# To Arrow

_NUMBERS = {name: pa.from_numpy_dtype(name) for name in ARRAYS if name not in COMPLEX}
_PLAIN = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
_MOST = 2**31 - 1  # the largest 32-bit offset of list<>


def schema_of(description: Description, overrides: pa.Schema | None = None) -> pa.Schema:
    """Return the types of the columns of described outputs, "index" first, without metadata.

    Args:
        overrides: types of some of the columns, e.g. of one that was None for the whole first batch.

    Raises:
        ValueError: `overrides` names a column that the output does not have.
    """
    types = {
        leaf["column"]: _type(leaf["entry"] if leaf["kind"] == "list" else leaf) for leaf in leaves_of(description)
    }
    if unknown := [name for name in (overrides.names if overrides is not None else []) if name not in types]:
        raise ValueError(f"schema= has the column {unknown[0]!r}, but the output has {list(types)}")
    given = {field.name: field.type for field in (overrides if overrides is not None else [])}
    return pa.schema([(INDEX, pa.int64()), *(types | given).items()])


def to_table(output: Any, start: int, size: int, schema: pa.Schema | None = None) -> pa.Table:
    """Return a batch's output as a table of `size` rows. The first column is the data-set index, from `start` on.

    Columns of tensors on the CPU and arrays share their memory where Arrow can: write or copy the table before the
    model may reuse it.

    Args:
        schema: what `schema_of` returns for the first batch, which has the same structure; None: this batch's own.

    Raises:
        TypeError, ValueError: as `describe`; a leaf does not have one row a sample; a type does not fit `schema`
            (integers fit into larger ones and into floats that hold them exactly, None fits into anything). Names the
            column and the data-set index.
    """
    leaves = flatten(output)
    names = [INDEX, *(name for name, _ in leaves)]
    arrays = [
        _column(name, leaf, start, size, None if schema is None else schema.field(name).type) for name, leaf in leaves
    ]
    arrays.insert(0, pa.array(np.arange(start, start + size, dtype=np.int64)))
    if schema is not None and [array.type for array in arrays] == schema.types and names == schema.names:
        return pa.Table.from_arrays(arrays, schema=schema)  # the same as below, in less time
    table = pa.table(arrays, names=names)
    return table if schema is None else table.select(schema.names).cast(schema)


def _column(name: str, leaf: Any, start: int, size: int, to: pa.DataType | None) -> pa.Array:
    where = f"column {name!r}"
    if (rows := length_of(leaf)) not in (None, size):
        raise ValueError(
            f"index {start}: {where} has {rows} rows for a batch of {size} samples: give one row a sample, or where "
            f"their number differs a list with one entry a sample"
        )

    def make(part: Any) -> pa.Array:
        description = leaf_of(part, where)
        if description["kind"] == "none":
            array = pa.nulls(size)
        elif description["kind"] == "list":
            array = _entries(part, description["entry"], where)
        else:
            array = _of_one_shape(part, where)
        return array if to is None else _cast(array, to, where)

    return located(leaf, start, make)


def _type(description: Description) -> pa.DataType:
    kind = description["kind"]
    if kind == "none":
        return pa.null()
    if kind in ("list", "tuple"):
        return pa.list_(_type(description["entry"]))
    if kind == "dict":
        return pa.struct(
            [(str(key), _type(item)) for key, item in zip(description["keys"], description["items"], strict=True)]
        )
    dtype = "complex128" if kind == "complex" else description.get("dtype", "")
    if dtype in COMPLEX:
        part = _NUMBERS[COMPLEX[dtype]]
        found = pa.struct([("real", part), ("imag", part)])
    else:
        found = _NUMBERS[STORED.get(dtype, dtype)] if dtype else _PLAIN[kind]
    for _ in range(description.get("dims", 0)):
        found = pa.list_(found)
    return found


def _entries(values: list[Any], description: Description, where: str) -> pa.Array:
    kind = description["kind"]
    if kind in _PLAIN:
        try:
            return pa.array(values, _PLAIN[kind])
        except (ValueError, OverflowError) as error:  # an integer is too large, or a string has half a surrogate pair
            raise ValueError(f"{where} has a value that is no {_PLAIN[kind]}: {error}: give another type") from None
    present = [row for row, value in enumerate(values) if value is not None]
    if not present:
        return pa.nulls(len(values), _type(description))
    if len(present) < len(values):
        positions: list[int | None] = [None] * len(values)
        for position, row in enumerate(present):
            positions[row] = position
        return _entries([values[row] for row in present], description, where).take(pa.array(positions, pa.int64()))
    if "dtype" in description:
        shapes = np.array([value.shape for value in values], dtype=np.int64).reshape(len(values), description["dims"])
        return _nested(values, shapes, where)
    if kind == "dict":
        rows = [fields_of(value, where) for value in values]
        columns = [
            _entries([row[key] for row in rows], item, f"{where}[{key!r}]")
            for key, item in zip(description["keys"], description["items"], strict=True)
        ]
        return pa.StructArray.from_arrays(columns, names=[str(key) for key in description["keys"]])
    if kind in ("list", "tuple"):
        inner = _entries(list(chain.from_iterable(values)), description["entry"], where)
        return pa.ListArray.from_arrays(
            _offsets(np.array([len(value) for value in values], dtype=np.int64), where), inner
        )
    return _numbers(np.array(values, dtype=np.complex128))


def _flat(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Return the numbers of tensors or arrays, one after the other. On a device they are joined before one transfer."""
    if not isinstance(values[0], torch.Tensor):
        rows = [np.asarray(value).reshape(-1) for value in values]
        flat = rows[0] if len(rows) == 1 else np.concatenate(rows)
        return flat.astype(flat.dtype.newbyteorder("="), copy=False)
    parts = [value.detach().reshape(-1) for value in values]
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    stored = STORED.get(str(joined.dtype).removeprefix("torch."))
    return (joined.to(getattr(torch, stored)) if stored else joined).cpu().resolve_conj().resolve_neg().numpy()


def _numbers(flat: np.ndarray[Any, Any]) -> pa.Array:
    if flat.dtype.kind == "c":
        return pa.StructArray.from_arrays([pa.array(flat.real), pa.array(flat.imag)], names=["real", "imag"])
    return pa.array(flat)


def _nested(values: Sequence[Any], shapes: Ints, where: str) -> pa.Array:
    """Return rows of these shapes, (rows, dims), as nested lists; the innermost lists are made first."""
    _check_count(int(shapes.prod(axis=1).sum()), where)
    array = _numbers(_flat(values))
    for level in reversed(range(shapes.shape[1])):
        array = pa.ListArray.from_arrays(
            _offsets(np.repeat(shapes[:, level], shapes[:, :level].prod(axis=1)), where), array
        )
    return array


def _of_one_shape(part: Any, where: str) -> pa.Array:
    """Return what `_nested` returns for the rows of one tensor or array."""
    for level in range(1, len(part.shape)):
        _check_count(math.prod(part.shape[: level + 1]), where)
    array = _numbers(_flat([part]))
    for level in reversed(range(1, len(part.shape))):
        ends = np.arange(math.prod(part.shape[:level]) + 1, dtype=np.int32) * np.int32(part.shape[level])
        array = pa.ListArray.from_arrays(pa.array(ends), array)
    return array


def _offsets(lengths: Ints, where: str) -> pa.Array:
    offsets = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    _check_count(int(offsets[-1]), where)
    return pa.array(offsets.astype(np.int32))


def _check_count(count: int, where: str) -> None:
    if count > _MOST:
        raise OverflowError(f"{where} has {count} numbers, more than 2**31 - 1 in one batch: use a smaller batch_size")


def _cast(array: pa.Array, to: pa.DataType, where: str) -> pa.Array:
    """Return the array as another type that holds it exactly.

    Raises:
        TypeError, ValueError: the type does not; names the column.
    """
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


def from_table(table: pa.Table, description: Description) -> Any:
    """Return the outputs of a whole data set, in the table's order.

    A tensor or array is whole, (rows, ...), in its dtype, on the CPU, if all rows have one shape; else a list with one
    tensor or array a sample, views of one, and None for the samples of a batch that had None. A list has its entries as
    they were, but 0-d arrays are NumPy scalars, and integers that shared a column with floats are floats. Named tuples
    and dataclasses are dicts. A size behind a dimension of size 0 is not stored: it is that of the column's other rows,
    else 0.

    Raises:
        ValueError: a column is missing, or is not as described.
    """
    if lacking := [leaf["column"] for leaf in leaves_of(description) if leaf["column"] not in table.column_names]:
        raise ValueError(f"the table has no column {lacking[0]!r}: it has {table.column_names}")

    def value(leaf: Description) -> Any:
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

    return rebuilt(description, value)


def _restored(chunks: list[pa.Array], description: Description, name: str) -> list[Any]:
    kind = description["kind"]
    if kind == "none" or kind in _PLAIN:
        return [value for chunk in chunks for value in chunk.to_pylist()]
    if any(chunk.null_count for chunk in chunks):
        valid = chain.from_iterable(chunk.is_valid().to_pylist() for chunk in chunks)
        present = iter(_restored([chunk.drop_null() for chunk in chunks], description, name))
        return [next(present) if here else None for here in valid]
    if "dtype" in description:
        return _cut(*_dense_rows(chunks, description, name))
    if kind == "dict":
        columns = [
            _restored([chunk.field(str(key)) for chunk in chunks], item, name)
            for key, item in zip(description["keys"], description["items"], strict=True)
        ]
        return [dict(zip(description["keys"], row, strict=True)) for row in zip(*columns, strict=True)]
    if kind in ("list", "tuple"):
        inner = iter(_restored([chunk.flatten() for chunk in chunks], description["entry"], name))
        lengths = chain.from_iterable(chunk.value_lengths().to_pylist() for chunk in chunks)
        return [(list if kind == "list" else tuple)(islice(inner, length)) for length in lengths]
    return [value for chunk in chunks for value in _to_numpy(chunk, "complex128").tolist()]


def _dense_rows(chunks: list[pa.Array], description: Description, name: str) -> tuple[Any, Ints]:
    """Return the numbers of all rows, flat, in the described dtype, and the shapes of rows, (rows, dims)."""
    pairs = [_unnested(chunk, description["dims"], name) for chunk in chunks]
    shapes = np.concatenate([np.empty((0, description["dims"]), np.int64), *(shapes for shapes, _ in pairs)])
    for sizes in shapes.T:
        known = np.unique(sizes[sizes >= 0])
        sizes[sizes < 0] = known[0] if len(known) == 1 else 0
    dtype = description["dtype"]
    empty = np.empty(0, STORED.get(dtype, dtype))
    # The only copy. It is needed, since Arrow's memory is read-only.
    flat = np.concatenate([_to_numpy(numbers, dtype) for _, numbers in pairs] or [empty])
    if description["kind"] == "array":
        return flat.astype(dtype, copy=False), shapes
    return torch.from_numpy(flat).to(getattr(torch, dtype)), shapes


def _unnested(array: pa.Array, dims: int, name: str) -> tuple[Ints, pa.Array]:
    """Return the shapes of rows, (rows, dims), with -1 for a size that no list shows, and their numbers."""
    shapes = np.full((len(array), dims), -1, dtype=np.int64)
    counts = np.ones(len(array), dtype=np.int64)  # lists of each row at this level
    for level in range(dims):
        if array.null_count:
            break
        lengths = array.value_lengths().to_numpy()
        first = counts.cumsum() - counts
        shapes[counts > 0, level] = lengths[first[counts > 0]]
        if not np.array_equal(np.repeat(shapes[:, level], counts), lengths):
            raise ValueError(f"column {name!r} has a row that is not rectangular, as tensors are")
        counts = counts * shapes[:, level]  # a size is -1 only where the count is 0
        array = array.flatten()
    if array.null_count:
        raise ValueError(f"column {name!r} has null inside of a tensor")
    return shapes, array


def _to_numpy(array: pa.Array, dtype: str) -> np.ndarray[Any, Any]:
    if dtype not in COMPLEX:
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

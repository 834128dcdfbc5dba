"""Outputs as Arrow columns, one row a sample, compared with Python's lists."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import namedtuple
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddparity.comm.nesting import difference
from ddparity.inference.columns import from_table, schema_of, to_table
from ddparity.inference.description import describe, flatten

Boxes = namedtuple("Boxes", "corners scores")


@dataclass
class Answer:
    logits: torch.Tensor
    text: list[str]


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "float32", "float64"]
COMPLEX = ["complex64", "complex128"]
FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.5, -3.0, 0.1]


def _numbers(dtype: str, count: int) -> np.ndarray[Any, Any]:
    """Return extreme and ordinary numbers of a NumPy dtype."""
    if dtype == "bool":
        values: list[Any] = [True, False, False]
    elif dtype in INTEGERS:
        values = [np.iinfo(dtype).min, np.iinfo(dtype).max, 0, 1, 77]
    elif dtype in COMPLEX:
        values = [complex(a, b) for a in SPECIAL[:4] for b in SPECIAL[1:]]
    else:
        values = [*SPECIAL, np.finfo(dtype).max, np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal]
    return np.resize(np.array(values, dtype), count)


def _bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def _parquet(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def _reread(output: Any, size: int, batches: int = 1, description: Any = None) -> Any:
    """Write an output to a Parquet file, batch by batch, with the whole output's schema, and read it."""
    description = json.loads(json.dumps(description or describe(output)))
    schema = schema_of(description)
    ends = np.linspace(0, size, batches + 1).astype(int)
    tables = [to_table(_rows(output, a, b), a, b - a, schema) for a, b in pairwise(ends)]
    assert all(table.schema == schema for table in tables)
    data = _parquet(pa.concat_tables(tables), row_group_size=3)
    table = pq.read_table(io.BytesIO(data))
    assert table["index"].to_pylist() == list(range(size))
    return from_table(table, description)


def _rows(output: Any, start: int, stop: int) -> Any:
    if isinstance(output, dict):
        return {key: _rows(value, start, stop) for key, value in output.items()}
    if isinstance(output, tuple):
        return tuple(_rows(value, start, stop) for value in output)
    return None if output is None else output[start:stop]


def _same(a: Any, b: Any) -> bool:
    """Compare types and values, also NaN and -0.0, but not sizes behind a dimension of size 0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return a.dtype == b.dtype and a.ndim == b.ndim and repr(a.tolist()) == repr(b.tolist())
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return repr(a) == repr(b)


# Types of numbers


@pytest.mark.parametrize("shape", [(9,), (9, 3), (3, 2, 2), (4, 0), (3, 2, 0), (1, 40)])
@pytest.mark.parametrize("dtype", ["bool", *INTEGERS, *FLOATS, *COMPLEX])
def test_numbers_come_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    array = _numbers(dtype, int(np.prod(shape))).reshape(shape)
    result = _reread({"tensor": torch.from_numpy(array), "array": array}, shape[0], batches=2)
    assert result["tensor"].shape == result["array"].shape == shape
    assert result["tensor"].dtype == getattr(torch, dtype)
    assert result["array"].dtype == dtype
    assert result["tensor"].numpy().tobytes() == result["array"].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", *FLOAT8])
def test_floats_unknown_to_parquet_are_stored_exactly(dtype: str) -> None:
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    wide = dtype == "bfloat16"
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16) if wide else torch.arange(256).to(torch.uint8)
    tensor = patterns.view(getattr(torch, dtype)).reshape(-1, 64)
    result = _reread(tensor, len(tensor))
    assert result.dtype == tensor.dtype
    differ = result.view(patterns.dtype) != tensor.view(patterns.dtype)
    assert tensor.float()[differ].isnan().all()  # only the payload of a NaN is lost
    assert torch.equal(result.float().isnan(), tensor.float().isnan())


@pytest.mark.parametrize(
    ("output", "types"),
    [
        (torch.zeros(2), "float"),
        (torch.zeros(2, 3, 4, dtype=torch.float16), "list<item: list<item: halffloat>>"),
        (torch.zeros(2, 1, dtype=torch.bfloat16), "list<item: float>"),
        (torch.zeros(2, dtype=torch.complex64), "struct<real: float, imag: float>"),
        (np.zeros(2, bool), "bool"),
        (["a", None], "string"),
        ([1, None], "int64"),
        ([1, 2.5], "double"),
        ([1j, None], "struct<real: double, imag: double>"),
        ([[1], []], "list<item: int64>"),
        ([torch.zeros(2, 4), torch.zeros(0, 4)], "list<item: list<item: float>>"),
        ([np.float32(1), np.float32(2)], "float"),
        (
            [{"boxes": torch.zeros(1, 4), 3: "x"}] * 2,
            "struct<boxes: list<item: list<item: float>>, 3: string>",
        ),
        (None, "null"),
        ([None, None], "null"),
    ],
)
def test_types_of_columns(output: Any, types: str) -> None:
    schema = schema_of(describe(output))
    assert schema.names == ["index", "output"]
    assert str(schema.field("output").type) == types
    assert schema.metadata is None
    table = to_table(output, 5, 2)
    assert table.schema == schema
    assert table["index"].to_pylist() == [5, 6]


def test_columns_hold_what_lists_hold() -> None:
    tensor = torch.arange(24).reshape(2, 3, 4)
    table = to_table({"whole": tensor, "ragged": [torch.ones(2, 1), torch.ones(0, 1)], "names": ["é", None]}, 0, 2)
    assert table["whole"].to_pylist() == tensor.tolist()
    assert table["ragged"].to_pylist() == [[[1.0], [1.0]], []]
    assert table["names"].to_pylist() == ["é", None]


# Structure


def test_flatten_names_leaves_by_their_keys() -> None:
    a, b, c, d, e = (torch.zeros(1) for _ in range(5))
    output = ({"scores": a, 7: b}, Boxes(c, None), Answer(d, ["x"]), e)
    leaves = flatten(output)
    assert [name for name, _ in leaves] == ["0.scores", "0.7", "1.corners", "1.scores", "2.logits", "2.text", "3"]
    assert [leaf for _, leaf in leaves][2] is c
    assert flatten(a) == [("output", a)]
    assert flatten({"a": {}}) == []


def test_nesting_comes_back_with_named_tuples_and_dataclasses_as_dicts() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    output = {"a": {"b": (x, None, {5: x.numpy()})}, "t": (), 1: Boxes(x, ["p", "q", "r"]), "d": Answer(x, ["a"] * 3)}
    result = from_table(to_table(output, 0, 3), describe(output))
    expected = {
        "a": {"b": (x, None, {5: x.numpy()})},
        "t": (),
        1: {"corners": x, "scores": ["p", "q", "r"]},
        "d": {"logits": x, "text": ["a"] * 3},
    }
    assert _same(result, expected)


def test_description_is_json_and_does_not_depend_on_the_batch() -> None:
    def output(size: int, width: int) -> Any:
        return {
            "x": torch.zeros(size, width, 2),
            "r": [torch.zeros(i, width) for i in range(size)],
            "d": [{"n": [1] * i, "s": str(i)} for i in range(1, size + 1)],
            4: (None, np.zeros((size, width))),
        }

    first = describe(output(3, 5))
    assert describe(output(1, 0)) == describe(output(7, 2)) == first == json.loads(json.dumps(first))
    assert schema_of(describe(output(1, 0))).equals(schema_of(first), check_metadata=True)


def test_same_outputs_are_the_same_bytes() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    outputs = [
        {"x": x, "r": [row[:i] for i, row in enumerate(x)], "s": ["a"] * 6},
        {"x": x.t().contiguous().t(), "r": [row[:i].clone() for i, row in enumerate(x)], "s": ["a"] * 6},
        {"x": x.clone().requires_grad_(), "r": [row[:i] for i, row in enumerate(x)], "s": [np.str_("a")] * 6},
    ]
    schema = schema_of(describe(outputs[0]))
    assert len({_parquet(to_table(output, 0, 6, schema)) for output in outputs}) == 1
    tables = [to_table(_rows(outputs[0], a, b), a, b - a, schema) for a, b in ((0, 4), (4, 6))]
    assert _parquet(pa.concat_tables(tables)) == _parquet(to_table(outputs[0], 0, 6))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0).reshape(4, 3)[:, ::2],
        torch.arange(3.0).expand(4, 3),
        torch.ones(4, 2, requires_grad=True),
        torch.nn.Parameter(torch.ones(4)),
        torch.tensor([1 + 2j, 3 - 1j, -1j, 0]).conj(),
        torch.tensor([1 + 2j, 3 - 1j, -1j, 0]).conj().imag,
    ],
)
def test_views_and_gradients(tensor: torch.Tensor) -> None:
    for result in (_reread(tensor, 4), torch.stack(_reread(list(tensor), 4))):
        assert _same(result, tensor.detach().clone().resolve_conj().resolve_neg())
        assert not result.requires_grad
        result.add_(1)  # memory of its own


def test_arrays_that_torch_refuses() -> None:
    array = np.arange(12, dtype=">i4").reshape(4, 3)[::-1]
    array.setflags(write=False)
    assert _same(_reread(array, 4), np.asarray(array, np.int32))
    assert _same(_reread(list(array), 4), list(np.asarray(array, np.int32)))


# Ragged results


def test_detections() -> None:
    output = [
        {"boxes": torch.rand(n, 4), "labels": torch.arange(n), "mask": np.ones((n, 2, 3), bool), "name": f"image {n}"}
        for n in (2, 0, 3, 1, 0)
    ]
    result = _reread(output, 5, batches=3)
    assert _same(result, output)
    assert [entry["boxes"].shape for entry in result] == [(2, 4), (0, 4), (3, 4), (1, 4), (0, 4)]
    assert result[1]["mask"].shape == (0, 2, 3)


def test_whole_where_shapes_agree_and_a_list_where_they_do_not() -> None:
    output = {"a": torch.ones(3, 2, 4), "b": np.ones((3, 2))}
    description = describe(output)
    schema = schema_of(description)
    batches = [output, {"a": torch.ones(2, 5, 4), "b": np.ones((2, 2))}]
    tables = [to_table(batch, start, len(batch["a"]), schema) for start, batch in zip((0, 3), batches)]
    result = from_table(pa.concat_tables(tables), description)
    assert [tuple(x.shape) for x in result["a"]] == [(2, 4)] * 3 + [(5, 4)] * 2
    assert result["b"].shape == (5, 2)
    assert _same(from_table(tables[1], description)["a"], torch.ones(2, 5, 4))


def test_zero_rows() -> None:
    ragged = [{"t": torch.ones(1), "n": [(1j,)]}, {"t": torch.ones(2), "n": []}]
    output = {"x": torch.ones(2, 3).bfloat16(), "n": np.ones(2, "c8"), "s": ["a", "b"], "d": ragged, "0": None}
    description = describe(output)
    table = to_table(output, 0, 2)
    no_chunks = table.schema.empty_table()
    for empty in (table.slice(2), no_chunks, pq.read_table(io.BytesIO(_parquet(no_chunks)))):
        result = from_table(empty, description)
        assert result["x"].shape == (0, 0)
        assert result["x"].dtype == torch.bfloat16
        assert result["n"].shape == (0,)
        assert result["n"].dtype == np.complex64
        assert result["s"] == result["d"] == []
        assert result["0"] is None
    batch = {"x": torch.ones(0, 3).bfloat16(), "n": np.ones(0, "c8"), "s": [], "d": [], "0": None}
    assert to_table(batch, 2, 0, table.schema).num_rows == 0


def test_a_size_behind_a_size_of_zero_is_that_of_the_other_rows() -> None:
    assert [tuple(x.shape) for x in _reread([torch.ones(0, 3), torch.ones(1, 3)], 2)] == [(0, 3), (1, 3)]
    assert _reread([torch.ones(0, 3), torch.ones(1, 2), torch.ones(1, 3)], 3)[0].shape == (0, 0)
    assert _reread(torch.ones(2, 0, 3), 2).shape == (2, 0, 0)


def test_slices_of_a_table() -> None:
    entries = [{"t": torch.ones(i), "c": [1j * i] * i, "s": [str(i)] * i, "f": (i,)} for i in range(6)]
    output = {"x": torch.arange(24).reshape(6, 2, 2), "d": entries, "s": [[str(i)] * i for i in range(6)]}
    table = to_table(output, 0, 6)
    assert _same(from_table(table.slice(2, 3), describe(output)), _rows(output, 2, 5))
    assert _same(from_table(pa.concat_tables([table.slice(0, 1), table.slice(1)]), describe(output)), output)


# Any output


def _dense(draw: st.DrawFn, shape: tuple[int, ...], dtype: str, kind: str) -> Any:
    count = int(np.prod(shape))
    offset = draw(st.integers(0, 10))
    array = _numbers(dtype, count + offset)[offset:].reshape(shape)
    return torch.from_numpy(array) if kind == "tensor" else array


@st.composite
def _entries(draw: st.DrawFn, rows: int, depth: int = 2) -> list[Any]:
    """Draw one entry a sample, of one kind, some of them None."""
    plain = ["str", "int", "float", "bool", "complex", "dense", "scalar"]
    kind = draw(st.sampled_from([*plain, "list", "tuple", "dict"] if depth else plain))
    if kind == "dict":
        columns = [draw(_entries(rows, depth - 1)) for _ in range(draw(st.integers(1, 3)))]
        found: list[Any] = [dict(zip(("a", 0, "b.c"), row)) for row in zip(*columns)]
    elif kind in ("list", "tuple"):
        lengths = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
        inner = iter(draw(_entries(sum(lengths), depth - 1)))
        found = [(list if kind == "list" else tuple)(next(inner) for _ in range(length)) for length in lengths]
    elif kind == "dense":
        dtype = draw(st.sampled_from(["bool", "int64", "uint8", "float16", "float32", "complex64"]))
        which, dims, last = draw(st.sampled_from(["tensor", "array"])), draw(st.integers(1, 3)), draw(st.integers(0, 2))
        shapes = [(*(draw(st.integers(0, 3)) for _ in range(dims - 1)), last) for _ in range(rows)]
        found = [_dense(draw, shape, dtype, which) for shape in shapes]
    elif kind == "scalar":
        found = list(_dense(draw, (rows,), "float32", draw(st.sampled_from(["tensor", "array"]))))
    else:
        values: dict[str, st.SearchStrategy[Any]] = {
            "str": st.text(max_size=4), "int": st.integers(-(2**63), 2**63 - 1), "float": st.floats(),
            "bool": st.booleans(), "complex": st.complex_numbers(),
        }  # fmt: skip
        found = draw(st.lists(values[kind], min_size=rows, max_size=rows))
    absent = draw(st.sets(st.integers(0, max(rows - 1, 0)), max_size=2))
    return [None if row in absent else entry for row, entry in enumerate(found)]


@st.composite
def _outputs(draw: st.DrawFn, rows: int, depth: int = 2) -> Any:
    kind = draw(st.sampled_from(["tensor", "array", "list", "none", *(["dict", "tuple"] * bool(depth))]))
    if kind == "none":
        return None
    if kind == "list":
        return draw(_entries(rows))
    if kind in ("tensor", "array"):
        shape = (rows, *draw(st.lists(st.integers(0, 3), max_size=3)))
        return _dense(draw, shape, draw(st.sampled_from(["bool", *INTEGERS, *FLOATS, *COMPLEX])), kind)
    items = [draw(_outputs(rows, depth - 1)) for _ in range(draw(st.integers(0, 3)))]
    return tuple(items) if kind == "tuple" else dict(zip(("key", 0, "ünï"), items))


@settings(max_examples=150)
@given(st.data(), st.integers(0, 5), st.integers(1, 3))
def test_any_output_comes_back(data: st.DataObject, rows: int, batches: int) -> None:
    output = data.draw(_outputs(rows))
    assert _same(_reread(output, rows, batches), output)


# Columns of a given type


def _schema(**types: pa.DataType) -> pa.Schema:
    return pa.schema([("index", pa.int64()), *types.items()])


@pytest.mark.parametrize(
    ("leaf", "wanted", "expected"),
    [
        ([1, None], pa.float64(), [1.0, None]),
        ([None, None], pa.string(), [None, None]),
        (None, pa.list_(pa.float32()), [None, None]),
        ([[], [None]], pa.list_(pa.string()), [[], [None]]),
        ([[1], None], pa.list_(pa.float64()), [[1.0], None]),
        ([(1,), (2, 3)], pa.list_(pa.int64()), [[1], [2, 3]]),
        (torch.tensor([[1], [2]], dtype=torch.int32), pa.list_(pa.float64()), [[1.0], [2.0]]),
        (torch.tensor([1.5, 2]), pa.float64(), [1.5, 2.0]),
        (np.array([1, 255], np.uint8), pa.int16(), [1, 255]),
        (
            [{"b": None, "a": 1}, None],
            pa.struct([("a", pa.float64()), ("b", pa.list_(pa.int8()))]),
            [{"a": 1.0, "b": None}, None],
        ),
    ],
)
def test_fits_into_a_wider_type(leaf: Any, wanted: pa.DataType, expected: list[Any]) -> None:
    table = to_table({"x": leaf}, 0, 2, _schema(x=wanted))
    assert table.schema == _schema(x=wanted)
    assert repr(table["x"].to_pylist()) == repr(expected)


def test_a_schema_gives_the_types_of_some_columns() -> None:
    output = {"score": [1], "late": None}
    schema = schema_of(describe(output), pa.schema([("late", pa.string()), ("score", pa.float64())]))
    assert schema == _schema(score=pa.float64(), late=pa.string())
    tables = [to_table(output, 0, 1, schema), to_table({"late": ["x"], "score": [2.5]}, 1, 1, schema)]
    assert from_table(pa.concat_tables(tables), describe(output)) == {"score": [1.0, 2.5], "late": [None, "x"]}
    with pytest.raises(ValueError, match=r"schema= has the column 'z', but the output has \['score', 'late'\]"):
        schema_of(describe(output), pa.schema([("z", pa.string())]))


def test_a_tensor_absent_from_a_batch_is_none_for_its_samples() -> None:
    output = {"x": torch.ones(2, 3)}
    schema = schema_of(describe(output))
    tables = [to_table(output, 0, 2, schema), to_table({"x": None}, 2, 1, schema)]
    assert _same(from_table(pa.concat_tables(tables), describe(output)), {"x": [torch.ones(3), torch.ones(3), None]})


# What is refused

_REFUSED = [
    (1.5, TypeError, r"column 'output' is a float: give a tensor or an array with one row a sample, or a list"),
    (torch.tensor(1.0), TypeError, r"column 'output' is a Tensor of shape \(\): give a tensor"),
    ("text", TypeError, "is a str"),
    (torch.eye(2).to_sparse(), TypeError, r"index 10: column 'output' is a torch.sparse_coo tensor: .*to_dense\(\)"),
    (np.array(["a", "b"]), TypeError, r"is an array of str32: give a list with one entry a sample, \.tolist\(\)"),
    (np.array(["a", 1], object), TypeError, r"is an array of object: .*\.tolist\(\)"),
    (np.array([1, 2], "M8[s]"), TypeError, r'is an array of datetime64\[s\]: give integers, \.astype\("int64"\)'),
    (np.ones(2, np.longdouble), TypeError, r"is an array of \w+128: .*float64"),
    (np.ma.masked_array([1, 2], [0, 1]), TypeError, r"masked array, .*give \.filled\(\)"),
    ([1, "a"], TypeError, "index 11: column 'output' holds str besides int: give one type throughout, or None"),
    ([True, 1], TypeError, "index 11: .*holds int besides bool"),
    (["a", b"b"], TypeError, "index 11: column 'output' holds bytes: give strings, numbers"),
    ([torch.ones(1), np.ones(1)], TypeError, "index 11: .*holds array besides tensor"),
    (
        [torch.ones(1), torch.ones(1, 1)],
        ValueError,
        "index 11: .*holds tensors of float32 with 2 dimensions a sample besides tensors of float32 with 1 dim",
    ),
    ([None, torch.ones(1).to_sparse()], TypeError, "index 11: .*sparse_coo tensor"),
    ([{"a": 1}, {"b": 1}], ValueError, r"index 11: .*has the keys \['b'\] besides \['a'\]: give None for what is ab"),
    ([{"a": 1}, {"a": [1]}], TypeError, r"index 11: column 'output'\['a'\] holds list besides int"),
    ([{}, {}], ValueError, "has the keys .*: give one at least"),
    ([{1: 2, "1": 2}] * 2, ValueError, "no integer that is also a string"),
    ([{1.5: 2}] * 2, TypeError, r"column 'output' has the key 1.5, a float: keys must be strings or integers"),
    ([1, 2**63], ValueError, "index 11: column 'output' has a value that is no int64"),
    ([1.5, 2**53 + 1], ValueError, "index 11: column 'output' has a value that is no double"),
    (["a", "\ud800"], ValueError, "index 11: column 'output' has a value that is no string: .*surrogates"),
    (torch.ones(3), ValueError, "index 10: column 'output' has 3 rows for a batch of 2 samples: give one row a sample"),
    ([1, 2, 3], ValueError, "index 10: column 'output' has 3 rows for a batch of 2"),
    ({(1, 2): [1, 2]}, TypeError, r"output has the key \(1, 2\), a tuple: keys must be strings or integers"),
    ({True: [1, 2]}, TypeError, r"output has the key True, a bool: keys must be strings or integers"),
    ({"index": [1, 2]}, ValueError, r"output\['index'\] would be the column 'index', .*give another key"),
    ({"a": {"b": [1, 2]}, "a.b": [1, 2]}, ValueError, r"output\['a'\]\['b'\] and output\['a.b'\] would both be"),
    (({1: None, "1": None},), ValueError, r"output\[0\]\[1\] and output\[0\]\['1'\] would both be the column '0.1'"),
]  # fmt: skip


@pytest.mark.parametrize(("output", "error", "message"), _REFUSED, ids=[message for *_, message in _REFUSED])
def test_refused_with_the_way_out(output: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        to_table(output, 10, 2)
    assert type(caught.value) is error


@pytest.mark.parametrize("kind", ["quantized", "sparse_csr", "nested", "complex32"])
def test_refused_kinds_of_tensors(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that they are prototypes
        tensor = {
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "sparse_csr": lambda: torch.eye(2).to_sparse_csr(),
            "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "complex32": lambda: torch.ones(2, dtype=torch.complex32),
        }[kind]()
    for call in (lambda: to_table(tensor, 4, 2), lambda: describe(tensor, start=4), lambda: describe([tensor], 4)):
        with pytest.raises(TypeError, match=f"index 4: column 'output' is a .*{kind}.*: give "):
            call()


def test_errors_of_describe_name_the_sample() -> None:
    with pytest.raises(TypeError, match=r"^index 42: column 'a' holds str besides int"):
        describe({"a": [1, 2, "x", "y", 3]}, start=40)
    with pytest.raises(TypeError, match=r"^entry 2: column 'a' holds str besides int"):
        describe({"a": [1, 2, "x", "y", 3]})


@pytest.mark.parametrize(
    ("leaf", "wanted", "message"),
    [
        ([1, 2.5], pa.int64(), "index 11: column 'x' holds double where the first batch, or schema=, has int64: give"),
        ([None, "a"], pa.null(), "index 11: column 'x' holds string where .* has null: .*pass schema="),
        (["a", "b"], pa.float64(), "index 10: column 'x' holds string where .* has double"),
        ([True, False], pa.int64(), "index 10: column 'x' holds bool where"),
        (torch.ones(2), pa.int64(), "index 10: column 'x' holds float where"),
        (torch.ones(2).double(), pa.float32(), "index 10: column 'x' holds double where .* has float:"),
        (torch.ones(2, 1), pa.float32(), "index 10: column 'x' holds list<item: float> where"),
        (torch.ones(2, dtype=torch.int8), pa.float16(), "index 10: column 'x' holds int8 where"),
        (torch.tensor([1, 2**53 + 1]), pa.float64(), "index 11: column 'x' does not fit into double: .*pass a wider"),
        ([[1], [2, 300]], pa.list_(pa.int8()), "index 11: column 'x' does not fit into int8"),
        ([{"a": 1}, {"a": 2.5}], pa.struct([("a", pa.int64())]), r"index 11: column 'x'\['a'\] holds double"),
        ([{"a": 1}] * 2, pa.struct([("b", pa.int64())]), "holds struct<a: int64> where .* has struct<b: int64>"),
    ],
)
def test_other_types_than_the_first_batch(leaf: Any, wanted: pa.DataType, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        to_table({"x": leaf}, 10, 2, _schema(x=wanted))


@pytest.mark.parametrize(
    ("batch", "first", "message"),
    [
        (torch.ones(1), torch.ones(1).bfloat16(), "is a tensor of float32 .*, not a tensor of bfloat16"),
        (torch.ones(1), np.ones(1, np.float32), "is a tensor of float32 .*, not an array of float32"),
        (torch.ones(1), torch.ones(1, 1), "is a tensor of float32 with 0 dimensions .*, not .* with 1 dimensions"),
        ([np.ones(1)], [torch.ones(1, 1)], "is a list of arrays .*, not a list of tensors"),
        ([{"a": [(1,)]}], [{"a": [[1]]}], "dicts of 'a': lists of tuples of int, not"),
        ([{"a": 1}], [{"b": 1}], "column 'output' is a list of dicts of 'a': int, not a list of dicts of 'b': int"),
        ({"x": ["a"]}, {"x": [1]}, "column 'x' is a list of str, not a list of int"),
        ({"y": [1]}, {"x": [1]}, r"the output is a dict with the keys \['y'\], not a dict with the keys \['x'\]"),
        ({"0": [1]}, ([1],), r"the output is a dict with the keys \['0'\], not a tuple of 1"),
        ({0: [1]}, {"0": [1]}, r"the output is a dict with the keys \[0\], not a dict with the keys \['0'\]"),
        ({"a": None}, {"a": {"b": [1]}}, r"column 'a' is None, not a dict with the keys \['b'\]"),
    ],
)
def test_unlike_the_first_batch(batch: Any, first: Any, message: str) -> None:
    found = difference(describe(batch), describe(first), "the output", lenient=True)
    assert found is not None and re.search(message, found)


@pytest.mark.parametrize(
    ("batch", "first"),
    [
        (None, torch.ones(1)),
        ([None], [{"a": 1}]),
        ([{"b": [], "a": None}], [{"a": "x", "b": [1j]}]),
        ([1], [2.5]),
        ({"b": [1], "a": ["x"]}, {"a": ["y"], "b": [2]}),
        (Boxes([1], None), {"corners": [1], "scores": None}),
    ],
)
def test_like_the_first_batch(batch: Any, first: Any) -> None:
    assert difference(describe(batch), describe(first), "the output", lenient=True) is None


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[[1.0], [1.0, 2.0]]], "column 'output' has a row that is not rectangular"),
        ([[[1.0], None]], "column 'output' has null inside of a tensor"),
        ([[[1.0, None]]], "column 'output' has null inside of a tensor"),
    ],
)
def test_tables_that_are_not_as_described(column: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_table(pa.table({"output": pa.array(column)}), describe(torch.ones(1, 1, 1, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"the table has no column 'output': it has \['other'\]"):
        from_table(pa.table({"other": [1]}), describe([1]))


def test_more_numbers_than_a_column_can_hold() -> None:
    row = torch.zeros(1, dtype=torch.uint8).expand(2**30)
    for output in (row.expand(2, -1), [row] * 2, [{"a": [row]}] * 2):
        with pytest.raises(
            ValueError, match=r"index 6: column .* has 2147483648 numbers, more than 2\*\*31 - 1 in one"
        ):
            to_table(output, 6, 2)


@pytest.mark.gpu
def test_tensors_of_a_device() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    output = {"x": x.cuda(), "r": [x[:, :1].cuda(), x.cuda()], "mixed": [x.cuda(), x]}
    result = from_table(to_table(output, 0, 2), describe(output))
    assert _same(result, {"x": x, "r": [x[:, :1], x], "mixed": [x, x]})

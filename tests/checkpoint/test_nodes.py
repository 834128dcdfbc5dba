"""States as JSON and flat tensors: which nodes are read, which are refused, and what comes back. In one process."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import time
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from ddparity.checkpoint.nodes import (
    DEPTH,
    build,
    bytes_of,
    check_chunks,
    describe,
    leaf_keys,
    leaves,
    named_types,
    types_in,
)

Point = namedtuple("Point", "x y")
FLOAT = {"kind": "tensor", "name": "w", "dtype": "float32", "shape": [2, 3]}


class Mode(enum.Enum):
    ON = 1


@dataclasses.dataclass
class Run:
    mode: Mode
    point: Point


@dataclasses.dataclass
class Listed(list):
    width: int = 0


class Pairs(tuple):
    pass


def _nested(levels: int, inner: Any) -> Any:
    for _ in range(levels):
        inner = {"kind": "list", "items": [inner]}
    return inner


def _dict(keys: Any, items: Any, **more: Any) -> dict[str, Any]:
    return {"kind": "dict", "keys": keys, "items": items, **more}


@pytest.mark.parametrize(
    "node",
    [
        None, True, 3, -0.5, "text",
        {"kind": "float", "text": "-inf"},
        {"kind": "complex", "parts": [1.0, {"kind": "float", "text": "nan"}]},
        {"kind": "enum", "type": "Mode", "member": "ON"},
        {"kind": "tuple", "items": [1, "a"]}, {"kind": "tuple", "type": "Size", "items": [0, 2**63 - 1]},
        _dict(["a", 1], [1, 2]), _dict([], [], type="Counter"), _dict([], [], type="defaultdict", factory="list"),
        _dict([], [], type="defaultdict", factory=None),
        {"kind": "record", "type": "Point", "keys": ["x", "y"], "items": [1, 2]},
        {"kind": "fields", "type": "Run", "keys": [], "items": []},
        _nested(DEPTH, 1),
        {**FLOAT, "parameter": True}, {**FLOAT, "dtype": "int64", "parameter": False},
        {**FLOAT, "dtype": "complex64", "parameter": True}, {**FLOAT, "shape": [1] * 64},
        {**FLOAT, "kind": "number", "shape": []}, {**FLOAT, "shape": [2**61 - 1]}, {**FLOAT, "shape": [0, 2**60]},
    ],
    ids=str,
)  # fmt: skip
def test_a_node_that_is_written_is_read(node: Any) -> None:
    found = list(leaves(node))
    assert found == ([node] if isinstance(node, dict) and "name" in node else [])


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (float("nan"), "no value begins with 'nan'"), ([], r"no value begins with '\[\]'"),
        (_nested(DEPTH + 1, {"kind": "list", "items": []}), "no value begins with"),
        ({"kind": "float", "text": "1.5"}, "no kind of value 'float'"), ({"kind": "float"}, "no kind of value"),
        ({"kind": "enum", "type": "Mode", "member": 1}, "no kind of value 'enum'"),
        ({"kind": "enum", "type": 1, "member": "ON"}, "no kind of value 'enum'"),
        ({"kind": "complex", "parts": [1.0]}, "no kind of value 'complex'"),
        ({"kind": "complex", "items": [1.0, 1.0]}, "no kind of value 'complex'"),
        ({"kind": "complex", "parts": [1.0, 2]}, "the parts of a complex number"),
        ({"kind": "complex", "parts": [1.0, {"kind": "list", "items": []}]}, "the parts of a complex number"),
        ({"kind": "complex", "parts": [1.0, {"kind": "float", "text": "2"}]}, "no kind of value 'float'"),
        ({"kind": "list"}, "no kind of value 'list'"), ({"kind": "list", "items": {}}, "no kind of value 'list'"),
        ({"kind": "tuple", "type": "list", "items": []}, "no kind of value 'tuple'"),
        ({"kind": "tuple", "type": "Size", "items": [-1]}, "the sizes of a torch.Size"),
        ({"kind": "tuple", "type": "Size", "items": [1.0]}, "the sizes of a torch.Size"),
        ({"kind": "tuple", "type": "Size", "items": [True]}, "the sizes of a torch.Size"),
        ({"kind": "tuple", "type": "Size", "items": [2**63]}, "the sizes of a torch.Size"),
        (_dict([], [], type="set"), "no kind of value 'dict'"),
        (_dict([], [], type="defaultdict", factory="eval"), "no kind of value 'dict'"),
        (_dict([], [], type="defaultdict", factory=[]), "no kind of value 'dict'"),
        (_dict("a", [1]), "the keys of a dict"), (_dict([1.5], [1]), "the keys of a dict"),
        (_dict([True], [1]), "the keys of a dict"), (_dict(["a", "a"], [1, 2]), "the keys of a dict"),
        (_dict(["a"], [1, 2]), "a dict has 1 keys and 2 values"), (_dict(["a", "b"], [1]), "a dict has 2 keys and 1"),
        ({"kind": "record", "type": "Point", "keys": [1], "items": [1]}, "the keys of a record"),
        ({"kind": "record", "type": None, "keys": ["x"], "items": [1]}, "no kind of value 'record'"),
        ({"kind": "fields", "type": 1, "keys": ["x"], "items": [1]}, "no kind of value 'fields'"),
        ({"kind": "list", "items": [[]]}, "no value begins with"),
        ({**FLOAT, "name": None}, "a tensor has the name 'None'"), ({**FLOAT, "dtype": []}, r"and the dtype '\[\]'"),
        ({**FLOAT, "dtype": "load"}, "the dtype 'load'"), ({**FLOAT, "dtype": None}, "the dtype 'None'"),
        ({**FLOAT, "shape": (2,)}, "w has the shape"), ({**FLOAT, "shape": [1] * 65}, "w has the shape"),
        ({**FLOAT, "shape": [-1]}, "w has the shape"), ({**FLOAT, "shape": [True]}, "w has the shape"),
        ({**FLOAT, "shape": [2.0]}, "w has the shape"), ({**FLOAT, "shape": [2**61]}, "w has the shape"),
        ({**FLOAT, "shape": [0, 2**61]}, "w has the shape"),
        ({**FLOAT, "parameter": 1}, "w is no tensor"), ({**FLOAT, "parameter": None}, "w is no tensor"),
        ({**FLOAT, "dtype": "int64", "parameter": True}, "w is no tensor"), ({**FLOAT, "kind": "number"}, "w is no n"),
    ],
    ids=str,
)  # fmt: skip
def test_another_node_is_refused(node: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(leaves(node))


def test_what_leads_to_a_tensor() -> None:
    node = _dict(["a", 7], [{"kind": "list", "items": [1, FLOAT]}, {**FLOAT, "name": "b"}])
    assert [(keys, leaf["name"]) for keys, leaf in leaf_keys(node)] == [(("a", 1), "w"), ((7,), "b")]
    assert list(leaf_keys(3)) == []
    assert bytes_of(FLOAT) == 24 and bytes_of({**FLOAT, "dtype": "float64", "shape": []}) == 8


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ([4], [[0, [0], [4]]]), ([4], [[1, [2], [2]], [0, [0], [2]]]), ([], [[0, [], []]]),
        ([0], [[0, [0], [0]]]), ([4], [[0, [0], [4]], [1, [4], [0]]]),
        ([2, 3], [[0, [0, 0], [1, 3]], [1, [1, 0], [1, 2]], [2, [1, 2], [1, 1]]]),
    ],
    ids=str,
)  # fmt: skip
def test_chunks_that_cover_a_tensor(shape: list[int], chunks: Any) -> None:
    check_chunks({**FLOAT, "shape": shape, "chunks": chunks}, 3)


@pytest.mark.parametrize(
    ("shape", "chunks", "message"),
    [
        ([4], [], "do not cover it"), ([4], [[0, [0], [3]]], "do not cover it"), ([4], [[0, [1], [3]]], "do not cover"),
        ([4], [[0, [0], [3]], [1, [2], [2]]], "do not cover it"),
        ([2, 2], [[0, [0, 0], [1, 2]], [1, [1, 0], [1, 1]]], "do not cover it"),
        ([4], [[0, [0], [5]]], "has the chunk"), ([4], [[3, [0], [4]]], "has the chunk"),
        ([4], [[-1, [0], [4]]], "has the chunk"), ([4], [[0, [-1], [5]]], "has the chunk"),
        ([4], [[0, [0], [True]]], "has the chunk"), ([4], [[0, [0.0], [4]]], "has the chunk"),
        ([4], [[0, [0], [2]], [0, [2], [2]]], "two chunks in one file"),
        ([4], [[0, [0], [4]], [1, [0], [4]]], "no grid"), ([], [[0, [], []], [1, [], []]], "no grid"),
        ([], [], "do not cover it"),
        ([4], {}, "no list of chunks"),
    ],
    ids=str,
)  # fmt: skip
def test_chunks_that_do_not_are_refused(shape: list[int], chunks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_chunks({**FLOAT, "shape": shape, "chunks": chunks}, 3)
    with pytest.raises(ValueError, match="no list of chunks"):
        check_chunks({**FLOAT, "kind": "array", "chunks": [[0, [0, 0], [2, 3]]]}, 3)


def test_chunks_that_need_much_memory_are_refused() -> None:
    """A file of some bytes could ask for a grid of any size; one with a million edges is still read."""
    for more in (0, 1):
        shape = [4] * 6 + [1] * (6 + more)
        places = itertools.product(*map(range, shape))
        node = {**FLOAT, "shape": shape, "chunks": [[n, list(at), [1] * len(shape)] for n, at in enumerate(places)]}
        if more:
            with pytest.raises(ValueError, match="no grid"):
                check_chunks(node, 4**6)
        else:
            check_chunks(node, 4**6)


def test_chunks_that_need_much_time_are_refused() -> None:
    """Many large chunks over one another, each from another place on: 1.8 * 10**11 cells to count."""
    shape, half = [12 * 10**5], 6 * 10**5
    chunks = [[number, [number], [half]] for number in range(half)]
    start = time.process_time()
    with pytest.raises(ValueError, match="do not cover it"):
        check_chunks({**FLOAT, "shape": shape, "chunks": chunks}, half)
    assert time.process_time() - start < 7  # measured: 1.5 s; without a limit on the cells 14 s


def test_names_of_tensors_are_distinct() -> None:
    value = {"a.b": 0, "a": {"b": 1}, "a.b#1": 2, "": {"": 3}, ".": 4}
    tensors: dict[str, torch.Tensor] = {}
    node = describe(_with_tensors(value), "x", "x", tensors)
    assert len(tensors) == 5 and "__metadata__" not in tensors
    found = build(json.loads(json.dumps(node)), tensors, {}, "x")
    assert found == _with_tensors(value)
    tensors.clear()
    assert describe(torch.ones(1), "__metadata__", "__metadata__", tensors)["name"] == "__metadata__#0"


def _with_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tensors(one) for key, one in value.items()}
    return torch.tensor(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1.5: 0}, r"x has the key 1.5, a float: keys must be strings or integers"),
        ([{True: 0}], r"x\[0\] has the key True, a bool"), (OrderedDict({("a",): 0}), r"x has the key \('a',\), a tup"),
        (defaultdict(list, {None: []}), "x has the key None, a NoneType"),
        (Pairs((1, 2)), r"x is a Pairs, which cannot be saved: it would come back as a tuple, so give one: tuple\(…\)"),
        (Run(Mode.ON, Pairs()), "x.point is a Pairs"), ({"a": Point(1, {2})}, r"x\['a'\].y is a set"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_file_cannot_hold_is_refused_by_its_path(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        describe(value, "x", "x", {})


def test_types_are_found_wherever_they_are() -> None:
    run = Run(Mode.ON, Point(1, [2]))
    expected = {("Mode", ()): Mode, ("Run", ("mode", "point")): Run, ("Point", ("x", "y")): Point}
    for value in (run, [run], (1, run), {"a": {"b": [run]}}):
        assert types_in(value) == expected
        node = describe(value, "x", "x", {})
        assert named_types(node) == {"Mode", "Run", "Point"}
        assert build(node, {}, expected, "x") == value
    itself: list[Any] = []
    itself.append(itself)
    assert types_in(itself) == types_in("text") == {}
    shared: Any = [run]
    for _ in range(DEPTH):  # 2**100 places
        shared = {"a": [shared, shared], "b": shared}
    assert types_in(shared) == expected
    assert named_types(3) == named_types({"kind": "list", "items": [1]}) == set()


@pytest.mark.parametrize(
    ("node", "types", "message"),
    [
        ({"kind": "enum", "type": "Mode", "member": "OFF"}, {("Mode", ()): Mode}, r"x is Mode.OFF in the file, which"),
        ({"kind": "enum", "type": "Mode", "member": "ON"}, {}, "x is a Mode, and no type is imported for a file: give"),
        ({"kind": "record", "type": "Point", "keys": ["x"], "items": [1]}, types_in(Point(1, 2)),
         "x is a Point with the fields x, and the one here has the fields x, y: give"),
        ({"kind": "fields", "type": "Listed", "keys": ["width"], "items": [1]}, {("Listed", ("width",)): Listed},
         "x is a Listed, a dataclass with more than its fields"),
        (_dict(["a" * 99], [{"kind": "array", "name": "t", "dtype": "bfloat16", "shape": [0]}]), {},
         rf"x\['{'a' * 80}'\] is an array of bfloat16, which NumPy does not have"),
    ],
    ids=["member", "type", "fields", "dataclass", "array"],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_by_its_path(node: Any, types: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(node, {"t": torch.empty(0, dtype=torch.bfloat16)}, types, "x")


def test_arrays_of_any_memory_come_back() -> None:
    base = np.arange(6, dtype=">i4").reshape(2, 3)
    for array in (base, base.T, base[:, ::-1], base[::2]):
        tensors: dict[str, torch.Tensor] = {}
        found = build(describe(array, "x", "x", tensors), tensors, {}, "x")
        assert found.dtype == np.int32 and np.array_equal(found, array)

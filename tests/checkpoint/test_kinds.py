"""Save values of every kind that people save: each comes back as it was, or is refused by its place and its type."""

from __future__ import annotations

import argparse
import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import random
import types
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import ddparity as dp
from tests.checkpoint.test_checkpoint import Held
from tests.checkpoint.test_values import (
    Access,
    Attributes,
    Colour,
    Config,
    Derived,
    Failure,
    Labelled,
    Late,
    Level,
    Tags,
    Version,
)


class Mode(enum.StrEnum):
    TRAIN = "train"


class Point(NamedTuple):
    x: float
    y: Any = None


@dataclasses.dataclass(slots=True)
class Slotted:
    width: int


@dataclasses.dataclass
class Outer:
    inner: Config
    sizes: list[torch.Tensor]


class Name(str):
    pass


def _marked(value: Any) -> Any:
    value.note = "x"
    return value


def _itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def _mixed() -> Any:
    return {"a": [1, (2.5, {"b": None}), torch.ones(2)], 7: {"c": collections.OrderedDict(d=np.ones(1))}}


BACK: dict[str, Callable[[], Any]] = {
    "None": lambda: None, "true": lambda: True, "an int": lambda: -7, "a large int": lambda: 1 << 200,
    "a float": lambda: 0.1, "minus zero": lambda: -0.0, "nan": lambda: float("nan"), "infinity": lambda: float("-inf"),
    "a complex": lambda: complex(float("inf"), -0.0), "a str": lambda: "text", "an empty str": lambda: "",
    "other scripts": lambda: "\u4e16\u754c \U0001f600", "control characters": lambda: '\0\n\t"\\',
    "a list": lambda: [1, [2, []]], "a tuple": lambda: (1, (2, ())), "a Size": lambda: torch.Size([2, 3]),
    "a dict": lambda: {"b": 1, "a": {}}, "a dict by ints": lambda: {3: "a", -1: "b"}, "mixed": _mixed,
    "odd keys": lambda: {"a.b": 1, "a": {"b": 2}, "": 3, "__metadata__": 4, "kind": 5},
    "an OrderedDict": lambda: collections.OrderedDict(b=1, a=2), "a Counter": lambda: collections.Counter("aab"),
    "a Counter below zero": lambda: collections.Counter({"minus": -1}),
    "a defaultdict": lambda: collections.defaultdict(list, {"x": [1]}),
    "a defaultdict of None": lambda: collections.defaultdict(None, {"x": 1}),
    "a namedtuple": lambda: Version(1, 2), "a NamedTuple": lambda: Point(1.5, torch.ones(1)),
    "a dataclass": lambda: Config(0.5, (2, 3)), "dataclasses": lambda: Outer(Config(0.1), [torch.ones(2)]),
    "slots": lambda: Slotted(3), "an enum": lambda: Colour.RED, "an IntEnum": lambda: Level.HIGH,
    "a str enum": lambda: Mode.TRAIN, "a flag": lambda: Access.READ,
    "float32": lambda: torch.arange(3.0), "bfloat16": lambda: torch.ones(2, dtype=torch.bfloat16),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn), "complex64": lambda: torch.ones(2, dtype=torch.complex64),
    "bool": lambda: torch.tensor([True, False]), "uint16": lambda: torch.ones(2).to(torch.uint16),
    "no dimensions": lambda: torch.tensor(3), "no elements": lambda: torch.zeros(0, 2),
    "a view": lambda: torch.arange(10)[::3], "a transpose": lambda: torch.arange(6).reshape(2, 3).T,
    "an expanded tensor": lambda: torch.ones(1).expand(3), "a conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "channels last": lambda: torch.rand(1, 2, 3, 3).to(memory_format=torch.channels_last),
    "a Parameter": lambda: nn.Parameter(torch.ones(2)),
    "a frozen Parameter": lambda: nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False),
    "an array": lambda: np.arange(6).reshape(2, 3), "an array without dimensions": lambda: np.array(3.5),
    "an empty array": lambda: np.zeros((0, 2), np.int16), "another byte order": lambda: np.arange(3, dtype=">f8"),
    "in Fortran's order": lambda: np.asfortranarray(np.arange(6).reshape(2, 3)),
    "backwards": lambda: np.arange(3)[::-1],
    "a NumPy number": lambda: np.float32(3.5), "a NumPy bool": lambda: np.bool_(True), "float64": lambda: np.float64(2),
    "random's state": lambda: random.Random(0).getstate(),
    "NumPy's state": lambda: np.random.RandomState(0).get_state(),
    "a Generator's state": lambda: np.random.default_rng(0).bit_generator.state,
    "torch's state": lambda: torch.Generator().manual_seed(0).get_state(),
    "a state dict": lambda: nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)).state_dict(),
    "an optimizer's state": lambda: torch.optim.AdamW(nn.Linear(1, 1).parameters()).state_dict(),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a set": (lambda: {1, 2}, "is a set, which cannot be saved: use tensors"),
    "a frozenset": (lambda: frozenset([1]), "is a frozenset"),
    "bytes": (lambda: b"bytes", "is a bytes"), "a bytearray": (lambda: bytearray(2), "is a bytearray"),
    "an array of the library": (lambda: array.array("d", [1.0]), "is a array"),
    "a range": (lambda: range(3), "is a range"), "a deque": (lambda: collections.deque([1]), "is a deque"),
    "a function": (lambda: len, "is a builtin_function"), "a lambda": (lambda: lambda: 1, "is a function"),
    "a type": (lambda: int, "is a type"), "an object": (lambda: object(), "is a object"),
    "a module": (lambda: [nn.Linear(1, 1)][0], "is a Linear"), "a generator": (lambda: (i for i in "a"), "is a gener"),
    "a Namespace": (lambda: argparse.Namespace(a=1), "is a Namespace"), "a path": (lambda: pathlib.Path("a"), "is a P"),
    "a SimpleNamespace": (lambda: types.SimpleNamespace(a=1), "is a SimpleNamespace"),
    "a date": (lambda: datetime.datetime(2026, 1, 1), "is a datetime"),
    "a UUID": (lambda: uuid.UUID(int=1), "is a UUID"),
    "a Decimal": (lambda: decimal.Decimal("0.1"), "is a Decimal"),
    "a Fraction": (lambda: fractions.Fraction(1, 3), "is"),
    "a dtype": (lambda: torch.float32, "is a dtype"), "a device": (lambda: torch.device("cpu"), "is a device"),
    "a torch.Generator": (lambda: torch.Generator(), "is a Generator"),
    "a str's subclass": (lambda: Name("a"), r"str\(…"),
    "a UserDict": (lambda: collections.UserDict(a=1), r"is a UserDict, .*give a dict: dict\(…\)"),
    "a dict's subclass": (lambda: Attributes(a=1), "is a Attributes, .*give a dict"),
    "a ChainMap": (lambda: collections.ChainMap({"a": 1}), "is a ChainMap, .*give a dict"),
    "a defaultdict of a function": (lambda: collections.defaultdict(lambda: 1), ".*lambda.*cannot hold a function"),
    "a key of floats": (lambda: {0.5: 1}, "has the key 0.5, a float"),
    "a key of tuples": (lambda: {(1,): 1}, "has the"),
    "a key of bools": (lambda: {True: 1}, "has the key True, a bool"),
    "a tensor's subclass": (lambda: torch.ones(2).as_subclass(Labelled), r"is a Labelled, .*as_subclass\(torch"),
    "a tensor's attribute": (lambda: _marked(torch.ones(2)), "is a tensor with the attribute note.*detach"),
    "a parameter's attribute": (lambda: _marked(nn.Parameter(torch.ones(2))), "is a tensor with the attribute note"),
    "a Counter's attribute": (lambda: _marked(collections.Counter("a")), "is a Counter with the attribute note"),
    "a sparse tensor": (lambda: torch.ones(2).to_sparse(), "sparse"),
    "no data": (lambda: torch.ones(1, device="meta"), "meta"),
    "a matrix": (lambda: np.ones((2, 2)).view(np.matrix), r"is a matrix, .*\.view\(ndarray\)"),
    "a masked array": (lambda: np.ma.masked_array([1.0], [True]), "is a masked array, whose mask would be lost"),
    "a record array": (lambda: np.zeros(2, [("a", "f4")]), "is an array of"),
    "strings": (lambda: np.array(["a"]), "of <U1"),
    "objects": (lambda: np.array([None]), "is an array of object"),
    "dates": (lambda: np.array(["2026-01-01"], "M8[D]"), "is an array of datetime64"),
    "flags": (lambda: Access.READ | Access.WRITE, "is a combination of flags"), "itself": (_itself, "contains itself"),
    "a dataclass of list": (lambda: Tags("web"), "is a Tags, a dataclass .* of list, and only its fields would be"),
    "a dataclass of Exception": (lambda: Failure(3), "is a Failure, a dataclass .* of Exception, and only"),
    "a field without a value": (lambda: Late(), "is a Late whose field width has no value"),
    "another attribute": (lambda: Derived(3), "is a Derived with the attribute area, which is none of its fields"),
    "an int of 5000 digits": (lambda: 10**5000, "cannot be written as JSON: .*digits"),
}  # fmt: skip


def _assert_same(found: Any, value: Any) -> None:
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert (found.dtype, found.shape, found.requires_grad) == (value.dtype, value.shape, value.requires_grad)
        assert dp.fingerprint({"": found}) == dp.fingerprint({"": value.detach()})
    elif isinstance(value, np.ndarray):
        np.testing.assert_array_equal(found, value)
        assert found.dtype == value.dtype.newbyteorder("=") and found.shape == value.shape
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _assert_same(getattr(found, field.name), getattr(value, field.name))
    elif isinstance(value, dict):
        assert list(found) == list(value)
        assert getattr(found, "default_factory", None) is getattr(value, "default_factory", None)
        for key in value:
            _assert_same(found[key], value[key])
    elif isinstance(value, (list, tuple)):
        assert len(found) == len(value)
        for one, other in zip(found, value, strict=True):
            _assert_same(one, other)
    else:
        assert repr(found) == repr(value)


@pytest.mark.parametrize("kind", BACK)
def test_a_value_comes_back_as_it_was(kind: str, tmp_path: pathlib.Path) -> None:
    value = BACK[kind]()
    dp.save_checkpoint(tmp_path / "c", held=Held({"x": [value]}), value=value)
    held = Held([value])
    found = dp.load_checkpoint(tmp_path / "c", held=held, value=value)["value"]
    for one in (held.state["x"][0], found):
        _assert_same(one, value)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_come_back_otherwise_is_refused(kind: str, tmp_path: pathlib.Path) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(TypeError, match=f"value.*{message}"):
        dp.save_checkpoint(tmp_path / "c", value=[make()])
    assert not list(tmp_path.iterdir())


def test_a_tensors_marks_of_libraries_do_not_matter(tmp_path: pathlib.Path) -> None:
    value: Any = torch.ones(2)
    value._is_initialized = True
    dp.save_checkpoint(tmp_path / "c", value=value)
    assert dp.load_checkpoint(tmp_path / "c")["value"].equal(torch.ones(2))

from __future__ import annotations

import json
import re
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import ddparity as dp
from ddparity.comm.trees import new_tensor, put_together, take_apart
from tests.ranks import outcomes, run_ranks

Boxes = namedtuple("Boxes", "corners scores")


@dataclass
class Output:
    logits: torch.Tensor
    names: list[str]


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def _value(rank: int) -> dict[str, Any]:
    """Return a value whose shapes and lengths differ between ranks; rank 1 has no rows."""
    rows = [2, 0, 3][rank]
    start = [0, 2, 2][rank]
    return {
        "rows": torch.arange(start, start + rows)[:, None] * torch.ones(1, 4),
        "scalar": torch.tensor(rank),
        "array": np.arange(start, start + rows, dtype=np.float32),
        "number": rank + 0.5,
        "text": f"räng {rank}",
        "none": None,
        "complex": complex(rank, -1),
        "list": [f"s{i}" for i in range(start, start + rows)],
        "ragged": [torch.full((i,), i) for i in range(start, start + rows)],
        "tuple": (torch.full((rows, 1), rank), [rank] * rows),
        "boxes": Boxes(torch.zeros(rows, 4), torch.full((rows,), float(rank))),
        "output": Output(torch.ones(rows, 2) * rank, ["x"] * rows),
        7: torch.zeros(rows, 0),
    }


def _gathered(to: Any) -> Any:
    result = dp.gather(_value(dist.get_rank()), to=to)
    if result is not None:
        # Compare here: torch's tensors cannot well be sent to the test's process.
        _check(result)
    return result is not None


def _check(result: dict[Any, Any]) -> None:
    assert list(result) == list(_value(0))
    assert torch.equal(result["rows"], torch.arange(5)[:, None] * torch.ones(1, 4))
    assert torch.equal(result["scalar"], torch.tensor([0, 1, 2]))
    assert isinstance(result["array"], np.ndarray)
    assert result["array"].dtype == np.float32
    assert result["array"].tolist() == [0, 1, 2, 3, 4]
    assert result["number"] == [0.5, 1.5, 2.5]
    assert result["text"] == ["räng 0", "räng 1", "räng 2"]
    assert result["none"] == [None, None, None]
    assert result["complex"] == [-1j, 1 - 1j, 2 - 1j]
    assert result["list"] == ["s0", "s1", "s2", "s3", "s4"]
    assert [t.tolist() for t in result["ragged"]] == [[], [1], [2, 2], [3] * 3, [4] * 4]
    assert result["tuple"][0].flatten().tolist() == result["tuple"][1] == [0, 0, 2, 2, 2]
    assert isinstance(result["boxes"], Boxes)
    assert result["boxes"].scores.tolist() == [0, 0, 2, 2, 2]
    assert isinstance(result["output"], Output)
    assert result["output"].logits.shape == (5, 2)
    assert result["output"].names == ["x"] * 5
    assert result[7].shape == (5, 0)


@pytest.mark.parametrize(
    ("to", "receivers"), [(0, [True, False, False]), (2, [False, False, True]), ("all", [True] * 3)]
)
def test_any_nesting_of_different_shapes(to: Any, receivers: list[bool]) -> None:
    assert run_ranks(_gathered, 3, to) == receivers


def _dtypes() -> None:
    rank = dist.get_rank()
    for dtype in DTYPES:
        mine = torch.tensor([rank, 1, 0]).to(dtype)
        found = dp.gather(mine, to="all")
        assert found.dtype == dtype
        assert torch.equal(found, torch.tensor([0, 1, 0, 1, 1, 0]).to(dtype)), dtype


def test_every_dense_dtype() -> None:
    run_ranks(_dtypes, 2)


def _large() -> None:
    rank = dist.get_rank()
    rows = torch.full((20 * 2**20 + rank,), rank, dtype=torch.int32)  # 80 MiB: more than one message
    found = dp.gather({"large": rows, "strided": torch.arange(6).view(2, 3).t()})
    if rank == 0:
        assert found["large"].sum() == 20 * 2**20 + 1
        assert found["strided"].tolist() == [[0, 3], [1, 4], [2, 5]] * 2


def test_large_and_strided_tensors() -> None:
    run_ranks(_large, 2)


def test_a_world_of_one_gathers_in_the_same_way() -> None:
    assert dp.gather({"n": 3, "t": torch.tensor(2.0), "l": ["a"]}) == {"n": [3], "t": torch.tensor([2.0]), "l": ["a"]}
    assert dp.gather([1, 2], to="all") == [1, 2]


def _misfits(kind: str) -> None:
    rank = dist.get_rank()
    values = {
        "shape": torch.zeros(2, 3 + rank),
        "dtype": torch.zeros(2, dtype=[torch.float32, torch.float64][rank]),
        "kind": [torch.zeros(2), "text"][rank],
        "keys": {"a": 1} if rank else {"b": 1},
        "entries": (1,) * (rank + 1),
    }
    dp.gather(values[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "shape",
            "a tensor of float32 with rows of shape (4,), not a tensor of float32 with rows of shape (3,) as in part 0",
        ),
        ("dtype", "a tensor of float64 with rows of shape (), not a tensor of float32 with rows of shape () as in"),
        ("kind", "in part 1 the value is None, a number or a string, not a tensor of float32"),
        ("keys", "value is a dict with the keys ['a'], not a dict with the keys ['b']"),
        ("entries", "value is a tuple of 2, not a tuple of 1"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_on_every_rank(kind: str, message: str) -> None:
    for outcome in outcomes(_misfits, 2, kind):
        assert outcome.error.startswith("ValueError")
        assert message in outcome.error
        assert outcome.seconds < 10


def _cannot_travel(rank: int) -> None:
    dp.gather({"ok": 1, "bad": [object()] if dist.get_rank() == rank else [1]})


def _views() -> None:
    x = torch.tensor([1 + 2j, 3 - 1j])
    found = dp.gather({"conj": x.conj(), "imag": x.conj().imag}, to="all")
    assert found["conj"].tolist() == [1 - 2j, 3 + 1j] * 2
    assert found["imag"].tolist() == [-2, 1] * 2


def test_conjugate_and_negative_views() -> None:
    run_ranks(_views, 2)
    x = torch.tensor([1 + 2j])
    assert dp.fingerprint({"x": x.conj()}) == dp.fingerprint({"x": torch.tensor([1 - 2j])})


def test_a_type_inside_of_a_function_is_refused() -> None:
    local = namedtuple("local", "a")
    local.__qualname__ = "f.<locals>.local"
    with pytest.raises(TypeError, match=r"f.<locals>.local is defined inside of a function"):
        dp.gather(local(1))


def test_a_value_that_cannot_be_sent_is_named_on_every_rank() -> None:
    ended = outcomes(_cannot_travel, 2, 1)
    assert ended[1].error.startswith("TypeError: value['bad'][0] is a object, which cannot travel")
    assert "RankFailure: rank 1 failed in gather: value['bad'][0]" in ended[0].error


@pytest.mark.parametrize("to", [1, -1, "some", True])
def test_a_receiver_that_is_not_a_rank_is_refused(to: Any) -> None:
    with pytest.raises(ValueError, match=f"to={to!r} receives nothing"):
        dp.gather(1, to=to)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        ({(1, 2): 3}, r"the key \(1, 2\)"),
        ({"deep": [{"x": {1, 2}}]}, r"value\['deep'\]\[0\]\['x'\] is a set"),
        (np.array(["a", None], dtype=object), "array of object"),
    ],
)
def test_each_error_names_the_path(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        take_apart(value)


plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.complex_numbers(allow_nan=False)
)
arrays = st.lists(st.integers(-5, 5), max_size=4).map(lambda v: np.array(v, dtype=np.int16))
values = st.recursive(
    plain | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@given(values)
def test_descriptions_are_json_and_whole(value: Any) -> None:
    """A value in a list comes back from its description and its tensors as it was."""
    description, leaves = take_apart([value])
    build, (targets,) = put_together([json.loads(json.dumps(description))], new_tensor)
    for number, leaf in enumerate(leaves):
        targets[number].copy_(leaf)
    assert _same(build(), [value])


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def _different_receivers(receivers: list[Any]) -> None:
    dp.gather(torch.ones(2), to=receivers[dist.get_rank()])


@pytest.mark.parametrize(
    ("receivers", "message"),
    [
        ([0, 1], r"gather\(to=…\) differs between ranks: 0 on rank 0, 1 on rank 1"),
        (["all", 0], r"gather\(to=…\) differs between ranks: 'all' on rank 0, 0 on rank 1"),
        ([2, 2, 1], r"gather\(to=…\) differs between ranks: 2 on rank 0, 1 on rank 2"),
    ],
)
def test_receivers_that_differ_are_refused_on_every_rank(receivers: list[Any], message: str) -> None:
    for outcome in outcomes(_different_receivers, len(receivers), receivers, timeout_s=30):
        assert re.match(f"ValueError: {message}", outcome.error)


def test_a_receiver_that_is_none_on_one_rank_is_refused_on_every_rank() -> None:
    first, second = outcomes(_different_receivers, 2, [0, 5], timeout_s=30)
    assert first.error.startswith("RankFailure: rank 1 failed in gather: to=5 receives nothing")
    assert second.error.startswith("ValueError: to=5 receives nothing: give a rank from 0 to 1")

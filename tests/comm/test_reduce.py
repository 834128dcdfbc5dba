"""`reduce` and `broadcast`: the same values on every rank, or an error on every rank."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.profiler import ProfilerActivity, profile

import ddparity as dp
from tests.ranks import outcomes, run_ranks

Pair = namedtuple("Pair", "loss stop")


def _reduced(op: str) -> list[Any]:
    rank = dist.get_rank()
    value = {
        "loss": 0.1 * (rank + 1),
        "count": 2**70 + rank,
        "stop": rank == 1,
        "pair": Pair([rank, 1.5], rank > 5),
        "array": np.array([rank, 2.0 - rank]),
        "half": torch.tensor([1.0, 2049.0 * rank], dtype=torch.float16),
        "rows": torch.full((2, 3), float(rank), dtype=torch.float64).t(),
        "none": torch.zeros(0, 2),
        "scalar": torch.tensor(float(rank)),
    }
    found = dp.reduce(value, op)
    assert type(found["pair"]) is Pair
    assert found["rows"].shape == (3, 2)
    assert found["none"].shape == (0, 2)
    assert found["half"].dtype == torch.float16
    assert value["scalar"] == rank, "the value itself stays"
    rest = [found["rows"][0, 0].item(), found["scalar"].item(), found["half"].tolist(), found["array"].tolist()]
    return [found["loss"], found["count"], found["stop"], *found["pair"].loss, found["pair"].stop, *rest]


EXPECTED = {
    "sum": [0.1 + 0.2 + 0.1 * 3, 3 * 2**70 + 3, 1, 3, 4.5, 0, 3.0, 3.0, [3.0, 6144.0], [3.0, 3.0]],
    "max": [0.1 * 3, 2**70 + 2, True, 2, 1.5, False, 2.0, 2.0, [1.0, 4096.0], [2.0, 2.0]],
    "min": [0.1, 2**70, False, 0, 1.5, False, 0.0, 0.0, [1.0, 0.0], [0.0, 0.0]],
    "mean": [(0.1 + 0.2 + 0.1 * 3) / 3, (3 * 2**70 + 3) / 3, 1 / 3, 1, 1.5, 0, 1.0, 1.0, [1.0, 2048.0], [1.0, 1.0]],
}


@pytest.mark.parametrize("op", EXPECTED)
def test_numbers_in_any_nesting(op: str) -> None:
    assert run_ranks(_reduced, 3, op) == [EXPECTED[op]] * 3


def _the_same_bits() -> list[bytes]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [
        dp.reduce(torch.randn(size, generator=generator), "sum").numpy().tobytes()
        for size in (3, 1000, 2**21)  # the last in several parts
    ]


def test_every_rank_gets_the_sum_in_rank_order() -> None:
    for world_size in (1, 2, 3):
        expected = []
        generators = [torch.Generator().manual_seed(rank) for rank in range(world_size)]
        for size in (3, 1000, 2**21):
            total = torch.zeros(size)
            for rank, generator in enumerate(generators):
                value = torch.randn(size, generator=generator)
                total = value if rank == 0 else total + value
            expected.append(total.numpy().tobytes())
        assert run_ranks(_the_same_bits, world_size) == [expected] * world_size


def _other(case: str) -> Any:
    rank = dist.get_rank()
    if case == "structure":
        return dp.reduce({"a": 1.0} if rank == 0 else {"b": 1.0})
    if case == "shape":
        return dp.reduce([torch.zeros(2 + rank)])
    if case == "dtype":
        return dp.reduce(torch.zeros(2, dtype=torch.float32 if rank else torch.float64))
    if case == "op":
        return dp.reduce(1, "sum" if rank else "max")
    if case == "unknown":
        return dp.reduce(1, "median")
    if case == "text":
        return dp.reduce({"a": "text"} if rank else {"a": 1})
    if case == "mean of integers":
        return dp.reduce(torch.tensor([1]), "mean")
    if case == "overflow":
        return dp.reduce([torch.tensor([-(2**30), 2**30], dtype=torch.int32)])
    if case == "16 bits":
        return dp.reduce(torch.tensor(200, dtype=torch.uint16), "max")
    if case.startswith("part"):
        whole = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)))
        return dp.reduce(whole) if case == "part" else dp.broadcast(whole, source=1)
    if case == "source":
        return dp.broadcast(1, source=rank)
    if case == "no rank":
        return dp.broadcast(1, source=2)
    return dp.broadcast(object(), source=1)


@pytest.mark.parametrize(
    ("case", "kinds", "text"),
    [
        ("structure", ("ValueError",), "value['a'] is absent on rank 1 and a number on rank 0"),
        ("shape", ("ValueError",), "value[0] is a tensor of float32 and shape (3,) on rank 1"),
        ("dtype", ("ValueError",), "value is a tensor of float32 and shape (2,) on rank 1 and a tensor of float64"),
        ("op", ("ValueError",), "'max' on rank 0, 'sum' on rank 1"),
        ("unknown", ("ValueError",), "op='median'"),
        ("text", ("TypeError", "RankFailure"), "value['a'] is a str"),
        ("mean of integers", ("TypeError",), ".double()"),
        ("overflow", ("OverflowError",), "a sum is 2147483648, too large for torch.int32: give a tensor of int64"),
        ("16 bits", ("TypeError",), "value is a tensor of torch.uint16, which Gloo cannot send"),
        ("part", ("TypeError",), "value is a DTensor, as is the norm that clip_grad_norm_() returns"),
        ("part to all", ("TypeError", "RankFailure"), "value is a DTensor"),
        ("source", ("ValueError",), "differs between ranks: 0 on rank 0, 1 on rank 1"),
        ("no rank", ("ValueError",), "from 0 to 1"),
        ("object", ("TypeError", "RankFailure"), "value is a object"),
    ],
)
def test_what_does_not_fit_is_an_error_on_every_rank(case: str, kinds: tuple[str, ...], text: str) -> None:
    for outcome in outcomes(_other, 2, case):
        assert outcome.error.partition(":")[0] in kinds
        assert text in outcome.error


def _counted() -> list[dict[str, int]]:
    two, large = [torch.ones(2), torch.ones(3, dtype=torch.int64)], torch.ones(5 * 2**20)  # 20 MiB
    calls = [
        *(functools.partial(dp.reduce, value) for value in ({"loss": 0.5, "count": 3}, two, large)),
        *(functools.partial(dp.broadcast, value) for value in (two, large)),
        *(functools.partial(dp.gather, two, to) for to in (0, "all")),
    ]
    counts = []
    for call in calls:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
        counts.append({e.key.removeprefix("gloo:"): e.count for e in profiler.key_averages() if "gloo:" in e.key})
    return counts


def test_collectives_are_those_that_docstrings_state() -> None:
    for rank, counts in enumerate(run_ranks(_counted, 2)):
        assert [found.pop("all_gather") for found in counts] == [2, 2, 5, 2, 2, 2, 2]
        reduced = [{}, {"all_to_all": 2}, {}]  # the large tensor in three parts, by all-gathers
        assert counts == [*reduced, {"broadcast": 1}, {"broadcast": 2}, {("recv", "send")[rank]: 1}, {"broadcast": 2}]


def _broadcast(source: int) -> list[Any]:
    rank = dist.get_rank()
    value = {
        "text": f"räng {rank}",
        "none": None,
        "list": [rank, "a", [torch.full((2,), rank)]],
        "pair": Pair(np.arange(rank + 1), torch.tensor(rank)),
        "large": torch.full((5 * 2**20,), rank, dtype=torch.int32),
        7: (complex(rank, 1), True),
    }
    found = dp.broadcast(value if rank == source else None, source)
    assert list(found) == list(value)
    assert type(found["pair"]) is Pair
    assert isinstance(found["pair"].loss, np.ndarray)
    assert found["pair"].stop.shape == ()
    assert (found["large"] == source).all()
    return [
        found["text"], found["none"], found["list"][:2], found["list"][2][0].tolist(), found["pair"].loss.tolist(),
        found["pair"].stop.item(), found[7],
    ]  # fmt: skip


@pytest.mark.parametrize(("world_size", "source"), [(1, 0), (2, 1), (3, 0)])
def test_a_value_of_one_rank_on_every_rank(world_size: int, source: int) -> None:
    expected = [f"räng {source}", None, [source, "a"], [source] * 2, list(range(source + 1)), source]
    assert run_ranks(_broadcast, world_size, source) == [[*expected, (complex(source, 1), True)]] * world_size

"""Outputs of any kind have the bits of one process on any number of processes."""

from __future__ import annotations

import dataclasses
import gc
import os
import warnings
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.inference import sendbuffer as packed
from ddparity.inference.collect import check_each_once
from ddparity.runtime.agreement import store_root
from tests.ranks import nothing_pickled, outcomes, run_ranks

Pair = namedtuple("Pair", "left right")
SAMPLES = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]  # some values repeat


@dataclasses.dataclass
class Detection:
    boxes: Any
    label: Any


def _one(x: torch.Tensor) -> torch.Tensor:
    return x.float() * 0.1


def _everything(x: torch.Tensor) -> dict[str, Any]:
    numbers = x.tolist()
    return {
        "float": torch.stack([_one(v).expand(3) for v in x]),
        "half": (x.to(torch.bfloat16), x > 3, x.to(torch.complex64) * 1j, x[:, None, None][:, :, :0]),
        "array": np.asarray(numbers, dtype=np.int16)[:, None],
        "none": None,
        "text": [f"sample é {v}" for v in numbers],
        "mixed": [None if v == 1 else v if v % 2 else float("inf") for v in numbers],
        "ragged": [torch.arange(v) for v in numbers],
        "numpy": [np.float32(v) / 3 for v in numbers],
        "nested": [{"boxes": torch.ones(v, 4), "names": ["a"] * v, "score": (0.5, 1j)} for v in numbers],
        "pair": Pair(x, Detection(x[:, None].repeat(1, 2), [str(v) for v in numbers])),
        0: [(v, "x") for v in numbers],
        "width": torch.ones(len(x), int(x.max())),  # its second dimension differs between batches
    }


def _same(ours: Any, oracle: Any, path: str = "") -> None:
    assert type(ours) is type(oracle), path
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == oracle.dtype and torch.equal(ours, oracle), path
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == oracle.dtype and np.array_equal(ours, oracle), path
    elif isinstance(ours, dict):
        assert list(ours) == list(oracle), path
        for key in ours:
            _same(ours[key], oracle[key], f"{path}[{key!r}]")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(oracle), path
        for number, (one, other) in enumerate(zip(ours, oracle, strict=True)):
            _same(one, other, f"{path}[{number}]")
    elif dataclasses.is_dataclass(ours):
        _same(vars(ours), vars(oracle), path)
    else:
        assert ours == oracle, path


def _oracle(samples: list[int], batch_size: int) -> Any:
    """Return what is expected: the leaves of all batches, joined with plain Python, torch and NumPy."""
    outputs = [_everything(torch.tensor(samples[s : s + batch_size])) for s in range(0, len(samples), batch_size)]

    def joined(parts: list[Any]) -> Any:
        first = parts[0]
        if isinstance(first, torch.Tensor):
            rows = [row for part in parts for row in part]
            return torch.cat(parts) if len({row.shape for row in rows}) == 1 else rows
        if isinstance(first, np.ndarray):
            return np.concatenate(parts)
        if isinstance(first, list):
            return [v.item() if isinstance(v, np.generic) else v for part in parts for v in part]
        if isinstance(first, dict):
            return {key: joined([part[key] for part in parts]) for key in first}
        if dataclasses.is_dataclass(first):
            return type(first)(**{k: joined([getattr(part, k) for part in parts]) for k in vars(first)})
        if isinstance(first, tuple):
            items = [joined(list(column)) for column in zip(*parts, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
        return None

    return joined(outputs)


def _predicts(cases: list[tuple[int, int, Any, str]]) -> list[Any]:
    return [
        dp.predict(_everything, torch.tensor(SAMPLES[:length]), batch_size, to, balance=balance)
        for length, batch_size, to, balance in cases
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_structure_is_that_of_one_process(world_size: int) -> None:
    receivers = [0, "all", *([world_size - 1] if world_size > 1 else [])]
    cases = [
        (length, batch_size, to, balance)
        for length in (1, 2, 7, 11)
        for batch_size in (1, 3, 16)
        for to in receivers
        for balance in ("contiguous", "dynamic")
    ]
    for rank, received in enumerate(run_ranks(_predicts, world_size, cases)):
        for (length, batch_size, to, balance), ours in zip(cases, received, strict=True):
            oracle = _oracle(SAMPLES[:length], batch_size) if to in ("all", rank) else None
            _same(ours, oracle, f"{length} samples, batches of {batch_size}, to {to}, {balance}")


ROWS: dict[str, Any] = {  # one tensor or array a batch, as most models return
    "dense": lambda x: x[:, None] * torch.ones(3),
    "a column": lambda x: x,
    "no columns": lambda x: x[:, None][:, :0],
    "strided": lambda x: (x[:, None] * torch.ones(6))[:, ::2],
    "expanded": lambda x: x[:, None].expand(-1, 3),
    "in memory that is used again": lambda x: _AGAIN[: len(x)].copy_(x[:, None].expand(-1, 3)),
    "conjugate": lambda x: (x * 1j).conj(),
    "negative": lambda x: (x * (1 + 2j)).conj().imag,
    "complex": lambda x: x * 1j,
    "half": lambda x: x[:, None].to(torch.bfloat16),
    "bool": lambda x: x > 3,
    "array": lambda x: np.asarray(x)[:, None],
    "parameter": lambda x: nn.Parameter(x.float()),
    "wider now and then": lambda x: x[:, None] * torch.ones(3 if x.max() < 5 else 4),
    "an array that is wider": lambda x: np.asarray(x[:, None] * torch.ones(3 if x.max() < 5 else 4)),
    "of gradients": lambda x: torch.enable_grad()(torch.inference_mode(False)(_with_gradient))(x),
}
_AGAIN = torch.empty(4, 3)


def _with_gradient(x: torch.Tensor) -> torch.Tensor:
    return x.clone() * torch.ones(3, requires_grad=True)[:1]


def _row_cases() -> list[tuple[str, int, Any, str]]:
    return [(name, n, to, b) for name in ROWS for n in (1, 11) for to in (0, "all") for b in ("contiguous", "dynamic")]


def _predicts_rows(block: int) -> list[Any]:
    data = torch.tensor(SAMPLES, dtype=torch.float32)
    packed._BLOCK_BYTES = block
    return [dp.predict(ROWS[name], data[:length], 2, to, balance=balance) for name, length, to, balance in _row_cases()]


@pytest.mark.parametrize("block", [2**26, 70])  # it holds all batches, or one or a few
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_tensor_a_batch_is_that_of_one_process(world_size: int, block: int) -> None:
    for rank, received in enumerate(run_ranks(_predicts_rows, world_size, block)):
        for (name, length, to, balance), ours in zip(_row_cases(), received, strict=True):
            data = torch.tensor(SAMPLES[:length], dtype=torch.float32)
            parts = [torch.as_tensor(ROWS[name](data[s : s + 2])).detach().clone() for s in range(0, length, 2)]
            rows = [row for part in parts for row in part]
            case = f"{name}: {length} samples to {to}, {balance}"
            if to not in ("all", rank):
                assert ours is None, case
                continue
            assert isinstance(ours, list) == (len({row.shape for row in rows}) > 1), case
            for row, oracle in zip(ours, rows, strict=True):
                assert not isinstance(row, torch.Tensor) or not (row.requires_grad or row.is_inference()), case
                assert torch.equal(torch.as_tensor(row), oracle), case


def test_rows_can_be_written_to() -> None:
    """Results are no inference tensors, as a whole or row by row."""
    for name in ("dense", "wider now and then"):
        for row in dp.predict(ROWS[name], torch.tensor(SAMPLES), 2):
            row.add_(1)
        weight = torch.ones(1, requires_grad=True)
        (dp.predict(ROWS[name], torch.tensor(SAMPLES), 2)[0] * weight).sum().backward()


def test_a_last_batch_of_too_many_rows_is_refused() -> None:
    """The last batch is refused although its output has the shape of those before."""
    with pytest.raises(ValueError, match=r"indices 4 to 4 has shape \(2, 3\) for a batch of 1"):
        dp.predict(lambda x: torch.ones(2, 3), torch.arange(5), 2)


def _large(to: Any) -> list[Any]:
    """Return rows larger than a message and small ones. Each is a view of a larger tensor whose memory is reused."""
    shared = torch.empty(2, 5 * 2**20)

    def model(x: torch.Tensor) -> Any:
        shared[: len(x)] = x[:, None]
        return shared[: len(x)], shared[: len(x), :3]

    big, small = dp.predict(model, torch.arange(9.0), 2, to) or (torch.zeros(9, 1), torch.zeros(9, 3))
    return [big.shape[1], big.amin(1).tolist(), big.amax(1).tolist(), small.tolist()]


@pytest.mark.parametrize("to", [0, 1, "all"])
def test_large_outputs_in_memory_that_the_model_uses_again(to: Any) -> None:
    expected = [5 * 2**20, list(range(9)), list(range(9)), [[float(v)] * 3 for v in range(9)]]
    for rank, result in enumerate(run_ranks(_large, 2, to)):
        assert result == (expected if to in ("all", rank) else [1, [0.0] * 9, [0.0] * 9, [[0.0] * 3] * 9])


def _slow_rank() -> Any:
    """Let rank 1 take a batch and keep it until rank 0 has run all others."""
    done = 0

    def model(x: torch.Tensor) -> torch.Tensor:
        nonlocal done
        store = store_root()
        if dist.get_rank() == 1:
            store.add("taken", 1)
            while store.add("done", 0) < 35:
                pass
        else:
            while not store.add("taken", 0):
                pass
            store.add("done", 1)
        done += 1
        return x * 2

    return dp.predict(model, torch.arange(40), 1, balance="dynamic"), done


def test_a_slow_rank_keeps_nobody_waiting_and_loses_nothing() -> None:
    (outputs, many), (_, few) = run_ranks(_slow_rank, 2)
    assert outputs.tolist() == list(range(0, 80, 2))
    assert many + few == 40 and many >= 35


class Structures(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> Any:
        odd = 5 in x.tolist()
        return {
            "key": {"a": x, "b": x} if odd else {"a": x},
            "kind": {"a": [0] * len(x) if odd else x},
            "dtype": {"a": (x.float() if odd else x,)},
            "none": {"a": None if odd else x},
        }[self.how]


def _differs(how: str) -> None:
    dp.predict(Structures(how), torch.arange(8), 2)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("key", r"it is a dict with the keys ['a', 'b'], not a dict with the keys ['a']"),
        ("kind", r"it['a'] is a list, not a tensor of int64"),
        ("dtype", r"it['a'][0] is a tensor of float32, not a tensor of int64"),
        ("none", r"it['a'] is None, not a tensor of int64"),
    ],
)
def test_a_batch_of_another_structure_is_named(how: str, message: str, world_size: int) -> None:
    ended = outcomes(_differs, world_size, how)
    assert all(outcome.error and outcome.seconds < 10 for outcome in ended)
    said = "\n".join(outcome.error for outcome in ended)
    if world_size == 1:
        assert (
            f"the output for the data-set indices 4 to 5 is not as that for the data-set indices 0 to 1: {message}"
            in said
        )
    else:  # either batch may be the first
        assert "data-set indices 4 to 5" in said
        assert " is not as that for the data-set indices" in said


def _nested(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


Misnamed = namedtuple("Other", "x")


def _quantized(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # deprecated
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x: 0.5, TypeError, "is 0.5, one float for a batch of 2 samples: give a list with one entry a sample"),
        (lambda x: {"loss": "low"}, TypeError, r"\['loss'\] is 'low', one str"),
        (lambda x: (x, [1, 2, 3]), ValueError, r"\[1\] is a list of 3 entries for a batch of 2 samples"),
        (lambda x: np.ones(3), ValueError, r"shape \(3,\) for a batch of 2 samples"),
        (_quantized, TypeError, "quantized"),
        (lambda x: x.float().to_sparse(), TypeError, "to_dense"),
        (lambda x: [object(), object()], TypeError, r"indices 0 to 1\[0\] is a object, which cannot travel"),
        (lambda x: np.array(["a", "b"]), TypeError, "array of <U1"),
        (lambda x: {1.5: x}, TypeError, "keys must be strings or integers"),
        (lambda x: {1, 2}, TypeError, "is a set, which cannot travel"),
        (lambda x: Misnamed(x), TypeError, r"Other, which cannot be found by that name.*under its own name"),
        (lambda x: np.ma.masked_array([1, 2], [True, False]), TypeError, "a masked array, whose mask would be lost"),
        (_nested, TypeError, r"a nested tensor: give a list with one tensor a sample, list\(x.unbind\(\)\)"),
    ],
)
def test_what_is_not_one_row_a_sample_is_refused(output: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"the output for the data-set indices 0 to 1.*{message}|{message}"):
        dp.predict(output, torch.arange(4), 2)


@pytest.mark.parametrize(
    ("ran", "message"),
    [
        ([range(3), range(4, 6)], "samples 3 to 3 of 6 are missing"),
        ([range(4), range(2, 6)], "samples 2 to 3 of 6 are there twice"),
        ([range(5)], "samples 5 to 5 of 6 are missing"),
        ([range(1, 6)], "samples 0 to 0 of 6 are missing"),
        ([range(6), range(7)], "are there twice"),
    ],
)
def test_lost_and_repeated_rows_are_errors(ran: list[range], message: str) -> None:
    with pytest.raises(dp.DDParityError, match=message):
        check_each_once(ran, 6)


def test_each_row_once_is_right_in_any_order() -> None:
    check_each_once([range(4, 6), range(0, 4), range(2, 2)], 6)
    check_each_once([], 0)


def test_outputs_can_be_kept_elsewhere() -> None:
    outputs = dp.predict(nn.Linear(2, 3).double(), torch.ones(5, 2, dtype=torch.float64), 2, device="cpu")
    assert outputs.shape == (5, 3) and not outputs.requires_grad and not outputs.is_inference()
    outputs.requires_grad_().sum().backward()  # it can take part in a training


def _nothing_pickled() -> Any:
    with nothing_pickled():
        return [dp.predict(_everything, torch.tensor(SAMPLES), 3, to) is None for to in (0, "all")]


def test_nothing_is_pickled() -> None:
    assert run_ranks(_nothing_pickled, 2) == [[False, False], [True, False]]


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x[:, None].float().expand(-1, 2**19).contiguous()  # 2 MB a sample


def _ragged(x: torch.Tensor) -> list[torch.Tensor]:
    return list(x[:, None].float().repeat(1, 64).unbind())


def _grown(model: Any, length: int, batch_size: int) -> tuple[float, float]:
    """Return the growth of this process's memory at its peak, and the size of its result, in MB."""

    def resident(field: str) -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1e3 for line in file if line.startswith(field))

    dp.predict(model, torch.arange(4 * batch_size), batch_size)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident("VmRSS")
    result = dp.predict(model, torch.arange(length), batch_size)
    return resident("VmHWM") - before, 0.0 if not isinstance(result, torch.Tensor) else result.nbytes / 1e6


LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's account of memory")


@LINUX
def test_memory_is_that_of_the_result_or_of_the_share() -> None:
    (received, result), (sent, _) = run_ranks(_grown, 2, _dense, 96, 1)
    assert result > 200
    assert received < result + 24  # 16 of these are for a message, 2 for the model's output
    assert sent < 1.1 * result / 2 + 12


@LINUX
def test_many_small_outputs_take_little_more_than_their_bytes() -> None:
    _, (sent, _) = run_ranks(_grown, 2, _ragged, 100_000, 64)
    assert sent < 1.1 * 50_000 * 64 * 4 / 1e6 + 16  # 16 to unpack one piece

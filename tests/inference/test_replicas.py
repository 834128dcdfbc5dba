"""Models that differ between ranks are refused, but not what may differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddparity as dp
from ddparity.comm.bits import check_words, parts
from ddparity.inference.model import Checksums
from tests.ranks import outcomes, run_ranks

ONE_PASS = 8 * 1021  # bytes; a tensor of twice as many or more is compared by sums


class Holds(nn.Module):
    """A layer and a tensor that is different on each rank."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        own = torch.full((3,), float(dist.get_rank()))
        if kind == "parameter":
            self.own = nn.Parameter(own)
        else:
            tensor = torch.diag(own + 1).to_sparse() if kind == "sparse" else own
            self.register_buffer("own", tensor, persistent=kind != "cache")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _with_batch_norm(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a model after a forward in training mode, with another batch on each rank."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    data = torch.randn(8, 2, generator=torch.Generator().manual_seed(dist.get_rank()))
    model(data).sum().backward()
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "seeds": lambda: nn.Linear(2, 2) if torch.manual_seed(dist.get_rank()) else None,
    "parameter": lambda: Holds("parameter"),
    "buffer": lambda: Holds("buffer"),
    "sparse": lambda: Holds("sparse"),
    "DDP": lambda: _with_batch_norm(DistributedDataParallel),
    "replicate": lambda: _with_batch_norm(dp.replicate),
    "number": lambda: nn.ReLU6() if dist.get_rank() else nn.BatchNorm1d(2),
    "function": lambda: nn.Identity() if dist.get_rank() else lambda x: x,
}


def _predicts(kind: str, to: Any) -> None:
    dp.predict(MODELS[kind](), torch.ones(4, 2), 2, to)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("seeds", "The first difference is in the parameter 'weight': load the same checkpoint on every rank"),
        ("parameter", "The first difference is in the parameter 'own'"),
        ("buffer", "The first difference is in the buffer 'own'"),
        ("sparse", "The first difference is in the buffer 'own'"),
        ("DDP", "The first difference is in the buffer '1.running_mean': in a training with torch's Distributed"),
        ("replicate", "only with the next forward in training. Use convert_sync_batchnorm(model)"),
        ("number", "The first difference is in the "),
        ("function", "predict() got a module on one rank and a function on another"),
    ],
)
def test_models_that_differ_are_refused_on_every_rank(kind: str, message: str) -> None:
    ended = outcomes(_predicts, 2, kind, "all")
    assert {outcome.error.split(":")[0] for outcome in ended} == {"ValueError", "RankFailure"}
    assert all(message in outcome.error and outcome.seconds < 10 for outcome in ended)


def _ways_out() -> None:
    """Check what the error advises, and what may differ."""
    ddp = _with_batch_norm(DistributedDataParallel)
    for buffer in ddp.buffers():
        dist.broadcast(buffer, 0)
    synchronised = _with_batch_norm(lambda model: DistributedDataParallel(dp.convert_sync_batchnorm(model)))
    accumulated = dp.replicate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    for micro in dp.accumulate(accumulated, [torch.randn(4, 2) + dist.get_rank()]):
        (accumulated(micro.data).sum() * micro.weight).backward()
    rank = dist.get_rank()
    for model in (ddp, synchronised, accumulated, Holds("cache"), lambda x: x + rank, nn.Linear(2, 2, device="meta")):
        assert dp.predict(model, torch.ones(4, 2), 2, metric=lambda output, batch: len(output), to="all") == 4


def test_the_ways_out_that_it_names_are_ways_out() -> None:
    run_ranks(_ways_out, 2)


def _word(tensor: torch.Tensor, header: str = "") -> int:
    held = parts(tensor)
    assert held is not None
    return check_words([held], [header])[0]


@pytest.mark.parametrize("size", [1, 3, 8, ONE_PASS, 2 * ONE_PASS, 3 * ONE_PASS + 5])
def test_each_bit_and_each_position_counts(size: int) -> None:
    data = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    word = _word(data)
    for position in {0, size // 2, size - 1}:
        changed = data.clone()
        changed[position] ^= 1
        assert _word(changed) != word
    if size > 1:
        assert _word(data.roll(1)) != word
    assert _word(data, "another name") != word


def test_a_shuffle_counts() -> None:
    """Sums alone would not show it."""
    for shape in ((100_000,), (512, 1024), (64, 64, 3, 3)):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert _word(values) != _word(values.flip(0)), shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_how_a_tensor_lies_does_not_count(dtype: torch.dtype) -> None:
    data = torch.randn(50, 301, generator=torch.Generator().manual_seed(0)).to(dtype)
    behind = torch.empty(data.numel() + 1, dtype=dtype)[1:].view(50, 301).copy_(data)  # its address is no multiple of 8
    assert _word(data) == _word(behind) == _word(data.t().contiguous().t())


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta state:UserWarning")
def test_tensors_of_any_layout() -> None:
    dense = torch.eye(4)
    layouts = [
        dense.to_sparse(),
        dense.to_sparse_csr(),
        dense.to_sparse_csc(),
        dense.to_sparse_bsr((2, 2)),
        dense.to_sparse_bsc((2, 2)),
    ]
    for tensor in layouts:
        assert _word(tensor) == _word(tensor.clone()) != _word(tensor * 2), tensor.layout
    assert parts(dense.to_mkldnn()) is None and parts(dense.to("meta")) is None
    empty = Checksums({"": nn.Embedding(0, 3)})
    assert len(empty.text) == 1 + 8


def test_tied_parameters_are_read_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert Checksums({"": model}).text == Checksums({"": model[:1]}).text

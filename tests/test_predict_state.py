"""What predict leaves as it was, keeps, and tells."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import get_worker_info

import ddparity as dp
from tests.ranks import outcomes, run_ranks


class Caches(nn.Module):
    """Changes its buffers in every way, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("cache", torch.ones(2))
        self.register_buffer("absent", None)
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.cache = torch.zeros(7)
        self.absent = torch.ones(1)
        self.register_buffer("late", torch.ones(3), persistent=False)
        del self._buffers["late"]
        self.register_buffer("late", self.count * 2, persistent=False)
        if self.count > 2:
            raise OSError("full")
        return self.layer(x)


@pytest.mark.parametrize("length", [4, 8])
def test_buffers_are_as_before_also_on_an_exception(length: int) -> None:
    model = Caches()
    before = {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()}
    if length == 8:
        with pytest.raises(dp.DDParityError, match="indices 4 to 5: OSError: full"):
            dp.predict(model, torch.ones(length, 2), 2)
    else:
        dp.predict(model, torch.ones(length, 2), 2)
    assert set(dict(model.named_buffers())) == set(before)
    assert model.absent is None and not model._non_persistent_buffers_set
    for name, buffer in model.named_buffers():
        assert id(buffer) == before[name][0] and torch.equal(buffer, before[name][1]), name
        assert not buffer.is_inference()


class WorkerIds(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        assert get_worker_info() is not None
        return torch.tensor([float(index)]), os.getpid()


def _every_epoch() -> list[Any]:
    """A training loop that predicts after each epoch."""
    model = dp.replicate(nn.Linear(1, 1))
    predictor = dp.Predictor(WorkerIds(), 2, num_workers=1)
    results = []
    for _ in range(3):
        for micro in dp.accumulate(model, [torch.ones(2, 1)]):
            (model(micro.data).mean() * micro.weight).backward()
        model.zero_grad()
        results.append(predictor(lambda batch: (batch[0], batch[1]), to="all"))
    return [(x.flatten().tolist(), pids.unique().tolist()) for x, pids in results]


def test_a_predictor_keeps_its_workers() -> None:
    for epochs in run_ranks(_every_epoch, 2):
        assert [x for x, _ in epochs] == [list(range(8))] * 3
        assert len(epochs[0][1]) == 2  # one worker on each rank
        assert epochs[0][1] == epochs[1][1] == epochs[2][1]


def _interrupted() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return x

    signal.signal(signal.SIGINT, signal.default_int_handler)
    dp.predict(model, torch.arange(4000), 1)


def test_ctrl_c_stops_at_once() -> None:
    stays, interrupted = outcomes(_interrupted, 2)
    assert interrupted.error.startswith("KeyboardInterrupt")
    assert "RankFailure: rank 1 failed in predict: KeyboardInterrupt" in stays.error
    assert max(stays.seconds, interrupted.seconds) < 10


def _shows() -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        dp.predict(lambda x: x, torch.arange(10), 2, show_progress=True)
    return out.getvalue()


@pytest.mark.parametrize("world_size", [1, 3])
def test_one_progress_display_counts_all_ranks(world_size: int) -> None:
    first, *others = run_ranks(_shows, world_size)
    assert first.splitlines()[-1].startswith("predict: 10/10 samples, ")
    assert first.count("10/10") == 1
    assert others == [""] * (world_size - 1)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"balance='even'.*contiguous"):
        dp.predict(nn.Identity(), torch.arange(4), 2, balance="even")
    with pytest.raises(TypeError, match="shuffle: it runs each sample once, in data-set order"):
        dp.predict(nn.Identity(), torch.arange(4), 2, shuffle=True)

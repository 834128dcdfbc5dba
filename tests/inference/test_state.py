"""What `predict` restores, what it keeps, and which errors it raises."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import get_worker_info

import ddparity as dp
from ddparity.comm.trees import new_tensor
from ddparity.runtime.agreement import store_root
from tests.ranks import kill_self, outcomes, run_ranks


class Caches(nn.Module):
    """A module that changes its buffers in every way in eval mode."""

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


class Writes(nn.Module):
    """A module that changes its buffers in ways that no version counter shows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(2))
        self.register_buffer("b", torch.tensor([0.0, float("nan")]))
        self.register_buffer("c", torch.zeros(2))
        self.register_buffer("kept", torch.ones(1).expand(3))
        self.mask = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a.data += 1
        self.b.numpy()[0] = 3
        self.c.resize_(5)
        if self.mask is None:
            self.mask = torch.ones(2)
        self.found = self.mask * 2
        return x * self.mask


def test_changes_without_a_trace_are_undone() -> None:
    model = Writes()
    dp.predict(model, torch.ones(4, 2), 2)
    assert model.a.tolist() == [0, 0] and model.b[0] == 0 and model.b[1].isnan() and model.c.tolist() == [0, 0]
    assert model.mask is None and not hasattr(model, "found")
    # A mask that was made in inference mode could not take part in this training step.
    model(torch.ones(4, 2, requires_grad=True)).sum().backward()


LAYOUTS: dict[str, Any] = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((2, 2)),
    "bsc": lambda x: x.to_sparse_bsc((2, 2)),
    "mkldnn": lambda x: x.to_mkldnn(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
}


class OfLayout(nn.Module):
    """A module that changes a buffer in place."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.register_buffer("kept", LAYOUTS[layout](torch.eye(4)))
        self.register_buffer("changed", LAYOUTS[layout](torch.eye(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.changed.copy_(LAYOUTS[layout_of(self.changed)](2 * torch.eye(4)))
        return x


def layout_of(tensor: torch.Tensor) -> str:
    if tensor.dtype is torch.float8_e4m3fn:
        return "float8"
    return str(tensor.layout).removeprefix("torch.").removeprefix("sparse_").removeprefix("_")


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_of_any_layout_are_as_before(layout: str) -> None:
    model = OfLayout(layout)
    kept, changed, version = model.kept, model.changed, model.kept._version
    dp.predict(model, torch.ones(4, 2), 2)
    assert model.kept is kept and model.changed is changed and kept._version == version
    for buffer in (kept, changed):
        dense = buffer.float() if layout == "float8" else buffer.to_dense()
        assert torch.equal(dense, torch.eye(4))


class Keeps(nn.Module):
    """A module with a container that holds cached tensors, which a training would use, and counts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(2, 2)
        self.first = torch.ones(2)
        self.named: dict[Any, Any] = {"first": self.first, "sizes": 0}
        self.row: list[Any] = [self.first, None]
        self.pair: Any = None
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        self.named["sizes"] += len(x)
        if self.how == "dict":
            self.named["first"] = self.named.get("cache", self.named["first"]) * 1
            mask = self.named.setdefault("cache", torch.ones(2))
        elif self.how == "list":
            self.row[1] = self.row[1] if self.row[1] is not None else torch.ones(2)
            mask = self.row[1]
        elif self.how == "window":
            if not self.row[-1:] or self.row[-1] is None or self.row[-1] is self.first:
                self.row.pop(0)
                self.row.append(torch.ones(2))
            mask = self.row[-1]
        elif self.how == "tuple":
            self.pair = self.pair or (torch.ones(2), 1)
            mask = self.pair[0]
        elif self.how == "keys and values":
            mask, _ = self.named.setdefault("cache", (torch.ones(2), 1))
        else:  # another dict
            self.named = {**self.named, "cache": self.named.get("cache", torch.ones(2))}
            mask = self.named["cache"]
        return self.layer(x) * mask


@pytest.mark.parametrize("how", ["dict", "list", "window", "tuple", "keys and values", "new"])
def test_what_a_container_caches_is_forgotten(how: str) -> None:
    model = Keeps(how)
    named, row = model.named, model.row
    dp.predict(model, torch.ones(4, 2), 2)
    assert model.named is named and model.row is row and model.pair is None
    assert set(named) == {"first", "sizes"} and named["first"] is model.first
    assert len(row) == 2 and row[0] is model.first and row[1] is None
    assert model.sizes == [2, 2] and named["sizes"] == (2 if how == "new" else 4)  # they are no tensors, so they stay
    model(torch.ones(4, 2)).sum().backward()


class Merges(nn.Module):
    """A layer with a low-rank adapter, which is merged into the weight in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.adapter = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 0.5))
        self.merged = False

    def train(self, mode: bool = True) -> Merges:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += self.adapter.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.weight if self.merged else self.weight + self.adapter)


@pytest.mark.parametrize("training", [True, False])
def test_modules_for_which_the_mode_is_more_than_a_flag(training: bool) -> None:
    inner = Merges()
    model = nn.Sequential(inner, nn.Dropout())
    inner.train(training)
    before = (inner.training, inner.merged, inner.weight.tolist())
    assert dp.predict(model, torch.ones(3, 2), 2).tolist() == [[1.5, 1.5]] * 3
    assert (inner.training, inner.merged, inner.weight.tolist()) == before
    assert [module.training for module in model.modules()] == [True, training, True]


def test_a_module_that_has_not_seen_its_input_is_refused() -> None:
    with pytest.raises(ValueError, match="a LazyBatchNorm1d that has not seen its input: run one batch"):
        dp.predict(nn.Sequential(nn.LazyBatchNorm1d()), torch.ones(4, 2), 2)


class WorkerIds(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        assert get_worker_info() is not None
        return torch.tensor([float(index)]), os.getpid()


def _every_epoch() -> list[Any]:
    """Run a training loop that predicts after each epoch."""
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


def _killed_early() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == 2:
            kill_self()
        time.sleep(0.05)
        return x

    dp.predict(model, torch.arange(1200), 1)


def test_a_rank_that_is_killed_is_noticed_while_the_others_work() -> None:
    ended = outcomes(_killed_early, 3)
    for outcome in ended[:2]:
        assert "RankFailure: rank 2 failed in predict: its process" in outcome.error
        assert outcome.seconds < 10  # the whole takes 20


@dataclasses.dataclass
class Refuses:
    rows: torch.Tensor

    def __post_init__(self) -> None:
        if len(self.rows) > 2:
            raise ValueError("too long")


def _refuses(to: Any) -> None:
    with contextlib.suppress(ValueError):  # the process continues
        dp.predict(Refuses, torch.arange(8), 2, to)
    store_root().add("ended", 1)
    while store_root().add("ended", 0) < 1:
        time.sleep(0.01)


@pytest.mark.parametrize("to", [0, "all"])
def test_a_result_that_cannot_be_built_is_known_to_all(to: Any) -> None:
    ended = outcomes(_refuses, 3, to)
    assert all(outcome.seconds < 10 for outcome in ended)
    if to == 0:
        assert ended[0].error is None
        assert all("RankFailure: rank 0 failed in collecting the outputs" in o.error for o in ended[1:])


def _no_room() -> None:
    """Let rank 0 fail to allocate what it receives, and continue."""

    def new(description: Any) -> torch.Tensor:
        if description["shape"][0] == 40:
            raise MemoryError("no room")
        return new_tensor(description)

    with mock.patch("ddparity.inference.collect.new_tensor", new):
        dp.predict(lambda x: x, TensorsOnRank1(), 1)


class TensorsOnRank1(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), index)


def test_memory_that_runs_out_in_the_collection_is_known_to_all() -> None:
    first, second = outcomes(_no_room, 2)
    assert first.error == "MemoryError: no room"
    assert "RankFailure: rank 0 failed in predict: MemoryError: no room" in second.error


def _differ(how: str) -> None:
    rank = dist.get_rank()
    options: dict[str, Any] = {
        "to": {"to": rank},
        "all": {"to": "all" if rank else 0},
        "seed": {"seed": rank},
        "metric": {"metric": (lambda o, b: 1) if rank else None},
        "balance": {"balance": "dynamic" if rank else "contiguous"},
        "batch_size": {"metric": lambda o, b: o.sum()},
    }[how]
    dp.predict(lambda x: x, torch.arange(10.0), 5 + 4 * rank * (how == "batch_size"), **options)


@pytest.mark.parametrize("how", ["to", "all", "seed", "metric", "balance", "batch_size"])
def test_arguments_that_differ_between_ranks_are_refused(how: str) -> None:
    ended = outcomes(_differ, 2, how)
    name = "to" if how == "all" else how
    assert any(f"ValueError: predict's {name} differs between ranks" in outcome.error for outcome in ended)
    assert all(outcome.error and outcome.seconds < 10 for outcome in ended)


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

"""What `predict` promises beside its values: no row is lost, nothing needless moves, every rank learns of a failure."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.comm import transfer as wire
from tests.ranks import nothing_pickled, outcomes, run_ranks

MIB = 2**20
module = importlib.import_module("ddparity.inference.predict")  # the package has a function of that name


def _shared_out_badly(how: str, options: dict[str, Any]) -> None:
    """Let rank 1 skip its first batch, or run the batches of rank 0."""
    right = module.assigned

    def wrong(chunks: Any, rank: int, *rest: Any) -> Iterator[range]:
        shared = list(right(chunks, rank, *rest))
        return iter(shared[1:] if how == "lost" else list(right(chunks, 0, *rest)) + shared)

    with mock.patch.object(module, "assigned", wrong if dist.get_rank() else right):
        dp.predict(lambda x: x, torch.arange(12.0), 2, **options)


@pytest.mark.parametrize("how", ["lost", "twice"])
@pytest.mark.parametrize("kind", ["outputs", "all", "metric"])
def test_batches_that_are_lost_or_run_twice_are_an_error_on_every_rank(how: str, kind: str) -> None:
    options = {"outputs": {}, "all": {"to": "all"}, "metric": _Summed()}[kind]
    said = "are missing" if how == "lost" else "are there twice"
    for outcome in outcomes(_shared_out_badly, 2, how, options):
        assert outcome.error is not None and said in outcome.error, outcome


class _Summed(dict[str, Any]):
    """Add a metric to options. Each rank makes it, since such a function cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(metric=lambda output, batch: output.sum())

    def __reduce__(self) -> Any:
        return _Summed, ()


def _messages(samples: int, width: int, options: dict[str, Any]) -> list[int]:
    """Return the bytes of each message between ranks."""
    passed: list[int] = []
    right = wire._pass

    def noted(message: torch.Tensor, *rest: Any) -> None:
        passed.append(message.numel() * message.element_size())
        right(message, *rest)

    with mock.patch.object(wire, "_pass", noted):
        dp.predict(lambda x: x[:, None].expand(-1, width), torch.arange(float(samples)), 4, **options)
    return passed


@pytest.mark.parametrize("to", [0, "all"])
def test_outputs_travel_in_messages_of_at_most_16_mib(to: Any) -> None:
    for passed in run_ranks(_messages, 2, 16, MIB, {"to": to}):
        assert sum(passed) >= 8 * 4 * MIB  # the other rank's half
        assert max(passed) <= 16 * MIB


def test_a_metric_moves_no_outputs() -> None:
    for passed in run_ranks(_messages, 2, 16, 2**16, _Summed()):  # 4 MB of outputs
        assert sum(passed) < 200


def _collectives(folder: Path) -> list[dict[str, int]]:
    found = []
    ways: list[dict[str, Any]] = [{"show_progress": True}, {"metric": lambda o, b: o.sum()}, {"to": folder}]
    for options in ways:
        counts = []
        for samples in (6, 40):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                to = {"to": options["to"] / str(samples)} if "to" in options else {}
                dp.predict(nn.Identity(), torch.arange(float(samples)), 2, **(options | to))
            counts.append({e.key: e.count for e in profiler.key_averages() if e.key.startswith("gloo:")})
        assert counts[0] == counts[1], options  # none for a batch
        found.append(counts[0])
    return found


def test_no_collective_runs_for_a_batch(tmp_path: Path) -> None:
    for bar, metric, disk in run_ranks(_collectives, 2, tmp_path):
        assert sum(bar.values()) > 0 and sum(metric.values()) > 0
        assert disk == {}  # each rank writes its own files


def _different_lengths() -> None:
    dp.predict(lambda x: x, torch.arange(8.0 + dist.get_rank()), 2)


def test_data_sets_of_different_lengths_are_refused_on_every_rank() -> None:
    for outcome in outcomes(_different_lengths, 2):
        assert outcome.error is not None and "the data set's length differs between ranks" in outcome.error
        assert outcome.seconds < 10


def _metric_fails() -> None:
    def metric(output: torch.Tensor, batch: torch.Tensor) -> Any:
        return output.sum() if 6.0 not in batch.tolist() else 1 // 0

    dp.predict(lambda x: x, torch.arange(8.0), 2, metric=metric)


def test_a_metric_that_fails_on_one_rank_is_named_on_every_rank() -> None:
    for outcome in outcomes(_metric_fails, 2):
        assert outcome.error is not None and outcome.seconds < 10
        assert "the metric failed for the data-set indices 6 to 7: ZeroDivisionError" in outcome.error


def _nothing_pickled() -> None:
    with nothing_pickled():
        dp.gather([{"x": torch.ones(2), "name": "a", "n": 1}], "all")
        dp.predict(lambda x: x, torch.arange(8.0), 2, metric=lambda o, b: {"sum": o.sum(), "n": len(o)})


def test_neither_gather_nor_a_metric_pickles() -> None:
    run_ranks(_nothing_pickled, 2)


def _own_share() -> list[int]:
    return list(dp.ShardSampler(5))


def test_a_shard_sampler_takes_its_rank_from_the_group() -> None:
    assert run_ranks(_own_share, 2) == [[0, 1, 2], [3, 4]]
    assert list(dp.ShardSampler(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("option", ["shuffle", "sampler", "batch_sampler", "drop_last", "in_order"])
def test_options_that_predict_decides_are_refused_by_name(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option}: it runs each sample once, in data-set order"):
        dp.predict(nn.Identity(), torch.arange(4), 2, **{option: True})

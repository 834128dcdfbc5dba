from __future__ import annotations

import os
import random
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import ddparity as dp
from tests.ranks import kill_self, outcomes, run_ranks

Pair = namedtuple("Pair", "a b")


class Numbers(Dataset):
    """Pairs (input, target). Sample 3 is there twice."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(3 if index == 4 else index), 1.0]), -index


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def _sizes(cases: list[tuple[int, int]]) -> list[torch.Tensor | None]:
    model = dp.replicate(Net())
    return [dp.predict(model, Numbers(length), batch_size) for length, batch_size in cases]


CASES = [(length, batch_size) for length in (0, 1, 2, 3, 7, 16, 17) for batch_size in (1, 4, 16)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_outputs_are_those_of_one_process_bit_for_bit(world_size: int) -> None:
    model = Net().eval()
    with torch.no_grad():
        expected = [
            torch.cat([model(torch.stack([Numbers(n)[i][0] for i in range(n)][s : s + b])) for s in range(0, n, b)])
            if n
            else torch.empty(0)
            for n, b in CASES
        ]
    received, *others = run_ranks(_sizes, world_size, CASES)
    for ours, oracle, case in zip(received, expected, CASES, strict=True):
        assert torch.equal(ours, oracle), case
    assert all(output is None for rank in others for output in rank)


def _structures(to: Any) -> Any:
    def model(batch: list[torch.Tensor]) -> dict[str, Any]:
        x, targets = batch
        return {"sum": x.sum(1), "both": (x.to(torch.bfloat16), targets), "pair": Pair(targets > -3, x[:, :0])}

    result = dp.predict(model, Numbers(7), 2, to)
    if result is None:
        return None
    assert type(result["pair"]) is Pair
    assert result["pair"].b.shape == (7, 0)
    assert result["both"][0].dtype == torch.bfloat16
    return result["sum"].tolist(), result["both"][1].tolist(), result["pair"].a.tolist()


EXPECTED = ([1, 2, 3, 4, 4, 6, 7], [0, -1, -2, -3, -4, -5, -6], [True] * 3 + [False] * 4)


@pytest.mark.parametrize(
    ("to", "world_size", "receivers"),
    [(0, 1, [0]), (0, 3, [0]), (2, 3, [2]), ("all", 3, [0, 1, 2]), ("all", 4, [0, 1, 2, 3]), (3, 4, [3])],
)
def test_dicts_and_tuples_go_where_they_are_wanted(to: Any, world_size: int, receivers: list[int]) -> None:
    results = run_ranks(_structures, world_size, to)
    assert results == [EXPECTED if rank in receivers else None for rank in range(world_size)]


def _generates(num_workers: int) -> torch.Tensor | None:
    class Noisy(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])

    return dp.predict(lambda x: torch.cat([x, torch.rand(len(x), 1)], 1), Noisy(11), 3, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_random_streams_do_not_depend_on_processes_or_workers(world_size: int, num_workers: int) -> None:
    expected = _generates(0)
    assert len(expected.unique()) == 44
    assert torch.equal(run_ranks(_generates, world_size, num_workers)[0], expected)


def test_a_models_state_is_left_alone() -> None:
    model = Net()
    model.layers[1].eval()  # a frozen batch norm in a model in training mode
    modes = [module.training for module in model.modules()]
    before, streams = dp.fingerprint(model), (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))

    seen = []
    model.layers[0].register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    outputs = dp.predict(model, Numbers(5), 2)
    assert seen == [(False, False)] * 3
    assert not outputs.is_inference()

    model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(dp.DDParityError, match="indices 0 to 1: ZeroDivisionError"):
        dp.predict(model, Numbers(5), 2)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert dp.fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), str(np.random.get_state())) == streams[1:]


def _between_steps() -> None:
    """DDP would broadcast buffers in each forward, which would hang with uneven shares."""
    model = dp.replicate(Net())
    for _ in range(2):
        for micro in dp.accumulate(model, [torch.randn(4, 2), torch.randn(4, 2)]):
            (model(micro.data).mean() * micro.weight).backward()
        model.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            dp.predict(model, Numbers(3), 1)
        found = {e.key: e.count for e in profiler.key_averages() if e.key.startswith("gloo:")}
        assert found == {"gloo:all_gather": 2, ["gloo:recv", "gloo:send"][dist.get_rank()]: 3}


def test_it_runs_between_training_steps_with_the_collectives_it_states() -> None:
    run_ranks(_between_steps, 2)


def _fails_on(index: int, how: str) -> None:
    def model(batch: list[torch.Tensor]) -> torch.Tensor:
        if -index in batch[1].tolist():
            if how == "kill":
                kill_self()
            raise OSError("lost")
        return batch[0]

    dp.predict(model, Numbers(12), 2)


@pytest.mark.parametrize("how", ["raise", "kill"])
@pytest.mark.parametrize(("index", "rank"), [(0, 0), (9, 2)])
def test_a_failure_reaches_every_rank(index: int, rank: int, how: str) -> None:
    ended = outcomes(_fails_on, 3, index, how)
    first = index // 2 * 2
    for other, outcome in enumerate(ended):
        assert outcome.seconds < 10
        if other != rank:
            assert f"RankFailure: rank {rank} failed in predict" in outcome.error
            assert how == "kill" or f"indices {first} to {first + 1}: OSError: lost" in outcome.error
        elif how == "raise":
            expected = f"DDParityError: the model failed for the data-set indices {first} to {first + 1}: OSError: lost"
            assert outcome.error == expected


class BrokenSample(Numbers):
    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise OSError("truncated file")
        return super().__getitem__(index)


def _broken_sample(num_workers: int) -> None:
    dp.predict(lambda batch: batch[0], BrokenSample(8), 2, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failing_sample_is_named_on_every_rank(num_workers: int) -> None:
    for outcome in outcomes(_broken_sample, 2, num_workers):
        assert "the data set failed at index 5: OSError: truncated file" in outcome.error
        assert outcome.seconds < 10


def _collates(samples: list[Any]) -> Any:
    if any(index == -5 for _, index in samples):
        raise OSError("not an image")
    return samples


def _killed(samples: list[Any]) -> Any:
    if any(index == -5 for _, index in samples):
        kill_self()
    return samples


def _broken_collate(collate: Any, num_workers: int) -> None:
    dp.predict(lambda samples: [x for x, _ in samples], Numbers(8), 2, num_workers=num_workers, collate_fn=collate)


@pytest.mark.parametrize(
    ("collate", "num_workers", "said"),
    [
        (_collates, 0, "OSError: not an image"),
        (_collates, 1, "OSError"),
        (_killed, 1, "RuntimeError: DataLoader worker"),
    ],
)
def test_a_collate_function_and_a_worker_that_fail_name_the_samples(collate: Any, num_workers: int, said: str) -> None:
    for outcome in outcomes(_broken_collate, 2, collate, num_workers):
        assert f"the data loader failed before it returned data-set indices 4 to 5: {said}" in outcome.error
        assert outcome.seconds < 10


class Together(Numbers):
    def __getitem__(self, index: int) -> Any:
        raise AssertionError("samples of a batch are asked for together")

    def __getitems__(self, indices: list[int]) -> Any:
        assert type(indices) is list
        return torch.tensor(indices) * random.choice([1])


class Loses(Numbers):
    """A data set that returns three samples instead of four from index 4 on."""

    def __init__(self, length: int, kind: str) -> None:
        super().__init__(length)
        self.kind = kind

    def __getitems__(self, indices: list[int]) -> Any:
        found = [float(i) for i in indices if i != 5]
        return {"list": list, "tensor": torch.tensor, "array": np.array}[self.kind](found)


def _loses(kind: str, num_workers: int, metric: Any) -> None:
    options: dict[str, Any] = {} if kind == "list" else {"collate_fn": torch.as_tensor}
    dp.predict(lambda x: x, Loses(8, kind), 4, metric=metric, num_workers=num_workers, **options)


@pytest.mark.parametrize(("kind", "num_workers"), [("list", 0), ("list", 1), ("tensor", 0), ("array", 0)])
def test_samples_that_a_data_set_loses_are_refused(kind: str, num_workers: int) -> None:
    for metric in (None, _mean):
        for outcome in outcomes(_loses, 2, kind, num_workers, metric):
            said = "SampleError: the data set's __getitems__ returned 3 samples for the 4 indices [4, 5, 6, 7]"
            assert said in outcome.error and outcome.seconds < 10


def _mean(output: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    return dp.Average(sum=output.sum(), weight=len(output))


class Columns(Together):
    def __getitems__(self, indices: list[int]) -> Any:
        return {"x": torch.tensor(indices), "y": -torch.tensor(indices)}


def test_a_data_set_may_give_a_whole_batch() -> None:
    found = dp.predict(lambda batch: batch["x"] - batch["y"], Columns(7), 3, collate_fn=lambda batch: batch)
    assert found.tolist() == list(range(0, 14, 2))


def _ends(samples: Any) -> Any:
    raise StopIteration


def test_batches_are_a_data_loaders_with_and_without_workers() -> None:
    """Without workers no DataLoader's iterator runs."""
    for num_workers in (0, 1):
        options: dict[str, Any] = {"num_workers": num_workers}
        doubled = dp.predict(lambda x: x * 2, Together(7), 3, collate_fn=lambda samples: samples, **options)
        assert doubled.tolist() == list(range(0, 14, 2))
        named = dp.predict(lambda batch: batch["x"], [{"x": float(i)} for i in range(5)], 2, **options)
        assert named.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] and named.dtype == torch.float64
    with pytest.raises(dp.DDParityError, match=r"before it returned data-set indices 0 to 2: .*StopIteration"):
        dp.predict(lambda x: x, Numbers(7), 3, collate_fn=_ends)


def _uneven_lengths() -> None:
    dp.predict(lambda batch: batch[0], Numbers(8 + dist.get_rank()), 2)


def test_data_sets_of_different_length_are_refused() -> None:
    assert any(
        "ValueError: the data set's length differs between ranks" in o.error for o in outcomes(_uneven_lengths, 2)
    )


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("model", "dataset", "options", "error", "message"),
    [
        (nn.Identity(), range(4), {"batch_size": 0}, ValueError, "batch_size=0"),
        (nn.Identity(), range(4), {"batch_size": 2.0}, TypeError, "batch_size=2.0 is a float"),
        (nn.Identity(), range(4), {"batch_size": 2, "to": 1}, ValueError, "to=1 receives nothing"),
        (nn.Identity(), Stream(), {"batch_size": 2}, TypeError, "Stream.*map-style"),
        (lambda x: x.sum(), range(4), {"batch_size": 2}, ValueError, r"indices 0 to 1 has shape \(\) for a batch of 2"),
        (lambda x: x.repeat(2), range(4), {"batch_size": 2}, ValueError, r"shape \(4,\) for a batch of 2 samples"),
        (
            lambda x: {"a": ["s"]},
            range(4),
            {"batch_size": 2},
            ValueError,
            r"\['a'\] is a list of 1 entries for a batch",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(model, dataset, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dp.predict(model, dataset, **options)


def test_what_a_module_is_called_with() -> None:
    identity = nn.Identity()
    assert dp.predict(identity, Numbers(2), 2).shape == (2, 2)
    assert dp.predict(identity, Numbers(2), 2, inputs=lambda batch: batch[1]).tolist() == [0, -1]
    assert dp.predict(lambda batch: batch[1], Numbers(2), 2).tolist() == [0, -1]
    assert os.environ.get("RANK") is None


def _on_gpu(to: Any, device: str | None) -> Any:
    net = Net().cuda()

    def model(batch: list[torch.Tensor]) -> dict[str, Any]:
        x, targets = (part.cuda() for part in batch)
        ragged = [x[i, :1].repeat(1 + i % 3) for i in range(len(x))]
        return {"y": net.eval()(x), "ragged": ragged, "name": [str(int(t)) for t in targets], "target": targets.cpu()}

    result = dp.predict(model, Numbers(17), 4, to=to, device=device)
    whole = dp.predict(net, Numbers(17), 4, to=to)
    if result is None:
        return None
    kinds = (result["y"].device.type, result["ragged"][0].device.type, result["target"].device.type)
    return kinds, result["y"].cpu(), [one.cpu() for one in result["ragged"]], result["name"], whole.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("to", [0, "all"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_outputs_of_a_gpu_that_ranks_share_over_gloo(to: Any, device: str | None) -> None:
    ((kinds, y, ragged, names, whole),) = run_ranks(_on_gpu, 1, to, device)
    assert kinds == (("cpu",) * 3 if device else ("cuda", "cuda", "cpu"))
    for world_size in (2, 3):
        for rank, got in enumerate(run_ranks(_on_gpu, world_size, to, device)):
            if to == 0 and rank:
                assert got is None
                continue
            assert got[0] == kinds and got[3] == names
            assert torch.equal(got[1], y) and torch.equal(got[4], whole)
            assert all(torch.equal(one, other) for one, other in zip(got[2], ragged, strict=True))

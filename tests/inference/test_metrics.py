"""Metrics are equal to those of one process, and no output moves."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import ddparity as dp
from ddparity.inference.metrics import ExactSum
from tests.ranks import outcomes, run_ranks

LENGTHS = (0, 1, 2, 5, 23)
COMPARED = (4, 23)  # in batches of 2: of the first, two ranks of four have none


def _data(length: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(length, 4, generator=generator) * torch.logspace(-6, 6, length)[:, None]
    return TensorDataset(logits, torch.randint(4, (length,), generator=generator))


def _parts(output: torch.Tensor, batch: list[torch.Tensor]) -> dict[str, Any]:
    right = output.argmax(1) == batch[1]
    return {
        "accuracy": dp.Average(sum=right.sum(), weight=len(right)),
        "error": dp.Average(mean=1 - right.double().mean(), weight=len(right)),
        "sum": output.double().sum().item(),
        "right": int(right.sum()),
        "confusion": torch.bincount(batch[1] * 4 + output.argmax(1), minlength=16).view(4, 4),
        "column": np.asarray(output.double().sum(0)),
    }


def _averaged(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, float]:
    return output.sum(), 2.0  # a pair is a sum and its weight


def _sums(balance: str) -> list[Any]:
    found = []
    for length in LENGTHS:
        found.append(dp.predict(nn.Identity(), _data(length), 2, metric=_parts, balance=balance))
        found.append(dp.predict(nn.Identity(), _data(length), 2, metric=lambda o, b: len(o), balance=balance, to="all"))
        found.append(dp.predict(nn.Identity(), _data(length), 3, metric=_averaged, balance=balance))
    return found


@pytest.mark.parametrize("balance", ["contiguous", "dynamic"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sums_are_those_of_one_process_bit_for_bit(world_size: int, balance: str) -> None:
    for rank, found in enumerate(run_ranks(_sums, world_size, balance)):
        for number, length in enumerate(LENGTHS):
            named, count, mean = found[3 * number : 3 * number + 3]
            assert count == (length if length else {})
            if rank:
                assert named is None and mean is None
                continue
            if not length:
                assert named == {} and mean == {}
                continue
            logits, targets = _data(length).tensors
            right = logits.argmax(1) == targets
            exact = sum(Fraction(one.double().sum().item()) for one in logits.split(2))
            assert named["accuracy"] == right.sum().item() / length
            errors = [((one != part).double().mean().item(), len(part)) for one, part in _split_classes(length)]
            assert named["error"] == float(sum(Fraction(mean * size) for mean, size in errors)) / length
            assert named["sum"] == float(exact)
            assert named["right"] == right.sum()
            assert named["confusion"].dtype == torch.int64
            assert torch.equal(named["confusion"].diagonal().sum(), right.sum())
            batches = [one.double().sum(0) for one in logits.split(2)]
            columns = [float(sum(Fraction(b[c].item()) for b in batches)) for c in range(4)]
            assert named["column"].tolist() == columns
            sums = [Fraction(one.sum().item()) for one in logits.split(3)]
            assert mean == float(sum(sums)) / (2 * len(sums))


def _split_classes(length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    logits, targets = _data(length).tensors
    return list(zip(logits.argmax(1).split(2), targets.split(2), strict=True))


def test_a_mean_over_nothing_weighs_nothing() -> None:
    """Batches of masked tokens, one of which has none; and means of columns with weights of their own."""
    kept = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 0], [0, 1]], dtype=torch.bool)
    values = torch.arange(10.0, dtype=torch.float64).view(5, 2)

    def masked(output: Any, batch: Any) -> dict[str, dp.Average]:
        x, mask = batch
        columns = (x * mask).sum(0) / mask.sum(0)
        return {
            "all": dp.Average(mean=x[mask].mean(), weight=mask.sum()),
            "columns": dp.Average(mean=columns, weight=mask.sum(0)),
        }

    found = dp.predict(lambda batch: batch[0], TensorDataset(values, kept), 2, metric=masked)
    assert found["all"] == values[kept].mean().item()
    assert found["columns"].tolist() == [(0.0 + 2.0) / 2, (3.0 + 9.0) / 2]


def _cut(values: list[float], cuts: list[int]) -> Any:
    """Return the sum of the values that ranks compute if each has one part of them."""
    joined = ExactSum()
    bounds = sorted({0, len(values), *(cut % (len(values) + 1) for cut in cuts)})
    for start, stop in itertools.pairwise(bounds):
        part = ExactSum()
        for value in values[start:stop]:
            part.add(value)
        joined.merge(part.state())
    return joined.value()


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30), st.lists(st.integers(0, 30))
)
def test_a_sum_does_not_depend_on_its_order_or_on_ranks(values: list[float], cuts: list[int]) -> None:
    try:
        exact = float(sum(map(Fraction, values)))
    except OverflowError:
        exact = math.copysign(math.inf, sum(map(Fraction, values)))
    for order in (values, values[::-1], sorted(values), sorted(values, key=abs)):
        assert _cut(order, cuts) == exact


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, math.inf, 2.0], math.inf),
        ([-math.inf, 1, 5], -math.inf),
        ([math.inf, 1.0, -math.inf], math.nan),
        ([math.nan, 1.0], math.nan),
        ([2**62 + 1, 2**62 + 1], 2**63 + 2),
        ([np.uint64(2**63 + 5)] * 2, 2**64 + 10),
        ([2**64, 1], 2**64 + 1),
        ([True, True], 2),
        ([1, 0.5], 1.5),
    ],
)
def test_sums_of_infinities_and_of_large_integers(values: list[Any], expected: float) -> None:
    for cuts in ([], [1], [2], [1, 2]):
        found = _cut(values, cuts)
        assert type(found) is type(expected)
        assert found == expected or (math.isnan(expected) and math.isnan(found))


def test_arrays_are_summed_element_by_element() -> None:
    total = ExactSum()
    for array in (torch.tensor([0.1, math.inf]), np.array([0.2, 1.0]), torch.tensor([-0.1, 2.0])):
        total.add(array)
    assert total.value().tolist() == [0.2, math.inf]


def _regressions(length: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(length, generator=generator)
    return TensorDataset(x, x + torch.randn(length, generator=generator))


def _classes(length: int) -> TensorDataset:
    return TensorDataset(_data(length).tensors[0], torch.arange(length) % 4)


def _classified() -> Any:
    classes = {"task": "multiclass", "num_classes": 4}
    return torchmetrics.MetricCollection(
        {
            "accuracy": torchmetrics.Accuracy(**classes, average="micro"),
            "f1": torchmetrics.F1Score(**classes, average="macro"),
            "precision": torchmetrics.Precision(**classes, average="macro"),  # shares its states with f1
            "confusion": torchmetrics.ConfusionMatrix(**classes),
            "auroc": torchmetrics.AUROC(**classes),  # keeps all values
        }
    )


def _objects() -> list[Any]:
    own = _classified()
    found = []
    for length in COMPARED:
        found.append(dp.predict(nn.Softmax(1), _classes(length), 2, metric=own))
        # Its states are stacked over ranks: those of a rank without a sample must be left out.
        found.append(
            dp.predict(nn.Identity(), _regressions(length), 2, metric=torchmetrics.PearsonCorrCoef(), to="all")
        )
        found.append(dp.predict(nn.Identity(), _regressions(length), 3, metric=torchmetrics.SpearmanCorrCoef()))
    assert all(member.update_count == 0 for member in own.values()), "the user's object was changed"
    return found


@pytest.mark.filterwarnings("ignore:Metric .* will save all targets:UserWarning")
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_torchmetrics_are_those_of_one_process(world_size: int) -> None:
    received = run_ranks(_objects, world_size)
    for number, length in enumerate(COMPARED):
        oracle = _classified()
        oracle.update(_classes(length).tensors[0].softmax(1), _classes(length).tensors[1])
        classified, _, spearman = received[0][3 * number : 3 * number + 3]
        for name, value in oracle.compute().items():
            torch.testing.assert_close(classified[name], value, rtol=1e-6, atol=0, msg=name)
        x, y = _regressions(length).tensors
        for found in received:  # to="all"
            pearson = found[3 * number + 1]
            torch.testing.assert_close(pearson, torchmetrics.functional.pearson_corrcoef(x, y), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(spearman, torchmetrics.functional.spearman_corrcoef(x, y))


def _fails(how: str) -> None:
    metric: Any = {
        "function": lambda output, batch: 1 / (5 - int(batch[1].max())),
        "kind": lambda output, batch: {"a": "text"},
        "shape": lambda output, batch: torch.ones(len(output)),
        "triple": lambda output, batch: {"a": (output.sum(), len(output), 1)},
        "change": lambda output, batch: {"a": dp.Average(sum=1, weight=2) if 4 in batch[1].tolist() else 1},
        "neither": lambda output, batch: dp.Average(weight=2),
        "list": lambda output, batch: [output.sum(), len(output)],
        "object": object(),
        "class": torchmetrics.MeanSquaredError,
        "step": torchmetrics.Accuracy(task="multiclass", num_classes=4, dist_sync_on_step=True),
        "targets": torchmetrics.MeanSquaredError(),
    }[how]
    data: Any = TensorDataset(torch.arange(7.0), torch.arange(7))
    dp.predict(
        lambda b: b[0] if how != "targets" else b, data.tensors[0] if how == "targets" else data, 2, metric=metric
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("function", "DDParityError: the metric failed for the data-set indices 4 to 5: ZeroDivisionError"),
        ("kind", "the metric failed for the data-set indices 0 to 1: TypeError: a metric function returned 'text'"),
        (
            "shape",
            "the metric failed for the data-set indices 6 to 6: ValueError: a metric function returned shape (1,)",
        ),
        (
            "triple",
            "a metric function returned (tensor(1.), 2, 1): return a sum, an Average, or a pair of a sum and its",
        ),
        ("change", "the metric failed for the data-set indices 4 to 5: ValueError: a metric function returned Average"),
        ("neither", "TypeError: Average(mean=None, sum=None, weight=2): give a mean or a sum, and one of them only"),
        ("list", "the metric failed for the data-set indices 0 to 1: TypeError: a metric function returned [tensor"),
        ("object", "TypeError: predict(metric=…) got a object: give a torchmetrics object"),
        ("class", "TypeError: predict(metric=MeanSquaredError) got a class: give an instance, as in metric=MeanSq"),
        ("step", "ValueError: MulticlassAccuracy has dist_sync_on_step=True"),
        ("targets", "TypeError: the batch is a Tensor without a second entry to compare outputs with"),
    ],
)
def test_what_goes_wrong_in_a_metric_is_named(how: str, message: str) -> None:
    (alone,) = outcomes(_fails, 1, how)
    assert message in alone.error
    together = outcomes(_fails, 2, how)
    assert all(outcome.error and outcome.seconds < 10 for outcome in together)


def test_an_average_over_processes_is_refused() -> None:
    (refused, other) = outcomes(_averages, 2)
    assert "ValueError: Averaged averages its state 'level' over processes" in refused.error
    assert "RankFailure: rank 0 failed in collecting the outputs of predict: ValueError: Averaged" in other.error


class Averaged(torchmetrics.Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("level", torch.zeros(()), dist_reduce_fx="mean")

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.level = output.mean()

    def compute(self) -> torch.Tensor:
        return self.level


def _averages() -> None:
    dp.predict(nn.Identity(), _regressions(5), 2, metric=Averaged())


def _on_meta(model: Any) -> Any:
    """The meta device, which only has shapes, shows on which device a state is."""
    seen = []

    def metric(output: torch.Tensor, batch: list[torch.Tensor]) -> int:
        seen.append({output.device.type, *(part.device.type for part in batch)})
        return len(output)

    assert dp.predict(model, _data(5), 2, metric=metric) == 5
    return seen


def test_a_metric_gets_the_batch_on_the_models_device() -> None:
    assert _on_meta(nn.Linear(4, 2, device="meta")) == [{"meta"}] * 3


def test_a_function_gets_the_batch_on_the_device_of_its_modules() -> None:
    net, other, here = nn.Linear(4, 2, device="meta"), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)
    assert _on_meta(lambda batch: net(batch[0])) == [{"meta"}] * 3
    assert _on_meta(lambda batch: other(net(batch[0]))) == [{"meta"}] * 3
    assert _on_meta(lambda batch: here(batch[0][:, :2]) if here else net) == [{"cpu"}] * 3  # of two devices
    assert _on_meta(lambda batch: batch[0]) == [{"cpu"}] * 3

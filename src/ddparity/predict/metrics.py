"""Metrics of a prediction without moving outputs: each rank keeps sums or a torchmetrics object, joined at the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import DDParityError
from ..gather import gather
from ..meeting import agreed
from ..wire import Receiver

Parts = dict[str, Any]


class Metric:
    """A sink that keeps a metric of the outputs.

    Args:
        metric: a torchmetrics Metric or MetricCollection, which is copied and reset; or a function of a batch's output
            and the batch, see `predict`.
        targets: what follows the output in a torchmetrics object's `update`, from a batch; None: the second entry of a
            list or tuple.
    """

    def __init__(self, metric: Any, targets: Callable[[Any], Any] | None, to: Receiver, receives: bool) -> None:
        is_module = isinstance(metric, nn.Module) and hasattr(metric, "update") and hasattr(metric, "compute")
        if not is_module and not callable(metric):
            raise TypeError(
                f"predict(metric=…) got a {type(metric).__name__}: give a torchmetrics object, or a function of a "
                f"batch's output and the batch that returns sums"
            )
        if not is_module and targets is not None:
            raise TypeError("predict(targets=…) is for a torchmetrics object: a metric function is given the batch")
        self._kept = _Torchmetrics(metric, targets) if is_module else _Sums(metric)
        self._to, self._receives = to, receives

    def take(self, samples: range, where: str, output: Any, batch: Any) -> None:
        try:
            self._kept.add(output, batch)
        except Exception as error:
            message = f"the metric failed for the {where}: {type(error).__name__}: {error}"
            raise DDParityError(message) from error

    def finish(self) -> Any:
        states = gather([self._kept.state()], self._to)
        with agreed("the metric"):
            return self._kept.joined(states) if self._receives else None


class DoubleSum:
    """A sum of numbers or arrays of one shape: integers exactly, floats in twice the precision of float64.

    So the order of adding, and with it the number of processes, does not show after rounding.
    Source: Knuth, "The Art of Computer Programming", volume 2, 4.2.2, theorem B.
    """

    def __init__(self) -> None:
        self.whole: NDArray[np.int64] | None = None
        self.high: NDArray[np.float64] | None = None
        self.low: NDArray[np.float64] | None = None

    def add(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.double().numpy() if value.is_floating_point() else value.numpy()
        array = np.asarray(value)
        if array.dtype.kind in "biu":
            self._add_whole(array.astype(np.int64))
        elif array.dtype.kind == "f":
            self._add_float(array.astype(np.float64))
        else:
            raise TypeError(f"a metric function returned {value!r}, a {type(value).__name__}: return numbers or arrays")

    def merge(self, state: Parts) -> None:
        if state["whole"] is not None:
            self._add_whole(state["whole"])
        if state["high"] is not None:
            self._add_float(state["high"])
            self._add_float(state["low"])

    def state(self) -> Parts:
        return {"whole": self.whole, "high": self.high, "low": self.low}

    def value(self) -> Any:
        """A number, or a tensor."""
        total: Any = 0 if self.whole is None else self.whole
        if self.high is not None and self.low is not None:
            with np.errstate(invalid="ignore"):
                total = total + np.where(np.isfinite(self.high), self.high + self.low, self.high)
        return total.item() if np.ndim(total) == 0 and hasattr(total, "item") else torch.as_tensor(total)

    def _add_whole(self, array: NDArray[np.int64]) -> None:
        self.whole = array if self.whole is None else _same_shape(self.whole, array) + array

    def _add_float(self, array: NDArray[np.float64]) -> None:
        if self.high is None or self.low is None:
            self.high, self.low = array, np.zeros_like(array)
            return
        with np.errstate(invalid="ignore"):
            high = _same_shape(self.high, array) + array
            shifted = high - self.high
            self.low = self.low + ((self.high - (high - shifted)) + (array - shifted))
        self.high = high


def _same_shape(before: NDArray[Any], array: NDArray[Any]) -> NDArray[Any]:
    if before.shape != array.shape:
        raise ValueError(f"a metric function returned shape {array.shape} where it returned {before.shape} before")
    return before


class _Sums:
    """Sums, and weighted means, of what a function returns for a batch."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self._function = function
        self._totals: dict[str, list[DoubleSum]] = {}
        self._bare = False

    def add(self, output: Any, batch: Any) -> None:
        value = self._function(output, batch)
        self._bare = not isinstance(value, Mapping)
        for name, one in ({"": value} if self._bare else value).items():
            parts = one if isinstance(one, tuple) else (one,)
            totals = self._totals.setdefault(str(name), [DoubleSum() for _ in parts])
            if len(parts) > 2 or len(parts) != len(totals):
                raise ValueError(
                    f"a metric function returned {one!r}: return a sum, or a pair of a sum and its weight, each time "
                    f"the same kind"
                )
            for total, part in zip(totals, parts, strict=True):
                total.add(part)

    def state(self) -> Parts:
        return {"bare": self._bare, "totals": {name: [t.state() for t in ts] for name, ts in self._totals.items()}}

    def joined(self, states: list[Parts]) -> Any:
        joined: dict[str, list[DoubleSum]] = {}
        for state in states:
            for name, parts in state["totals"].items():
                totals = joined.setdefault(name, [DoubleSum() for _ in parts])
                for total, part in zip(totals, parts, strict=True):
                    total.merge(part)
        values = {name: _mean(*(total.value() for total in totals)) for name, totals in joined.items()}
        return values[""] if any(state["bare"] for state in states) else values


def _mean(total: Any, weight: Any = None) -> Any:
    if weight is None:
        return total
    return total / weight if isinstance(weight, torch.Tensor) or weight else math.nan


class _Torchmetrics:
    """A copy of a torchmetrics object, whose states are joined as its own `sync` would, but by ranks that have some.

    The names of the states, and how each is joined, are in attributes that torchmetrics keeps private.
    """

    def __init__(self, metric: Any, targets: Callable[[Any], Any] | None) -> None:
        self._metric = copy.deepcopy(metric)
        self._metric.reset()
        if hasattr(self._metric, "_enable_compute_groups"):  # a collection, whose members would share states
            self._metric._enable_compute_groups = self._metric._groups_checked = False
        self._targets = targets
        for member in self._members():
            if getattr(member, "dist_sync_on_step", False):
                raise ValueError(
                    f"{type(member).__name__} has dist_sync_on_step=True, a collective for each batch, of which ranks "
                    f"have different numbers: leave it out"
                )
            member.sync_on_compute = member._to_sync = False

    def add(self, output: Any, batch: Any) -> None:
        if self._targets is not None:
            self._metric.update(output, self._targets(batch))
        elif isinstance(batch, (list, tuple)) and len(batch) > 1:
            self._metric.update(output, batch[1])
        else:
            raise TypeError(
                f"the batch is a {type(batch).__name__} without a second entry to compare outputs with: say which part "
                f"of a batch the targets are, as in targets=lambda batch: batch['labels']"
            )

    def state(self) -> list[Parts]:
        return [
            {"updates": member._update_count, "states": {name: getattr(member, name) for name in member._reductions}}
            for member in self._members()
        ]

    def joined(self, states: list[list[Parts]]) -> Any:
        for number, member in enumerate(self._members()):
            ranks = [state[number] for state in states if state[number]["updates"]]
            for name, reduction in member._reductions.items() if ranks else ():
                setattr(member, name, _joined_state(member, name, [rank["states"][name] for rank in ranks], reduction))
            member._update_count = sum(rank["updates"] for rank in ranks)
            member._computed = None
        return self._metric.compute()

    def _members(self) -> list[Any]:
        return [module for module in self._metric.modules() if hasattr(module, "_reductions")]


def _joined_state(member: Any, name: str, values: list[Any], reduction: Any) -> Any:
    if len(values) == 1:
        return values[0]
    if getattr(reduction, "__name__", "") == "dim_zero_mean":
        raise ValueError(
            f"{type(member).__name__} averages its state {name!r} over processes, which is not the value of one "
            f"process where shares differ: collect the outputs and compute it on them"
        )
    if isinstance(values[0], list):
        items = [item for value in values for item in value]
        return reduction(items) if reduction is not None and items else items
    stacked = torch.stack(values)
    return stacked if reduction is None else reduction(stacked)

"""Metrics of a prediction. No output moves: each rank keeps sums or a torchmetrics object, joined at the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..comm.gather import gather
from ..comm.transfer import Receiver
from ..errors import DDParityError
from .collect import check_each_once, merged

Parts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Average:
    """Return this from a metric function of `predict` for a weighted mean over all batches.

    Give what a batch adds to the mean in one of two ways: its own mean, or its sum. A batch of weight 0 adds nothing.

    Args:
        mean: of the batch, a number or an array.
        sum: of the batch, in place of its mean.
        weight: what the batch's mean is over, as its samples or its unmasked tokens.

    Raises:
        TypeError: there is neither a mean nor a sum, or there are both.

    Example:
        >>> from ddparity import predict
        >>> def loss(output, batch):
        ...     return Average(mean=output.mean(), weight=len(output))
        >>> predict(torch.nn.Identity(), torch.arange(5.0), 2, metric=loss)
        2.0
    """

    mean: Any = None
    sum: Any = None
    weight: Any

    def __post_init__(self) -> None:
        if (self.mean is None) == (self.sum is None):
            raise TypeError(f"{self}: give a mean or a sum, and one of them only")

    def parts(self) -> tuple[Any, Any]:
        """Return the batch's sum and its weight."""
        if self.sum is not None:
            return self.sum, self.weight
        mean, weight = _as_float64(self.mean), _as_float64(self.weight)
        with np.errstate(invalid="ignore"):
            return np.where(weight == 0, 0.0, mean * weight), self.weight


def _as_float64(value: Any) -> NDArray[np.float64]:
    return np.asarray(value.detach().cpu().double() if isinstance(value, torch.Tensor) else value, np.float64)


def is_metric(value: Any) -> bool:
    """Return whether this is a torchmetrics object, or a module like one."""
    return isinstance(value, nn.Module) and hasattr(value, "update") and hasattr(value, "compute")


class Metric:
    """A sink that keeps a metric of the outputs.

    Args:
        metric: a torchmetrics Metric or MetricCollection, which is copied and reset; or a function of a batch's output
            and the batch, see `predict`.
        targets: what follows the output in a torchmetrics object's `update`, from a batch; None: the second entry of a
            list or tuple.
        length: number of samples; None: not known.
        device: of the states of a torchmetrics object.
    """

    def __init__(
        self,
        metric: Any,
        targets: Callable[[Any], Any] | None,
        to: Receiver,
        receives: bool,
        length: int | None,
        device: torch.device | None,
    ) -> None:
        is_module = is_metric(metric)
        if not is_module and not callable(metric):
            raise TypeError(
                f"predict(metric=…) got a {type(metric).__name__}: give a torchmetrics object, or a function of a "
                f"batch's output and the batch that returns sums or averages"
            )
        if not is_module and targets is not None:
            raise TypeError("predict(targets=…) is for a torchmetrics object: a metric function is given the batch")
        self._kept = _Torchmetrics(metric, targets, device) if is_module else _Sums(metric)
        self._to, self._receives, self._length = to, receives, length
        self._ran: list[range] = []

    def take(self, samples: range, where: str, output: Any, batch: Any) -> None:
        try:
            self._kept.add(output, batch)
        except Exception as error:
            message = f"the metric failed for the {where}: {type(error).__name__}: {error}"
            raise DDParityError(message) from error
        self._ran.append(samples)

    def finish(self) -> Any:
        ran = [[part.start, part.stop] for part in merged(self._ran)]
        states = gather([[ran, self._kept.state()]], self._to)
        if not self._receives:
            return None
        if self._length is not None:
            check_each_once([range(*part) for theirs, _ in states for part in theirs], self._length)
        return self._kept.joined([state for _, state in states])


class ExactSum:
    """A sum of numbers, or of arrays of one shape, that is rounded once, at the end.

    So it does not depend on the order of the terms or on the number of processes. Integers are Python's. Floats
    become fractions, whose denominators are powers of two. Infinities and NaN are added separately.
    """

    def __init__(self) -> None:
        self._exact: NDArray[Any] | None = None  # of int and Fraction
        self._special: NDArray[Any] = np.zeros((), np.float64)
        self._is_float = False

    def add(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.double().numpy() if value.is_floating_point() else value.numpy()
        if not isinstance(value, (np.ndarray, np.generic, int, float)):
            raise TypeError(f"a metric function returned {value!r}, a {type(value).__name__}: return numbers or arrays")
        array = np.asarray(value)
        if array.dtype.kind in "biu":
            self._add(array.astype(int).astype(object) if array.dtype.kind == "b" else array.astype(object), 0.0)
        elif array.dtype.kind == "f":
            self._is_float = True
            finite = np.isfinite(array)
            self._add(_fractions(np.where(finite, array, 0.0)), np.where(finite, 0.0, array))
        elif array.dtype == object and isinstance(value, int):  # beyond 64 bits
            self._add(array, 0.0)
        else:
            raise TypeError(f"a metric function returned an array of {array.dtype}: return integers or floats")

    def merge(self, state: Parts) -> None:
        """Add another sum, given its `state`."""
        if state["exact"] is not None:
            exact = np.array([Fraction(text) for text in state["exact"]], object).reshape(state["shape"])
            self._is_float |= state["is_float"]
            self._add(exact, state["special"].reshape(state["shape"]))

    def state(self) -> Parts:
        """Return the sum as values that `gather` takes."""
        exact = None if self._exact is None else [str(value) for value in self._exact.ravel()]
        special = self._special.reshape(-1)
        return {"exact": exact, "shape": list(self._special.shape), "special": special, "is_float": self._is_float}

    def value(self) -> Any:
        """Return the sum: a number, or a tensor."""
        assert self._exact is not None, "a sum without values"
        if not self._is_float:
            return int(self._exact.item()) if self._exact.ndim == 0 else torch.from_numpy(self._exact.astype(np.int64))
        total = np.asarray(_rounded(self._exact), np.float64) + self._special
        return total.item() if total.ndim == 0 else torch.from_numpy(total)

    def _add(self, exact: Any, special: Any) -> None:
        exact = np.asarray(exact, object)
        if self._exact is None:
            self._exact, self._special = np.zeros(exact.shape, object), np.zeros(exact.shape)
        elif self._exact.shape != exact.shape:
            raise ValueError(
                f"a metric function returned shape {exact.shape} where it returned {self._exact.shape} before"
            )
        self._exact = np.asarray(self._exact + exact, object)
        if np.any(special):
            with np.errstate(invalid="ignore"):  # inf - inf
                self._special = np.asarray(self._special + special)


def _fraction(value: float) -> Fraction:
    return Fraction(float(value))


def _float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


_fractions = np.frompyfunc(_fraction, 1, 1)
_rounded = np.frompyfunc(_float, 1, 1)


class _Sums:
    """Sums, and weighted means, of what a function returns for a batch."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self._function = function
        self._totals: dict[Any, list[ExactSum]] = {}

    def add(self, output: Any, batch: Any) -> None:
        value = self._function(output, batch)
        for name, one in (value if isinstance(value, Mapping) else {None: value}).items():
            parts = one.parts() if isinstance(one, Average) else one if isinstance(one, tuple) else (one,)
            totals = self._totals.setdefault(name, [ExactSum() for _ in parts])
            if len(parts) > 2 or len(parts) != len(totals):
                raise ValueError(
                    f"a metric function returned {one!r}: return a sum, an Average, or a pair of a sum and its weight, "
                    f"and the same kind each time"
                )
            for total, part in zip(totals, parts, strict=True):
                total.add(part)

    def state(self) -> list[Any]:
        return [[name, [total.state() for total in totals]] for name, totals in self._totals.items()]

    def joined(self, states: list[list[Any]]) -> Any:
        """Return a dict of values, or the value that has no name; an empty dict if no rank had a batch."""
        joined: dict[Any, list[ExactSum]] = {}
        for state in states:
            for name, parts in state:
                totals = joined.setdefault(name, [ExactSum() for _ in parts])
                for total, part in zip(totals, parts, strict=True):
                    total.merge(part)
        values = {name: _mean(*(total.value() for total in totals)) for name, totals in joined.items()}
        return values.get(None, values)


def _mean(total: Any, weight: Any = None) -> Any:
    if weight is None:
        return total
    return total / weight if isinstance(weight, torch.Tensor) or weight else math.nan


class _Torchmetrics:
    """A copy of a torchmetrics object. It joins states as `sync` does, but only of ranks that had a batch.

    The names of the states, and how each is joined, are in private attributes of torchmetrics.
    """

    def __init__(self, metric: Any, targets: Callable[[Any], Any] | None, device: torch.device | None) -> None:
        self._metric = copy.deepcopy(metric)
        self._metric.reset()
        if device is not None:
            self._metric.to(device)
        if hasattr(self._metric, "_enable_compute_groups"):  # a collection, in which metrics would share states
            self._metric._enable_compute_groups = self._metric._groups_checked = False
        self._targets = targets
        for member in self._members():
            if getattr(member, "dist_sync_on_step", False):
                raise ValueError(
                    f"{type(member).__name__} has dist_sync_on_step=True, which runs a collective for each batch, but "
                    f"ranks have different numbers of batches: leave it out"
                )
            member.sync_on_compute = member._to_sync = False

    def add(self, output: Any, batch: Any) -> None:
        if self._targets is not None:
            self._metric.update(output, self._targets(batch))
        elif isinstance(batch, (list, tuple)) and len(batch) > 1:
            self._metric.update(output, batch[1])
        else:
            raise TypeError(
                f"the batch is a {type(batch).__name__} without a second entry to compare outputs with: give a "
                f"function that returns the targets of a batch, as in targets=lambda batch: batch['labels']"
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
            f"process if shares differ: collect the outputs and compute it on them"
        )
    if isinstance(values[0], list):
        items = [item for value in values for item in value]
        return reduction(items) if reduction is not None and items else items
    stacked = torch.stack(values)
    return stacked if reduction is None else reduction(stacked)

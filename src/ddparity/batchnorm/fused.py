"""The layer's passes over memory, compiled at installation (`_fused.c`); the same functions as in `stock`.

Each reads and writes no more than the mathematics asks for: moments in one read, normalising in one, both sums of the
backward in one, its result in one (benchmarks/sync_batchnorm.py). For float32 and float64 on the CPU, in torch's number
of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat import is_plain_tensor
from . import stock
from .layout import sizes

try:
    from . import _fused
except ImportError:  # built without a compiler
    _fused = None  # type: ignore[assignment]  # it is a module otherwise


def available() -> bool:
    """Whether the passes were compiled when this package was installed."""
    return _fused is not None


def handles(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the passes can work on this input, which is dense, with these other tensors."""
    if _fused is None or x.dtype not in _WIDE or x.device.type != "cpu":
        return False
    return all(value is None or is_plain_tensor(value) for value in (x, *others))


_WIDE = {torch.float32: 0, torch.float64: 1}
_DOUBLE = 8  # bytes


def moments(x: Tensor) -> tuple[Tensor, Any]:
    n, c, m = sizes(x)
    payload = torch.empty(2 * c + 1, dtype=torch.float64)
    payload[-1] = n * m
    at = payload.data_ptr()
    _fused.moments(_WIDE[x.dtype], x.data_ptr(), n, c, m, at, at + c * _DOUBLE, torch.get_num_threads())
    return payload, None


def join(gathered: Tensor, eps: float) -> Tensor:
    ranks, width = gathered.shape
    channels = width // 2
    stats = torch.empty(3 * channels + 1, dtype=torch.float64)
    _fused.join(gathered.data_ptr(), ranks, channels, stats.data_ptr(), eps)
    return stats


def normalise(x: Tensor, kept: Any, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    n, c, m = sizes(x)
    y = torch.empty_like(x)
    weight, bias = _double(weight), _double(bias)
    at = stats.data_ptr()
    _fused.normalise(
        _WIDE[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        n,
        c,
        m,
        at,
        at + c * _DOUBLE,
        _address(weight),
        _address(bias),
        torch.get_num_threads(),
    )
    return y


def update(running_mean: Tensor, running_var: Tensor, stats: Tensor, momentum: float | Tensor) -> None:
    both, channels = (running_mean, running_var), running_mean.numel()
    if any(running.dtype not in _WIDE or not running.is_contiguous() for running in both):
        stock.update(running_mean, running_var, stats, momentum)
        return
    part = float(momentum) * min(1.0, float(stats[-1]))  # an empty batch moves none
    for running, offset in zip(both, (0, 2 * channels), strict=True):
        target = stats.data_ptr() + offset * _DOUBLE
        _fused.move(_WIDE[running.dtype], running.data_ptr(), target, channels, part)
    torch.autograd.graph.increment_version(both)


def backward_sums(dy: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    n, c, m = sizes(x)
    sums = torch.empty(2 * c, dtype=torch.float64)
    at = sums.data_ptr()
    threads = torch.get_num_threads()
    _fused.backward_sums(
        _WIDE[x.dtype], dy.data_ptr(), x.data_ptr(), n, c, m, stats.data_ptr(), at, at + c * _DOUBLE, threads
    )
    return sums


def backward_input(dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, sums: Tensor) -> Tensor:
    n, c, m = sizes(x)
    dx = torch.empty_like(x)
    weight = _double(weight)
    at, of_sums = stats.data_ptr(), sums.data_ptr()
    _fused.backward_input(
        _WIDE[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        n,
        c,
        m,
        at,
        at + c * _DOUBLE,
        _address(weight),
        of_sums,
        of_sums + c * _DOUBLE,
        at + 3 * c * _DOUBLE,
        torch.get_num_threads(),
    )
    return dx


def _double(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(torch.float64).contiguous()


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()

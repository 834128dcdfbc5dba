"""The kernels for the CPU in C (`_fused.c`), compiled at installation; the same functions as in `reference`.

Each kernel reads its input once: the moments, the normalisation, the two sums of the backward, and the gradient of the
input (measured in benchmarks/sync_batchnorm.py). They handle float32 and float64, and use torch's number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat import is_plain_tensor
from . import reference
from .layout import sizes

try:
    from . import _fused
except ImportError:  # the package was built without a compiler
    _fused = None  # type: ignore[assignment]  # mypy knows it as a module

_IS_DOUBLE = {torch.float32: 0, torch.float64: 1}  # the dtypes that the kernels handle


def available() -> bool:
    """Return True if the kernels were compiled at the installation of this package."""
    return _fused is not None


def handles(x: Tensor, *others: Tensor | None) -> bool:
    """Return True if the kernels can handle this dense input with these other tensors."""
    if _fused is None or x.dtype not in _IS_DOUBLE or not x.is_cpu or not is_plain_tensor(x):
        return False
    return all(value is None or is_plain_tensor(value) for value in others)


def moments(x: Tensor) -> tuple[Tensor, Any]:
    n, c, m = sizes(x)
    payload = torch.empty(2 * c + 1, dtype=torch.float64)
    _fused.moments(_IS_DOUBLE[x.dtype], x.data_ptr(), n, c, m, payload.data_ptr(), torch.get_num_threads())
    return payload, None


def join(gathered: Tensor, eps: float) -> Tensor:
    ranks, width = gathered.shape
    channels = width // 2
    stats = torch.empty(3 * channels + 1, dtype=torch.float64)
    _fused.join(gathered.data_ptr(), ranks, channels, stats.data_ptr(), eps)
    return stats


def normalise(x: Tensor, intermediate: Any, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    n, c, m = sizes(x)
    y = torch.empty_like(x)
    weight, bias = _readable(weight), _readable(bias)
    _fused.normalise(
        _IS_DOUBLE[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        n,
        c,
        m,
        stats.data_ptr(),
        *_address(weight),
        *_address(bias),
        torch.get_num_threads(),
    )
    return y


def update(running_mean: Tensor, running_var: Tensor, stats: Tensor, momentum: float | Tensor) -> None:
    if _readable(running_mean) is not running_mean or _readable(running_var) is not running_var:
        reference.update(running_mean, running_var, stats, momentum)
        return
    channels = running_mean.numel()
    _fused.update(*_address(running_mean), *_address(running_var), channels, stats.data_ptr(), float(momentum))
    torch.autograd.graph.increment_version((running_mean, running_var))


def backward_sums(dy: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    n, c, m = sizes(x)
    sums = torch.empty(2 * c, dtype=torch.float64)
    _fused.backward_sums(
        _IS_DOUBLE[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        n,
        c,
        m,
        stats.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums


def parameter_gradients(
    sums: Tensor, stats: Tensor, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    if weight_dtype not in _IS_DOUBLE or bias_dtype not in _IS_DOUBLE:
        return reference.parameter_gradients(sums, stats, weight_dtype, bias_dtype)
    channels = sums.numel() // 2
    d_weight, d_bias = torch.empty(channels, dtype=weight_dtype), torch.empty(channels, dtype=bias_dtype)
    _fused.parameter_gradients(channels, stats.data_ptr(), sums.data_ptr(), *_address(d_weight), *_address(d_bias))
    return d_weight, d_bias


def backward_input(dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, parts: Tensor) -> Tensor:
    n, c, m = sizes(x)
    dx = torch.empty_like(x)
    weight = _readable(weight)
    _fused.backward_input(
        _IS_DOUBLE[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        n,
        c,
        m,
        stats.data_ptr(),
        *_address(weight),
        parts.data_ptr(),
        parts.size(0),
        torch.get_num_threads(),
    )
    return dx


def _readable(values: Tensor | None) -> Tensor | None:
    """Return the values if the kernels can read them, otherwise a float64 copy."""
    if values is None or (values.dtype in _IS_DOUBLE and values.is_contiguous()):
        return values
    return values.to(torch.float64).contiguous()


def _address(values: Tensor | None) -> tuple[int, int]:
    """Return (1 for float64 and 0 for float32, the address of the values); (0, 0) for None."""
    return (0, 0) if values is None else (_IS_DOUBLE[values.dtype], values.data_ptr())

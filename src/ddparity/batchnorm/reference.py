"""The reference kernels: the layer's work in torch's own operators, for every device and dtype, without a compiler.

`cpu_kernels` and `triton_kernels` have the same seven functions. Statistics are float64:

    payload  [mean (C), sum of squared deviations (C), count]                  what a rank sends
    stats    [mean (C), 1/sqrt(biased variance + eps) (C), unbiased variance (C), total count]    of all ranks
    sums     [sum of dy (C), sum of dy * (x - mean) (C)]                       what the backward sums over the ranks
    parts    (P, 2C)                                                           rows whose sum is `sums` of all ranks

Sums in float32 lose precision for two reasons. First, the mean may be much larger than the deviation: so each sum is
computed around a shift near the mean. Second, the mean itself is rounded: so a mean is used in two parts, high and low.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import statistics_dtype
from .layout import has_planes, over, reduced_dims

CACHED = 2**18  # elements that stay in a CPU's cache from one operator to the next


def moments(x: Tensor) -> tuple[Tensor, Any]:
    """Return the payload of this rank's input, and (shifted input, shift), which `normalise` uses again."""
    channels = x.size(1)
    count = x.numel() // channels
    payload = x.new_zeros(2 * channels + 1, dtype=statistics_dtype(x.device))
    if count == 0:
        return payload, None
    # Sum around the mean of the first samples, so that neither the sums nor the squares cancel.
    plane = count // x.size(0)
    values = x if x.dtype in (torch.float32, torch.float64) else x.float()
    shift = values[: 1 + 15 // plane].mean(reduced_dims(x))
    mean, m2 = payload[:channels], payload[channels:-1]

    def shift_and_sum(part: Tensor) -> Tensor:
        shifted = part - over(shift, x)
        if has_planes(x):  # torch reduces one dimension much faster than several
            runs = shifted.flatten(2)
            mean.add_(runs.sum(-1).to(payload.dtype).sum(0))
            m2.add_(torch.linalg.vector_norm(runs, dim=-1).to(payload.dtype).square_().sum(0))
        else:
            rows = _rows(shifted)
            mean.add_(rows.sum(0))
            m2.add_((rows * rows).sum(0))
        return shifted

    shifted = _in_parts(shift_and_sum, values)
    mean /= count
    m2.addcmul_(mean, mean, value=-count).clamp_(min=0)
    mean += shift
    payload[-1] = count
    return payload, (shifted, shift)


def join(gathered: Tensor, eps: float) -> Tensor:
    """Return the stats of all ranks from their payloads (W, 2C + 1), weighted by counts.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    channels = gathered.size(1) // 2
    means, m2s, counts = gathered.split([channels, channels, 1], 1)
    total = counts.sum()
    mean = (means * (counts / total.clamp(min=1))).sum(0)
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    invstd = (m2 / total.clamp(min=1) + eps).rsqrt()
    return torch.cat([mean, invstd, m2 / (total - 1).clamp(min=1), total.view(1)])


def normalise(x: Tensor, intermediate: Any, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return (x - mean) * invstd * weight + bias, in the dtype and the layout of x.

    `intermediate`: the second result of `moments`.
    """
    if intermediate is None:  # x is empty
        return torch.empty_like(x)
    shifted, shift = intermediate
    mean, invstd = stats[: x.size(1)], stats[x.size(1) : 2 * x.size(1)]
    kind = shifted.dtype
    planes = has_planes(x)  # torch's kernel copies an input that is neither planes nor 2-D rows
    y = torch.batch_norm(
        shifted if planes else _rows(shifted),
        None if weight is None else weight.to(kind),
        None if bias is None else bias.to(kind),
        (mean - shift).to(kind),
        invstd.pow(-2).to(kind),
        False,
        0.0,
        0.0,
        False,
    )
    if not planes:
        y = y.view(shifted.movedim(1, -1).shape).movedim(-1, 1)
    return y.to(x.dtype)


def update(running_mean: Tensor, running_var: Tensor, stats: Tensor, momentum: float | Tensor) -> None:
    """Update the running statistics, in place, by those of the batch. An empty batch changes nothing.

    The running variance uses the unbiased variance.
    """
    channels = running_mean.numel()
    factor = stats[-1].clamp(max=1) * momentum
    for running, new in ((running_mean, stats[:channels]), (running_var, stats[2 * channels : 3 * channels])):
        running.copy_(torch.lerp(running.to(stats.dtype), new, factor.to(stats.dtype)))


def backward_sums(dy: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    """Return the sums of this rank's dy and dy * (x - mean) for each channel."""
    channels = x.size(1)
    if x.numel() == 0:
        return stats.new_zeros(2 * channels)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, invstd = stats[:channels], stats[channels : 2 * channels]
    high = mean.to(kind)
    scale = invstd.to(kind)
    if x.is_cuda:  # on CUDA, native_batch_norm_backward needs a weight and running statistics
        sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
            dy.to(kind), x.to(kind), high, scale, None, True, False, False
        )
    else:
        _, scaled, sum_dy = torch.ops.aten.native_batch_norm_backward(
            dy.to(kind), x.to(kind), None, None, None, high, scale, True, 0.0, [False, True, True]
        )
        sum_dy_xmu = scaled / scale
    sums = torch.cat([sum_dy, sum_dy_xmu]).to(stats.dtype)
    sums[channels:].addcmul_(sums[:channels], mean - high, value=-1)
    return sums


def parameter_gradients(
    sums: Tensor, stats: Tensor, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias from this rank's samples; None where the dtype is None."""
    channels = sums.numel() // 2
    d_weight = None if weight_dtype is None else (sums[channels:] * stats[channels : 2 * channels]).to(weight_dtype)
    return d_weight, None if bias_dtype is None else sums[:channels].to(bias_dtype, copy=True)


def backward_input(dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, parts: Tensor) -> Tensor:
    """Return (dy - sum_dy / n - (x - mean) * invstd² * sum_dy_xmu / n) * invstd * weight."""
    sums = parts.sum(0)
    channels = x.size(1)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, invstd, total = stats[:channels], stats[channels : 2 * channels], stats[-1].clamp(min=1)
    scale = invstd if weight is None else invstd * weight
    slope = -scale * invstd.square() * sums[channels:] / total
    high = mean.to(kind)
    shift = -scale * sums[:channels] / total - slope * (mean - high)
    high, slope, scale, shift = (over(values.to(kind), x) for values in (mean, slope, scale, shift))

    def gradient(x: Tensor, dy: Tensor) -> Tensor:
        return (x.to(kind) - high).mul_(slope).addcmul_(dy.to(kind), scale).add_(shift).to(x.dtype)

    return _in_parts(gradient, x, dy)


def _in_parts(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """Return `function(x, *others)`, which handles each sample separately.

    A large input on the CPU is handled in parts that fit the cache.
    """
    samples = CACHED * len(x) // max(1, x.numel())
    if not x.is_cpu or x.numel() <= 4 * CACHED or samples == 0:
        return function(x, *others)
    out = torch.empty_like(x)
    for *parts, result in zip(*(tensor.split(samples) for tensor in (x, *others, out)), strict=True):
        result.copy_(function(*parts))
    return out


def _rows(x: Tensor) -> Tensor:
    """Return x as (rows, C)."""
    return x.movedim(1, -1).reshape(-1, x.size(1))

"""The kernels for CUDA, in Triton; the same functions as in `reference`.

Import this module only if Triton is installed; CUDA builds of torch install it. Triton compiles a kernel at its first
use. The compiled kernel depends on whether the numbers of channels and positions are multiples of 16, and not on the
batch size.

All sums are computed in float64 around a shift, so a large mean does not reduce the precision. The order of a sum
depends on the shape alone. The elements of a channel are divided into parts, so that a few channels also use the whole
GPU.
"""

# No `from __future__ import annotations`: Triton needs the annotations as objects.

import ctypes
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compat import is_plain_tensor
from . import reference
from .layout import sizes

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_TILE = 2048  # elements that a program handles at once
_PROGRAMS = 512  # number of programs: several for each multiprocessor of the GPU
_CHANNELS = 64  # channels of a tile, if the input is rows
_BLOCK = 128  # channels that a program handles in kernels that read no input


@triton.jit
def _tile(block, part_n, part_m, n, c, m, per_n, per_m, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Return a program's channels, the first positions of its part in both directions, and the ends of that part."""
    part_n = part_n.to(tl.int64)
    part_m = part_m.to(tl.int64)
    if ROWS:
        channel = block * B + tl.arange(0, B)[None, :]
        inner = tl.zeros((1, B), tl.int32)
    else:
        channel = block + tl.zeros((1, B), tl.int32)
        inner = part_m * per_m + tl.arange(0, B)[None, :]
    outer = part_n * per_n + tl.arange(0, A)[:, None]
    return channel, outer, inner, tl.minimum(n, (part_n + 1) * per_n), tl.minimum(m, (part_m + 1) * per_m)


@triton.jit(do_not_specialize=["n", "per_n"])
def _sums(x, dy, mean, parts, n, c, m, per_n, per_m, BACKWARD: tl.constexpr, ROWS: tl.constexpr, A: tl.constexpr,
          B: tl.constexpr):  # fmt: skip
    """Compute the sums of one part: x - x[0] and its square; in the backward dy and dy * (x - mean)."""
    block, part_n, part_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel, outer, inner, n_end, m_end = _tile(block, part_n, part_m, n, c, m, per_n, per_m, ROWS, A, B)
    if BACKWARD:
        centre = tl.load(mean + channel, mask=channel < c, other=0.0)
    else:
        centre = tl.load(x + channel.to(tl.int64) * m, mask=channel < c, other=0.0).to(tl.float64)
    first = tl.zeros((A, B), tl.float64)
    second = tl.zeros((A, B), tl.float64)
    for step_n in range(0, per_n, A):
        for step_m in range(0, per_m, B):
            at_n, at_m = outer + step_n, inner + step_m
            inside = (at_n < n_end) & (at_m < m_end) & (channel < c)
            at = (at_n * c + channel) * m + at_m
            value = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(tl.float64) - centre, 0.0)
            if BACKWARD:
                gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float64)
                first += gradient
                second += gradient * value
            else:
                first += value
                second += value * value
    to = parts + (part_m * tl.num_programs(1) + part_n).to(tl.int64) * 2 * c
    if ROWS:
        at_c = block * B + tl.arange(0, B)
        tl.store(to + at_c, tl.sum(first, 0), mask=at_c < c)
        tl.store(to + c + at_c, tl.sum(second, 0), mask=at_c < c)
    else:
        tl.store(to + block, tl.sum(first))
        tl.store(to + c + block, tl.sum(second))


@triton.jit(do_not_specialize=["count", "total"])
def _finish(parts, count, x, out, c, m, total, BACKWARD: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Sum the parts; in the forward, compute the payload from the sums."""
    channel = tl.program_id(0) * B + tl.arange(0, B)
    inside = channel < c
    first = tl.zeros((A, B), tl.float64)
    second = tl.zeros((A, B), tl.float64)
    for start in range(0, count, A):
        part = start + tl.arange(0, A)[:, None]
        at = parts + part.to(tl.int64) * 2 * c + channel[None, :]
        known = (part < count) & inside[None, :]
        first += tl.load(at, mask=known, other=0.0)
        second += tl.load(at + c, mask=known, other=0.0)
    one = tl.sum(first, 0)
    two = tl.sum(second, 0)
    if not BACKWARD:
        total_count = tl.zeros((B,), tl.float64) + total
        mean = one / total_count
        two = tl.maximum(two - one * mean, 0.0)
        one = mean + tl.load(x + channel.to(tl.int64) * m, mask=inside, other=0.0).to(tl.float64)
        tl.store(out + 2 * c + channel, total_count, mask=channel == 0)
    tl.store(out + channel, one, mask=inside)
    tl.store(out + c + channel, two, mask=inside)


@triton.jit(do_not_specialize=["ranks"])
def _join(gathered, ranks, c, eps, eps_low, stats, BLOCK: tl.constexpr):
    """Compute the stats of all ranks from their payloads; eps is given in two parts."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < c
    width = 2 * c + 1
    total = tl.zeros((1,), tl.float64)
    for rank in range(ranks):
        total += tl.load(gathered + rank * width + 2 * c)
    mean = tl.zeros((BLOCK,), tl.float64)
    for rank in range(ranks):
        own = gathered + rank * width
        mean += tl.load(own + channel, mask=inside, other=0.0) * (tl.load(own + 2 * c) / tl.maximum(total, 1.0))
    m2 = tl.zeros((BLOCK,), tl.float64)
    for rank in range(ranks):
        own = gathered + rank * width
        delta = tl.load(own + channel, mask=inside, other=0.0) - mean
        m2 += tl.load(own + c + channel, mask=inside, other=0.0) + tl.load(own + 2 * c) * delta * delta
    tl.store(stats + channel, mean, mask=inside)
    variance = m2 / tl.maximum(total, 1.0)
    tl.store(stats + c + channel, 1.0 / tl.sqrt(variance + eps + eps_low), mask=inside)
    tl.store(stats + 2 * c + channel, m2 / tl.maximum(total - 1.0, 1.0), mask=inside)
    tl.store(stats + 3 * c + channel, total + tl.zeros((BLOCK,), tl.float64), mask=channel == 0)


@triton.jit(do_not_specialize=["n", "per_n"])
def _scale(x, dy, out, stats, weight, bias, sums, n, c, m, per_n, per_m, KIND: tl.constexpr, WEIGHT: tl.constexpr,
           BIAS: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, A: tl.constexpr,
           B: tl.constexpr):  # fmt: skip
    """Compute (x - mean) * slope + shift: x normalised. In the backward add dy * scale: the gradient of x."""
    block, part_n, part_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel, outer, inner, n_end, m_end = _tile(block, part_n, part_m, n, c, m, per_n, per_m, ROWS, A, B)
    known = channel < c
    mean = tl.load(stats + channel, mask=known, other=0.0)
    invstd = tl.load(stats + c + channel, mask=known, other=0.0)
    scale = invstd
    if WEIGHT:
        scale *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float64)
    if BACKWARD:
        total = tl.maximum(tl.load(stats + 3 * c), 1.0)
        slope = -scale * invstd * invstd * tl.load(sums + c + channel, mask=known, other=0.0) / total
        shift = -scale * tl.load(sums + channel, mask=known, other=0.0) / total
    else:
        slope = scale
        shift = tl.zeros_like(scale)
        if BIAS:
            shift += tl.load(bias + channel, mask=known, other=0.0).to(tl.float64)
    # The mean is used in two parts: x - high is exact if x is near the mean, and the shift contains the low part.
    high = mean.to(KIND)
    shift = (shift - slope * (mean - high.to(tl.float64))).to(KIND)
    slope, scale = slope.to(KIND), scale.to(KIND)
    for step_n in range(0, per_n, A):
        for step_m in range(0, per_m, B):
            at_n, at_m = outer + step_n, inner + step_m
            inside = (at_n < n_end) & (at_m < m_end) & known
            at = (at_n * c + channel) * m + at_m
            value = (tl.load(x + at, mask=inside, other=0.0).to(KIND) - high) * slope + shift
            if BACKWARD:
                value += tl.load(dy + at, mask=inside, other=0.0).to(KIND) * scale
            tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _update(mean, var, stats, momentum, momentum_low, c, BLOCK: tl.constexpr):
    """Update the running mean and variance; the momentum is given in two parts."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < c
    not_empty = tl.minimum(tl.load(stats + 3 * c), 1.0)  # 0 for an empty batch, which changes nothing
    factor = not_empty * momentum + not_empty * momentum_low
    for number in tl.static_range(2):
        running = mean if number == 0 else var
        old = tl.load(running + channel, mask=inside, other=0.0).to(tl.float64)
        new = tl.load(stats + 2 * number * c + channel, mask=inside, other=0.0)
        tl.store(running + channel, (old + factor * (new - old)).to(running.dtype.element_ty), mask=inside)


@functools.lru_cache(4096)
def _plan(n: int, c: int, m: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the grid of programs, and the kernels' arguments that divide an input among them."""
    rows = m == 1
    b = min(_CHANNELS if rows else 1024, triton.next_power_of_2(c if rows else m))
    a = _TILE // b
    blocks = triton.cdiv(c, b) if rows else c
    parts = triton.cdiv(_PROGRAMS, blocks)  # of each channel
    per_n = a * triton.cdiv(triton.cdiv(n, a), parts)
    by_n = triton.cdiv(n, per_n)
    per_m = b * triton.cdiv(triton.cdiv(m, b), max(1, parts // by_n))
    return (blocks, by_n, triton.cdiv(m, per_m)), {"per_n": per_n, "per_m": per_m, "ROWS": rows, "A": a, "B": b}


def handles(x: Tensor, *others: Tensor | None) -> bool:
    """Return True if the kernels can handle this dense input with these other tensors."""
    return all(value is None or (value.dtype in KINDS and is_plain_tensor(value)) for value in (x, *others))


def moments(x: Tensor) -> tuple[Tensor, Any]:
    if x.numel() == 0:
        return reference.moments(x)
    return _summed(x, x, None), None


def backward_sums(dy: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    return reference.backward_sums(dy, x, stats) if x.numel() == 0 else _summed(x, dy, stats)


def _summed(x: Tensor, dy: Tensor, stats: Tensor | None) -> Tensor:
    n, c, m = sizes(x)
    grid, how = _plan(n, c, m)
    count, backward = grid[1] * grid[2], stats is not None
    parts = x.new_empty(count, 2, c, dtype=torch.float64)
    out = x.new_empty(2 * c + (not backward), dtype=torch.float64)
    with torch.cuda.device_of(x):
        _sums[grid](x, dy, parts if stats is None else stats, parts, n, c, m, BACKWARD=backward, **how)
        _finish[(triton.cdiv(c, 16),)](parts, count, x, out, c, m, n * m, BACKWARD=backward, A=64, B=16)
    return out


def join(gathered: Tensor, eps: float) -> Tensor:
    ranks, width = gathered.shape
    c = width // 2
    stats = gathered.new_empty(3 * c + 1)
    with torch.cuda.device_of(gathered):
        _join[_blocks(c)](gathered, ranks, c, *_high_and_low(eps), stats, BLOCK=_BLOCK)
    return stats


def normalise(x: Tensor, intermediate: Any, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _scaled(x, None, stats, weight, bias, None)


parameter_gradients = reference.parameter_gradients  # two values for each channel need no kernel


def backward_input(dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, parts: Tensor) -> Tensor:
    return _scaled(x, dy, stats, weight, None, parts[0] if parts.size(0) == 1 else parts.sum(0))


def _scaled(
    x: Tensor, dy: Tensor | None, stats: Tensor, weight: Tensor | None, bias: Tensor | None, sums: Tensor | None
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    n, c, m = sizes(x)
    grid, how = _plan(n, c, m)
    kind = tl.float64 if x.dtype == torch.float64 else tl.float32
    given = [stats if value is None else value.contiguous() for value in (weight, bias, sums)]
    with torch.cuda.device_of(x):
        _scale[grid](
            x,
            x if dy is None else dy,
            out,
            stats,
            *given,
            n,
            c,
            m,
            KIND=kind,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            BACKWARD=dy is not None,
            **how,
        )
    return out


def update(running_mean: Tensor, running_var: Tensor, stats: Tensor, momentum: float | Tensor) -> None:
    both, c = (running_mean, running_var), running_mean.numel()
    if isinstance(momentum, Tensor) or not all(running.is_contiguous() for running in both):
        reference.update(running_mean, running_var, stats, momentum)
        return
    with torch.cuda.device_of(stats):
        _update[_blocks(c)](running_mean, running_var, stats, *_high_and_low(momentum), c, BLOCK=_BLOCK)
    torch.autograd.graph.increment_version(both)


def _high_and_low(value: float) -> tuple[float, float]:
    """Return two float32 numbers whose sum is the value. Triton converts a float argument to float32."""
    high = ctypes.c_float(value).value
    return high, value - high


def _blocks(c: int) -> tuple[int]:
    """Return the grid of programs for C channels."""
    return (triton.cdiv(c, _BLOCK),)

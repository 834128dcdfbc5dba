"""Compare compiled kernels with the reference kernels in float64.

Run as a program, with the name of a device, it compares the Triton kernels. On the CPU, set TRITON_INTERPRET=1 to run
them in Triton's interpreter.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ddparity.batchnorm import reference

SHAPES = [(4, 3, 5, 5), (6, 70, 4), (33, 5), (300, 2), (2, 9, 3, 3, 2), (1, 2, 1100), (5, 4, 1, 1), (0, 3, 4), (1, 1)]
LARGE = [(5, 2, 2100), (1100, 3, 2), (70, 1, 1500)]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3}


def compare(
    kernels: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    device: str,
    sum_tolerance: float = 1e-11,
) -> None:
    """Compare all functions of the kernels. `sum_tolerance`: the relative error of the payload."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    x = (2 * x + (3 if dtype is torch.float16 else 1e3)).to(device, dtype)  # a large mean, which cancels
    dy = dy.to(device, dtype)
    if channels_last:
        x, dy = (value.movedim(1, -1).contiguous().movedim(-1, 1) for value in (x, dy))
    weight, bias = (torch.rand(shape[1], generator=generator).to(device) for _ in range(2))
    wide = [value.double() for value in (dy, x, weight, bias)]
    payload, _ = kernels.moments(x)
    expected, intermediate = reference.moments(wide[1])
    _close(payload, expected, sum_tolerance)
    other = torch.stack([payload, torch.cat([payload[:-1] + 1, payload[-1:] * 3])])
    stats = kernels.join(other, 1e-5)
    _close(stats, reference.join(other, 1e-5), 1e-13)
    constant = torch.tensor([[5.0, 0.0, 7.0]], dtype=torch.float64, device=device)
    _close(
        kernels.join(constant, 0.1), reference.join(constant, 0.1), 1e-14
    )  # Triton converts a float argument to float32
    tolerance = TOLERANCES[dtype]
    _close(
        kernels.normalise(x, None, stats, weight, bias),
        reference.normalise(wide[1], intermediate, stats, *wide[2:]),
        tolerance,
    )
    _close(
        kernels.normalise(x, None, stats, None, None),
        reference.normalise(wide[1], intermediate, stats, None, None),
        tolerance,
    )
    sums = kernels.backward_sums(dy, x, stats)
    _close(sums, reference.backward_sums(*wide[:2], stats), 10 * sum_tolerance)
    for scale in (weight, None):
        got = kernels.backward_input(dy, x, stats, scale, sums[None])
        _close(
            got, reference.backward_input(*wide[:2], stats, None if scale is None else wide[2], sums[None]), tolerance
        )
        assert got.stride() == x.stride() and got.dtype == dtype
    kinds = torch.float32, torch.float64
    gradients = kernels.parameter_gradients(sums, stats, *kinds), reference.parameter_gradients(sums, stats, *kinds)
    for one, another, kind in zip(*gradients, kinds, strict=True):
        assert one.dtype == another.dtype == kind
        _close(one, another, 1e-7)
    running = [torch.zeros_like(wide[2]), torch.ones_like(wide[2])]
    moved = [value.clone() for value in running]
    kernels.update(*moved, stats, 0.1)
    reference.update(*running, stats, 0.1)
    for one, another in zip(moved, running, strict=True):
        _close(one, another, 1e-14)
        assert one._version == 1


def _close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape and got.isfinite().all()
    if expected.numel():
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-300)
        assert error <= tolerance, f"off by {error:.1e}"


def main() -> None:
    from ddparity.batchnorm import triton_kernels  # needs Triton

    for number, shape in enumerate(SHAPES):
        for dtype in TOLERANCES if number < 3 else (torch.float32,):
            for channels_last in (False, True):
                compare(triton_kernels, shape, dtype, channels_last, sys.argv[1])
    # With few programs, each one runs several steps of its loops in both directions.
    for programs in (1, 8, 200):
        triton_kernels._PROGRAMS = programs
        triton_kernels._plan.cache_clear()
        for shape in LARGE:
            for channels_last in (False, True):
                compare(triton_kernels, shape, torch.float32, channels_last, sys.argv[1])
    print("all agree")


if __name__ == "__main__":
    main()

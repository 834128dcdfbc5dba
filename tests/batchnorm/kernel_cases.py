"""Compares compiled passes with torch's operators in float64.

As a program the Triton kernels, with the name of a device; on the CPU, with TRITON_INTERPRET=1, by their interpreter.
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
    passes: Any, shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str, sums_to: float = 1e-11
) -> None:
    """`sums_to`: how near the sums of the two reductions come."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    x = (2 * x + (3 if dtype is torch.float16 else 1e3)).to(device, dtype)  # a mean that would cancel
    dy = dy.to(device, dtype)
    if last:
        x, dy = (value.movedim(1, -1).contiguous().movedim(-1, 1) for value in (x, dy))
    weight, bias = (torch.rand(shape[1], generator=generator).to(device) for _ in range(2))
    wide = [value.double() for value in (dy, x, weight, bias)]
    payload, _ = passes.moments(x)
    expected, kept = reference.moments(wide[1])
    _close(payload, expected, sums_to)
    other = torch.stack([payload, torch.cat([payload[:-1] + 1, payload[-1:] * 3])])
    stats = passes.join(other, 1e-5)
    _close(stats, reference.join(other, 1e-5), 1e-13)
    constant = torch.tensor([[5.0, 0.0, 7.0]], dtype=torch.float64, device=device)
    _close(passes.join(constant, 0.1), reference.join(constant, 0.1), 1e-14)  # Triton would take a float for float32
    tolerance = TOLERANCES[dtype]
    _close(
        passes.normalise(x, None, stats, weight, bias), reference.normalise(wide[1], kept, stats, *wide[2:]), tolerance
    )
    _close(
        passes.normalise(x, None, stats, None, None), reference.normalise(wide[1], kept, stats, None, None), tolerance
    )
    sums = passes.backward_sums(dy, x, stats)
    _close(sums, reference.backward_sums(*wide[:2], stats), 10 * sums_to)
    for scale in (weight, None):
        got = passes.backward_input(dy, x, stats, scale, sums[None])
        _close(
            got, reference.backward_input(*wide[:2], stats, None if scale is None else wide[2], sums[None]), tolerance
        )
        assert got.stride() == x.stride() and got.dtype == dtype
    kinds = torch.float32, torch.float64
    gradients = passes.parameter_gradients(sums, stats, *kinds), reference.parameter_gradients(sums, stats, *kinds)
    for one, another, kind in zip(*gradients, kinds, strict=True):
        assert one.dtype == another.dtype == kind
        _close(one, another, 1e-7)
    running = [torch.zeros_like(wide[2]), torch.ones_like(wide[2])]
    moved = [value.clone() for value in running]
    passes.update(*moved, stats, 0.1)
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
    from ddparity.batchnorm import triton_kernels as kernels  # needs Triton

    for number, shape in enumerate(SHAPES):
        for dtype in TOLERANCES if number < 3 else (torch.float32,):
            for last in (False, True):
                compare(kernels, shape, dtype, last, sys.argv[1])
    # Where few programs share the work, each takes several steps, in both directions.
    for programs in (1, 8, 200):
        kernels._PROGRAMS = programs
        kernels._plan.cache_clear()
        for shape in LARGE:
            for last in (False, True):
                compare(kernels, shape, torch.float32, last, sys.argv[1])
    print("all agree")


if __name__ == "__main__":
    main()

"""Tests of the kernels on the CPU, at sizes around the limits of their code paths."""

from __future__ import annotations

import pytest
import torch

from ddparity.batchnorm import cpu_kernels, reference
from tests.batchnorm.kernel_cases import SHAPES, compare

compiled = pytest.mark.skipif(not cpu_kernels.available(), reason="built without a C compiler")

# A plane with at most 64 elements is handled as columns: 256 columns together, 64 samples and 4,096 elements at a time.
EDGES = [(2, 257, 1, 1), (65, 5, 8, 8), (65, 5, 65), (3, 90, 3), (2, 6, 4097), (4097, 2), (130, 3, 7, 7), (64, 4, 8, 8)]


@compiled
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES + EDGES, ids=str)
def test_compiled_kernels_equal_the_reference_kernels(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    compare(cpu_kernels, shape, dtype, channels_last, "cpu", 1e-12 if dtype is torch.float64 else 1e-6)


@compiled
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_the_number_of_threads_does_not_change_the_bits(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            payload, intermediate = cpu_kernels.moments(x)
            stats = cpu_kernels.join(payload[None], 1e-5)
            sums = cpu_kernels.backward_sums(dy, x, stats)
            y, dx = (
                cpu_kernels.normalise(x, intermediate, stats, None, None),
                cpu_kernels.backward_input(dy, x, stats, None, sums[None]),
            )
            results.append((payload, sums, y, dx))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


@compiled
def test_the_sums_of_several_ranks_are_added() -> None:
    x, dy, weight = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.rand(3)
    stats = cpu_kernels.join(cpu_kernels.moments(x)[0][None], 1e-5)
    parts = torch.randn(5, 6, dtype=torch.float64)
    got = cpu_kernels.backward_input(dy, x, stats, weight, parts)
    torch.testing.assert_close(got, cpu_kernels.backward_input(dy, x, stats, weight, parts.sum(0, keepdim=True)))


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_reference_kernels_give_the_same_result_in_parts(
    dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(9, 3, 5, 5, generator=generator).to(dtype) for _ in range(2))
    if channels_last:
        x, dy = (value.contiguous(memory_format=torch.channels_last) for value in (x, dy))
    results = []
    for cached in (reference.CACHED, 150, 20):  # one part, five parts, and a cache smaller than a sample
        monkeypatch.setattr(reference, "CACHED", cached)
        payload, intermediate = reference.moments(x)
        stats = reference.join(payload[None], 1e-5)
        y, sums = reference.normalise(x, intermediate, stats, None, None), reference.backward_sums(dy, x, stats)
        dx = reference.backward_input(dy, x, stats, None, sums[None])
        assert y.stride() == dx.stride() == x.stride() and y.dtype == dx.dtype == dtype
        results.append((payload, sums, y, dx))
    for whole, *others in zip(*results, strict=True):
        kind = torch.float32 if whole.dtype == torch.float64 != dtype else whole.dtype  # the dtype of the sum
        for parts in others:
            torch.testing.assert_close(parts.to(kind), whole.to(kind))

"""The marks of tensors: what changes in memory changes them."""

from __future__ import annotations

import pytest
import torch

from ddparity.comm.bits import marks_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
SHAPES = ((3,), (2, 2), (1025,), (1, 3, 3000), (64, 65), (8, 16, 6, 6))


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_marks_change_with_a_value_and_not_without(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    views = [whole, torch.cat([whole.flatten(), whole.flatten()])[-whole.numel() :].view(shape)]
    if len(shape) == 4:
        views.append(whole.clone(memory_format=torch.channels_last))
    for tensor in views:
        before = marks_of([tensor, whole])
        assert _same(before, marks_of([tensor, whole]))
        for change in (torch.neg, lambda one: one * 2, lambda one: one + 1e-2, torch.zeros_like):
            kept = tensor.clone()
            tensor.data.copy_(change(tensor))
            assert not _same(before, marks_of([tensor, whole]))
            tensor.data.copy_(kept)
        for place in (0, tensor.numel() // 2, tensor.numel() - 1):
            kept = tensor.clone()
            flat = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).view(-1)
            flat.data[place] = -flat[place]
            assert not _same(before, marks_of([tensor, whole]))
            tensor.data.copy_(kept)
        assert _same(before, marks_of([tensor, whole]))


def test_marks_of_nan_are_equal() -> None:
    for dtype in DTYPES:
        tensor = torch.full((5000,), float("nan"), dtype=dtype)
        assert _same(marks_of([tensor]), marks_of([tensor]))
    assert _same(marks_of([torch.ones(1).expand(9000)]), marks_of([torch.ones(9000)]))
    assert _same(marks_of([torch.empty(0)]), marks_of([torch.empty(0)]))

"""Run a batch norm on ranks. The oracle is one large local batch in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ddparity as dp
from ddparity.batchnorm import cpu_kernels, dispatch

Shape = tuple[int, ...]

# Relative to the largest element, or to 1 if that is larger.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One layer and the inputs of the ranks.

    `offsets`: one number for each rank, added to its values. `layout`, `dy_layout`: see `with_layout`. `reference`: use
    the reference kernels alone.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float64
    parameters: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)
    offsets: tuple[float, ...] = (0.0,)
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    steps: int = 1
    reference: bool = False
    input_gradients: tuple[bool, ...] = (True,)
    parameter_gradients: bool = True
    autocast: bool = False
    device: str = "cpu"

    def values(self, rank: int, step: int) -> tuple[Tensor, Tensor]:
        """Return (x, dy) of a rank: float64 numbers that the case's dtype represents exactly."""
        generator = torch.Generator().manual_seed(1000 * step + rank)
        shape = self.shapes[rank]
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        x = x * 1.5 + self.offsets[rank % len(self.offsets)] + torch.arange(shape[1]).view(over(shape))
        return x.to(self.dtype).double(), dy.to(self.dtype).double()

    def layer(self, kind: Any, dtype: torch.dtype) -> Any:
        layer = kind(self.shapes[0][1], **{"dtype": self.parameters or dtype, **self.options})
        channels = torch.arange(layer.num_features)
        with torch.no_grad():  # every dtype represents these numbers exactly
            if layer.weight is not None:
                layer.weight.copy_((channels * 3 % 7 + 6) / 8)
            if layer.bias is not None:
                layer.bias.copy_((channels * 5 % 9 - 4) / 8)
        return layer.requires_grad_(self.parameter_gradients)

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]


def over(shape: Sequence[int]) -> list[int]:
    return [1, -1] + [1] * (len(shape) - 2)


def with_layout(x: Tensor, layout: str) -> Tensor:
    """Return the same values in a memory layout."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x.flatten()[:1].reshape([1] * x.dim()).expand(x.shape) if x.numel() else x
    raise ValueError(layout)


def rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.size(1))


def run(case: Case) -> dict[str, Any]:
    """Run the case's layer on a rank. Return its outputs, gradients and buffers."""
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_group() else (0, 1)
    assert len(case.shapes) == world_size
    with torchs_operators(case.reference):
        return _run(case, rank)


@contextlib.contextmanager
def torchs_operators(alone: bool = True) -> Iterator[None]:
    """Make the layers use torch's own operators, as in an installation without compiled kernels."""
    if not alone:
        yield
        return
    with (
        mock.patch.object(cpu_kernels, "_fused", None),
        mock.patch.object(dispatch, "_triton_kernels", return_value=None),
    ):
        yield


def is_group() -> bool:
    return torch.distributed.is_initialized()


def _run(case: Case, rank: int) -> dict[str, Any]:
    layer = case.layer(dp.SyncBatchNorm, case.dtype).to(case.device)
    outputs: dict[str, Any] = {"y": [], "dx": []}
    needs_gradient = case.input_gradients[rank % len(case.input_gradients)]
    for step in range(case.steps):
        x, dy = (value.to(case.device, case.dtype) for value in case.values(rank, step))
        x = with_layout(x, case.layout).detach().requires_grad_(needs_gradient)
        with torch.autocast(case.device, dtype=torch.bfloat16, enabled=case.autocast):
            y = layer(x)
        assert y.dtype == case.dtype and y.shape == x.shape
        if case.layout in ("contiguous", "channels_last"):
            assert y.stride() == x.stride(), (y.stride(), x.stride())
        if y.requires_grad:
            y.backward(with_layout(dy, case.dy_layout))
        outputs["y"].append(y.detach().double().cpu())
        if needs_gradient:
            assert x.grad is not None and x.grad.shape == x.shape
            outputs["dx"].append(x.grad.double().cpu())
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is not None and parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype
            outputs[name] = parameter.grad.double().cpu()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if getattr(layer, name) is not None:
            outputs[name] = getattr(layer, name).double().cpu()
    return outputs


def oracle(case: Case) -> list[dict[str, Any]]:
    """Return the expected result of each rank. The gradients of the weights are summed over the ranks."""
    options = {name: value for name, value in case.options.items() if name != "dtype"}
    layer = Case(case.name, case.shapes, options=options).layer(nn.BatchNorm1d, torch.float64)
    ranks = range(len(case.shapes))
    expected: list[dict[str, Any]] = [{"y": [], "dx": []} for _ in ranks]
    for step in range(case.steps):
        pairs = [case.values(rank, step) for rank in ranks]
        xs = [x.requires_grad_() for x, _ in pairs]
        dys = [with_layout(dy.to(case.dtype), case.dy_layout).double() for _, dy in pairs]
        joined = torch.cat([rows(x) for x in xs])
        y = layer(joined) if len(joined) else joined
        (y * torch.cat([rows(dy) for dy in dys])).sum().backward()
        for rank, part in zip(ranks, y.split([rows(x).size(0) for x in xs]), strict=True):
            shape = case.shapes[rank]
            back = part.detach().reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
            expected[rank]["y"].append(back)
            expected[rank]["dx"].append(xs[rank].grad)
    for one in expected:
        for name in ("weight", "bias"):
            one[name] = getattr(layer, name).grad if getattr(layer, name) is not None else None
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            one[name] = getattr(layer, name)
    return expected


def check(case: Case, results: Sequence[dict[str, Any]]) -> None:
    """Compare the results of the ranks with the oracle."""
    wanted = oracle(case)
    for rank, (got, expected) in enumerate(zip(results, wanted, strict=True)):
        for name in ("y", "dx"):
            for one, other in zip(got[name], expected[name], strict=False):
                close(f"{case.name}: {name} of rank {rank}", one, other, case.tolerance)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert (name in got) == (expected[name] is not None)
            if name in got:
                # The precision of a buffer's dtype limits the tolerance.
                tolerance = max(case.tolerance, TOLERANCES[case.parameters or case.dtype])
                close(f"{case.name}: {name} of rank {rank}", got[name], expected[name], tolerance)
    for name in ("weight", "bias"):
        if name in results[0]:
            total = sum(result[name] for result in results)
            tolerance = max(case.tolerance, TOLERANCES[case.parameters or case.dtype])
            close(f"{case.name}: gradient of {name}", total, wanted[0][name], tolerance)


def close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert not got.isnan().any(), f"{what} has NaNs"
    error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    assert error <= tolerance, f"{what} is off by {error:.1e}, more than {tolerance:.0e}"

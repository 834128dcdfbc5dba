"""Compare SyncBatchNorm with one large local batch in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ddparity as dp

from ..ranks import outcomes, run_ranks
from .cases import Case, check, run

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EVEN = ((4, 3, 5, 4),) * 2
UNEVEN = ((1, 3, 4, 5), (2, 3, 7, 2), (5, 3, 3, 3))
EMPTY = ((0, 3, 4, 4), (4, 3, 4, 4))

CASES = [
    Case("even", EVEN),
    Case("one process", ((4, 3, 5, 4),)),
    Case("four processes", ((2, 3, 4, 4),) * 4),
    Case("uneven batches and sizes", UNEVEN),
    Case("uneven, float32", UNEVEN, F32),
    Case("a rank without samples", EMPTY),
    Case("a rank without samples, float32", EMPTY, F32),
    Case("a rank without samples, float16", EMPTY, F16, F32),
    Case("a rank without samples, bfloat16", EMPTY, BF16, F32),
    Case("a rank with an empty image", ((3, 2, 0, 4), (3, 2, 4, 4))),
    Case("two ranks without samples", ((0, 3), (5, 3), (0, 3), (2, 3))),
    Case("one value a rank", ((1, 3), (1, 3))),
    Case("one value a rank, four ranks", ((1, 3, 1, 1),) * 4),
    Case("2-D", ((4, 7), (3, 7))),
    Case("3-D", ((4, 3, 9), (2, 3, 5))),
    Case("5-D", ((2, 3, 2, 3, 4), (1, 3, 4, 2, 2))),
    Case("2-D with many rows", ((5000, 5), (9001, 5))),
    Case("large planes", ((2, 3, 80, 70), (1, 3, 70, 60))),
    Case("many channels", ((3, 300, 2, 2), (2, 300, 3, 1))),
    Case("channels_last", EVEN, layout="channels_last", dy_layout="channels_last"),
    Case("channels_last, 65 channels", ((3, 65, 9, 8), (2, 65, 9, 8)), layout="channels_last"),
    Case("channels_last, many rows", ((2, 130, 60, 50), (3, 130, 60, 50)), F32, layout="channels_last"),
    Case("channels_last_3d", ((2, 3, 2, 3, 4),) * 2, layout="channels_last"),
    Case("channels last of 3-D", ((4, 3, 9), (2, 3, 5)), layout="channels_last"),
    Case("channels_last of one pixel", ((4, 3, 1, 1),) * 2, layout="channels_last"),
    Case("strided", EVEN, layout="strided"),
    Case("permuted", EVEN, layout="permuted"),
    Case("dy in channels_last", EVEN, dy_layout="channels_last"),
    Case("dy strided", EVEN, layout="channels_last", dy_layout="strided"),
    Case("dy permuted", EVEN, dy_layout="permuted"),
    Case("dy expanded", EVEN, dy_layout="expanded"),
    Case("dy expanded, channels_last", EVEN, layout="channels_last", dy_layout="expanded"),
    Case("float16, float32 parameters", UNEVEN, F16, F32),
    Case("bfloat16, float32 parameters", UNEVEN, BF16, F32),
    Case("bfloat16 throughout", UNEVEN, BF16, BF16),
    Case("autocast", UNEVEN, F32, autocast=True),
    Case("bfloat16 under autocast", UNEVEN, BF16, F32, autocast=True),
    Case("65,792 values in float16", ((257, 1, 16, 16), (1, 1, 16, 16)), F16, F32),
    Case("4,097 values in bfloat16", ((4097, 1), (2049, 1)), BF16, F32),
    Case("float64 input, float32 parameters", EVEN, torch.float64, F32),
    Case("large means, float32", EVEN, F32, offsets=(1e4,)),
    Case("large means, channels_last, float32", EVEN, F32, offsets=(1e4,), layout="channels_last"),
    Case("large means, 2-D, float32", ((50, 3), (70, 3)), F32, offsets=(1e4,)),
    Case("different means, float32", EVEN, F32, offsets=(1e4, -1e4)),
    Case("affine=False", EVEN, options={"affine": False}),
    Case("bias=False", EVEN, options={"bias": False}),
    Case("track_running_stats=False", EVEN, options={"track_running_stats": False}),
    Case("momentum=None", EVEN, options={"momentum": None}, steps=3),
    Case("momentum=0", EVEN, options={"momentum": 0.0}),
    Case("momentum=0.5, three steps", UNEVEN, options={"momentum": 0.5}, steps=3),
    Case("eps", EVEN, options={"eps": 0.1}),
    Case("input without gradient", EVEN, input_gradients=(False,)),
    Case("input with gradient on one rank", EVEN, input_gradients=(True, False)),
    Case("parameters without gradient", EVEN, parameter_gradients=False),
]
# The reference kernels run the same cases.
CASES += [
    replace(case, name=f"{case.name}, reference", reference=True) for case in CASES if case.dtype not in (F16, BF16)
]
BY_WORLD_SIZE = {size: [case for case in CASES if len(case.shapes) == size] for size in (1, 2, 3, 4)}


def _run_all(cases: list[Case]) -> list[Any]:
    return [run(case) for case in cases]


@pytest.fixture(scope="module")
def given_results() -> dict[str, list[Any]]:
    """Return the results of the ranks in each case. The processes start once for each world size."""
    results: dict[str, list[Any]] = {}
    for size, cases in BY_WORLD_SIZE.items():
        of_ranks = run_ranks(_run_all, size, cases)
        results.update({case.name: [one[number] for one in of_ranks] for number, case in enumerate(cases)})
    return results


def _has_oracle(case: Case) -> bool:
    return "bias" not in case.options or "bias" in nn.BatchNorm1d.__init__.__annotations__


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_result_is_the_batch_norm_of_the_whole_batch(case: Case, given_results: dict[str, list[Any]]) -> None:
    if not _has_oracle(case):
        pytest.skip("the layer of this torch version has no bias argument, so there is no oracle")
    check(case, given_results[case.name])


@pytest.mark.gpu
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_result_on_a_gpu_that_ranks_share_over_gloo(world_size: int, reference: bool) -> None:
    given = [case for case in BY_WORLD_SIZE[world_size] if case.reference == reference and _has_oracle(case)]
    cases = [replace(case, device="cuda") for case in given]
    of_ranks = run_ranks(_run_all, world_size, cases, timeout_s=200)
    for number, case in enumerate(cases):
        check(case, [one[number] for one in of_ranks])


@st.composite
def _spreads(draw: st.DrawFn) -> tuple[int, int, list[list[int]]]:
    """Draw channels, samples, and for several cases the ends of the ranks' parts of one batch."""
    samples = draw(st.integers(2, 12))
    cuts = st.lists(st.integers(0, samples), min_size=3, max_size=3).map(sorted)
    return draw(st.integers(1, 5)), samples, draw(st.lists(cuts, min_size=6, max_size=6))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@settings(max_examples=4)
@given(spreads=_spreads())
def test_the_result_does_not_depend_on_how_a_batch_is_divided(
    world_size: int, spreads: tuple[int, int, list[list[int]]]
) -> None:
    channels, samples, cuts = spreads
    cases = []
    for number, cut in enumerate(cuts):
        ends = [0, *cut[: world_size - 1], samples]
        shapes = tuple((end - start, channels, 2, 3) for start, end in itertools.pairwise(ends))
        cases.append(Case(f"{shapes}", shapes, layout=("contiguous", "channels_last")[number % 2], steps=2))
    of_ranks = run_ranks(_run_all, world_size, cases)
    for number, case in enumerate(cases):
        check(case, [one[number] for one in of_ranks])


def _constant() -> Any:
    layer = dp.SyncBatchNorm(2)
    y = layer(torch.full((3, 2, 2, 2), 5.0))
    return y.detach(), layer.running_var


def test_a_constant_channel_has_no_variance() -> None:
    for y, running_var in run_ranks(_constant, 2):
        assert torch.equal(y, torch.zeros_like(y))
        assert torch.equal(running_var, torch.full((2,), 0.9))


def _empty() -> Any:
    layer = dp.SyncBatchNorm(2)
    x = torch.empty(0, 2, 3, 3, requires_grad=True)
    layer(x).sum().backward()
    return x.grad.shape, layer.weight.grad, layer.running_mean, layer.running_var, int(layer.num_batches_tracked)


def test_an_empty_batch_on_all_ranks_does_not_change_running_statistics() -> None:
    for shape, gradient, mean, var, tracked in run_ranks(_empty, 2):
        assert shape == (0, 2, 3, 3) and torch.equal(gradient, torch.zeros(2))
        assert torch.equal(mean, torch.zeros(2)) and torch.equal(var, torch.ones(2))
        assert tracked == 1  # torch's local layer counts it too


def _single(samples: list[int]) -> None:
    layer = dp.SyncBatchNorm(3)
    try:
        layer(torch.ones(samples[torch.distributed.get_rank()], 3))
    finally:
        assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("samples", [[1, 0], [0, 1, 0]])
def test_one_value_on_all_ranks_together_raises_an_error_on_every_rank(samples: list[int]) -> None:
    for outcome in outcomes(_single, len(samples), samples):
        assert "ValueError: Expected more than 1 value per channel when training" in outcome.error


def test_one_value_in_one_process_raises_the_error_of_torch() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        dp.SyncBatchNorm(3)(torch.ones(1, 3))


def _mixed() -> Any:
    rank = torch.distributed.get_rank()
    layer = dp.SyncBatchNorm(2)
    x = torch.arange(8.0).view(2, 2, 2) * (rank + 1)
    y = layer(x.to((F32, F16)[rank]))
    y.float().sum().backward()
    return y.dtype, layer.running_mean


def test_ranks_may_compute_in_different_dtypes() -> None:
    (kind0, mean0), (kind1, mean1) = run_ranks(_mixed, 2)
    assert (kind0, kind1) == (F32, F16)
    assert torch.equal(mean0, mean1) and mean0.abs().max() > 0


def test_counts_that_float32_cannot_represent_are_exact() -> None:
    from ddparity.batchnorm import cpu_kernels, reference

    counts = [2**24 + 1, 2**53 - 2**25]
    payloads = torch.tensor([[1.0, 0.0, counts[0]], [1.0, 0.0, counts[1]]], dtype=torch.float64)
    for kernels in [reference] + [cpu_kernels] * cpu_kernels.available():
        assert kernels.join(payloads, 1e-5)[-1].item() == sum(counts)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}])
def test_without_a_group_the_result_equals_the_local_layer(
    shape: tuple[int, ...], training: bool, options: dict[str, Any]
) -> None:
    local = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](3, **options)
    ours = dp.SyncBatchNorm(3, **options)
    x = torch.randn(shape)
    for layer in (local, ours):
        layer.train(training)
    for _ in range(2):
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [layer(one) for layer, one in zip((local, ours), xs, strict=True)]
        assert torch.equal(*ys)
        for y in ys:
            y.square().sum().backward()
        assert torch.equal(xs[0].grad, xs[1].grad)
    for name, value in local.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3,), "expected at least 2D input"), ((4, 5), "its weight has 3 elements"), ((4, 0, 2), "at least one channel")],
)
def test_a_wrong_input_raises_an_error(shape: tuple[int, ...], message: str) -> None:
    for outcome in outcomes(_wrong_input, 2, shape):
        assert "ValueError" in outcome.error and message in outcome.error


def _wrong_input(shape: tuple[int, ...]) -> None:
    dp.SyncBatchNorm(3)(torch.ones(shape))

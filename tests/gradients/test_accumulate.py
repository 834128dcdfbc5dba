"""`replicate` and `accumulate`: the gradient is that of one big batch, and it is reduced once."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ddparity as dp
from tests.ranks import kill_self, outcomes, run_ranks

X = torch.randn(48, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def _gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def _big_batch(rows: torch.Tensor) -> list[torch.Tensor | None]:
    """The oracle: one backward of the mean over all rows."""
    model = _net()
    model(rows).square().mean().backward()
    return _gradients(model)


def _assert_close(ours: list, expected: list) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# How 48 rows are cut into batches, for each rank.
SPREADS: dict[str, list[list[int]]] = {
    "equal": [[8, 8], [8, 8]],
    "uneven sizes": [[1, 7, 2], [3, 5, 20]],
    "uneven numbers": [[10], [3, 3, 3]],
    "a rank without": [[10, 4], []],
    "an empty batch": [[10, 0], [4]],
    "a rank with empty batches": [[0, 0], [4, 6]],
    "three ranks": [[5], [6, 7], [1, 1, 1]],
    "three ranks, two without": [[], [6, 7], []],
    "one rank": [[9, 1, 3]],
}


def _foreign(sizes: list[list[int]], wrap: Callable[[nn.Module], nn.Module]) -> tuple[list, float, int]:
    rank = dist.get_rank()
    rows = X[: sum(map(sum, sizes))].split([size for part in sizes for size in part])
    begin = sum(map(len, sizes[:rank]))
    model = wrap(_net())
    shares: list[float] = []
    weights: list[float] = []
    for _ in range(2):  # the second window finds rebuilt buckets
        model.zero_grad()
        shares, weights = [], []
        for micro in dp.accumulate(model, rows[begin : begin + len(sizes[rank])]):
            (model(micro.data).square().mean() * micro.weight).backward()
            shares.append(micro.share)
            weights.append(micro.weight)
    factor = 1 if [] in sizes or any(sum(part) == 0 for part in sizes) else len(sizes)
    assert weights == [share * factor for share in shares]
    return _gradients(model), sum(shares), len(shares)


def _plain_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.get_world_size() > 1 else model


@pytest.mark.parametrize("wrap", [dp.replicate, _plain_ddp])
@pytest.mark.parametrize("sizes", SPREADS.values(), ids=SPREADS.keys())
def test_foreign_batches_give_the_gradient_of_one_batch(sizes: list[list[int]], wrap) -> None:
    parts = run_ranks(_foreign, len(sizes), sizes, wrap)
    expected = _big_batch(X[: sum(map(sum, sizes))])
    for gradients, _, _ in parts:
        _assert_close(gradients, expected)
    assert sum(share for _, share, _ in parts) == pytest.approx(1, abs=1e-15)
    assert sum(count for *_, count in parts) == sum(size > 0 for part in sizes for size in part)


def _tokens(loader: bool) -> list:
    """Sentences padded to 8 tokens; the mean is over those that are not padding."""
    lengths = torch.tensor([1, 8, 2, 5, 3, 3, 7, 1, 4, 6, 2, 8, 5])
    mask = torch.arange(8) < lengths[:, None]
    x = torch.randn(13, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    data = list(zip(x, mask, strict=True))

    def mean_loss(model: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(x).squeeze(-1).square()[mask].mean()

    oracle = _net()
    mean_loss(oracle, x, mask).backward()
    model = dp.replicate(_net())
    plan = dp.BatchPlan(13, 13, 2, shuffle=False)
    step = next(iter(dp.Loader(data, plan).epoch(0)))
    batches: Any = step if loader else [micro.data for micro in step]
    for micro in dp.accumulate(model, batches, count=lambda data: data[1].sum()):
        (mean_loss(model, *micro.data) * micro.weight).backward()
    _assert_close(_gradients(model), _gradients(oracle))
    return _gradients(model)


@pytest.mark.parametrize("loader", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_mean_may_be_over_tokens(world_size: int, loader: bool) -> None:
    run_ranks(_tokens, world_size, loader)


class _CausalModel(nn.Module):
    """A language model that shifts the labels inside, as those of transformers do, and returns the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(11, 8, dtype=torch.float64), nn.Linear(8, 11, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        logits = self.head(self.embedding(input_ids))[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction)


def _answers() -> list[dict[str, torch.Tensor]]:
    """Short answers beside long ones; one has no target at all."""
    generator, found = torch.Generator().manual_seed(1), []
    for length in (2, 3, 2, 12, 4, 1, 9, 3):
        ids = torch.randint(0, 11, (12,), generator=generator)
        labels = ids.masked_fill(torch.arange(12) >= length, -100)
        found.append({"input_ids": ids, "labels": labels})
    return found


def _recipe_of_the_page() -> Callable[[Any], Any]:
    page = (Path(__file__).parents[2] / "docs" / "accumulation.md").read_text()
    recipe = re.search(r'count=(lambda data: \(data\["labels"\]\[.*?\.sum\(\))\)', page)[1]
    return eval(recipe)


def _causal(micro_batch: int) -> None:
    oracle, data = _CausalModel(), _answers()
    ids, labels = (torch.stack([one[name] for one in data]) for name in ("input_ids", "labels"))
    targets = sum(int(label != -100) for row in labels.tolist() for label in row[1:])
    (oracle(ids, labels, "sum") / targets).backward()
    model = dp.replicate(_CausalModel())
    loader = dp.Loader(data, dp.BatchPlan(8, 8, micro_batch, shuffle=False))
    for micro in dp.accumulate(model, next(loader.epoch(0)), count=_recipe_of_the_page()):
        (model(**micro.data) * micro.weight).backward()
    _assert_close(_gradients(model), _gradients(oracle))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_causal_language_model_counts_what_it_predicts(world_size: int) -> None:
    run_ranks(_causal, world_size, 1)
    run_ranks(_causal, world_size, 2)


def _steps(make: Callable[[], nn.Module], options: dict) -> list:
    """Three epochs of 17 samples, 8 a step in 4 micro-batches: the last step has one sample for all ranks."""
    dp.seed_everything(0)
    model = dp.replicate(make(), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = dp.Loader(list(X[:17]), dp.BatchPlan(17, 8, 2, seed=3))  # the last step: one sample, one micro-batch
    for epoch in range(3):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                (model(micro.data).square().mean() * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


class _Unused(nn.Module):
    """A parameter that no forward uses, and one that only some micro-batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net()
        self.never = nn.Linear(2, 2).double()
        self.sometimes = nn.Linear(6, 1).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return y + self.sometimes(x) if bool((x[:, 0] > 0).all()) else y


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*_net(), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


def _frozen() -> nn.Module:
    model = _net()
    model[0].requires_grad_(False)
    return model


def _with_dropout() -> nn.Module:
    return nn.Sequential(*_net(), nn.Dropout(0.5))


MODELS = {
    "plain": (_net, {}),
    "dropout": (_with_dropout, {}),
    "frozen": (_frozen, {}),
    "unused": (_Unused, {"find_unused_parameters": True}),
    "checkpointing": (_Checkpointed, {}),
    "bucket views": (_net, {"gradient_as_bucket_view": True}),
    "many buckets": (_net, {"bucket_cap_mb": 1e-5}),
}


@pytest.mark.parametrize(("make", "options"), MODELS.values(), ids=MODELS.keys())
def test_models_train_alike_on_one_to_three_processes(make, options: dict) -> None:
    expected = run_ranks(_steps, 1, make, options)[0]
    for world_size in (2, 3):
        for ours in run_ranks(_steps, world_size, make, options):
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def _batch_norm_in_short_steps() -> None:
    """Buffers are broadcast in a forward: a rank without one must not be waited for."""
    torch.manual_seed(0)
    model = dp.replicate(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double())
    loader = dp.Loader(list(X[:10]), dp.BatchPlan(10, 8, 2))  # two steps; two samples are left for the second
    for epoch in range(3):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                x = torch.cat([micro.data, micro.data + 1])
                (model(x).square().mean() * micro.weight).backward()
            model.zero_grad()
    if dist.get_rank() == 0:
        assert model.module[1].num_batches_tracked > 0


@pytest.mark.parametrize("world_size", [3, 4])
def test_buffers_do_not_hang_short_steps(world_size: int) -> None:
    run_ranks(_batch_norm_in_short_steps, world_size, timeout_s=30)


def _never_has_a_gradient() -> list:
    model = dp.replicate(_Unused(), find_unused_parameters=True)
    found = []
    for rows in (4, 1):  # a full window, and one that leaves a rank without a batch
        batches = [X[:rows] - 100] if dist.get_rank() < rows else []
        model.zero_grad()
        for micro in dp.accumulate(model, batches):
            (model(micro.data).square().mean() * micro.weight).backward()
        found.append([name for name, p in model.module.named_parameters() if p.grad is None])
    return found


def test_a_parameter_without_a_gradient_keeps_none() -> None:
    unused = ["never.weight", "never.bias", "sometimes.weight", "sometimes.bias"]
    assert run_ranks(_never_has_a_gradient, 2) == [[unused, unused]] * 2


def _collectives(micro_batches: int, kind: str) -> dict[str, int]:
    net = nn.Sequential(nn.BatchNorm1d(6), *_net()).double() if "statistics" in kind else _net()
    model = dp.replicate(net, batchnorm_statistics="rank0" if kind == "rank 0's statistics" else "all")
    counts: dict[str, int] = {}
    for _ in range(3):  # the first reduction is followed by DDP's one broadcast of the bucket order
        batches = [X[:2] for _ in range(micro_batches)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for micro in dp.accumulate(model, batches, equal_counts=kind != "counted"):
                (model(micro.data).square().mean() * micro.weight).backward()
        counts = {e.key: e.count for e in profiler.key_averages() if e.key.startswith("gloo:")}
        model.zero_grad()
    return counts


@pytest.mark.parametrize("micro_batches", [1, 4, 16])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("equal", {"gloo:all_to_all": 1}),
        ("counted", {"gloo:all_to_all": 2}),
        ("running statistics", {"gloo:all_to_all": 2}),
        ("rank 0's statistics", {"gloo:all_to_all": 1, "gloo:broadcast": 2}),  # float64 and int64 buffers
    ],
)
def test_one_reduction_a_step(micro_batches: int, kind: str, expected: dict[str, int]) -> None:
    assert run_ranks(_collectives, 2, micro_batches, kind) == [expected] * 2


def _large_reduction() -> tuple[dict[str, int], float]:
    model = dp.replicate(nn.Linear(1000, 1000, bias=False))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for micro in dp.accumulate(model, [torch.ones(1, 1000), torch.ones(3, 1000)], equal_counts=True):
            (model(micro.data).mean() * micro.weight).backward()
    counts = {e.key: e.count for e in profiler.key_averages() if e.key.startswith("gloo:")}
    return counts, model.module.weight.grad.sum().item()


def test_large_gradients_are_all_reduced() -> None:
    for counts, total in run_ranks(_large_reduction, 2):
        assert counts == {"gloo:all_reduce": 1}
        assert total == pytest.approx(1000, rel=1e-5)  # d mean / d weight is 1/1000 for each of a million


def _raises_in_the_loop() -> None:
    model = dp.replicate(_net())
    with contextlib.suppress(OSError):
        for _ in dp.accumulate(model, [X[:4], X[4:8]], equal_counts=True):
            raise OSError("lost")
    assert model.require_backward_grad_sync
    model.zero_grad()
    rank = dist.get_rank()
    for micro in dp.accumulate(model, [X[8 * rank : 8 * rank + 3], X[8 * rank + 3 : 8 * rank + 8]]):
        (model(micro.data).square().mean() * micro.weight).backward()
    _assert_close(_gradients(model), _big_batch(X[:16]))


def test_an_exception_in_the_loop_leaves_the_model_usable() -> None:
    run_ranks(_raises_in_the_loop, 2)


def test_leaving_the_loop_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in dp.accumulate(_net(), [X[:4], X[4:8]]):
            break
    assert "left accumulate() in micro-batch 1 of 2: gradients are not reduced" in caplog.text


def _amp() -> list:
    model = dp.replicate(_net().float())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batches = X.float()[:24].split(4)[rank * 6 // world_size : (rank + 1) * 6 // world_size]
    for _ in range(3):
        for micro in dp.accumulate(model, batches):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(micro.data).float().square().mean()
            scaler.scale(loss * micro.weight).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_autocast_scaler_and_clipping() -> None:
    expected = run_ranks(_amp, 1)[0]
    for ours in run_ranks(_amp, 2):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_world_of_one_without_a_group() -> None:
    net = _net()
    assert dp.replicate(net) is net
    for micro in dp.accumulate(net, [X[:3], X[3:10]]):
        (net(micro.data).square().mean() * micro.weight).backward()
    _assert_close(_gradients(net), _big_batch(X[:10]))


def _replicated() -> tuple[bool, float]:
    torch.manual_seed(dist.get_rank())
    model = dp.replicate(nn.Linear(3, 3))
    same = dp.gather(model.module.weight.detach().reshape(1, 9), to="all")
    return type(model) is DistributedDataParallel, (same[0] - same[1]).abs().max().item()


def test_replicate_gives_a_real_ddp_with_rank_0s_weights() -> None:
    assert run_ranks(_replicated, 2) == [(True, 0.0)] * 2


def _static_graph() -> list:
    model = dp.replicate(_net(), static_graph=True)
    rows = X[: 8 * dist.get_world_size()].split(8)[dist.get_rank()]
    for _ in range(3):
        model.zero_grad()
        for micro in dp.accumulate(model, [rows]):
            (model(micro.data).square().mean() * micro.weight).backward()
    with pytest.raises(ValueError, match="2 micro-batches for a DDP module with static_graph=True"):
        list(dp.accumulate(model, rows.split(4)))
    return _gradients(model)


def test_a_static_graph_takes_one_micro_batch_a_rank() -> None:
    for gradients in run_ranks(_static_graph, 2):
        _assert_close(gradients, _big_batch(X[:16]))


def _plain_in_two() -> None:
    dp.accumulate(_net(), [X])


def test_a_plain_module_in_two_processes_is_refused() -> None:
    for outcome in outcomes(_plain_in_two, 2):
        assert "TypeError: accumulate() got a plain Sequential in a world of 2" in outcome.error
        assert "ddparity.replicate(model)" in outcome.error


def _cannot_count(rank: int) -> None:
    model = dp.replicate(_net())
    list(dp.accumulate(model, ["no tensor"] if dist.get_rank() == rank else [X[:4]]))


def test_a_batch_that_cannot_be_counted_fails_every_rank() -> None:
    ended = outcomes(_cannot_count, 2, 1)
    assert "ValueError: accumulate(): another rank could not load or count" in ended[0].error
    assert "TypeError: accumulate() cannot count the samples of a str" in ended[1].error
    assert max(outcome.seconds for outcome in ended) < 10


class _Broken(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 7:
            raise OSError("truncated file")
        return X[index]


def _cannot_load() -> None:
    model = dp.replicate(_net())
    step = next(dp.Loader(_Broken(), dp.BatchPlan(8, 8, 2, shuffle=False)).epoch(0))
    list(dp.accumulate(model, step, count=len))


def test_a_sample_that_cannot_be_loaded_fails_every_rank() -> None:
    ended = outcomes(_cannot_load, 2)
    assert "ValueError: accumulate(): another rank could not load or count" in ended[0].error
    assert "SampleError: the data set failed at index 7" in ended[1].error


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "no batch on any rank has a unit"),
        ([X[:0]], {}, ValueError, "no batch on any rank has a unit"),
        ([X], {"count": lambda data: -1}, ValueError, "count gave -1 for batch 0"),
        ([X], {"count": lambda data: float("nan")}, ValueError, "count gave nan for batch 0"),
        ([torch.tensor(1.0)], {}, TypeError, "pass count="),
        ([], {"equal_counts": True}, ValueError, "got no batches"),
        ({"x": X}, {}, TypeError, "got a dict, which is one batch: give a step of a Loader, or a list of batches"),
        (dp.Loader(X, global_batch=2), {}, TypeError, "got a Loader: loop over its steps, `for step in loader:`"),
    ],
)
def test_bad_windows_are_refused(batches: list, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        list(dp.accumulate(_net(), batches, **options))


def test_bad_models_are_refused() -> None:
    with pytest.raises(ValueError, match="reduction='slow'"):
        dp.replicate(_net(), reduction="slow")
    with pytest.raises(TypeError, match="got a str"):
        dp.replicate("net")


def _raises_in_a_backward(how: str) -> None:
    model = dp.replicate(_net())
    for micro in dp.accumulate(model, [X[:4], X[4:8]]):
        loss = model(micro.data).square().mean() * micro.weight
        if micro.index == 1 and dist.get_rank() == 1:
            if how == "kill":
                kill_self()
            raise OSError("lost")
        loss.backward()


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_fails_in_the_loop_fails_the_others(how: str) -> None:
    ended = outcomes(_raises_in_a_backward, 2, how)
    assert ended[0].error is not None
    assert ended[0].seconds < 10
    assert ended[1].exitcode == -9 if how == "kill" else ended[1].error == "OSError: lost"


def _deep_copied() -> None:
    model = dp.replicate(_net())
    copied = copy.deepcopy(model.module)
    assert dp.fingerprint(copied) == dp.fingerprint(model)
    F.mse_loss(copied(X), X[:, :1]).backward()


def test_the_module_inside_can_be_copied() -> None:
    run_ranks(_deep_copied, 2)


def _compressed(kind: str) -> list[list[float]]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    power = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1)
    torch.manual_seed(0)
    model = dp.replicate(nn.Linear(6, 4), comm_hook={"bf16": bf16_compress_hook, "power": (power, powerSGD_hook)}[kind])
    plan = dp.BatchPlan(24, 8, 2, shuffle=False)
    data = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    steps = []
    for step in dp.Loader(data, plan).epoch(0):
        for micro in dp.accumulate(model, step):
            (model(micro.data).square().mean() * micro.weight).backward()
        gradient = next(model.parameters()).grad
        steps.append(gradient.flatten().tolist())
        model.zero_grad()
    if isinstance(model, DistributedDataParallel):
        rank_of_matrix = torch.linalg.matrix_rank(gradient).item()
        as_sent = torch.equal(gradient, gradient.bfloat16().float())
        assert rank_of_matrix == 1 if kind == "power" else as_sent, "the hook was not run"
    return steps


@pytest.mark.parametrize(("kind", "rtol"), [("bf16", 1e-2), ("power", None)])
def test_a_communication_hook_of_torch(kind: str, rtol: float | None) -> None:
    (alone,) = run_ranks(_compressed, 1, kind)
    first, second = run_ranks(_compressed, 2, kind)
    assert first == second
    last = len(alone) if rtol else 2  # from there on PowerSGD sends an approximation
    torch.testing.assert_close(torch.tensor(first[:last]), torch.tensor(alone[:last]), rtol=rtol or 1e-5, atol=1e-3)


def test_a_communication_hook_that_cannot_be_is_refused() -> None:
    with pytest.raises(TypeError, match="comm_hook=3"):
        dp.replicate(nn.Linear(1, 1), comm_hook=3)
    with pytest.raises(ValueError, match="leave comm_hook out"):
        dp.replicate(nn.Linear(1, 1), reduction="strict", comm_hook=lambda state, bucket: None)

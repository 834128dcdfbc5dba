"""What differs between ranks is refused on every rank, by its name, in the first step that depends on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from tests.ranks import outcomes, run_ranks

X = torch.arange(48.0)[:, None] * torch.ones(1, 3)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def _last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def _train(model: nn.Module, batches: Any, **options: Any) -> None:
    for micro in dp.accumulate(model, batches, **options):
        (model(micro.data).square().mean() * micro.weight).backward()


def _plan(**differs: Any) -> None:
    """The plan of the last rank differs in one argument."""
    given = {"num_samples": 24, "global_batch": 12, "micro_batch": 2, **(differs if _last() else {})}
    plan = dp.BatchPlan(**given)
    model = dp.replicate(_net())
    _train(model, next(dp.Loader(X[: plan.num_samples], plan).epoch(0)))


def _position(epoch: int, start_step: int) -> None:
    loader = dp.Loader(X, dp.BatchPlan(48, 12, 2))
    model = dp.replicate(_net())
    _train(model, next(loader.epoch(epoch, start_step) if _last() else loader.epoch(0)))


def _kind_of_batches() -> None:
    model = dp.replicate(_net())
    step = next(dp.Loader(X, dp.BatchPlan(48, 12, 2)).epoch(0))
    _train(model, X.split(4) if _last() else step)


def _equal_counts(numbers: tuple[int, int]) -> None:
    model = dp.replicate(_net())
    _train(model, X[: 4 * numbers[_last()]].split(4), equal_counts=True)


def _only_some_equal() -> None:
    model = dp.replicate(_net())
    _train(model, X.split(12), equal_counts=_last())


def _count() -> None:
    model = dp.replicate(_net())
    _train(model, X.split(12), count=(lambda data: len(data)) if _last() else None)


def _reduction() -> None:
    dp.replicate(_net(), "strict" if _last() else "fast")


def _statistics() -> None:
    dp.replicate(_net(), batchnorm_statistics="rank0" if _last() else "all")


def _check_every() -> None:
    dp.replicate(_net(), check_every=7 if _last() else 100)


def _converted() -> None:
    dp.replicate(dp.convert_sync_batchnorm(_net()) if _last() else _net())


def _converted_by_torch() -> None:
    dp.replicate(nn.SyncBatchNorm.convert_sync_batchnorm(_net()) if _last() else _net())


def _mode() -> None:
    model = dp.replicate(dp.convert_sync_batchnorm(_net()))
    model.train(not _last())
    _train(model, X.split(12))


def _mode_of_one_layer() -> None:
    """As a script does that freezes the norms on one rank only."""
    model = dp.replicate(dp.convert_sync_batchnorm(_net()))
    if _last():
        model.module[1].eval()
    _train(model, X.split(12))


def _frozen() -> None:
    model = dp.replicate(_net())
    if _last():
        model.module[0].requires_grad_(False)
    _train(model, X.split(12))


def _weights() -> None:
    model = dp.replicate(_net())
    if _last():
        with torch.no_grad():
            model.module[0].weight[0, 0] += 1e-3
    _train(model, X.split(12))


def _models() -> None:
    one, other = dp.replicate(_net()), dp.replicate(_net())
    _train(one, X.split(12)) if _last() else [None for _ in dp.accumulate([one, other], X.split(12))]


CASES: dict[str, tuple[Callable[..., None], dict[str, Any], str]] = {
    "seed": (_plan, {"seed": 1}, "the plan's seed differs between ranks: '[01]' on rank .*, '[01]' on another"),
    "length": (_plan, {"num_samples": 22}, "the plan's num_samples differs between ranks: '2[24]' on rank"),
    "micro-batch": (_plan, {"micro_batch": 3}, "the plan's micro_batch differs between ranks"),
    "global batch": (_plan, {"global_batch": 8}, "the plan's global_batch differs between ranks"),
    "order": (_plan, {"shuffle": False}, "the plan's shuffle differs between ranks: '(True|False)' on rank"),
    "drop_last": (_plan, {"drop_last": True}, "the plan's drop_last differs between ranks"),
    "epoch": (_position, {"epoch": 1, "start_step": 0}, "the epoch differs between ranks: [01] on rank"),
    "step": (_position, {"epoch": 0, "start_step": 2}, "the step differs between ranks: [02] on rank"),
    "kind": (_kind_of_batches, {}, "the kind of batches differs between ranks"),
    "equal_counts": (
        _equal_counts,
        {"numbers": (2, 3)},
        r"the batches with accumulate\(equal_counts=True\) differs between ranks: [23] on rank",
    ),
    "some equal_counts": (_only_some_equal, {}, r"the batches with accumulate\(equal_counts=True\) differs"),
    "count": (_count, {}, r"accumulate\(count=…\), given or not differs between ranks"),
    "reduction": (_reduction, {}, r"replicate\(reduction=…\) differs between ranks: '(fast|strict)' on rank"),
    "statistics": (_statistics, {}, r"replicate\(batchnorm_statistics=…\) differs between ranks: '(all|rank0)' on"),
    "check_every": (_check_every, {}, r"replicate\(check_every=…\) differs between ranks: (7|100) on rank"),
    "converted": (_converted, {}, "the number of synchronised batch norms differs between ranks: [01] on rank"),
    "converted by torch": (_converted_by_torch, {}, "the number of synchronised batch norms differs between ranks"),
    "mode": (_mode, {}, "the number of synchronised batch norms in training differs between ranks: [01] on rank"),
    "mode of a layer": (_mode_of_one_layer, {}, "the number of synchronised batch norms in training differs"),
    "frozen": (_frozen, {}, r"0\.\w+ is trained (here and not on another rank|on another rank and not here)"),
    "weights": (_weights, {}, "the digest of the parameters' bits differs between ranks"),
    "models": (_models, {}, r"the number of models given to accumulate\(\) differs between ranks: [12] on rank"),
}


def _all(names: list[str]) -> list[tuple[str, float]]:
    """Run the cases one after the other: the ranks are still in step after a refusal. Return each one's error."""
    found = []
    for name in names:
        function, options, _ = CASES[name]
        try:
            function(**options)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("nothing")
        dist.barrier()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_differs_is_refused_by_name_on_every_rank(world_size: int) -> None:
    ranks = run_ranks(_all, world_size, list(CASES), timeout_s=60)
    for number, name in enumerate(CASES):
        errors = [rank[number] for rank in ranks]
        message = CASES[name][2]
        assert all(re.search(message, error) for error in errors), (name, errors)
        assert all(re.match("ValueError|RankFailure: rank .* failed in", error) for error in errors), (name, errors)
        assert any(error.startswith("ValueError") for error in errors), (name, errors)


def _alone(name: str) -> None:
    function, options, _ = CASES[name]
    function(**options)


@pytest.mark.parametrize("name", ["seed", "length"])
def test_a_script_with_it_ends_on_every_rank(name: str) -> None:
    ended = outcomes(_alone, 2, name, timeout_s=30)
    for outcome in ended:
        assert re.search(CASES[name][2], outcome.error), outcome.error


def _unfrozen_later() -> None:
    """One rank unfreezes a layer in its third step, where the others wait in the reduction for it."""
    model = dp.replicate(_net(), process_group=dist.new_group(timeout=timedelta(seconds=3)))
    model.module[0].requires_grad_(False)
    for number in range(3):
        model.module[0].requires_grad_(number == 2 and _last())
        _train(model, X.split(12), equal_counts=True)


def test_a_layer_that_one_rank_unfreezes_later_is_named() -> None:
    first, last = outcomes(_unfrozen_later, 2, timeout_s=60)
    assert "in accumulate() (0.weight newly trained) for rank 0, which did not come to it" in last.error
    assert "RuntimeError" in first.error


def _equal() -> None:
    """Nothing differs, so nothing is refused: also in later steps, where less is compared."""
    plan = dp.BatchPlan(52, 16, 4, drop_last=True)
    rows = torch.cat([X, X[:4]])
    model = dp.replicate(dp.convert_sync_batchnorm(_net()))
    loader = dp.Loader(rows, plan)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            _train(model, step)
    _train(model, X.split(12), equal_counts=True)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_that_agree_train(world_size: int) -> None:
    run_ranks(_equal, world_size)


def _ignored_parameters_may_differ() -> float:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    net._ddp_params_and_buffers_to_ignore = ["1.bias"]
    model = dp.replicate(net)
    with torch.no_grad():
        net[1].bias.fill_(float(dist.get_rank()))
    loader = dp.Loader(list(torch.ones(8, 6)), dp.BatchPlan(8, 8, 2))
    for epoch in range(3):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                (model(micro.data).mean() * micro.weight).backward()
    return net[1].bias.item()


def test_parameters_that_ddp_is_told_to_ignore_are_not_compared() -> None:
    assert run_ranks(_ignored_parameters_may_differ, 2) == [0.0, 1.0]

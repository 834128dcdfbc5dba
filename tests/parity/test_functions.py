"""`verify` of a function that trains and returns its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import ddparity as dp
from ddparity.parity import show
from ddparity.parity.causes import CAUSES
from ddparity.task.task import load_task

DATA = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Module:
    dp.seed_everything(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))


def _train(model: Any, steps: int, scale: float = 1.0) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in dp.Loader(list(DATA), global_batch=12, micro_batch=4, seed=0).steps(steps):
        for micro in dp.accumulate(model, step):
            (model(micro.data).square().mean() * micro.weight * scale).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model


def good(steps: int, reduction: Any = "fast") -> Any:
    with dp.world():  # uses the one that is there
        return _train(dp.replicate(_net(), reduction=reduction), steps)


def sharded(steps: int) -> list[nn.Module]:
    net = _net()
    if dist.is_initialized():
        fully_shard(net)
    return [_train(net, steps), nn.Linear(1, 1)]


def scaled() -> Any:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = dp.replicate(_net().eval())
    each = 6 // world_size
    for micro in dp.accumulate(model, list(DATA.split(4))[rank * each : (rank + 1) * each]):
        (model(micro.data).square().mean() * micro.weight * world_size).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # Adam hides a scale
    return model


def of_the_rank() -> Any:
    model = dp.replicate(_net())
    with torch.no_grad():
        next(model.parameters()).add_(dist.get_rank() if dist.is_initialized() else 0)
    return model


def untrained() -> nn.Module:
    return _net()


def nothing() -> None:
    pass


def needs(path: str) -> None:
    pass


@pytest.mark.parametrize(("function", "reduction"), [(good, "strict"), (sharded, "fast")], ids=["strict", "sharded"])
def test_a_function_that_trains_alike(function: Any, reduction: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = dp.verify(function, (1, 3), steps=4, reduction=reduction, permutations=2)
    assert found.parity
    assert set(found.fingerprints) == {1, 3}
    assert set(found.ends) == {3}
    show(found, "loop")
    shown = capsys.readouterr().out
    assert "loop: at the end" in shown
    assert ("weights (tolerated)" in shown) == (reduction == "fast")
    assert found.fingerprints[3] in shown
    if reduction == "strict":
        assert len(set(found.fingerprints.values())) == 1
    else:
        assert all(one.value <= one.tolerance < 1e-2 for one in found.ends.values())
        assert found.ends[3].where  # on three processes sums have another order


@pytest.mark.parametrize(
    ("function", "message", "cause"),
    [
        (scaled, "the runs on 1 and 2 processes diverge at the end, 1.bias: relative difference", "FUNCTION"),
        (of_the_rank, "diverge at the end, 0.weight: rank 1 has other weights than rank 0", "UNREDUCED"),
    ],
)
def test_a_fault_is_found(function: Any, message: str, cause: str) -> None:
    with pytest.raises(dp.ParityError, match=message) as caught:
        dp.verify(function, (1, 2), permutations=2)
    assert CAUSES[cause].sentence in str(caught.value)


def test_what_is_no_function_for_it(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"needs\(\) needs path, but verify\(\) calls it without"):
        dp.verify(needs)
    dp.verify(untrained, (1,))
    assert "has taken no step of an optimizer" in caplog.text
    with pytest.raises(ValueError, match="is for a Task"):
        dp.verify(good, num_workers=1)
    with pytest.raises(TypeError, match="this function cannot be pickled"):
        dp.verify(lambda: None)
    with pytest.raises(dp.RankFailure, match=r"nothing\(\) returned NoneType: let it return the trained model"):
        dp.verify(nothing, (1,))


def test_by_its_name_and_a_task_that_a_function_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import ddparity as dp\nfrom tests.parity import test_functions, verify_cases\n"
        "def task():\n    return verify_cases.correct_task()\n"
        "def loop(steps, reduction):\n    return test_functions.good(steps, reduction)\n"
        "if __name__ == '__main__':\n    raise SystemExit('it ran')\n"
    )
    (tmp_path / "script.py").write_text(source)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    path = tmp_path / "script.py"
    assert isinstance(load_task(str(path)), dp.Task)
    found = dp.verify(f"{path}:loop", (1, 2), steps=2, reduction="strict")
    assert found.parity
    assert found.ends[2].value == 0

"""Test that a training goes on with a plan that only has more steps or epochs than the saved one."""

from __future__ import annotations

from pathlib import Path

import pytest

import ddparity as dp


def _seen(loader: dp.Loader, epochs: int, path: Path | None = None, stop: tuple[int, int] | None = None) -> list:
    """Return the samples, indices and seeds of each step, and save after step `stop`."""
    seen = []
    for epoch in loader.epochs(epochs):
        for step in loader.epoch(epoch):
            seen.append([(micro.index, micro.seed, micro.data.tolist()) for micro in step])
            if (epoch, step.number) == stop:
                dp.save_checkpoint(path, loader=loader)
                return seen
    if path is not None:
        dp.save_checkpoint(path, loader=loader)
    return seen


def _loader(samples: int, **options: object) -> dp.Loader:
    return dp.Loader(range(samples), dp.BatchPlan(samples, 4, 2, **{"shuffle": False, **options}))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("stop", [(0, 0), (0, 2), None])
def test_more_steps(stop: tuple[int, int] | None, drop_last: bool, tmp_path: Path) -> None:
    """12 samples are 3 steps. The longer plan continues with what an uninterrupted training would have had."""
    before = _seen(_loader(12, drop_last=drop_last), 1, tmp_path / "c", stop)
    longer = _loader(21, drop_last=drop_last)
    dp.load_checkpoint(tmp_path / "c", loader=longer)
    after = _seen(longer, 1)
    assert before + after == _seen(_loader(21, drop_last=drop_last), 1)


def test_more_epochs(tmp_path: Path) -> None:
    before = _seen(_loader(12, shuffle=True), 1, tmp_path / "c")
    again = _loader(12, shuffle=True)
    dp.load_checkpoint(tmp_path / "c", loader=again)
    assert before + _seen(again, 3) == _seen(_loader(12, shuffle=True), 3)


@pytest.mark.parametrize(
    ("samples", "stop", "options"),
    [
        (16, (0, 1), {"shuffle": True}),  # another order
        (16, (1, 1), {}),  # the second epoch had other samples
        (14, (0, 2), {"micro": 1}),  # another plan in other ways, too
        (8, (0, 1), {}),  # fewer samples
    ],
)
def test_what_would_be_another_training_is_refused(samples: int, stop: tuple, options: dict, tmp_path: Path) -> None:
    shuffle = bool(options.get("shuffle"))
    _seen(_loader(12, shuffle=shuffle), 2, tmp_path / "c", stop)
    plan = dp.BatchPlan(samples, 4, options.get("micro", 2), shuffle=shuffle)
    with pytest.raises(ValueError, match=f"num_samples=12 in the checkpoint and {samples} here"):
        dp.load_checkpoint(tmp_path / "c", loader=dp.Loader(range(samples), plan))


def test_a_short_step_that_is_done_is_refused(tmp_path: Path) -> None:
    _seen(_loader(10), 1, tmp_path / "c")  # its last step had 2 samples; in the longer plan it has 4
    with pytest.raises(ValueError, match="num_samples=10 in the checkpoint and 16 here"):
        dp.load_checkpoint(tmp_path / "c", loader=_loader(16))

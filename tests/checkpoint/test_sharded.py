"""Test checkpoints of sharded models: written by several ranks, read on any number, with other shards, or unsharded."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import ddparity as dp
from ddparity.checkpoint import sharded
from tests.checkpoint.test_checkpoint import Held
from tests.ranks import outcomes, run_ranks


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))  # no size is even for 2 or 3 ranks


def _sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = _net()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for step in range(steps):
        model(torch.linspace(0, 1, 20).reshape(4, 5) + step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _whole(value: object) -> object:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _prints(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    return dp.fingerprint(_whole(dict(model.state_dict()))), dp.fingerprint(_whole(optimizer.state_dict()))


def _save(path: str, background: bool = False) -> tuple[str, str]:
    if not dist.is_initialized():
        raise AssertionError("a sharded model needs a group")
    model, optimizer = _sharded()
    _stepped(model, optimizer)
    saving = dp.save_checkpoint(path, background=background, model=model, optimizer=optimizer, epoch=3)
    before = _prints(model, optimizer)
    if saving is not None:
        _stepped(model, optimizer)  # later changes are not in the file
        saving.wait()
    return before


def _load(path: str) -> tuple[str, str]:
    model, optimizer = _sharded()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert dp.load_checkpoint(path, model=model, optimizer=optimizer) == {"epoch": 3}
    prints = _prints(model, optimizer)
    _stepped(model, optimizer)  # the state is one that the optimizer works with
    return prints


@pytest.mark.parametrize("background", [False, True])
def test_it_is_read_on_another_number_of_ranks(background: bool, tmp_path: Path) -> None:
    path = tmp_path / "c"
    first, *others = run_ranks(_save, 3, str(path), background)
    assert others == [first] * 2
    assert len([name for name in os.listdir(path) if name.startswith("shard-")]) == 3
    for world_size in (2, 3):
        assert run_ranks(_load, world_size, str(path)) == [first] * world_size
    # One process without shards.
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters())
    nn.init.zeros_(model[0].weight)
    assert dp.load_checkpoint(path, model=model, optimizer=optimizer) == {"epoch": 3}
    assert (dp.fingerprint(dict(model.state_dict())), dp.fingerprint(optimizer.state_dict())) == first


def test_a_checkpoint_of_one_process_is_read_into_shards(tmp_path: Path) -> None:
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    _stepped(model, optimizer)
    dp.save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, epoch=3)
    expected = dp.fingerprint(dict(model.state_dict())), dp.fingerprint(optimizer.state_dict())
    assert run_ranks(_load, 2, str(tmp_path / "c")) == [expected] * 2


def _placed(path: str) -> list[bool]:
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(30.0).reshape(5, 6)
    placements = [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Replicate(), Replicate()), (Shard(1), Replicate())]
    state = {str(n): distribute_tensor(whole + n, mesh, placed) for n, placed in enumerate(placements)}
    dp.save_checkpoint(path, held=Held(state))
    targets = {name: torch.zeros_like(value) for name, value in reversed(state.items())}
    held = Held(targets)
    dp.load_checkpoint(path, held=held)
    return [held.state[name].full_tensor().equal(whole + int(name)) for name in state]


def test_any_placements(tmp_path: Path) -> None:
    assert run_ranks(_placed, 4, str(tmp_path / "c")) == [[True] * 4] * 4
    held = Held()
    dp.load_checkpoint(tmp_path / "c", held=held)
    assert held.state["2"].equal(torch.arange(30.0).reshape(5, 6) + 2)
    sizes = sum(file.stat().st_size for file in (tmp_path / "c").iterdir())
    assert sizes < 12_000  # what several ranks have is written once


def _returns_before_it_plans_and_writes(path: str) -> int:
    """Return how often this rank planned and wrote, each time after the call had returned."""
    model, optimizer = _sharded()
    _stepped(model, optimizer)
    returned, done = threading.Event(), [0]

    def after(right: Callable[..., Any]) -> Callable[..., Any]:
        def waits(*args: Any) -> Any:
            assert returned.wait(30), "the call waits for the work of its thread"
            done[0] += 1
            return right(*args)

        return waits

    work = {name: after(getattr(sharded, name)) for name in ("_chunks", "write_states", "_publish")}
    with mock.patch.multiple(sharded, **work):
        saving = dp.save_checkpoint(path, background=True, model=model, optimizer=optimizer)
        returned.set()
        saving.wait()
    return done[0]


def test_in_the_background_a_step_waits_for_the_copy_alone(tmp_path: Path) -> None:
    assert run_ranks(_returns_before_it_plans_and_writes, 2, str(tmp_path / "c")) == [4, 2]


def test_a_replaced_checkpoint_leaves_no_shards(tmp_path: Path) -> None:
    path = tmp_path / "c"
    run_ranks(_save_thrice, 2, str(path), None)
    assert len(os.listdir(path)) == 3
    for left in (
        ".shard-0123456789abcdef-1.safetensors.01234567-0123456789abcdef",
        "shard-0123456789abcdef-0.safetensors",
    ):
        (path / left).touch()  # of a save that was killed a day ago
        os.utime(path / left, (0, 0))
    run_ranks(_save_thrice, 2, str(path), 2)
    assert sorted(name for name in os.listdir(path) if "shard" not in name) == [sharded.MAIN, f"{sharded.MAIN}.1"]
    assert len(os.listdir(path)) == 2 + 2 * 2
    for name in (sharded.MAIN, f"{sharded.MAIN}.1"):
        held = Held()
        dp.load_checkpoint(path / name, held=held)
        assert held.state["x"].tolist() == [2.0 if name == sharded.MAIN else 1.0] * 5


def _save_thrice(path: str, keep: int | None) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for number in range(3):
        value = distribute_tensor(torch.full((5,), float(number)), mesh, [Shard(0)])
        dp.save_checkpoint(path, keep=keep, held=Held({"x": value}))


def _one_cannot_write(path: str, background: bool) -> str:
    mesh = init_device_mesh("cpu", (2,))
    state = {"x": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}
    Path(f"{path}.file").touch()
    with pytest.raises(
        (FileExistsError, dp.RankFailure), match=r"c\.file is a file, perhaps the checkpoint of a model"
    ):
        dp.save_checkpoint(f"{path}.file", held=Held(state))
    dp.save_checkpoint(path, held=Held(state))
    if dist.get_rank() == 1:
        os.fsync = _full  # type: ignore[assignment]
    try:
        saving = dp.save_checkpoint(path, background=background, held=Held({"x": state["x"] * 2}))
        if saving is not None:
            saving.wait()
    except (OSError, dp.RankFailure) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def _full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_of_one_rank_is_told_on_all_and_the_old_one_stays(background: bool, tmp_path: Path) -> None:
    path = tmp_path / "c"
    first, second = run_ranks(_one_cannot_write, 2, str(path), background)
    assert first.startswith("RankFailure: rank 1 failed in sav") and "No space left" in first
    assert second.startswith("OSError: [Errno 28]") and str(path) in second
    held = Held()
    dp.load_checkpoint(path, held=held)
    assert held.state["x"].tolist() == [1.0] * 4
    assert len(os.listdir(path)) == 3, os.listdir(path)


def _loaded(path: Path, model: nn.Module) -> str:
    """Load, and return what was refused; empty if nothing was."""
    try:
        dp.load_checkpoint(path, model=model)
    except ValueError as error:
        return str(error)
    return ""


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    run_ranks(_save, 2, str(path))
    model = _net()
    dp.load_checkpoint(path, model=model)
    expected, flips = dp.fingerprint(model), random.Random(0)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for _ in range(60):
            bit = flips.randrange(8 * len(content))
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            other = _net()
            said = _loaded(path, other)
            assert str(path) in said if said else dp.fingerprint(other) == expected
        file.write_bytes(content)
    one, two = sorted(path.glob("shard-*"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    with pytest.raises(ValueError, match="is not the file that"):
        dp.load_checkpoint(path, model=model)
    one.write_bytes(content)
    two.unlink()
    with pytest.raises(FileNotFoundError, match=two.name):
        dp.load_checkpoint(path, model=model)


def _save_on(path: str, seconds: float) -> int:
    mesh = init_device_mesh("cpu", (2,))
    number, stop = 0, time.monotonic() + seconds
    while dp.gather(time.monotonic() < stop, to="all")[0]:
        number += 1
        value = distribute_tensor(torch.full((64,), float(number)), mesh, [Shard(0)])
        dp.save_checkpoint(path, held=Held({"x": value}))
    return number


def _beside(path: str, seconds: float) -> int:
    """Load in another job while a job saves; each load is whole."""
    loads, stop = 0, time.monotonic() + seconds
    while not os.path.exists(f"{path}/{sharded.MAIN}") and time.monotonic() < stop:
        time.sleep(0.01)
    while time.monotonic() < stop:
        held = Held()
        dp.load_checkpoint(path, held=held)
        assert len(set(held.state["x"].tolist())) == 1
        loads += 1
    return loads


def test_readers_beside_a_writer(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    with ThreadPoolExecutor(2) as pool:
        writer = pool.submit(run_ranks, _save_on, 2, path, 2.5)
        reader = pool.submit(outcomes, _beside, 1, path, 3.0, in_world=False)
        assert writer.result()[0] > 3
        (outcome,) = reader.result()
    assert outcome.error is None, outcome.trace
    assert outcome.value > 3


def _what_is_wrong(path: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    dp.save_checkpoint(path, held=Held({"x": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}))
    try:
        dp.load_checkpoint(path, held=Held({"x": distribute_tensor(torch.ones(4, 1), mesh, [Shard(0)])}))
    except ValueError as error:
        return str(error)
    return "loaded"


def test_another_shape_is_refused(tmp_path: Path) -> None:
    for said in run_ranks(_what_is_wrong, 2, str(tmp_path / "c")):
        assert "does not fit held: x is (4,) of torch.float32 in the file and (4, 1)" in said
    (tmp_path / "file").write_text("")
    ended = outcomes(_what_is_wrong, 2, str(tmp_path / "file"))
    assert all(outcome.error for outcome in ended)
    with pytest.raises(IsADirectoryError):
        dp.save_checkpoint(tmp_path / "c", held=Held())

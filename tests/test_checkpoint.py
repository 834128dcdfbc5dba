from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import ddparity as dp
from tests.ranks import outcomes, run_ranks

Version = namedtuple("Version", "major minor")


def _trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))
    for _ in range(steps):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    model, optimizer = _trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    path = tmp_path / "new folder" / "c.safetensors"
    dp.save_checkpoint(path, model=model, optimizer=optimizer, scheduler=scheduler)
    other, other_optimizer = _trained(0)
    other_scheduler = torch.optim.lr_scheduler.StepLR(other_optimizer, 7)
    dp.load_checkpoint(path, model=other, optimizer=other_optimizer, scheduler=other_scheduler)
    assert dp.fingerprint(other) == dp.fingerprint(model)
    assert dp.fingerprint(other_optimizer.state_dict()) == dp.fingerprint(optimizer.state_dict())
    assert other_optimizer.state_dict()["param_groups"][0]["betas"] == (0.8, 0.9)
    assert other_scheduler.state_dict() == scheduler.state_dict()
    assert os.listdir(path.parent) == ["c.safetensors"]


def test_tied_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    dp.save_checkpoint(tmp_path / "c", model=model)
    before = dp.fingerprint(model)
    nn.init.zeros_(model[0].weight)
    dp.load_checkpoint(tmp_path / "c", model=model)
    assert dp.fingerprint(model) == before
    assert model[1].weight is model[0].weight


def _across(path: str) -> str:
    model = dp.replicate(_trained(dist.get_rank())[0])
    dp.save_checkpoint(path, model=model)
    other = dp.replicate(_trained(5)[0])
    dp.load_checkpoint(path, model=other)
    return dp.fingerprint(other)


def test_a_ddp_module_is_saved_without_its_wrapper(tmp_path: Path) -> None:
    prints = run_ranks(_across, 2, str(tmp_path / "c"))
    single = _trained(1)[0]
    dp.load_checkpoint(tmp_path / "c", model=single)
    assert prints == [dp.fingerprint(single)] * 2
    assert dp.fingerprint(single) != dp.fingerprint(_trained(1)[0])  # rank 0's weights came, untrained


def _cannot_write(path: str) -> None:
    dp.save_checkpoint(path, model=_trained(0)[0])


def test_a_failure_to_write_is_raised_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    ended = outcomes(_cannot_write, 2, str(tmp_path / "file" / "c"))
    assert "Error" in ended[0].error
    assert str(tmp_path / "file") in ended[0].error
    assert "RankFailure: rank 0 failed in save_checkpoint" in ended[1].error
    assert max(o.seconds for o in ended) < 10


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    model, _ = _trained()
    dp.save_checkpoint(path, model=model)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddparity.files._flush", full)
    with pytest.raises(OSError, match="No space left"):
        dp.save_checkpoint(path, model=_trained(9)[0])
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["c"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained()
    path = tmp_path / "c"
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}"):
        dp.load_checkpoint(path, model=model)
    dp.save_checkpoint(path, model=model)
    with pytest.raises(ValueError, match=r"no state of the name 'optimizer': it has model"):
        dp.load_checkpoint(path, optimizer=optimizer)
    whole = path.read_bytes()
    for length in (0, 7, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"c is (no whole checkpoint|damaged)"):
            dp.load_checkpoint(path, model=model)
    save_file({"0": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"no checkpoint of ddparity: its format is None"):
        dp.load_checkpoint(path, model=model)
    with pytest.raises(TypeError, match="epoch, a int, has no state_dict"):
        dp.save_checkpoint(path, epoch=3)


class _NamedState:
    def state_dict(self) -> dict:
        return {"version": Version(1, 2)}

    def load_state_dict(self, state: dict) -> None: ...


def test_a_state_of_named_types_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state_dict has a tests.test_checkpoint:Version.*tensors, numbers"):
        dp.save_checkpoint(tmp_path / "c", thing=_NamedState())


class _Hostile:
    """Its pickle would run code when loaded."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("hostile",)


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c").write_bytes(pickle.dumps(_Hostile()))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        dp.load_checkpoint("c", model=nn.Linear(1, 1))
    # A record in the metadata names a type: only structure that a state dict has is rebuilt.
    node = {"kind": "record", "type": "os:mkdir", "keys": 1, "items": []}
    text = json.dumps({"nodes": {"model": node}, "versions": {}, "about": {}, "torch": "2.6.0", "sha256": {}})
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    save_file({}, "c", {"format": "ddparity 2", "states": text, "sha256": sha256})
    with pytest.raises(ValueError, match="names the type os:mkdir"):
        dp.load_checkpoint("c", model=nn.Linear(1, 1))
    assert os.listdir(tmp_path) == ["c"]

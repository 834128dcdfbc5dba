from __future__ import annotations

import math
import os
import random
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import ddparity as dp
from ddparity.checkpoint import checkpoint
from ddparity.checkpoint.format import write_states
from ddparity.data.rng import preserve_streams
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
    assert dp.fingerprint(single) != dp.fingerprint(_trained(1)[0])  # the weights are those of rank 0


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

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        dp.save_checkpoint(path, model=_trained(9)[0])
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["c"]


def test_other_programs_find_the_tensors_by_name(tmp_path: Path) -> None:
    """The library of the safetensors format reads the file independently."""
    model, optimizer = _trained()
    dp.save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    found = load_file(tmp_path / "c")
    for name, value in model.state_dict().items():
        assert found[f"model.{name}"].equal(value) and found[f"model.{name}"].dtype == value.dtype
    assert found["optimizer.state.0.exp_avg"].equal(optimizer.state_dict()["state"][0]["exp_avg"])


class Held:
    """An object with any state."""

    def __init__(self, state: dict | None = None) -> None:
        self.state = state or {}

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def test_values_of_every_kind_come_back(tmp_path: Path) -> None:
    dtypes = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.float8_e4m3fn,
    ]  # fmt: skip
    state = {
        "tensors": {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes},
        "layouts": [torch.arange(6).reshape(2, 3).T, torch.tensor(3.5), torch.empty(0, 4), torch.arange(9)[::3]],
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "plain": [1, 2.5, None, "text", True, 1 << 100, math.inf, -0.0, 2 + 3j],
        "alike": {"a.b": 1, "a": {"b": 2}, 0: 3, "0": 4},
        "nested": ({}, [], (), [[1], {"x": (2, "y")}]),
        "array": np.arange(4, dtype=np.uint32),
    }
    dp.save_checkpoint(tmp_path / "c", held=Held(state), **{"a.b": Held({"x": 1}), "a": Held({"b.x": 2})})
    held, one, two = Held(), Held(), Held()
    dp.load_checkpoint(tmp_path / "c", held=held, **{"a.b": one, "a": two})
    assert (one.state, two.state) == ({"x": 1}, {"b.x": 2})
    _assert_same(held.state, state)


def _assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            _assert_same(one, two)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and a.resolve_conj().tolist() == b.resolve_conj().tolist()
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, strict=True)
    else:
        assert repr(a) == repr(b)


def test_a_scaler_and_schedulers(tmp_path: Path) -> None:
    _, optimizer = _trained()
    objects = {
        "scaler": torch.amp.GradScaler("cpu", init_scale=8.0),
        "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3),
        "cycle": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10),
    }
    objects["scaler"].scale(torch.ones(1))  # the scale is created at the first use
    dp.save_checkpoint(tmp_path / "c", **objects)
    expected = {name: dict(value.state_dict()) for name, value in objects.items()}
    objects["scaler"].update(2.0)
    objects["plateau"].step(3.0)
    dp.load_checkpoint(tmp_path / "c", **objects)
    assert {name: value.state_dict() for name, value in objects.items()} == expected


class Scaled(nn.Linear):
    """A layer with a second version of its state. States of the first version have half the weight and no version."""

    _version = 2

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *others: object) -> None:
        if metadata.get("version") is None:
            state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_layers_find_the_version_of_their_state(tmp_path: Path) -> None:
    model, other = (nn.Sequential(Scaled(2, 2), nn.Linear(2, 2)) for _ in range(2))
    dp.save_checkpoint(tmp_path / "c", model=model)
    dp.load_checkpoint(tmp_path / "c", model=other)
    assert dp.fingerprint(other) == dp.fingerprint(model)


def test_a_compiled_module_is_saved_without_its_wrapper(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    dp.save_checkpoint(tmp_path / "c", model=torch.compile(model))
    plain = nn.Linear(2, 2)
    dp.load_checkpoint(tmp_path / "c", model=plain)
    assert dp.fingerprint(plain) == dp.fingerprint(model)


def _draws() -> list[float]:
    return [random.gauss(0, 1), np.random.standard_normal(), torch.rand(()).item()]


def test_random_streams_go_on(tmp_path: Path) -> None:
    with preserve_streams():
        dp.seed_everything(3)
        _draws()  # Python and NumPy now hold a second normal number for the next call
        dp.save_checkpoint(tmp_path / "c", random=dp.RandomState())
        expected = _draws() + _draws()
        dp.seed_everything(4)
        dp.load_checkpoint(tmp_path / "c", random=dp.RandomState())
        assert _draws() + _draws() == expected


@pytest.mark.gpu
def test_the_gpus_stream_goes_on(tmp_path: Path) -> None:
    torch.rand(3, device="cuda")
    dp.save_checkpoint(tmp_path / "c", random=dp.RandomState())
    expected = torch.rand(5, device="cuda")
    dp.load_checkpoint(tmp_path / "c", random=dp.RandomState())
    assert torch.rand(5, device="cuda").equal(expected)


def _numbered(folder: Path) -> dict[str, int]:
    found = {}
    for path in sorted(folder.iterdir()):
        held = Held()
        dp.load_checkpoint(path, held=held)
        found[path.name] = held.state["number"]
    return found


def test_the_last_n_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "c"
    for number in range(5):
        dp.save_checkpoint(path, keep=3, held=Held({"number": number}))
        assert _numbered(tmp_path) == {"c" + f".{n}" * (n > 0): number - n for n in range(3) if n <= number}
    dp.save_checkpoint(path, held=Held({"number": 5}))  # without keep the other files stay as they are
    assert _numbered(tmp_path) == {"c": 5, "c.1": 3, "c.2": 2}
    (tmp_path / "c.1").unlink()  # a gap is filled before a file is deleted
    dp.save_checkpoint(path, keep=3, held=Held({"number": 6}))
    assert _numbered(tmp_path) == {"c": 6, "c.1": 5, "c.2": 2}
    dp.save_checkpoint(path, keep=2, held=Held({"number": 7}))
    assert _numbered(tmp_path) == {"c": 7, "c.1": 6}
    dp.save_checkpoint(path, keep=1, held=Held({"number": 8}))
    assert _numbered(tmp_path) == {"c": 8}
    for keep in (0, 2.5, True, "3"):
        with pytest.raises(ValueError, match=rf"keep={keep!r}\): keep also counts the new file, so give an integer"):
            dp.save_checkpoint(path, keep=keep, held=Held())  # type: ignore[call-overload]


def test_names_of_others_are_left_alone(tmp_path: Path) -> None:
    others = [
        "c.7x",
        "c.old",
        "d.2",
        ".c.x",
        "c.1.2",
        ".c.0123abcd-0123",
        f".c.{os.getpid()}",
        ".d.0123abcd-0123456789abcdef",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    for number in range(3):
        dp.save_checkpoint(tmp_path / "c", keep=1, held=Held({"number": number}))
    os.makedirs(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == sorted(["c", "folder", *others])
    with pytest.raises(IsADirectoryError, match=f"this is a folder: '{tmp_path}/folder'"):
        dp.save_checkpoint(tmp_path / "folder", held=Held())


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    for number in range(4):
        dp.save_checkpoint(tmp_path / "c", keep=3, held=Held({"number": number}))
    assert _numbered(tmp_path) == {"c": 3, "c.1": 2, "c.2": 1}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "disk" / "c")
    dp.save_checkpoint(tmp_path / "c", held=Held({"number": 1}))
    assert (tmp_path / "c").is_symlink() and not (tmp_path / "disk" / "c").is_symlink()
    assert _numbered(tmp_path / "disk") == {"c": 1}


def test_in_the_background_the_state_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, go_on = tmp_path / "c", threading.Event()

    def slow(*arguments: object) -> None:
        assert go_on.wait(30)
        write_states(*arguments)

    monkeypatch.setattr("ddparity.checkpoint.checkpoint.write_states", slow)
    model, optimizer = _trained()
    before = dp.fingerprint(model), dp.fingerprint(optimizer.state_dict())
    saving = dp.save_checkpoint(path, background=True, model=model, optimizer=optimizer)
    assert not path.exists()
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    assert dp.fingerprint(model) != before[0]
    go_on.set()
    saving.wait()
    saving.wait()
    dp.load_checkpoint(path, model=model, optimizer=optimizer)
    assert (dp.fingerprint(model), dp.fingerprint(optimizer.state_dict())) == before


@pytest.mark.parametrize("then", ["wait", "save", "load"])
def test_a_failure_in_the_background_is_raised_once_and_logged(
    then: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    saving = dp.save_checkpoint(tmp_path / "file" / "c", background=True, held=Held())
    other = partial(dp.load_checkpoint if then == "load" else dp.save_checkpoint, tmp_path / "other", held=Held())
    with pytest.raises(OSError, match="file"):
        saving.wait() if then == "wait" else other()
    assert "a checkpoint was not saved: " in caplog.text
    dp.save_checkpoint(tmp_path / "other", held=Held())


def _fails_in_the_background(path: str) -> list[str]:
    told = []
    dp.save_checkpoint(path, background=True, held=Held())
    for _ in range(2):
        try:
            dp.save_checkpoint(Path(path).parent.parent / "c", held=Held())
        except (OSError, dp.RankFailure) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_the_next_save_tells_every_rank_of_a_failure_in_the_background(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    first, second, third = run_ranks(_fails_in_the_background, 3, str(tmp_path / "file" / "c"))
    assert len(first) == 1 and str(tmp_path / "file") in first[0]
    assert len(second) == 1 and second[0].startswith("RankFailure: rank 0 failed in saving")
    assert second == third
    assert (tmp_path / "c").is_file()


def _end_during_a_save(path: str) -> bool:
    def slow(*arguments: object) -> None:
        time.sleep(0.3)  # longer than the process would live otherwise
        write_states(*arguments)

    checkpoint.write_states = slow
    dp.save_checkpoint(path, background=True, model=nn.Linear(2, 2))
    return Path(path).exists()


def test_the_process_ends_after_the_save_in_the_background(tmp_path: Path) -> None:
    (outcome,) = outcomes(_end_during_a_save, 1, str(tmp_path / "c"))
    assert (outcome.value, outcome.exitcode) == (False, 0)
    dp.load_checkpoint(tmp_path / "c", model=nn.Linear(2, 2))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained()
    path = tmp_path / "c"
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}"):
        dp.load_checkpoint(path, model=model)
    dp.save_checkpoint(path, model=model)
    with pytest.raises(ValueError, match=r"no state with the name 'optimizer': it has model"):
        dp.load_checkpoint(path, optimizer=optimizer)
    whole = path.read_bytes()
    for length in (0, 7, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"c is (not a complete checkpoint|damaged)"):
            dp.load_checkpoint(path, model=model)
    save_file({"0": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"not a ddparity checkpoint of this version: its format is None"):
        dp.load_checkpoint(path, model=model)


def _wider() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_wider(), r"size mismatch for 0.weight: .*\[4, 3\].*\[5, 3\]"),
        (nn.Sequential(nn.Linear(3, 4)), r"Unexpected key\(s\) in state_dict: \"1.weight\""),
        (nn.Sequential(*_trained(0)[0], nn.Linear(2, 2)), r"Missing key\(s\) in state_dict: \"3.weight\""),
        (_trained(0)[0].double(), r"0.weight is torch.float32 in the file and torch.float64 here: .* with .to\(\)"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_file_and_key(other: nn.Module, message: str, tmp_path: Path) -> None:
    dp.save_checkpoint(tmp_path / "c", model=_trained()[0])
    with pytest.raises(ValueError, match=rf"(?s){tmp_path}/c does not fit model, a Sequential: .*{message}"):
        dp.load_checkpoint(tmp_path / "c", model=other)


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """torch takes such a state without an error, and fails in a later step."""
    dp.save_checkpoint(tmp_path / "c", optimizer=_trained()[1])
    other = torch.optim.AdamW(_wider().parameters())
    with pytest.raises(
        ValueError, match=r"c does not fit optimizer, a AdamW: parameter 0 of group 0 is \(4, 3\).*\(5, 3\) here"
    ):
        dp.load_checkpoint(tmp_path / "c", optimizer=other)
    with pytest.raises(ValueError, match=r"its groups have \[6\] parameters in the file and \[2\] here"):
        dp.load_checkpoint(tmp_path / "c", optimizer=torch.optim.AdamW(_trained()[0][0].parameters()))


def test_another_torch_version_loads_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = _trained()[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.5.9+cpu")
        dp.save_checkpoint(tmp_path / "c", model=model)
    with caplog.at_level("INFO", "ddparity.checkpoint.checkpoint"):
        dp.load_checkpoint(tmp_path / "c", model=model)
    assert f"{tmp_path}/c was written by torch 2.5.9, and this is torch " in caplog.text
    with pytest.raises(ValueError, match=r"written by torch 2.5.9\+cpu, read by "):
        dp.load_checkpoint(tmp_path / "c", model=nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": {1, 2}}}, r"the state of held cannot be saved: held\['a'\]\['b'\] is a set"),
        ({"a": {1.5: 2}}, r"held\['a'\] has the key 1.5, a float"),
        ({"a": torch.eye(2).to_sparse()}, r"held\['a'\] is a torch.sparse_coo tensor"),
        (
            {"\ud800": 1},
            r"a key, a number or a layer's version in the states of held cannot be written as JSON: .*surrogates",
        ),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_what_cannot_be_saved_is_named_and_the_old_file_stays(
    state: dict, message: str, background: bool, tmp_path: Path
) -> None:
    dp.save_checkpoint(tmp_path / "c", held=Held({"number": 1}))
    with pytest.raises(TypeError, match=message):
        dp.save_checkpoint(tmp_path / "c", background=background, held=Held(state))
    assert _numbered(tmp_path) == {"c": 1}


def test_more_than_a_file_can_describe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddparity.checkpoint.format._LARGEST_HEADER", 10_000)
    with pytest.raises(
        ValueError,
        match=r"100 tensors, with all lists and numbers, need a header of [\d,]+ bytes, but the format allows 10,000",
    ):
        dp.save_checkpoint(tmp_path / "c", held=Held({"a": [torch.ones(1)] * 100}))
    assert os.listdir(tmp_path) == []

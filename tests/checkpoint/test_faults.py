"""Test faults of a checkpoint: the writer is killed at any instant, the disk is full, the file is cut, a bit flips."""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.checkpoint.format import describe_states, write_states
from tests.checkpoint.kills import Numbered, killed_at_each_call, killed_at_random, loaded
from tests.ranks import outcomes


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory if there is one. A flush to a disk also waits for the writes of other processes."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as temporary:
        yield Path(temporary)


@pytest.mark.parametrize(("keep", "background"), [(None, False), (3, False), (None, True)])
def test_a_kill_at_a_random_instant_loses_nothing(keep: int | None, background: bool, folder: Path) -> None:
    """The benchmark kills at 200 instants of each kind, and on a disk."""
    (outcome,) = outcomes(killed_at_random, 1, str(folder), 12, keep, background, in_world=False, timeout_s=240)
    assert outcome.error is None, outcome.trace


@pytest.mark.parametrize("keep", [None, 3])
def test_a_kill_at_each_system_call_loses_nothing(keep: int | None, folder: Path) -> None:
    """The benchmark also kills after each call, when the disk is as before the next one."""
    (outcome,) = outcomes(killed_at_each_call, 1, str(folder), keep, False, in_world=False, timeout_s=240)
    assert outcome.error is None, outcome.trace
    new = outcome.value
    assert len(new) > 20
    assert new == sorted(new) and set(new) == {False, True}  # the old file, and from some instant on the new one


def _small() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def _refused_or_exact(path: Path, expected: tuple[str, str]) -> str | None:
    """Return the message of the error; None if everything was loaded as it was saved."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    try:
        dp.load_checkpoint(path, model=model, optimizer=optimizer)
    except ValueError as error:
        return str(error)
    assert (dp.fingerprint(model), dp.fingerprint(optimizer.state_dict())) == expected
    return None


def test_a_file_that_is_cut_anywhere_is_refused(folder: Path) -> None:
    path, model = folder / "last.safetensors", nn.Linear(2, 1)
    dp.save_checkpoint(path, model=model)
    content = path.read_bytes()
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=rf"{path} is (not a complete checkpoint|damaged)"):
            dp.load_checkpoint(path, model=model)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=rf"{path} is not a complete checkpoint"):
        dp.load_checkpoint(path, model=model)


def _flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:  # in place, because some file systems flush a file that is written again
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ 1 << bit % 8
        file.seek(bit // 8)
        file.write(bytes([byte]))


def test_flipped_bits_are_refused(folder: Path) -> None:
    path = folder / "last.safetensors"
    model, optimizer = _small()
    dp.save_checkpoint(path, model=model, optimizer=optimizer)
    content, expected = path.read_bytes(), (dp.fingerprint(model), dp.fingerprint(optimizer.state_dict()))
    header = 8 + int.from_bytes(content[:8], "little")
    randomly = random.Random(0).sample(range(8 * len(content)), 500)
    # Also all bits of the header's length, and more of the data, because these parts are small.
    for bit in [*range(64), *randomly, *range(8 * header, 8 * len(content), 3)]:
        _flip(path, bit)
        message = _refused_or_exact(path, expected)
        _flip(path, bit)
        assert message is None or str(path) in message, (bit, message)
        if bit >= 8 * header:
            assert message is not None and re.search(r"damaged: (model|optimizer)\.\S+ differs from what", message), bit


def test_a_damaged_file_points_to_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "c"
    for number in range(2):
        dp.save_checkpoint(path, keep=2, state=Numbered(number))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="c is not a complete checkpoint") as caught:
        loaded(path)
    assert caught.value.__notes__ == [f"the checkpoint before it is {path}.1"]
    assert loaded(tmp_path / "c.1") == 0


def _damaged_on_one_rank(folder: str, damage: str) -> None:
    """Load on ranks that each see their own file, as on the disks of several machines."""
    rank = dist.get_rank()
    path = Path(folder) / f"disk{rank}"
    path.mkdir()
    os.chdir(path)
    model = nn.Linear(3, 1 + (damage == "other shape" and rank))
    torch.manual_seed(rank if damage == "other content" else 0)
    _save_alone(Path("c"), nn.Linear(3, 1))
    if rank == 1 and damage == "cut":
        content = Path("c").read_bytes()
        Path("c").write_bytes(content[:-3])
    if rank == 1 and damage == "missing":
        Path("c").unlink()
    dp.load_checkpoint("c", model=model)


def _save_alone(path: Path, model: nn.Module) -> None:
    with open(path, "w+b") as file:
        write_states(file, describe_states({"model": model.state_dict()}, {}))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ("cut", "ValueError: c is not a complete checkpoint"),
        ("missing", "FileNotFoundError: there is no checkpoint at c"),
        ("other shape", r"ValueError: c does not fit model, a Linear: .*size mismatch for weight"),
        ("other content", "ValueError: the content of c differs between ranks"),
    ],
)
def test_a_failure_to_load_on_one_rank_is_raised_on_all(damage: str, error: str, tmp_path: Path) -> None:
    ended = outcomes(_damaged_on_one_rank, 3, str(tmp_path), damage)
    assert any(re.search(error, o.error, re.DOTALL) for o in ended), [o.error for o in ended]
    for outcome in ended:
        assert "RankFailure: rank" in outcome.error or re.search(error, outcome.error, re.DOTALL)
        assert outcome.seconds < 10


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no permission to mount a small file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def _too_large(path: str, background: bool, limit: int | None) -> list[str]:
    if limit is not None and dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    told = []
    dp.save_checkpoint(path, state=Numbered(1))
    large = nn.Linear(1000, 1000)
    try:
        saving = dp.save_checkpoint(path, model=large, background=background)
        if saving is not None:
            saving.wait()
    except (OSError, dp.RankFailure) as error:
        told.append(f"{type(error).__name__}: {error}")
    told.append(str(loaded(Path(path))))
    dp.save_checkpoint(path, state=Numbered(2))  # the disk has room again
    told.append(str(loaded(Path(path))))
    return told


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_on_every_rank_and_leaves_the_old_one(full_disk: Path, background: bool) -> None:
    path = full_disk / "c"
    _check_told(outcomes(_too_large, 2, str(path), background, None), path, "No space left on device")


@pytest.mark.parametrize("background", [False, True])
def test_a_file_too_large_is_told_on_every_rank_and_leaves_the_old_one(tmp_path: Path, background: bool) -> None:
    path = tmp_path / "c"
    _check_told(outcomes(_too_large, 2, str(path), background, 1_000_000), path, "File too large")


def _check_told(ended: list, path: Path, reason: str) -> None:
    (first, *after), (second, *after_second) = [outcome.value for outcome in ended]
    assert first.startswith("OSError: [Errno") and reason in first and str(path) in first
    assert second.startswith("RankFailure: rank 0 failed in sav") and reason in second
    assert after == after_second == ["1", "2"]
    assert os.listdir(path.parent) == ["c"]

"""Test how a file is replaced: drafts that nobody can plant or share, modes, owners, readers and writers beside it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import ddparity as dp
from ddparity.checkpoint import atomic
from tests.checkpoint.test_checkpoint import Held
from tests.ranks import outcomes, run_ranks


def _number(path: Path) -> int:
    return int(dp.load_checkpoint(path)["number"])


def test_what_an_earlier_save_cannot_have_left_stays(tmp_path: Path) -> None:
    (tmp_path / "c.100").mkdir()
    for name in ("c.3", "c.4", "c.2026", "c.007"):
        (tmp_path / name).touch()
    for _ in range(4):
        with atomic.replacing(tmp_path / "c", keep=3) as draft:
            draft.write(b"x")
    assert sorted(os.listdir(tmp_path)) == ["c", "c.007", "c.1", "c.100", "c.2", "c.2026"]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_with_the_name_of_an_earlier_file_is_not_touched(number: int, linked: bool, tmp_path: Path) -> None:
    folder = tmp_path / f"c.{number}"
    target = tmp_path / "of the user" if linked else folder
    target.mkdir()
    if linked:
        folder.symlink_to(target)
    (target / "notes").write_text("mine")
    dp.save_checkpoint(tmp_path / "c", number=1)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(FileExistsError, match=rf"keep=3 .* move it.*c\.{number}'"):
        dp.save_checkpoint(tmp_path / "c", keep=3, number=2)
    assert sorted(os.listdir(tmp_path)) == before
    assert (folder / "notes").read_text() == "mine"
    for keep in (None, number):
        dp.save_checkpoint(tmp_path / "c", keep=keep, number=3)
        assert _number(tmp_path / "c") == 3


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        for keep in (None, 2):
            with pytest.raises(FileExistsError, match=r"this is no file, and a new .*pipe"):
                dp.save_checkpoint(tmp_path / name, keep=keep, number=1)
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)  # as if the name could be guessed
    name = f".c.{atomic._machine()}-{'0' * 16}"
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        dp.save_checkpoint(tmp_path / "c", number=1)
    (tmp_path / f".c.{os.getpid()}").symlink_to(victim)  # the name that an earlier version would have used
    monkeypatch.undo()
    dp.save_checkpoint(tmp_path / "c", number=1)
    assert victim.read_text() == "mine"
    assert _number(tmp_path / "c") == 1


def test_the_drafts_of_the_dead_are_deleted_and_those_of_the_living_stay(tmp_path: Path) -> None:
    machine, other = atomic._machine(), "0123abcd"
    dead, alive, elsewhere, old = (tmp_path / f".c.{m}-{n * 16}" for m, n in zip([machine] * 2 + [other] * 2, "1234"))
    for draft in (dead, alive, elsewhere, old):
        draft.write_text("a draft")
    os.utime(old, (0, 0))
    with open(alive) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        dp.save_checkpoint(tmp_path / "c", number=1)
        assert sorted(os.listdir(tmp_path)) == sorted([alive.name, elsewhere.name, "c"])
    dp.save_checkpoint(tmp_path / "c", number=2)
    assert sorted(os.listdir(tmp_path)) == sorted([elsewhere.name, "c"])


@pytest.mark.parametrize("keep", [None, 2])
def test_the_mode_of_the_replaced_file_is_kept(keep: int | None, tmp_path: Path) -> None:
    path, umask = tmp_path / "c", os.umask(0o027)
    try:
        dp.save_checkpoint(path, keep=keep, number=0)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o444):
            path.chmod(mode)
            dp.save_checkpoint(path, keep=keep, number=1)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(umask)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_the_owner_of_the_replaced_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    dp.save_checkpoint(path, number=0)
    os.chown(path, 1234, 4321)
    path.chmod(0o660)
    dp.save_checkpoint(path, number=1)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 4321, 0o660)

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.fchown", refuse)  # as for another user: no other group may read what the old one could
    dp.save_checkpoint(path, number=2)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o600)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_flushed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems do not flush folders. A disk that fails is a failure."""
    flush = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr("os.fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match="c'"):
            dp.save_checkpoint(tmp_path / "c", number=1)
    else:
        dp.save_checkpoint(tmp_path / "c", number=1)
        assert _number(tmp_path / "c") == 1


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    for number in range(4):
        dp.save_checkpoint(tmp_path / "c", keep=3, number=number)
    assert sorted(os.listdir(tmp_path)) == ["c", "c.1", "c.2"]
    assert [_number(tmp_path / name) for name in ("c", "c.1", "c.2")] == [3, 2, 1]


@pytest.mark.parametrize("name", ["c" * 250, "\u4e16" * 83, "c" * 255])
def test_long_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for number in range(2):
        dp.save_checkpoint(path, number=number)
    assert _number(path) == 1
    assert os.listdir(tmp_path) == [name]
    if len(name) == 250:
        dp.save_checkpoint(path, keep=2, number=2)
        assert sorted(os.listdir(tmp_path)) == [name, f"{name}.1"]
    if len(name) == 255:
        with pytest.raises(OSError, match="File name too long"):
            dp.save_checkpoint(path, keep=2, number=2)
        assert _number(path) == 1
        assert os.listdir(tmp_path) == [name]


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., int] = os.open

    def refuse(path: object, flags: int, *arguments: int, **options: int) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr("os.open", refuse)
    dp.save_checkpoint(tmp_path / "c", number=1)
    monkeypatch.undo()
    assert _number(tmp_path / "c") == 1


_NEW_PIDS = 0x20000000  # CLONE_NEWPID of Linux


def _job(folder: str, value: float, keep: int) -> None:
    """Save until the file `stop` is there, as process 1 where the system allows it, as in a container."""
    if ctypes.CDLL(None).unshare(_NEW_PIDS):
        return _saves(folder, value, keep)
    child = os.fork()
    if not child:
        code = 1
        try:
            assert os.getpid() == 1
            _saves(folder, value, keep)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    return None


def _saves(folder: str, value: float, keep: int) -> None:
    deadline = time.monotonic() + 120
    while not Path(folder, "stop").exists():
        assert time.monotonic() < deadline
        dp.save_checkpoint(Path(folder, "c"), keep=keep, weight=torch.full((128, 128), value), value=value)


def _beside(folder: str, count: int) -> list[float]:
    """Load until `count` loads are done, and check that each has the values of one save."""
    path, found, deadline = Path(folder) / "c", [], time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, "no file was saved"
        time.sleep(0.01)
    while len(found) < count or (len(set(found)) < 2 and time.monotonic() < deadline):
        state = dp.load_checkpoint(path)
        assert state["weight"].equal(torch.full((128, 128), state["value"]))
        found.append(state["value"])
    Path(folder, "stop").touch()
    return found


def test_readers_beside_two_jobs_with_equal_process_ids(tmp_path: Path) -> None:
    """No load fails or mixes two saves, and no save fails. Each writer is process 1 where the system allows it."""
    keep = 3
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(outcomes, _job, 1, str(tmp_path), value, keep, in_world=False, timeout_s=200)
            for value in (1.0, 2.0)
        ]
        try:
            readers = run_ranks(_beside, 2, str(tmp_path), 30, timeout_s=180)
        finally:
            (tmp_path / "stop").touch()
    for job in jobs:
        (outcome,) = job.result()
        assert outcome.error is None and outcome.exitcode in (0, None), outcome
    assert readers[0] == readers[1] and len(readers[0]) >= 30  # both ranks read the same files
    left = sorted(name for name in os.listdir(tmp_path) if name != "stop")
    assert left == ["c", *(f"c.{number}" for number in range(1, keep))], left


def _many_readers(path: str) -> int:
    model, done = nn.Linear(256, 256), 0
    while not Path(path).with_name("stop").exists():
        dp.load_checkpoint(path, m=model)
        assert len(set(model.weight.flatten().tolist())) == 1
        done += 1
    return done


def test_a_reader_beside_one_writer(tmp_path: Path) -> None:
    """An earlier version opened the file twice, and 2 loads of a hundred read two files."""
    path = tmp_path / "c"
    model = nn.Linear(256, 256)
    reader = None
    with ThreadPoolExecutor(1) as pool:
        for number in range(150):
            nn.init.constant_(model.weight, float(number))
            dp.save_checkpoint(path, m=model)
            reader = reader or pool.submit(outcomes, _many_readers, 1, str(path), in_world=False)
        (tmp_path / "stop").touch()
        (outcome,) = reader.result()
    assert outcome.error is None, outcome.trace
    assert dp.load_checkpoint(path, m=Held()) == {}

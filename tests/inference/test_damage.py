"""Damaged directories of predictions: no bit is wrong in silence, and the next predict() mends what is damaged."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ddparity as dp
from ddparity.inference import directory, reading
from tests.inference.damage import run
from tests.ranks import run_ranks


def test_no_damage_is_silent(tmp_path: Path) -> None:
    counts = run(tmp_path, flips=60, swaps=30)
    assert sum(count["mended"] for count in counts.values()) > 10
    for kind, count in counts.items():
        assert not count["silent"], kind
        assert count["refused"] or kind == "a bit of _common_metadata", kind
        assert not count["exact"] or kind in ("a bit of _common_metadata", "two blocks of a part exchanged"), kind


def _doubles(x: torch.Tensor) -> torch.Tensor:
    return x.double()[:, None] * 2


def _writes(path: Path | str) -> Path:
    return dp.predict(_doubles, torch.arange(12), 2, path, rows_per_file=4, key="a")


def test_other_readers_can_check_the_pages(tmp_path: Path) -> None:
    file = _writes(tmp_path) / "part-000000000004.parquet"
    data, column = bytearray(file.read_bytes()), pq.read_metadata(file).row_group(0).column(1)
    start = min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset is not None)
    data[start + column.total_compressed_size - 1] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        pq.read_table(file, page_checksum_verification=True)


def test_the_index_is_checked_too(tmp_path: Path) -> None:
    """A part that somebody wrote, with the digest of its bytes, still has to hold the samples that it should."""
    file = _writes(tmp_path) / "part-000000000004.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "index", pa.array([4, 5, 7, 6])), file)
    token, run, digests = reading.read_run(tmp_path)
    digests[1] = reading.hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "_run.json").write_bytes(reading.run_text(token, run, digests))
    with pytest.raises(ValueError, match=r'part-000000000004.parquet does not hold the samples 4 to 7, by .* "index"'):
        dp.read_predictions(tmp_path)


def test_each_damaged_part_is_named(tmp_path: Path) -> None:
    one, other = (_writes(tmp_path) / f"part-00000000000{start}.parquet" for start in (0, 8))
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1]), other.write_bytes(contents[0])
    with pytest.raises(
        ValueError, match=f"is damaged: {one.name} has the SHA-256 .*; {other.name} has .* The same predict"
    ):
        dp.read_predictions(tmp_path)
    run_ranks(_writes, 3, str(tmp_path))
    assert (one.read_bytes(), other.read_bytes()) == contents
    assert torch.equal(dp.read_predictions(tmp_path), _doubles(torch.arange(12)))


def test_a_part_of_another_run_is_refused(tmp_path: Path) -> None:
    _writes(tmp_path / "one")
    dp.predict(lambda x: _doubles(x) + 1, torch.arange(12), 2, tmp_path / "other", rows_per_file=4, key="a")
    shutil.copy(tmp_path / "other" / "part-000000000004.parquet", tmp_path / "one")
    with pytest.raises(ValueError, match=r"part-000000000004\.parquet has the SHA-256"):
        dp.read_predictions(tmp_path / "one")


def test_digests_are_in_one_file_at_the_end(tmp_path: Path) -> None:
    run_ranks(_writes, 2, str(tmp_path))
    assert not list(tmp_path.glob("*.sha256"))
    _, run, digests = reading.read_run(tmp_path)
    assert reading.whole_parts(tmp_path, run, digests) == [0, 1, 2]


def test_a_part_that_was_written_before_an_interruption_is_kept_if_it_is_whole(tmp_path: Path) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        if 10 in x:
            raise OSError("lost")
        return _doubles(x)

    fails.__qualname__ = _doubles.__qualname__
    with pytest.raises(dp.DDParityError, match="lost"):
        dp.predict(fails, torch.arange(12), 2, tmp_path, rows_per_file=4, key="a")
    first, second = (tmp_path / f"part-00000000000{start}.parquet" for start in (0, 4))
    second.write_bytes(second.read_bytes()[::-1])
    written = first.stat().st_mtime_ns
    _writes(tmp_path)
    assert torch.equal(dp.read_predictions(tmp_path), _doubles(torch.arange(12)))
    assert first.stat().st_mtime_ns == written


@pytest.mark.parametrize("moment", range(4))
def test_a_reader_beside_the_end_of_a_call_sees_no_damage(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call ends, so digests go from their own files to one, after as many of the reader's looks at them."""
    token, run, digests = reading.read_run(_writes(tmp_path))
    (tmp_path / "_run.json").write_bytes(reading.run_text(token, run, {}))
    for number, digest in digests.items():  # of three ranks
        line = reading.digest_line(reading.file_of(tmp_path, run, number), digest)
        reading.new_digest_file(tmp_path).write_text(line)
    looks = 0

    def counted(look: Callable[..., Any]) -> Callable[..., Any]:
        def counts(*arguments: Any) -> Any:
            nonlocal looks
            if looks == moment:
                directory._record(tmp_path, token, run, range(3))
            looks += 1
            return look(*arguments)

        return counts

    monkeypatch.setattr(reading, "read_run", counted(reading.read_run))
    monkeypatch.setattr(reading, "new_digests", counted(reading.new_digests))
    assert torch.equal(dp.read_predictions(tmp_path), _doubles(torch.arange(12)))
    assert looks == 3 and (moment == 3 or not list(tmp_path.glob("*.sha256")))


def test_a_line_of_digests_that_is_no_whole_one_counts_as_none(tmp_path: Path) -> None:
    """A crash may cut the last line off; a line may also be of another file, or of a part that does not exist."""
    _, run, _ = reading.read_run(_writes(tmp_path))
    whole = reading.digest_line(reading.file_of(tmp_path, run, 1), "a" * 64)
    torn = (whole[:-1], whole.replace("4.p", "5.p"), whole.replace("4.p", "2.p"), whole[1:], "\xff\n", "", whole * 2)
    for text in torn:
        reading.new_digest_file(tmp_path).write_text(text, "latin-1")
    assert reading.new_digests(tmp_path, run) == {1: "a" * 64}
    reading.new_digest_file(tmp_path).write_text(whole.replace("0004.p", "0012.p"))
    assert reading.new_digests(tmp_path, run) == {1: "a" * 64}
    directory._record(tmp_path, *reading.read_run(tmp_path)[:2], [0, 2])
    assert not reading.digest_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"token": 1}', "\xff" * 9, "[" * 100_000])
def test_a_damaged_record_of_the_run_is_refused(text: str, tmp_path: Path) -> None:
    (_writes(tmp_path) / "_run.json").write_bytes(text.encode("latin-1"))
    for call in (dp.read_predictions, _writes):
        with pytest.raises(ValueError, match=r"_run.json is damaged, or an earlier version wrote it"):
            call(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rows_per_file": 0},
        {"rows_per_file": -4},
        {"rows_per_file": 4.0},
        {"rows_per_file": None},
        {"length": "12"},
        {"length": True},
        {"length": -1},
        {"length": 0},
        {"length": 8},
    ],
)
def test_a_forged_record_of_the_run_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    token, run, digests = reading.read_run(_writes(tmp_path))
    (tmp_path / "_run.json").write_bytes(reading.run_text(token, run | change, digests))
    _is_refused(tmp_path, "_run.json is damaged")


def test_a_record_of_the_run_without_a_number_is_refused(tmp_path: Path) -> None:
    token, run, digests = reading.read_run(_writes(tmp_path))
    del run["rows_per_file"]
    (tmp_path / "_run.json").write_bytes(reading.run_text(token, run, digests))
    _is_refused(tmp_path, "_run.json is damaged")


def test_a_forged_length_takes_no_time(tmp_path: Path) -> None:
    token, run, digests = reading.read_run(_writes(tmp_path))
    (tmp_path / "_run.json").write_bytes(reading.run_text(token, run | {"length": 2 * 10**19 - 8}, digests))
    start = time.monotonic()
    for call, message in ((dp.read_predictions, "is not complete: 4999999999999999995 of"), (_writes, "another run")):
        with pytest.raises(ValueError, match=message):
            call(tmp_path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["_run.json", "part-000000000004.parquet", "_digests-0123456789abcdef.sha256"])
def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    file = _writes(tmp_path) / name
    file.unlink(missing_ok=True)
    file.mkdir()
    _is_refused(tmp_path, f"{name} is a folder, and .* remove it")
    file.rmdir()
    os.mkfifo(file)
    _is_refused(tmp_path, f"{name} is no file, and .* remove it")


@pytest.mark.parametrize("broken", [False, True])
def test_a_folder_in_place_of_the_types_is_refused_and_stays(broken: bool, tmp_path: Path) -> None:
    path = _writes(tmp_path / "out")
    (path / "_common_metadata").unlink()
    (path / "_common_metadata").mkdir()
    (path / "_common_metadata" / "notes").write_text("mine")
    if broken:
        for part in path.glob("part-*"):
            part.unlink()
    before = sorted(path.iterdir())
    with pytest.raises(
        ValueError, match=r"_common_metadata is a folder, and the file of the columns' types goes there"
    ):
        _writes(path)
    assert sorted(path.iterdir()) == before
    assert (path / "_common_metadata" / "notes").read_text() == "mine"


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    path = _writes(tmp_path / "out")
    own = ("notes", "part-2.parquet", ".hidden", ".part-old.parquet.17", "_digests-1.sha256", "_run.json.1")
    for name in own:
        (path / name).write_text("mine")
    (path / "figures").mkdir()
    (path / "part-000000000004.parquet").unlink()
    _writes(path)
    assert len(dp.read_predictions(path)) == 12
    assert all((path / name).read_text() == "mine" for name in own) and (path / "figures").is_dir()


def _is_refused(path: Path, message: str) -> None:
    for call in (dp.read_predictions, _writes):
        with pytest.raises(ValueError, match=message):
            call(path)


def test_a_damaged_schema_is_written_again(tmp_path: Path) -> None:
    schema = _writes(tmp_path) / "_common_metadata"
    content = schema.read_bytes()
    for damaged in (b"", content[:-1], content.replace(b"output", b"0utput")):
        schema.write_bytes(damaged)
        (tmp_path / "part-000000000004.parquet").unlink()
        run_ranks(_writes, 2, str(tmp_path))
        assert torch.equal(dp.read_predictions(tmp_path), _doubles(torch.arange(12)))
        assert json.loads(pq.read_schema(schema).metadata[b"ddparity"])["column"] == "output"

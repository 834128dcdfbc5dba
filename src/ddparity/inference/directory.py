"""Outputs on disk: a Parquet data set, written file by file and resumed at any world size, with the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..checkpoint.atomic import Draft, discard, new_draft, publish, replacing
from ..comm.nesting import difference
from ..data.sizes import checked_integer
from ..system import NOFOLLOW
from .columns import schema_of, to_table
from .description import INDEX, describe
from .outputs import check_rows
from .reading import (
    DESCRIPTION,
    RUN,
    SCHEMA,
    RunInfo,
    check_file,
    check_parts,
    digest_files,
    digest_line,
    file_of,
    files_of,
    new_digest_file,
    new_digests,
    read_run,
    rows_of,
    run_text,
    whole_parts,
)
from .source import Batches

_EMPTY = "part-empty.parquet"  # the only file of a data set without samples
# See checkpoint.atomic.new_draft; a process id is that of earlier versions.
_DRAFT = re.compile(r"\.(part-(\d{12,}|empty)\.parquet|_run\.json|_common_metadata)\.(\d+|[0-9a-f]{8}-[0-9a-f]{16})")
_FILES = 128  # files of a data set, as a default; more if a file would have more than `_ROWS` rows
_ROWS = 65_536
_ROW_GROUP_BYTES = 16 * 2**20
_BUFFER_BYTES = 2**20


def rows_of_a_file(batches: Batches, given: int | None) -> int:
    """Return the rows of a file: a multiple of the batch size that depends on the data set alone.

    Raises:
        ValueError: the user's number is no such multiple.
    """
    if given is None:
        whole = max(1, min(-(-len(batches) // _FILES), _ROWS // batches.batch_size))
        return whole * batches.batch_size
    rows = checked_integer(given, "rows_per_file")
    if rows < 1 or rows % batches.batch_size:
        raise ValueError(f"predict(rows_per_file={given}): give a multiple of the batch size, {batches.batch_size}")
    return rows


def prepare(path: Path, run: RunInfo, uncompared: Sequence[str]) -> str:
    """Make the directory, or find what it holds of this run. One rank calls it; `Directory` needs the result on all.

    Args:
        run: what the call computes, see `identity`, with its `key`.
        uncompared: parts of the call that may differ although `run` is equal, unless the keys are equal.

    Raises:
        ValueError: the directory holds something else.
    """
    path.mkdir(parents=True, exist_ok=True)
    entries = list(path.iterdir())
    drafts = [entry for entry in entries if _DRAFT.fullmatch(entry.name) and entry.is_file()]
    # Hidden files are not ours, and they do not matter.
    found = [entry.name for entry in entries if not entry.name.startswith(".")]
    if RUN in found:
        token, before, digests = read_run(path)
        _check_same(path, before, {name: value for name, value in run.items() if name != "key"})
        if uncompared and run["key"] is None:
            return json.dumps({"refused": _needs_key(path, before.get("key"), uncompared)})
        _check_same(path, before, run)
        check_parts(path, run)  # before a file is deleted
        check_file(path / SCHEMA, "the file of the columns' types")
    elif found:
        raise ValueError(
            f"{path} holds {found[0]}, which is no result of predict(): give a directory that is empty or new"
        )
    else:
        token, digests = uuid.uuid4().hex, {}
        _write(path / RUN, run_text(token, run, digests))
    for left in drafts:  # a rank that was killed leaves one
        left.unlink()
    if not run["length"]:
        check_file(path / _EMPTY, "a file without rows")
        with replacing(path / _EMPTY) as draft:
            pq.write_table(pa.table({INDEX: pa.array([], pa.int64())}), draft)
    whole = whole_parts(path, run, digests | new_digests(path, run))
    _record(path, token, run, whole)
    _write_schema(path, run, whole)
    missing = sorted(set(range(files_of(run))) - set(whole))
    ranges = [[part.start, part.stop] for part in _ranges(missing)]
    return json.dumps({"token": token, "run": run, "missing": ranges, "schema": bool(whole)})


def _record(path: Path, token: str, run: RunInfo, whole: Sequence[int]) -> None:
    """Record the digests of these parts in one file, and delete the files that had the new ones."""
    _, _, recorded = read_run(path)
    files, kept = digest_files(path), set(whole)
    digests = {number: one for number, one in (recorded | new_digests(path, run)).items() if number in kept}
    if digests != recorded:
        _write(path / RUN, run_text(token, run, digests))
    for file in files:
        file.unlink(missing_ok=True)


def _write_schema(path: Path, run: RunInfo, whole: Sequence[int]) -> None:
    """Let the file of the columns' types be what a part says that is whole. Delete it if there is none."""
    if not whole:  # then the first batch is run again
        (path / SCHEMA).unlink(missing_ok=True)
        return
    schema = pq.read_schema(file_of(path, run, whole[0]))
    with contextlib.suppress(OSError, pa.ArrowException):
        if pq.read_schema(path / SCHEMA).equals(schema, check_metadata=True):
            return
    with replacing(path / SCHEMA) as draft:
        pq.write_metadata(schema, draft)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as draft:
        draft.write(content)


def _check_same(path: Path, before: RunInfo, run: RunInfo) -> None:
    for name, value in run.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path} holds the results of another run: its {name} is {before.get(name)}, and here it is {value}. "
                f"Give another directory, or remove that one"
            )


def _needs_key(path: Path, before: str | None, uncompared: Sequence[str]) -> str:
    """Return the error message for a directory that only an equal key could make the result of this call."""
    if before is None:
        way_out = (
            "They were written without a key, so they cannot be resumed: remove the directory or give another one, and "
            'pass key= from the first call on, e.g. key="resnet18 v2, resized to 224"'
        )
    else:
        way_out = f"They were written with key={before}: pass the same key if this call computes the same"
    parts = ", ".join(uncompared)
    return f"{path} holds earlier results, and predict() cannot compare what wrote them with {parts}. {way_out}"


class Directory:
    """A sink. It writes each file of the data set as a whole on one rank.

    Args:
        prepared: the result of `prepare` on one rank.
        overrides: types of some columns.
        tell, hear: tell all ranks that the types are written, and wait until they are.
        records: whether this rank records the digests of all parts at the end, as one rank must.

    Raises:
        ValueError: `prepare` asks for a key; or the ranks do not share the directory.

    Attributes:
        chunks: the ranges of batch numbers that are still to be run, one for each file.
    """

    def __init__(
        self,
        path: Path,
        batches: Batches,
        prepared: str,
        overrides: pa.Schema | None,
        tell: Callable[[], None],
        hear: Callable[[], object],
        records: bool,
    ) -> None:
        said = json.loads(prepared)
        if "refused" in said:
            raise ValueError(said["refused"])
        if not (path / RUN).is_file() or read_run(path)[0] != said["token"]:
            raise ValueError(f"{path} is not the directory that rank 0 made: give one that all ranks share")
        self._path, self._run, self._overrides, self._tell, self._hear = path, said["run"], overrides, tell, hear
        self._token, self._records, self._digests = said["token"], records, new_digest_file(path)
        per_file = self._run["rows_per_file"] // batches.batch_size
        missing = itertools.chain.from_iterable(range(*part) for part in said["missing"])
        self.chunks = [range(n * per_file, min((n + 1) * per_file, len(batches))) for n in missing]
        self._schema: Any = pq.read_schema(path / SCHEMA) if said["schema"] else None
        self._file: Path | None = None  # that is being written
        self._draft: Draft | None = None
        self._writer: Any = None
        self._held: list[pa.RecordBatch] = []

    def take(self, samples: range, where: str, output: Any, batch: Any) -> None:
        check_rows(output, len(samples), f"the output for the {where}")
        description = describe(output, samples.start)
        if self._schema is None:
            self._schema = self._types(description, samples)
        first = json.loads(self._schema.metadata[DESCRIPTION])
        if found := difference(description, first, "the output", lenient=True):
            raise ValueError(
                f"index {samples.start}: {found} as in the first batch: give the same keys, kinds, dtypes and numbers "
                f"of dimensions for each batch, and None for what is absent"
            )
        self._held.append(_copied(to_table(output, samples.start, len(samples), self._schema)))
        try:
            self._write(samples)
        except OSError as error:
            message = f"{error.strerror or error}, writing {self._file} with the {where}"
            raise OSError(error.errno, message) from error

    def _write(self, samples: range) -> None:
        number = samples.start // self._run["rows_per_file"]
        if self._file is None:
            self._file = file_of(self._path, self._run, number)
            self._draft = new_draft(self._file)
            self._digested = _Digested(self._draft.file)
            # Arrow writes a few bytes at a time, and each time it would call Python.
            self._stream = pa.BufferedOutputStream(pa.PythonFile(self._digested, mode="w"), _BUFFER_BYTES)
            self._writer = pq.ParquetWriter(self._stream, self._schema, write_page_checksum=True)
        ends = samples.stop == rows_of(self._run, number).stop
        if ends or sum(batch.get_total_buffer_size() for batch in self._held) >= _ROW_GROUP_BYTES:
            self._writer.write_table(pa.Table.from_batches(self._held).combine_chunks())
            self._held = []
        if ends:
            assert self._draft is not None, "it was opened with the writer"
            self._writer.close()
            self._stream.close()
            # First the digest: a part that has none, or that of another part, counts as missing. So after a crash it
            # does not matter what of the digest is on disk.
            _append(self._digests, digest_line(self._file, self._digested.digest.hexdigest()))
            publish(self._draft, self._file)
            discard(self._draft)
            self._file = None

    def finish(self) -> Path:
        """Record the digests of all parts, on the rank that made the directory. All parts have been written."""
        if self._records:
            _record(self._path, self._token, self._run, range(files_of(self._run)))
        return self._path

    def close(self) -> None:
        """Delete the file that is not complete."""
        if self._file is not None and self._draft is not None:
            self._digested.dropped = True  # Arrow writes what it holds when it closes, and the disk may be full
            self._writer.close()
            self._stream.close()
            discard(self._draft)

    def _types(self, description: Any, samples: range) -> pa.Schema:
        """Return the types of all files. The data set's first batch decides; the rank that runs it writes them."""
        if samples.start == 0:
            schema = schema_of(description, self._overrides).with_metadata({DESCRIPTION: json.dumps(description)})
            with replacing(self._path / SCHEMA) as draft:
                pq.write_metadata(schema, draft)
            self._tell()
        else:
            self._hear()
        return pq.read_schema(self._path / SCHEMA)


def _append(path: Path, line: str) -> None:
    """Append a line to a file. A link in its place is an error: the directory may be one that others write to."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "w") as file:
        file.write(line)


class _Digested:
    """A file for Arrow to write to, which also computes the SHA-256 of what should be on disk.

    Attributes:
        dropped: what is written from now on is lost.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.dropped, self.closed = file, hashlib.sha256(), False, False

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return len(data) if self.dropped else self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        """Leave the file's own buffer to `publish`."""

    def close(self) -> None:
        self.closed = True


def _ranges(numbers: Sequence[int]) -> Iterator[range]:
    """Yield increasing numbers as ranges of consecutive numbers."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        yield range(members[0], members[-1] + 1)


def _copied(table: pa.Table) -> pa.RecordBatch:
    """Return a table in memory of its own: the model may write its next output into this one's memory."""
    (batch,) = table.combine_chunks().to_batches()
    return pa.ipc.read_record_batch(batch.serialize(), table.schema)

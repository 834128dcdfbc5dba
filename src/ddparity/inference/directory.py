"""Outputs on disk: a Parquet data set that grows file by file and resumes at any world size, with the same bytes."""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..checkpoint.atomic import draft_of, publish, replacing
from ..comm.nesting import difference
from ..data.plan import checked_integer
from .columns import schema_of, to_table
from .description import INDEX, describe
from .outputs import check_rows
from .reading import DESCRIPTION, RUN, SCHEMA, Run, file_of, files_of, is_whole, rows_of
from .source import Batches

_EMPTY = "part-empty.parquet"  # what a data set without samples has instead of files
_DRAFT = re.compile(r"\.(part-.+\.parquet|_run\.json|_common_metadata)\.\d+")  # see files.draft_of
_FILES = 128  # unless files would be larger than
_ROWS = 65_536
_ROW_GROUP_BYTES = 16 * 2**20


def rows_of_a_file(batches: Batches, given: int | None) -> int:
    """A whole number of batches, that depends on the data set alone.

    Raises:
        ValueError: the user's number is not one.
    """
    if given is None:
        whole = max(1, min(-(-len(batches) // _FILES), _ROWS // batches.batch_size))
        return whole * batches.batch_size
    rows = checked_integer(given, "rows_per_file")
    if rows < 1 or rows % batches.batch_size:
        raise ValueError(f"predict(rows_per_file={given}): give a multiple of the batch size, {batches.batch_size}")
    return rows


def prepare(path: Path, run: Run, uncompared: Sequence[str]) -> str:
    """On one rank: make the directory, or find what is there of this run. Return what all ranks' `Directory` needs.

    Args:
        run: what the call computes, see `identity`; with `key`.
        uncompared: parts of the call of which `run` does not tell what they compute: only an equal key does.

    Raises:
        ValueError: the directory holds something else.
    """
    path.mkdir(parents=True, exist_ok=True)
    entries = list(path.iterdir())
    drafts = [entry for entry in entries if _DRAFT.fullmatch(entry.name) and entry.is_file()]
    found = [
        entry.name for entry in entries if not entry.name.startswith(".")
    ]  # hidden ones are not ours, nor in the way
    if RUN in found:
        before = json.loads((path / RUN).read_text())
        _check_same(path, before["run"], {name: value for name, value in run.items() if name != "key"})
        if uncompared and run["key"] is None:
            return json.dumps({"refused": _needs_key(path, before["run"].get("key"), uncompared)})
        _check_same(path, before["run"], run)
        token = before["token"]
    elif found:
        raise ValueError(
            f"{path} holds {found[0]}, which is no result of predict(): give a directory that is empty or new"
        )
    else:
        token = uuid.uuid4().hex
        with replacing(path / RUN) as draft:
            draft.write_text(json.dumps({"token": token, "run": run}, indent=1))
    for draft in drafts:  # of a rank that was killed
        draft.unlink()
    if not run["length"]:
        with replacing(path / _EMPTY) as draft:
            pq.write_table(pa.table({INDEX: pa.array([], pa.int64())}), draft)
    whole = [number for number in range(files_of(run)) if is_whole(path, run, number)]
    if whole and not (path / SCHEMA).exists():  # somebody has tidied up
        with replacing(path / SCHEMA) as draft:
            pq.write_metadata(pq.read_schema(file_of(path, run, whole[0])), draft)
    missing = sorted(set(range(files_of(run))) - set(whole))
    ranges = [[part.start, part.stop] for part in _runs(missing)]
    return json.dumps({"token": token, "run": run, "missing": ranges, "schema": (path / SCHEMA).exists()})


def _check_same(path: Path, before: Run, run: Run) -> None:
    for name, value in run.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path} holds the results of another run: its {name} is {before.get(name)}, and here it is {value}. "
                f"Give another directory, or remove that one"
            )


def _needs_key(path: Path, before: str | None, uncompared: Sequence[str]) -> str:
    """Return what to say where only a key could tell whether the directory holds results of this call."""
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
    """A sink that writes each file of the data set on one rank, whole.

    Args:
        prepared: what `prepare` gave on one rank.
        overrides: types of some columns.
        tell, hear: say to all ranks that the types are written, and wait for it.

    Raises:
        ValueError: `prepare` asks for a key; or the ranks do not share the directory.

    Attributes:
        chunks: the ranges of batch numbers that are still to be run, a file each.
    """

    def __init__(
        self,
        path: Path,
        batches: Batches,
        prepared: str,
        overrides: pa.Schema | None,
        tell: Callable[[], None],
        hear: Callable[[], object],
    ) -> None:
        said = json.loads(prepared)
        if "refused" in said:
            raise ValueError(said["refused"])
        if not (path / RUN).is_file() or json.loads((path / RUN).read_text())["token"] != said["token"]:
            raise ValueError(f"{path} is not the directory that rank 0 made: give one that all ranks share")
        self._path, self._run, self._overrides, self._tell, self._hear = path, said["run"], overrides, tell, hear
        per_file = self._run["rows_per_file"] // batches.batch_size
        missing = itertools.chain.from_iterable(range(*part) for part in said["missing"])
        self.chunks = [range(n * per_file, min((n + 1) * per_file, len(batches))) for n in missing]
        self._schema: Any = pq.read_schema(path / SCHEMA) if said["schema"] else None
        self._file: Path | None = None  # the one that is being written
        self._writer: Any = None
        self._held: list[pa.Table] = []

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
            self._writer = pq.ParquetWriter(draft_of(self._file), self._schema)
        ends = samples.stop == rows_of(self._run, number).stop
        if ends or sum(table.nbytes for table in self._held) >= _ROW_GROUP_BYTES:
            self._writer.write_table(pa.concat_tables(self._held).combine_chunks())
            self._held = []
        if ends:
            self._writer.close()
            publish(draft_of(self._file), self._file)
            self._file = None

    def finish(self) -> Path:
        return self._path

    def close(self) -> None:
        """Leave no half a file."""
        if self._file is not None:
            self._writer.close()
            draft_of(self._file).unlink(missing_ok=True)

    def _types(self, description: Any, samples: range) -> pa.Schema:
        """Those of all files: the first batch of the data set decides, and whoever runs it writes them down."""
        if samples.start == 0:
            schema = schema_of(description, self._overrides).with_metadata({DESCRIPTION: json.dumps(description)})
            with replacing(self._path / SCHEMA) as draft:
                pq.write_metadata(schema, draft)
            self._tell()
        else:
            self._hear()
        return pq.read_schema(self._path / SCHEMA)


def _runs(numbers: Sequence[int]) -> Iterator[range]:
    """Increasing numbers as ranges of consecutive ones."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        yield range(members[0], members[-1] + 1)


def _copied(table: pa.Table) -> pa.Table:
    """A table of its own memory: the model may write its next output where this one lies."""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(stream.getvalue()).read_all()

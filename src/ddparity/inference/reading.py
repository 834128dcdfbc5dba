"""A directory of predictions: which files it has, and reading it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

RUN = "_run.json"  # names with an underscore are no data to Arrow's readers
SCHEMA = "_common_metadata"  # Parquet's name for a file without rows
DESCRIPTION = b"ddparity"  # in the schema's metadata: what Arrow's types do not tell

Run = dict[str, Any]


def read_predictions(path: str | os.PathLike[str]) -> Any:
    """The outputs that `predict(to=path)` wrote, as `predict` would have returned them, on the CPU.

    Named tuples and dataclasses come back as dicts by their fields' names: reading imports nothing that a file names.
    Any reader of Parquet reads the directory too, e.g. `pandas.read_parquet(path)`: one row a sample.

    Raises:
        ValueError: there is no whole result there.
    """
    import pyarrow as pa  # takes a while
    import pyarrow.parquet as pq

    from .columns import from_table

    path = Path(path)
    if not (path / RUN).is_file():
        raise ValueError(f"{path} is no result of predict(): it has no {RUN}")
    run = json.loads((path / RUN).read_text())["run"]
    if missing := [number for number in range(files_of(run)) if not is_whole(path, run, number)]:
        first = rows_of(run, missing[0])
        raise ValueError(
            f"{path} is not complete: {len(missing)} of {files_of(run)} files are missing, first that of samples "
            f"{first.start} to {first.stop - 1}. The same predict() again writes them"
        )
    if not run["length"]:
        return torch.empty(0)
    table = pa.concat_tables([pq.read_table(file_of(path, run, number)) for number in range(files_of(run))])
    return from_table(table, json.loads(pq.read_schema(path / SCHEMA).metadata[DESCRIPTION]))


def files_of(run: Run) -> int:
    return -int(-run["length"] // run["rows_per_file"])


def rows_of(run: Run, number: int) -> range:
    return range(number * run["rows_per_file"], min((number + 1) * run["rows_per_file"], run["length"]))


def file_of(path: Path, run: Run, number: int) -> Path:
    """Named by its first sample, so that the order of names is that of the data set."""
    return path / f"part-{number * run['rows_per_file']:012d}.parquet"


def is_whole(path: Path, run: Run, number: int) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = file_of(path, run, number)
    try:
        return bool(pq.read_metadata(file).num_rows == len(rows_of(run, number)))
    except (OSError, pa.ArrowInvalid):
        return False

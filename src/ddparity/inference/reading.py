"""A directory of predictions: which files it has, and reading it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

RUN = "_run.json"  # Arrow's readers skip names with an underscore
SCHEMA = "_common_metadata"  # Parquet's name for a file without rows
DESCRIPTION = b"ddparity"  # key in the schema's metadata of what Arrow's types do not say

RunInfo = dict[str, Any]  # what a call computes, and how its rows are cut into files, see predict.py


def read_predictions(path: str | os.PathLike[str]) -> Any:
    """Return the outputs that `predict(to=path)` wrote, as `predict` would have returned them, on the CPU.

    Named tuples and dataclasses come back as dicts by their fields' names: reading imports nothing that a file names.
    Any reader of Parquet reads the directory, too, e.g. `pandas.read_parquet(path)`: one row a sample.

    Raises:
        ValueError: the directory does not hold a whole result.
    """
    import pyarrow as pa  # here, since the import is slow
    import pyarrow.parquet as pq

    from .columns import from_table

    path = Path(path)
    if not (path / RUN).is_file():
        raise ValueError(f"{path} is no result of predict(): it has no {RUN}")
    run = json.loads((path / RUN).read_text())["run"]
    if missing := [number for number in range(files_of(run)) if not is_whole(path, run, number)]:
        first = rows_of(run, missing[0])
        raise ValueError(
            f"{path} is not complete: {len(missing)} of {files_of(run)} files are missing, the first is that of "
            f"samples {first.start} to {first.stop - 1}. The same predict() again writes them"
        )
    if not run["length"]:
        return torch.empty(0)
    table = pa.concat_tables([pq.read_table(file_of(path, run, number)) for number in range(files_of(run))])
    return from_table(table, json.loads(pq.read_schema(path / SCHEMA).metadata[DESCRIPTION]))


def files_of(run: RunInfo) -> int:
    """Return the number of files."""
    return -int(-run["length"] // run["rows_per_file"])


def rows_of(run: RunInfo, number: int) -> range:
    """Return the samples in a file."""
    return range(number * run["rows_per_file"], min((number + 1) * run["rows_per_file"], run["length"]))


def file_of(path: Path, run: RunInfo, number: int) -> Path:
    """Return the path of a file. Its name has its first sample, so the order of names is that of the data set."""
    return path / f"part-{number * run['rows_per_file']:012d}.parquet"


def is_whole(path: Path, run: RunInfo, number: int) -> bool:
    """Return whether a file is there and has all its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = file_of(path, run, number)
    try:
        return bool(pq.read_metadata(file).num_rows == len(rows_of(run, number)))
    except (OSError, pa.ArrowInvalid):
        return False

"""A directory of predictions: which files it has, what they must hold, and reading it.

_run.json                   what was computed (`RunInfo`), the SHA-256 of each part, and one of this file itself
_common_metadata            the types of the columns, a Parquet file without rows
part-000000000000.parquet   the rows from this sample on, with a checksum for each page
_digests-TOKEN.sha256       the SHA-256 of the parts that a rank has written, until the call is done
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .description import INDEX

if TYPE_CHECKING:  # the import is slow
    import pyarrow as pa

RUN = "_run.json"  # Arrow's readers skip names with an underscore
SCHEMA = "_common_metadata"  # Parquet's name for a file without rows
DESCRIPTION = b"ddparity"  # key in the schema's metadata of what Arrow's types do not say
_PART = re.compile(r"part-(\d{12,})\.parquet")
_DIGESTS = re.compile(r"_digests-[0-9a-f]{16}\.sha256")
_LINE = re.compile(r"([0-9a-f]{64})  part-(\d{12,18})\.parquet")  # as sha256sum writes it
_THREADS = 4  # that read parts: a digest takes about as long as Parquet does
_NAMED = 5  # parts that an error names

RunInfo = dict[str, Any]  # what a call computes, and how its rows are cut into files, see predict.py
Digests = dict[int, str]  # SHA-256 of parts, by their numbers


def read_predictions(path: str | os.PathLike[str]) -> Any:
    """Return the outputs that `predict(to=path)` wrote, as `predict` would have returned them, on the CPU.

    Named tuples and dataclasses come back as dicts by their fields' names: reading imports nothing that a file names.
    Every part is compared with the digest that was recorded when it was written, and its column "index" with the
    samples that it must hold. Any reader of Parquet reads the directory, too, e.g. `pandas.read_parquet(path)`: one row
    a sample.

    Raises:
        ValueError: the directory does not hold a whole result, or a file in it is damaged; names the file.
    """
    import pyarrow as pa

    from .columns import from_table

    path = Path(path)
    if not (path / RUN).exists():
        raise ValueError(f"{path} is no result of predict(): it has no {RUN}")
    _, run, _ = read_run(path)
    # A forged length asks for any number of files, so the search ends at the first one that is missing.
    names, number, files = set(os.listdir(path)), 0, files_of(run)
    while number < files and file_of(path, run, number).name in names:
        number += 1
    if number < files:
        parts = (int(found[1]) for name in names if (found := _PART.fullmatch(name)))
        there = sum(start % run["rows_per_file"] == 0 and start < run["length"] for start in parts)
        first = rows_of(run, number)
        raise ValueError(
            f"{path} is not complete: {files - there} of {files} files are missing, the first is that of "
            f"samples {first.start} to {first.stop - 1}. The same predict() again writes them"
        )
    check_parts(path, run)
    if not run["length"]:
        return torch.empty(0)
    digests = _all_digests(path, run)
    if len(digests) < files_of(run):  # a file system of several machines may show a file late
        digests = _all_digests(path, run)
    with ThreadPoolExecutor(_THREADS) as pool:
        read = list(pool.map(lambda number: _read_part(path, run, digests, number), range(files_of(run))))
    if damaged := [found for found in read if isinstance(found, str)]:
        more = f", and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
        raise ValueError(
            f"{path} is damaged: {'; '.join(damaged[:_NAMED])}{more}. The same predict() again writes what is damaged"
        )
    table = pa.concat_tables(read)
    return from_table(table, json.loads(table.schema.metadata[DESCRIPTION]))


def _all_digests(path: Path, run: RunInfo) -> Digests:
    """Return the digests of all parts that exist, also while a call writes to the directory.

    The call writes a part's digest file before the part, and fills `RUN` before it deletes digest files. So the parts
    are looked for first, then digest files are read, then `RUN`.
    """
    new = new_digests(path, run)
    return read_run(path)[2] | new


def _read_part(path: Path, run: RunInfo, digests: Digests, number: int) -> pa.Table | str:
    """Return a part's rows, or in words what is wrong with it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, rows = file_of(path, run, number), rows_of(run, number)
    try:
        data = file.read_bytes()
        if (wrong := _difference(hashlib.sha256(data).hexdigest(), digests.get(number))) is not None:
            return f"{file.name} {wrong}"
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
            table = parquet.read()
        index = table.column(INDEX).to_numpy() if INDEX in table.column_names else np.empty(0)
    except (OSError, pa.ArrowException) as error:
        return f"{file.name} cannot be read ({str(error).splitlines()[0]})"
    if not np.array_equal(index, np.arange(rows.start, rows.stop)):
        return f'{file.name} does not hold the samples {rows.start} to {rows.stop - 1}, by its column "{INDEX}"'
    return table


def is_whole(path: Path, run: RunInfo, digests: Digests, number: int) -> bool:
    """Return whether a part has the bytes that were recorded when it was written."""
    try:
        with open(file_of(path, run, number), "rb") as file:
            return _difference(hashlib.file_digest(file, "sha256").hexdigest(), digests.get(number)) is None
    except OSError:
        return False


def whole_parts(path: Path, run: RunInfo, digests: Digests) -> list[int]:
    """Return the numbers of the parts that are whole. All of them are read."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda number: is_whole(path, run, digests, number), range(files_of(run)))
        return [number for number, whole in enumerate(found) if whole]


def _difference(found: str, recorded: str | None) -> str | None:
    if recorded is None:
        return "has no recorded SHA-256"
    return None if found == recorded else f"has the SHA-256 {found[:12]}…, and {recorded[:12]}… was written"


def check_parts(path: Path, run: RunInfo) -> None:
    """Raise a ValueError if a folder or the like is in place of a part: it can neither be read nor replaced."""
    for number in range(files_of(run)):
        check_file(file_of(path, run, number), "a part of the predictions")


def check_file(file: Path, what: str) -> None:
    """Raise a ValueError if a folder has the name of a file, or a pipe, which a reader would wait for."""
    with contextlib.suppress(OSError):  # nothing is there, or the one who reads it gets the error
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no file"
            raise ValueError(f"{file} is {kind}, and {what} goes there: remove it")


def files_of(run: RunInfo) -> int:
    """Return the number of files."""
    return -int(-run["length"] // run["rows_per_file"])


def rows_of(run: RunInfo, number: int) -> range:
    """Return the samples in a file."""
    return range(number * run["rows_per_file"], min((number + 1) * run["rows_per_file"], run["length"]))


def file_of(path: Path, run: RunInfo, number: int) -> Path:
    """Return the path of a file. Its name has its first sample, so the order of names is that of the data set."""
    return path / f"part-{number * run['rows_per_file']:012d}.parquet"


def new_digest_file(path: Path) -> Path:
    """Return the path of a new file, for the digests of the parts that a rank writes, until the call is done."""
    return path / f"_digests-{secrets.token_hex(8)}.sha256"


def digest_line(file: Path, digest: str) -> str:
    return f"{digest}  {file.name}\n"


def digest_files(path: Path) -> list[Path]:
    """Return the files of digests that ranks have written since the file `RUN` was."""
    return sorted(path / name for name in os.listdir(path) if _DIGESTS.fullmatch(name))


# What is recorded


def run_text(token: str, run: RunInfo, digests: Digests) -> bytes:
    """Return the content of the file `RUN`.

    Args:
        token: a random name of the directory, by which ranks know that they share it.
    """
    parts = {str(number): digests[number] for number in sorted(digests)}
    body = {"token": token, "run": run, "parts": parts}
    return json.dumps({**body, "sha256": _digest_of(body)}, indent=1).encode()


def read_run(path: Path) -> tuple[str, RunInfo, Digests]:
    """Return what `run_text` got.

    Raises:
        ValueError: the file is damaged, or it is not what `run_text` returns.
    """
    check_file(path / RUN, "the record of the run")
    try:
        body = json.loads((path / RUN).read_bytes())
        if body.pop("sha256") == _digest_of(body):
            token, run = body["token"], body["run"]
            digests = {int(number): digest for number, digest in body["parts"].items()}
            if isinstance(token, str) and _is_run(run) and _are_digests(digests, run):
                return token, run, digests
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"{path / RUN} is damaged, or an earlier version wrote it, so it is unknown what {path} holds: remove the "
        f"directory or give another one"
    )


def _is_run(run: RunInfo) -> bool:
    length, rows = run["length"], run["rows_per_file"]
    return type(length) is int and type(rows) is int and length >= 0 and rows > 0


def _are_digests(digests: Digests, run: RunInfo) -> bool:
    files = range(files_of(run))
    return all(number in files and isinstance(digest, str) for number, digest in digests.items())


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def new_digests(path: Path, run: RunInfo) -> Digests:
    """Return the digests of the parts that were written since the file `RUN` was.

    Raises:
        ValueError: a folder or a pipe is in place of a file.
    """
    found = {}
    for file in digest_files(path):
        check_file(file, "the SHA-256 of parts")
        try:
            text = file.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            continue
        for line in text.split("\n")[:-1]:  # a crash may have cut the last one off
            if (entry := _LINE.fullmatch(line)) and int(entry[2]) % run["rows_per_file"] == 0:
                found[int(entry[2]) // run["rows_per_file"]] = entry[1]
    return {number: digest for number, digest in found.items() if number < files_of(run)}

"""The record of one process: lines of JSON in a file of its own, each written at once, so that a crash leaves them."""

from __future__ import annotations

import functools
import json
import os
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

_CHAIN = 6  # the user's frames that tell two calls apart
_LARGEST = 64 * 2**20  # bytes of one process's record
_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_paths()[name]) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_ORDERED = 2**14  # bytes of a tensor that are read in order; of a larger one, the first, and the sum of all
_OURS = os.path.dirname(os.path.realpath(__file__)) + os.sep
_STARTERS = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))), "launcher", "")


class Journal:
    """What this process has recorded. Its file is made at the first record, and anew in a forked process."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.file: int | None = None
        self.written = 0
        self.count = 0  # records, which orders them
        self.hidden = 0  # calls of torch by itself or by this recorder, which are not recorded
        self.windows = 0  # optimizer steps
        self.backwards = 0  # since the last optimizer step
        self.shape: list[str | None] = []  # lines of backwards and large collectives since the last optimizer step
        self.seeds = 0  # calls that seed a random stream
        self.locks = 0  # of files that were taken
        self.reading = False  # items of data sets, for the record: nothing may be written
        self.world = 1
        self.fetching: int | None = None  # the pass over a loader that loads now
        self.is_gradient: Callable[[Any], bool] = lambda tensor: False
        self.spreads: Callable[[], dict[int, float]] = dict  # of the gradients, by optimizer
        self.reduced = False  # gradients by hand, since the last backward
        self.watch_loader: Callable[[Any], None] = lambda module: None
        self.passes = 0  # over loaders
        self.compiles = False  # the script has called torch.compile
        self.given = 0  # batches, by all loaders
        self.batch: int | None = None  # samples of the last one
        self.loading_s = 0.0  # waited for data since the last optimizer step
        self.at_end: list[Callable[[], None]] = []
        self.safely = _Safely(self)
        self._sites: dict[tuple[str, int], str | None] = {}
        self._library: dict[str, bool] = {}
        os.register_at_fork(after_in_child=self._forked)

    def limit(self) -> int:
        """Return how many optimizer steps a pass over a loader may make: fewer when many have been seen."""
        return self.steps if self.windows < 4 * self.steps else 2

    def _forked(self) -> None:
        self.file, self.written = None, 0

    def write(self, kind: str, /, **values: Any) -> None:
        """Append a record. A record that is too large for the file is left out."""
        if self.written > _LARGEST:
            return
        self.count += 1
        try:
            if self.file is None:
                path = self.folder / f"{os.getpid()}-{time.time_ns()}.jsonl"
                self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # Python closes it in children
                names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
                head = {"k": "process", "pid": os.getpid(), "parent": os.getppid(), "argv": sys.argv[:1]}
                self._append({**head, **{name.lower(): os.environ.get(name) for name in names}})
            self._append({"k": kind, "t": round(time.time(), 6), **values})
        except (OSError, ValueError, TypeError):  # a full disk, or a value that JSON has no form for
            return

    def _append(self, record: Mapping[str, Any]) -> None:
        line = _ENCODER.encode(record).encode() + b"\n"
        self.written += len(line)
        assert self.file is not None
        os.write(self.file, line)

    def site(self, depth: int = 2) -> str | None:
        """Return file:line of the innermost frame that is the user's, from `depth` frames above this one."""
        frame = frame_above(depth + 1)
        while frame is not None:
            key = (frame.f_code.co_filename, frame.f_lineno)
            if key not in self._sites:
                self._sites[key] = None if self.is_library(key[0]) else f"{os.path.realpath(key[0])}:{key[1]}"
            if self._sites[key] is not None:
                return self._sites[key]
            frame = frame.f_back
        return None

    def chain(self) -> int:
        """Return a checksum of the user's lines that call this function, the innermost first."""
        frame = frame_above(3)
        lines: list[tuple[str, int]] = []
        while frame is not None and len(lines) < _CHAIN:
            if not self.is_library(frame.f_code.co_filename):
                lines.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        return zlib.crc32(repr(lines).encode())

    def is_library(self, file: str) -> bool:
        """Return whether a file is not the user's: Python's, an installed package's, ours, or no file at all."""
        if file not in self._library:
            real = os.path.realpath(file)
            outside = file.startswith("<") or real.startswith((_OURS, _STARTERS)) or "site-packages" in real
            self._library[file] = outside or real.startswith(_LIBRARIES)
        return self._library[file]


def frame_above(depth: int) -> FrameType | None:
    """Return the frame that is `depth` above this one; None in a thread whose stack is not so deep."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and depth:
        frame, depth = frame.f_back, depth - 1
    return frame


class _Safely:
    """A context in which an error of the recorder ends: it becomes a record, and the script goes on."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, Exception):
            self._journal.write("problem", text=f"{type(error).__name__}: {error}")
            return True
        return False


def replace(owner: Any, name: str, function: Any) -> None:
    """Put a function in the place of another, under its name and documentation."""
    plain = isinstance(function, classmethod)
    setattr(owner, name, function if plain else functools.wraps(getattr(owner, name))(function))


def digest(value: Any, seed: int = 0) -> int:
    """Return a checksum of a nesting of tensors, arrays, numbers and strings; of other objects, of their type."""
    import torch

    if isinstance(value, torch.Tensor):
        return zlib.crc32(f"{value.dtype}{tuple(value.shape)}".encode(), checksum(value) ^ seed)
    if isinstance(value, Mapping):
        for key, one in value.items():
            seed = digest(one, zlib.crc32(str(key).encode(), seed))
        return seed
    if isinstance(value, (list, tuple)):
        for one in value:
            seed = digest(one, seed + 1)
        return seed
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return zlib.crc32(repr(value).encode(), seed)
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return zlib.crc32(value.tobytes(), seed)
    return zlib.crc32(type(value).__name__.encode(), seed)


def checksum(tensor: Any) -> int:
    """Return a checksum of a tensor's bytes: of their order where they are few or come first, else of their sum.

    A sum takes a tenth of the time. On an accelerator only the sum travels.
    """
    import torch

    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta" or not tensor.numel():
        return 0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    on_cpu = raw.device.type == "cpu"
    if on_cpu and raw.numel() <= _ORDERED:
        return zlib.crc32(raw.numpy())
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = raw.numel() // 8 * 8
    rest = raw[whole:].sum() if whole < raw.numel() else 0
    total = int(raw[:whole].view(torch.int64).sum() + rest)
    return (total ^ total >> 32) & 0xFFFFFFFF ^ (zlib.crc32(raw[:_ORDERED].numpy()) if on_cpu else 0)


def batch_size(value: Any) -> int | None:
    """Return the first dimension of the first tensor in a nesting."""
    import torch

    if isinstance(value, torch.Tensor):
        return int(value.shape[0]) if value.dim() else None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((size for size in map(batch_size, items) if size is not None), None)

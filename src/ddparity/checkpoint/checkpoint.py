"""Save the states of objects to a file and load them, on all ranks together.

A save replaces the file atomically. A load checks every byte, runs no code from the file and imports nothing for it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist

from ..runtime.agreement import agreed, begun
from ..runtime.progress import mark_progress
from . import sharded
from .atomic import remove_stale_drafts, replacing
from .format import Snapshot, check_state, describe_states, on_host, write_states
from .loading import load_state, opened_by_all
from .objects import about_of, is_first, sorted_out, state_of

logger = logging.getLogger(__name__)

# The save in the background that no `wait` has ended yet. The next save or load waits for it.
_unfinished: Saving | None = None


class Saving:
    """A save in the background, from `save_checkpoint(background=True)`.

    The process does not end before the save is done.
    """

    def __init__(self, path: Path, written: Future[None] | None) -> None:
        self._path = path
        self._written = written  # None on ranks that write nothing
        self._outcome: Future[None] | None = None

    def wait(self) -> None:
        """Wait until the complete file is on disk.

        Every rank must call it. A second call has the result of the first.

        Raises:
            OSError: the file could not be written; raised on the rank that failed.
            RankFailure: the file could not be written; raised on the other ranks.

        Collectives: none. The first call is one agreement through the group's store.
        """
        global _unfinished
        if self._outcome is None:
            self._outcome = Future()
            if _unfinished is self:
                _unfinished = None
            try:
                with agreed(f"saving {os.fspath(self._path)!r} in the background"):
                    if self._written is not None:
                        self._written.result()
                self._outcome.set_result(None)
            except BaseException as error:
                self._outcome.set_exception(error)
        self._outcome.result()


@overload
def save_checkpoint(
    path: str | os.PathLike[str], /, *, keep: int | None = None, background: Literal[False] = False, **objects: Any
) -> None: ...
@overload
def save_checkpoint(
    path: str | os.PathLike[str], /, *, keep: int | None = None, background: Literal[True], **objects: Any
) -> Saving: ...
@overload
def save_checkpoint(
    path: str | os.PathLike[str], /, *, keep: int | None = None, background: bool, **objects: Any
) -> Saving | None: ...
def save_checkpoint(
    path: str | os.PathLike[str], /, *, keep: int | None = None, background: bool = False, **objects: Any
) -> Saving | None:
    """Write the states of objects to one file. Rank 0 writes it, and a failure is raised on every rank.

    Every rank must call it with the same arguments. The new content is written beside the target, flushed to disk and
    renamed, so that a crash at any instant leaves the complete old file or the complete new one. It is a safetensors
    file. Its metadata has the structure of the states as JSON, with a SHA-256 of each tensor.

    Where a state has DTensors (`fully_shard`), `path` is a folder that all ranks share. Each rank writes its shards to
    a file of its own, and rank 0 then publishes the file that names them, which is as atomic.

    Args:
        path: the file. A symbolic link to a file is followed. A new file has the mode and the owner of the one that it
            replaces.
        keep: how many files stay, the new one included. The replaced file becomes `path.1`, the file before it
            `path.2`, and so on; the files from `path.<keep>` on are deleted, up to the first number that is no file.
            None: only `path` changes.
        background: copy the states, return, and write the copy in a thread. On rank 0 this takes the size of the states
            in main memory, with sharded states on each rank that of its shards. Later changes of the objects do not
            change the file. A failure is raised on every rank by `Saving.wait`, or by the next save or load.
        objects: what to save, by name. An object with `state_dict` and `load_state_dict`: a model is saved without its
            DDP and torch.compile wrappers, a `Loader` as its position. Or a value, which `load_checkpoint` returns:
            numbers, strings, None, tensors, arrays, in lists, tuples, dicts, named tuples and dataclasses.

    Returns:
        None; with `background` a `Saving`, whose `wait` ends when the file is on disk.

    Raises:
        TypeError: an object is neither, or has something that would not come back as it is; the message says where.
        ValueError: `keep` is no integer from 1.
        OSError: the file cannot be written, `path` is no file, or a folder has the name of an earlier file (`keep`);
            raised on the rank that writes it. The old file stays.
        RankFailure: another rank failed.

    Collectives: those of the objects' `state_dict`, and of a ZeroRedundancyOptimizer's `consolidate_state_dict`. There
    is one agreement through the group's store; with sharded states there are two.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/last.safetensors", model=model, epoch=3)
        ...     load_checkpoint(f"{folder}/last.safetensors", model=model)
        {'epoch': 3}
    """
    global _unfinished
    _wait_for_unfinished()
    write: Callable[[], None] | None = None
    with agreed(f"save_checkpoint({os.fspath(path)!r})"):
        if keep is not None and (type(keep) is not int or keep < 1):
            raise ValueError(
                f"save_checkpoint(keep={keep!r}): keep also counts the new file, so give an integer from 1"
            )
        target = Path(os.path.realpath(path))
        stateful, values = sorted_out(objects)
        # Every rank calls state_dict, because some of them run collectives.
        states = {name: state_of(value) for name, value in stateful.items()} | values
        for name, state in states.items():
            check_state(state, name)
        in_shards = any(map(sharded.is_sharded, states.values()))
        if in_shards or is_first():
            snapshot = describe_states(states, about_of(stateful, values))
            if in_shards:
                shards = sharded.cut(snapshot, background)
            else:
                write = partial(_write, target, on_host(snapshot, background), keep)
                if not background:
                    write()
    mark_progress()
    if in_shards:
        write = _writer_of_shards(target, shards, keep)
        if not background:
            write()
    if not background:
        return None
    _unfinished = Saving(target, None if write is None else _in_thread(write))
    return _unfinished


def load_checkpoint(path: str | os.PathLike[str], /, **objects: Any) -> dict[str, Any]:
    """Load states that `save_checkpoint` wrote into objects, on every rank, and return the values in the file.

    Every rank must call it, and reads the file itself. It runs no code from the file, and imports nothing for it. Only
    the states of the given objects and the values are read, and every byte of them is checked. A file is opened once,
    so that a writer beside it does not matter. After a failure some objects may have their new states already.

    Args:
        path: the file, or the folder of a save of sharded states. It may have been written on another world size, or
            with other shards.
        objects: what to load, by the names that the save used. A value in place of an object asks for the value of
            that name in the file, and has the named tuples, dataclasses and enums that it may be made of.

    Returns:
        The values in the file, by their names. A value with a named tuple, a dataclass or an enum is left out, and
        logged, unless it was asked for.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an object has no load_state_dict.
        ValueError: the file is not a checkpoint, is damaged, or has no state with such a name; or a state does not fit
            its object (missing or unexpected keys, shapes, dtypes, another optimizer, or parameters in another order);
            or the ranks read different files. The message has the path and the key.
        RankFailure: another rank failed.

    Collectives: only those of the objects' `state_dict` and `load_state_dict`. There are two agreements through the
    group's store, and two more each time that another job replaces the file in that moment.
    """
    _wait_for_unfinished()
    path = Path(path)
    with ExitStack() as stack:
        loading = opened_by_all(path, objects, stack)
        with agreed(f"load_checkpoint({os.fspath(path)!r})"):
            checkpoint = loading.checkpoint
            found = loading.read()
            for name, value in loading.stateful.items():
                load_state(path, name, value, found[name], checkpoint, loading.stateful)
    versions = [version.split("+")[0] for version in (checkpoint.torch_version, torch.__version__)]
    if versions[0] != versions[1] and is_first():
        logger.info("%s was written by torch %s, and this is torch %s", path, *versions)
    return {name: value for name, value in found.items() if name not in loading.stateful}


def _wait_for_unfinished() -> None:
    """Wait for the last save in the background, if there is one. All ranks have the same, or none."""
    if _unfinished is not None:
        _unfinished.wait()


def _in_thread(write: Callable[[], None]) -> Future[None]:
    def logged() -> None:
        try:
            write()
        except BaseException as error:  # logged here, because the script may never call wait
            logger.error("a checkpoint was not saved: %s: %s", type(error).__name__, error)
            raise

    # The interpreter waits for the threads of an executor before it ends.
    executor = ThreadPoolExecutor(1, "save_checkpoint")
    written = executor.submit(logged)
    executor.shutdown(wait=False)
    return written


def _write(target: Path, snapshot: Snapshot, keep: int | None) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a checkpoint is a file, but this is a folder", str(target))
    with _named_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_drafts(target)
        with replacing(target, keep) as draft:
            write_states(draft, snapshot)


def _writer_of_shards(target: Path, shards: sharded.Shards, keep: int | None) -> Callable[[], None]:
    """Return what writes this rank's shards, here or in a thread. Every rank calls it."""
    agreement = begun(f"save_checkpoint({os.fspath(target)!r})", kind="shards")
    rank, world_size = 0, 1
    if agreement is not None:
        agreement.may_leave = True  # a thread may still write when its rank has left the world
        rank, world_size = dist.get_rank(), dist.get_world_size()

    def write() -> None:
        token = sharded.new_token()
        if agreement is not None:
            token = agreement.first_value("token", token)
        with _named_errors(target):
            sharded.write_part(target, shards, keep, agreement, token, rank, world_size)

    def write_and_wait() -> None:
        write()
        if agreement is not None:
            agreement.wait()

    return write_and_wait


@contextmanager
def _named_errors(target: Path) -> Iterator[None]:
    """Name the checkpoint in an OSError that names no file: a failed write or flush."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # else it is one of ours
            raise OSError(
                error.errno, f"the checkpoint could not be written ({error.strerror})", str(target)
            ) from error
        raise

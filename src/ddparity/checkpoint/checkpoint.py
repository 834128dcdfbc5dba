"""Save the states of objects to a file and load them, on all ranks together.

A save replaces the file atomically. A load checks every byte and runs no code from the file.
"""

from __future__ import annotations

import errno
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import nn

from ..compat import uncompiled, unwrapped
from ..runtime.agreement import agreed
from ..runtime.progress import mark_progress
from .atomic import earlier_file, remove_stale_drafts, replacing
from .format import Contents, Snapshot, read_states, take_snapshot, write_states

logger = logging.getLogger(__name__)

# The save in the background that no `wait` has ended yet. The next save or load waits for it.
_unfinished: Saving | None = None


class Saving:
    """A save in the background, from `save_checkpoint(background=True)`.

    The process does not end before the save is done.
    """

    def __init__(self, path: Path, written: Future[None] | None) -> None:
        self._path = path
        self._written = written  # None on ranks other than 0
        self._outcome: Future[None] | None = None

    def wait(self) -> None:
        """Wait until the complete file is on disk.

        Every rank must call it. A second call has the result of the first.

        Raises:
            OSError: the file could not be written; raised on rank 0.
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

    Args:
        path: the file. A symbolic link to a file is followed.
        keep: how many files stay, the new one included. The replaced file becomes `path.1`, the file before it
            `path.2`, and so on; the files from `path.<keep>` on are deleted. None: only `path` changes.
        background: copy the states, return, and write the copy in a thread. On rank 0 this takes the size of the states
            in main memory. Later changes of the objects do not change the file. A failure is raised on every rank by
            `Saving.wait`, or by the next save or load.
        objects: what to save, by name. Each has `state_dict` and `load_state_dict`. A model is saved without its DDP
            and torch.compile wrappers, a `Loader` as its position.

    Returns:
        None; with `background` a `Saving`, whose `wait` ends when the file is on disk.

    Raises:
        TypeError: an object has no state_dict, or its state has something that cannot be saved; the message says where.
        ValueError: `keep` is less than 1.
        OSError: the file cannot be written; raised on rank 0. The old file stays.
        RankFailure: another rank failed.

    Collectives: only those of the objects' `state_dict`. There is one agreement through the group's store.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/last.safetensors", model=model)
        ...     load_checkpoint(f"{folder}/last.safetensors", model=model)
    """
    global _unfinished
    _wait_for_unfinished()
    written: Future[None] | None = None
    with agreed(f"save_checkpoint({os.fspath(path)!r})"):
        if keep is not None and keep < 1:
            raise ValueError(f"save_checkpoint(keep={keep}): keep also counts the new file, so give 1 or more")
        target = Path(os.path.realpath(path))
        stateful = {name: _stateful(name, value) for name, value in objects.items()}
        # Every rank calls state_dict, because some of them run collectives.
        states = {name: value.state_dict() for name, value in stateful.items()}
        if not dist.is_initialized() or dist.get_rank() == 0:
            about = {name: {"shapes": shapes} for name, value in stateful.items() if (shapes := _shapes(value))}
            snapshot = take_snapshot(states, about, copy=background)
            if not background:
                _write(target, snapshot, keep)
    mark_progress()
    if not background:
        return None
    if not dist.is_initialized() or dist.get_rank() == 0:
        written = _write_in_thread(target, snapshot, keep)
    _unfinished = Saving(target, written)
    return _unfinished


def load_checkpoint(path: str | os.PathLike[str], /, **objects: Any) -> None:
    """Load states that `save_checkpoint` wrote into objects, on every rank. It runs no code from the file.

    Every rank must call it, and reads the file itself. Only the states of the given objects are read, and every byte of
    them is checked. After a failure some objects may have their new states already.

    Args:
        path: the file.
        objects: what to load, by the names that the save used.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an object has no load_state_dict.
        ValueError: the file is not a checkpoint, is damaged, or has no state with such a name; or a state does not fit
            its object (missing or unexpected keys, shapes, dtypes); or the ranks read different files. The message has
            the path and the key.
        RankFailure: another rank failed.

    Collectives: only those of the objects' `load_state_dict`. There is one agreement through the group's store.
    """
    _wait_for_unfinished()
    path = Path(path)
    with agreed(f"load_checkpoint({os.fspath(path)!r})") as agreement:
        stateful = {name: _stateful(name, value) for name, value in objects.items()}
        try:
            contents = read_states(path, stateful)
        except ValueError as error:
            if (before := earlier_file(path, 1)).is_file():
                error.add_note(f"the checkpoint before it is {before}")
            raise
        if agreement is not None:
            agreement.same(f"the content of {path}", contents.digest)
        for name, value in stateful.items():
            _load_state(path, name, value, contents)
    versions = [version.split("+")[0] for version in (contents.torch_version, torch.__version__)]
    if versions[0] != versions[1] and (not dist.is_initialized() or dist.get_rank() == 0):
        logger.info("%s was written by torch %s, and this is torch %s", path, *versions)


def _wait_for_unfinished() -> None:
    """Wait for the last save in the background, if there is one. All ranks have the same, or none."""
    if _unfinished is not None:
        _unfinished.wait()


def _stateful(name: str, value: Any) -> Any:
    """Return what to call state_dict and load_state_dict on: the value without its DDP and torch.compile wrappers."""
    value = unwrapped(uncompiled(unwrapped(value))) if isinstance(value, nn.Module) else value
    if not hasattr(value, "state_dict") or not hasattr(value, "load_state_dict"):
        raise TypeError(
            f"{name}, a {type(value).__name__}, has no state_dict and load_state_dict: give an object that has both"
        )
    return value


def _shapes(value: Any) -> list[list[list[int]]] | None:
    """Return the shapes of an optimizer's parameters by group; None for another object.

    They are compared at a load, because an optimizer of torch takes the state for other parameters without an error.
    """
    if not isinstance(value, torch.optim.Optimizer):
        return None
    return [[list(parameter.shape) for parameter in group["params"]] for group in value.param_groups]


def _write_in_thread(target: Path, snapshot: Snapshot, keep: int | None) -> Future[None]:
    def write() -> None:
        try:
            _write(target, snapshot, keep)
        except BaseException as error:  # logged here, because the script may never call wait
            logger.error("a checkpoint was not saved: %s: %s", type(error).__name__, error)
            raise

    # The interpreter waits for the threads of an executor before it ends.
    executor = ThreadPoolExecutor(1, "save_checkpoint")
    written = executor.submit(write)
    executor.shutdown(wait=False)
    return written


def _write(target: Path, snapshot: Snapshot, keep: int | None) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a checkpoint is a file, but this is a folder", str(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_drafts(target)
        with replacing(target, keep) as draft:
            write_states(draft, snapshot)
    except OSError as error:
        if error.filename is None:  # a failed write or flush names no file
            raise OSError(
                error.errno, f"the checkpoint could not be written ({error.strerror})", str(target)
            ) from error
        raise


def _load_state(path: Path, name: str, value: Any, contents: Contents) -> None:
    state, misfit = contents.states[name], f"{path} does not fit {name}, a {type(value).__name__}"
    if isinstance(value, nn.Module):
        _check_dtypes(misfit, value, state)
    saved = contents.about.get(name, {}).get("shapes")
    own = _shapes(value)
    if saved is not None and own is not None and saved != own:
        raise ValueError(f"{misfit}: {_first_difference(saved, own)}")
    try:
        value.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"{misfit}: {type(error).__name__}: {error} (written by torch {contents.torch_version}, read by "
            f"{torch.__version__})"
        ) from error


def _check_dtypes(misfit: str, module: nn.Module, state: dict[str, Any]) -> None:
    """Refuse a state whose dtypes are not the module's: torch's load_state_dict would convert it without an error."""
    for key, own in module.state_dict().items():
        saved = state.get(key)
        if isinstance(own, torch.Tensor) and isinstance(saved, torch.Tensor) and own.dtype != saved.dtype:
            raise ValueError(
                f"{misfit}: {key} is {saved.dtype} in the file and {own.dtype} here: convert the model to the file's "
                f"dtype with .to() before loading, and back after it"
            )


def _first_difference(saved: list[list[list[int]]], own: list[list[list[int]]]) -> str:
    """Return the first difference between the shapes of an optimizer's parameters in the file and its own shapes."""
    for group, (saved_shapes, own_shapes) in enumerate(zip(saved, own, strict=False)):
        for number, (one, other) in enumerate(zip(saved_shapes, own_shapes, strict=False)):
            if one != other:
                return f"parameter {number} of group {group} is {tuple(one)} in the file and {tuple(other)} here"
    counts = [[len(shapes) for shapes in groups] for groups in (saved, own)]
    return f"its groups have {counts[0]} parameters in the file and {counts[1]} here"

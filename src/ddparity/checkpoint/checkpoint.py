"""Checkpoints: atomic, checked, and loading one runs no code from it."""

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
from .atomic import clear_drafts, earlier, replacing
from .format import Contents, Snapshot, read_states, take_snapshot, write_states

logger = logging.getLogger(__name__)

# The save in the background that nobody has waited for: the next save or load does.
_unfinished: Saving | None = None


class Saving:
    """A save in the background. The process does not end before it is done."""

    def __init__(self, path: Path, written: Future[None] | None) -> None:
        self._path = path
        self._written = written  # on rank 0
        self._outcome: Future[None] | None = None

    def wait(self) -> None:
        """Return when the file is there, whole and flushed. Every rank calls it; a second time it waits for nothing.

        Raises:
            OSError: it could not be written; on rank 0, and `RankFailure` on the others.

        Collectives: none; the first time an agreement through the group's store.
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
    """Write the states of objects to one file: rank 0 writes, and all ranks learn of a failure.

    The file is written beside the target, flushed to disk and renamed, so that a crash at any instant leaves the old
    one or the new one, whole. It is a safetensors file whose metadata describes the states in JSON, with a SHA-256 of
    each tensor. Every rank calls it, with the same arguments.

    Args:
        path: of the file; a link to a file is followed.
        keep: how many files to keep, this one included: the one before becomes `path.1`, that one `path.2`, …, and
            those from `path.<keep>` on are deleted. None: only `path` is touched.
        background: return as soon as the states are copied (on rank 0: once more their size in memory), and write in a
            thread. What is written is what the states were at the call. A failure is raised by the `wait` of what is
            returned, or by the next save or load, on every rank.
        objects: by name, each with a `state_dict`; a model is saved as what is inside of DDP and torch.compile, and a
            `Loader` as the step to go on with.

    Raises:
        TypeError: an object has no state_dict, or its state something that cannot be saved, which is named.
        ValueError: `keep` is less than 1.
        OSError: the file cannot be written; on rank 0, and `RankFailure` on the others. The old one stays.

    Collectives: none but those of the objects' `state_dict`; an agreement through the group's store.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/last.safetensors", model=model)
        ...     load_checkpoint(f"{folder}/last.safetensors", model=model)
    """
    global _unfinished
    _settle()
    written: Future[None] | None = None
    with agreed(f"save_checkpoint({os.fspath(path)!r})"):
        if keep is not None and keep < 1:
            raise ValueError(f"save_checkpoint(keep={keep}): at least the file itself is kept, give 1 or more")
        target = Path(os.path.realpath(path))
        stateful = {name: _stateful(name, value) for name, value in objects.items()}
        # On every rank: some state_dicts are collective.
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
        written = _in_thread(target, snapshot, keep)
    _unfinished = Saving(target, written)
    return _unfinished


def load_checkpoint(path: str | os.PathLike[str], /, **objects: Any) -> None:
    """Put the states that `save_checkpoint` wrote back into objects, on every rank. Runs no code from the file.

    Every rank reads the file, and only the states of the objects that are given, checking every byte. Where it fails
    some objects may have their states already.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an object has no load_state_dict.
        ValueError: the file is no checkpoint, is damaged, has no state of that name, or one that does not fit the
            object (missing and unexpected keys, shapes, types); or the ranks read different files. Names the file and
            the key. Where one rank fails, the others raise `RankFailure`.

    Collectives: none but those of the objects' `load_state_dict`; an agreement through the group's store.
    """
    _settle()
    path = Path(path)
    with agreed(f"load_checkpoint({os.fspath(path)!r})") as agreement:
        stateful = {name: _stateful(name, value) for name, value in objects.items()}
        try:
            contents = read_states(path, stateful)
        except ValueError as error:
            if (before := earlier(path, 1)).is_file():
                error.add_note(f"{before} is the one before it")
            raise
        if agreement is not None:
            agreement.same(f"the content of {path}", contents.digest)
        for name, value in stateful.items():
            _put(path, name, value, contents)
    versions = [version.split("+")[0] for version in (contents.torch_version, torch.__version__)]
    if versions[0] != versions[1] and (not dist.is_initialized() or dist.get_rank() == 0):
        logger.info("%s was written by torch %s, and this is %s", path, *versions)


def _settle() -> None:
    """Wait for the save in the background. Each rank has the same one, or none."""
    if _unfinished is not None:
        _unfinished.wait()


def _stateful(name: str, value: Any) -> Any:
    value = unwrapped(uncompiled(unwrapped(value))) if isinstance(value, nn.Module) else value
    if not hasattr(value, "state_dict") or not hasattr(value, "load_state_dict"):
        raise TypeError(
            f"{name}, a {type(value).__name__}, has no state_dict and load_state_dict to save and load it by"
        )
    return value


def _shapes(value: Any) -> list[list[list[int]]] | None:
    """Of an optimizer's parameters, by group: torch puts the state of other ones into it without a word."""
    if not isinstance(value, torch.optim.Optimizer):
        return None
    return [[list(parameter.shape) for parameter in group["params"]] for group in value.param_groups]


def _in_thread(target: Path, snapshot: Snapshot, keep: int | None) -> Future[None]:
    def write() -> None:
        try:
            _write(target, snapshot, keep)
        except BaseException as error:  # nobody may come to wait
            logger.error("a checkpoint was not saved: %s: %s", type(error).__name__, error)
            raise

    # An executor's thread is waited for when the interpreter ends.
    executor = ThreadPoolExecutor(1, "save_checkpoint")
    written = executor.submit(write)
    executor.shutdown(wait=False)
    return written


def _write(target: Path, snapshot: Snapshot, keep: int | None) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a checkpoint is a file, and this is a folder", str(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_drafts(target)
        with replacing(target, keep) as draft:
            write_states(draft, snapshot)
    except OSError as error:
        if error.filename is None:  # a write or a flush that failed
            raise OSError(
                error.errno, f"the checkpoint could not be written ({error.strerror})", str(target)
            ) from error
        raise


def _put(path: Path, name: str, value: Any, contents: Contents) -> None:
    state, place = contents.states[name], f"{path} does not fit {name}, a {type(value).__name__}"
    if isinstance(value, nn.Module):
        _check_types(place, value, state)
    theirs = contents.about.get(name, {}).get("shapes")
    ours = _shapes(value)
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(f"{place}: {_first_difference(theirs, ours)}")
    try:
        value.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"{place}: {type(error).__name__}: {error} (written by torch {contents.torch_version}, read by "
            f"{torch.__version__})"
        ) from error


def _check_types(place: str, module: nn.Module, state: dict[str, Any]) -> None:
    """torch rounds to the module's own types without a word."""
    for key, own in module.state_dict().items():
        saved = state.get(key)
        if isinstance(own, torch.Tensor) and isinstance(saved, torch.Tensor) and own.dtype != saved.dtype:
            raise ValueError(
                f"{place}: {key} is {saved.dtype} in the file and {own.dtype} here: bring the model to the file's type "
                f"before loading, with .to(), and to another one after it"
            )


def _first_difference(theirs: list[list[list[int]]], ours: list[list[list[int]]]) -> str:
    for group, (their_shapes, our_shapes) in enumerate(zip(theirs, ours, strict=False)):
        for number, (their, our) in enumerate(zip(their_shapes, our_shapes, strict=False)):
            if their != our:
                return f"parameter {number} of group {group} is {tuple(their)} in the file and {tuple(our)} here"
    counts = [[len(shapes) for shapes in one] for one in (theirs, ours)]
    return f"its groups have {counts[0]} parameters in the file and {counts[1]} here"

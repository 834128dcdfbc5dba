"""Read a checkpoint on all ranks: open the same file everywhere, read what is asked for, and give it to the objects."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compat import is_dtensor, with_layer_versions
from ..runtime.agreement import agreed
from . import sharded
from .atomic import earlier_file
from .format import Checkpoint, opened
from .nodes import DTYPES, Types, build, leaf_keys, named_types, types_in
from .objects import check_about, is_first, sorted_out

logger = logging.getLogger(__name__)

_ATTEMPTS = 20  # beside a job that replaces the file again and again


@dataclass(frozen=True)
class Loading:
    """An open checkpoint, the objects to load, and the nodes to read by their names."""

    checkpoint: Checkpoint
    stateful: dict[str, Any]
    nodes: dict[str, Any]
    types: dict[str, Types]
    reads: sharded.Reads | None  # of the tensors that are sharded in the file or here

    def read(self) -> dict[str, Any]:
        """Return the states and the values, by name.

        Raises:
            ValueError: the file is damaged, or a value needs a type that is not there.
        """
        targets = {} if self.reads is None else self.reads.targets
        found = [leaf for node in self.nodes.values() for _, leaf in leaf_keys(node)]
        tensors = self.checkpoint.read_tensors([leaf for leaf in found if leaf["name"] not in targets])
        if self.reads is not None:
            self.reads.take()
        tensors |= targets
        states = {}
        for name, node in self.nodes.items():
            try:
                state = build(node, tensors, self.types.get(name, {}), name)
            except ValueError as error:
                raise ValueError(f"{self.checkpoint.path}: {error}") from error
            if isinstance(state, dict) and name in self.checkpoint.versions:
                state = with_layer_versions(state, self.checkpoint.versions[name])
            states[name] = state
        return states


def opened_by_all(path: Path, objects: dict[str, Any], stack: ExitStack) -> Loading:
    """Open a checkpoint on every rank, the same one.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `load_checkpoint`.
    """
    for attempt in range(_ATTEMPTS):
        own, last = ExitStack(), attempt == _ATTEMPTS - 1
        with own, agreed(f"load_checkpoint({os.fspath(path)!r})") as agreement:
            loading = _opened(path, objects, own, last)
            digest = "" if loading is None else loading.checkpoint.digest
            if agreement is not None and (loading is None or agreement.first_value("content", digest) != digest):
                agreement.count("others")
            stack.push(own.pop_all())
        if loading is not None and (agreement is None or agreement.count("others", 0) == 0):
            return loading
        stack.pop_all().close()  # a writer has replaced the file between two ranks
    raise ValueError(f"the content of {path} differs between ranks: give one file that all ranks share, or equal ones")


def _opened(path: Path, objects: dict[str, Any], stack: ExitStack, last: bool) -> Loading | None:
    """Open the checkpoint on this rank; None if its shards were replaced since, unless this is the last attempt."""
    stateful, values = sorted_out(objects)
    main = path / sharded.MAIN if path.is_dir() else path
    try:
        checkpoint = stack.enter_context(opened(main))
        nodes = _asked_for(checkpoint, stateful, values)
        own = {name: value for name, value in stateful.items() if named_types(nodes[name])}
        types = {name: types_in(value.state_dict()) for name, value in own.items()}
        types |= {name: types_in(value) for name, value in values.items()}
        return Loading(checkpoint, stateful, nodes, types, _sharded_reads(checkpoint, stateful, nodes, stack))
    except FileNotFoundError as error:
        if str(main) in str(error) or last:
            raise
        return None
    except ValueError as error:
        if (before := earlier_file(main, 1)).is_file():
            error.add_note(f"the checkpoint before it is {before}")
        raise


def _asked_for(checkpoint: Checkpoint, stateful: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the nodes of the objects and of the values in the file.

    Raises:
        TypeError, ValueError: an object is not in the file, or is a value there, or the other way round.
    """
    path, about = checkpoint.path, checkpoint.about
    in_file = [name for name in checkpoint.nodes if type(about.get(name)) is dict and about[name].get("value") is True]
    for name in (*stateful, *values):
        if name not in checkpoint.nodes:
            raise ValueError(
                f"{path} has no state with the name {name!r}: it has {_listed(checkpoint.nodes) or 'none'}"
            )
    for name, value in values.items():
        if name not in in_file:
            raise TypeError(
                f"{name}, a {type(value).__name__}, has no state_dict and load_state_dict, and {path} has the state of "
                f"an object under that name: give an object that has both"
            )
    for name, value in stateful.items():
        if name in in_file:
            raise ValueError(
                f"{path} has a value under the name {name!r}, no state of a {type(value).__name__}: load_checkpoint "
                f"returns it, so leave {name} out of the call"
            )
    nodes = {name: checkpoint.nodes[name] for name in stateful}
    for name in in_file:
        types = named_types(checkpoint.nodes[name])
        if not types or name in values:
            nodes[name] = checkpoint.nodes[name]
        elif is_first():
            logger.warning(
                "%s has %s, of the type %s, which no file can import: give load_checkpoint(…, %s=…) a value "
                "of that type to get it back", path, _listed([name]), _listed(sorted(types)), _listed([name]),
            )  # fmt: skip
    return nodes


def _listed(names: Iterable[str]) -> str:
    """Return names that a file has as one line of text, of any length and with any characters."""
    text = ", ".join(name if name.isprintable() else repr(name) for name in names)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _sharded_reads(
    checkpoint: Checkpoint, stateful: dict[str, Any], nodes: dict[str, Any], stack: ExitStack
) -> sharded.Reads | None:
    """Plan the reads of tensors that are sharded in the file or here; None if there are none."""
    wanted: list[dict[str, Any]] = []
    targets: dict[str, Any] = {}
    for name, node in nodes.items():
        value = stateful.get(name)
        leaves = list(leaf_keys(node))
        if not any("chunks" in leaf for _, leaf in leaves) and not _has_shards(value):
            continue
        own = value.state_dict() if value is not None and not isinstance(value, torch.optim.Optimizer) else {}
        for keys, leaf in leaves:
            target = _target(value, own, keys, leaf, f"{checkpoint.path} does not fit {name}")
            if target is not None or "chunks" in leaf:
                wanted.append(leaf)
                targets[leaf["name"]] = target
    return sharded.plan_reads(checkpoint, wanted, targets.__getitem__, stack) if wanted else None


def _has_shards(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return any(map(is_dtensor, value.parameters()))
    if isinstance(value, torch.optim.Optimizer):
        return any(is_dtensor(parameter) for group in value.param_groups for parameter in group["params"])
    return False


def _target(value: Any, own: Any, keys: tuple[Any, ...], leaf: dict[str, Any], misfit: str) -> Any:
    """Return the DTensor that a tensor of the file is read into; None for a whole tensor in main memory.

    A module's own tensors are written to in place. An optimizer may have no state yet, and its parameters say how its
    tensors are cut.

    Raises:
        ValueError: the module's tensor has another shape or dtype.
    """
    dtype, shape = DTYPES[leaf["dtype"]], torch.Size(leaf["shape"])
    if isinstance(value, torch.optim.Optimizer):
        parameters = [parameter for group in value.param_groups for parameter in group["params"]]
        number = keys[1] if len(keys) > 2 and keys[0] == "state" else None
        if type(number) is not int or not 0 <= number < len(parameters):
            return None
        like = parameters[number]
        return torch.empty_like(like, dtype=dtype).detach() if is_dtensor(like) and like.shape == shape else None
    for key in keys:
        if isinstance(own, Mapping):
            own = own.get(key)
        else:
            own = own[key] if isinstance(own, (list, tuple)) and type(key) is int and key < len(own) else None
    if not is_dtensor(own):
        return None
    if (own.shape, own.dtype) != (shape, dtype):
        raise ValueError(
            f"{misfit}: {'.'.join(map(str, keys))} is {tuple(shape)} of {dtype} in the file and {tuple(own.shape)} of "
            f"{own.dtype} here"
        )
    return own.detach()


def load_state(path: Path, name: str, value: Any, state: Any, checkpoint: Checkpoint, stateful: dict[str, Any]) -> None:
    """Give an object its state.

    Raises:
        ValueError: the state does not fit the object.
    """
    misfit = f"{path} does not fit {name}, a {type(value).__name__}"
    if isinstance(value, nn.Module):
        _check_dtypes(misfit, value, state)
    check_about(misfit, checkpoint.about.get(name), value, stateful)
    try:
        value.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"{misfit}: {type(error).__name__}: {error} (written by torch {checkpoint.torch_version}, read by "
            f"{torch.__version__})"
        ) from error


def _check_dtypes(misfit: str, module: nn.Module, state: Any) -> None:
    """Refuse a state whose dtypes are not the module's: torch's load_state_dict would convert it without an error."""
    for key, own in module.state_dict().items():
        saved = state.get(key) if isinstance(state, Mapping) else None
        if isinstance(own, torch.Tensor) and isinstance(saved, torch.Tensor) and own.dtype != saved.dtype:
            raise ValueError(
                f"{misfit}: {key} is {saved.dtype} in the file and {own.dtype} here: convert the model to the file's "
                f"dtype with .to() before loading, and back after it"
            )

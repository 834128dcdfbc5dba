"""Checkpoints: atomic, and loading one runs no code from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .files import replacing
from .meeting import agreed
from .replicate import unwrapped
from .trees import Node, named_types, new_tensor, put_together, take_apart

_FORMAT = "ddparity 1"


def save_checkpoint(path: str | os.PathLike[str], **objects: Any) -> None:
    """Write the states of objects to one file: rank 0 writes, and all ranks learn of a failure.

    The file is written beside the target, flushed to disk and renamed, so that a crash leaves the old one or the new
    one, whole. It is a safetensors file whose metadata describes the states in JSON. Every rank calls it.

    Args:
        objects: by name, each with a `state_dict`; a model is saved as what is inside of DDP.

    Raises:
        TypeError: an object has no state_dict, or its state something that cannot be saved.
        OSError: the file cannot be written; on rank 0, and `RankFailure` on the others.

    Collectives: none; an agreement through the group's store.
    """
    with agreed(f"save_checkpoint({os.fspath(path)!r})"):
        states = {name: _stateful(name, value).state_dict() for name, value in objects.items()}
        if not dist.is_initialized() or dist.get_rank() == 0:
            _write(Path(path), states)


def load_checkpoint(path: str | os.PathLike[str], **objects: Any) -> None:
    """Put the states that `save_checkpoint` wrote back into objects, on every rank. Runs no code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is damaged, or has no state of that name.

    Collectives: none; an agreement through the group's store.
    """
    with agreed(f"load_checkpoint({os.fspath(path)!r})"):
        states = _read(Path(path))
        for name, value in objects.items():
            if name not in states:
                raise ValueError(f"{path} has no state of the name {name!r}: it has {', '.join(states) or 'none'}")
            _stateful(name, value).load_state_dict(states[name])


def _stateful(name: str, value: Any) -> Any:
    value = unwrapped(value) if isinstance(value, nn.Module) else value
    if not hasattr(value, "state_dict") or not hasattr(value, "load_state_dict"):
        raise TypeError(
            f"{name}, a {type(value).__name__}, has no state_dict and load_state_dict to save and load it by"
        )
    return value


def _write(path: Path, states: dict[str, Any]) -> None:
    node, leaves = take_apart([states])  # in a list, whose entries come back as they were
    if types := named_types(node):
        raise TypeError(
            f"a state_dict has a {types[0]}: states are of tensors, numbers, strings, lists, tuples and dicts"
        )
    # Tied weights share memory, which the format refuses: each leaf is a copy of its own.
    tensors = {str(number): leaf.detach().cpu().clone() for number, leaf in enumerate(leaves)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        save_file(tensors, beside, {"format": _FORMAT, "states": json.dumps(node)})


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is no checkpoint of ddparity: its format is {metadata.get('format')!r}")
            node: Node = json.loads(metadata["states"])
            if types := named_types(node):  # importing them would run code that the file chooses
                raise ValueError(f"{path} names the type {types[0]}, which no checkpoint of ddparity does")
            build, (targets,) = put_together([node], lambda described: new_tensor({**described, "device": "cpu"}))
            for number, target in targets.items():
                target.copy_(file.get_tensor(str(number)))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no whole checkpoint: {error}") from error
    (states,) = build()
    return states  # type: ignore[no-any-return]

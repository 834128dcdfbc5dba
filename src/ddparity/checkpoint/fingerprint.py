"""Compute the SHA-256 of a model's weights: two models have the same one only if their weights have equal bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..comm.trees import byte_view
from ..compat import whole_tensor

# What torch.compile and activation checkpointing insert into the names of a state dict, and what DDP puts before them.
_WRAPPERS_ANYWHERE = ("_orig_mod.", "_checkpoint_wrapped_module.")
_WRAPPERS_IN_FRONT = ("module.",)


def fingerprint(model_or_state_dict: nn.Module | Sequence[nn.Module] | Mapping[str, Any]) -> str:
    """Return the SHA-256, as hex digits, of the names, shapes, dtypes and bytes of a state.

    Several models, as `[generator, discriminator]`, have that of a `ModuleList` of them.

    It is the same for a model and for its state dict, with and without the wrappers of DDP and torch.compile, on any
    device and in any order of names. A nested state, such as an optimizer's, counts as a whole. A sharded model
    (`fully_shard`) has the fingerprint that it has without shards; its tensors are gathered one after the other.

    Raises:
        TypeError: an entry is not a tensor, a number, a string, None, or a dict, list or tuple of them.

    Collectives: none; of a sharded state one all-gather for each sharded tensor, and every rank must call it.

    Example:
        >>> fingerprint({"a": torch.zeros(2)}) == fingerprint({"module.a": torch.zeros(2)})
        True
    """
    state: Any = model_or_state_dict
    if isinstance(state, (list, tuple)) and all(isinstance(one, nn.Module) for one in state):
        state = {f"{number}.{name}": value for number, one in enumerate(state) for name, value in _state(one).items()}
    elif isinstance(state, nn.Module):
        state = _state(state)
    if not isinstance(state, Mapping):
        raise TypeError(f"fingerprint() got a {type(state).__name__}: give a module, several, or a state dict")
    digest = hashlib.sha256()
    for name, value in sorted(_unwrapped(state).items()):
        _feed(digest, name, value)
    return digest.hexdigest()


def _state(model: nn.Module) -> dict[str, Any]:
    """Return the model's state without the names of DDP, also of DDP modules inside of it, as in a ModuleList."""
    state: dict[str, Any] = model.state_dict()
    for place, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            plain = f"{place}." if place else ""
            wrapped = f"{plain}module."
            state = {plain + n.removeprefix(wrapped) if n.startswith(wrapped) else n: v for n, v in state.items()}
    return state


def _unwrapped(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the state with the names that it has without wrappers."""
    names = {str(name): value for name, value in state.items()}
    names = {plain_name(name): value for name, value in names.items()}
    for wrapper in _WRAPPERS_IN_FRONT:
        while names and all(name.startswith(wrapper) for name in names):
            names = {name.removeprefix(wrapper): value for name, value in names.items()}
    return names


def plain_name(name: str) -> str:
    """Return the name of a parameter as it is without the wrappers around modules inside of its model."""
    for wrapper in _WRAPPERS_ANYWHERE:
        name = name.replace(wrapper, "")
    return name


def _feed(digest: Any, name: str, value: Any) -> None:
    """Add a value to a digest: a header of name, kind and size, then its content."""
    if isinstance(value, torch.Tensor):
        whole = whole_tensor(value)
        dense = whole.detach().cpu().resolve_conj().resolve_neg().contiguous()
        header = [name, str(dense.dtype), list(dense.shape)]
        digest.update(json.dumps(header).encode() + b"\0")
        digest.update(byte_view(dense).numpy())
    elif isinstance(value, Mapping):
        digest.update(json.dumps([name, "mapping", len(value)]).encode() + b"\0")
        for key in sorted(value, key=str):
            _feed(digest, f"{name}.{key}", value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(json.dumps([name, "sequence", len(value)]).encode() + b"\0")
        for number, item in enumerate(value):
            _feed(digest, f"{name}.{number}", item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(json.dumps([name, type(value).__name__, value]).encode() + b"\0")
    else:
        raise TypeError(
            f"fingerprint(): {name} is a {type(value).__name__}: give tensors, numbers, strings or None, in dicts, "
            f"lists or tuples"
        )

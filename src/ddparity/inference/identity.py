"""Decide whether a directory of predictions belongs to the call that wants to resume it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checkpoint.fingerprint import fingerprint
from ..compat import uncompiled, unwrapped
from ..data.rng import preserve_streams
from .functions import modules_in
from .samples import digest_of, few_of

Key = str | int | tuple[Any, ...] | None  # a tuple holds keys
_DIGITS = 32  # hex digits of a digest that are recorded
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # differs between processes
_COMPILED = "_orig_mod"  # the name that torch.compile gives to a module inside its wrapper


@dataclass(frozen=True)
class Identity:
    """What a prediction computes, as far as it can be compared.

    `values`: recorded in the directory; a call resumes a directory only if all values are equal.
    `uncompared`: parts that may compute something else although their values are equal, in words.
    """

    values: dict[str, str | None]
    uncompared: list[str]


def checked_key(key: Key) -> str | None:
    """Return the text that is recorded for a key; two keys have the same text only if they are equal.

    Raises:
        TypeError: the key is not a str, an int or a nested tuple of them.
    """
    if key is None:
        return None
    if not _is_key(key):
        raise TypeError(
            f"predict(key={key!r}) got a {type(key).__name__}: give a str, an int, or a tuple of them, "
            f'e.g. key=("resnet18 v2", 224)'
        )
    return repr(key)


def _is_key(key: Any) -> bool:
    return type(key) in (str, int) or (type(key) is tuple and all(map(_is_key, key)))


def identity(
    model: Any,
    inputs: Callable[[Any], Any] | None,
    collate_fn: Callable[[list[Any]], Any] | None,
    dataset: Any,
    length: int,
) -> Identity:
    """Return the identity of a prediction.

    A module is compared by the fingerprint of its state dict and of its buffers that are not saved, and by the types
    and options of its layers: as they print them, and their attributes that are numbers or strings. Other attributes,
    hooks and edited code are not compared. A data set is compared by its type, its length, and its first, middle and
    last sample. Functions are compared by their names and by the modules that they use, and count as uncompared.

    Raises:
        SampleError: the data set fails for one of the three samples.
    """
    uncompared: list[str] = []
    values = {
        "model": _of_module(model, uncompared) if isinstance(model, nn.Module) else _of_function(model, uncompared),
        "inputs": None if inputs is None else _of_function(inputs, uncompared),
        "collate_fn": None if collate_fn is None else _name(collate_fn),
        "data set": f"{type(dataset).__qualname__} of {length} samples {_of_samples(dataset, length, uncompared)}",
    }
    functions = {"model": None if isinstance(model, nn.Module) else model, "inputs": inputs, "collate_fn": collate_fn}
    uncompared += [f"{name}={_name(one)}, a function" for name, one in functions.items() if one is not None]
    return Identity(values, uncompared)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _of_function(function: Callable[[Any], Any], uncompared: list[str]) -> str:
    """Return a function's name, and its modules'."""
    modules = [f"{name}: {_of_module(module, uncompared)}" for name, module in modules_in(function).items()]
    return ", ".join([_name(function), *modules])


def _of_module(model: nn.Module, uncompared: list[str]) -> str:
    """Return a module's type and a digest that is the same inside DDP, inside torch.compile, and on any device."""
    while (inner := uncompiled(unwrapped(model))) is not model:
        model = inner
    try:
        prints = [fingerprint(model), fingerprint(dict(model.named_buffers()))]  # a state dict lacks some buffers
        digest = hashlib.sha256(json.dumps([prints, _layers(model)]).encode()).hexdigest()[:_DIGITS]
    except Exception as error:  # a type of state or of tensor that has no bytes
        uncompared.append(f"the model's weights ({type(error).__name__}: {error})")
        digest = "unknown"
    return f"{type(model).__qualname__} {digest}"


def _layers(model: nn.Module) -> list[list[str]]:
    """Return the name, type and options of each layer: a stride, an eps or a number of heads is in no weight."""
    return [
        [
            ".".join(part for part in name.split(".") if part != _COMPILED),
            type(layer).__qualname__,
            _ADDRESS.sub("", layer.extra_repr()),
            _attributes(layer),
        ]
        for name, layer in model.named_modules()
        if uncompiled(layer) is layer
    ]


def _attributes(layer: nn.Module) -> str:
    """Return the public attributes that are numbers or strings: not every layer prints its options."""
    return repr(
        [
            (name, value)
            for name, value in sorted(vars(layer).items())
            if type(value) in (bool, int, float, str) and not name.startswith("_") and name != "training"
        ]
    )


def _of_samples(dataset: Any, length: int, uncompared: list[str]) -> str:
    """Return a digest of the first, the middle and the last sample."""
    digest = hashlib.sha256()
    with preserve_streams():
        for index in few_of(length):
            try:
                digest.update(digest_of(dataset, index).encode())
            except TypeError as error:
                uncompared.append(f"the data set's samples ({error})")
                return "unknown"
    return digest.hexdigest()[:_DIGITS]

"""What a run's outputs depend on, in a few words and digests, to tell whose results a directory holds."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..fingerprint import fingerprint
from ..replicate import unwrapped
from ..seeds import kept_streams, seed_streams
from ..trees import byte_view

_DEPTH = 6  # of what holds what


def identity(value: Any) -> str | None:
    """A model, or a function that takes part: its name, and a digest of what it computes with.

    Of a module its parameters and buffers, its submodules' types and plain attributes; of a function its code,
    defaults, what it closes over or is bound to, and what of its own module it names. What is of another kind counts by
    its type alone.
    """
    if value is None:
        return None
    if isinstance(value, nn.Module):
        value = unwrapped(value)
        return f"{type(value).__qualname__} {_digest(_words(value, _DEPTH, set()))}"
    return f"{getattr(value, '__qualname__', type(value).__qualname__)} {_digest(_words(value, _DEPTH, set()))}"


def identity_of_dataset(dataset: Any, length: int) -> str:
    """The type, the length, and the content of the first, the middle and the last sample."""
    words: list[str] = []
    with kept_streams():
        for number in sorted({0, length // 2, length - 1} if length else ()):
            seed_streams(number)  # augmentation draws the same again
            words += _words(dataset[number], _DEPTH, set())
    return f"{type(dataset).__qualname__} of {length} samples {_digest(words)}"


def _digest(words: Any) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]


def _words(value: Any, depth: int, seen: set[int]) -> Iterator[str]:
    """Words that tell a value from others; `seen`: the objects that are on their way already."""
    yield type(value).__qualname__
    if isinstance(value, (str, bytes, int, float, complex, type(None))):
        yield repr(value)
    elif isinstance(value, torch.Tensor):
        whole = value.detach().cpu().contiguous()
        yield f"{whole.dtype} {tuple(whole.shape)} {_of_bytes(byte_view(whole).numpy().tobytes())}"
    elif isinstance(value, (np.ndarray, np.generic)):
        yield f"{value.dtype} {value.shape} {_of_bytes(value.tobytes())}"
    elif isinstance(value, frozenset):
        yield from sorted(map(repr, value))
    elif isinstance(value, Mapping):
        for key, one in value.items() if depth else ():
            yield repr(key)
            yield from _words(one, depth - 1, seen)
    elif isinstance(value, (list, tuple)):
        for one in value if depth else ():
            yield from _words(one, depth - 1, seen)
    elif hasattr(value, "tobytes"):  # an image
        yield f"{getattr(value, 'size', '')} {_of_bytes(value.tobytes())}"
    elif depth and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield from _of_module(value, depth - 1, seen)
        elif isinstance(value, types.FunctionType):
            yield from _of_function(value, depth - 1, seen)
        elif isinstance(value, types.MethodType):
            yield from _words([value.__self__, value.__func__], depth - 1, seen)
        elif isinstance(value, functools.partial):
            yield from _words([value.func, value.args, value.keywords], depth - 1, seen)
        elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)):
            yield from _words(vars(value), depth - 1, seen)


def _of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _of_module(module: nn.Module, depth: int, seen: set[int]) -> Iterator[str]:
    yield fingerprint(module)
    for name, one in module.named_modules():
        yield f"{name} {type(one).__qualname__}"
        yield from _words(dict(one.named_buffers(recurse=False)), depth, seen)  # also those that are not saved
        plain = {key: held for key, held in vars(one).items() if not key.startswith("_") and key != "training"}
        yield from _words(plain, 1, seen)


def _of_function(function: types.FunctionType, depth: int, seen: set[int]) -> Iterator[str]:
    yield function.__qualname__
    yield from _of_code(function.__code__)
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    yield from _words([function.__defaults__, function.__kwdefaults__, cells], depth, seen)
    for name in function.__code__.co_names:
        named = function.__globals__.get(name)
        own = getattr(named, "__module__", None) == function.__module__
        if own or isinstance(named, (nn.Module, str, bytes, int, float, complex, torch.Tensor, np.ndarray)):
            yield from _words(named, depth, seen)


def _of_code(code: types.CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant)
        else:
            yield from _words(constant, _DEPTH, set())


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # the variable has no value yet
        return False

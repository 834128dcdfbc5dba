"""What a run's outputs depend on, in a few words and digests, to tell whose results a directory holds."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from torch import nn

from ..fingerprint import fingerprint
from ..replicate import unwrapped
from ..seeds import kept_streams, seed_streams
from ..trees import byte_view, take_apart


def of_model(model: Any) -> str:
    """A module's parameters and buffers; a function's name and code, and the modules that it holds."""
    if isinstance(model, nn.Module):
        module = unwrapped(model)
        return f"{type(module).__qualname__} {fingerprint(module)}"
    return " ".join(_of_function(model))


def of_function(function: Callable[..., Any] | None) -> str | None:
    return None if function is None else " ".join(_of_function(function))


def _of_function(function: Any) -> list[str]:
    if isinstance(function, functools.partial):
        held = [function.func, *function.args, *function.keywords.values()]
        return ["partial", *(word for value in held for word in _of_function(value))]
    if isinstance(function, nn.Module):
        return [of_model(function)]
    code = getattr(function, "__code__", None)
    if code is None:
        return [getattr(function, "__qualname__", type(function).__qualname__)]
    words = [function.__qualname__, hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()]
    held = [cell.cell_contents for cell in function.__closure__ or ()] + [getattr(function, "__self__", None)]
    return words + [of_model(value) for value in held if isinstance(value, nn.Module)]


def of_dataset(dataset: Any, length: int) -> str:
    """The type, the length, and the content of the first, the middle and the last sample."""
    digest = hashlib.sha256()
    with kept_streams():
        for number in sorted({0, length // 2, length - 1} if length else ()):
            seed_streams(number)  # augmentation draws the same again
            digest.update(_content(dataset[number]))
    return f"{type(dataset).__qualname__} of {length} samples {digest.hexdigest()}"


def _content(sample: Any) -> bytes:
    try:
        node, leaves = take_apart(sample)
    except TypeError:  # an image, say, which only the collate function understands
        return type(sample).__qualname__.encode()
    return repr(node).encode() + b"".join(byte_view(leaf.cpu()).numpy().tobytes() for leaf in leaves)

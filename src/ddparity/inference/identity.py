"""What a run's outputs depend on, in a few words and digests, to tell whose results a directory holds."""

from __future__ import annotations

import uuid
from typing import Any

from torch import nn

from ..compat import unwrapped
from ..data.rng import preserve_streams, seed_streams
from ..errors import SampleError
from .content import Contents


def identity(value: Any) -> str | None:
    """A model, or a function that takes part: its name, and a digest of what it computes with.

    Of a module its parameters and buffers, its submodules, hooks and attributes; of a function its code, defaults, what
    it closes over or is bound to, and the globals that it names; of any other object what a copy would be made from; of
    the user's own classes what they define. What cannot be looked into gives an identity that no other call gives:
    another model's results must not pass for this one's.
    """
    if value is None:
        return None
    value = unwrapped(value) if isinstance(value, nn.Module) else value
    contents = Contents()
    return f"{getattr(value, '__qualname__', type(value).__qualname__)} {_sealed(contents, contents.digest(value))}"


def identity_of_dataset(dataset: Any, length: int) -> str:
    """The type, the length, and the content of the first, the middle and the last sample.

    Raises:
        SampleError: the data set did not give one of them.
    """
    contents, digests = Contents(), []
    with preserve_streams():
        for number in sorted({0, length // 2, length - 1} if length else ()):
            seed_streams(number)  # augmentation draws the same again
            digests.append(contents.digest(_sample(dataset, number)))
    whole = _sealed(contents, contents.digest(digests))
    return f"{type(dataset).__qualname__} of {length} samples {whole}"


def _sample(dataset: Any, number: int) -> Any:
    try:
        return dataset[number]
    except Exception as error:
        raise SampleError(f"the data set failed for index {number}: {type(error).__name__}: {error}") from error


def _sealed(contents: Contents, digest: str) -> str:
    if contents.unknown is None:
        return digest[:32]
    return f"{digest[:32]} (with {contents.unknown}, which cannot be compared: {uuid.uuid4().hex[:8]})"

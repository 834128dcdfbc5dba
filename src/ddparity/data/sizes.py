"""The sizes of parts and shares, and the checked and plain values of plans. Pure functions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def share(count: int, rank: int, world_size: int) -> range:
    """Return the contiguous share of range(count) that `rank` gets; sizes differ by at most one, larger ones first.

    Raises:
        ValueError: `rank` is not in a world of `world_size`.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}: ranks go from 0 to world_size - 1")
    return range(part_start(count, rank, world_size), part_start(count, rank + 1, world_size))


def part_start(count: int, part: int, parts: int) -> int:
    """Return where part `part` begins if range(count) is cut into `parts` parts, larger ones first."""
    size, larger = divmod(count, parts)
    return part * size + min(part, larger)


@functools.lru_cache(maxsize=64)
def cut_sizes(samples: int, micro_batch: int) -> tuple[int, ...]:
    """Return the sizes of the fewest micro-batches that hold so many samples; they differ by at most one."""
    count = -(-samples // micro_batch)
    return tuple(part_start(samples, part + 1, count) - part_start(samples, part, count) for part in range(count))


def check_sizes(plan: Any, **least: int) -> None:
    """Make the named fields of a frozen plan, and its seed, integers of Python.

    Raises:
        TypeError: one is not an integer.
        ValueError: one is below its least value.
    """
    for name, bound in least.items():
        value = checked_integer(getattr(plan, name), name)
        object.__setattr__(plan, name, value)
        if value < bound:
            raise ValueError(f"{type(plan).__name__}({name}={value}): must be at least {bound}")
    object.__setattr__(plan, "seed", checked_integer(plan.seed, "seed"))


def checked_integer(value: object, name: str) -> int:
    """Return `value` as an int.

    Raises:
        TypeError: it is not an integer; the message has the argument's `name`.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]  # the TypeError is for values of other types
    except TypeError:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: give an integer") from None


def as_array(value: Any) -> NDArray[Any]:
    """Return a tensor, or a list, as an array; lists of different lengths as one of objects."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    try:
        return np.asarray(value)
    except ValueError:
        return np.array(list(value), dtype=object)


def digest(value: Any) -> str:
    """Return a digest of the bytes of an array, and of its dtype and shape."""
    array = np.ascontiguousarray(value)
    about = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.blake2b(about + array.tobytes(), digest_size=16).hexdigest()


def plain(value: Any) -> Any:
    """Return a field of a plan as a plain value that is equal in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, np.ndarray)) or hasattr(value, "__array__"):
        return digest(np.asarray(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return repr({one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)})
    named = getattr(value, "func", value)  # of a functools.partial
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}"

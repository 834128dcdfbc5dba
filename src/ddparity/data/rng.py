"""Random streams, keyed by what is computed and never by who computes it."""

from __future__ import annotations

import hashlib
import operator
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..compat import seed_cpu_generator, seed_cuda_generator

_LOW = 2**31 - 1


def derive(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and words; different keys give unrelated seeds, (1, "a") and ("1", "a") too.

    Example:
        >>> derive(0, "data", 3) == derive(0, "data", 3) != derive(0, "data", 4)
        True
    """
    # repr quotes words, so that no two keys read alike; int() makes one of NumPy's integers and Python's.
    exact = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(exact).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numbered(key: int, number: int) -> int:
    """The seed of thing `number` among those of `key` (63 bits): an even number, so that the one above it is free.

    Its low 32 bits, all that torch's CPU generator and NumPy's take, are a keyed permutation of the number's:
    2**31 things in a row have streams of their own, where hashes of that size would repeat after some 50,000.
    """
    word = (number ^ key) & _LOW
    for factor in (0x05EBCA6B, 0x42B2AE35):  # multiplying by an odd factor, and a shift, can be undone
        word = (word ^ word >> 15) * factor & _LOW
    return key >> 32 << 32 | (word ^ word >> 16) << 1


def seed_streams(seed: int) -> None:
    """Seed the global streams of Python, NumPy, torch on the CPU, and the current CUDA device where one is in use."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    seed_cpu_generator(seed)
    if torch.cuda.is_initialized():
        seed_cuda_generator(torch.cuda.current_device(), seed)


@contextmanager
def kept_streams() -> Iterator[None]:
    """Put the streams of Python, NumPy, torch and the current CUDA device back at the end, also on an exception."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy, torch and CUDA, the same on every rank, so that models start equal.

    What must differ between ranks (the samples, augmentation, dropout) is keyed by the plan's micro-batches instead.

    Args:
        seed: any integer from 0 to 2**64 - 1.
        deterministic: also demand deterministic algorithms; an operator that has none then raises.

    Raises:
        TypeError: `seed` is no integer.
        ValueError: `seed` is out of range.

    Source: https://pytorch.org/docs/stable/notes/randomness.html
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed_everything({seed!r}): the seed must be an integer, not a {type(seed).__name__}")
    seed = operator.index(seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed_everything({seed}): the seed must be an integer from 0 to 2**64 - 1")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


class RandomState:
    """The global streams of Python, NumPy, torch on the CPU and the current CUDA device, with `state_dict`.

    What is loaded by a `Loader`, and what a model draws inside of `accumulate`, is keyed by the micro-batch and needs
    none of this. It is for a script's own draws between steps, which go on where they were.

    The file has rank 0's streams, and every rank continues with them, on any world size: between steps the streams are
    the same on every rank, unless ranks drew unequally often. Without a GPU in use, or where the file has no such
    stream, CUDA's is left as it is.
    """

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        return {
            "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

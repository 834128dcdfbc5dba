"""Random streams: seed the process, save its streams in a checkpoint, and derive the seed of each piece of work.

A random stream is the sequence of numbers of a global generator: Python's, NumPy's, torch's on the CPU and on the
current CUDA device. Derived seeds depend on what is computed (epoch, step, micro-batch), never on the rank, the worker
or the process that computes it.
"""

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

_LOW_31_BITS = 2**31 - 1


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy, torch and CUDA with the same seed on every rank, so that models start equal.

    What must differ between ranks (samples, augmentation, dropout) takes its seed from the plan's micro-batches.

    Args:
        seed: an integer from 0 to 2**64 - 1.
        deterministic: also require deterministic algorithms; torch then raises at an operator that has none.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `seed` is out of range.

    Collectives: none.

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
    """Hold the process's random streams for a checkpoint: an object with `state_dict` and `load_state_dict`.

    A script needs it only for random numbers that it draws itself between steps. What a `Loader` loads, and what a
    model draws inside `accumulate`, takes its seed from the micro-batch.

    The checkpoint has the streams of rank 0, and every rank continues with them, on any world size. Between steps the
    streams are equal on all ranks, unless ranks draw different counts of numbers. The CUDA stream stays as it is if no
    GPU is in use or if the checkpoint has no CUDA stream.
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


def derive_seed(*key: int | str) -> int:
    """Return a 63-bit seed for a key of integers and strings.

    Different keys give unrelated seeds; (1, "a") and ("1", "a") are different keys.

    Example:
        >>> derive_seed(0, "data", 3) == derive_seed(0, "data", 3) != derive_seed(0, "data", 4)
        True
    """
    # repr puts strings in quotes, so that different keys give different text. int() makes NumPy's integers and
    # Python's give the same text.
    exact = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(exact).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numbered_seed(key: int, number: int) -> int:
    """Return the seed of item `number` of the series that `key` (63 bits) names.

    The seed is even, so that `seed + 1` is free for a second stream of the same item. torch's CPU generator and NumPy
    use only the low 32 bits of a seed. Here these are a keyed permutation of the low bits of `number`, so 2**31
    consecutive items have different streams; hashes of 32 bits would repeat after about 50,000 items.
    """
    word = (number ^ key) & _LOW_31_BITS
    for factor in (0x05EBCA6B, 0x42B2AE35):  # each operation is invertible, so different words stay different
        word = (word ^ word >> 15) * factor & _LOW_31_BITS
    return key >> 32 << 32 | (word ^ word >> 16) << 1


def seed_streams(seed: int) -> None:
    """Seed the streams of Python, NumPy and torch on the CPU, and the current CUDA device's if CUDA is in use."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    seed_cpu_generator(seed)
    if torch.cuda.is_initialized():
        seed_cuda_generator(torch.cuda.current_device(), seed)


@contextmanager
def preserve_streams() -> Iterator[None]:
    """Restore the streams of Python, NumPy, torch and the current CUDA device at the end, also after an exception."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

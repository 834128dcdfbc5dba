"""Digests of a few samples of a data set: they tell whether two ranks, or two calls, have the same data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..comm.trees import byte_view, take_apart, tensors_in
from ..data.dataset import KeyedDataset, SeededIndices

_DIGITS = 32  # hex digits of a digest


def few_of(length: int) -> list[int]:
    """Return the indices of the first, the middle and the last sample."""
    return sorted({0, length // 2, length - 1}) if length else []


def digest_of(dataset: Any, index: int, tensors_alone: bool = False) -> str:
    """Return a digest of a sample's bits. It sets the random streams, so that augmentation draws the same again.

    Args:
        tensors_alone: leave out numbers and strings if the sample has tensors or arrays.

    Raises:
        SampleError: the data set fails.
        TypeError: the sample holds something whose bits are unknown.
    """
    given = KeyedDataset(dataset).__getitems__(SeededIndices([index], 2 * index, (0, index)))
    sample = given[0] if isinstance(given, list) and len(given) == 1 else given  # of a __getitems__: any batch
    description, leaves = take_apart(sample, f"sample {index}")
    if tensors_alone and (dense := tensors_in(description)):
        leaves = [leaves[number] for number in dense]
        description = {"tensors": [[str(leaf.dtype), list(leaf.shape)] for leaf in leaves]}
    digest = hashlib.sha256(json.dumps(description).encode())
    for leaf in leaves:
        digest.update(byte_view(leaf.cpu()).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def comparable_digest_of(dataset: Any, index: int) -> str | None:
    """Return a digest to compare with other ranks'; None if the sample has none, or is another one the second time.

    A path or a process number beside the tensors may differ between ranks.
    """
    try:
        first = digest_of(dataset, index, tensors_alone=True)
        return first if digest_of(dataset, index, tensors_alone=True) == first else None
    except Exception:  # the rank that runs this sample reports the failure
        return None

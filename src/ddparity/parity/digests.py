"""Short digests of what a run had in its hands: data, outputs, random streams, tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..comm.trees import byte_view


def digest(value: Any) -> str:
    """32 hex digits of a value of any nesting: equal where names, shapes, dtypes and bits are.

    Objects that are no tensors, arrays, numbers, strings or collections count by their type and attributes.
    """
    state = hashlib.blake2b(digest_size=16)
    _feed(state, value, 0)
    return state.hexdigest()


def _feed(state: Any, value: Any, depth: int) -> None:
    if isinstance(value, torch.Tensor):
        state.update(f"{value.dtype}{list(value.shape)}".encode())
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        state.update(byte_view(dense.cpu().resolve_conj().resolve_neg().contiguous()).numpy())
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        state.update(f"{value.dtype}{list(value.shape)}".encode())
        state.update(np.ascontiguousarray(value).tobytes())
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        state.update(f"{type(value).__name__} {value!r}".encode())
    elif depth > 16:  # an object that contains itself
        state.update(b"...")
    elif isinstance(value, Mapping):
        _feed_parts(state, "mapping", [*value.keys(), *value.values()], depth)
    elif isinstance(value, (list, tuple, np.ndarray)):
        _feed_parts(state, type(value).__name__, list(value), depth)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed_parts(state, type(value).__name__, [getattr(value, f.name) for f in dataclasses.fields(value)], depth)
    else:
        attributes = vars(value) if hasattr(value, "__dict__") and not callable(value) else {}
        _feed_parts(state, type(value).__name__, [*attributes.keys(), *attributes.values()], depth)


def _feed_parts(state: Any, kind: str, parts: list[Any], depth: int) -> None:
    state.update(f"{kind} {len(parts)}".encode())
    for part in parts:
        _feed(state, part, depth + 1)
        state.update(b"\0")


def streams_digest() -> str:
    """Of the states of Python's, NumPy's and torch's streams, and of the current CUDA device's where one is in use."""
    parts = [random.getstate(), list(np.random.get_state()), torch.random.get_rng_state()]
    if torch.cuda.is_initialized():
        parts.append(torch.cuda.get_rng_state())
    state = hashlib.blake2b(digest_size=16)
    state.update(repr(parts[0]).encode())
    _feed(state, parts[1:], 0)
    return state.hexdigest()


def difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference of two tensors relative to their largest absolute value; 0 where they are equal.

    Infinite where a number is not finite in one of them and another, or finite, in the other, or where shapes differ.
    """
    if value.shape != reference.shape:
        return float("inf")
    if value.numel() == 0:
        return 0.0
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (value.detach().cpu(), reference.detach().cpu()))
    a, b = a.double(), b.double()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    largest = apart.max().item()
    if largest == 0:
        return 0.0
    if not largest < float("inf"):  # NaN, too
        return float("inf")
    return largest / max(a[a.isfinite()].abs().max().item(), b[b.isfinite()].abs().max().item())


def relative(value: float, reference: float) -> float:
    """As `difference`, of two numbers."""
    if value == reference or (value != value and reference != reference):
        return 0.0
    apart = abs(value - reference)
    return apart / max(abs(value), abs(reference)) if apart < float("inf") else float("inf")

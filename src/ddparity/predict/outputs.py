"""What a model gives for a batch: checked against the batch, then joined in data-set order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def check_rows(output: Any, size: int, path: str = "the output") -> None:
    """Check that each tensor of a nesting has one row a sample.

    Raises:
        TypeError: there is something other than tensors in dicts and tuples.
        ValueError: a tensor's first dimension is not the batch's size.
    """
    if isinstance(output, torch.Tensor):
        if output.ndim == 0 or output.shape[0] != size:
            raise ValueError(
                f"{path} has shape {tuple(output.shape)} for a batch of {size} samples: its first dimension must be "
                f"the batch's, one row a sample. Reshape it inside the model, or wrap the model in a function that does"
            )
    elif isinstance(output, Mapping):
        for key, value in output.items():
            check_rows(value, size, f"{path}[{key!r}]")
    elif isinstance(output, tuple):
        for number, value in enumerate(output):
            check_rows(value, size, f"{path}[{number}]")
    else:
        raise TypeError(
            f"{path} is a {type(output).__name__}: predict() collects tensors, one row a sample, in dicts and tuples"
        )


def rows(output: Any) -> int:
    """Rows of the first tensor of a nesting."""
    if isinstance(output, torch.Tensor):
        return output.shape[0]
    values = output.values() if isinstance(output, Mapping) else output
    return next((rows(value) for value in values), 0)

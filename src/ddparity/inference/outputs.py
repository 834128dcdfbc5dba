"""A model's output for a batch: check its rows, take it apart, and compare its structure with the first batch's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..comm.nesting import Description, Keys, cannot_travel, check_dense, difference, structure, walk
from ..comm.trees import check_importable, named_types, take_apart
from ..runtime.agreement import Agreement


@dataclass(slots=True)
class Rows:
    """The outputs for samples `start` to `start + size - 1`, taken apart into a description and tensors."""

    start: int
    size: int
    description: Description
    leaves: list[torch.Tensor]


def check_rows(output: Any, size: int, path: str = "the output") -> None:
    """Check that each leaf of a nesting has one row, or one entry, a sample.

    Raises:
        TypeError, ValueError: a leaf does not; the error names its path.
    """

    def leaf(value: Any, path: str, keys: Keys) -> None:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            if isinstance(value, np.ma.MaskedArray) or (isinstance(value, torch.Tensor) and value.is_nested):
                check_dense(value, path)  # before the shape, which a nested tensor does not have
            if value.ndim == 0 or value.shape[0] != size:
                raise ValueError(
                    f"{path} has shape {tuple(value.shape)} for a batch of {size} samples: its first dimension must be "
                    f"the batch's, one row a sample. Reshape it inside the model, or give a list with one entry a "
                    f"sample, of any shapes"
                )
        elif isinstance(value, list):
            if len(value) != size:
                raise ValueError(
                    f"{path} is a list of {len(value)} entries for a batch of {size} samples: a list has one entry a "
                    f"sample. Put several outputs of one sample into its entry, and several fields into a tuple or a "
                    f"dict"
                )
        elif isinstance(value, (str, bytes, int, float, complex, np.generic)):
            raise TypeError(
                f"{path} is {value!r}, one {type(value).__name__} for a batch of {size} samples: give a list with "
                f"one entry a sample"
            )
        elif value is not None:
            raise cannot_travel(value, path)

    walk(output, leaf, lambda value, path, nesting, items: None, path)


class Schema:
    """The structure of the first batch's output, which every batch of every rank must have.

    `agreement`: the ranks agree in it on the first structure; None in a world of one.
    """

    def __init__(self, agreement: Agreement | None) -> None:
        self._agreement = agreement
        self._first: tuple[Description, str] | None = None
        self._dense: tuple[Any, Description] | None = None  # of the last output, if it was one dense tensor

    def check(self, output: Any, samples: range, where: str) -> tuple[Description, list[torch.Tensor]]:
        """Take a batch's output apart: return its description and its tensors.

        Raises:
            TypeError, ValueError: a part of it does not have one row a sample, cannot be sent, or differs from the
                first batch; the error names the part and the samples.
        """
        like = _like(output)
        if like is not None and self._dense is not None and self._dense[0] == like and len(output) == len(samples):
            return self._dense[1], [output.detach()]  # the rest takes 15 µs: benchmarks/predict.py, (20,000, 10)
        path = f"the output for the {where}"
        check_rows(output, len(samples), path)
        description, leaves = take_apart(output, path)
        mine = structure(description, plain="none")  # check_rows refuses single numbers and strings
        if self._first is None:
            for name in named_types(description):
                check_importable(name, path)
            said = json.dumps([mine, where])
            first, first_where = json.loads(
                said if self._agreement is None else self._agreement.first_value("schema", said)
            )
            self._first = first, first_where
        first, first_where = self._first
        if found := difference(mine, first, "it"):
            raise ValueError(
                f"{path} is not as that for the {first_where}: {found}. Give the same keys, kinds and dtypes for each "
                f"batch"
            )
        self._dense = None if like is None else (like, description)
        return description, leaves


def _like(output: Any) -> Any:
    """Return what dense tensors of one description have in common; None for anything else."""
    if type(output) is not torch.Tensor or output.layout != torch.strided or output.is_nested:
        return None
    as_it_lies = output.is_contiguous() and not (output.is_quantized or output.is_conj() or output.is_neg())
    return (output.shape, output.dtype, output.device) if as_it_lies else None


def on_device(description: Description, device: torch.device) -> Description:
    """Return the description of the same value with its tensors on `device`. Arrays stay on the CPU."""
    if description["kind"] == "tensor":
        return {**description, "device": device.type}
    if "items" not in description:
        return description
    return {**description, "items": [on_device(item, device) for item in description["items"]]}

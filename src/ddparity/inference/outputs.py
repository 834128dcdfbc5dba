"""What a model gives for a batch: checked against the batch, described, and compared with the first batch's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..comm.trees import Node, check_importable, named_types, parts_of, take_apart
from ..runtime.agreement import Agreement


@dataclass(slots=True)
class Rows:
    """The outputs for samples `start` to `start + size - 1`, taken apart into a description and tensors."""

    start: int
    size: int
    node: Node
    leaves: list[torch.Tensor]


def check_rows(output: Any, size: int, path: str = "the output") -> None:
    """Check that each leaf of a nesting has one row, or one entry, a sample."""
    if isinstance(output, torch.Tensor) and output.is_nested:
        raise TypeError(f"{path} is a nested tensor: give a list with one tensor a sample, list(x.unbind())")
    if isinstance(output, np.ma.MaskedArray):
        raise TypeError(f"{path} is a masked array, whose mask would be lost: give .filled() and the mask")
    if isinstance(output, (torch.Tensor, np.ndarray)):
        if output.ndim == 0 or output.shape[0] != size:
            raise ValueError(
                f"{path} has shape {tuple(output.shape)} for a batch of {size} samples: its first dimension must be "
                f"the batch's, one row a sample. Reshape it inside the model, or give a list with one entry a sample, "
                f"of any shapes"
            )
    elif isinstance(output, list):
        if len(output) != size:
            raise ValueError(
                f"{path} is a list of {len(output)} entries for a batch of {size} samples: a list has one entry a "
                f"sample. Put several outputs of one sample into its entry, and several fields into a tuple or a dict"
            )
    elif output is not None:
        if isinstance(output, (str, bytes, int, float, complex, np.generic)):
            raise TypeError(
                f"{path} is {output!r}, one {type(output).__name__} for a batch of {size} samples: give a list with "
                f"one entry a sample"
            )
        for place, part in parts_of(output, path)["parts"]:
            check_rows(part, size, f"{path}{place}")


def structure(node: Node) -> Node:
    """What is the same for all batches of a run: the nesting, the kinds and the dtypes, but no shapes."""
    if node["kind"] in ("list", "plain list"):
        return {"kind": "list"}
    if node["kind"] == "plain":
        return {"kind": "none"}
    if node["kind"] in ("tensor", "array"):
        return {"kind": node["kind"], "dtype": node["dtype"]}
    return {
        **{key: node[key] for key in ("kind", "type", "keys")},
        "items": [structure(item) for item in node["items"]],
    }


class Schema:
    """The structure of the first batch's output, which every batch of every rank must have.

    `agreement`: in which the ranks agree on the first one; None in a world of one.
    """

    def __init__(self, agreement: Agreement | None) -> None:
        self._agreement = agreement
        self._first: tuple[Node, str] | None = None
        self._dense: tuple[Any, Node] | None = None  # the last output, if it was one dense tensor

    def check(self, output: Any, samples: range, where: str) -> tuple[Node, list[torch.Tensor]]:
        """Take a batch's output apart.

        Raises:
            TypeError, ValueError: something in it is not one row a sample, or cannot travel, or is not as in the first
                batch; says where in the output, and for which samples.
        """
        like = _like(output)
        if like is not None and self._dense is not None and self._dense[0] == like and len(output) == len(samples):
            return self._dense[1], [output.detach()]  # what follows takes 15 µs: benchmarks/predict.py, (20,000, 10)
        path = f"the output for the {where}"
        check_rows(output, len(samples), path)
        node, leaves = take_apart(output, path)
        mine = structure(node)
        if self._first is None:
            for name in named_types(node):
                check_importable(name, path)
            said = json.dumps([mine, where])
            first, first_where = json.loads(
                said if self._agreement is None else self._agreement.first_value("schema", said)
            )
            self._first = first, first_where
        first, first_where = self._first
        if mine != first:
            raise ValueError(f"{path} is not as that for the {first_where}: {_difference(mine, first)}")
        self._dense = None if like is None else (like, node)
        return node, leaves


def _like(output: Any) -> Any:
    """What two dense tensors have in common if one's description is the other's; None: it is no such tensor."""
    if type(output) is not torch.Tensor or output.layout != torch.strided or output.is_nested:
        return None
    as_it_lies = output.is_contiguous() and not (output.is_quantized or output.is_conj() or output.is_neg())
    return (output.shape, output.dtype, output.device) if as_it_lies else None


def _difference(mine: Node, first: Node, path: str = "it") -> str:
    if mine["kind"] != first["kind"]:
        return f"{path} is a {_named(mine)}, not a {_named(first)}"
    if "items" not in mine:
        return f"{path} has dtype {mine['dtype']}, not {first['dtype']}"
    if (mine["type"], mine["keys"]) != (first["type"], first["keys"]):
        what = "the keys" if mine["kind"] == "dict" else "the type and entries"
        return f"{path} has {what} {_keys(mine)}, not {_keys(first)}"
    names = mine["keys"] if isinstance(mine["keys"], list) else range(mine["keys"])
    return next(
        _difference(ours, theirs, f"{path}[{name!r}]")
        for name, ours, theirs in zip(names, mine["items"], first["items"], strict=True)
        if ours != theirs
    )


def _named(node: Node) -> str:
    kind: str = node["kind"]
    return {"none": "None", "record": "named tuple", "fields": "dataclass"}.get(kind, kind)


def _keys(node: Node) -> str:
    return f"{node['type']} with {node['keys']}" if node["type"] else str(node["keys"])


def on_device(node: Node, device: torch.device) -> Node:
    """The description of the same value with its tensors there; arrays stay where arrays are."""
    if node["kind"] == "tensor":
        return {**node, "device": device.type}
    return {**node, "items": [on_device(item, device) for item in node["items"]]} if "items" in node else node

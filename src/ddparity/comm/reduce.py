"""Sum, average or compare nested numbers over the ranks: the public function `reduce`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from .allreduce import copies_of_ranks
from .nesting import Description, Keys, check_dense, walk
from .transfer import described, wire_device
from .trees import assembled, describe_nesting

Op = Literal["sum", "mean", "max", "min"]

_OPS = ("sum", "mean", "max", "min")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = (torch.bool, *_INTEGERS, *_FLOATS, torch.complex64, torch.complex128)
_PART_BYTES = 16 * 2**20  # of all ranks' copies of a tensor, at once


def reduce(value: Any, op: Op = "sum") -> Any:
    """Return the sum, mean, largest or smallest of the ranks' values, number by number, on every rank.

    Numbers, tensors and numeric arrays are reduced, in dicts, lists, tuples, named tuples and dataclasses of any depth,
    for example losses to log, or the wish of any rank to stop: `if reduce(stop, "max"): break`. The order is that of
    the ranks, so every rank gets the same bits. float16 and bfloat16 are added in float32. Python's integers are exact
    at any size; their mean is a float. A tensor keeps its dtype; a sum that does not fit into an integer of 8 to 32
    bits is an error. Results are new tensors on the device of this rank's, without a graph.

    Collectives: two all-gathers (a number, and the description with Python's numbers, in JSON). Then one exchange of
    each tensor's bytes, in parts whose copies of all ranks take at most 16 MiB. Every rank calls it.

    Raises:
        TypeError: a part of this rank's value is no number, or has no such `op`, as the mean of integer tensors; the
            error names it. The other ranks raise `RankFailure`.
        ValueError: `op` is unknown, or the ranks' values differ in structure, dtype or shape, or `op` differs; on every
            rank.
        OverflowError: a sum of integers does not fit into the tensor's dtype; on every rank.

    Example:
        >>> reduce({"loss": 0.5, "correct": torch.tensor([3, 1])}, "max")
        {'loss': 0.5, 'correct': tensor([3, 1])}
    """
    leaves: list[torch.Tensor] = []

    def describe() -> Description:
        if op not in _OPS:
            raise ValueError(f"reduce(op={op!r}) is unknown: use one of {', '.join(_OPS)}")
        return {"op": op, "value": _described(value, "value", op, leaves)}

    everyones = described("reduce", describe)
    for rank, theirs in enumerate(everyones):
        if theirs["op"] != everyones[0]["op"]:
            raise ValueError(
                f"reduce(op=…) differs between ranks: {everyones[0]['op']!r} on rank 0, {theirs['op']!r} on rank "
                f"{rank}. Give the same on every rank"
            )
    first = dict(_parts(everyones[0]["value"], "value"))
    for rank, theirs in enumerate(everyones):
        other = dict(_parts(theirs["value"], "value"))
        for path in [*first, *other]:
            if first.get(path) != other.get(path):
                raise ValueError(
                    f"reduce(): {path} is {other.get(path, 'absent')} on rank {rank} and {first.get(path, 'absent')} "
                    f"on rank 0: give the same structure, dtypes and shapes on every rank"
                )
    return _reduced([theirs["value"] for theirs in everyones], leaves, op)


def _described(value: Any, path: str, op: Op, leaves: list[torch.Tensor]) -> Description:
    """Describe a value, with the numbers in it; append its tensors to `leaves`."""

    def leaf(value: Any, path: str, _: Keys) -> Description:
        if isinstance(value, list):
            items = [_described(item, f"{path}[{number}]", op, leaves) for number, item in enumerate(value)]
            return {"kind": "list", "items": items}
        if isinstance(value, (bool, int, float)) and not isinstance(value, np.generic):
            return {"kind": "number", "value": value}
        if isinstance(value, torch.Tensor):
            kind, tensor = "tensor", value.detach()
        elif isinstance(value, (np.ndarray, np.generic)):
            kind, tensor = "array", _as_tensor(value, path)
        else:
            raise TypeError(f"reduce(): {path} is a {type(value).__name__}: only numbers, tensors, arrays are reduced")
        check_dense(value, path)
        _check_op(tensor, path, op)
        leaves.append(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"kind": kind, "leaf": len(leaves) - 1, "dtype": dtype, "shape": list(tensor.shape)}

    return walk(value, leaf, describe_nesting, path)


def _as_tensor(value: Any, path: str) -> torch.Tensor:
    array = np.asarray(value)
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise TypeError(f"reduce(): {path} is an array of {array.dtype}: only numbers are reduced") from None


def _check_op(tensor: torch.Tensor, path: str, op: Op) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"reduce(): {path} is a tensor of {tensor.dtype}, which Gloo cannot send: give .long() or .float()"
        )
    numbers = tensor.is_floating_point() or tensor.is_complex()
    if op == "mean" and not numbers:
        raise TypeError(f'reduce(op="mean"): {path} is a tensor of {tensor.dtype}: give a floating one, .double()')
    if op == "sum" and tensor.dtype == torch.bool:
        raise TypeError(f'reduce(op="sum"): {path} is a tensor of bools: give .long() to count, or use "max" or "min"')
    if op in ("max", "min") and tensor.is_complex():
        raise TypeError(f'reduce(op="{op}"): {path} is complex, and complex numbers have no order')


def _parts(node: Description, path: str) -> list[tuple[str, str]]:
    """Return what must be alike on the ranks: for each path what is there."""
    if "items" not in node:
        if node["kind"] == "number":
            return [(path, "a number")]
        return [(path, f"a {node['kind']} of {node['dtype']} and shape {tuple(node['shape'])}")]
    kind, keys = node["kind"], node.get("keys")
    names = keys if isinstance(keys, list) else range(len(node["items"]))
    text = f"a {node.get('type') or kind} of {len(node['items'])}"
    inside = zip(names, node["items"], strict=True)
    return [(path, text), *(part for name, item in inside for part in _parts(item, f"{path}[{name!r}]"))]


def _reduced(nodes: list[Description], leaves: list[torch.Tensor], op: Op) -> Any:
    head = nodes[0]
    if head["kind"] == "number":
        return _of_numbers([node["value"] for node in nodes], op)
    if head["kind"] in ("tensor", "array"):
        reduced = _of_tensors(leaves[head["leaf"]], op)
        return reduced if head["kind"] == "tensor" else reduced.numpy()[()]
    items = [_reduced(list(items), leaves, op) for items in zip(*(node["items"] for node in nodes), strict=True)]
    return items if head["kind"] == "list" else assembled(head, items)


def _of_numbers(values: list[Any], op: Op) -> Any:
    if op in ("max", "min"):
        if any(value != value for value in values):  # as torch's: not a number on any rank
            return float("nan")
        return max(values) if op == "max" else min(values)
    total = sum(values)
    return total / len(values) if op == "mean" else total


def _of_tensors(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    """Reduce one tensor, of the same shape on every rank."""
    joined = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if joined else 1
    flat = tensor.reshape(-1).resolve_conj().resolve_neg()
    if flat.numel() == 0 or world_size == 1:
        return tensor.clone()
    wire = wire_device()
    size = max(1, _PART_BYTES // (world_size * flat.element_size()))
    parts = [_OF_COPIES[op](copies_of_ranks(part.to(wire).contiguous())).to(tensor.dtype) for part in flat.split(size)]
    return torch.cat(parts).to(tensor.device).view(tensor.shape)


def _sum(copies: torch.Tensor) -> torch.Tensor:
    if copies.dtype in _INTEGERS[:-1]:
        whole, fits = copies.sum(0, dtype=torch.int64), torch.iinfo(copies.dtype)
        if not fits.min <= int(whole.min()) <= int(whole.max()) <= fits.max:
            worst = max(int(whole.max()), int(whole.min()), key=abs)
            raise OverflowError(
                f"reduce(): a sum is {worst}, too large for {copies.dtype}: give a tensor of int64, .long()"
            )
        return whole
    total = copies[0].float() if copies.dtype in (torch.float16, torch.bfloat16) else copies[0].clone()
    for copy in copies[1:]:
        total += copy
    return total


_OF_COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": _sum,
    "mean": lambda copies: _sum(copies) / len(copies),
    "max": lambda copies: copies.amax(0),
    "min": lambda copies: copies.amin(0),
}

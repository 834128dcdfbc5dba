"""Nested values taken apart into a description and flat tensors, and put together from one or several parts.

A description is JSON. `gather` sends it ahead of the tensors, so nothing on the wire is a pickle. Its entries:

    kind    "tensor", "array", "plain" (None, a number or a string), "plain list", "list",
            "dict", "tuple", "record" (a named tuple), "fields" (a dataclass)
    leaf    the number of the tensor that holds the data; with dtype, shape, device, and scalar (0-d)
    items   the descriptions of the values inside; with keys (of a tuple: how many), and type (None: Python's own)
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .nesting import Description, Keys, Nesting, cannot_travel, check_dense, difference, structure, walk

Build = Callable[[], Any]
New = Callable[[Description], torch.Tensor]  # returns an uninitialised tensor of a described dtype, shape and device


# Take apart


def take_apart(value: Any, path: str = "value") -> tuple[Description, list[torch.Tensor]]:
    """Return a value's description and its tensors, in order. Numbers, strings and None travel in byte tensors.

    NumPy's numbers in a list become Python's, of the same value, also if its entries are nested.

    Raises:
        TypeError: a value, a key or a type cannot travel; names its path, below `path`.
    """
    leaves: list[torch.Tensor] = []

    def leaf(value: Any, path: str, keys: Keys = ()) -> Description:
        if isinstance(value, torch.Tensor):
            return _describe_tensor(value, leaves, path)
        if isinstance(value, (np.ndarray, np.generic)):
            return {**_describe_tensor(_from_numpy(value, path), leaves, path), "kind": "array"}
        if _is_plain(value):
            return _describe_plain([value], leaves, "plain")
        if isinstance(value, list):
            value = [item.item() if isinstance(item, np.generic) else item for item in value]
            if all(map(_is_plain, value)):
                return _describe_plain(value, leaves, "plain list")
            items = [walk(item, leaf, describe_nesting, f"{path}[{i}]") for i, item in enumerate(value)]
            return {"kind": "list", "items": items}
        raise cannot_travel(value, path)

    return walk(value, leaf, describe_nesting, path), leaves


def describe_nesting(value: Any, path: str, nesting: Nesting, items: list[Description]) -> Description:
    """Describe a nesting.

    Raises:
        TypeError: another process cannot make a value of its type.
    """
    named = nesting.kind in ("record", "fields")
    if nesting.kind == "fields" and (late := [field.name for field in dataclasses.fields(value) if not field.init]):
        raise TypeError(f"{path} is a {type(value).__name__} whose field {late[0]} has init=False: give a dict")
    keys = len(items) if nesting.kind in ("tuple", "record") else nesting.keys
    return {"kind": nesting.kind, "type": _type_name(value) if named else None, "keys": keys, "items": items}


def _describe_tensor(tensor: torch.Tensor, leaves: list[torch.Tensor], path: str) -> Description:
    check_dense(tensor, path)
    rows = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
    leaves.append(rows.resolve_conj().resolve_neg().contiguous())
    return {
        "kind": "tensor",
        "leaf": len(leaves) - 1,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(rows.shape),
        "device": tensor.device.type,
        "scalar": tensor.ndim == 0,
    }


def _describe_plain(values: list[Any], leaves: list[torch.Tensor], kind: str) -> Description:
    text = json.dumps([{"complex": [v.real, v.imag]} if isinstance(v, complex) else v for v in values]).encode()
    leaves.append(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return {"kind": kind, "leaf": len(leaves) - 1, "dtype": "uint8", "shape": [len(text)]}


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, complex, str)


def _from_numpy(value: np.ndarray[Any, Any] | np.generic, path: str) -> torch.Tensor:
    check_dense(value, path)
    array = np.asarray(value)
    try:
        # A copy, since torch refuses or warns about read-only arrays, negative strides and foreign byte orders.
        native = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
        return torch.from_numpy(native)
    except TypeError:
        raise TypeError(
            f"{path} is an array of {array.dtype}, which cannot travel: use a numeric or bool array"
        ) from None


def _type_name(value: Any) -> str:
    name = type(value).__qualname__
    if "<locals>" in name:
        raise TypeError(
            f"{name} is defined inside of a function, where another process cannot find it: define it at the "
            f"top of a module, or give a dict or a tuple"
        )
    return f"{type(value).__module__}:{name}"


# Put together


def put_together(descriptions: Sequence[Description], new: New) -> tuple[Build, list[dict[int, torch.Tensor]]]:
    """Plan the concatenation, in order, of the described values.

    Tensors and arrays are concatenated along their first dimension, 0-d ones are stacked. Lists are joined. Numbers,
    strings and None become a list with one entry a part. Dicts, tuples and dataclasses keep their structure.

    Returns:
        A function that returns the value once the data is there, and for each part the tensors to write its data to.

    Raises:
        ValueError: two parts do not fit together; names the first difference.
    """
    first = structure(descriptions[0], rows=True)
    for number, description in enumerate(descriptions):
        if found := difference(structure(description, rows=True), first, "value"):
            raise ValueError(
                f"in part {number} the {found} as in part 0, so they cannot be concatenated along the first dimension: "
                f"give the same structure, dtypes and shapes of rows in all parts, or a list with one tensor an entry"
            )
    targets: list[dict[int, torch.Tensor]] = [{} for _ in descriptions]
    return _concatenated(list(descriptions), targets, new), targets


def _concatenated(parts: list[Description], targets: list[dict[int, torch.Tensor]], new: New) -> Build:
    head = parts[0]
    if head["kind"] in ("tensor", "array"):
        return _concatenated_tensor(parts, targets, new)
    if head["kind"] in ("list", "plain list", "plain"):
        builds = [single(part, target, new) for part, target in zip(parts, targets, strict=True)]
        if head["kind"] == "plain":
            return lambda: [build() for build in builds]
        return lambda: [item for build in builds for item in build()]
    columns = zip(*(part["items"] for part in parts), strict=True)
    items = [_concatenated(list(column), targets, new) for column in columns]
    return lambda: assembled(head, [item() for item in items])


def _concatenated_tensor(parts: list[Description], targets: list[dict[int, torch.Tensor]], new: New) -> Build:
    head = parts[0]
    whole = new({**head, "shape": [sum(part["shape"][0] for part in parts), *head["shape"][1:]]})
    start = 0
    for part, target in zip(parts, targets, strict=True):
        target[part["leaf"]] = whole[start : start + part["shape"][0]]
        start += part["shape"][0]
    return lambda: _as_described(head, whole)


def single(description: Description, target: dict[int, torch.Tensor], new: New) -> Build:
    """Plan one part alone, as it was: put the tensors to write its data to into `target`, by their numbers."""
    if "leaf" in description:
        tensor = target[description["leaf"]] = new(description)
        if description["kind"] == "plain list":
            return lambda: plain_values(tensor)
        if description["kind"] == "plain":
            return lambda: plain_values(tensor)[0]
        if description["scalar"] and description["kind"] == "array":
            return lambda: tensor.item()
        return lambda: _as_described(description, tensor[0] if description["scalar"] else tensor)
    items = [single(item, target, new) for item in description["items"]]
    if description["kind"] == "list":
        return lambda: [item() for item in items]
    return lambda: assembled(description, [item() for item in items])


def plain_values(tensor: torch.Tensor) -> list[Any]:
    """Return the numbers, strings and Nones that a byte tensor holds."""
    values = json.loads(bytes(tensor.cpu().numpy()).decode())
    return [complex(*value["complex"]) if isinstance(value, dict) else value for value in values]


def _as_described(description: Description, tensor: torch.Tensor) -> Any:
    return tensor.cpu().numpy() if description["kind"] == "array" else tensor


def assembled(description: Description, items: list[Any]) -> Any:
    """Return the described dict, tuple, named tuple or dataclass with these values."""
    if description["kind"] == "dict":
        return dict(zip(description["keys"], items, strict=True))
    if description["kind"] == "tuple":
        return tuple(items)
    if description["kind"] == "record":
        return _named_type(description["type"])(*items)
    if description["kind"] == "fields":
        return _named_type(description["type"])(**dict(zip(description["keys"], items, strict=True)))
    raise ValueError(f"a description has the kind {description['kind']!r}, which take_apart does not write")


# Look into a description


def _named_type(name: str) -> Any:
    """Return the named tuple or dataclass that another rank's description names; both ranks run the same program."""
    module, _, path = name.partition(":")
    cls: Any = importlib.import_module(module)
    for part in path.split("."):
        cls = getattr(cls, part)
    if not (isinstance(cls, type) and (hasattr(cls, "_fields") or dataclasses.is_dataclass(cls))):
        raise TypeError(f"{name} is no named tuple or dataclass")
    return cls


def check_importable(name: str, path: str) -> None:
    """Check that other ranks find a type by its name.

    Raises:
        TypeError: they do not.
    """
    try:
        _named_type(name)
    except (ImportError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{path} has a {name.replace(':', '.')}, which cannot be found by that name ({error}): define it at the "
            f"top of a module under its own name, or give a dict or a tuple"
        ) from None


def named_types(description: Description) -> list[str]:
    """Return the types that must be imported to put a described value together."""
    here = [description["type"]] if description["kind"] in ("record", "fields") else []
    return here + [name for item in description.get("items", []) for name in named_types(item)]


def leaves_of(description: Description) -> list[Description]:
    """Return the descriptions of a value's tensors, in the order in which `take_apart` returns the tensors."""
    if "leaf" in description:
        return [description]
    return [leaf for item in description["items"] for leaf in leaves_of(item)]


def leaf_paths(description: Description, path: str) -> list[str]:
    """Return the path of each tensor, in their order: dict keys and positions, joined by dots."""
    if "leaf" in description:
        return [path]
    by_name = description["kind"] in ("dict", "fields")
    keys = description["keys"] if by_name else range(len(description["items"]))
    inside = zip(keys, description["items"], strict=True)
    return [found for key, item in inside for found in leaf_paths(item, f"{path}.{key}")]


# Tensors and their bytes


def new_tensor(description: Description) -> torch.Tensor:
    """Return an uninitialised tensor of the described dtype, shape and device."""
    kind = getattr(torch, description["dtype"])
    return torch.empty(description["shape"], dtype=kind, device=description.get("device", "cpu"))


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of a contiguous tensor's bytes, 1-D.

    It does not use the strides of dimensions of size 0 and 1, which may be anything.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def tensors_in(description: Description) -> list[int]:
    """Return the numbers of the leaves that are tensors and arrays."""
    if description["kind"] in ("tensor", "array"):
        return [description["leaf"]]
    return [number for item in description.get("items", []) for number in tensors_in(item)]

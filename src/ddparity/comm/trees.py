"""Values of any nesting, taken apart into a description and flat tensors, and put together from several parts.

A description is JSON: what `gather` sends ahead of the data, so that nothing on the wire is a pickle.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Node = dict[str, Any]
Build = Callable[[], Any]


def take_apart(value: Any, path: str = "value") -> tuple[Node, list[torch.Tensor]]:
    """A value's description and its tensors, in order. Numbers, strings and None travel in byte tensors.

    NumPy's numbers in a list become Python's, of the same value, also where its entries are nested.

    Raises:
        TypeError: names the place, below `path`, and the type of what cannot travel.
    """
    leaves: list[torch.Tensor] = []
    return _describe(value, leaves, path), leaves


def _describe(value: Any, leaves: list[torch.Tensor], path: str) -> Node:
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value, leaves, path)
    if isinstance(value, (np.ndarray, np.generic)):
        return {**_describe_tensor(_from_numpy(np.asarray(value), path), leaves, path), "kind": "array"}
    if _is_plain(value):
        return _describe_plain([value], leaves, "plain")
    if isinstance(value, list):
        value = [item.item() if isinstance(item, np.generic) else item for item in value]
        if all(map(_is_plain, value)):
            return _describe_plain(value, leaves, "plain list")
        return {"kind": "list", "items": [_describe(item, leaves, f"{path}[{i}]") for i, item in enumerate(value)]}
    named = parts_of(value, path)
    items = [_describe(item, leaves, f"{path}{place}") for place, item in named["parts"]]
    return {"kind": named["kind"], "type": named["type"], "keys": named["keys"], "items": items}


def parts_of(value: Any, path: str) -> Node:
    """The kind, type and keys of a dict, tuple or dataclass, and its parts: pairs of their place and value.

    Raises:
        TypeError: it is none; or a key, or the type, is one that cannot travel.
    """
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, (str, int)) or isinstance(key, bool)]:
            raise TypeError(
                f"{path} has the key {bad[0]!r}, a {type(bad[0]).__name__}: keys must be strings or integers"
            )
        parts = [(f"[{key!r}]", item) for key, item in value.items()]
        return {"kind": "dict", "type": None, "keys": list(value), "parts": parts}
    if isinstance(value, tuple):
        kind = "record" if hasattr(value, "_fields") else "tuple"
        parts = [(f"[{i}]", item) for i, item in enumerate(value)]
        return {
            "kind": kind,
            "type": _type_name(value) if kind == "record" else None,
            "keys": len(value),
            "parts": parts,
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        if late := [field.name for field in dataclasses.fields(value) if not field.init]:
            raise TypeError(f"{path} is a {type(value).__name__} whose field {late[0]} has init=False: give a dict")
        parts = [(f".{name}", getattr(value, name)) for name in names]
        return {"kind": "fields", "type": _type_name(value), "keys": names, "parts": parts}
    raise TypeError(
        f"{path} is a {type(value).__name__}, which cannot travel between processes: use tensors, arrays, numbers, "
        f"strings or None, in dicts, lists, tuples or dataclasses"
    )


def _describe_tensor(tensor: torch.Tensor, leaves: list[torch.Tensor], path: str) -> Node:
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise TypeError(
            f"{path} is a {kind} tensor, which cannot travel: make it dense, with .dequantize() or .to_dense()"
        )
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


def _describe_plain(values: list[Any], leaves: list[torch.Tensor], kind: str) -> Node:
    text = json.dumps([{"complex": [v.real, v.imag]} if isinstance(v, complex) else v for v in values]).encode()
    leaves.append(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return {"kind": kind, "leaf": len(leaves) - 1, "dtype": "uint8", "shape": [len(text)]}


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, complex, str)


def _from_numpy(array: np.ndarray[Any, Any], path: str) -> torch.Tensor:
    try:
        # Copied where torch would refuse or warn: read-only, negative strides, foreign byte order.
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


def put_together(
    nodes: Sequence[Node], new: Callable[[Node], torch.Tensor]
) -> tuple[Build, list[dict[int, torch.Tensor]]]:
    """Plan the concatenation, in order, of the values that `nodes` describe.

    Tensors and arrays are concatenated along their first dimension, 0-d ones stacked; lists are joined; numbers,
    strings and None become a list with one entry a part; dicts, tuples and dataclasses keep their structure.

    Args:
        new: gives an uninitialised tensor for a node's dtype, shape and device.

    Returns:
        A function that gives the value, once the data is there, and for each part the tensors to write its data into.

    Raises:
        ValueError: the parts do not fit together; says where.
    """
    targets: list[dict[int, torch.Tensor]] = [{} for _ in nodes]
    return _joined(list(nodes), targets, new, "value"), targets


def _joined(
    nodes: list[Node], targets: list[dict[int, torch.Tensor]], new: Callable[[Node], torch.Tensor], path: str
) -> Build:
    kinds = ["list" if node["kind"] == "plain list" else node["kind"] for node in nodes]
    head = nodes[0]
    if len(set(kinds)) > 1:
        raise ValueError(
            f"{path} is a {kinds[0]} in one part and a {next(k for k in kinds if k != kinds[0])} in another"
        )
    if kinds[0] in ("tensor", "array"):
        return _joined_tensor(nodes, targets, new, path)
    if kinds[0] in ("list", "plain"):
        builds = [single(node, target, new) for node, target in zip(nodes, targets, strict=True)]
        if kinds[0] == "plain":
            return lambda: [build() for build in builds]
        return lambda: [item for build in builds for item in build()]
    for node in nodes:
        if (node["type"], node["keys"]) != (head["type"], head["keys"]):
            what = "keys" if kinds[0] == "dict" else "entries"
            raise ValueError(f"{path} has the {what} {head['keys']} in one part and {node['keys']} in another")
    columns = zip(*(node["items"] for node in nodes), strict=True)
    items = [_joined(list(column), targets, new, f"{path}[{i}]") for i, column in enumerate(columns)]
    return lambda: assembled(head, [item() for item in items])


def _joined_tensor(
    nodes: list[Node], targets: list[dict[int, torch.Tensor]], new: Callable[[Node], torch.Tensor], path: str
) -> Build:
    head = nodes[0]
    for node in nodes:
        if (node["dtype"], node["shape"][1:]) != (head["dtype"], head["shape"][1:]):
            raise ValueError(
                f"{path} has shape {tuple(head['shape'])} and dtype {head['dtype']} in one part, "
                f"{tuple(node['shape'])} and {node['dtype']} in another, and cannot be concatenated along the first "
                f"dimension: give a list with one tensor an entry instead"
            )
    whole = new({**head, "shape": [sum(node["shape"][0] for node in nodes), *head["shape"][1:]]})
    start = 0
    for node, target in zip(nodes, targets, strict=True):
        target[node["leaf"]] = whole[start : start + node["shape"][0]]
        start += node["shape"][0]
    return lambda: _as_described(head, whole)


def single(node: Node, target: dict[int, torch.Tensor], new: Callable[[Node], torch.Tensor]) -> Build:
    """The value of one part, as it was."""
    if "leaf" in node:
        tensor = target[node["leaf"]] = new(node)
        if node["kind"] in ("plain", "plain list"):
            return lambda: plain_values(tensor) if node["kind"] == "plain list" else plain_values(tensor)[0]
        if node["scalar"] and node["kind"] == "array":
            return lambda: tensor.item()
        return lambda: _as_described(node, tensor[0] if node["scalar"] else tensor)
    items = [single(item, target, new) for item in node["items"]]
    if node["kind"] == "list":
        return lambda: [item() for item in items]
    return lambda: assembled(node, [item() for item in items])


def plain_values(tensor: torch.Tensor) -> list[Any]:
    values = json.loads(bytes(tensor.cpu().numpy()).decode())
    return [complex(*value["complex"]) if isinstance(value, dict) else value for value in values]


def _as_described(node: Node, tensor: torch.Tensor) -> Any:
    return tensor.cpu().numpy() if node["kind"] == "array" else tensor


def assembled(node: Node, items: list[Any]) -> Any:
    if node["kind"] == "dict":
        return dict(zip(node["keys"], items, strict=True))
    if node["kind"] == "tuple":
        return tuple(items)
    cls = _named_type(node["type"])
    return cls(*items) if node["kind"] == "record" else cls(**dict(zip(node["keys"], items, strict=True)))


def _named_type(name: str) -> Any:
    """A named tuple or dataclass that another rank's description names; it is a type of this program on both."""
    module, _, path = name.partition(":")
    cls: Any = importlib.import_module(module)
    for part in path.split("."):
        cls = getattr(cls, part)
    if not (isinstance(cls, type) and (hasattr(cls, "_fields") or dataclasses.is_dataclass(cls))):
        raise TypeError(f"{name} is no named tuple or dataclass")
    return cls


def check_importable(name: str, path: str) -> None:
    """Refuse a type that other ranks cannot find by its name."""
    try:
        _named_type(name)
    except (ImportError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{path} has a {name.replace(':', '.')}, which cannot be found by that name ({error}): define it at the "
            f"top of a module under its own name, or give a dict or a tuple"
        ) from None


def named_types(node: Node) -> list[str]:
    """The types that a description would import to be put together."""
    here = [node["type"]] if node["kind"] in ("record", "fields") else []
    return here + [name for item in node.get("items", []) for name in named_types(item)]


def leaves_of(node: Node) -> list[Node]:
    """The descriptions of a value's tensors, in the order in which `take_apart` gave these."""
    return [node] if "leaf" in node else [leaf for item in node["items"] for leaf in leaves_of(item)]


def leaf_paths(node: Node, path: str) -> list[str]:
    """Where each leaf of a description stands, in their order: dict keys and positions, joined by dots."""
    if "leaf" in node:
        return [path]
    keys = node["keys"] if node["kind"] in ("dict", "fields") else range(len(node["items"]))
    return [found for key, item in zip(keys, node["items"], strict=True) for found in leaf_paths(item, f"{path}.{key}")]


def new_tensor(node: Node) -> torch.Tensor:
    return torch.empty(node["shape"], dtype=getattr(torch, node["dtype"]), device=node.get("device", "cpu"))


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes, 1-D; strides of dimensions of size 0 and 1, which may be anything, do not matter."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def to_device(data: Any, device: torch.device) -> Any:
    """Move the tensors in nested dicts, lists and tuples, and anything with a `.to` method, to a device."""
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=True)
    if hasattr(data, "to"):
        return data.to(device)
    if isinstance(data, Mapping):
        return {key: to_device(value, device) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(to_device(value, device) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(to_device(value, device) for value in data)
    return data

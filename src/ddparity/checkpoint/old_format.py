"""Read the descriptions of the format before this one, "ddparity 2", whose plain values are tensors of JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from typing import Any

from .nodes import Node

OLD_FORMAT = "ddparity 2"
_KINDS = ("tensor", "array", "plain", "plain list", "list", "dict", "tuple")


def from_old(saved: dict[str, Any], in_file: Container[str], read: Callable[[str, str], Any]) -> dict[str, Any]:
    """Return an old description in today's form.

    Args:
        in_file: the names of all tensors in the file.
        read: returns the JSON that a tensor has as its bytes, by its name and its SHA-256.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not as that version wrote it.
    """
    names = _tensor_names(saved["nodes"], in_file)
    nodes = {state: _node(node, iter(names[state]), saved["sha256"], read) for state, node in saved["nodes"].items()}
    about = {}
    for name, known in saved["about"].items():
        about[name] = {"shapes": known["shapes"]}
    return {**saved, "nodes": nodes, "about": about}


def _node(node: Any, names: Iterator[str], sha256: dict[str, str], read: Callable[[str, str], Any]) -> Node:
    kind = node["kind"]
    if kind not in _KINDS:  # a named type never was in a checkpoint
        raise ValueError(f"it names the kind {str(kind)[:40]!r}, which no checkpoint has")
    if kind in ("tensor", "array"):
        shape = [] if node["scalar"] else node["shape"]
        kind = "number" if kind == "array" and node["scalar"] else kind  # a NumPy number had become an array
        return {"kind": kind, "name": next(names), "dtype": node["dtype"], "shape": shape}
    if kind in ("plain", "plain list"):
        name = next(names)
        found = [_plain(value) for value in read(name, sha256[name])]
        return {"kind": "list", "items": found} if kind == "plain list" else found[0]
    items = [_node(item, names, sha256, read) for item in node["items"]]
    return {"kind": kind, "items": items, **({"keys": node["keys"]} if kind == "dict" else {})}


def _plain(value: Any) -> Node:
    if type(value) is float and not math.isfinite(value):
        return {"kind": "float", "text": repr(value)}
    if type(value) is dict:
        return {"kind": "complex", "parts": [_plain(float(part)) for part in value["complex"]]}
    return value


def _tensor_names(nodes: dict[str, Any], in_file: Container[str]) -> dict[str, list[str]]:
    """Return for each state the names of its tensors in the file, in order.

    Raises:
        ValueError: the file has no tensor with such a name.
    """
    taken = {"__metadata__"}
    names: dict[str, list[str]] = {}
    for state, node in nodes.items():
        names[state] = []
        for keys in _leaf_keys(node, (state,)):
            path = ".".join(map(str, keys))
            name = path if path not in taken else f"{path}#{len(taken)}"
            if name not in in_file:  # else many tensors under one long key would take much memory
                raise ValueError(f"its description lists {name[:80]}, which the file does not have")
            taken.add(name)
            names[state].append(name)
    return names


def _leaf_keys(node: dict[str, Any], keys: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if "leaf" in node:
        yield keys
        return
    inside = node["keys"] if node["kind"] == "dict" else range(len(node["items"]))
    for key, item in zip(inside, node["items"], strict=True):
        yield from _leaf_keys(item, (*keys, key))

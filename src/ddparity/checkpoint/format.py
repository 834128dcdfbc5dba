"""The file of a checkpoint: tensors in the safetensors format, their places in the states as JSON, checksums of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..comm.nesting import Description
from ..comm.trees import byte_view, leaf_paths, named_types, new_tensor, single, take_apart
from ..compat import layer_versions, with_layer_versions

FORMAT = "ddparity 2"
_ALIGNMENT = 8  # of the data; the format's own writer keeps it, too
_LARGEST_HEADER = 100_000_000  # bytes; its reader refuses more
# What every version of the format knows. Other types are written as bytes.
_NATIVE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """States, by name, taken apart: what to write. `about` goes into the file's JSON as it is."""

    nodes: dict[str, Description]
    tensors: dict[str, torch.Tensor]  # by their names in the file
    versions: dict[str, Any]
    about: dict[str, Any]


def take_snapshot(states: dict[str, Any], about: dict[str, Any], copy: bool) -> Snapshot:
    """Take states apart. With `copy` nothing that happens to them afterwards changes what is written.

    Raises:
        TypeError: names the place in a state of what cannot be saved.
    """
    nodes: dict[str, Description] = {}
    leaves: list[torch.Tensor] = []
    for name, state in states.items():
        try:
            nodes[name], own = take_apart(state, name)
        except TypeError as error:
            raise TypeError(f"the state of {name} cannot be saved: {error}") from error
        if types := named_types(nodes[name]):
            raise TypeError(
                f"{name}'s state_dict has a {types[0]}: states are of tensors, numbers, strings, lists, tuples and "
                f"dicts"
            )
        leaves += [leaf.to("cpu", copy=copy) for leaf in own]
    names = [name for own_names in _names(nodes).values() for name in own_names]
    versions = {name: found for name, state in states.items() if (found := layer_versions(state)) is not None}
    try:  # here, and not where it is written, which may be later
        json.dumps([names, versions], ensure_ascii=False).encode()
    except (TypeError, UnicodeError) as error:
        raise TypeError(
            f"a key or a layer's version in the states of {', '.join(states)} is no JSON: {error}"
        ) from error
    return Snapshot(nodes, dict(zip(names, leaves, strict=True)), versions, about)


def _names(nodes: dict[str, Description]) -> dict[str, list[str]]:
    """Each state's tensors' names in the file, in order: their paths, "model.0.weight", told apart where alike."""
    taken = {"__metadata__"}
    names: dict[str, list[str]] = {}
    for state, node in nodes.items():
        names[state] = []
        for path in leaf_paths(node, state):
            name = path if path not in taken else f"{path}#{len(taken)}"
            taken.add(name)
            names[state].append(name)
    return names


def write_states(path: Path, snapshot: Snapshot) -> None:
    """Write a file, tensor by tensor from where they are.

    Raises:
        OSError: it cannot be written.
        ValueError: there are too many tensors.

    The format: 8 bytes, the header's length; the header, JSON; the tensors' bytes in order, without gaps.
    Source: https://huggingface.co/docs/safetensors
    """
    # Larger elements first: then each tensor starts at a multiple of its element's size.
    tensors = sorted(snapshot.tensors.items(), key=lambda item: -item[1].element_size())
    parts: dict[str, Any] = {name: byte_view(tensor).numpy() for name, tensor in tensors}
    description = json.dumps(
        {
            "nodes": snapshot.nodes,
            "versions": snapshot.versions,
            "about": snapshot.about,
            "torch": torch.__version__,
            "sha256": {name: _sha256(part) for name, part in parts.items()},
        }
    )
    metadata = {"format": FORMAT, "states": description, "sha256": _sha256(description.encode())}
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, tensor in tensors:
        native = tensor.dtype in _NATIVE
        header[name] = {
            "dtype": _NATIVE[tensor.dtype] if native else "U8",
            "shape": list(tensor.shape) if native else [len(parts[name])],
            "data_offsets": [start, start + len(parts[name])],
        }
        start += len(parts[name])
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(
            f"{len(parts):,} tensors and lists are more than one checkpoint can describe ({len(text):,} bytes, of "
            f"{_LARGEST_HEADER:,}): save the objects to several files, or give a state fewer and larger tensors"
        )
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *parts.values()):
            file.write(part)


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Contents:
    """What a file holds of some states. `digest` is the same only where everything in the file is."""

    states: dict[str, Any]
    about: dict[str, Any]
    torch_version: str
    digest: str


def read_states(path: Path, names: Iterable[str]) -> Contents:
    """Read the states of these names, every byte of them checked. Runs no code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is damaged, or has no state of a name; names the file and the tensor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no checkpoint of ddparity: its format is {metadata.get('format')!r}, not {FORMAT!r}"
                )
            description = json.loads(_checked_description(path, metadata))
            nodes: dict[str, Description] = description["nodes"]
            in_file = set(file.keys())
            states = {}
            for name in names:
                if name not in nodes:
                    raise ValueError(f"{path} has no state of the name {name!r}: it has {', '.join(nodes) or 'none'}")
                states[name] = _read_state(path, file, nodes, name, description, in_file)
    except (SafetensorError, UnicodeError) as error:
        raise ValueError(f"{path} is no whole checkpoint: {error}") from error
    return Contents(states, description["about"], description["torch"], metadata["sha256"])


def _checked_description(path: Path, metadata: dict[str, str]) -> str:
    text = metadata.get("states", "")
    if _sha256(text.encode()) != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged: its description of the states is not what was written")
    return text


def _read_state(
    path: Path, file: Any, nodes: dict[str, Description], name: str, description: dict[str, Any], in_file: set[str]
) -> Any:
    node = nodes[name]
    if types := named_types(node):  # importing them would run code that the file chooses
        raise ValueError(f"{path} names the type {types[0]}, which no checkpoint of ddparity does")
    targets: dict[int, torch.Tensor] = {}
    build = single(node, targets, lambda described: new_tensor({**described, "device": "cpu"}))
    for key, target in zip(_names(nodes)[name], targets.values(), strict=True):
        if key not in in_file:
            raise ValueError(f"{path} is damaged: it has no {key}, which its description has")
        # Bytes, not values: whatever a damaged header says of type and shape, these were written or not.
        found, own = byte_view(file.get_tensor(key)), byte_view(target)
        if len(found) != len(own) or _sha256(found.numpy()) != description["sha256"].get(key):
            raise ValueError(f"{path} is damaged: {key} is not what was written")
        own.copy_(found)
    state = build()
    return with_layer_versions(state, description["versions"][name]) if name in description["versions"] else state

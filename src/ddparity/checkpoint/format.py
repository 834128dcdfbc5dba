"""The file of a checkpoint: tensors in the safetensors format, the structure of the states as JSON, and checksums.

States are taken apart into tensors and a description, which is JSON. The file has the tensors, and in its metadata the
description and a SHA-256 of each tensor. Reading checks every byte that it uses, and runs no code from the file.
"""

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
_ALIGNMENT = 8  # bytes; safetensors' own writer aligns the tensors in the same way
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' reader refuses a larger one
# The types that every version of safetensors knows. Tensors of other types are written as bytes.
_NATIVE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """The states of objects, taken apart: what `write_states` writes.

    Attributes:
        descriptions: by the name of the object, the structure of its state.
        tensors: by their names in the file.
        versions: by the name of the object, the versions of a module's layers.
        about: JSON that the file keeps as it is.
    """

    descriptions: dict[str, Description]
    tensors: dict[str, torch.Tensor]
    versions: dict[str, Any]
    about: dict[str, Any]


def take_snapshot(states: dict[str, Any], about: dict[str, Any], copy: bool) -> Snapshot:
    """Take states apart. With `copy` later changes of the states do not change the snapshot.

    Raises:
        TypeError: a state has something that cannot be saved; the message says where it is and its type.
    """
    descriptions: dict[str, Description] = {}
    tensors: list[torch.Tensor] = []
    for name, state in states.items():
        try:
            descriptions[name], own = take_apart(state, name)
        except TypeError as error:
            raise TypeError(f"the state of {name} cannot be saved: {error}") from error
        if types := named_types(descriptions[name]):
            raise TypeError(
                f"{name}'s state_dict has a {types[0]}, which cannot be saved: use tensors, numbers, strings, lists, "
                f"tuples and dicts"
            )
        tensors += [tensor.to("cpu", copy=copy) for tensor in own]
    names = [name for own_names in _tensor_names(descriptions).values() for name in own_names]
    versions = {name: found for name, state in states.items() if (found := layer_versions(state)) is not None}
    try:  # Check it now, because a save in the background writes later.
        json.dumps([names, versions], ensure_ascii=False).encode()
    except (TypeError, UnicodeError) as error:
        raise TypeError(
            f"a key or a layer's version in the states of {', '.join(states)} cannot be written as JSON: {error}"
        ) from error
    return Snapshot(descriptions, dict(zip(names, tensors, strict=True)), versions, about)


# Why not safetensors' `save_file`, measured with 992 MB of tensors: versions 0.4 and 0.5 copy all tensors first (946 MB
# more memory, 17 s instead of 2 to 3 s). Version 0.8 copies nothing, but it makes a file that only its owner can read,
# writes the metadata in a random order, and reports a full disk without an errno. All refuse tied weights.
def write_states(path: Path, snapshot: Snapshot) -> None:
    """Write a file, tensor by tensor and without a copy of their data.

    The format: 8 bytes with the length of the header; the header, which is JSON; the bytes of the tensors in order,
    without gaps.

    Raises:
        OSError: the file cannot be written.
        ValueError: there are too many tensors for the header.

    Source: https://huggingface.co/docs/safetensors
    """
    # Larger elements come first, so that each tensor starts at a multiple of its element's size.
    tensors = sorted(snapshot.tensors.items(), key=lambda item: -item[1].element_size())
    parts: dict[str, Any] = {name: byte_view(tensor).numpy() for name, tensor in tensors}
    states = json.dumps(
        {
            "nodes": snapshot.descriptions,
            "versions": snapshot.versions,
            "about": snapshot.about,
            "torch": torch.__version__,
            "sha256": {name: _sha256(part) for name, part in parts.items()},
        }
    )
    metadata = {"format": FORMAT, "states": states, "sha256": _sha256(states.encode())}
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
            f"{len(parts):,} tensors and lists need a header of {len(text):,} bytes, but the format allows "
            f"{_LARGEST_HEADER:,}: save the objects to several files, or give a state fewer and larger tensors"
        )
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *parts.values()):
            file.write(part)


@dataclass(frozen=True)
class Contents:
    """What a file has of some states.

    Attributes:
        states: the states by name.
        about: the JSON that the file keeps as it is.
        torch_version: the version of torch that wrote the file.
        digest: equal for two files only if everything in them is equal.
    """

    states: dict[str, Any]
    about: dict[str, Any]
    torch_version: str
    digest: str


def read_states(path: Path, names: Iterable[str]) -> Contents:
    """Read the states with these names and check every byte of them. It runs no code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, is damaged, or has no state with such a name. The message has the path
            and the tensor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is not a ddparity checkpoint: its format is {metadata.get('format')!r}, not {FORMAT!r}"
                )
            saved = json.loads(_checked_json(path, metadata))
            descriptions: dict[str, Description] = saved["nodes"]
            in_file = set(file.keys())
            states = {}
            for name in names:
                if name not in descriptions:
                    raise ValueError(
                        f"{path} has no state with the name {name!r}: it has {', '.join(descriptions) or 'none'}"
                    )
                states[name] = _read_state(path, file, descriptions, name, saved, in_file)
    except (SafetensorError, UnicodeError) as error:
        raise ValueError(f"{path} is not a complete checkpoint: {error}") from error
    return Contents(states, saved["about"], saved["torch"], metadata["sha256"])


def _checked_json(path: Path, metadata: dict[str, str]) -> str:
    """Return the description of the states, whose SHA-256 is correct."""
    text = metadata.get("states", "")
    if _sha256(text.encode()) != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged: its description of the states differs from what was written")
    return text


def _read_state(
    path: Path, file: Any, descriptions: dict[str, Description], name: str, saved: dict[str, Any], in_file: set[str]
) -> Any:
    description = descriptions[name]
    if types := named_types(description):  # to import a type would run code that the file chooses
        raise ValueError(f"{path} names the type {types[0]}, but a ddparity checkpoint names no types")
    targets: dict[int, torch.Tensor] = {}
    build = single(description, targets, lambda described: new_tensor({**described, "device": "cpu"}))
    for key, target in zip(_tensor_names(descriptions)[name], targets.values(), strict=True):
        if key not in in_file:
            raise ValueError(f"{path} is damaged: it has no {key}, which its description lists")
        # Compare bytes, not values: a damaged header may give a tensor another type or shape.
        found, own = byte_view(file.get_tensor(key)), byte_view(target)
        if len(found) != len(own) or _sha256(found.numpy()) != saved["sha256"].get(key):
            raise ValueError(f"{path} is damaged: {key} differs from what was written")
        own.copy_(found)
    state = build()
    return with_layer_versions(state, saved["versions"][name]) if name in saved["versions"] else state


def _tensor_names(descriptions: dict[str, Description]) -> dict[str, list[str]]:
    """Return for each state the names of its tensors in the file, in order.

    A name is the tensor's path, such as "model.0.weight". A path that occurs twice gets a number.
    """
    taken = {"__metadata__"}
    names: dict[str, list[str]] = {}
    for state, description in descriptions.items():
        names[state] = []
        for path in leaf_paths(description, state):
            name = path if path not in taken else f"{path}#{len(taken)}"
            taken.add(name)
            names[state].append(name)
    return names


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()

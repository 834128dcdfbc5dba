"""The folder of a checkpoint of sharded tensors (DTensor, `fully_shard`): a file of shards for each rank, and one more.

    checkpoint.safetensors      written last, by rank 0: everything that is not sharded, and the names, digests and
                                places of the shards
    shard-TOKEN-RANK.safetensors

The first is replaced atomically, and it names the others by their digests, so a load finds the shards of one save.
torch's DCP plans what each rank writes, and what each reads where the shards are cut differently. Its own files are
pickles; these are those of `format.py`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..compat import is_dtensor
from ..runtime.agreement import Agreement
from .atomic import earlier_file, remove_stale_drafts, replacing
from .format import SHARD_FILE, Checkpoint, Snapshot, host_tensor, opened, write_states
from .nodes import DTYPES, leaves

MAIN = "checkpoint.safetensors"
_ORPHANED_S = 86_400.0  # the age at which a file of shards that no checkpoint names is deleted

Chunk = tuple[list[int], list[int]]  # where in the tensor it begins, and its sizes


def is_sharded(value: Any) -> bool:
    """Return True if a DTensor is in nested dicts, lists and tuples, for which `check_places` has been called."""
    if not isinstance(value, (Mapping, list, tuple)):
        return is_dtensor(value)
    return any(map(is_sharded, value.values() if isinstance(value, Mapping) else value))


@dataclass(frozen=True)
class Shards:
    """What a rank writes: its parts of sharded tensors, and on rank 0 also everything that is not sharded."""

    snapshot: Snapshot
    sharded: dict[str, torch.Tensor]  # DTensors whose parts this rank writes. Later steps may change their content.
    parts: dict[str, torch.Tensor]


def cut(snapshot: Snapshot, copy: bool) -> Shards:
    """Split a snapshot that has DTensors into what rank 0 writes and the parts of this rank.

    With `copy` later changes of the states do not change it. Nothing else is done here: a step may be waiting.

    Raises:
        TypeError: a DTensor has partial sums.
    """
    sharded: dict[str, Any] = {}
    parts: dict[str, torch.Tensor] = {}
    tensors: dict[str, Any] = snapshot.tensors
    for name, tensor in tensors.items():
        if is_dtensor(tensor) and _writes(tensor, name):
            local = tensor.detach().to_local()
            if local.numel() or not tensor.numel():
                sharded[name], parts[name] = tensor, host_tensor(local, copy)
    plain = {}
    if not dist.is_initialized() or dist.get_rank() == 0:
        plain = {n: host_tensor(t, copy) for n, t in snapshot.tensors.items() if not is_dtensor(t)}
    return Shards(replace(snapshot, tensors=plain), sharded, parts)


def _chunks(shards: Shards) -> dict[str, Chunk]:
    """Return where this rank's parts are in their tensors, by torch's plan. It reads no content of a tensor.

    Raises:
        TypeError: a part is in several pieces.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(shards.sharded), is_coordinator=False)
    chunks: dict[str, Chunk] = {}
    for item in planner.create_local_plan().items:
        name, data = item.index.fqn, item.tensor_data
        assert data is not None, "a DTensor is written as a tensor"
        if name in chunks or list(shards.parts[name].shape) != list(data.chunk.sizes):
            raise TypeError(f"{name} is a DTensor whose local part is in several pieces: redistribute it first")
        chunks[name] = (list(data.chunk.offsets), list(data.chunk.sizes))
    return chunks


def _snapshot_of(parts: dict[str, torch.Tensor]) -> Snapshot:
    nodes = [
        {"kind": "tensor", "name": n, "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        for n, t in parts.items()
    ]
    return Snapshot({"shards": {"kind": "list", "items": nodes}}, parts, {}, {})


def _writes(tensor: Any, name: str) -> bool:
    """Return True if this rank writes its part: of the ranks that have the same part, the first one does."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    if any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(f"{name} is a DTensor of partial sums, which no rank has as a whole: redistribute it first")
    return all(
        number == 0 for number, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )


def write_part(
    folder: Path, shards: Shards, keep: int | None, agreement: Agreement | None, token: str, rank: int, world_size: int
) -> None:
    """Write this rank's shards; on rank 0, wait for those of the others, and publish the checkpoint.

    Every rank calls it, in a thread or not. The agreement ends when the checkpoint is on disk.

    Raises:
        OSError: a file cannot be written.
        TypeError: a part of a tensor is in several pieces.
        RankFailure: another rank failed; raised on rank 0.
    """
    file = folder / f"shard-{token}-{rank}.safetensors"
    try:
        if folder.is_file():
            raise FileExistsError(
                f"{folder} is a file, perhaps the checkpoint of a model that is not sharded, but a sharded model is "
                f"saved into a folder: give another path, or remove the file"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as draft:
            digest = write_states(draft, _snapshot_of(shards.parts))
        told = json.dumps([file.name, digest, _chunks(shards)])
        if agreement is not None and rank:
            agreement.publish(f"shard/{rank}", told)
            agreement.arrive()
            return
        parts = [json.loads(told)]
        if agreement is not None:
            parts += [json.loads(agreement.receive(f"shard/{other}")) for other in range(1, world_size)]
        _publish(folder, shards, keep, parts)
        if agreement is not None:
            agreement.arrive()
    except BaseException as error:
        if agreement is not None:
            agreement.fail(error)
        remove_shard(folder, file)
        raise


def _publish(folder: Path, shards: Shards, keep: int | None, parts: list[Any]) -> None:
    files = [[name, digest] for name, digest, _ in parts]
    if missing := [name for name, _ in files if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder / missing[0]}, which another rank has written, is not there: give a folder that all ranks share"
        )
    nodes = json.loads(json.dumps(shards.snapshot.nodes))
    of_name: dict[str, list[Any]] = {}
    for number, (_, _, chunks) in enumerate(parts):
        for name, (offsets, sizes) in chunks.items():
            of_name.setdefault(name, []).append([number, offsets, sizes])
    for node in nodes.values():
        for leaf in leaves(node):
            if leaf["name"] not in shards.snapshot.tensors:
                leaf["chunks"] = of_name.get(leaf["name"], [])
    main = folder / MAIN
    before = _named(main)
    remove_stale_drafts(main)
    with replacing(main, keep) as draft:
        write_states(draft, replace(shards.snapshot, nodes=nodes, files=files))
    named = _named(main)
    for found in folder.iterdir():
        unfinished = found.name.startswith(".shard-")  # of a rank that was killed
        if unfinished or (SHARD_FILE.fullmatch(found.name) and found.name not in named):
            with suppress(FileNotFoundError):
                if found.name in before or time.time() - found.stat().st_mtime > _ORPHANED_S:
                    found.unlink(missing_ok=True)


def remove_shard(folder: Path, file: Path) -> None:
    """Delete a file of shards that no checkpoint in the folder names."""
    with suppress(OSError):
        if file.name not in _named(folder / MAIN):
            file.unlink(missing_ok=True)


def _named(main: Path) -> set[str]:
    """Return the files of shards that the checkpoint and the ones before it name. A damaged one names none."""
    found: set[str] = set()
    mains = [main]
    while earlier_file(main, len(mains)).is_file():
        mains.append(earlier_file(main, len(mains)))
    for path in mains:
        with suppress(OSError, ValueError), opened(path) as checkpoint:
            found.update(name for name, _ in checkpoint.files)
    return found


@dataclass(frozen=True)
class Reads:
    """What a rank reads: the targets by the names of the tensors, and a plan of DCP.

    `take` writes into the targets, after each shard has been checked.
    """

    targets: dict[str, torch.Tensor]
    take: Callable[[], None]


def plan_reads(
    checkpoint: Checkpoint, leaves: list[dict[str, Any]], own: Callable[[str], Any], stack: ExitStack
) -> Reads:
    """Plan the reads of tensors that are sharded in the file or here, and open the files that this rank needs.

    Args:
        leaves: the nodes of the tensors.
        own: returns by a tensor's name the DTensor to write to, or None for a whole tensor in main memory.
        stack: closes the files.

    Raises:
        FileNotFoundError: a file of shards has gone: a newer checkpoint may have replaced this one.
        ValueError: a file is not the one that the checkpoint names.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    sources: dict[int, tuple[Checkpoint, dict[str, dict[str, Any]]]] = {}

    def parts_in(number: int) -> dict[str, dict[str, Any]]:
        if number not in sources:
            source = _open_shards(checkpoint, number, stack)
            sources[number] = source, {leaf["name"]: leaf for leaf in _leaves_of(source)}
        return sources[number][1]

    places: dict[tuple[str, tuple[int, ...]], tuple[int, list[int]]] = {}
    metadata: dict[str, Any] = {}
    targets: dict[str, torch.Tensor] = {}
    for leaf in leaves:
        name, shape, dtype = leaf["name"], leaf["shape"], DTYPES[leaf["dtype"]]
        target = own(name)
        chunks = leaf.get("chunks", [[-1, [0] * len(shape), shape]])
        if target is None:
            for file, _, sizes in chunks:  # before a forged shape takes memory
                part = parts_in(file).get(name, {})
                if (part.get("shape"), part.get("dtype")) != (sizes, leaf["dtype"]):
                    raise ValueError(f"{sources[file][0].path} is damaged: it has not the part of {name[:80]}")
        targets[name] = checkpoint.empty_tensor(leaf) if target is None else target
        places |= {(name, tuple(offsets)): (file, sizes) for file, offsets, sizes in chunks}
        saved = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for _, offsets, sizes in chunks]
        metadata[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), saved)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), Metadata(metadata), is_coordinator=False)
    by_file: dict[int, list[tuple[Any, list[int]]]] = {}
    for item in planner.create_local_plan().items:
        file, sizes = places[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
        by_file.setdefault(file, []).append((item, sizes))
    for number in by_file:
        parts_in(number)

    def take() -> None:
        for number, items in by_file.items():
            names, (source, parts) = {item.storage_index.fqn for item, _ in items}, sources[number]
            found = source.read_tensors([leaf for name, leaf in parts.items() if name in names])
            for item, sizes in items:
                piece = found.get(item.storage_index.fqn)
                if piece is None or list(piece.shape) != sizes:
                    raise ValueError(f"{source.path} is damaged: it has not the part of {item.storage_index.fqn}")
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    piece = piece.narrow(dim, start, length)
                planner.resolve_tensor(item).detach().copy_(piece)

    return Reads(targets, take)


def _leaves_of(checkpoint: Checkpoint) -> Iterable[dict[str, Any]]:
    return (leaf for node in checkpoint.nodes.values() for leaf in leaves(node) if "chunks" not in leaf)


def _open_shards(checkpoint: Checkpoint, number: int, stack: ExitStack) -> Checkpoint:
    """Open the file of shards with this number; -1 is the checkpoint itself."""
    if number < 0:
        return checkpoint
    name, digest = checkpoint.files[number]
    found = stack.enter_context(opened(checkpoint.path.parent / name))
    if found.digest != digest:
        raise ValueError(f"{found.path} is damaged: it is not the file that {checkpoint.path} names")
    return found


def new_token() -> str:
    return secrets.token_hex(8)

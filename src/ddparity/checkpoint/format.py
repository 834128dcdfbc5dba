"""The file of a checkpoint: tensors in the safetensors format, the structure of the states as JSON, and checksums.

The file has the tensors, and in its metadata the nodes of the states (`nodes.py`) with a SHA-256 of each tensor. It is
opened once: a reader beside a writer sees the whole old file or the whole new one. Reading checks every byte that it
uses, runs no code from the file and imports nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch

from ..comm.trees import byte_view
from ..compat import layer_versions
from ..system import BINARY, CLOEXEC, NONBLOCK, bound_cores, read_at, write_at
from .json_text import parse_json, parsed_bytes
from .nodes import DTYPES, KEYS, Node, built_bytes, bytes_of, check_chunks, check_places, describe, leaves
from .old_format import OLD_FORMAT, from_old

T = TypeVar("T")

FORMAT = "ddparity 3"
_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")
SHARD_FILE = re.compile(r"shard-[0-9a-f]{16}-[0-9]{1,9}\.safetensors")
_ALIGNMENT = 8  # bytes; safetensors' own writer aligns the tensors in the same way
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' reader refuses a larger one
_CHUNK = 1 << 24  # bytes that are read, written or hashed at a time: each time, threads wait for one another
_THREADS = min(4, bound_cores())  # hashlib and the reads of a file let other threads run
_SLACK = 1 << 24  # bytes of memory that reading a file may take beyond twice its size
_OFFSETS_BYTES = 260  # that the place of a tensor in the file takes in memory, at most, and its name
_PADDING = "padding"
_HEADER_KEYS = ("dtype", "shape", "data_offsets")
# The types that every version of safetensors knows. Tensors of other types are written as bytes.
_NATIVE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """The states of objects, taken apart: what `write_states` writes.

    Attributes:
        nodes: by the name of the object, the structure of its state.
        tensors: by their names in the file.
        versions: by the name of the object, the versions of a module's layers.
        about: JSON that the file keeps as it is, by the name of the object.
        files: the files that have the shards of sharded tensors, and the digest of each.
    """

    nodes: dict[str, Node]
    tensors: dict[str, torch.Tensor]
    versions: dict[str, Any]
    about: dict[str, Any]
    files: list[list[str]] = field(default_factory=list)


def check_state(state: Any, name: str) -> None:
    """Check that a state is not nested too deeply, and not too large for a file. `describe_states` needs that.

    Raises:
        TypeError: it is.
    """
    try:
        check_places(state)
    except TypeError as error:
        raise TypeError(f"the state of {name} cannot be saved: {error}") from None


def describe_states(states: Mapping[str, Any], about: dict[str, Any]) -> Snapshot:
    """Take states apart, without a copy of their tensors.

    Raises:
        TypeError: a state has something that cannot be saved; the message says where it is and its type.
    """
    nodes: dict[str, Node] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, state in states.items():
        try:
            nodes[name] = describe(state, name, name, tensors)
        except TypeError as error:
            raise TypeError(f"the state of {name} cannot be saved: {error}") from error
    versions = {name: found for name, state in states.items() if (found := layer_versions(state)) is not None}
    try:  # Check it now, because a save in the background writes later.
        json.dumps([nodes, versions, about], ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"a key, a number or a layer's version in the states of {', '.join(states)} cannot be written as JSON: "
            f"{error}"
        ) from error
    return Snapshot(nodes, tensors, versions, about)


def on_host(snapshot: Snapshot, copy: bool) -> Snapshot:
    """Return a snapshot whose tensors are in main memory. With `copy` later changes of the states do not change it."""
    return replace(snapshot, tensors={name: host_tensor(tensor, copy) for name, tensor in snapshot.tensors.items()})


def host_tensor(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    """Return a contiguous tensor in main memory; a copy where the tensor is one already, if `copy`."""
    dense = tensor.resolve_conj().resolve_neg().to("cpu").contiguous()
    return dense.clone() if copy and dense.data_ptr() == tensor.data_ptr() else dense


# Why SHA-256: of 96 MB it takes 53 ms of a processor with SHA instructions, in threads, beside a write and a flush of
# 200 to 350 ms. BLAKE3 takes 23 ms, but Python has no library for it. XXH3 takes 5 ms, but is no proof that two files
# are equal, which ranks and the folder of shards need.
#
# Why not safetensors' `save_file`, measured with 992 MB of tensors: versions 0.4 and 0.5 copy all tensors first (946 MB
# more memory, 17 s instead of 2 to 3 s). Version 0.8 copies nothing, but it makes a file that only its owner can read,
# writes the metadata in a random order, and reports a full disk without an errno. All refuse tied weights.
def write_states(file: BinaryIO, snapshot: Snapshot) -> str:
    """Write a file, tensor by tensor and without a copy of their data. Return the SHA-256 of its description.

    The format: 8 bytes with the length of the header; the header, which is JSON; the bytes of the tensors in order,
    without gaps. The header is written last, because it has the digests: threads compute them during the writes.

    Raises:
        OSError: the file cannot be written.
        ValueError: there are too many tensors for the header.

    Source: https://huggingface.co/docs/safetensors
    """
    # Larger elements come first, so that each tensor starts at a multiple of its element's size.
    tensors = dict(sorted(snapshot.tensors.items(), key=lambda item: -item[1].element_size()))
    parts = {name: _bytes_of(tensor) for name, tensor in tensors.items()}
    size = sum(map(len, parts.values()))
    unknown = _description(snapshot, dict.fromkeys(parts, "0" * 64))
    padding = _padding(snapshot, tensors, unknown, size)
    start = len(_header(tensors, unknown, padding))
    digests: dict[str, str] = {}

    def hash_part(named: tuple[str, memoryview]) -> None:
        digests[named[0]] = _sha256(named[1])

    def write_parts() -> None:
        position = start
        for part in parts.values():
            _write(file.fileno(), part, position)
            position += len(part)

    _in_threads(hash_part, parts.items(), size, write_parts)
    states = _description(snapshot, digests)
    _write(file.fileno(), memoryview(_header(tensors, states, padding)), 0)
    if padding:
        os.ftruncate(file.fileno(), start + size + padding)
    return _sha256(states.encode())


def _description(snapshot: Snapshot, digests: dict[str, str]) -> str:
    """Return the states in JSON, of the same length for all digests."""
    return json.dumps(
        {
            "nodes": snapshot.nodes,
            "versions": snapshot.versions,
            "about": snapshot.about,
            "torch": torch.__version__,
            "sha256": digests,
            **({"files": snapshot.files} if snapshot.files else {}),
        }
    )


def _header(tensors: dict[str, torch.Tensor], states: str, padding: int) -> bytes:
    """Return what stands before the tensors.

    Raises:
        ValueError: it is too long.
    """
    digest = _sha256(states.encode())
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "states": states, "sha256": digest}}
    start = 0
    for name, tensor in tensors.items():
        native, length = tensor.dtype in _NATIVE, tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NATIVE[tensor.dtype] if native else "U8",
            "shape": list(tensor.shape) if native else [length],
            "data_offsets": [start, start + length],
        }
        start += length
    if padding:
        name = _PADDING
        while name in header:
            name += "#"
        header[name] = {"dtype": "U8", "shape": [padding], "data_offsets": [start, start + padding]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(
            f"{len(tensors):,} tensors, with all lists and numbers, need a header of {len(text):,} bytes, but the "
            f"format allows {_LARGEST_HEADER:,}: save the objects to several files, or give a state fewer and larger "
            f"tensors"
        )
    return len(text).to_bytes(8, "little") + text


def _padding(snapshot: Snapshot, tensors: dict[str, torch.Tensor], states: str, size: int) -> int:
    """Return how many bytes a file needs behind its tensors so that a reader takes them for no attack.

    A reader refuses a file that would take more than twice its size, and `_SLACK`, in memory. In Python a million small
    numbers or tensors take more, also where the user has saved them.
    """
    header = _header(tensors, states, 0)
    described = parsed_bytes(states, KEYS) + _offsets_bytes(tensors)
    parsed = max(len(header) + parsed_bytes(header[8:].decode(), _HEADER_KEYS), len(states) + described)
    need = max(parsed, described + sum(map(built_bytes, snapshot.nodes.values())))
    return max(0, -(-(need - _SLACK) // 2) + _ALIGNMENT * 512 - len(header) - size) if need > _SLACK else 0


def _offsets_bytes(names: Iterable[str]) -> int:
    return sum(_OFFSETS_BYTES + 4 * len(name) for name in names)


def _write(descriptor: int, data: memoryview, position: int) -> None:
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        while len(chunk):  # a full disk takes a part of it, and refuses the next one
            written = write_at(descriptor, chunk, position)
            chunk, position = chunk[written:], position + written


@dataclass(frozen=True)
class Checkpoint:
    """An open file whose description has been checked.

    Attributes:
        path: for errors.
        nodes, versions, about: as those of a `Snapshot`.
        torch_version: the version of torch that wrote the file.
        digest: equal for two files only if everything in them is equal.
        files: the files beside it that have the shards of its sharded tensors, and the digest of each.
    """

    path: Path
    nodes: dict[str, Node]
    versions: dict[str, Any]
    about: dict[str, Any]
    torch_version: str
    digest: str
    files: list[list[str]]
    descriptor: int = field(repr=False)
    offsets: dict[str, tuple[int, int]] = field(repr=False)  # of each tensor, in the file
    sha256: dict[str, str] = field(repr=False)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the tensors of the states with these names, whose every byte has been checked.

        Raises:
            ValueError: the file is damaged; the message has the tensor.
        """
        return self.read_tensors([leaf for name in names for leaf in leaves(self.nodes[name])])

    def read_tensors(self, nodes: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found = {node["name"]: self.empty_tensor(node) for node in nodes}
        _in_threads(self._fill, found.items(), sum(map(bytes_of, nodes)))
        return found

    def empty_tensor(self, node: dict[str, Any]) -> torch.Tensor:
        """Return a tensor to read a node's into.

        Raises:
            ValueError: the memory of this machine does not have so many bytes.
        """
        try:
            return torch.empty(node["shape"], dtype=DTYPES[node["dtype"]])
        except RuntimeError as error:
            raise ValueError(
                f"{self.path}: {node['name'][:80]} has {bytes_of(node):,} bytes, more than this process can have in "
                f"memory: {error}"
            ) from error

    def _fill(self, named: tuple[str, torch.Tensor]) -> None:
        name, tensor = named
        target, digest, (position, _) = _bytes_of(tensor), hashlib.sha256(), self.offsets[name]
        for start in range(0, len(target), _CHUNK):
            chunk = target[start : start + _CHUNK]
            _read(self.descriptor, chunk, position + start, self.path)
            digest.update(chunk)
        if digest.hexdigest() != self.sha256[name]:
            raise ValueError(f"{self.path} is damaged: {name} differs from what was written")


def _in_threads(
    work: Callable[[T], None], items: Iterable[T], size: int, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Call `work` for each item, in threads, while this one first runs `meanwhile`; `size` bytes in all.

    Not an executor: none takes work while the interpreter ends, and a save in the background may be under way then.
    """
    waiting, errors = deque(items), list[BaseException]()

    def take() -> None:
        try:
            while waiting:
                try:
                    item = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                work(item)
        except BaseException as error:
            errors.append(error)
            waiting.clear()

    threads = [threading.Thread(target=take) for _ in range(min(_THREADS - 1, len(waiting)) if size > _CHUNK else 0)]
    for thread in threads:
        thread.start()
    try:
        meanwhile()
    except BaseException:
        waiting.clear()
        raise
    finally:
        take()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def _read(descriptor: int, target: memoryview, position: int, path: Path) -> None:
    while len(target):
        count = read_at(descriptor, target, position)
        if not count:
            raise ValueError(f"{path} is not a complete checkpoint: it ends at byte {position}")
        target, position = target[count:], position + count


@contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    """Open a file, once, and check its description.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or is damaged. The message has the path.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | CLOEXEC | NONBLOCK | BINARY)  # a pipe would wait for a writer
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no checkpoint at {path}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"there is no checkpoint at {path}: it is not a file")
        yield _described(path, descriptor, status.st_size)
    finally:
        os.close(descriptor)


def _described(path: Path, descriptor: int, size: int) -> Checkpoint:
    start = bytearray(min(9, size))
    _read(descriptor, memoryview(start), 0, path)
    # A header of 640 bytes, for example, has a length that begins like a pickle, but a header begins with a bracket.
    if start[8:] != b"{" and _PICKLE.match(start):
        raise ValueError(
            f"{path} is not a ddparity checkpoint but a pickle, as torch.save writes them (.pth, .pt), and a pickle "
            f"may run code: if you trust the file, read it with torch.load(path, weights_only=True), give the objects "
            f"their states by load_state_dict, and save them with save_checkpoint"
        )
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8 or length > _LARGEST_HEADER:
        raise ValueError(
            f"{path} is not a complete checkpoint: it has {size:,} bytes, and a header of {length:,} would follow"
        )
    allowed = 2 * size + _SLACK
    try:
        header, _ = parse_json(_text_in(descriptor, path, 8, length, allowed), allowed, _HEADER_KEYS)
        if type(header) is not dict:
            raise ValueError("its header is no object")
        metadata = header.pop("__metadata__", None)
        offsets = _offsets(header, 8 + length, size)
        del header
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete checkpoint: {error}") from error
    known = metadata if type(metadata) is dict else {}
    if known.get("format") not in (FORMAT, OLD_FORMAT):
        raise ValueError(
            f"{path} is not a ddparity checkpoint of this version: its format is {known.get('format')!r}, not "
            f"{FORMAT!r}"
        )
    description = known.pop("states", None)
    if type(description) is not str or _sha256_of_text(description) != known.get("sha256"):
        raise ValueError(f"{path} is damaged: its description of the states differs from what was written")
    try:
        took = _offsets_bytes(offsets)
        saved, more = parse_json(description, allowed - took, KEYS)
        del description
        took += more
        if known["format"] == OLD_FORMAT:
            saved, took = _from_old(descriptor, path, saved, offsets, took, allowed)
        return _checked(path, saved, known["sha256"], descriptor, offsets, allowed - took)
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _text_in(descriptor: int, path: Path, start: int, length: int, allowed: int) -> str:
    """Return a part of a file as text. It may take `allowed` bytes of memory.

    Raises:
        ValueError: it is no text, or would take too much.
    """
    data = bytearray(length)
    _read(descriptor, memoryview(data), start, path)
    if length * (2 if data.isascii() else 5) > allowed:
        raise ValueError(f"its {length:,} bytes of text would take more than {max(allowed, 0):,} bytes of memory")
    return data.decode()


def _from_old(
    descriptor: int, path: Path, saved: Any, offsets: dict[str, tuple[int, int]], took: int, allowed: int
) -> tuple[dict[str, Any], int]:
    """Return a description of the format before this one in today's form, and how many bytes it and `took` are.

    Its plain values are in tensors of their own, which have no place in a node of today.
    """

    def read(name: str, sha256: str) -> Any:
        nonlocal took
        first, last = offsets[name]
        text = _text_in(descriptor, path, first, last - first, allowed - took)
        if _sha256_of_text(text) != sha256:
            raise ValueError(f"{path} is damaged: {name} differs from what was written")
        values, more = parse_json(text, allowed - took, nan=True)
        took += more
        return values

    took *= 2  # the nodes are made again
    return from_old(saved, offsets, read), took


def _checked(
    path: Path, saved: Any, digest: str, descriptor: int, offsets: dict[str, tuple[int, int]], allowed: int
) -> Checkpoint:
    """Check the description against the header. Its values may take `allowed` bytes of memory.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: they were not written together.
    """
    nodes, sha256, files = saved["nodes"], saved["sha256"], saved.get("files", [])
    for part in (nodes, sha256, saved["versions"], saved["about"]):
        if type(part) is not dict:
            raise ValueError("a part of its description is no object")
    if type(saved["torch"]) is not str:
        raise ValueError("its version of torch is no text")
    if type(files) is not list or not all(map(_is_file, files)) or len({name for name, _ in files}) != len(files):
        raise ValueError("the files of its shards are not named as they are written")
    seen = set()
    for node in nodes.values():
        for leaf in leaves(node):
            name = leaf["name"]
            if "chunks" in leaf:
                check_chunks(leaf, len(files))
                continue
            if name in seen or name not in offsets or type(sha256.get(name)) is not str:
                raise ValueError(f"its description lists {name}, which the file does not have once")
            seen.add(name)
            first, last = offsets[name]
            if last - first != bytes_of(leaf):
                raise ValueError(f"{name} has {last - first} bytes, not those of {leaf['shape']} in {leaf['dtype']}")
    if (need := sum(map(built_bytes, nodes.values()))) > allowed:
        raise ValueError(
            f"its values take {need:,} bytes of memory, and {max(allowed, 0):,} are left of twice its size"
        )
    for layers in saved["versions"].values():
        if type(layers) is not dict or not all(type(layer) is dict for layer in layers.values()):
            raise ValueError("the versions of a module's layers are none")
    return Checkpoint(
        path, nodes, saved["versions"], saved["about"], saved["torch"], digest, files, descriptor, offsets, sha256
    )


def _is_file(entry: Any) -> bool:
    texts = type(entry) is list and len(entry) == 2 and all(type(text) is str for text in entry)
    return texts and SHARD_FILE.fullmatch(entry[0]) is not None


def _offsets(header: dict[str, Any], start: int, size: int) -> dict[str, tuple[int, int]]:
    """Return where each tensor of a safetensors header begins and ends in the file.

    Raises:
        ValueError: an entry is not as the format asks for, tensors overlap, or bytes belong to none.
    """
    found = {}
    for name, entry in header.items():
        entry = entry if type(entry) is dict else {}
        shape, between = entry.get("shape"), entry.get("data_offsets")
        numbers = [*shape, *between] if type(shape) is list and type(between) is list and len(between) == 2 else [-1]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"its entry for {name[:80]} is {str(entry)[:120]}")
        found[name] = (start + numbers[-2], start + numbers[-1])
    end = start
    for name, (first, last) in sorted(found.items(), key=lambda item: item[1]):
        if first != end or last < first:
            raise ValueError(f"{name[:80]} begins at byte {first - start}, not at {end - start}")
        end = last
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}, and the file at {size:,}")
    return found


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    array: Any = byte_view(tensor).numpy()
    return memoryview(array)


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha256_of_text(text: str) -> str:
    """Return the digest of a text, without a copy of it."""
    digest = hashlib.sha256()
    for start in range(0, len(text), 1 << 20):
        digest.update(text[start : start + (1 << 20)].encode(errors="replace"))
    return digest.hexdigest()

"""The bits of tensors: compare them, and put them back."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from ..compat import is_plain_tensor
from .trees import byte_view

# Larger tensors are first summed to this many 64-bit words. It is a prime: with other numbers, rows of a usual shape
# would lie exactly below each other, and shuffled rows would have the same sum.
_COLUMNS = 1021
_ROW_BYTES = 8 * _COLUMNS
_SMALL_BYTES = 4096
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def parts(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """Return the dense tensors that hold a tensor's values; None if they cannot be reached, as in a subclass."""
    if not is_plain_tensor(tensor) or tensor.is_nested or tensor.is_meta:
        return None
    if tensor.layout is torch.strided:
        return [tensor.int_repr() if tensor.is_quantized else tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return None


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one kind have the same bits; False if that cannot be compared."""
    if one.shape != other.shape:
        return False
    if one.is_meta:
        return True
    ours, theirs = parts(one), parts(other)
    if ours is not None and theirs is not None:
        pairs = zip(map(_bytes, ours), map(_bytes, theirs), strict=True)
        return all(torch.equal(mine, its) for mine, its in pairs)
    if one.layout is torch.strided and not one.is_nested:  # a subclass
        return bool(((one == other) | ((one != one) & (other != other))).all())
    return False


def put_back(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    """Give a tensor the content of its copy, in the tensor's own memory if its layout allows that."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.layout is torch.strided and not tensor.is_nested:
            tensor.resize_(copy.shape).copy_(copy)
        elif tensor.layout in _COMPRESSED:  # they ignore an assignment to `.data`
            tensor.resize_as_sparse_(copy).copy_(copy)
        else:
            tensor.data = copy


def marks_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return what tells whether dense tensors have changed, from one look at their memory.

    Of a small tensor a copy. Of a large one the sum of its 64-bit words, modulo 2^64, of 64-bit numbers their own sum,
    too, since the first bit of two words, their sign, drops out of the other.
    """
    marks = []
    for tensor in tensors:
        in_memory = tensor.detach().permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
        data = _bytes(in_memory)
        words = data.numel() // 8 * 8
        if data.numel() <= _SMALL_BYTES or data.data_ptr() % 8 or data.storage_offset() % 8:
            marks.append(data.clone())
            continue
        marks += [data[:words].view(torch.int64).sum(), data[words:].clone()]
        if in_memory.element_size() >= 8:
            marks.append(_bytes(in_memory.sum().reshape(1)))
    return marks


def check_words(tensors: Sequence[list[torch.Tensor]], headers: Sequence[str]) -> list[int]:
    """Return 32 bits for each tensor, given its `parts`. If bits or headers differ, so do these, but for 1 in 2^32.

    It reads the memory once, on its device. At most 16 KiB a part leave a device, in one copy for all.
    """
    condensed = [[piece for part in held for piece in _condensed(part)] for held in tensors]
    here = iter(_on_cpu([piece for pieces in condensed for piece in pieces]))
    words = []
    for pieces, header in zip(condensed, headers, strict=True):
        word = zlib.crc32(header.encode())
        for _ in pieces:
            word = zlib.crc32(next(here).numpy().data, word)
        words.append(word)
    return words


def words_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return 32 bits of each tensor's values and of whether it is trained."""
    held = [parts(one.detach()) or [] for one in tensors]
    return check_words(held, [str(one.requires_grad) for one in tensors])


def _condensed(part: torch.Tensor) -> list[torch.Tensor]:
    """Return few bytes as they are; of many, sums of 64-bit integers modulo 2^64, and the bytes after the last row."""
    data = _bytes(part)
    rows = data.numel() // _ROW_BYTES
    if rows < 2:
        return [data]
    table, rest = data[: rows * _ROW_BYTES], data[rows * _ROW_BYTES :]
    if table.data_ptr() % 8:  # of a view, or of a file that is mapped into memory
        table = table.clone()
    return [table.view(torch.int64).view(rows, _COLUMNS).sum(0).view(torch.uint8), rest]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return byte_view(tensor.detach().resolve_conj().resolve_neg().contiguous())


def _on_cpu(pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the same bytes on the CPU, in one copy from each device."""
    moved = list(pieces)
    for device in {piece.device for piece in pieces if piece.device.type != "cpu"}:
        numbers = [number for number, piece in enumerate(pieces) if piece.device == device]
        together = torch.cat([pieces[number] for number in numbers]).cpu()
        split = together.split([pieces[number].numel() for number in numbers])
        for number, piece in zip(numbers, split, strict=True):
            moved[number] = piece
    return moved

"""Run a model for evaluation: check that the ranks' models are equal, call the model, and restore it afterwards."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..comm.trees import byte_view
from ..compat import is_plain_tensor, unwrapped
from ..data.rng import preserve_streams

Model = nn.Module | Callable[[Any], Any]


def callable_of(model: Model, inputs: Callable[[Any], Any] | None) -> tuple[Callable[[Any], Any], torch.device | None]:
    """Return the function to call with a batch, and the device that the batch must be on; None: where it is.

    The module inside DDP is called. DDP's own forward would broadcast buffers, and would hang if shares are uneven.
    """
    if not isinstance(model, nn.Module):
        return (model if inputs is None else lambda batch: model(inputs(batch))), None
    module = unwrapped(model)
    take = inputs or (lambda batch: batch[0] if isinstance(batch, (list, tuple)) else batch)
    parameter = next(module.parameters(), None)
    return lambda batch: module(take(batch)), None if parameter is None else parameter.device


# Evaluate and restore

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # names of attributes


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Run the body in eval and inference mode, then restore modes, buffers and random streams, also on an exception.

    Raises:
        ValueError: a module is lazy: its parameters would be made in inference mode.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if lazy := [type(module).__name__ for module in modules if _is_lazy(module)]:
        raise ValueError(
            f"predict() got a model with a {lazy[0]} that has not seen its input: run one batch through it before"
        )
    modes = [(module, module.training) for module in modules]
    before = [(module, _Attributes(module), dict(module._buffers), set(_not_saved(module))) for module in modules]
    copies = {id(one): (one, one.clone()) for _, _, named, _ in before for one in named.values() if one is not None}
    try:
        with preserve_streams(), torch.inference_mode():
            if isinstance(model, nn.Module):
                model.eval()
            yield
    finally:
        for module, training in modes:
            if type(module).train is not nn.Module.train and module.training != training:
                module.train(training)  # it does more than set the mode: a layer may merge its weights, for example
        for module, training in modes:
            module.training = training
        for module, attributes, named, not_saved in before:
            module._buffers.clear()
            module._buffers.update(named)
            _not_saved(module).clear()
            _not_saved(module).update(not_saved)
            attributes.forget_inference_tensors()
        for buffer, kept in copies.values():
            # Compared by content, since `.data` and NumPy write without a trace. Written only where it differs, since
            # a later backward may need the buffer unchanged.
            if not is_same(buffer, kept):
                put_back(buffer, kept)


def _is_lazy(module: nn.Module) -> bool:
    own = [*module._parameters.values(), *module._buffers.values()]
    return any(one is not None and is_lazy(one) for one in own)


def _not_saved(module: nn.Module) -> set[str]:
    """Return the names of the buffers that are not in the module's state dict."""
    return module._non_persistent_buffers_set


class _Attributes:
    """A module's attributes before a prediction, to remove the tensors that it caches in inference mode.

    Such a tensor cannot take part in a training. It is an attribute, or in a dict, list or tuple that is an attribute,
    or in one inside a dict or list that is an attribute. Anything else that the module keeps there stays, such as a
    count of its calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, _own(module)
        self._dicts = [(value, dict(value)) for value in self._before.values() if isinstance(value, dict)]
        self._lists = [(value, list(value)) for value in self._before.values() if isinstance(value, list)]

    def forget_inference_tensors(self) -> None:
        for named, entries in self._dicts:
            _forget(named, entries, named)
        for row, items in self._lists:
            if any(_is_new(item, items) for item in row):
                row[:] = items  # items may have moved, as in a sliding window
        _forget(vars(self._module), self._before, _own(self._module))


def _own(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes without those that every module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _forget(values: dict[Any, Any], before: dict[Any, Any], candidates: dict[Any, Any]) -> None:
    for name, value in list(candidates.items()):
        if value is not before.get(name) and _holds_inference_tensors(value):
            if name in before:
                values[name] = before[name]
            else:
                del values[name]


def _is_new(item: Any, before: list[Any]) -> bool:
    return _holds_inference_tensors(item) and not any(item is one for one in before)


def _holds_inference_tensors(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, torch.Tensor) and item.is_inference() for item in items)


# Compare between ranks

_DIGITS = 8  # hex digits of a word of 32 bits

_PARAMETERS = (
    "load the same checkpoint on every rank, or call seed_everything before the model is made, or wrap the model, "
    "which sends rank 0's parameters to all ranks (replicate, or torch's DistributedDataParallel)"
)
_BUFFERS = (
    "in a training with torch's DistributedDataParallel each rank's buffers, such as the running statistics of a batch "
    "norm, follow its own batches, and the other ranks get rank 0's only with the next forward in training. Use "
    "convert_sync_batchnorm(model), or run the steps in accumulate(), which exchanges running statistics; or send rank "
    "0's before predict(): for buffer in model.buffers(): torch.distributed.broadcast(buffer, 0)"
)


class Checksums:
    """A checksum for each tensor of this rank's model: its parameters, and those buffers that a checkpoint has.

    It leaves out what may differ: buffers that are not saved, such as a cache; shards of a distributed tensor; what a
    model that is a function uses.

    `text`: 8 characters for each tensor; None for a function.
    """

    def __init__(self, model: Any) -> None:
        self._names: list[str] = []
        self.text: str | None = None
        if isinstance(model, nn.Module):
            with torch.no_grad():
                self.text = self._checksums(unwrapped(model))

    def _checksums(self, module: nn.Module) -> str:
        held, headers = [], []
        for name, tensor in _saved_tensors(module):
            memory = parts(tensor)
            if memory is not None:
                held.append(memory)
                headers.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.layout}")
                self._names.append(name)
        return "".join(f"{word:0{_DIGITS}x}" for word in check_words(held, headers))

    def difference(self, theirs: str | None) -> str:
        """Return the error message for another rank's text that is not this one's."""
        if self.text is None or theirs is None:
            return "predict() got a module on one rank and a function on another: give the same model on every rank"
        words = zip_longest(_words(self.text), _words(theirs))
        first = next(number for number, (ours, other) in enumerate(words) if ours != other)
        name = self._names[first] if first < len(self._names) else "one that this rank does not have"
        return (
            f"predict() got models that differ between ranks, so that outputs would depend on the number of processes. "
            f"The first difference is in the {name}: {_BUFFERS if name.startswith('buffer') else _PARAMETERS}"
        )


def _saved_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((f"parameter {name!r}", parameter) for name, parameter in module.named_parameters())
    not_saved = {f"{path}.{name}" if path else name for path, one in module.named_modules() for name in _not_saved(one)}
    yield from ((f"buffer {name!r}", buffer) for name, buffer in module.named_buffers() if name not in not_saved)


def _words(text: str) -> list[str]:
    return [text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)]


# The bits of tensors

# Larger tensors are first summed to this many 64-bit words. It is a prime: with other numbers, rows of a usual shape
# would lie exactly below each other, and shuffled rows would have the same sum.
_COLUMNS = 1021
_ROW_BYTES = 8 * _COLUMNS
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

"""Record what one rank does in a run: samples, data, random streams, outputs, gradients, weights."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import default_collate

from ..comm.trees import byte_view
from ..data.dataset import own_getitems
from .notes import MicroNote, RankNotes, StepNote


class Recorder:
    """Writes the notes of one rank.

    For each step call `begin_step`. Then call `record_forward` for each micro-batch, `record_gradients` when the
    gradients are complete, and `record_update` after the optimizer's step. Call `close` at the end.

    Args:
        notes: the notes to complete.
        net: the model, without DDP around it.
        own_folder: where the weights after each checked step go; None: they are not kept.
        reference_folder: where the weights to compare with are; None: they are not compared.
    """

    def __init__(
        self,
        notes: RankNotes,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        own_folder: Path | None,
        reference_folder: Path | None,
    ) -> None:
        self.notes = notes
        self._net = net
        self._optimizer = optimizer
        self._own_folder = own_folder
        self._reference_folder = reference_folder
        self._note = StepNote(0)
        self._outputs: list[str] = []
        self._hook = net.register_forward_hook(self._record_output)

    def close(self) -> None:
        """Remove the forward hook from the model."""
        self._hook.remove()

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Record no outputs in the body."""
        checked, self._note.checked = self._note.checked, False
        try:
            yield
        finally:
            self._note.checked = checked

    def _record_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._note.checked:
            self._outputs.append(digest(output))

    def begin_step(self, number: int, checked: bool) -> None:
        self._note = StepNote(number, checked=checked)
        self.notes.steps.append(self._note)

    def record_forward(self, micros: list[MicroNote], forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `forward`, which computes the loss of `micros`, complete their notes, and return the loss.

        `micros` are several where micro-batches are joined into one batch.
        """
        self._outputs = []
        checked = self._note.checked
        before = streams_digest() if checked else ""
        loss = forward()
        after = streams_digest() if checked else ""
        outputs = digest([self._outputs, loss]) if checked else ""
        self.notes.units["loss"] = torch.finfo(loss.dtype).eps
        for note in micros:
            note.before, note.after, note.forward, note.loss = before, after, outputs, float(loss.detach())
        self._note.micros += micros
        return loss

    def record_gradients(self) -> None:
        if not self._note.checked:
            return
        for name, parameter in self._net.named_parameters():
            if parameter.grad is not None:
                self._note.gradients[name] = digest(parameter.grad)
                self._note.norms[name] = _norm(parameter.grad)

    def record_update(self) -> None:
        if not self._note.checked:
            return
        parameters: dict[str, torch.Tensor] = dict(self._net.named_parameters())
        buffers = dict(self._net.named_buffers())
        self._note.weights = {name: digest(value) for name, value in parameters.items()}
        self._note.buffers = {name: digest(value) for name, value in buffers.items()}
        self._note.optimizer = digest(self._optimizer.state_dict())
        values = {f"weights/{name}": value for name, value in parameters.items()}
        values |= {f"buffers/{name}": value for name, value in buffers.items()}
        name = f"step{self._note.step}.safetensors"
        if self._own_folder is not None:
            self._own_folder.mkdir(parents=True, exist_ok=True)
            copies = {key: value.detach().cpu().clone().contiguous() for key, value in values.items()}
            save_file(copies, self._own_folder / name)
        if self._reference_folder is not None:
            self._note.differences = differences_from_file(values, self._reference_folder / name)


def units_of(net: nn.Module) -> dict[str, float]:
    """Return one unit in the last place, relative, of each weight, gradient and buffer, and of the gradient norm."""
    parameters = {name: unit_of(value) for name, value in net.named_parameters()}
    units = {f"weights/{name}": unit for name, unit in parameters.items()}
    units |= {f"gradient/{name}": unit for name, unit in parameters.items()}
    units |= {f"buffers/{name}": unit_of(value) for name, value in net.named_buffers()}
    units["gradient norm"] = max(parameters.values(), default=0.0)
    return units


def unit_of(value: torch.Tensor) -> float:
    """Return 0 for integers: they are equal or not."""
    return torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0


def _norm(gradient: torch.Tensor) -> float:
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    exact = torch.complex128 if dense.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(dense, dtype=exact))


def differences_from_file(values: Mapping[str, torch.Tensor], path: Path) -> dict[str, float]:
    """Return the difference of each tensor from that in a file; infinite if only one of the two has it."""
    with safe_open(path, framework="pt", device="cpu") as file:
        in_file = set(file.keys())
        found = {
            key: difference(value, file.get_tensor(key)) if key in in_file else float("inf")
            for key, value in values.items()
        }
    return found | dict.fromkeys(in_file - set(values), float("inf"))


def difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference of two tensors relative to their largest absolute value.

    Equal numbers, infinite ones too, and two NaN have no difference. The result is infinite if the shapes differ, or if
    any other pair of numbers has an infinity or NaN.
    """
    if value.shape != reference.shape:
        return float("inf")
    if value.numel() == 0:
        return 0.0
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (value.detach().cpu(), reference.detach().cpu()))
    a, b = a.double(), b.double()
    differences = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    largest = differences.max().item()
    if largest == 0:
        return 0.0
    if not largest < float("inf"):  # NaN, too
        return float("inf")
    return largest / max(a[a.isfinite()].abs().max().item(), b[b.isfinite()].abs().max().item())


def digest(value: Any) -> str:
    """Return 32 hex digits of a value of any nesting.

    Two values have the same digest if their names, shapes, dtypes and bits are the same. An object that is no tensor,
    array, number, string or collection counts by its type and its attributes.
    """
    state = hashlib.blake2b(digest_size=16)
    _feed(state, value, 0)
    return state.hexdigest()


def streams_digest() -> str:
    """Return a digest of the states of the global random streams.

    These are the streams of Python, NumPy and torch, and that of the current CUDA device if CUDA is in use.
    """
    parts = [random.getstate(), list(np.random.get_state()), torch.random.get_rng_state()]
    if torch.cuda.is_initialized():
        parts.append(torch.cuda.get_rng_state())
    state = hashlib.blake2b(digest_size=16)
    state.update(repr(parts[0]).encode())
    _feed(state, parts[1:], 0)
    return state.hexdigest()


def _feed(state: Any, value: Any, depth: int) -> None:
    if isinstance(value, torch.Tensor):
        state.update(f"{value.dtype}{list(value.shape)}".encode())
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        state.update(byte_view(dense.cpu().resolve_conj().resolve_neg().contiguous()).numpy())
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        state.update(f"{value.dtype}{list(value.shape)}".encode())
        state.update(np.ascontiguousarray(value).tobytes())
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        state.update(f"{type(value).__name__} {value!r}".encode())
    elif depth > 16:  # an object may contain itself
        state.update(b"...")
    elif isinstance(value, Mapping):
        _feed_parts(state, "mapping", [*value.keys(), *value.values()], depth)
    elif isinstance(value, (list, tuple, np.ndarray)):
        _feed_parts(state, type(value).__name__, list(value), depth)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed_parts(state, type(value).__name__, [getattr(value, f.name) for f in dataclasses.fields(value)], depth)
    else:
        attributes = vars(value) if hasattr(value, "__dict__") and not callable(value) else {}
        _feed_parts(state, type(value).__name__, [*attributes.keys(), *attributes.values()], depth)


def _feed_parts(state: Any, kind: str, parts: list[Any], depth: int) -> None:
    state.update(f"{kind} {len(parts)}".encode())
    for part in parts:
        _feed(state, part, depth + 1)
        state.update(b"\0")


class Tagged:
    """A data set that returns each sample with its index, so that the notes have what was really loaded."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class TaggedTogether(Tagged):
    """The same for a data set with `__getitems__`, which returns several samples at once."""

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        items = self.dataset.__getitems__(indices)
        return list(zip(indices, items, strict=True))


def tagged(dataset: Any) -> Tagged:
    return Tagged(dataset) if own_getitems(dataset) is None else TaggedTogether(dataset)


class TaggedCollate:
    """Collates tagged samples: returns their indices, and what the Task's own collate function returns for them."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any] | None) -> None:
        self._collate = collate_fn or default_collate

    def __call__(self, samples: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        return [index for index, _ in samples], self._collate([item for _, item in samples])

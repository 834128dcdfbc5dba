"""The forwards of a plain batch norm in one step: what hooks record of them, in place of the layer's own update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableSet
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from ..compat import constant_in_graph, recomputation_ended
from .layer import SyncBatchNorm

Moments = tuple[Tensor, Tensor]  # the mean and the unbiased variance of one batch
Buffers = tuple[Tensor | None, Tensor | None, Tensor | None]
LayerState = tuple[Tensor, Tensor, Tensor | None, float | None]  # running mean and variance, batch count, momentum
Saved = tuple[LayerState, Moments]  # and the copies that a forward writes to

# What `NormForwards.number` returns in place of a number where the layer cannot be kept.
MOVED, UNLIKE, REPLACED, MOMENTA = -1, -2, -3, -4


def is_tracked(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Return True for a plain batch norm with running statistics, whatever its mode."""
    return (
        isinstance(module, _BatchNorm)
        and not isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm))
        and module.track_running_stats
        and module.running_mean is not None
        and module.running_var is not None
        and not is_lazy(module.running_mean)
    )


def running_of(layer: _BatchNorm) -> Moments:
    assert layer.running_mean is not None and layer.running_var is not None, "is_tracked selected the layer"
    return layer.running_mean, layer.running_var


def _buffers_of(layer: _BatchNorm) -> Buffers:
    buffers = layer._buffers
    try:
        return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # the user replaced a buffer by another attribute, whose look-up takes several times as long
        return layer.running_mean, layer.running_var, layer.num_batches_tracked


class NormForwards:
    """The forwards of one layer in one step.

    Each forward in training writes the batch's own statistics to copies of the layer's buffers, with momentum 1. A
    forward with other buffers than the layer's own (`torch.func.functional_call`) is left alone.

    Args:
        checked: layers with a forward of their own that is known to update as torch's does; this adds to it.

    Attributes:
        records: the statistics of each batch.
        running, counted: the layer's own running statistics and batch count.
    """

    def __init__(self, layer: _BatchNorm, checked: MutableSet[nn.Module]) -> None:
        self.layer, self._checked = layer, checked
        self.records: list[Moments] = []
        self._momenta: list[float | None] = []
        self._saved: Saved | None = None
        self._unlike = False
        self._handles: list[RemovableHandle] = []
        self.begin()

    def begin(self) -> None:
        """Note the buffers as they are. Only the replay may write them from now on."""
        mean, var, self.counted = _buffers_of(self.layer)
        assert mean is not None and var is not None, "is_tracked selected the layer"
        self.running = mean, var
        self._versions = self._versions_now()

    def hook(self, traced: Callable[[], None]) -> None:
        """Register the hooks. While a graph is compiled they only call `traced`."""
        self._traced = traced
        self._handles.append(self.layer.register_forward_pre_hook(_Hook(self._before, traced)))

    def end(self) -> None:
        """Remove the hooks. KeyboardInterrupt may have ended a forward without the second one."""
        for handle in self._handles:
            handle.remove()
        self.restore()

    def number(self) -> int:
        """Return the number of batches; a negative number where the layer cannot be kept."""
        if self._unlike:
            return UNLIKE
        if any(now is not own for now, own in zip(_buffers_of(self.layer), self._own(), strict=True)):
            return REPLACED
        if self.moved():
            return MOVED
        return MOMENTA if len(set(self._momenta)) > 1 else len(self.records)

    def moved(self) -> bool:
        """Return True if the layer's own buffers were written in the loop."""
        return self._versions_now() != self._versions

    @property
    def momentum(self) -> float | None:
        return self._momenta[0] if self._momenta else None

    def cut(self, length: int) -> None:
        """Forget all forwards but the first ones."""
        del self.records[length:], self._momenta[length:]

    def restore(self) -> None:
        """Put the layer's own buffers and momentum back."""
        if self._saved is not None:
            state, _ = self._saved
            self._saved = None
            _set_state(self.layer, *state)

    def _own(self) -> Buffers:
        return (*self.running, self.counted)

    def _versions_now(self) -> list[int]:
        return [0 if one is None or one.is_inference() else one._version for one in self._own()]

    def _before(self, layer: _BatchNorm, _: Any) -> None:
        """Replace the layer's buffers by copies, which a forward of the user's own may read, and set momentum to 1."""
        if not layer.training or self._unlike or layer.running_mean is not self.running[0]:
            return
        if len(self._handles) == 1:  # only now: the layers of a frozen model need no second hook
            # always_call: checkpointing may end a recomputed forward by an exception after the normalisation.
            # prepend: two contexts can be active, as an exception may keep the loop of the first one alive. The inner
            # context must then end first.
            after = _Hook(self._after, self._traced)
            self._handles.append(layer.register_forward_hook(after, prepend=True, always_call=True, with_kwargs=True))
        mean, var = running_of(layer)
        count = layer.num_batches_tracked
        copies = mean.clone(), var.clone()
        self._saved = (mean, var, count, layer.momentum), copies
        _set_state(layer, *copies, None if count is None else count.clone(), 1.0)

    def _after(self, layer: _BatchNorm, args: Any, kwargs: Any, output: Any) -> None:
        """Record the batch's statistics, if the forward wrote them, and put the layer's own buffers back."""
        if self._saved is None:
            return
        before = self._saved
        after, count = running_of(layer), layer.num_batches_tracked
        self.restore()
        # Momentum 1 leaves exactly the batch's statistics. A frozen layer, and one that failed before, writes nothing.
        if not _wrote(before, after, count, failed=output is None and not recomputation_ended()):
            return
        if getattr(layer.forward, "__func__", None) is not _BatchNorm.forward and self._is_unlike(count, args, kwargs):
            self._unlike = True
            with torch.no_grad():
                layer.forward(*args, **kwargs)  # its own update of its own buffers, which the hooks have kept it from
            return
        self.records.append(after)
        self._momenta.append(layer.momentum)

    def _is_unlike(self, count: Tensor | None, args: Any, kwargs: Any) -> bool:
        # Whether a forward updates once may depend on the batch's size.
        several = count is not None and not count.is_inference() and count._version > 1
        if self.layer in self._checked and not several:
            return False
        self._checked.add(self.layer)
        return not _updates_as_torch(self.layer, args, kwargs)


class _Hook:
    """A hook of a layer. In a copy or a pickle of the layer it is one that does nothing, and needs no ddparity."""

    def __init__(self, call: Callable[..., None], traced: Callable[[], None]) -> None:
        self._call, self._traced = call, traced

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced()
        else:
            self._call(*args)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # a function of any arguments that returns None


def adding(layers: MutableSet[nn.Module], layer: nn.Module) -> Callable[[], None]:
    """Return a function that adds the layer to the set, also where a compiler traces it."""

    def add() -> None:
        layers.add(layer)

    constant_in_graph(add)
    return add


def _updates_as_torch(layer: _BatchNorm, args: Any, kwargs: Any) -> bool:
    """Return True if a forward updates once, to (1 - momentum) * running + momentum * statistics of the batch.

    Run the forward twice, with other running statistics and another momentum. The layer is then as before.
    """
    mean, var = running_of(layer)
    count = layer.num_batches_tracked
    attributes, buffers = dict(layer.__dict__), dict(layer._buffers)
    devices = [mean.device] if mean.is_cuda else []
    batch: Moments | None = None
    try:
        for offset, momentum in ((1.0, 1.0), (2.0, 0.25)):
            started = [value + offset * (1 + value.abs().max()) for value in (mean, var)]
            counted = None if count is None else count.clone()
            layer._buffers.update({name: None if one is None else one.clone() for name, one in buffers.items()})
            _set_state(layer, started[0].clone(), started[1].clone(), counted, momentum)
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                layer.forward(*map(_copy, args), **{name: _copy(one) for name, one in kwargs.items()})
            found, counted = running_of(layer), layer.num_batches_tracked
            if count is not None and (counted is None or int(counted - count) != 1):
                return False
            batch = batch or found  # by momentum 1
            for start, new, value in zip(started, found, batch, strict=True):
                rounding = 64 * torch.finfo(new.dtype).eps
                largest = rounding * float(torch.maximum(start.abs().max(), value.abs().max()).nan_to_num())
                expected = torch.lerp(start, value, momentum)
                if not torch.allclose(new, expected, rtol=rounding, atol=largest, equal_nan=True):
                    return False
        return True
    finally:
        layer.__dict__.update(attributes)
        layer._buffers.update(buffers)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value  # a forward may write into its input


def _wrote(before: Saved, after: Moments, count: Tensor | None, failed: bool) -> bool:
    """Return True if a forward wrote new running statistics.

    torch's batch norm writes into the tensors without a new version of them, but the layer counts the batch in the
    line before. Where that says nothing, compare the values; a device must then be waited for.
    """
    (mean, var, *_), copies = before
    counts = not copies[0].is_inference()  # torch.inference_mode() makes copies that count no writes
    if any(new is not old or (counts and new._version) for new, old in zip(after, copies, strict=True)):
        return True
    if count is not None and counts and not failed:
        return count._version > 0
    return not (torch.equal(after[0], mean) and torch.equal(after[1], var))


def _set_state(layer: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor | None, momentum: float | None) -> None:
    buffers = {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
    if buffers.keys() <= layer._buffers.keys():
        layer._buffers.update(buffers)  # Module.__setattr__ takes as long as the forward of a small layer
    else:  # the user replaced a buffer by another attribute
        for name, value in buffers.items():
            if value is not None:
                setattr(layer, name, value)
    layer.momentum = momentum

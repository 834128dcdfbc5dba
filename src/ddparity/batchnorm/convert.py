"""Convert the batch norms of a model to synchronised ones and back. Each module stays the same object."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .layer import SyncBatchNorm, in_backward_of_eager

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_BY_DIMENSIONS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_OWN_ATTRIBUTES = ("process_group", "_plain_class", "_path", "_input_dim", "_agreed", "_ran")


def convert_sync_batchnorm(model: Model, process_group: dist.ProcessGroup | None = None) -> Model:
    """Convert every batch norm of a model to a `SyncBatchNorm`, in place, and return the model.

    Each module stays the same object, with its parameters, buffers, hooks, attributes and parametrizations. So an
    optimizer that exists already stays valid, and a layer that the model uses twice stays one layer. BatchNorm1d,
    BatchNorm2d, BatchNorm3d and torch.nn.SyncBatchNorm become `SyncBatchNorm`. A subclass that has its own forward (for
    example with a fused activation) keeps it: its calls of torch.nn.functional.batch_norm and of the base class's
    forward are synchronised. The function logs how many layers it converted, and which modules look like a batch norm
    but were not converted.

    Args:
        model: any module, also one inside DistributedDataParallel.
        process_group: the ranks that take part; None: all ranks, except that a layer keeps a group that it has already.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model has a lazy batch norm that has seen no input.

    Example:
        >>> type(convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))[1])
        <class 'ddparity.batchnorm.layer.SyncBatchNorm'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_sync_batchnorm() got a {type(model).__name__}: give a torch.nn.Module")
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, _LazyNormBase) and isinstance(module, _BatchNorm):
            raise ValueError(
                f"convert_sync_batchnorm(): {_named(path, module)} has seen no input, so its number of channels is "
                f"unknown: run one forward before the conversion"
            )
    converted, skipped = 0, []
    for path, module in modules.items():
        if not _is_convertible(module):
            if _looks_like_batch_norm(module):
                skipped.append(_named(path, module))
            continue
        if not isinstance(module, SyncBatchNorm):
            plain = type(module)
            module.__class__ = _synchronised(plain)
            if _unparametrized(plain) in _PLAIN:
                module.__dict__["_plain_class"] = _unparametrized(plain)
        state = module.__dict__
        state["process_group"] = process_group or state.get("process_group")
        state["_path"] = path or None
        converted += 1
    logger.info("convert_sync_batchnorm: converted %d batch norm%s", converted, "" if converted == 1 else "s")
    if skipped:
        logger.warning(
            "convert_sync_batchnorm: did not convert modules that look like a batch norm: %s", ", ".join(skipped)
        )
    return model


def revert_sync_batchnorm(model: Model) -> Model:
    """Convert every `SyncBatchNorm` of a model back to its plain class, in place, and return the model.

    Use it before an export or for inference elsewhere: torch.export and ONNX then see torch's own layers. A layer that
    was created as a `SyncBatchNorm` becomes the BatchNorm1d, BatchNorm2d or BatchNorm3d that fits its last input.

    Raises:
        ValueError: a layer was created as a `SyncBatchNorm` and has seen no input.

    Example:
        >>> type(revert_sync_batchnorm(convert_sync_batchnorm(nn.BatchNorm2d(8))))
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SyncBatchNorm)}
    plain = {path: _plain_class(path, module) for path, module in layers.items()}
    for path, module in layers.items():
        module.__class__ = plain[path]  # type: ignore[assignment]  # mypy does not allow a change of class
        for name in _OWN_ATTRIBUTES:
            module.__dict__.pop(name, None)
    return model


def _plain_class(path: str, module: SyncBatchNorm) -> type[nn.Module]:
    """Return the class that the module gets back. Raises ValueError if it is unknown."""
    plain: type[nn.Module] | None = module._plain_class  # an attribute of the object or of its class
    if plain is None and module._input_dim is not None:
        plain = _BY_DIMENSIONS.get(module._input_dim)
    if plain is None:
        raise ValueError(
            f"revert_sync_batchnorm(): {_named(path, module)} was created as a SyncBatchNorm and has seen no input of "
            f"2 to 5 dimensions, so its plain class is unknown: run one forward first"
        )
    return _reparametrized(type(module), plain) if _is_parametrized(type(module)) else plain


def _is_convertible(module: nn.Module) -> bool:
    if isinstance(module, SyncBatchNorm):
        return True
    # Conversion would not change a forward that is set on the object, nor that of a subclass of torch.nn.SyncBatchNorm.
    replaced = "forward" in module.__dict__
    foreign = isinstance(module, nn.SyncBatchNorm) and _unparametrized(type(module)) is not nn.SyncBatchNorm
    return isinstance(module, _BatchNorm) and not replaced and not foreign


def _looks_like_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    name = str(getattr(module, "original_name", type(module).__name__)).lower()  # a scripted module has original_name
    buffers = dict(module.named_buffers(recurse=False))
    return "batchnorm" in name.replace("_", "") or {"running_mean", "running_var"} <= buffers.keys()


def _named(path: str, module: nn.Module) -> str:
    return f"{path or 'the model itself'} ({type(module).__name__})"


def _unparametrized(kind: type) -> type:
    """Return the class that torch.nn.utils.parametrize replaced by its own, or the class itself."""
    return kind.__bases__[0] if _is_parametrized(kind) else kind


def _is_parametrized(kind: type) -> bool:
    return kind.__name__.startswith("Parametrized") and kind.__module__ == parametrize.__name__


def _synchronised(kind: type) -> type:
    """Return the synchronised class for a class of batch norms."""
    if _is_parametrized(kind):
        return _reparametrized(kind, _synchronised(kind.__bases__[0]))
    if kind in _PLAIN or kind is nn.SyncBatchNorm:
        return SyncBatchNorm
    return synchronised_subclass(kind)


def _reparametrized(kind: type, base: type) -> type:
    """Return a copy of torch's class for a parametrized module, with another base class."""
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), own)


@functools.cache
def synchronised_subclass(kind: type[_BatchNorm]) -> type[SyncBatchNorm]:
    """Return the synchronised class for a user's batch norm, always the same one, so that types can be compared."""
    own: dict[str, Any] = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_plain_class": kind}
    # pickle stores the user's class, since this one cannot be imported.
    own["__reduce_ex__"] = lambda self, protocol: (_restored, (kind,), self.__getstate__())
    if kind.forward is not _BatchNorm.forward:
        own["forward"] = _synchronised_forward(kind.forward)
    return type(f"Sync{kind.__name__}", (kind, SyncBatchNorm), own)


def _restored(kind: type[_BatchNorm]) -> nn.Module:
    return nn.Module.__new__(synchronised_subclass(kind))  # type: ignore[arg-type]  # the class is made at run time


def _synchronised_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a subclass's forward with a synchronised batch norm.

    The forward may call torch.nn.functional.batch_norm or the forward of its base class. Otherwise it raises
    RuntimeError in training.
    """

    @functools.wraps(forward)
    def synchronised(self: SyncBatchNorm, *args: Any, **kwargs: Any) -> Any:
        group = self._group()
        recomputes = self.training and in_backward_of_eager()
        if group is None and not recomputes:
            return forward(self, *args, **kwargs)
        counted = self.num_batches_tracked.clone() if recomputes and self.num_batches_tracked is not None else None
        self.__dict__["_ran"] = False
        try:
            with _Synchronise(self, group):
                result = forward(self, *args, **kwargs)
        finally:  # checkpointing ends a recomputed forward by an exception when the backward has all it needs
            if counted is not None and self.num_batches_tracked is not None:
                self.num_batches_tracked.copy_(counted)
        if not self._ran:
            raise RuntimeError(
                f"{self._path or type(self).__name__}: the forward of {self._plain_class} calls neither "
                f"torch.nn.functional.batch_norm nor the forward of its base class, so its statistics are not "
                f"synchronised: write it with ddparity.sync_moments, or do not convert it"
            )
        return result

    return synchronised


class _Synchronise(TorchFunctionMode):
    """Replace a module's calls of torch.nn.functional.batch_norm in training by the synchronised batch norm."""

    def __init__(self, module: SyncBatchNorm, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.module = module
        self.group = group

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            given = _SIGNATURE.bind(*args, **(kwargs or {}))
            given.apply_defaults()
            if given.arguments["training"]:
                return self._batch_norm(**given.arguments)
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        running = None if running_mean is None or running_var is None else (running_mean, running_var)
        return self.module._normalise(input, self.group, weight, bias, running, momentum, eps)


_SIGNATURE = inspect.signature(F.batch_norm)

"""The layer `SyncBatchNorm`, and which batch norms of a model are synchronised."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..compat import in_backward
from ..runtime.agreement import agreed
from .custom_op import compiled_batch_norm
from .function import Announce, sync_batch_norm
from .moments import group_of_several

logger = logging.getLogger(__name__)


class SyncBatchNorm(_BatchNorm):
    """Batch norm over all ranks: in training, the statistics are those of the ranks' inputs in one batch.

        y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias

    The mean and the biased variance of each channel are computed over all ranks and all dimensions except the second.
    The running variance uses the unbiased variance. Arguments, attributes and state are those of torch.nn.BatchNorm*d
    and torch.nn.SyncBatchNorm. In eval mode, without a process group, and in a world of one the layer is exactly
    torch.nn.functional.batch_norm.

    Shapes: (N, C, ...) with at least 2 dimensions. N and the sizes after C may differ between ranks and may be 0. The
    output has the input's shape, dtype and memory layout. The statistics are computed in float64.

    The gradients of weight and bias are those of this rank's samples, as in every layer; DistributedDataParallel sums
    them. If activation checkpointing recomputes a forward, the running statistics are not updated again.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, bias: as in torch.nn.BatchNorm2d.
        process_group: the ranks that take part; None: all ranks. `torch.save` does not save it.

    Collectives, in training with several ranks: in the forward one all-gather of 8 * (2C + 1) bytes from each rank; in
    the backward one sum of 16C bytes. Short tensors on the CPU use an all-to-all for both. Every rank of the group must
    run the same layers in the same order. In the first forward and the first backward of a layer the ranks check this
    through the group's store.

    Raises:
        ValueError: the input has fewer than 2 dimensions or another number of channels than `num_features`; all ranks
            together have one value for each channel; the ranks run different layers (RankFailure on the other ranks).

    Sources: https://arxiv.org/abs/1502.03167, https://pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html

    Example:
        >>> SyncBatchNorm(3)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    process_group: dist.ProcessGroup | None
    _plain_class: type[_BatchNorm] | None = None  # the class before `convert_sync_batchnorm`
    _path: str | None = None  # the layer's name in the model
    _input_dim: int | None = None  # of the last forward; `revert_sync_batchnorm` needs it
    _agreed = False  # the ranks agreed on this layer in its first forward
    _ran = False  # the forward called the normalisation

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # torch has this argument since 2.15
            self.register_parameter("bias", None)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        group = self._group()
        if group is None and not (self.training and in_backward_of_eager()):
            return super().forward(input)
        self._check_input_dim(input)
        return self._normalise(input, group, self.weight, self.bias, self._running(), self._count(), self.eps)

    def _check_input_dim(self, input: Tensor) -> None:
        if self._plain_class is not None:
            self._plain_class._check_input_dim(self, input)
        elif input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        elif not torch.compiler.is_compiling():
            self.__dict__["_input_dim"] = input.dim()

    def _group(self) -> dist.ProcessGroup | None:
        """Return the process group of this forward's collective; None: no collective."""
        return group_of_several(self.process_group) if self.training else None

    def _running(self) -> tuple[Tensor, Tensor] | None:
        """Return the running statistics that this training forward updates."""
        mean, var = self.running_mean, self.running_var  # read each buffer once: Module.__getattr__ is slow
        return None if not self.track_running_stats or mean is None or var is None else (mean, var)

    def _count(self) -> float | Tensor:
        """Count this batch, and return the factor by which the running statistics are updated."""
        batches = self.num_batches_tracked
        if not self.track_running_stats or batches is None:
            return 0.0 if self.momentum is None else self.momentum
        if not in_backward_of_eager():
            batches.add_(1)
        return batches.double().reciprocal() if self.momentum is None else self.momentum

    def _normalise(
        self,
        input: Tensor,
        group: dist.ProcessGroup | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor] | None,
        momentum: float | Tensor,
        eps: float,
    ) -> Tensor:
        """Run the training forward. `group` is None if a process without other ranks recomputes the forward."""
        if torch.compiler.is_compiling():
            assert group is not None, "a compiled graph has no recomputed forward here"
            return compiled_batch_norm(input, running, weight, bias, momentum, eps, group)
        self.__dict__["_ran"] = True
        # A recomputed forward updates copies: checkpointing compares what it saves with the first forward.
        if in_backward() and running is not None:
            running = running[0].clone(), running[1].clone()
        if group is None:
            mean, var = running or (None, None)
            return F.batch_norm(input, mean, var, weight, bias, True, float(momentum), eps)
        announce: Announce | None = None
        if not self._agreed:
            announce = functools.partial(_agree, group, self._path, input.size(1))
        y = sync_batch_norm(input, running, weight, bias, momentum, eps, group, announce)
        self.__dict__["_agreed"] = True  # Module.__setattr__ is slower
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the process group, which other processes do not have."""
        return {**self.__dict__, "process_group": None, "_agreed": False, "_lost_group": self.process_group is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop("_lost_group", False):
            logger.warning(
                "a SyncBatchNorm%s was saved with its own process group, which the file does not contain: set its "
                "process_group, otherwise it synchronises over all ranks",
                f" ({state['_path']})" if state.get("_path") else "",
            )
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch gives no type

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """Return a copy that keeps the process group."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        memo[id(self.process_group)] = self.process_group
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def synchronises(model: nn.Module) -> bool:
    """Return True if a batch norm of the model, ddparity's or torch's, is in training and waits for other ranks."""
    return any(layer.training for _, layer in shared_layers(model))


def shared_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, layer) of each batch norm, ddparity's or torch's, that is synchronised over several ranks."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm)) and _is_shared(module.process_group)
    ]


def _is_shared(process_group: dist.ProcessGroup | None) -> bool:
    return dist.is_initialized() and dist.get_world_size(process_group) > 1


def in_backward_of_eager() -> bool:
    """Return True if activation checkpointing recomputes this forward. Compiled graphs handle this case themselves."""
    return not torch.compiler.is_compiling() and in_backward()


def _agree(group: dist.ProcessGroup, path: str | None, channels: int, direction: str) -> None:
    """Wait until all ranks are at the collective of the same layer.

    Raises ValueError on a rank that is at another layer, and RankFailure on the other ranks. It uses no collective, but
    short requests to the group's store.
    """
    what = f"the {direction} of {path or 'a SyncBatchNorm'}, {channels} channels"
    with agreed(what, group, "batchnorm") as agreement:
        assert agreement is not None, "the group has several ranks"
        agreement.same("the SyncBatchNorm layer", what)

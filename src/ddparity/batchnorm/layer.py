"""Batch norm over all processes."""

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
    """Batch norm whose statistics, in training, are those of the ranks' inputs joined in one batch.

        y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias

    with the mean and the biased variance of each channel over all dimensions but the second, and over all ranks. The
    running variance moves towards the unbiased one. Arguments, attributes and state are those of torch.nn.BatchNorm*d
    and torch.nn.SyncBatchNorm. In eval mode, without a process group, and in a world of one it is exactly
    torch.nn.functional.batch_norm.

    Shapes: (N, C, ...) with 2 dimensions or more; N and the sizes behind C may differ between ranks and may be zero.
    The output has the input's shape, dtype and memory layout. Statistics are kept in float64.

    Gradients of weight and bias are those of this rank's samples, as of any layer: DistributedDataParallel adds them
    up. Where activation checkpointing recomputes a forward, running statistics do not move again.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, bias: as in torch.nn.BatchNorm2d.
        process_group: whose ranks; None: all. `torch.save` does not keep it.

    Collectives, in training with several ranks: forward one exchange of 8 * (2C + 1) bytes a rank; backward one sum
    of 16C bytes. Every rank of the group must run the layer, in the same order of layers; in a layer's first forward
    and backward the ranks make sure of that through the group's store.

    Raises:
        ValueError: fewer than 2 dimensions, another number of channels than `num_features`, one value a channel on all
            ranks together; the ranks are about to exchange different layers (on the others RankFailure).

    Sources: https://arxiv.org/abs/1502.03167, https://pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html

    Example:
        >>> SyncBatchNorm(3)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    process_group: dist.ProcessGroup | None
    # What it was before `convert_sync_batchnorm`, and where in the model.
    _plain_class: type[_BatchNorm] | None = None
    _path: str | None = None
    _input_dim: int | None = None  # of the last forward, for `revert_sync_batchnorm`
    _agreed = False  # the ranks have met in the first forward
    _ran = False  # a forward has come to the normalisation

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
        if not bias:  # torch's own argument from 2.15 on
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
        """With whom this forward exchanges."""
        return group_of_several(self.process_group) if self.training else None

    def _running(self) -> tuple[Tensor, Tensor] | None:
        """The running statistics that this training forward moves."""
        mean, var = self.running_mean, self.running_var  # each look at a buffer goes through Module.__getattr__
        return None if not self.track_running_stats or mean is None or var is None else (mean, var)

    def _count(self) -> float | Tensor:
        """Count this batch; by how much the running statistics move."""
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
        """The training forward; `group` is None for a recomputed one of a process alone."""
        if torch.compiler.is_compiling():
            assert group is not None, "no recomputation in a graph"
            return compiled_batch_norm(input, running, weight, bias, momentum, eps, group)
        self.__dict__["_ran"] = True
        if in_backward() and running is not None:  # recomputed: move copies, since what is saved must be alike
            running = running[0].clone(), running[1].clone()
        if group is None:
            mean, var = running or (None, None)
            return F.batch_norm(input, mean, var, weight, bias, True, float(momentum), eps)
        announce: Announce | None = None
        if not self._agreed:
            announce = functools.partial(_agree, group, self._path, input.size(1))
        y = sync_batch_norm(input, running, weight, bias, momentum, eps, group, announce)
        self.__dict__["_agreed"] = True  # not through Module.__setattr__, which takes longer than the dictionary
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Without the process group, which only exists in this world."""
        return {**self.__dict__, "process_group": None, "_agreed": False, "_lost_group": self.process_group is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop("_lost_group", False):
            logger.warning(
                "a SyncBatchNorm%s was saved with a process group of its own, which is not kept: set its "
                "process_group, or it will synchronise over all ranks",
                f" ({state['_path']})" if state.get("_path") else "",
            )
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch gives no type

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy in this process, which keeps the process group."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        memo[id(self.process_group)] = self.process_group
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def synchronises(model: nn.Module) -> bool:
    """Whether the model has batch norms, ours or torch's, whose forward in training waits for other ranks."""
    return any(layer.training for _, layer in shared_layers(model))


def shared_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's batch norms, ours or torch's, that are synchronised over several ranks, by name; in any mode."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm)) and _is_shared(module.process_group)
    ]


def _is_shared(process_group: dist.ProcessGroup | None) -> bool:
    return dist.is_initialized() and dist.get_world_size(process_group) > 1


def in_backward_of_eager() -> bool:
    """Whether this forward is one that activation checkpointing recomputes; compiled graphs see to that themselves."""
    return not torch.compiler.is_compiling() and in_backward()


def _agree(group: dist.ProcessGroup, path: str | None, channels: int, direction: str) -> None:
    """Return when all ranks are about to exchange the same layer. No collective: short requests to the group's store.

    Raises ValueError on a rank that is about to exchange another one, and RankFailure on the others, at once.
    """
    what = f"the {direction} of {path or 'a SyncBatchNorm'}, {channels} channels"
    with agreed(what, group, "batchnorm") as agreement:
        assert agreement is not None, "a group of several ranks"
        agreement.same("what a SyncBatchNorm is about to exchange", what)

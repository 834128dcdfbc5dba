"""Which passes over memory a tensor takes: the compiled ones where they can, else torch's own operators."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..compat import is_plain_tensor
from . import fused, stock

logger = logging.getLogger(__name__)


def passes_for(x: Tensor, *others: Tensor | None) -> Any:
    """The module with the functions that `stock` describes, for this input and these tensors with it."""
    if x.device.type == "cuda":
        kernels = _kernels()
        if kernels is not None and _on_cuda(kernels, x, others):
            return kernels
        return stock
    return fused if fused.handles(x, *others) else stock


def _on_cuda(kernels: Any, x: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    return all(value is None or (value.dtype in kernels.KINDS and is_plain_tensor(value)) for value in (x, *others))


@functools.cache
def _kernels() -> Any:
    """The Triton kernels; None where there is no Triton, or no device for it."""
    if torch.cuda.get_device_capability()[0] < 8:  # Triton supports no older ones
        return None
    try:
        kernels = importlib.import_module(f"{__package__}.kernels")
    except ImportError:
        return None
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning("SyncBatchNorm compiles its kernels for this GPU as they are first used: seconds, kept on disk")
    return kernels

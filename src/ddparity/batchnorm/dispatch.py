"""Which passes over memory a tensor takes: the compiled ones where they can, else torch's own operators."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import cpu_kernels, reference

_COMPILED_S = 0.2  # a kernel that is on disk is loaded sooner

logger = logging.getLogger(__name__)


def passes_for(x: Tensor, *others: Tensor | None) -> Any:
    """The module with the functions that `reference` describes, for this input and these tensors with it."""
    if x.is_cuda:
        kernels = _kernels(x.device)
        return kernels if kernels is not None and kernels.handles(x, *others) else reference
    return cpu_kernels if cpu_kernels.handles(x, *others) else reference


@functools.cache
def _kernels(device: torch.device) -> Any:
    """The Triton kernels; None where there is no Triton, none for this card, or no C compiler, which it needs."""
    if torch.cuda.get_device_capability(device)[0] < 8 or importlib.util.find_spec("triton") is None:
        return None
    speaks = not dist.is_initialized() or dist.get_rank() == 0
    try:
        kernels = importlib.import_module(f"{__package__}.triton_kernels")
        start = time.monotonic()
        kernels.join(torch.zeros(1, 3, dtype=torch.float64, device=device), 1e-5)
    except Exception as error:  # Triton raises what its compiler, or its folder for compiled kernels, gives it
        if speaks:
            reason = str(error).partition("\n")[0]
            logger.warning("SyncBatchNorm uses torch's operators, as Triton does not work here: %s", reason)
        return None
    if speaks and time.monotonic() - start > _COMPILED_S:
        logger.warning("SyncBatchNorm compiles its kernels for this GPU as they are first used: seconds, kept on disk")
    return kernels

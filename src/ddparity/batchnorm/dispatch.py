"""Choose the kernels for an input: compiled ones if they can handle it, otherwise the reference kernels."""

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

_COMPILATION_S = 0.2  # loading a compiled kernel from disk takes less time

logger = logging.getLogger(__name__)


def kernels_for(x: Tensor, *others: Tensor | None) -> Any:
    """Return the module whose kernels handle this input and these other tensors; `reference` describes them."""
    if x.is_cuda:
        kernels = _triton_kernels(x.device)
        return kernels if kernels is not None and kernels.handles(x, *others) else reference
    return cpu_kernels if cpu_kernels.handles(x, *others) else reference


@functools.cache
def _triton_kernels(device: torch.device) -> Any:
    """Return the Triton kernels, or None if they do not work here.

    They need Triton, a GPU of compute capability 8 or higher, and a C compiler, which Triton uses.
    """
    if torch.cuda.get_device_capability(device)[0] < 8 or importlib.util.find_spec("triton") is None:
        return None
    logs = not dist.is_initialized() or dist.get_rank() == 0
    try:
        kernels = importlib.import_module(f"{__package__}.triton_kernels")
        start = time.monotonic()
        kernels.join(torch.zeros(1, 3, dtype=torch.float64, device=device), 1e-5)
    except Exception as error:  # for example of the C compiler, or of the folder for compiled kernels
        if logs:
            reason = str(error).partition("\n")[0]
            logger.warning("Triton does not work here, so SyncBatchNorm uses torch's own operators: %s", reason)
        return None
    if logs and time.monotonic() - start > _COMPILATION_S:
        logger.warning(
            "SyncBatchNorm compiles each kernel for this GPU at its first use. This takes seconds, once: Triton keeps "
            "the compiled kernels on disk"
        )
    return kernels

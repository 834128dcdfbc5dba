"""Batch norm over all ranks, and exact running statistics of plain batch norms.

Read `layer` first: it is the layer `SyncBatchNorm`. `convert` replaces the batch norms of a model and puts them back.
`function` is the forward and the backward for autograd, `custom_op` the same for torch.compile, and `moments` the mean
and variance alone. They call kernels: `dispatch` chooses between `reference` (torch's own operators), `cpu_kernels` (C)
and `triton_kernels` (CUDA); `layout` is about an input's memory layout. `running_statistics` updates plain batch norms
by what `norm_forwards` records.
"""

from .convert import convert_sync_batchnorm, revert_sync_batchnorm
from .layer import SyncBatchNorm, shared_layers, synchronises
from .moments import sync_moments
from .running_statistics import Room, RunningStatistics, equal_buffers

__all__ = [
    "Room",
    "RunningStatistics",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "equal_buffers",
    "revert_sync_batchnorm",
    "shared_layers",
    "sync_moments",
    "synchronises",
]

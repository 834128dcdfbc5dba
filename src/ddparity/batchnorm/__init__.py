"""Batch norm over all processes."""

from .convert import convert_sync_batchnorm, revert_sync_batchnorm
from .layer import SyncBatchNorm, shared_layers, synchronises
from .moments import sync_moments
from .running_statistics import Room, RunningStatistics, compiled_layers, equal_buffers

__all__ = [
    "Room",
    "RunningStatistics",
    "SyncBatchNorm",
    "compiled_layers",
    "convert_sync_batchnorm",
    "equal_buffers",
    "revert_sync_batchnorm",
    "shared_layers",
    "sync_moments",
    "synchronises",
]

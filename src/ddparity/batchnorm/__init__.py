"""Batch norm over all processes."""

from .convert import convert_sync_batchnorm, revert_sync_batchnorm
from .layer import SyncBatchNorm, shared_layers, synchronises
from .moments import sync_moments
from .running import Room, RunningStatistics, has_only_tracked_buffers

__all__ = [
    "Room",
    "RunningStatistics",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "has_only_tracked_buffers",
    "revert_sync_batchnorm",
    "shared_layers",
    "sync_moments",
    "synchronises",
]

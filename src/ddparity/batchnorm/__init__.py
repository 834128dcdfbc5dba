"""Batch norm over all processes."""

from .convert import convert_sync_batchnorm, revert_sync_batchnorm
from .layer import SyncBatchNorm, synchronises
from .moments import sync_moments

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm", "revert_sync_batchnorm", "sync_moments", "synchronises"]

"""Train on one process or on a thousand, and get the same model."""

from .accumulate import accumulate
from .batches import LoadedMicroBatch, Step
from .batchnorm import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm, sync_moments
from .checkpoint import Saving, load_checkpoint, save_checkpoint
from .console import setup_logging
from .errors import DDParityError, ParityError, RankFailure, RendezvousError, SampleError
from .fingerprint import fingerprint
from .gather import gather
from .launch import launch
from .loader import Loader
from .order import first
from .plan import BatchPlan, MicroBatch
from .predict import Predictor, predict, read_predictions
from .preemption import preemption
from .random_state import RandomState
from .replicate import replicate
from .sampling import ShardSampler
from .seeds import seed_everything
from .task import Task
from .verification import verify
from .world import World, world

__all__ = [
    "BatchPlan",
    "DDParityError",
    "LoadedMicroBatch",
    "Loader",
    "MicroBatch",
    "ParityError",
    "Predictor",
    "RandomState",
    "RankFailure",
    "RendezvousError",
    "SampleError",
    "Saving",
    "ShardSampler",
    "Step",
    "SyncBatchNorm",
    "Task",
    "World",
    "accumulate",
    "convert_sync_batchnorm",
    "fingerprint",
    "first",
    "gather",
    "launch",
    "load_checkpoint",
    "predict",
    "preemption",
    "read_predictions",
    "replicate",
    "revert_sync_batchnorm",
    "save_checkpoint",
    "seed_everything",
    "setup_logging",
    "sync_moments",
    "verify",
    "world",
]

"""Train a PyTorch model on one process or on many, and get the same model. All public names are listed here."""

from .auditing.run import audit
from .batchnorm import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm, sync_moments
from .checkpoint.checkpoint import Saving, load_checkpoint, save_checkpoint
from .checkpoint.fingerprint import fingerprint
from .comm.broadcast import broadcast
from .comm.gather import gather
from .comm.reduce import reduce
from .data.dataset import sample_seed
from .data.lengths import LengthPlan
from .data.loader import Loader, ShardSampler
from .data.orders import OrderPlan, WeightedPlan
from .data.plan import BatchPlan, MicroBatch, Plan
from .data.rng import RandomState, seed_everything
from .data.step import LoadedMicroBatch, Step
from .data.stream import StreamPlan
from .errors import DDParityError, ParityError, RankFailure, RendezvousError, SampleError, WrongArithmetic
from .gradients.accumulate import accumulate
from .gradients.batch_loss import backward_over_batch
from .gradients.mean_loss import backward
from .gradients.replicate import replicate
from .inference.metrics import Average
from .inference.predict import Predictor, predict
from .inference.reading import read_predictions
from .launcher import launch
from .parity.verify import verify
from .runtime.first import first
from .runtime.logging import setup_logging
from .runtime.preemption import preemption
from .runtime.world import World, join, world
from .task.task import Task

__version__ = "0.1.0"

__all__ = [
    "Average",
    "BatchPlan",
    "DDParityError",
    "LengthPlan",
    "LoadedMicroBatch",
    "Loader",
    "MicroBatch",
    "OrderPlan",
    "ParityError",
    "Plan",
    "Predictor",
    "RandomState",
    "RankFailure",
    "RendezvousError",
    "SampleError",
    "Saving",
    "ShardSampler",
    "Step",
    "StreamPlan",
    "SyncBatchNorm",
    "Task",
    "WeightedPlan",
    "World",
    "WrongArithmetic",
    "accumulate",
    "audit",
    "backward",
    "backward_over_batch",
    "broadcast",
    "convert_sync_batchnorm",
    "fingerprint",
    "first",
    "gather",
    "join",
    "launch",
    "load_checkpoint",
    "predict",
    "preemption",
    "read_predictions",
    "reduce",
    "replicate",
    "revert_sync_batchnorm",
    "sample_seed",
    "save_checkpoint",
    "seed_everything",
    "setup_logging",
    "sync_moments",
    "verify",
    "world",
]

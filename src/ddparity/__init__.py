"""Train a PyTorch model on one process or on many, and get the same model. All public names are listed here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .batchnorm import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm, sync_moments
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
from .runtime.first import first
from .runtime.logging import setup_logging
from .runtime.preemption import preemption
from .runtime.world import World, join, world
from .task.task import Task

if TYPE_CHECKING:  # the names of _LATER
    from .auditing.run import audit
    from .checkpoint.checkpoint import Saving, load_checkpoint, save_checkpoint
    from .checkpoint.fingerprint import fingerprint
    from .inference.metrics import Average
    from .inference.predict import Predictor, predict
    from .inference.reading import read_predictions
    from .launcher import launch
    from .parity.verify import verify

__version__ = "0.2.0"

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

# Imported when they are first used, so that `import ddparity` takes little longer than `import torch`.
_LATER = {
    "Average": "inference.metrics",
    "Predictor": "inference.predict",
    "Saving": "checkpoint.checkpoint",
    "audit": "auditing.run",
    "fingerprint": "checkpoint.fingerprint",
    "launch": "launcher",
    "load_checkpoint": "checkpoint.checkpoint",
    "predict": "inference.predict",
    "read_predictions": "inference.reading",
    "save_checkpoint": "checkpoint.checkpoint",
    "verify": "parity.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})

"""A script for tests of elasticity. It trains strictly from its checkpoint, prints what it does, and predicts.

python elastic_training.py CHECKPOINT [--epochs N] [--pace SECONDS] [--fails RANK]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import ddparity as dp
from ddparity.task.train import CheckpointOptions, predictor, train


class Data(torch.utils.data.Dataset):
    """48 samples in 3 classes, the same in each process."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(6, generator=torch.Generator().manual_seed(index)), index % 3


def make_task(epochs: int, pace_s: float = 0.0, prints: bool = False) -> dp.Task:
    """Return the task. `pace_s`: seconds of a micro-batch, 24 per epoch, so that faults happen during the training."""
    done = 0

    def loss(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        nonlocal done
        done += 1
        if prints:
            size = os.environ.get("WORLD_SIZE", "1")
            print(f"forward {done} of rank {os.environ.get('RANK', '0')} in {size}, pid {os.getpid()}\n", end="")
        time.sleep(pace_s)
        return F.cross_entropy(model(data[0]), data[1])

    return dp.Task(
        model=lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3)),
        dataset=lambda split: Data(),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        metric=lambda outputs, dataset: outputs.mean(),
        global_batch=12,
        micro_batch=2,
        epochs=epochs,
    )


def run(checkpoint: Path, epochs: int, pace_s: float = 0.0, prints: bool = False) -> tuple[str, str]:
    """Return the fingerprints of the trained model and of its predictions ("" on other ranks than 0)."""
    task = make_task(epochs, pace_s, prints)
    with dp.world(device="cpu"):
        result = train(task, checkpoint, reduction="strict", saving=CheckpointOptions(every=2, resume=True))
        model = task.model()
        dp.load_checkpoint(checkpoint, model=model)
        outputs = predictor(task, Data())(model, inputs=task.inputs)
    return result.fingerprint, "" if outputs is None else hashlib.sha256(outputs.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--fails", type=int, default=-1)
    given = parser.parse_args()
    trained, predicted = run(given.checkpoint, given.epochs, given.pace, prints=True)
    print(f"trained {trained} predicted {predicted or 'elsewhere'}\n", end="", flush=True)
    if os.environ.get("RANK") == str(given.fails):
        raise OSError("the disk is full")

"""The whole training of a Task, at one look."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..batchnorm import convert_sync_batchnorm, synchronises
from ..checkpoint.checkpoint import load_checkpoint, save_checkpoint
from ..checkpoint.fingerprint import fingerprint
from ..data.loader import Loader, check_even_shares
from ..data.rng import seed_everything
from ..data.step import LoadedMicroBatch, Step
from ..gradients.accumulate import accumulate
from ..gradients.replicate import Reduction, replicate
from ..inference.predict import Predictor
from ..inference.reading import read_predictions
from ..runtime.agreement import agreed
from ..runtime.first import first
from ..runtime.logging import Progress, progress, setup_logging, show_table
from ..runtime.preemption import preemption
from ..runtime.world import World, world
from .task import Task, check_task


@dataclass(frozen=True)
class Result:
    """How a training ended. `metrics`: of the held-out set. `train_s`: without evaluation, since it was resumed."""

    metrics: dict[str, float]
    total_s: float
    train_s: float
    samples_per_second: float
    fingerprint: str
    checkpoint: Path


@dataclass(frozen=True)
class Saves:
    """How a training saves and resumes.

    `every`: also write the checkpoint every so many steps. `keep`: of `save_checkpoint`. `resume`: go on from the
    checkpoint, or from the start where there is none yet.
    """

    every: int | None = None
    keep: int | None = None
    resume: bool = False


def train(
    task: Task,
    checkpoint: Path,
    num_workers: int = 0,
    title: str = "train",
    sync_batchnorm: bool = False,
    reduction: Reduction = "fast",
    threads: int | None = None,
    saving: Saves | None = None,
) -> Result:
    """Train a Task on the processes that a launcher started, or on this one. Every rank calls it.

    `sync_batchnorm`: its batch norms take their statistics over the micro-batches that run at the same time on all
    ranks, so the result depends on the number of processes.
    `reduction`: of `replicate`; "strict" gives the same fingerprint on any number of processes.
    `threads`: intra-op threads of each process, which the bits depend on; None: 1 for "strict", else torch's default.

    `saving`: when to write the checkpoint besides after each epoch, how many to keep, and whether to resume.

    On SIGUSR1 or SIGUSR2 it saves and raises SystemExit(128 + the signal), on all ranks after the same step.

    Shows one progress display, the exact metric of the held-out set after each epoch, and a table at the end.

    Collectives: those of `replicate`, `accumulate` and `predict`.
    """
    start = time.monotonic()
    if threads is None and reduction == "strict":
        threads = 1  # one process alone would take all cores
    if threads is not None:
        torch.set_num_threads(threads)
    with world() as here:
        setup_logging()
        check_task(task, here.world_size)
        with first("node"):
            train_set, test_set = task.dataset("train"), task.dataset("test")
        net, loader = build(task, here, train_set, num_workers, task.collate_fn, sync_batchnorm)
        model = replicate(net, reduction)
        optimizer = task.optimizer(model.parameters())
        predict = predictor(task, test_set, num_workers)

        saving = saving or Saves()
        states: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
        save = partial(save_checkpoint, checkpoint, keep=saving.keep, **states)
        resumed = _resume(task, checkpoint, model, loader, states) if saving.resume else None

        train_s, metrics, before = 0.0, None, _done(loader)
        bar = progress(task.epochs * len(loader), here.rank, title, start=before)
        with bar as display, preemption() as stopping:
            if resumed is not None:
                display.say(resumed)
            for epoch in loader.epochs(task.epochs):
                began = time.monotonic()
                _train_epoch(task, model, optimizer, loader, epoch, display, saving.every, save, stopping)
                train_s += time.monotonic() - began
                metrics = evaluate(task, model, predict)
                display.say(f"epoch {epoch + 1}/{task.epochs}: {shown(metrics)}")
                save()
        if metrics is None:  # nothing was left to train
            metrics = evaluate(task, model, predict)

        rate = (_done(loader)[1] - before[1]) / train_s if train_s else 0.0
        result = Result(metrics, time.monotonic() - start, train_s, rate, fingerprint(model), checkpoint.resolve())
        if here.rank == 0:
            _show(result, here.world_size, str(here.device.type))
        return result


def build(
    task: Task,
    here: World,
    train_set: Any,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    sync_batchnorm: bool = False,
) -> tuple[nn.Module, Loader]:
    """A Task's model, before `replicate`, and the loader of its training set; what fails on one rank fails on all."""
    with agreed("preparing the training") as agreement:
        if agreement is not None:
            agreement.same("the training set's length", len(train_set))
        if len(train_set) == 0:
            raise ValueError("the training set is empty: there is nothing to train on")
        seed_everything(task.seed)
        net = task.model().to(here.device)
        loader = Loader(train_set, task.plan(len(train_set)), num_workers, collate_fn)
        if sync_batchnorm and synchronises(convert_sync_batchnorm(net)):
            check_even_shares(loader.plan, here.world_size)
    return net, loader


def backward(
    model: nn.Module, step: Step, loss_of: Callable[[LoadedMicroBatch], torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """Leave a step's gradients in the parameters; gives this rank's weighted sum of losses, and of weights."""
    loss_sum, weight_sum = torch.zeros(()), 0.0
    for micro in accumulate(model, step):
        loss = loss_of(micro)
        (loss * micro.weight).backward()
        loss_sum, weight_sum = loss_sum + loss.detach() * micro.weight, weight_sum + micro.weight
    return loss_sum, weight_sum


def _resume(task: Task, checkpoint: Path, model: nn.Module, loader: Loader, states: dict[str, Any]) -> str:
    """Load the checkpoint, where there is one; says where the training goes on."""
    with agreed(f"resuming from {checkpoint}") as agreement:
        exists = checkpoint.is_file()
        if agreement is not None:
            agreement.same(f"whether there is a checkpoint at {checkpoint}", exists)
    if not exists:
        return f"no checkpoint at {checkpoint} yet: training from the start"
    _reduce_once(task, model, loader)
    load_checkpoint(checkpoint, **states)
    epoch, step = loader.position
    if (epoch, step) > (task.epochs, 0):
        raise ValueError(
            f"{checkpoint} has {epoch} epochs and {step} steps behind it, and the Task is of {task.epochs} epochs: "
            f"give the Task more epochs, or another checkpoint"
        )
    return f"resumed from {checkpoint}: {epoch} epochs and {step} of {len(loader)} steps are done"


def _reduce_once(task: Task, model: nn.Module, loader: Loader) -> None:
    """Have DDP's first reduction behind us, as the training that is resumed had: its gradients are dropped.

    DDP lays its buckets out anew after it, and from three ranks on the order of a sum, and so its rounding, depends on
    where in a bucket a gradient stands. What this changes in the model is replaced by what is loaded after it.
    """
    if not isinstance(model, DistributedDataParallel) or dist.get_world_size() < 3:
        return
    model.train()
    backward(model, next(loader.epoch(0, start_step=0)), lambda micro: task.loss(model, micro.data))
    model.zero_grad()


def _done(loader: Loader) -> tuple[int, int]:
    """Steps before a loader's position, of all epochs, and their samples."""
    plan, (epoch, step) = loader.plan, loader.position
    in_epoch = min(plan.num_samples, len(loader) * plan.global_batch)
    return epoch * len(loader) + step, epoch * in_epoch + min(step * plan.global_batch, in_epoch)


def _train_epoch(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    epoch: int,
    display: Progress,
    save_every: int | None,
    save: Callable[[], None],
    stopping: Callable[[], int],
) -> None:
    model.train()
    for step in loader.epoch(epoch):
        loss_sum, weight_sum = backward(model, step, lambda micro: task.loss(model, micro.data))
        optimizer.step()
        optimizer.zero_grad()
        done, samples = _done(loader)
        if display.due(done):  # reading the loss waits for the device
            mean = float(loss_sum) / weight_sum if weight_sum else math.nan
            display.update(done, samples, f"loss {mean:.4f}")
        number = stopping()
        if number or (save_every is not None and done % save_every == 0):
            save()
        if number:
            display.say(f"stopped by {signal.Signals(number).name} after step {done}: --resume goes on from there")
            raise SystemExit(128 + number)


def predictor(task: Task, dataset: Any, num_workers: int = 0) -> Predictor:
    return Predictor(dataset, task.micro_batch, seed=task.seed, num_workers=num_workers, collate_fn=task.collate_fn)


def evaluate(task: Task, model: nn.Module, predict: Predictor, show_progress: bool = False) -> dict[str, float]:
    """The metric of a data set, each sample counted once; on rank 0, empty on the others. Every rank calls it."""
    if task.sums is not None:
        value = predict(model, inputs=task.inputs, metric=task.sums, show_progress=show_progress)
        return {} if value is None else _named(value)
    if task.metric is None:
        return {}
    outputs = predict(model, inputs=task.inputs, show_progress=show_progress)
    return _metric_of(task, outputs, predict.dataset)


def _metric_of(task: Task, outputs: Any, dataset: Any) -> dict[str, float]:
    with agreed("the metric"):
        return {} if outputs is None or task.metric is None else _named(task.metric(outputs, dataset))


def _named(value: Any) -> dict[str, float]:
    return {name: float(one) for name, one in (value if isinstance(value, dict) else {"metric": value}).items()}


class Refused(ValueError):
    """A command was given what does not fit its Task; the message says all there is to say."""


@contextmanager
def _refusing() -> Iterator[None]:
    """Around what raises ValueError and TypeError for its arguments alone: the Task's own come as other errors."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Refused(": ".join([str(error), *getattr(error, "__notes__", [])])) from error


def predict_task(
    task: Task, checkpoint: Path, to: Path | None, metric: bool, num_workers: int = 0, key: str | None = None
) -> None:
    """Predict a Task's held-out set with a checkpoint's weights: outputs to a directory, the metric to the screen.

    Raises:
        Refused: the checkpoint is damaged or of another model; the directory holds something else.
    """
    with world() as here:
        setup_logging()
        with first("node"):
            test_set = task.dataset("test")
        model = task.model().to(here.device)
        with _refusing():
            load_checkpoint(checkpoint, model=model)
        predict, start = predictor(task, test_set, num_workers), time.monotonic()
        metrics: dict[str, float] = {}
        if to is None:
            metrics = evaluate(task, model, predict, show_progress=True)
        else:
            with _refusing():
                predict(model, to, inputs=task.inputs, key=key, show_progress=True)
        seconds = time.monotonic() - start
        if to is not None and metric:
            with agreed("reading the outputs"):
                outputs = read_predictions(to) if here.rank == 0 else None
            metrics = _metric_of(task, outputs, test_set)
        if here.rank == 0:
            show_table(
                "predictions",
                [
                    ("samples", f"{len(test_set):,}"),
                    *[(name, number(name, value)) for name, value in metrics.items()],
                    ("time", f"{seconds:.1f} s"),
                    ("samples a second", f"{len(test_set) / seconds:,.0f}"),
                    *([("outputs", str(to.resolve()))] if to is not None else []),
                ],
            )


def shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {number(name, value)}" for name, value in metrics.items()) or "no metric"


def number(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.6g}"


def _show(result: Result, world_size: int, device: str) -> None:
    show_table(
        f"trained on {world_size} {'process' if world_size == 1 else 'processes'} ({device})",
        [
            *[(name, number(name, value)) for name, value in result.metrics.items()],
            ("time", f"{result.total_s:.1f} s, of which training {result.train_s:.1f} s"),
            ("samples a second", f"{result.samples_per_second:,.0f}"),
            ("fingerprint", result.fingerprint),
            ("checkpoint", str(result.checkpoint)),
        ],
    )

"""Train a Task, evaluate it, and predict with a checkpoint of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
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
from ..data.fitting import check_even_shares, check_world_size
from ..data.loader import Loader
from ..data.plan import Plan
from ..data.rng import seed_everything
from ..data.step import LoadedMicroBatch, Step
from ..data.stream import StreamPlan
from ..gradients.accumulate import accumulate
from ..gradients.replica import Reduction
from ..gradients.replicate import replicate
from ..inference.predict import Predictor
from ..inference.reading import read_predictions
from ..runtime.agreement import agreed
from ..runtime.first import first
from ..runtime.logging import setup_logging
from ..runtime.preemption import preemption
from ..runtime.progress import Progress, progress, show_table
from ..runtime.world import World, world
from .curves import draw_curves
from .record import Record, beside
from .task import Task, check_task


@dataclass(frozen=True)
class Result:
    """The result of a training.

    `metrics`: of the held-out set, on rank 0; empty on other ranks. `total_s`: seconds of the whole call. `train_s`:
    seconds of the training steps of this call, without evaluation. `samples_per_second`: over `train_s`.
    """

    metrics: dict[str, float]
    total_s: float
    train_s: float
    samples_per_second: float
    fingerprint: str
    checkpoint: Path
    metrics_file: Path


@dataclass(frozen=True)
class CheckpointOptions:
    """When a training saves checkpoints, and whether it resumes.

    `every`: also write the checkpoint every N steps; None: only after each epoch. `keep`: of `save_checkpoint`.
    `resume`: continue from the checkpoint; if there is none, train from the start.
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
    saving: CheckpointOptions | None = None,
    tensorboard: bool = False,
    picture: Path | None = None,
) -> Result:
    """Train a Task on the processes that a launcher started, or on this one. Every rank calls it.

    It shows one progress display, the exact metric of the held-out set after each epoch, and a table at the end. After
    SIGUSR1 or SIGUSR2 it saves a checkpoint after the next step, the same step on all ranks. Beside the checkpoint it
    writes the loss of each step and the metrics to metrics.jsonl, see `Record`.

    Args:
        checkpoint: the file to write after each epoch.
        title: of the progress display.
        sync_batchnorm: batch norms take their statistics over the micro-batches that all ranks run at the same time, so
            the result depends on the number of processes.
        reduction: of `replicate`; "strict" gives the same fingerprint on any number of processes.
        threads: intra-op threads of each process; the bits of the result depend on it. None: 1 for "strict", else
            torch's default.
        saving: when else to write the checkpoint, how many to keep, and whether to resume.
        tensorboard: also write events for TensorBoard, to a folder beside the checkpoint.
        picture: draw the losses and metrics to this file at the end, or when a signal stops the training.

    Raises:
        SystemExit: with code 128 + the signal, after SIGUSR1 or SIGUSR2.

    Collectives: those of `replicate`, `accumulate` and `predict`, and two all-gathers a second for the record.
    """
    start = time.monotonic()
    if threads is None and reduction == "strict":
        threads = 1  # else one process would use all cores, and each of several processes fewer
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
        total = total_steps(task, loader)
        scheduler = scheduler_of(task, optimizer, total)
        predict = predictor(task, test_set, num_workers)

        saving = saving or CheckpointOptions()
        states: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
        states |= {"scheduler": scheduler} if scheduler is not None else {}
        resumed, recorded = _resume(task, checkpoint, model, loader, states) if saving.resume else (None, None)

        bar = progress(total, here.rank, title, start=(loader.steps_done, 0))
        with bar as display, preemption() as stopping:
            if resumed is not None:
                display.say(resumed)
            events = beside(checkpoint, "tensorboard") if tensorboard else None
            file, done = beside(checkpoint, "metrics.jsonl"), loader.steps_done
            record = Record(file, events, here.rank, done, display.say, recorded)

            def save() -> None:
                save_checkpoint(checkpoint, keep=saving.keep, **states, metrics=record.state)

            draw = partial(_draw, file, picture, title, display) if here.rank == 0 and picture is not None else None
            run = _Run(
                task, model, optimizer, scheduler, loader, predict, display, record, saving.every, save, stopping, draw
            )
            with closing(record):
                for epoch in loader.epochs(task.epochs):
                    run.train_epoch(epoch)
                    run.evaluate(epoch, f"epoch {epoch + 1}/{task.epochs}")
                    save()
            if draw is not None:
                draw()
        if run.metrics is None:  # the checkpoint was the end of the training
            run.metrics = evaluate(task, model, predict)

        rate = run.samples / run.train_s if run.train_s else 0.0
        seconds = time.monotonic() - start
        result = Result(
            run.metrics, seconds, run.train_s, rate, fingerprint(model), checkpoint.resolve(), file.resolve()
        )
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
    wrap: Callable[[Any], Any] | None = None,
) -> tuple[nn.Module, Loader]:
    """Return a Task's model, before `replicate`, and the loader of its training set. Every rank calls it.

    `wrap(train_set)` is the data set that the loader gets.

    Raises:
        RankFailure: it failed on another rank. On the rank that failed, the error is its own.
        TypeError: the Task's plan is one for streams.
        ValueError: the training set is empty, or the ranks cannot share a step evenly for synchronised batch norms, or
            there are more ranks than micro-batches in a step.

    Collectives: one agreement, and a comparison of the training set's length.
    """
    with agreed("preparing the training") as agreement:
        if agreement is not None:
            agreement.same("the training set's length", len(train_set))
        if len(train_set) == 0:
            raise ValueError('the training set is empty: let dataset("train") return at least one sample')
        seed_everything(task.seed)
        net = task.model().to(here.device)
        workers_stay = num_workers > 0  # a Task does not change its data set between epochs
        plan = task.plan(train_set)
        if isinstance(plan, StreamPlan):
            raise TypeError(
                "the Task's plan() returned a StreamPlan, but a Task has map-style data: write the loop over a stream "
                "with Loader and accumulate()"
            )
        loaded = train_set if wrap is None else wrap(train_set)
        loader = Loader(loaded, plan, num_workers, collate_fn, persistent_workers=workers_stay)
        check_world_size(plan, here.world_size)
        if sync_batchnorm and synchronises(convert_sync_batchnorm(net)):
            check_even_shares(loader.plan, here.world_size)
    return net, loader


def backward(
    model: nn.Module,
    step: Step,
    loss_of: Callable[[LoadedMicroBatch], torch.Tensor],
    count: Callable[[Any], float] | None = None,
) -> None:
    """Compute the gradients of a step. `loss_of(micro)` returns the mean loss of a micro-batch.

    Collectives: those of `accumulate`.
    """
    for micro in accumulate(model, step, count):
        (loss_of(micro) * micro.weight).backward()


def update(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Take the step of an optimizer with the gradients of `backward`, and of the scheduler, if there is one."""
    if task.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
    optimizer.step()
    if scheduler is not None:
        scheduler.step()


def autocast(task: Task, model: nn.Module) -> AbstractContextManager[Any]:
    """Return the context of the Task's forwards."""
    if task.autocast is None:
        return nullcontext()
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return torch.autocast(device, dtype=task.autocast)


def loss_of(task: Task, model: nn.Module, data: Any) -> torch.Tensor:
    """Return the Task's loss of the data of a micro-batch."""
    with autocast(task, model):
        return task.loss(model, data)


def total_steps(task: Task, loader: Loader) -> int:
    """Return the number of steps of the whole training."""
    return sum(_plan_of(loader).steps_in(epoch) for epoch in range(task.epochs))


def scheduler_of(task: Task, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Return the Task's scheduler for a training of so many steps; None if it has none.

    Raises:
        TypeError: it is none of torch's, or one that needs a metric.
    """
    if task.scheduler is None:
        return None
    made = task.scheduler(optimizer, steps)
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "the Task's scheduler is a ReduceLROnPlateau, which needs a metric in each step: return one that steps "
            "without, or write the loop with accumulate()"
        )
    if not callable(getattr(made, "step", None)):
        raise TypeError(f"the Task's scheduler() returned a {type(made).__name__}: return a scheduler of torch")
    return made


def _plan_of(loader: Loader) -> Plan:
    assert not isinstance(loader.plan, StreamPlan), "build() refuses streams"
    return loader.plan


def _resume(
    task: Task, checkpoint: Path, model: nn.Module, loader: Loader, states: dict[str, Any]
) -> tuple[str, dict[str, Any] | None]:
    """Load the checkpoint if there is one.

    Return a line that says where the training continues, and the state of the record of metrics; None: there is none.
    """
    with agreed(f"resuming from {checkpoint}") as agreement:
        exists = checkpoint.is_file()
        if agreement is not None:
            agreement.same(f"whether there is a checkpoint at {checkpoint}", exists)
    if not exists:
        return f"no checkpoint at {checkpoint} yet: training from the start", None
    _reduce_once(task, model, loader)  # before the load, which replaces what this changes in the model
    recorded = load_checkpoint(checkpoint, **states).get("metrics")
    epoch, step = loader.position
    if (epoch, step) > (task.epochs, 0):
        raise ValueError(
            f"{checkpoint} is a training of {epoch} epochs and {step} steps, but the Task has only {task.epochs} "
            f"epochs: give the Task more epochs, or use another checkpoint"
        )
    steps = _plan_of(loader).steps_in(epoch)
    return f"resumed from {checkpoint}: {epoch} epochs and {step} of {steps} steps are done", recorded


def _reduce_once(task: Task, model: nn.Module, loader: Loader) -> None:
    """Do one reduction of gradients and drop them, so that gradients are cut as in the training that is resumed.

    They are cut in the order of the first backward, by DDP or by `EarlyPlan`. From three ranks on, the order of a
    sum, and so its rounding, depends on the position of a gradient in its part.
    """
    if not isinstance(model, DistributedDataParallel) or dist.get_world_size() < 3:
        return
    model.train()
    backward(model, next(loader.epoch(0, start_step=0)), lambda micro: loss_of(task, model, micro.data), task.count)
    model.zero_grad()


@dataclass
class _Run:
    """The steps of a training. `metrics`: of the last evaluation. `train_s`, `samples`: of the steps of this call."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: Loader
    predict: Predictor
    display: Progress
    record: Record
    save_every: int | None
    save: Callable[[], None]
    stopping: Callable[[], int]
    draw: Callable[[], None] | None
    metrics: dict[str, float] | None = None
    train_s: float = 0.0
    samples: int = 0

    def train_epoch(self, epoch: int) -> None:
        """Train on the steps of an epoch from the loader's position on."""
        task, model, plan = self.task, self.model, _plan_of(self.loader)
        model.train()
        began = time.monotonic()
        for step in self.loader.epoch(epoch):
            backward(model, step, self._recorded_loss, task.count)
            rate = self.optimizer.param_groups[0].get("lr")
            update(task, model, self.optimizer, self.scheduler)
            self.optimizer.zero_grad()
            done, self.samples = self.loader.steps_done, self.samples + sum(plan.sizes(epoch, step.number))
            self.record.end_step(epoch, rate)
            if self.display.due(done):
                loss = self.record.loss
                self.display.update(done, self.samples, f"loss {loss:.4f}" if loss is not None else "")
            is_last = step.number + 1 == plan.steps_in(epoch)  # an evaluation follows anyway
            if task.evaluate_every is not None and done % task.evaluate_every == 0 and not is_last:
                self.train_s += time.monotonic() - began
                self.evaluate(epoch, f"step {done}")
                began = time.monotonic()
            signal_number = self.stopping()
            if signal_number or (self.save_every is not None and done % self.save_every == 0):
                self.record.exchange()  # a training that continues here has the lines before
                self.save()
            if signal_number:
                if self.draw is not None:
                    self.draw()
                name = signal.Signals(signal_number).name
                self.display.say(f"stopped by {name} after step {done}: continue with --resume")
                raise SystemExit(128 + signal_number)
        self.train_s += time.monotonic() - began

    def _recorded_loss(self, micro: LoadedMicroBatch) -> torch.Tensor:
        loss = loss_of(self.task, self.model, micro.data)
        self.record.take(loss, micro.share)
        return loss

    def evaluate(self, epoch: int, when: str) -> None:
        self.metrics = evaluate(self.task, self.model, self.predict)
        self.record.metrics(epoch, self.metrics)
        self.display.say(f"{when}: {_format_metrics(self.metrics)}")


def predictor(task: Task, dataset: Any, num_workers: int = 0) -> Predictor:
    """Return a `Predictor` for a data set, with the Task's micro-batch size, seed and collate function."""
    return Predictor(dataset, task.micro_batch, seed=task.seed, num_workers=num_workers, collate_fn=task.collate_fn)


def evaluate(task: Task, model: nn.Module, predict: Predictor, show_progress: bool = False) -> dict[str, float]:
    """Return the metric of the predictor's data set, each sample counted once. Every rank calls it.

    The result is empty on ranks other than 0, and if the Task has no metric.
    """
    if task.sums is not None:
        with autocast(task, model):
            value = predict(model, inputs=task.inputs, metric=task.sums, show_progress=show_progress)
        return {} if value is None else _by_name(value)
    if task.metric is None:
        return {}
    with autocast(task, model):
        outputs = predict(model, inputs=task.inputs, show_progress=show_progress)
    return _metric_of(task, outputs, predict.dataset)


def _metric_of(task: Task, outputs: Any, dataset: Any) -> dict[str, float]:
    with agreed("the metric"):
        return {} if outputs is None or task.metric is None else _by_name(task.metric(outputs, dataset))


def _by_name(value: Any) -> dict[str, float]:
    return {name: float(one) for name, one in (value if isinstance(value, dict) else {"metric": value}).items()}


class InvalidInput(ValueError):
    """A checkpoint or directory that the user gave does not fit the Task. A command shows the message alone."""


@contextmanager
def _invalid_input() -> Iterator[None]:
    """Turn ValueError and TypeError into InvalidInput.

    Use it only around calls that raise these errors for their arguments, and other errors for what the Task's own code
    raises.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InvalidInput(": ".join([str(error), *getattr(error, "__notes__", [])])) from error


def predict_task(
    task: Task, checkpoint: Path, to: Path | None, metric: bool, num_workers: int = 0, key: str | None = None
) -> None:
    """Predict a Task's held-out set with the weights of a checkpoint. Every rank calls it.

    Args:
        to: the directory for the outputs, a Parquet data set; None: outputs are not written.
        metric: show the metric also if `to` is given. Without `to` it is always shown.
        key: see `predict`.

    Raises:
        InvalidInput: the checkpoint is damaged or of another model, or the directory has other files in it.
    """
    with world() as here:
        setup_logging()
        with first("node"):
            test_set = task.dataset("test")
        model = task.model().to(here.device)
        with _invalid_input():
            load_checkpoint(checkpoint, model=model)
        predict, start = predictor(task, test_set, num_workers), time.monotonic()
        metrics: dict[str, float] = {}
        if to is None:
            metrics = evaluate(task, model, predict, show_progress=True)
        else:
            with _invalid_input(), autocast(task, model):
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
                    *[(name, _format_metric(name, value)) for name, value in metrics.items()],
                    ("time", f"{seconds:.1f} s"),
                    ("samples a second", f"{len(test_set) / seconds:,.0f}"),
                    *([("outputs", str(to.resolve()))] if to is not None else []),
                ],
            )


def _draw(metrics: Path, picture: Path, title: str, display: Progress) -> None:
    """Draw the record. A failure is shown, and is none of the training."""
    try:
        draw_curves(metrics, picture, title)
    except OSError as error:
        display.say(f"the plot is not written: {error}")


def _format_metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {_format_metric(name, value)}" for name, value in metrics.items()) or "no metric"


def _format_metric(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.6g}"


def _show(result: Result, world_size: int, device: str) -> None:
    show_table(
        f"trained on {world_size} {'process' if world_size == 1 else 'processes'} ({device})",
        [
            *[(name, _format_metric(name, value)) for name, value in result.metrics.items()],
            ("time", f"{result.total_s:.1f} s, of which training {result.train_s:.1f} s"),
            ("samples a second", f"{result.samples_per_second:,.0f}"),
            ("fingerprint", result.fingerprint),
            ("checkpoint", str(result.checkpoint)),
            ("losses and metrics", str(result.metrics_file)),
        ],
    )

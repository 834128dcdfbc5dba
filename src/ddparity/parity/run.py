"""Run a Task's training steps as `ddparity train` does, and record them."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..batchnorm import SyncBatchNorm
from ..checkpoint.fingerprint import fingerprint
from ..compat import unwrapped
from ..data.dataset import sized_length
from ..data.fitting import check_even_shares
from ..data.loader import Loader
from ..data.plan import BatchPlan
from ..data.sizes import share
from ..data.step import LoadedMicroBatch, Step
from ..gradients.replica import Reduction
from ..gradients.replicate import replicate
from ..runtime.first import first
from ..runtime.logging import setup_logging
from ..runtime.world import world
from ..task.task import Task, check_task, load_target
from ..task.train import backward, build, evaluate, loss_of, predictor, scheduler_of, total_steps, update
from .functions import Function, options_of, run_function
from .noise import PermutedSum
from .notes import MicroNote, RankNotes, checked_steps, write_notes
from .recorder import Recorder, TaggedCollate, digest, tagged, units_of

# The elastic agent sets these variables in each process, and those that begin with TORCHELASTIC_.
_LAUNCHER_VARIABLES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}


@dataclass(frozen=True)
class Settings:
    """What all runs of one comparison share.

    `task`: a Task, a function that trains, or the name of one. `folder`: where runs write files.
    """

    task: Task | Function | str
    steps: int
    reduction: Reduction
    sync_batchnorm: bool
    num_workers: int
    threads: int
    folder: Path


@dataclass(frozen=True)
class RunPlan:
    """One run.

    `reference`: the name of the run whose weights this run compares its own with. If it is this run's own name, the run
    is a reference and keeps its weights. None: weights are not compared.
    `joined`: N joins the micro-batches that N ranks would run at the same time into one batch.
    `permutation`: the seed of the order in which gradients are summed; None: the order of the micro-batches.
    `scale`: see `PermutedSum`.
    """

    name: str
    reference: str | None = None
    joined: int = 1
    permutation: int | None = None
    scale: int = 1


def run_together(settings: Settings, plan: RunPlan, variables: dict[str, str]) -> None:
    """Run one rank of a run on several processes. `variables`: the environment of the process that compares."""
    _prepare_process(variables)
    run(settings, plan)


def run_alone(settings: Settings, plans: Sequence[RunPlan], variables: dict[str, str]) -> None:
    """Run the one-process run number RANK of `plans`; the runs do not communicate with each other."""
    number = int(os.environ["RANK"])
    for name in list(os.environ):
        if _is_launcher_variable(name) and name != "TORCHELASTIC_ERROR_FILE":  # where an exception is told
            del os.environ[name]
    _prepare_process(variables)
    device = f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else None
    run(settings, plans[number], device)


def _is_launcher_variable(name: str) -> bool:
    return name in _LAUNCHER_VARIABLES or name.startswith("TORCHELASTIC_")


def _prepare_process(variables: dict[str, str]) -> None:
    # The fork server started earlier, so its own variables may be old.
    os.environ.update({name: value for name, value in variables.items() if not _is_launcher_variable(name)})
    # This process was forked from the fork server, but its data-loader workers must start as they do in a script.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    # Standard output is for the comparison alone, so what a Task prints goes to standard error.
    sys.stdout.flush()
    os.dup2(2, 1)


def run(settings: Settings, plan: RunPlan, device: str | None = None) -> None:
    """Run the training steps on this rank, and write the rank's notes. Every rank of the run calls it."""
    torch.set_num_threads(settings.threads)
    task = load_target(settings.task) if isinstance(settings.task, str) else settings.task
    if not isinstance(task, Task):
        options = options_of(task, settings.steps, settings.reduction)
        run_function(task, options, settings.folder, plan.name, plan.reference, plan.permutation, device)
        return
    with world(device=device) as here:
        setup_logging(logging.WARNING)  # the process that compares the runs logs their progress
        check_task(task, here.world_size)
        with first("node"):
            train_set = task.dataset("train")
        sized_length(train_set, "verify")
        collate_fn = TaggedCollate(task.collate_fn)
        net, loader = build(task, here, train_set, settings.num_workers, collate_fn, settings.sync_batchnorm, tagged)
        built = {name: digest(value) for name, value in (*net.named_parameters(), *net.named_buffers())}
        if _has_sync_batchnorm(net):
            check_even_shares(loader.plan, max(plan.joined, here.world_size))
        model = replicate(net, settings.reduction)
        net = unwrapped(model)
        optimizer = task.optimizer(model.parameters())
        scheduler = scheduler_of(task, optimizer, max(total_steps(task, loader), settings.steps))
        predict = None
        if task.evaluate_every is not None:  # what an evaluation changes in the training is seen
            with first("node"):
                predict = predictor(task, task.dataset("test"), settings.num_workers)
        notes = RankNotes(here.rank, here.device.type, _has_sync_batchnorm(net), built, units_of(net))
        own, reference = _weight_folders(settings.folder, plan) if here.rank == 0 else (None, None)
        permuted = None
        if plan.permutation is not None:
            permuted = PermutedSum(net, torch.Generator().manual_seed(plan.permutation), plan.scale)
        checked = set(checked_steps(settings.steps))
        model.train()
        with closing(Recorder(notes, net, optimizer, own, reference)) as recorder:
            for number, step in enumerate(_steps(loader, settings.steps), 1):
                recorder.begin_step(number, number in checked)
                _backward(task, model, _joined(step, plan.joined), recorder, plan.joined > 1, permuted)
                recorder.record_gradients()
                update(task, model, optimizer, scheduler)
                recorder.record_update()
                optimizer.zero_grad()
                if predict is not None and task.evaluate_every and number % task.evaluate_every == 0:
                    with recorder.pausing():
                        evaluate(task, model, predict)
        notes.fingerprint = fingerprint(model)
        write_notes(notes, settings.folder / plan.name)


def _weight_folders(folder: Path, plan: RunPlan) -> tuple[Path | None, Path | None]:
    """Return the folder to keep a run's weights in, and that of the weights to compare with."""
    if plan.reference is None:
        return None, None
    if plan.reference == plan.name:
        return folder / plan.name, None
    return None, folder / plan.reference


def _has_sync_batchnorm(net: nn.Module) -> bool:
    """Return whether a model has batch norms that are synchronised if there are several ranks."""
    return any(isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm)) for module in net.modules())


def _steps(loader: Loader, count: int) -> Iterator[Step]:
    """Return the first `count` steps, from as many epochs as they need."""
    if isinstance(plan := loader.plan, BatchPlan) and len(loader) == 0:
        raise ValueError(
            f"the training set of {plan.num_samples} samples has no full step of {plan.global_batch}, "
            f"and drop_last=True drops the short one: give more samples, or drop_last=False"
        )
    return loader.steps(count)


def _backward(
    task: Task, model: nn.Module, step: Step, recorder: Recorder, joined: bool, permuted: PermutedSum | None
) -> None:
    """Compute a step's gradients with the training's own `backward`, and record each forward."""

    taken = 0

    def recorded(micro: LoadedMicroBatch) -> torch.Tensor:
        nonlocal taken
        if permuted is not None and taken > 0:
            permuted.take(taken - 1)  # the backward of the previous micro-batch has ended
        taken += 1
        parts = micro.data if joined else [(micro.index, micro.share, *micro.data)]
        notes = [MicroNote(index, samples, digest(data), weight=weight) for index, weight, samples, data in parts]
        data = parts[0][-1]
        if joined:
            order = range(len(parts)) if permuted is None else permuted.order(len(parts))
            data = _concatenated([parts[number][-1] for number in order])
        loss = recorder.record_forward(notes, lambda: loss_of(task, model, data))
        return loss if permuted is None else loss * permuted.scale

    if permuted is not None:
        permuted.begin(len(step))
    backward(model, step, recorded, _counted(task, joined))
    if permuted is not None:
        permuted.take(taken - 1)
        permuted.finish()


def _counted(task: Task, joined: bool) -> Callable[[Any], float] | None:
    """Return the Task's count of units, for what `TaggedCollate` or `_joined` made of its data."""
    count = task.count
    if count is None:
        return None
    if joined:
        return lambda parts: math.fsum(float(count(part[-1])) for part in parts)
    return lambda tagged: count(tagged[1])


def _joined(step: Step, world_size: int) -> Step:
    """Return a step of one process whose micro-batches are joined as `world_size` ranks run them at the same time.

    The data of a joined micro-batch is a list of (index, weight, samples, data), one for each of its micro-batches.
    """
    if world_size == 1:
        return step
    shares = [share(len(step), rank, world_size) for rank in range(world_size)]
    together = [[own[position] for own in shares] for position in range(len(shares[0]))]
    numbers = iter(range(len(together)))

    def load_next() -> LoadedMicroBatch:
        number = next(numbers)
        parts = [step.load(index) for index in together[number]]
        data = [(part.index, part.weight, *part.data) for part in parts]
        return LoadedMicroBatch(data, math.fsum(part.weight for part in parts), number, parts[0].seed)

    return Step(step.epoch, step.number, len(together), load_next, (len(together),), step.seed)


def _concatenated(batches: list[Any]) -> Any:
    """Return batches of one structure as one batch: tensors are concatenated along their first dimension."""
    batch = batches[0]
    if isinstance(batch, torch.Tensor) and batch.ndim:
        return torch.cat(batches)
    if isinstance(batch, Mapping):
        return {key: _concatenated([other[key] for other in batches]) for key in batch}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_concatenated(list(values)) for values in zip(*batches, strict=True)))
    if isinstance(batch, (list, tuple)) and all(isinstance(item, str) for item in batch):
        return type(batch)(item for other in batches for item in other)
    if isinstance(batch, (list, tuple)):
        return type(batch)(_concatenated(list(values)) for values in zip(*batches, strict=True))
    if all(digest(other) == digest(batch) for other in batches):
        return batch
    raise TypeError(
        f"the micro-batches contain a {type(batch).__name__}, but verify compares synchronised batch norms with one "
        f"process that joins micro-batches into one batch, and only tensors can be joined: let collate_fn return "
        f"tensors, in lists, tuples or dicts"
    )

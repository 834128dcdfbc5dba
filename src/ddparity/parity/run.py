"""One run of a Task, as `ddparity train` would do it, with notes taken on the way."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..batchnorm import SyncBatchNorm
from ..checkpoint.fingerprint import fingerprint
from ..compat import unwrapped
from ..data.dataset import sized_length
from ..data.loader import Loader, check_even_shares
from ..data.plan import share
from ..data.step import LoadedMicroBatch, Step
from ..gradients.replicate import Reduction, replicate
from ..runtime.first import first
from ..runtime.logging import setup_logging
from ..runtime.world import World, world
from ..task.task import Task, check_task, load_task
from ..task.train import backward, build
from .digests import difference, digest, streams_digest
from .noise import PermutedSum
from .notes import MicroNote, Notes, StepNote, TaggedCollate, checked_steps, tagged, write_notes

# What the elastic agent sets in a process.
_LAUNCHERS = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}


@dataclass(frozen=True)
class Settings:
    """What all runs have in common. `task`: a Task, or the name of one."""

    task: Task | str
    steps: int
    reduction: Reduction
    sync_batchnorm: bool
    num_workers: int
    threads: int
    folder: Path


@dataclass(frozen=True)
class RunPlan:
    """One run. `reference`: whose weights its own are compared with; its own name: it is one, and keeps them; None: its
    weights are not compared.

    `joined`: micro-batches that so many ranks would run at the same time are one batch. `permutation`: keys the order
    of its sums; None: as they come.
    """

    name: str
    reference: str | None = None
    joined: int = 1
    permutation: int | None = None


def run_together(settings: Settings, plan: RunPlan, variables: dict[str, str]) -> None:
    """One rank of a run on several processes."""
    _prepare_process(variables)
    run(settings, plan)


def run_alone(settings: Settings, plans: Sequence[RunPlan], variables: dict[str, str]) -> None:
    """Run number RANK of several one-process runs, which have nothing to do with each other."""
    number = int(os.environ["RANK"])
    for name in list(os.environ):
        if _is_launchers(name):
            del os.environ[name]
    _prepare_process(variables)
    device = f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else None
    run(settings, plans[number], device)


def _is_launchers(name: str) -> bool:
    return name in _LAUNCHERS or name.startswith("TORCHELASTIC_")


def _prepare_process(variables: dict[str, str]) -> None:
    # Those that the fork server has are of its own start.
    os.environ.update({name: value for name, value in variables.items() if not _is_launchers(name)})
    # Data-loader workers start as in a script, not as this process did.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    # What a Task prints must not mix with the comparison on standard output.
    sys.stdout.flush()
    os.dup2(2, 1)


def run(settings: Settings, plan: RunPlan, device: str | None = None) -> None:
    torch.set_num_threads(settings.threads)
    task = load_task(settings.task) if isinstance(settings.task, str) else settings.task
    with world(device=device) as here, ExitStack() as stack:
        setup_logging(logging.WARNING)  # what to say of the runs, the process that compares them says
        check_task(task, here.world_size)
        with first("node"):
            train_set = task.dataset("train")
        sized_length(train_set, "verify")
        net, loader = build(
            task, here, tagged(train_set), settings.num_workers, TaggedCollate(task.collate_fn), settings.sync_batchnorm
        )
        built = {name: digest(value) for name, value in (*net.named_parameters(), *net.named_buffers())}
        if _synchronised(net):
            check_even_shares(loader.plan, max(plan.joined, here.world_size))
        model = replicate(net, settings.reduction)
        optimizer = task.optimizer(model.parameters())
        recorder = _Recorder(settings, plan, task, here, model, optimizer, built)
        stack.callback(recorder.close)
        checked = set(checked_steps(settings.steps))
        model.train()
        for number, step in enumerate(_steps(loader, settings.steps), 1):
            recorder.begin(number, number in checked, step)
            backward(model, _joined(step, plan.joined), recorder.loss)
            recorder.gradients()
            optimizer.step()
            recorder.update()
            optimizer.zero_grad()
        recorder.notes.fingerprint = fingerprint(model)
        write_notes(recorder.notes, settings.folder / plan.name)


def _steps(loader: Loader, count: int) -> Iterator[Step]:
    """The first `count` steps, over as many epochs as it takes."""
    if len(loader) == 0:
        raise ValueError("the plan has no step: drop_last leaves none of this small training set")
    epoch = done = 0
    while done < count:
        for step in loader.epoch(epoch):
            yield step
            done += 1
            if done == count:
                return
        epoch += 1


def _joined(step: Step, world_size: int) -> Step:
    """The step of one process, with the micro-batches that `world_size` ranks run at the same time as one.

    Its data is the list of their indices, weights, samples and data.
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
    """Batches of one structure as one batch: tensors are joined along their first dimension."""
    first_one = batches[0]
    if isinstance(first_one, torch.Tensor) and first_one.ndim:
        return torch.cat(batches)
    if isinstance(first_one, Mapping):
        return {key: _concatenated([batch[key] for batch in batches]) for key in first_one}
    if isinstance(first_one, tuple) and hasattr(first_one, "_fields"):
        return type(first_one)(*(_concatenated(list(values)) for values in zip(*batches, strict=True)))
    if isinstance(first_one, (list, tuple)) and all(isinstance(item, str) for item in first_one):
        return type(first_one)(item for batch in batches for item in batch)
    if isinstance(first_one, (list, tuple)):
        return type(first_one)(_concatenated(list(values)) for values in zip(*batches, strict=True))
    if all(digest(batch) == digest(first_one) for batch in batches):
        return first_one
    raise TypeError(
        f"verify cannot join micro-batches with a {type(first_one).__name__} to the one batch that synchronised batch "
        f"norms are compared with: let collate_fn give tensors, in lists, tuples or dicts"
    )


def _synchronised(net: nn.Module) -> bool:
    """Whether a model has batch norms that would be synchronised, also where there is nobody else."""
    return any(isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm)) for module in net.modules())


def _unit(value: torch.Tensor) -> float:
    """One unit in the last place, relative; 0 for integers, which are equal or not."""
    return torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0


def _norm(gradient: torch.Tensor) -> float:
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    exact = torch.complex128 if dense.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(dense, dtype=exact))


class _Recorder:
    """Takes the notes of one rank."""

    def __init__(
        self,
        settings: Settings,
        plan: RunPlan,
        task: Task,
        here: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        built: dict[str, str],
    ) -> None:
        self._task = task
        self._plan = plan
        self._here = here
        self._model = model
        self._net = unwrapped(model)
        self._optimizer = optimizer
        self._folder = settings.folder
        self._permuted = None
        if plan.permutation is not None:
            self._permuted = PermutedSum(self._net, torch.Generator().manual_seed(plan.permutation))
        parameters = {name: _unit(value) for name, value in self._net.named_parameters()}
        units = {f"weights/{name}": unit for name, unit in parameters.items()}
        units |= {f"gradient/{name}": unit for name, unit in parameters.items()}
        units |= {f"buffers/{name}": _unit(value) for name, value in self._net.named_buffers()}
        units["gradient norm"] = max(parameters.values(), default=0.0)
        self.notes = Notes(here.rank, here.device.type, _synchronised(self._net), built, units)
        self._note, self._taken = StepNote(0), 0
        self._outputs: list[str] = []
        self._hook = self._net.register_forward_hook(self._saw_output)

    def close(self) -> None:
        self._hook.remove()

    def _saw_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._note.checked:
            self._outputs.append(digest(output))

    def begin(self, number: int, checked: bool, step: Step) -> None:
        self._note = StepNote(number, checked=checked)
        self.notes.steps.append(self._note)
        self._taken = 0
        if self._permuted is not None:
            self._permuted.begin(len(step) // self._plan.joined)

    def loss(self, micro: LoadedMicroBatch) -> torch.Tensor:
        """The Task's loss of a micro-batch, noted."""
        self._take()
        joined = self._plan.joined > 1
        parts = micro.data if joined else [(micro.index, micro.weight, *micro.data)]
        notes = [MicroNote(index, samples, digest(data), weight=weight) for index, weight, samples, data in parts]
        data = parts[0][-1]
        if joined:
            order = range(len(parts)) if self._permuted is None else self._permuted.order(len(parts))
            data = _concatenated([parts[number][-1] for number in order])
        self._outputs = []
        checked = self._note.checked
        before = streams_digest() if checked else ""
        loss = self._task.loss(self._model, data)
        after = streams_digest() if checked else ""
        forward = digest([self._outputs, loss]) if checked else ""
        self.notes.units["loss"] = torch.finfo(loss.dtype).eps
        for note in notes:
            note.before, note.after, note.forward, note.loss = before, after, forward, float(loss.detach())
        self._note.micros += notes
        return loss

    def _take(self) -> None:
        """After the backward of the micro-batch before."""
        if self._permuted is not None and self._note.micros:
            self._permuted.take(self._taken)
            self._taken += 1

    def gradients(self) -> None:
        """After a step's gradients are complete."""
        self._take()
        if self._permuted is not None:
            self._permuted.finish()
        if not self._note.checked:
            return
        for name, parameter in self._net.named_parameters():
            if parameter.grad is not None:
                self._note.gradients[name] = digest(parameter.grad)
                self._note.norms[name] = _norm(parameter.grad)

    def update(self) -> None:
        """After the optimizer's step."""
        if not self._note.checked:
            return
        parameters: dict[str, torch.Tensor] = dict(self._net.named_parameters())
        buffers = dict(self._net.named_buffers())
        self._note.weights = {name: digest(value) for name, value in parameters.items()}
        self._note.buffers = {name: digest(value) for name, value in buffers.items()}
        self._note.optimizer = digest(self._optimizer.state_dict())
        if self._here.rank or self._plan.reference is None:
            return
        values = {f"weights/{name}": value for name, value in parameters.items()}
        values |= {f"buffers/{name}": value for name, value in buffers.items()}
        name = f"step{self._note.step}.safetensors"
        if self._plan.reference == self._plan.name:
            folder = self._folder / self._plan.name
            folder.mkdir(parents=True, exist_ok=True)
            save_file({key: value.detach().cpu().clone().contiguous() for key, value in values.items()}, folder / name)
            return
        with safe_open(self._folder / self._plan.reference / name, framework="pt", device="cpu") as file:
            there = set(file.keys())
            for key, value in values.items():
                self._note.differences[key] = difference(value, file.get_tensor(key)) if key in there else float("inf")
            for key in there - set(values):
                self._note.differences[key] = float("inf")

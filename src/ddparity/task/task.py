"""A Task: the few things that a training needs."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..data.loader import check_world_size
from ..data.plan import BatchPlan, checked_integer

Split = Literal["train", "test"]


class Task:
    """What to train: give the parts as arguments, or as methods of a subclass.

    `model()` gives a new module; it is called with equal random streams on every rank.
    `dataset(split)` gives a map-style data set, for "train" and "test"; one process of each node calls it first.
    `loss(model, data)` gives the mean loss of a micro-batch, whose data is on the model's device.
    `optimizer(parameters)` gives a torch optimizer.
    `metric(outputs, dataset)` gives a number, or a dict of numbers by name, from the outputs for the held-out set.
    `sums(output, batch)`, in its place, gives what `predict(metric=)` adds up: then no outputs are collected.
    `global_batch`, `micro_batch`: samples; `epochs`; `seed`; `drop_last`: leave out an epoch's short last step.
    `inputs(batch)`: what the model is called with to predict, see `predict`; None: its first entry.
    `collate_fn`: of the DataLoader.

    Raises:
        TypeError: a part is missing or unknown, or a number is no integer.
        ValueError: a number is out of range.
    """

    model: Callable[[], nn.Module]
    dataset: Callable[[Split], Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    global_batch: int
    micro_batch: int
    epochs: int = 1
    metric: Callable[[Any, Any], Any] | None = None
    sums: Callable[[Any, Any], Any] | None = None
    seed: int = 0
    drop_last: bool = False
    inputs: Callable[[Any], Any] | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None

    def __init__(self, **parts: Any) -> None:
        names = list(Task.__annotations__)
        if unknown := [name for name in parts if name not in names]:
            raise TypeError(f"Task() has no {', '.join(unknown)}: it has {', '.join(names)}")
        for name, value in parts.items():
            setattr(self, name, value)
        if self.metric is not None and self.sums is not None:
            raise TypeError("Task() got metric and sums: give one")
        if missing := [name for name in names if not hasattr(self, name)]:
            raise TypeError(f"Task() lacks {', '.join(missing)}")
        for name in ("global_batch", "micro_batch", "epochs"):
            number = checked_integer(getattr(self, name), name)
            if number < 1:
                raise ValueError(f"Task({name}={number}): must be at least 1")
        if not 0 <= checked_integer(self.seed, "seed") < 2**64:
            raise ValueError(f"Task(seed={self.seed}): must be from 0 to 2**64 - 1")

    def plan(self, num_samples: int) -> BatchPlan:
        return BatchPlan(num_samples, self.global_batch, self.micro_batch, self.seed, drop_last=self.drop_last)


def check_task(task: Task, nproc: int) -> None:
    """Refuse a world that the task's batches cannot occupy."""
    check_world_size(task.plan(task.global_batch), nproc)


def load_task(spec: str) -> Task:
    """The Task that "file.py:name" or "package.module:name" names; the name may be left out where there is one.

    Raises:
        ValueError: there is no such file, module, name or Task; one line that says what there is.
    """
    place, _, name = spec.partition(":")
    module = _module(place)
    tasks = {key: value for key, value in vars(module).items() if _is_task(value) and not key.startswith("_")}
    if not name:
        if len(tasks) != 1:
            found = "no Task" if not tasks else f"several Tasks ({', '.join(tasks)})"
            raise ValueError(f"{place} has {found}: name one, as in {place}:NAME")
        (name,) = tasks
    if not hasattr(module, name):
        raise ValueError(f"{place} has no {name!r}: its Tasks are {', '.join(tasks) or 'none'}")
    value = getattr(module, name)
    if not _is_task(value):
        raise ValueError(
            f"{spec} is a {type(value).__name__}, not a ddparity.Task: its Tasks are {', '.join(tasks) or 'none'}"
        )
    try:
        task: Task = value() if isinstance(value, type) else value
        return task
    except (TypeError, ValueError) as error:
        raise ValueError(f"{spec}: {error}") from error


def source_digest(spec: str) -> str | None:
    """Return the SHA-256, in hex, of the file that the Task `spec` was loaded from; None where it has no file."""
    path = Path(spec.partition(":")[0])
    name = path.stem if path.suffix == ".py" or "/" in str(path) else str(path)
    file = getattr(sys.modules.get(name), "__file__", None)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _is_task(value: object) -> bool:
    return isinstance(value, Task) or (isinstance(value, type) and issubclass(value, Task) and value is not Task)


def _module(place: str) -> Any:
    path = Path(place)
    is_file = path.suffix == ".py" or "/" in place
    if is_file and not path.is_file():
        raise ValueError(f"there is no file {place}: TASK is file.py:name or package.module:name")
    try:
        return _from_file(path) if is_file else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not is_file and error.name and (place == error.name or place.startswith(error.name + ".")):
            raise ValueError(f"there is no module {place}: TASK is file.py:name or package.module:name") from error
        raise ValueError(f"cannot import {place}: {error}") from error
    except Exception as error:
        raise ValueError(f"cannot import {place}: {type(error).__name__}: {error}{_line(error, place)}") from error


def _from_file(path: Path) -> Any:
    """Import a file as `python file.py` would find its neighbours, under its own name, so that workers can pickle."""
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _line(error: Exception, place: str) -> str:
    """Where in the user's file an import failed."""
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(place):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line is not None else ""

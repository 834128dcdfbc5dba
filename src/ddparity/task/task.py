"""A Task has what a training needs: a model, data, a loss, an optimizer and batch sizes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..data.fitting import check_world_size
from ..data.plan import BatchPlan, Plan
from ..data.sizes import checked_integer
from .source import check_source, path_of

Split = Literal["train", "test"]


class Task:
    """What to train. Give the parts as arguments, or as methods and attributes of a subclass.

    `model()` returns a new module. It is called with equal random streams on every rank.
    `dataset(split)` returns a map-style data set, for "train" and "test". One process of each node calls it first.
    `loss(model, data)` returns the mean loss of a micro-batch. `data` is on the model's device.
    `optimizer(parameters)` returns a torch optimizer.
    `scheduler(optimizer, steps)` returns a scheduler of torch, which steps after each of the training's `steps` steps.
    `count(data)` returns the units (unmasked tokens) that the mean loss of a micro-batch is over; None: samples.
    `clip_norm`: gradients are scaled down to this norm before a step.
    `autocast`: torch.bfloat16, the dtype of `torch.autocast` around the loss and the evaluation.
    `metric(outputs, dataset)` returns a number, or a dict of numbers by name, from the outputs for the held-out set.
    `sums(output, batch)`, in place of `metric`, returns what `predict(metric=)` adds up. No outputs are collected then.
    `evaluate_every`: the metric is computed after so many steps, too, and not only after each epoch.
    `global_batch`, `micro_batch`: sizes in samples. `epochs`: how many. `seed`: from 0 to 2**64 - 1.
    `drop_last`: drop the short last step of an epoch.
    `plan(dataset)`, in place of `global_batch` and `drop_last`, returns the plan for the training set, such as a
    `WeightedPlan`. `micro_batch` is then the size of the batches of predictions.
    `inputs(batch)` returns what the model is called with to predict, see `predict`; None: the first entry of a batch.
    `collate_fn`: of the DataLoader.

    Raises:
        TypeError: a part is missing or unknown, or a number or `autocast` has another type.
        ValueError: a number is out of range, or `autocast` needs gradients to be scaled.
    """

    model: Callable[[], nn.Module]
    dataset: Callable[[Split], Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    global_batch: int
    micro_batch: int
    epochs: int = 1
    scheduler: Callable[[torch.optim.Optimizer, int], Any] | None = None
    count: Callable[[Any], float] | None = None
    clip_norm: float | None = None
    autocast: torch.dtype | None = None
    metric: Callable[[Any, Any], Any] | None = None
    sums: Callable[[Any, Any], Any] | None = None
    evaluate_every: int | None = None
    seed: int = 0
    drop_last: bool = False
    inputs: Callable[[Any], Any] | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None

    def __init__(self, **parts: Any) -> None:
        names = [*Task.__annotations__, "plan"]
        if unknown := [name for name in parts if name not in names]:
            raise TypeError(f"Task() has no {', '.join(unknown)}: it has {', '.join(names)}")
        for name, value in parts.items():
            setattr(self, name, value)
        if self.metric is not None and self.sums is not None:
            raise TypeError("Task() got metric and sums: give one")
        if self.has_own_plan and hasattr(self, "global_batch"):
            raise TypeError("Task() got plan and global_batch: the plan decides the sizes of steps, so give one")
        optional = {"global_batch"} if self.has_own_plan else set()
        if missing := [name for name in names if not hasattr(self, name) and name not in optional]:
            raise TypeError(f"Task() lacks {', '.join(missing)}: give them as arguments, or as methods of a subclass")
        for name in ("global_batch", "micro_batch", "epochs", "evaluate_every"):
            value = getattr(self, name, None)
            if value is not None and checked_integer(value, name) < 1:
                raise ValueError(f"Task({name}={value}): must be at least 1")
        if not 0 <= checked_integer(self.seed, "seed") < 2**64:
            raise ValueError(f"Task(seed={self.seed}): must be from 0 to 2**64 - 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"Task(clip_norm={self.clip_norm}): must be more than 0, or None")
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise TypeError(f"Task(autocast={self.autocast!r}): give a dtype, torch.bfloat16, or None")
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"Task(autocast={self.autocast}): a Task has torch.bfloat16 alone. float16 needs its gradients scaled: "
                f"write the loop with accumulate() and torch's GradScaler"
            )

    @property
    def has_own_plan(self) -> bool:
        """Whether `plan` was given."""
        return "plan" in vars(self) or type(self).plan is not Task.plan

    def plan(self, dataset: Any) -> Plan:
        """Return the plan of the training for a training set."""
        return BatchPlan(len(dataset), self.global_batch, self.micro_batch, self.seed, drop_last=self.drop_last)


def check_task(task: Task, nproc: int) -> None:
    """Raise ValueError if a step has fewer micro-batches than there are processes, as far as no data set is needed."""
    if not task.has_own_plan:
        check_world_size(BatchPlan(task.global_batch, task.global_batch, task.micro_batch), nproc)


def load_task(spec: str) -> Task:
    """Load the Task that "file.py:name" or "package.module:name" names. With one Task, the name may be left out.

    Where there is none, a function `task()` may return it.

    Raises:
        ValueError: the file, module, name or Task does not exist. The message is one line and says what exists.
    """
    target = load_target(spec)
    if isinstance(target, Task):
        return target
    raise ValueError(f"{spec} is a function, not a ddparity.Task: only `ddparity verify` takes a function")


def load_target(spec: str) -> Task | Callable[..., Any]:
    """Load the Task that `load_task` loads, or the function of this name.

    A file that mentions neither a Task nor a function `task` is not run.

    Raises:
        ValueError: as `load_task`.
    """
    source, _, name = spec.partition(":")
    if (path := path_of(source)) is not None:
        check_source(path, source, name)
    module = _import(source)
    tasks = {key: value for key, value in vars(module).items() if _is_task(value) and not key.startswith("_")}
    if not name:
        if not tasks and inspect.isfunction(getattr(module, "task", None)):
            tasks = {"task": module.task}
        if len(tasks) != 1:
            found = "no Task" if not tasks else f"several Tasks ({', '.join(tasks)})"
            raise ValueError(f"{source} has {found}: name one, as in {source}:NAME")
        (name,) = tasks
    if not hasattr(module, name):
        raise ValueError(f"{source} has no {name!r}: its Tasks are {', '.join(tasks) or 'none'}")
    value = getattr(module, name)
    try:
        if inspect.isfunction(value) and name != "task":
            function: Callable[..., Any] = value
            return function
        task: Any = value() if isinstance(value, type) or inspect.isfunction(value) else value
    except (TypeError, ValueError) as error:
        raise ValueError(f"{spec}: {error}") from error
    if not isinstance(task, Task):
        what = f"{source}:task() returned" if inspect.isfunction(value) else f"{spec} is"
        raise ValueError(
            f"{what} a {type(task).__name__}, not a ddparity.Task: its Tasks are {', '.join(tasks) or 'none'}"
        )
    return task


def source_digest(spec: str) -> str | None:
    """Return the SHA-256, in hex, of the file that the Task `spec` was loaded from; None where it has no file."""
    path = Path(spec.partition(":")[0])
    name = path.stem if path.suffix == ".py" or "/" in str(path) else str(path)
    file = getattr(sys.modules.get(name), "__file__", None)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _is_task(value: object) -> bool:
    return isinstance(value, Task) or (isinstance(value, type) and issubclass(value, Task) and value is not Task)


def _import(source: str) -> Any:
    """Return the module of a file or of a dotted name."""
    path = Path(source)
    is_file = path.suffix == ".py" or "/" in source
    if is_file and not path.is_file():
        raise ValueError(f"there is no file {source}: TASK is file.py:name or package.module:name")
    try:
        return _import_file(path) if is_file else importlib.import_module(source)
    except ModuleNotFoundError as error:
        if not is_file and error.name and (source == error.name or source.startswith(error.name + ".")):
            raise ValueError(f"there is no module {source}: TASK is file.py:name or package.module:name") from error
        raise ValueError(f"cannot import {source}: {error}") from error
    except Exception as error:
        raise ValueError(f"cannot import {source}: {type(error).__name__}: {error}{_line(error, source)}") from error


def _import_file(path: Path) -> Any:
    """Import a file as a module that bears the file's name.

    As with `python file.py`, it can import other modules of its folder. Data-loader workers can unpickle its objects,
    because the module is in `sys.modules`.
    """
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _line(error: Exception, source: str) -> str:
    """Return " (line N)", the line of the user's file that failed; empty if no line of it is in the traceback."""
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(source):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line is not None else ""

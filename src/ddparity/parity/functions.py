"""Run a function that trains, and compare what it returns on one process and on several."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..checkpoint.fingerprint import fingerprint, plain_name
from ..compat import local, uncompiled, unwrapped, whole_tensor
from ..runtime.logging import setup_logging
from ..runtime.world import world
from . import causes
from .comparison import Difference, Divergence
from .noise import round_at_random
from .recorder import differences_from_file, digest, unit_of

Function = Callable[..., Any]
_WEIGHTS = "end.safetensors"


@dataclass(frozen=True)
class EndNotes:
    """What a function returned on one rank.

    `trained`: names of the parameters. `digests`: of parameters and buffers. `differences`: from the reference run.
    `units`: one unit in the last place of each. `steps`: of optimizers.
    """

    rank: int
    device: str
    fingerprint: str
    trained: list[str]
    digests: dict[str, str]
    differences: dict[str, float]
    units: dict[str, float]
    steps: int


def options_of(function: Function, steps: int, reduction: str) -> dict[str, Any]:
    """Return the arguments of a function's call: `steps` and `reduction`, if it has parameters of these names.

    Raises:
        ValueError: it has another parameter without a default.
    """
    parameters = inspect.signature(function).parameters.values()
    known = {"steps": steps, "reduction": reduction}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for one in parameters:
        if one.kind not in variable and one.default is one.empty and one.name not in known:
            raise ValueError(
                f"{function.__name__}() needs {one.name}, but verify() calls it without: it gives steps and reduction "
                f"to parameters of these names, so give {one.name} a default"
            )
    return {name: value for name, value in known.items() if any(one.name == name for one in parameters)}


def run_function(
    function: Function,
    options: Mapping[str, Any],
    folder: Path,
    name: str,
    reference: str | None,
    rounding: int | None,
    device: str | None,
) -> None:
    """Call the function on this rank, and write what it returned. Every rank of the run calls it.

    Args:
        name: of this run. reference: of the run to compare with; its own name: the run is the reference.
        rounding: the seed of a run that measures noise, whose gradients are rounded at random; None: of another run.
    """
    with world(device=device) as here:
        setup_logging(logging.WARNING)
        with _rounding(rounding), _counting() as steps:
            returned = function(**options)
        values, trained = _values(function, returned)
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        differences: dict[str, float] = {}
        if here.rank == 0 and reference == name:
            save_file({key: value.cpu().clone().contiguous() for key, value in values.items()}, own / _WEIGHTS)
        elif here.rank == 0 and reference is not None:
            differences = differences_from_file(values, folder / reference / _WEIGHTS)
        notes = EndNotes(
            here.rank,
            here.device.type,
            fingerprint(values),
            trained,
            {key: digest(value) for key, value in values.items()},
            differences,
            {key: unit_of(value) for key, value in values.items()},
            len(steps),
        )
        (own / f"end{here.rank}.json").write_text(json.dumps(asdict(notes)))


def read_ends(folder: Path, world_size: int) -> list[EndNotes]:
    """Return what the ranks of a run wrote to its folder."""
    return [EndNotes(**json.loads((folder / f"end{rank}.json").read_text())) for rank in range(world_size)]


def _values(function: Function, returned: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors of a model or of several by name, whole ones of sharded models, and the names of parameters.

    Collectives: of sharded models, one all-gather for each tensor.
    """
    models = returned if isinstance(returned, (list, tuple)) else [returned]
    if not models or not all(isinstance(one, nn.Module) for one in models):
        kinds = ", ".join(type(one).__name__ for one in models) or "nothing"
        raise TypeError(f"{function.__name__}() returned {kinds}: let it return the trained model, or a list of models")
    values: dict[str, torch.Tensor] = {}
    trained: list[str] = []
    for number, model in enumerate(models):
        start = f"{number}." if len(models) > 1 else ""
        inner = unwrapped(uncompiled(model))
        state = {plain_name(key): value for key, value in inner.state_dict().items() if isinstance(value, torch.Tensor)}
        values |= {start + key: whole_tensor(value).detach() for key, value in state.items()}
        trained += [start + plain_name(key) for key, _ in inner.named_parameters()]
    return values, trained


@contextlib.contextmanager
def _rounding(seed: int | None) -> Iterator[None]:
    """Round the gradients of every optimizer's step at random, as another order of their sums might."""
    if seed is None:
        yield
        return
    generator = torch.Generator().manual_seed(seed)

    def round_gradients(optimizer: Optimizer, _arguments: Any, _options: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and gradient.layout == torch.strided:
                    with torch.no_grad():
                        round_at_random(local(gradient), generator)

    handle = register_optimizer_step_pre_hook(round_gradients)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _counting() -> Iterator[list[None]]:
    """Yield a list that gets an entry for each step of an optimizer."""
    steps: list[None] = []
    handle = register_optimizer_step_pre_hook(lambda *_: steps.append(None))
    try:
        yield steps
    finally:
        handle.remove()


def tolerances(noise: Sequence[EndNotes], reference: EndNotes, factor: float) -> dict[str, float]:
    """Return the tolerated difference of each tensor: `factor` times the largest of the noise and one unit."""
    return {
        name: factor * max([unit, *(one.differences.get(name, 0.0) for one in noise)])
        for name, unit in reference.units.items()
    }


def judge(
    ends: Sequence[EndNotes], reference: EndNotes, tolerated: Mapping[str, float] | None
) -> tuple[Difference, Divergence | None]:
    """Return the largest difference of a run, relative to what is tolerated, and where it diverges from its reference.

    `tolerated`: by tensor; None: bits must be equal.
    """
    processes = len(ends)
    first = ends[0]
    names = list({**reference.digests, **first.digests})
    unequal = [name for name in names if first.digests.get(name) != reference.digests.get(name)]
    worst = Difference(0.0, 0.0)
    for name in unequal:
        found = Difference(
            first.differences.get(name, math.inf), 0.0 if tolerated is None else tolerated.get(name, 0.0), name
        )
        worst = max(worst, found, key=lambda one: (one.value > one.tolerance, one.value / (one.tolerance or 1.0)))
    for one in ends:
        for name in one.trained:
            if one.digests.get(name) != first.digests.get(name):
                detail = f"rank {one.rank} has other weights than rank 0"
                return worst, Divergence(processes, 0, "the end", name, detail, causes.UNREDUCED)
    if tolerated is None and unequal:
        value = first.differences.get(unequal[0])
        detail = "bits differ" if value is None else f"relative difference {value:.2g}, and every bit must be equal"
        return worst, Divergence(processes, 0, "the end", unequal[0], detail, causes.FUNCTION)
    if tolerated is not None and worst.value > worst.tolerance:
        detail = f"relative difference {worst.value:.2g}, rounding explains {worst.tolerance:.2g}"
        return worst, Divergence(processes, 0, "the end", worst.where, detail, causes.FUNCTION)
    return worst, None

"""Random training programs: drawn from a seed, run with ddparity on any number of ranks, and by hand on one process.

`draw(seed)` gives a `Program`. `run(program, Ranks(program, …))` runs it with ddparity on this process group,
`run(program, ByHand(program))` in plain PyTorch on one process: one backward after the other, weighted by the shares.
Both return what the program observed: gradients after each loop, parameters and buffers after each step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ddparity as dp
from ddparity.comm import allreduce, buffers
from ddparity.gradients import early, replica

WIDTH = 4
Observed = list[tuple[str, np.ndarray | None]]

ROWS = torch.randn(256, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# Units of each row; whole numbers, so that sums of them are exact. Some rows have none.
UNITS = torch.randint(0, 4, (256,), generator=torch.Generator().manual_seed(1)).double()


# --- what a program is ---


class _Short:
    """Shows what is not the default."""

    def __repr__(self) -> str:
        given = [(one.name, getattr(self, one.name), one) for one in dataclasses.fields(self)]  # type: ignore[arg-type]
        default = [one.default_factory() if callable(one.default_factory) else one.default for *_, one in given]
        shown = [f"{name}={value!r}" for (name, value, _), usual in zip(given, default, strict=True) if value != usual]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Model(_Short):
    """`frozen`: positions of parameters. `options`: of `replicate`, or of torch's DDP if `foreign`. `hook`: a
    communication hook that averages, as a user's. `shares`: its first layer's weight is that of model 0.
    """

    blocks: tuple[str, ...]
    frozen: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    foreign: bool = False
    hook: bool = False
    shares: bool = False


@dataclass(frozen=True, repr=False)
class Stray(_Short):
    """A forward whose output nobody uses. `rank`: the only one that runs it; None: all."""

    model: int
    train: bool
    grad: bool
    rank: int | None = None


@dataclass(frozen=True, repr=False)
class Loop(_Short):
    """One loop of `accumulate`. Micro-batches are numbered over all ranks.

    given: the models of `accumulate`. loss: what the loss runs, see `_outputs`. sizes: of each rank's batches; None:
    the Loader's next step. mains: what the body of micro-batch i does, `mains[i % len(mains)]`. skips: micro-batches
    that end by `continue`, True: after the forward. strays: stray forwards at a place (0: before the forward, 1: after
    it, 2: after the backward) of a micro-batch. infinite: micro-batches whose loss is not finite.
    """

    given: tuple[int, ...]
    loss: str
    sizes: tuple[tuple[int, ...], ...] | None
    mains: tuple[str, ...] = ("backward",)
    counted: bool = False
    equal_counts: bool = False
    skipped: Literal["zero", "drop"] = "zero"
    skips: dict[int, bool] = field(default_factory=dict)
    strays: dict[tuple[int, int], tuple[Stray, ...]] = field(default_factory=dict)
    infinite: tuple[int, ...] = ()


@dataclass(frozen=True, repr=False)
class Step(_Short):
    """One optimizer step. `change`: of model 0 before it. `zero`: `set_to_none`, or "not" at all."""

    loops: tuple[Loop, ...]
    change: str | None = None
    before: tuple[Stray, ...] = ()
    after: tuple[Stray, ...] = ()
    extra_backward: bool = False
    clip: float | None = None
    stepped: tuple[int, ...] = (0,)
    zero: bool | Literal["not"] = True


@dataclass(frozen=True)
class Program:
    seed: int
    world_size: int
    reduction: Literal["fast", "strict"]
    models: tuple[Model, ...]
    steps: tuple[Step, ...]
    plan: tuple[int, int, int] | None = None  # samples, global batch, micro-batch
    optimizer: str = "sgd"
    scaler: bool = False
    autocast: bool = False
    single: bool = False  # float32
    large: bool = False  # reduced as large gradients are, and without the checks that take time

    def __str__(self) -> str:
        return "\n".join(
            [
                f"program {self.seed}: {self.world_size} ranks, {self.reduction}, {self.optimizer}, plan {self.plan}"
                + "".join(f", {name}" for name in ("scaler", "autocast", "single", "large") if getattr(self, name)),
                *(f"  {model}" for model in self.models),
                *(f"  {step}" for step in self.steps),
            ]
        )


# --- how one is drawn ---

_BLOCKS = (
    *("linear", "linear", "norm", "norm", "frozen norm", "nested", "tied", "twice", "complex"),
    *("checkpoint", "checkpointed norm"),
)
_MAINS = ("twice", "retain", "grad", "grad in place", "inputs", "halves", "penalty")


def draw(seed: int) -> Program:
    """Draw a program; the same one for a seed."""
    r = random.Random(seed)
    world_size = r.choice((1, 2, 2, 3, 3, 4))
    reduction: Literal["fast", "strict"] = "strict" if r.random() < 0.35 else "fast"
    models = _draw_models(r, reduction)
    norms = any(map(_norms, models))
    plan = _draw_plan(r, world_size, norms) if r.random() < 0.4 else None
    complex_parameters = any("complex" in model.blocks for model in models)
    scaler = r.random() < 0.15 and not complex_parameters  # torch's scaler has no complex gradients
    if plan is not None:
        cut = dp.BatchPlan(*plan, shuffle=False)
        numbers = [len(cut.step(0, step)) for step in range(cut.steps_per_epoch)]
    else:
        numbers = [0] * r.randint(1, 4)
    steps = tuple(_draw_step(r, number, world_size, models, plan, size, scaler) for number, size in enumerate(numbers))
    return Program(
        seed=seed,
        world_size=world_size,
        reduction=reduction,
        models=models,
        steps=steps,
        plan=plan,
        optimizer=r.choice(("sgd", "momentum", "adamw")),
        scaler=scaler,
        autocast=r.random() < 0.2,
        single=reduction == "strict" and r.random() < 0.5,
        large=r.random() < 0.4,
    )


def _norms(model: Model) -> bool:
    """Whether a model has batch norms that train."""
    return not {"norm", "checkpointed norm"}.isdisjoint(model.blocks)


def _draw_models(r: random.Random, reduction: str) -> tuple[Model, ...]:
    models = [_draw_model(r) for _ in range(1 if r.random() < 0.6 else 2)]
    if len(models) == 2 and r.random() < 0.2:
        models[1] = replace(models[1], shares=True)
    foreign, hook = (reduction == "fast" and r.random() < odds for odds in (0.2, 0.15))
    # A foreign DDP that is not given to accumulate() reduces by itself. Its running statistics are rank 0's.
    if foreign and len(models) == 1 and not _norms(models[0]):
        models[0] = replace(models[0], foreign=True)
    if hook and {"branch", "unused", "reentrant"}.isdisjoint(models[0].blocks):
        models[0] = replace(models[0], hook=True)
    return tuple(models)


def _draw_model(r: random.Random) -> Model:
    blocks = ["linear", *(r.choice(_BLOCKS) for _ in range(r.randint(0, 3)))]
    if r.random() < 0.15:
        blocks.append("reentrant")
    r.shuffle(blocks)
    blocks.sort(key=lambda block: "checkpoint" in block or block == "reentrant")  # its input depends on parameters
    blocks += [name for name in ("branch", "unused") if r.random() < 0.15]
    options: dict[str, Any] = {}
    if r.random() < 0.5:
        options["bucket_cap_mb"] = 1e-5  # so that averages start in the backward
    if r.random() < 0.25:
        options["find_unused_parameters"] = True
    if r.random() < 0.25:
        options["gradient_as_bucket_view"] = True
    frozen = tuple(sorted(r.sample(range(1, 5), r.randint(1, 2)))) if r.random() < 0.2 else ()
    return Model(tuple(blocks), frozen, options)


def _draw_plan(r: random.Random, world_size: int, norms: bool) -> tuple[int, int, int] | None:
    for _ in range(20):
        micro_batch = r.randint(2, 4)
        global_batch = micro_batch * r.randint(world_size, world_size + 4) - r.randint(0, 1)
        samples = global_batch * r.randint(1, 3) + r.choice((0, 0, micro_batch, r.randint(0, global_batch - 1)))
        cut = dp.BatchPlan(samples, global_batch, micro_batch, shuffle=False)
        sizes = [len(m.samples) for step in range(cut.steps_per_epoch) for m in cut.step(0, step)]
        if samples <= len(ROWS) and (not norms or min(sizes) > 1) and len(cut.step(0, 0)) >= world_size:
            return samples, global_batch, micro_batch
    return None


def _draw_step(
    r: random.Random,
    number: int,
    world_size: int,
    models: tuple[Model, ...],
    plan: tuple[int, int, int] | None,
    planned: int,
    scaler: bool,
) -> Step:
    loops = [_draw_loop(r, world_size, models, planned, scaler)]
    if r.random() < 0.2:
        loops.append(_draw_loop(r, world_size, models, 0, scaler))
    used = sorted({model for loop in loops for model in loop.given})
    everything = tuple(range(len(models)))
    change = r.choice(("freeze", "unfreeze", "add", "swap")) if number and r.random() < 0.15 else None
    return Step(
        loops=tuple(loops),
        change=change,
        before=_draw_strays(r, world_size, models, outside=True, first=number == 0),
        after=_draw_strays(r, world_size, models, outside=True, first=False),
        extra_backward=r.random() < 0.1,
        clip=r.choice((None, None, 0.1, 1.0)),
        stepped=tuple(used) if r.random() < 0.6 else everything,
        zero=r.choice((True, True, True, False, False, "not")),
    )


def _draw_loop(r: random.Random, world_size: int, models: tuple[Model, ...], planned: int, scaler: bool) -> Loop:
    if len(models) == 1:
        given, loss = (0,), "0"
    else:
        given = r.choice(((0,), (1,), (0, 1), (1, 0), (0, 1)))
        loss = r.choice(("01", "10", "0+1", "0|1"))
        if len(given) == 2 and r.random() < 0.2:
            loss = r.choice("01")
        elif len(given) == 1 and r.random() < 0.4:
            loss = str(given[0])
    norms = any(map(_norms, models))
    # DDP itself runs a hook, in the last backward: that needs one forward and one backward of all parameters.
    hooked = any(model.hook for model in models)
    equal = not planned and r.random() < 0.15
    counted = not equal and r.random() < 0.25
    sizes = None
    if not planned:
        sizes = _draw_sizes(r, world_size, norms, equal)
        planned = sum(map(len, sizes))
    # The positions of empty batches have no body; what is drawn for them is not used.
    reentrant = any("reentrant" in model.blocks for model in models)
    # torch has no autograd.grad() and no inputs= with reentrant checkpoints.
    known = ("twice", "retain", "halves") if reentrant else _MAINS if not scaler else _MAINS[:-1]
    mains = tuple(r.choice(known) if r.random() < 0.5 else "backward" for _ in range(r.randint(1, 5)))
    if r.random() < 0.4:
        mains = ("backward",)
    if hooked:
        mains = ("backward",)
    skips: dict[int, bool] = {}
    if r.random() < 0.25 and not hooked:
        odds = r.choice((0.2, 0.5, 1.0))
        skips = {index: r.random() < 0.5 for index in range(planned) if r.random() < odds}
    drops = r.random() < (0.5 if skips else 0.1)
    if world_size == 1 and len(given) < len(models):
        drops = False  # in a world of one nothing is known of a model that was not given
    strays = {}
    if r.random() < 0.5 and not hooked:
        for index in range(planned):
            for place in range(3):
                if r.random() < 0.3 and (drawn := _draw_strays(r, world_size, models, outside=False, first=False)):
                    strays[index, place] = drawn
    return Loop(
        given=given,
        loss=loss,
        sizes=sizes,
        mains=mains,
        counted=counted,
        equal_counts=equal,
        skipped="drop" if drops else "zero",
        skips=skips,
        strays=strays,
        infinite=(r.randrange(planned),) if scaler and r.random() < 0.15 else (),
    )


def _draw_sizes(r: random.Random, world_size: int, norms: bool, equal: bool) -> tuple[tuple[int, ...], ...]:
    smallest = 2 if norms else 1
    if equal:
        size, number = r.randint(2, 4), r.randint(1, 4)
        return ((size,) * number,) * world_size
    same = r.random() < 0.3
    number = r.randint(1, 4)
    sizes = [
        tuple(r.randint(smallest, 6) for _ in range(number if same else r.randint(0, 4))) for _ in range(world_size)
    ]
    if r.random() < 0.1:
        sizes = [(*part, 0) for part in sizes]
    if not any(map(sum, sizes)):
        sizes[r.randrange(world_size)] = (3, 2)
    return tuple(sizes)


def _draw_strays(
    r: random.Random, world_size: int, models: tuple[Model, ...], outside: bool, first: bool
) -> tuple[Stray, ...]:
    if r.random() < (0.7 if outside else 0.0):
        return ()
    strays = []
    for _ in range(r.randint(1, 2)):
        model = r.randrange(len(models))
        rank = r.randrange(world_size) if outside and not first and r.random() < 0.4 else None
        if models[model].hook or any("norm" in block for block in models[model].blocks):
            # DDP broadcasts buffers in a forward on all ranks, and after a backward that it reduced, its buckets.
            rank = None
        strays.append(Stray(model, r.random() < 0.5, r.random() < 0.6, rank))
    return tuple(strays)


# --- the models ---


class _Net(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_BLOCK_MODULES[block]() for block in model.blocks])

    def first(self) -> nn.Linear:
        return next(block for block in self.blocks if type(block) is nn.Linear)

    def forward(self, x: torch.Tensor, branch: bool = True) -> torch.Tensor:
        for block in self.blocks:
            if not isinstance(block, _Branch) or branch:
                x = x + torch.tanh(block(x))
        return x


class _Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class _Twice(nn.Module):
    """A layer and a norm that run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex128) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x.to(self.weight.dtype) @ self.weight
        return (product.real + product.imag.square()).to(x.dtype)


class _Checkpoint(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant, preserve_rng_state=False)


class _Branch(nn.Linear):
    """Some micro-batches run it."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)


class _FrozenNorm(nn.BatchNorm1d):
    """It normalises with its running statistics in training, too."""

    def __init__(self) -> None:
        super().__init__(WIDTH, eps=0.1)
        assert self.running_mean is not None and self.running_var is not None, "it tracks them"
        self.running_mean.normal_()
        self.running_var.uniform_(0.5, 2.0)
        super().train(False)

    def train(self, mode: bool = True) -> _FrozenNorm:
        return self


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def _nested() -> nn.Module:
    first = nn.Sequential(nn.Linear(WIDTH, 3, bias=False), nn.Tanh())
    return nn.Sequential(first, nn.Sequential(nn.Sequential(nn.Linear(3, WIDTH))))


_BLOCK_MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": _linear,
    "norm": lambda: nn.BatchNorm1d(WIDTH, eps=0.1),
    "frozen norm": _FrozenNorm,
    "nested": _nested,
    "tied": _Tied,
    "twice": _Twice,
    "complex": _Complex,
    "checkpoint": lambda: _Checkpoint(_nested()),
    "checkpointed norm": lambda: _Checkpoint(nn.Sequential(_linear(), nn.BatchNorm1d(WIDTH, eps=0.1, momentum=None))),
    "reentrant": lambda: _Checkpoint(_nested(), reentrant=True),
    "branch": _Branch,
    "unused": _Unused,
}


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed() also seeds devices that nobody uses: 3 ms


def _build(program: Program, position: int) -> _Net:
    _seed(1000 * program.seed + position)
    model = program.models[position]
    net = _Net(model).double()  # complex ones stay complex
    if program.single:
        net = net.float()
    parameters = list(net.parameters())
    for frozen in model.frozen:
        if frozen < len(parameters) - 1:
            parameters[frozen].requires_grad_(False)
    return net


# --- who runs it ---

Batch = tuple[torch.Tensor, torch.Tensor]


class Ranks:
    """Run a program with ddparity, on each rank of this process's world of `world_size` ranks."""

    def __init__(self, program: Program, rank: int, world_size: int) -> None:
        self.program, self.rank, self.world_size = program, rank, world_size
        self._steps: Iterator[Any] = iter(())
        if program.plan is not None:
            rows = list(zip(_rows(program), UNITS.to(_rows(program)), strict=True))[: program.plan[0]]
            self._steps = iter(dp.Loader(rows, dp.BatchPlan(*program.plan, shuffle=False)).epoch(0))

    def wrap(self, net: _Net, model: Model) -> nn.Module:
        if model.foreign:
            wrapped: nn.Module = DistributedDataParallel(net, **model.options) if self.world_size > 1 else net
            if model.hook and isinstance(wrapped, DistributedDataParallel):
                wrapped.register_comm_hook(None, allreduce_hook)
            return wrapped
        hook = (None, allreduce_hook) if model.hook else None
        check_every = 0 if self.program.large else 1
        options = {"comm_hook": hook, "check_every": check_every, **model.options}
        return dp.replicate(net, reduction=self.program.reduction, **options)

    def micros(self, models: list[nn.Module], loop: Loop) -> Iterator[tuple[int, Batch, float]]:
        batches, start = self._batches(loop)
        if loop.counted and not self._units(batches, loop):
            return  # accumulate() refuses a step without any unit
        for micro in dp.accumulate(
            models[0] if len(models) == 1 else models,
            batches,
            count=_units if loop.counted else None,
            equal_counts=loop.equal_counts,
            skipped=loop.skipped,
        ):
            yield start + micro.index, micro.data, micro.weight

    def _batches(self, loop: Loop) -> tuple[Any, int]:
        if loop.sizes is None:
            return next(self._steps), 0
        parts = loop.sizes if self.world_size > 1 else [[size for part in loop.sizes for size in part]]
        sizes = [len(part) for part in parts]
        start = sum(sizes[: self.rank])
        return _cut(self.program, loop.sizes)[start : start + sizes[self.rank]], start

    def _units(self, batches: Any, loop: Loop) -> float:
        """Units of all ranks' batches."""
        if loop.sizes is not None:
            return sum(map(_units, _cut(self.program, loop.sizes)))
        micros = batches.plan.step(batches.epoch, batches.number)
        return sum(float(UNITS[micro.samples].sum()) for micro in micros)

    def runs(self, rank: int | None) -> bool:
        return rank is None or rank == self.rank


class ByHand:
    """Run a program in plain PyTorch on one process. The cut into micro-batches is the plan's, which has its tests."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._step = 0

    def wrap(self, net: _Net, model: Model) -> nn.Module:
        return net

    def micros(self, models: list[nn.Module], loop: Loop) -> Iterator[tuple[int, Batch, float]]:
        batches = self._batches(loop)
        units = [float(units.sum()) if loop.counted else float(len(x)) for x, units in batches]
        parameters = self.all_parameters()
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        left = 1.0
        for index, (batch, own) in enumerate(zip(batches, units, strict=True)):
            if own:
                yield index, batch, own / sum(units)
                if index in loop.skips and loop.skipped == "drop":
                    left -= own / sum(units)
        for parameter, old in zip(parameters, before, strict=True):
            if parameter.grad is not None and left > 1e-9:
                parameter.grad = parameter.grad / left
            if old is not None:
                parameter.grad = old if parameter.grad is None else old + parameter.grad

    def _batches(self, loop: Loop) -> list[Batch]:
        if loop.sizes is not None:
            return _cut(self.program, loop.sizes)
        assert self.program.plan is not None
        cut = dp.BatchPlan(*self.program.plan, shuffle=False).step(0, self._step)
        self._step += 1
        rows = _rows(self.program)
        return [(rows[micro.samples], UNITS[micro.samples].to(rows)) for micro in cut]

    def runs(self, rank: int | None) -> bool:
        return rank is None  # on one rank only it changes nothing

    all_parameters: Callable[[], list[nn.Parameter]]


def _rows(program: Program) -> torch.Tensor:
    return ROWS.float() if program.single else ROWS


def _cut(program: Program, sizes: Sequence[Sequence[int]]) -> list[Batch]:
    rows, flat = _rows(program), [size for part in sizes for size in part]
    begin = program.seed % 100
    return list(
        zip(
            rows[begin : begin + sum(flat)].split(flat),
            UNITS[begin : begin + sum(flat)].to(rows).split(flat),
            strict=True,
        )
    )


def _units(data: Batch) -> float:
    return float(data[1].sum())


# --- how it runs ---

_THRESHOLDS = (
    (allreduce, "SHORT_BYTES"),
    (buffers, "LEAST_BYTES"),
    (early, "SMALL_BYTES"),
    (early, "CAREFUL_STEPS"),
    (replica, "CAREFUL_STEPS"),
)


def run(program: Program, by: Ranks | ByHand) -> Observed:
    """Run a program; return what it observed."""
    with contextlib.ExitStack() as stack:
        if program.large:
            for module, name in _THRESHOLDS:
                stack.enter_context(unittest.mock.patch.object(module, name, 0))
        return _Run(program, by).run()


class _Run:
    def __init__(self, program: Program, by: Ranks | ByHand) -> None:
        self.program, self.by = program, by
        self.nets = [_build(program, position) for position in range(len(program.models))]
        for net, model in zip(self.nets, program.models, strict=True):
            if model.shares:
                net.first().weight = self.nets[0].first().weight
        self.models = [by.wrap(net, model) for net, model in zip(self.nets, program.models, strict=True)]
        self.optimizers = [self._optimizer(net) for net in self.nets]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=program.scaler)
        self.scaler.scale(torch.zeros(()))  # a rank without a micro-batch has no other call that sets it up
        self.probe = _rows(program)[200:205]
        self.observed: Observed = []
        if isinstance(by, ByHand):
            by.all_parameters = lambda: list(dict.fromkeys(one for net in self.nets for one in net.parameters()))

    def _optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        if self.program.optimizer == "adamw":
            return torch.optim.AdamW(net.parameters(), lr=0.01, eps=1e-2)
        return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9 if self.program.optimizer == "momentum" else 0.0)

    def run(self) -> Observed:
        for number, step in enumerate(self.program.steps):
            if step.change is not None:
                self._change(step.change, number)
            self._strays(step.before)
            for position, loop in enumerate(step.loops):
                self._loop(loop)
                self._observe_gradients(f"step {number}, loop {position}")
            if step.extra_backward and self._may_go_backward_outside(number):
                self._forward(self.models[0], self.probe).square().mean().mul(0.1).backward()
            self._strays(step.after)
            self._optimize(step)
            for position, net in enumerate(self.nets):
                for name, value in [*net.named_parameters(), *net.named_buffers()]:
                    self.observed.append((f"step {number}: model {position}: {name}", _array(value.detach())))
        return self.observed

    def _may_go_backward_outside(self, number: int) -> bool:
        """Plain DDP goes backward there, which averages: other bits than on one process, and its own limits."""
        options, blocks = self.program.models[0].options, self.program.models[0].blocks
        return (
            self.program.reduction == "fast"
            and not any(step.change for step in self.program.steps[: number + 1])
            and not self.program.scaler
            and all(stray.rank is None for step in self.program.steps for stray in (*step.before, *step.after))
            and ("find_unused_parameters" in options) == (not {"branch", "unused"}.isdisjoint(blocks))
            and ("find_unused_parameters" not in options or "reentrant" not in blocks)
        )

    def _change(self, change: str, number: int) -> None:
        net = self.nets[0]
        parameters = list(net.parameters())
        if change == "freeze":
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            for parameter in trained[1:2]:
                parameter.requires_grad_(False)
                parameter.grad = None
        elif change == "unfreeze":
            for parameter in parameters:
                parameter.requires_grad_(True)
        else:
            _seed(number)
            added = _linear().to(_rows(self.program).dtype)
            if change == "add":
                net.blocks.append(added)
            else:
                net.blocks[list(net.blocks).index(net.first())] = added
            self.optimizers[0].add_param_group({"params": list(added.parameters())})

    def _strays(self, strays: Sequence[Stray]) -> None:
        for stray in strays:
            if self.by.runs(stray.rank):
                model = self.models[stray.model]
                if not stray.train:
                    model.eval()
                with contextlib.nullcontext() if stray.grad else torch.no_grad():
                    self._forward(model, self.probe)
                if not stray.train:
                    model.train()

    def _forward(self, model: nn.Module, x: torch.Tensor, branch: bool = True) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.program.autocast):
            return model(x, branch).to(x.dtype)

    def _loop(self, loop: Loop) -> None:
        for index, (x, units), weight in self.by.micros([self.models[position] for position in loop.given], loop):
            self._strays(loop.strays.get((index, 0), ()))
            if loop.skips.get(index) is False:
                continue
            main = loop.mains[index % len(loop.mains)]
            if main == "penalty":
                x = x.clone().requires_grad_()

            factor = weight * (float("inf") if index in loop.infinite else 1.0)
            loss = functools.partial(self._loss, loop, index, x, units, factor)
            value = loss()
            self._strays(loop.strays.get((index, 1), ()))
            if index in loop.skips:
                continue
            self._backward(main, value, loss, x, factor, loop)
            self._strays(loop.strays.get((index, 2), ()))

    def _loss(
        self, loop: Loop, index: int, x: torch.Tensor, units: torch.Tensor, factor: float, part: float = 1.0
    ) -> torch.Tensor:
        rows = self._rows_loss(loop, x, index, part)
        mean = (rows * units).sum() / units.sum() if loop.counted else rows.mean()
        return self.scaler.scale(mean * factor)

    def _rows_loss(self, loop: Loop, x: torch.Tensor, index: int, part: float) -> torch.Tensor:
        """A loss a row of the models that the loop runs."""
        model = [lambda x, m=m: self._forward(m, x, branch=index % 2 == 0) for m in self.models]
        if loop.loss in ("0", "1"):
            out = model[int(loop.loss)](x)
        elif loop.loss in ("01", "10"):
            first, second = map(int, loop.loss)
            out = model[second](model[first](x))
        elif loop.loss == "0+1":
            out = model[0](x) * 0.5 + model[1](x)
        else:  # as the losses of two adversaries
            made = model[0](x)
            out = made + model[1](made.detach())
        return (out * part - 0.3).square().mean(1)

    def _backward(
        self,
        main: str,
        value: torch.Tensor,
        loss: Callable[..., torch.Tensor],
        x: torch.Tensor,
        factor: float,
        loop: Loop,
    ) -> None:
        run = {"0": (0,), "1": (1,)}.get(loop.loss, range(len(self.nets)))
        if main == "backward":
            value.backward()
            return
        trained = [p for position in run for p in self.nets[position].parameters() if p.requires_grad]
        if main == "twice":
            value.backward()
            loss(0.5).backward()
        elif main == "halves":
            (value + loss(0.5)).backward()
        elif main == "retain":
            value.backward(retain_graph=True)
            (value * 0.5).backward()
        elif main in ("grad", "grad in place"):
            for parameter, gradient in zip(
                trained, torch.autograd.grad(value, trained, allow_unused=True), strict=True
            ):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient
                elif main == "grad":
                    parameter.grad = parameter.grad + gradient
                else:
                    parameter.grad.add_(gradient)
        elif main == "inputs":
            value.backward(inputs=trained[::2])
        else:
            (slope,) = torch.autograd.grad(value / factor, x, create_graph=True)
            (value + slope.square().sum() * factor).backward()

    def _optimize(self, step: Step) -> None:
        for position in step.stepped:
            parameters = [p for p in self.nets[position].parameters() if p.grad is not None]
            if not parameters:
                continue
            if step.clip is not None:
                self.scaler.unscale_(self.optimizers[position])
                nn.utils.clip_grad_norm_(self.nets[position].parameters(), step.clip)
            self.scaler.step(self.optimizers[position])
        if any(p.grad is not None for position in step.stepped for p in self.nets[position].parameters()):
            self.scaler.update()
        if step.zero != "not":
            for position in step.stepped:
                self.optimizers[position].zero_grad(set_to_none=step.zero)

    def _observe_gradients(self, when: str) -> None:
        for position, net in enumerate(self.nets):
            for name, parameter in net.named_parameters():
                value = None if parameter.grad is None else _array(parameter.grad)
                self.observed.append((f"{when}: model {position}: {name}.grad", value))


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().clone().resolve_conj().numpy().copy()


# --- what is right ---


def difference(program: Program, ours: Sequence[Observed], by_hand: Observed, alone: Observed | None) -> str | None:
    """Return what differs first between the ranks' observations and one process's, or None.

    Ranks agree in all bits; float64 is within 1e-12 of the largest number of a tensor; `alone`, in the strict mode, is
    ddparity's own on one process, with the same bits.
    """
    for rank, observed in enumerate(ours):
        if [name for name, _ in observed] != [name for name, _ in by_hand]:
            return f"rank {rank} observed other things"
    for position, (name, right) in enumerate(by_hand):
        values = [observed[position][1] for observed in ours]
        for rank, value in enumerate(values):
            if (value is None) != (right is None):
                return f"{name} on rank {rank}: {value} instead of {right}"
            if not _same_bits(value, values[0]):
                return f"{name}: rank {rank} has {value}, rank 0 {values[0]}"
        if alone is not None and not _same_bits(values[0], alone[position][1]):
            return f"{name}: other bits than on one process: {values[0]} instead of {alone[position][1]}"
        if values[0] is not None and right is not None and (limit := _limit(program)) is not None:
            finite = np.isfinite(right)
            if not np.array_equal(finite, np.isfinite(values[0])):
                return f"{name}: {values[0]} instead of {right}"
            error = np.abs(values[0][finite] - right[finite]).max(initial=0.0)
            # Of a gradient that is zero, such as that of a bias before a batch norm, rounding of its terms is left.
            scale = max(np.abs(right)[finite].max(initial=0.0), 100.0 if program.scaler else 0.1)
            if error > limit * scale:
                return f"{name}: off by {error / scale:.2g}: {values[0]} instead of {right}"
    return None


def _same_bits(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and (a.tobytes() == b.tobytes() or np.array_equal(a, b, equal_nan=True))


def _limit(program: Program) -> float | None:
    if not program.single:
        return 1e-12
    return None if program.autocast else 1e-2

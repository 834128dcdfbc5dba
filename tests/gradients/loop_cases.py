"""What the loops of trainings do: models, and the steps over them, the same for `accumulate` and for one process."""

from __future__ import annotations

import copy
import dataclasses
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import ddparity as dp
from ddparity.compat import unwrapped

# Each sample has two rows, so that a batch norm has a variance in a micro-batch of one. An epoch has two steps: one in
# micro-batches of 3, 3, 2 and 2 samples, and one of two samples, which leaves rank 2 of 3 without a micro-batch.
SAMPLES = torch.randn(12, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PLAN = dp.BatchPlan(12, 10, 3, shuffle=False)
X = SAMPLES.flatten(0, 1)

Models = list[Any]
# accumulate(model or models, **options) over the micro-batches of the step.
Accumulate = Callable[..., Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class Loop:
    """One training.

    Attributes:
        step: runs the step's loops; the optimizer steps after it. models: makes them.
        wrap: replicates a model, with the options of a reduction and `options`.
        left_out: micro-batches without a backward in a step with `skipped="drop"`.
        change: what happens to the modules before a step. first: to the replicated models before the first step.
        reductions: those that have this loop. rtol: of the gradients.
        strict_bits: the strict reduction's bits do not depend on the world size.
    """

    step: Callable[[Models, Accumulate], None]
    models: Callable[[], list[nn.Module]] = lambda: [net()]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrap: Callable[..., Any] = dp.replicate
    left_out: frozenset[int] = frozenset()
    change: Callable[[Models, int], None] = lambda modules, number: None
    first: Callable[[Models], None] = lambda models: None
    reductions: tuple[str, ...] = ("after the loop", "overlapped", "strict")
    rtol: float = 1e-12
    strict_bits: bool = True


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def normed() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 6), nn.BatchNorm1d(6)).double()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def last_rank() -> int:
    return dist.get_world_size() - 1 if dist.is_initialized() else 0


def losses(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = model(x)
    return y[:, 0].square().mean(), (y[:, 1] - 1).square().mean()


def plain(models: Models, accumulate: Accumulate) -> None:
    for micro in accumulate(models[0]):
        (models[0](micro.data).square().mean() * micro.weight).backward()


# --- forwards without a backward ---


def _stray(model: Any) -> None:
    """Run a validation loss, a metric and a probe that nobody differentiates."""
    model(X[:2]).square().mean()
    model.eval()
    model(X[2:5])
    with torch.no_grad():
        model(X[5:6])
    model.train()


def _on(ranks: str) -> bool:
    return ranks == "all ranks" or rank() == {"rank 0": 0, "the last rank": last_rank()}[ranks]


def _with_stray(when: str, ranks: str) -> Callable[[Models, Accumulate], None]:
    def step(models: Models, accumulate: Accumulate) -> None:
        (model,) = models
        if when == "before" and _on(ranks):
            _stray(model)
        for micro in accumulate(model):
            if when == "inside" and _on(ranks):
                _stray(model)
            loss = model(micro.data).square().mean() * micro.weight
            if when == "before the backward" and _on(ranks):
                _stray(model)
            loss.backward()
            if when == "after the backward" and _on(ranks):
                _stray(model)
        if when == "behind" and _on(ranks):
            _stray(model)

    return step


STRAYS = {
    f"a forward {when}, on {ranks}{', unused allowed' if options else ''}": Loop(
        _with_stray(when, ranks), options=options
    )
    for when in ("before", "inside", "before the backward", "after the backward", "behind")
    for ranks in ("all ranks", "rank 0", "the last rank")
    for options in ({}, {"find_unused_parameters": True})
}


# --- several backwards ---


def _two_forwards(models: Models, accumulate: Accumulate) -> None:
    for micro in accumulate(models[0]):
        for number in range(2):
            (losses(models[0], micro.data)[number] * micro.weight).backward()


def _two_backwards(models: Models, accumulate: Accumulate) -> None:
    for micro in accumulate(models[0]):
        first, second = losses(models[0], micro.data)
        (first * micro.weight).backward(retain_graph=True)
        (second * micro.weight).backward()


def _edited_through_data(models: Models, accumulate: Accumulate) -> None:
    """What is written through `.data` leaves no trace but the values."""
    for micro in accumulate(models[0]):
        first, _ = losses(models[0], micro.data)
        (first * micro.weight).backward()
        for parameter in models[0].parameters():
            if parameter.grad is not None:
                parameter.grad.data.add_(micro.weight)


def _two_loops(models: Models, accumulate: Accumulate) -> None:
    for number in range(2):
        for micro in accumulate(models[0]):
            (losses(models[0], micro.data)[number] * micro.weight).backward()


def _set_by_hand(models: Models, accumulate: Accumulate) -> None:
    for micro in accumulate(models[0]):
        parameters = list(models[0].parameters())
        first, second = losses(models[0], micro.data)
        for parameter, a, b in zip(
            parameters,
            torch.autograd.grad(first * micro.weight, parameters, retain_graph=True),
            torch.autograd.grad(second * micro.weight, parameters),
            strict=True,
        ):
            parameter.grad = a + b if parameter.grad is None else parameter.grad + a + b


def _added_in_place(models: Models, accumulate: Accumulate) -> None:
    """Change the gradients after the backward, as a gradient penalty by hand does."""
    plain_loss = models[0]
    for micro in accumulate(plain_loss):
        (plain_loss(micro.data).square().mean() * micro.weight).backward()
        with torch.no_grad():
            for parameter in plain_loss.parameters():
                parameter.grad.add_(parameter, alpha=0.1 * micro.weight)


def _inputs(models: Models, accumulate: Accumulate) -> None:
    for micro in accumulate(models[0]):
        loss = sum(losses(models[0], micro.data)) * micro.weight
        loss.backward(inputs=list(models[0].parameters()))


def _some_inputs(models: Models, accumulate: Accumulate) -> None:
    for micro in accumulate(models[0]):
        loss = sum(losses(models[0], micro.data)) * micro.weight
        loss.backward(inputs=list(models[0].parameters())[2:])


def _hessian_product(models: Models, accumulate: Accumulate) -> None:
    """The gradient of a loss and of its gradient's product with a vector, whose graph `create_graph` keeps."""
    (model,) = models
    parameters = list(model.parameters())
    for micro in accumulate(model):
        loss = model(micro.data).square().mean() * micro.weight
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        (
            loss
            + sum(
                (gradient * parameter.detach()).sum() for gradient, parameter in zip(gradients, parameters, strict=True)
            )
        ).backward()


def _keeps_a_graph(models: Models, accumulate: Accumulate) -> None:
    for micro in accumulate(models[0]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the cycle between a parameter and the graph of its gradient
            (models[0](micro.data).square().mean() * micro.weight).backward(create_graph=True)


def _penalty_inside(models: Models, accumulate: Accumulate) -> None:
    for micro in accumulate(models[0]):
        penalty = sum(parameter.square().sum() for parameter in models[0].parameters())
        ((models[0](micro.data).square().mean() + 0.1 * penalty) * micro.weight).backward()


def _penalty_after(through: str) -> Callable[[Models, Accumulate], None]:
    def step(models: Models, accumulate: Accumulate) -> None:
        plain(models, accumulate)
        if through == "weights":  # equal on all ranks
            sum(0.1 * parameter.square().sum() for parameter in models[0].parameters()).backward()
        else:  # DDP averages it, outside of accumulate
            models[0](X[:3]).square().mean().backward()

    return step


BACKWARDS = {
    "two forwards and backwards": Loop(_two_forwards),
    "two backwards of one graph": Loop(_two_backwards),
    "two loops before one optimizer step": Loop(_two_loops),
    "gradients set by hand": Loop(_set_by_hand),
    "gradients changed after the backward": Loop(_added_in_place),
    "backward(inputs=all)": Loop(_inputs),
    "a penalty in the loss": Loop(_penalty_inside),
    "a Hessian-vector product": Loop(_hessian_product),
    "backward(create_graph=True)": Loop(_keeps_a_graph),
    "a penalty of the weights after the loop": Loop(_penalty_after("weights")),
    "a penalty of the outputs after the loop": Loop(_penalty_after("outputs"), strict_bits=False),
}


# --- micro-batches that are left out ---


def _leaves_out(left_out: frozenset[int], skipped: str, stray: bool) -> Callable[[Models, Accumulate], None]:
    def step(models: Models, accumulate: Accumulate) -> None:
        for micro in accumulate(models[0], skipped=skipped):
            if micro.index in left_out:
                if stray:
                    models[0](micro.data)  # its loss was not finite
                continue
            (models[0](micro.data).square().mean() * micro.weight).backward()

    return step


SKIPS = {
    f"micro-batches {sorted(which)} left out, {skipped}{', after a forward' if stray else ''}": Loop(
        _leaves_out(which, skipped, stray), left_out=which if skipped == "drop" else frozenset()
    )
    for which in map(frozenset, ([0], [1], [3], [0, 1], [2, 3], [0, 1, 2, 3]))
    for skipped in ("zero", "drop")
    for stray in (False, True)
}


# --- gradients from before, and with shared memory ---


def _old_gradients(modules: Models, _: int) -> None:
    for parameter in modules[0].parameters():
        parameter.grad = torch.ones_like(parameter)


def _zeroes(how: str, skipped: str) -> Callable[[Models, Accumulate], None]:
    def step(models: Models, accumulate: Accumulate) -> None:
        (model,) = models
        for number, micro in enumerate(accumulate(model, skipped=skipped)):
            if number == 0:
                model.zero_grad(set_to_none=how == "to None")
            if micro.index != 1 or skipped == "zero":
                (model(micro.data).square().mean() * micro.weight).backward()

    return step


# On rank 2 of 3 the second step has no micro-batch, so nothing there calls zero_grad().
ZEROES = {
    f"zero_grad() {how} in the loop{', a micro-batch dropped' if skipped == 'drop' else ''}": Loop(
        _zeroes(how, skipped), change=_old_gradients, left_out=frozenset([1] if skipped == "drop" else [])
    )
    for how in ("to None", "in place")
    for skipped in ("zero", "drop")
}


class _Idle(nn.Module):
    """A parameter that no forward uses, whose gradient stays what `zero_grad` leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.idle = net(), nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


OLD = {
    **ZEROES,
    **{
        f"{name}, beside a parameter without a gradient": dataclasses.replace(one, models=lambda: [_Idle()])
        for name, one in ZEROES.items()
    },
    "old gradients": Loop(plain, change=_old_gradients),
    "old gradients, a micro-batch dropped": Loop(
        _leaves_out(frozenset([1]), "drop", False), change=_old_gradients, left_out=frozenset([1])
    ),
}


class _Summed(nn.Module):
    """`autograd.grad` gives `w` and `d` one tensor, and `r` one with strides of 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.w, self.d = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(2, 6))
        self.r = nn.Parameter(torch.randn(3))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.w + self.d) + 0.1 * self.r.sum()


def _by_autograd_grad(skipped: str) -> Callable[[Models, Accumulate], None]:
    def step(models: Models, accumulate: Accumulate) -> None:
        (model,) = models
        parameters = list(model.parameters())
        for micro in accumulate(model, skipped=skipped):
            if micro.index == 1 and skipped == "drop":
                continue
            loss = model(micro.data).square().mean() * micro.weight
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    return step


SHARED_MEMORY = {
    "gradients that share memory": Loop(_by_autograd_grad("zero"), lambda: [_Summed()]),
    "gradients that share memory, a micro-batch dropped": Loop(
        _by_autograd_grad("drop"), lambda: [_Summed()], left_out=frozenset([1])
    ),
}


# --- several models ---


def _pair() -> list[nn.Module]:
    """A generator and a discriminator."""
    generator = normed()
    torch.manual_seed(3)
    discriminator = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    return [generator, discriminator]


def _one_list(models: Models, accumulate: Accumulate) -> None:
    generator, discriminator = models
    for micro in accumulate([generator, discriminator]):
        loss = discriminator(generator(micro.data)).square().mean() + (discriminator(micro.data) - 1).square().mean()
        (loss * micro.weight).backward()


def _one_list_two_losses(models: Models, accumulate: Accumulate) -> None:
    generator, discriminator = models
    for micro in accumulate([generator, discriminator]):
        fake = generator(micro.data)
        loss = discriminator(fake.detach()).square().mean() + (discriminator(micro.data) - 1).square().mean()
        (loss * micro.weight).backward()
        for parameter in discriminator.parameters():
            parameter.requires_grad_(False)
        ((discriminator(fake) - 1).square().mean() * micro.weight).backward()
        for parameter in discriminator.parameters():
            parameter.requires_grad_(True)


def _inside(models: Models, accumulate: Accumulate) -> None:
    """Only the generator's step is accumulated; its loss runs the discriminator, which collects gradients, too."""
    generator, discriminator = models
    for micro in accumulate(generator):
        ((discriminator(generator(micro.data)) - 1).square().mean() * micro.weight).backward()


def _in_turn(models: Models, accumulate: Accumulate) -> None:
    generator, discriminator = models
    for micro in accumulate(discriminator):
        fake = generator(micro.data).detach()
        loss = discriminator(fake).square().mean() + (discriminator(micro.data) - 1).square().mean()
        (loss * micro.weight).backward()
    _inside(models, accumulate)


def _without_gradients(models: Models, accumulate: Accumulate) -> None:
    generator, discriminator = models
    for micro in accumulate(discriminator):
        with torch.no_grad():
            fake = generator(micro.data)
        (discriminator(fake).square().mean() * micro.weight).backward()


def _unwrapped_inside(models: Models, accumulate: Accumulate) -> None:
    generator, discriminator = models
    for micro in accumulate(generator):
        ((unwrapped(discriminator)(generator(micro.data)) - 1).square().mean() * micro.weight).backward()


PAIRS = {
    "a list of two models": Loop(_one_list, _pair),
    "a list of two models and two losses": Loop(_one_list_two_losses, _pair),
    "one model inside another's loss": Loop(_inside, _pair),
    "the module of one model inside another's loss": Loop(_unwrapped_inside, _pair),
    "two models in turn": Loop(_in_turn, _pair),
    "one model's outputs without gradients": Loop(_without_gradients, _pair),
}


# --- changes after replicate ---


def _change(kind: str) -> Callable[[Models, int], None]:
    def change(modules: Models, number: int) -> None:
        if number != 1:
            return
        (module,) = modules
        torch.manual_seed(5)
        if kind in ("freeze", "unfreeze"):
            module[0].requires_grad_(kind == "unfreeze")
        elif kind == "add":
            module.append(nn.Linear(2, 2).double())
        else:
            module[2] = nn.Linear(5, 3).double()

    return change


def _half_frozen() -> list[nn.Module]:
    model = net()
    model[0].requires_grad_(False)
    return [model]


CHANGES = {
    "a layer is unfrozen": Loop(plain, _half_frozen, change=_change("unfreeze")),
    "a layer is frozen": Loop(plain, change=_change("freeze")),
    "a layer is added": Loop(plain, change=_change("add")),
    "a layer is swapped": Loop(plain, change=_change("swap")),
}


# --- copies, compilation, foreign DDP modules ---


def _deep_copied(model: nn.Module, **options: Any) -> Any:
    return copy.deepcopy(dp.replicate(model, **options))


def _deep_copied_later(model: nn.Module, **options: Any) -> Any:
    replicated = dp.replicate(model, **options)
    for micro in dp.accumulate(replicated, [X[:2], X[2:4]], equal_counts=True):
        (replicated(micro.data).mean() * micro.weight).backward()
    replicated.zero_grad()
    return copy.deepcopy(replicated)


def _averaged(model: nn.Module, **options: Any) -> Any:
    return AveragedModel(dp.replicate(model, **options)).module


def _saved(model: nn.Module, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(dp.replicate(model, **options), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _compiled_inside(model: nn.Module, **options: Any) -> Any:
    return dp.replicate(torch.compile(model, backend="eager"), **options)


def _compiled_outside(model: nn.Module, **options: Any) -> Any:
    return torch.compile(dp.replicate(model, **options), backend="eager")


def _compiled_in_place(model: nn.Module, **options: Any) -> Any:
    model.compile(backend="eager")
    return dp.replicate(model, **options)


def _foreign(model: nn.Module, **options: Any) -> Any:
    return DistributedDataParallel(model, **options) if dist.get_world_size() > 1 else model


def _recording_hook(state, bucket):  # torch refuses annotations that are strings
    state.append(bucket.index())
    tensor = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(tensor, async_op=True).get_future().then(lambda future: future.value()[0])


def _hooked(model: nn.Module, **options: Any) -> Any:
    model = _foreign(model, **options)
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook([], _recording_hook)
    return model


def _compressed(model: nn.Module, **options: Any) -> Any:
    model = dp.replicate(model, **options)
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, bf16_compress_hook)
    return model


FAST = ("after the loop", "overlapped")
WITHOUT_LIMIT = ("after the loop", "strict")
WRAPPERS = {
    "copied": Loop(plain, wrap=_deep_copied),
    "copied after a step": Loop(plain, wrap=_deep_copied_later),
    "copied with batch norms": Loop(plain, lambda: [normed()], wrap=_deep_copied),
    "averaged": Loop(plain, wrap=_averaged),
    "saved and loaded": Loop(plain, wrap=_saved),
    # torch's compiler refuses small limits of buckets.
    "compiled inside": Loop(plain, wrap=_compiled_inside, reductions=WITHOUT_LIMIT),
    "compiled outside": Loop(plain, wrap=_compiled_outside, reductions=WITHOUT_LIMIT),
    "compiled in place": Loop(plain, wrap=_compiled_in_place, reductions=WITHOUT_LIMIT),
    "compiled, several buckets": Loop(plain, lambda: _wide(2_000), wrap=_compiled_inside, reductions=WITHOUT_LIMIT),
    "a foreign DDP": Loop(plain, wrap=_foreign, reductions=FAST),
    "a foreign DDP, two backwards": Loop(_two_backwards, wrap=_foreign, reductions=FAST),
    "a user's hook": Loop(plain, wrap=_hooked, reductions=FAST),
    "a user's hook after replicate": Loop(plain, wrap=_compressed, reductions=FAST, rtol=1e-2),
}


# --- parameters ---


class _Complex(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(6, size, dtype=torch.complex128, generator=generator) / size)
        self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x * self.scale).to(torch.complex128) @ self.weight).abs()


class _Sometimes(nn.Module):
    """Micro-batches use different parameters, and one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.never = nn.Linear(2, 2).double()
        self.sometimes = nn.Linear(6, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        return y + self.sometimes(x) if bool(x[0, 0] > 0) else y


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.words = nn.Embedding(11, 3, sparse=True)
        self.out = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.words((10 * x).long() % 11).mean(1))


class _MixedDtypes(nn.Module):
    """The float32 part has small whole numbers, whose sums are exact in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.whole = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + self.whole.double().sum()


class _Ignoring(nn.Module):
    """DDP ignores a part that the user reduces, here: that never trains."""

    _ddp_params_and_buffers_to_ignore = ("apart.weight", "apart.bias")

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.apart = nn.Linear(6, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            offset = self.apart(x)
        return self.net(x) + offset


def _wide(width: int) -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 64), nn.Linear(64, 2)).double()]


UNUSED = {"find_unused_parameters": True}
PARAMETERS = {
    "complex, small": Loop(plain, lambda: [_Complex(2)]),
    "complex, large": Loop(plain, lambda: [_Complex(20_000)]),
    "parameters that differ by micro-batch": Loop(plain, lambda: [_seeded(_Sometimes)], options=UNUSED),
    "a bucket view": Loop(plain, options={"gradient_as_bucket_view": True}),
    "a bucket view and two backwards": Loop(_two_backwards, options={"gradient_as_bucket_view": True}),
    "two dtypes": Loop(plain, lambda: [_MixedDtypes()], rtol=1e-6),
    "ignored parameters": Loop(plain, lambda: [_seeded(_Ignoring)]),
    "several buckets": Loop(plain, lambda: _wide(4_000)),
    "backward(inputs=some)": Loop(_some_inputs, options=UNUSED),
    "sparse": Loop(plain, lambda: [_seeded(_Sparse).double()], reductions=FAST),
    "edited through .data": Loop(_edited_through_data),
}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(8)
    return make()


def _first_forward(models: Models) -> None:
    if rank() == 0:
        _stray(models[0])


FIRST = {
    "a forward on one rank right after replicate": Loop(plain, first=_first_forward),
    "a forward on one rank right after replicate, unused allowed": Loop(plain, first=_first_forward, options=UNUSED),
}

LOOPS = {**STRAYS, **FIRST, **BACKWARDS, **SKIPS, **OLD, **SHARED_MEMORY, **PAIRS, **CHANGES, **WRAPPERS, **PARAMETERS}

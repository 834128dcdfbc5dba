"""Watch what trains: backwards with the loss's scale, clips, scalers, and gradients and parameters at each step.

Checksums of gradients and parameters are taken in the first steps, and in the steps whose windows differ from those
before. Under torch.compile a watched function is torch's own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Iterable
from typing import Any

from .imports import after_import
from .journal import Journal, checksum, replace
from .losses import factors_of
from .models import note_beside, note_held, note_large, watch_ddp, watch_modules, watch_sharding, watch_stages
from .state import HASHED, MOST_EVENTS, Recorder

_SMALL = 100_000  # parameters
_ALL, _EACH, _HASHED_SMALL = 20, 5, 400  # steps of a small model: all of the first, each fifth until the last
_ADDED = 3  # steps after an optimizer has got more parameters
_SECOND_LOOK = 5  # the step after which models beside the training are looked at again
_NORMS = 12  # windows in which gradient norms are taken


class _End(SystemExit):
    """The script has shown enough."""


def watch_training(journal: Journal) -> None:
    """Put the recorder around DDP, backward, optimizers, clipping, scaling and the conversion of batch norms."""

    recorder = Recorder(journal)
    watch_ddp(recorder)
    watch_modules(recorder)
    _watch_backward(recorder)
    _watch_optimizers(recorder)
    _watch_clipping(recorder)
    after_import("torch.distributed.fsdp", lambda fsdp: watch_sharding(recorder, fsdp))
    after_import("torch.distributed.pipelining.stage", lambda stages: watch_stages(recorder, stages))
    journal.is_gradient = lambda tensor: _is_gradient(recorder, tensor)
    journal.spreads = lambda: _norms(recorder)[1]


def _is_gradient(recorder: Recorder, tensor: Any) -> bool:
    """Return whether a tensor is the gradient of a known optimizer's parameter, or all of them in one."""
    gradients = [
        p.grad
        for optimizer in list(recorder.optimizers)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and not hasattr(p.grad, "placements")
    ]
    whole = sum(one.numel() for one in gradients)
    return tensor.numel() == whole > 1 or any(one.data_ptr() == tensor.data_ptr() for one in gradients)


def _count(parameters: Iterable[Any]) -> int:
    return sum(p.numel() for p in parameters)


def _watch_backward(recorder: Recorder) -> None:
    import torch

    journal = recorder.journal
    backward: Any = torch.autograd.backward  # which `Tensor.backward` calls
    inside = [False]  # checkpointing calls it again within

    def watched(tensors: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or inside[0] or journal.hidden or recorder.events > MOST_EVENTS:
            return backward(tensors, *args, **options)
        loss = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors), None)
        factors, node, units = None, "", None
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            with journal.safely:
                factors, node, units = factors_of(loss, recorder.scale)
        site = journal.site()
        journal.backwards += 1
        journal.reduced = False
        journal.shape.append(site)
        recorder.event("begin_backward", site=site)
        inside[0] = True
        try:
            result = backward(tensors, *args, **options)
        finally:
            inside[0] = False
        norm: float | None = None
        spreads: dict[int, float] = {}
        with journal.safely:
            norm, spreads = _norms(recorder)
        recorder.event(
            "backward",
            site=site,
            chain=journal.chain(),
            inside=recorder.depth > 0,
            scale=None if factors is None else math.prod(factors),
            factors=factors,
            node=node,
            units=units,
            norm=norm,
            spreads=spreads,
            given=journal.given,
            batch=journal.batch,
        )
        return result

    replace(torch.autograd, "backward", watched)


def _norms(recorder: Recorder) -> tuple[float | None, dict[int, float]]:
    """Return the norm of the gradients of all known optimizers, in the first windows of small models.

    And of each optimizer the sum of their absolute values over their norm, which no factor changes.
    """
    import torch

    if recorder.journal.windows >= _NORMS:
        return None, {}
    norms, spreads = [], {}
    with torch.no_grad():
        for optimizer, state in list(recorder.optimizers.items()):
            gradients = [
                parameter.grad.float()
                for group in optimizer.param_groups
                for parameter in group["params"]
                if isinstance(parameter.grad, torch.Tensor) and parameter.grad.layout == torch.strided
            ]
            if any(hasattr(one, "placements") for one in gradients):
                return None, {}
            if gradients:
                own = torch.stack([one.norm() for one in gradients])
                norms.append(own.norm())
                spreads[state["id"]] = float(torch.stack([one.norm(1) for one in gradients]).sum() / norms[-1])
        return (float(torch.stack(norms).norm()) if norms else None), spreads


def _watch_optimizers(recorder: Recorder) -> None:
    import torch
    from torch.optim import Optimizer
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    journal = recorder.journal
    make: Any = Optimizer.__init__
    zero: Any = Optimizer.zero_grad
    empty: Any = torch.nn.Module.zero_grad

    def init(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        _register(recorder, self, journal.site())

    def zeroed(self: Any, *args: Any, **options: Any) -> Any:
        since = journal.backwards or len(recorder.optimizers) > 1  # a backward, perhaps before another one's step
        if not torch.compiler.is_compiling() and since and (state := recorder.optimizers.get(self)):
            held = any(p.grad is not None for group in self.param_groups for p in group["params"])
            also = _sharing(recorder, optimizer=self)
            recorder.event("zero", opt=state["id"], also=also, held=held, site=journal.site())
        return zero(self, *args, **options)

    def emptied(self: Any, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling() and journal.backwards and not journal.hidden:
            with journal.safely:
                own = {id(p) for p in self.parameters()}
                for optimizer, state in list(recorder.optimizers.items()):
                    all_own = [p for group in optimizer.param_groups for p in group["params"]]
                    if all(id(p) in own for p in all_own):
                        held = any(p.grad is not None for p in all_own)
                        recorder.event("zero", opt=state["id"], also=[], held=held, site=journal.site())
        return empty(self, *args, **options)

    def before(optimizer: Any, args: Any, options: Any) -> None:
        if torch.compiler.is_compiling():
            return
        recorder.depth += 1
        state = recorder.optimizers.get(optimizer) or _register(recorder, optimizer, journal.site(3), late=True)
        if recorder.depth > 1:
            return
        with journal.safely:
            closure = any(callable(one) for one in (*args, *options.values()))
            _read_before(recorder, optimizer, state, closure)

    def after(optimizer: Any, args: Any, options: Any) -> None:
        if torch.compiler.is_compiling():
            return
        recorder.depth = max(0, recorder.depth - 1)
        state = recorder.optimizers.get(optimizer)
        if recorder.depth or state is None:
            return
        values: dict[str, Any] = {}
        with journal.safely:
            values = _read_after(recorder, optimizer, state) if state.get("now") else {}
            if state["steps"] == 3:
                note_large(recorder)
            if journal.windows == 1:
                note_held(recorder)
            if journal.windows in (1, _SECOND_LOOK):
                note_beside(recorder)
        recorder.event(
            "step",
            opt=state["id"],
            n=state["steps"],
            site=journal.site(3),
            norm=state["norm"],
            spreads=state["spreads"],
            load_s=journal.loading_s,
            **values,
        )
        journal.loading_s = 0.0
        state["steps"] += 1
        journal.windows += 1
        journal.backwards = 0
        if journal.windows >= (20 if journal.passes else 4) * journal.steps:
            journal.write("enough", steps=journal.windows)
            raise _End(0)

    replace(Optimizer, "__init__", init)
    replace(Optimizer, "zero_grad", zeroed)
    replace(torch.nn.Module, "zero_grad", emptied)
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _read_before(recorder: Recorder, optimizer: Any, state: dict[str, Any], closure: bool) -> None:
    """Take checksums and norms before a step. With a closure the gradients come within it."""
    odd, n = recorder.journal.shape != state["shape"], state["steps"]
    state["shape"], recorder.journal.shape = recorder.journal.shape, []
    chosen = n < HASHED or (state["size"] < _SMALL and (n < _ALL or (n < _HASHED_SMALL and n % _EACH == 0)))
    many = sum(len(group["params"]) for group in optimizer.param_groups)
    if many > state["many"]:
        state["many"], state["added"] = many, n + _ADDED
    state["now"] = chosen or n < state["added"] or (odd and state["odd"] < 2 * HASHED)
    state["odd"] += odd
    state["before"] = _checksums(optimizer, "data") if state["now"] else None
    state["grads"] = _checksums(optimizer, "grad") if state["now"] and not closure else None
    state["norm"], state["spreads"] = (None, {}) if closure else _norms(recorder)


def _read_after(recorder: Recorder, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded of a step: checksums around it, and the learning rates."""
    _describe_parameters(recorder, optimizer, state)
    values: dict[str, Any] = {
        "grads": state["grads"] if state["grads"] is not None else _checksums(optimizer, "grad"),
        "before": state["before"],
        "after": _checksums(optimizer, "data"),
        "lr": [float(group["lr"]) for group in optimizer.param_groups if "lr" in group],
    }
    if recorder.reduces is False and recorder.journal.backwards:
        values["sharded"] = _without_gradient(optimizer)
    if recorder.journal.backwards and not any(p.grad is not None for g in optimizer.param_groups for p in g["params"]):
        values["stray"] = _stray(recorder)
    return values


def _stray(recorder: Recorder) -> int:
    """Return how many parameters of living modules have a gradient and are in no optimizer."""
    import torch

    modules = [one for one in gc.get_objects() if issubclass(type(one), torch.nn.Module)]
    parameters = {id(p): p for one in modules for p in one.__dict__.get("_parameters", {}).values() if p is not None}
    own = {id(p) for o in list(recorder.optimizers) for group in o.param_groups for p in group["params"]}
    return sum(key not in own and p.grad is not None for key, p in parameters.items())


def _register(recorder: Recorder, optimizer: Any, site: str | None, late: bool = False) -> dict[str, Any]:
    if optimizer in recorder.optimizers:
        return recorder.optimizers[optimizer]
    number = recorder.number("optimizer", site)
    size = _count(p for group in optimizer.param_groups for p in group["params"])
    state = {
        "id": number,
        "steps": 0,
        "shape": [],
        "size": size,
        "odd": 0,
        "count": -1,
        "many": 0,
        "added": 0,
        "sharing": (1, []),
        "norm": None,
        "spreads": {},
    }
    recorder.optimizers[optimizer] = state
    recorder.event("optimizer", id=number, late=late, site=site)
    return state


def _describe_parameters(recorder: Recorder, optimizer: Any, state: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    flat = {id(p) for module in recorder.flat for p in module.parameters()}
    described = [
        [
            *recorder.names.get(id(p), (0, f"parameter {i} {tuple(p.shape)}")),
            id(p) in recorder.frozen,
            "flat"
            if id(p) in flat
            else "ignored"
            if id(p) in recorder.ignored and id(p) not in recorder.names
            else hasattr(p, "placements") or hasattr(p, "_ddparity_private"),
        ]
        for i, p in enumerate(parameters)
    ]
    if not recorder.fully_sharded and any(hasattr(p, "placements") for p in parameters):
        recorder.event("tensor_parallel")
    if described != state["count"]:
        state["count"] = described
        recorder.event("parameters", opt=state["id"], params=described, shared=any(map(_is_shared, parameters)))


def _is_shared(parameter: Any) -> bool:
    """Return whether other processes may train a parameter, too: it is in shared memory, or on an accelerator."""
    with contextlib.suppress(Exception):  # some kinds of tensors have no storage
        return not hasattr(parameter, "placements") and bool(parameter.is_shared())
    return False


def _checksums(optimizer: Any, what: str) -> list[int | None]:
    import torch

    found: list[int | None] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            value = parameter if what == "data" else parameter.grad
            if value is None or hasattr(value, "placements") or not isinstance(value, torch.Tensor):
                found.append(None)
            else:
                found.append(checksum(value))
    return found


def _without_gradient(optimizer: Any) -> bool:
    """Return whether no sharded parameter of an optimizer has a gradient."""
    own = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, "placements")]
    return bool(own) and all(p.grad is None for p in own)


def _largest(parameters: Any) -> float | None:
    """Return the largest absolute value of the gradients."""
    import torch

    every = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    gradients = [p.grad for p in every if p.grad is not None and not hasattr(p.grad, "placements") and p.grad.numel()]
    return max((float(one.abs().max()) for one in gradients), default=None)


def _sharing(recorder: Recorder, optimizer: Any) -> list[int]:
    """Return the other optimizers that step some of the same parameters, as one that wraps another does."""
    state, count = recorder.optimizers[optimizer], len(recorder.optimizers)
    if state["sharing"][0] != count:
        own = [p for group in optimizer.param_groups for p in group["params"]]
        state["sharing"] = count, [number for number in _owners(recorder, own) if number != state["id"]]
    found: list[int] = state["sharing"][1]
    return found


def _owners(recorder: Recorder, parameters: Any) -> list[int]:
    """Return the optimizers that step some of the parameters."""
    own = {id(parameters)} if hasattr(parameters, "grad") else {id(p) for p in parameters}
    return [
        state["id"]
        for optimizer, state in list(recorder.optimizers.items())
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"])
    ]


def _watch_clipping(recorder: Recorder) -> None:
    import torch
    from torch.amp import GradScaler

    journal = recorder.journal

    def clipped(function: Any, by_norm: bool) -> Any:
        @functools.wraps(function)
        def call(parameters: Any, *args: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling() or journal.hidden:
                return function(parameters, *args, **options)
            if not isinstance(parameters, torch.Tensor):
                parameters = list(parameters)
            largest = None
            with journal.safely:
                largest = None if by_norm or journal.windows >= _NORMS else _largest(parameters)
            journal.hidden += 1
            try:
                result = function(parameters, *args, **options)
            finally:
                journal.hidden -= 1
            limit = args[0] if args else next((options[n] for n in ("max_norm", "clip_value") if n in options), None)
            with journal.safely:
                norm = float(result) if by_norm and not hasattr(result, "placements") else largest
                recorder.event(
                    "clip",
                    of="norm" if by_norm else "largest value",
                    norm=norm,
                    limit=None if limit is None else float(limit),
                    scale=recorder.scale,
                    opts=[] if recorder.scale is None else _owners(recorder, parameters),
                    site=journal.site(),
                )
            return result

        return call

    module = torch.nn.utils
    for name, by_norm in (("clip_grad_norm_", True), ("clip_grad_value_", False)):
        function = clipped(getattr(module, name), by_norm)
        setattr(module, name, function)
        setattr(module.clip_grad, name, function)

    scale: Any = GradScaler.scale
    unscale: Any = GradScaler.unscale_
    step: Any = GradScaler.step

    def scaled(self: Any, outputs: Any) -> Any:
        result = scale(self, outputs)
        if self.is_enabled():
            recorder.scale = self.get_scale()
            recorder.event("scale", site=journal.site())
        return result

    def unscaled(self: Any, optimizer: Any) -> Any:
        if self.is_enabled():
            state = recorder.optimizers.get(optimizer)
            recorder.event("unscale", opt=state and state["id"], site=journal.site())
        return unscale(self, optimizer)

    def stepped(self: Any, optimizer: Any, *args: Any, **options: Any) -> Any:
        result = step(self, optimizer, *args, **options)
        if self.is_enabled() and (state := recorder.optimizers.get(optimizer)) is not None:
            recorder.event("scaler_step", opt=state["id"], site=journal.site())
        return result

    for name, watched in (("scale", scaled), ("unscale_", unscaled), ("step", stepped)):
        replace(GradScaler, name, watched)

"""Watch models and optimizers: DDP's forwards, backwards with the loss's scale, clips, and gradients at each step.

Checksums of gradients and parameters are taken in the first steps, and in the steps whose windows differ from those
before. Under torch.compile a watched function is torch's own.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable
from typing import Any

from .journal import Journal, batch_size, checksum, digest, replace
from .loaders import stream_states

_HASHED = 10  # steps of each optimizer
_HASHED_SMALL = 400  # of a small one
_SMALL = 100_000  # parameters
_MOST_EVENTS = 60_000
_LARGE_BUFFER = 2**20  # bytes
_NORMS = 12  # windows in which gradient norms are taken
_SUMS = ("AddBackward0", "SubBackward0")
_LINEAR = (
    *_SUMS,
    "MulBackward0",
    "MulBackward1",
    "DivBackward0",
    "NegBackward0",
    "ToCopyBackward0",
    "ViewBackward0",
    "SqueezeBackward0",
)
# Nodes of losses that are means over their samples.
MEANS = ("NllLoss", "Mean", "MseLoss", "BinaryCrossEntropy", "L1Loss", "SmoothL1", "HuberLoss", "KlDiv")


class _End(SystemExit):
    """The script has shown enough."""


class _Recorder:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.ddps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.names: dict[int, tuple[int, str]] = {}  # of the parameters in DDP, by id
        self.frozen: set[int] = set()
        self.optimizers: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self.depth = 0
        self.forwards = 0
        self.scale: float | None = None  # of a GradScaler
        self.events = 0
        self.evaluated: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
        self.large: dict[tuple[int, str], int] = {}  # checksums of large buffers
        self.fully_sharded = False
        self.reduces: bool | None = None  # the last switch of fully_shard's reduction
        self.shape: tuple[Any, ...] = ()  # of the window that is open

    def event(self, kind: str, /, **values: Any) -> None:
        self.events += 1
        if self.events < _MOST_EVENTS:
            self.journal.write(kind, **values)


def watch_training(journal: Journal) -> None:
    """Put the recorder around DDP, backward, optimizers, clipping, scaling and the conversion of batch norms."""

    recorder = _Recorder(journal)
    _watch_ddp(recorder)
    _watch_backward(recorder)
    _watch_optimizers(recorder)
    _watch_clipping(recorder)
    _watch_modules(recorder)
    journal.is_gradient = lambda tensor: _is_gradient(recorder, tensor)


def _is_gradient(recorder: _Recorder, tensor: Any) -> bool:
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


def _watch_ddp(recorder: _Recorder) -> None:
    import torch
    import torch.distributed.fsdp as fsdp
    from torch.distributed.algorithms.join import Join
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel as DDP

    journal = recorder.journal
    make: Any = DDP.__init__
    forward: Any = DDP.forward
    join: Any = Join.__enter__
    hook: Any = DDP.register_comm_hook

    def init(self: Any, module: Any, *args: Any, **options: Any) -> None:
        journal.hidden += 1
        try:
            make(self, module, *args, **options)
        finally:
            journal.hidden -= 1
            journal.collectives += 1
        recorder.ddps[self] = number = len(recorder.ddps) + 1
        ignored = set(getattr(self, "parameters_to_ignore", ()))
        frozen = []
        for name, parameter in module.named_parameters():
            if name in ignored:
                continue
            recorder.names[id(parameter)] = (number, name)
            if not parameter.requires_grad:
                frozen.append(name)
                recorder.frozen.add(id(parameter))
        norms = [(name, *_norm(one)) for name, one in module.named_modules() if _norm(one)[0]]
        large = [
            (name, checksum(buffer), buffer.nbytes)
            for name, buffer in module.named_buffers()
            if buffer.nbytes >= _LARGE_BUFFER
        ]
        recorder.large |= {(number, name): value for name, value, _ in large}
        recorder.event(
            "ddp",
            id=number,
            site=journal.site(),
            type=type(module).__name__,
            frozen=frozen,
            ignored=sorted(ignored),
            norms=norms,
            large=large,
            unused=bool(self.find_unused_parameters),
            broadcasts=bool(self.broadcast_buffers),
            ranks=torch.distributed.get_process_group_ranks(self.process_group),
        )

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or recorder.events > _MOST_EVENTS:
            return forward(self, *args, **options)
        number = recorder.ddps.get(self)
        hashed = journal.windows < _HASHED or recorder.forwards < _HASHED
        recorder.forwards += 1
        grad = torch.is_grad_enabled()
        values: dict[str, Any] = {"n": batch_size((args, options))}
        if hashed:
            values["x"] = digest((args, options))
            values["rng"] = stream_states()[0]
            if self.training and any(m.p for m in self.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)):
                values["dropout"] = True
        else:
            values["x"] = None
        recorder.event(
            "forward",
            ddp=number,
            train=bool(self.training),
            grad=grad,
            sync=bool(grad and self.require_backward_grad_sync),
            site=journal.site(),
            **values,
        )
        return forward(self, *args, **options)

    def joined(self: Any) -> Any:
        recorder.event("join", site=journal.site())
        return join(self)

    def hooked(self: Any, *args: Any, **options: Any) -> Any:
        recorder.event("hook", ddp=recorder.ddps.get(self), site=journal.site())
        return hook(self, *args, **options)

    def switched(self: Any, wanted: bool, *args: Any, **options: Any) -> Any:
        recorder.reduces, site = bool(wanted), journal.site()
        recorder.event("reduces", wanted=recorder.reduces, site=site)
        return switch(self, wanted, *args, **options)

    def sharded(module: Any, *args: Any, **options: Any) -> Any:
        mesh = options.get("mesh")
        every = range(torch.distributed.get_world_size() if mesh is None else 0)
        ranks = sorted(mesh.mesh.flatten().tolist()) if mesh is not None else list(every)
        recorder.fully_sharded = True
        recorder.event("fsdp", ranks=ranks, site=journal.site())
        return shard(module, *args, **options)

    shard: Any = fsdp.fully_shard
    replace(fsdp, "fully_shard", sharded)
    switch: Any = FSDPModule.set_requires_gradient_sync
    replace(FSDPModule, "set_requires_gradient_sync", switched)
    for name, function in (("__init__", init), ("forward", watched), ("register_comm_hook", hooked)):
        replace(DDP, name, function)
    replace(Join, "__enter__", joined)


def _norm(module: Any) -> tuple[str, bool]:
    """Return the kind of a batch norm, and whether it takes statistics over the ranks; "" for another module."""
    import torch

    kind = type(module)
    if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return "", False
    if isinstance(module, torch.nn.modules.instancenorm._InstanceNorm):
        return "", False
    own = kind.__module__.startswith("ddparity.")
    return kind.__name__, isinstance(module, torch.nn.SyncBatchNorm) or own


def _count(parameters: Iterable[Any]) -> int:
    return sum(p.numel() for p in parameters)


def _watch_backward(recorder: _Recorder) -> None:
    import torch

    journal = recorder.journal
    backward: Any = torch.autograd.backward  # which `Tensor.backward` calls
    inside = [False]  # checkpointing calls it again within

    def watched(tensors: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or inside[0] or journal.hidden or recorder.events > _MOST_EVENTS:
            return backward(tensors, *args, **options)
        loss = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors), None)
        scalar = isinstance(loss, torch.Tensor) and loss.numel() == 1
        scale, node, units = _scale_of(loss, recorder.scale) if scalar else (None, "", None)
        site = journal.site()
        journal.backwards += 1
        recorder.shape = (*recorder.shape, site)
        recorder.event("begin_backward", site=site)
        inside[0] = True
        try:
            result = backward(tensors, *args, **options)
        finally:
            inside[0] = False
        journal.collectives += 1  # DDP's, which ends before `backward` does
        recorder.event(
            "backward",
            site=site,
            chain=journal.chain(),
            inside=recorder.depth > 0,
            scale=scale,
            node=node,
            units=units,
            norm=_norms(recorder),
        )
        return result

    replace(torch.autograd, "backward", watched)


def _scale_of(loss: Any, scaler: float | None) -> tuple[float | None, str, float | None]:
    """Return a loss's constant factor, the node of autograd below it, and the units of its mean where torch keeps them.

    The factor is read off the multiplications and divisions by constants that end the graph. None: by another tensor.
    """
    node, factor = loss.grad_fn, 1.0
    for _ in range(8):
        if node is None:
            break
        name = node.name()
        if name not in ("MulBackward0", "DivBackward0"):
            break
        other = getattr(node, "_saved_other", None)
        if name == "MulBackward0" and other is None:
            other = getattr(node, "_saved_self", None)
        below = [one for one, _ in node.next_functions if one is not None]
        if len(below) != 1 or other is None or other.numel() != 1:
            return None, name, None
        value = float(other)
        if name == "MulBackward0" and scaler is not None and value == scaler:
            value, scaler = 1.0, None
        factor = factor * value if name == "MulBackward0" else factor / value if value else math.nan
        node = below[0]
    units = None
    name = _name_of(node)
    if name.startswith("NllLoss") and getattr(node, "_saved_reduction", None) == 1 and node._saved_weight is None:
        units = float(node._saved_total_weight)
    return factor, name, units


def _name_of(node: Any, depth: int = 6) -> str:
    """Return the name of a node of autograd; of a weighted sum of means, that of one of them."""
    if node is None:
        return ""
    name = str(node.name())
    if getattr(node, "_saved_reduction", 1) != 1:
        return f"{name}:sum"
    if depth and name in _LINEAR:
        below = [one for one, _ in node.next_functions if one is not None]
        factors = [getattr(node, key, None) for key in ("_saved_self", "_saved_other")]
        if all(getattr(one, "numel", lambda: 1)() == 1 for one in factors):
            names = [_name_of(one, depth - 1) for one in below]
            if any(one.name() == "MulBackward1" for one in below) and any(n.startswith("NllLoss") for n in names):
                return "NllLoss"  # with label smoothing
            others = [one for one in names if ":sum" in one or not one.startswith(MEANS)]
            if names and (name in _SUMS or len(names) == 1):
                return others[0] if others else names[0]
    return name


def _norms(recorder: _Recorder) -> float | None:
    """Return the norm of the gradients of all known optimizers, in the first windows of small models."""
    import torch

    if recorder.journal.windows >= _NORMS:
        return None
    gradients = [
        parameter.grad
        for optimizer in list(recorder.optimizers)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if isinstance(parameter.grad, torch.Tensor) and parameter.grad.layout == torch.strided
    ]
    if not gradients or any(hasattr(one, "placements") for one in gradients):
        return None
    with torch.no_grad():
        return float(torch.stack([one.float().norm() for one in gradients]).norm())


def _watch_optimizers(recorder: _Recorder) -> None:
    import torch
    from torch.optim import Optimizer
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    journal = recorder.journal
    make: Any = Optimizer.__init__
    zero: Any = Optimizer.zero_grad

    def init(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        _register(recorder, self, journal.site())

    def zeroed(self: Any, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling() and journal.backwards and (state := recorder.optimizers.get(self)):
            held = any(p.grad is not None for group in self.param_groups for p in group["params"])
            recorder.event("zero", opt=state["id"], held=held, site=journal.site())
        return zero(self, *args, **options)

    def before(optimizer: Any, args: Any, options: Any) -> None:
        if torch.compiler.is_compiling():
            return
        recorder.depth += 1
        state = recorder.optimizers.get(optimizer) or _register(recorder, optimizer, journal.site(3), late=True)
        if recorder.depth > 1 or not state["recorded"]:
            return
        closure = next((one for one in (*args, *options.values()) if callable(one)), None)
        odd = recorder.shape != state["shape"]
        state["shape"] = recorder.shape
        most = _HASHED_SMALL if state["size"] < _SMALL else _HASHED
        state["now"] = state["steps"] < most or (odd and state["odd"] < 2 * _HASHED)
        state["odd"] += odd
        state["before"] = _checksums(optimizer, "data") if state["now"] else None
        state["grads"] = _checksums(optimizer, "grad") if state["now"] and closure is None else None
        state["norm"] = _norms(recorder) if closure is None else None

    def after(optimizer: Any, args: Any, options: Any) -> None:
        if torch.compiler.is_compiling():
            return
        recorder.depth = max(0, recorder.depth - 1)
        state = recorder.optimizers.get(optimizer)
        if recorder.depth or state is None or not state["recorded"]:
            return
        values: dict[str, Any] = {}
        if state.get("now"):
            _describe_parameters(recorder, optimizer, state)
            values["grads"] = state["grads"] if state["grads"] is not None else _checksums(optimizer, "grad")
            values["before"], values["after"] = state["before"], _checksums(optimizer, "data")
            if recorder.reduces is False and journal.backwards:
                values["sharded"] = _without_gradient(optimizer)
            values["lr"] = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if state["steps"] == 3:
            _note_large(recorder)
        if journal.windows == 1:
            _note_held(recorder)
        recorder.event("step", opt=state["id"], n=state["steps"], site=journal.site(3), norm=state["norm"], **values)
        state["steps"] += 1
        journal.windows += 1
        journal.backwards = 0
        recorder.shape = ()
        if journal.windows >= (20 if journal.passes else 4) * journal.steps:
            journal.write("enough", steps=journal.windows)
            raise _End(0)

    replace(Optimizer, "__init__", init)
    replace(Optimizer, "zero_grad", zeroed)
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _note_large(recorder: _Recorder) -> None:
    """Record which large buffers have not changed since DDP was made."""
    for ddp, number in list(recorder.ddps.items()):
        same = [
            name
            for name, buffer in ddp.module.named_buffers()
            if (number, name) in recorder.large and recorder.large[number, name] == checksum(buffer)
        ]
        if same:
            recorder.event("large", ddp=number, same=same)


def _note_held(recorder: _Recorder) -> None:
    """Record the parameters of models that were put into eval mode before the training, and still are: teachers."""
    for model, site in list(recorder.evaluated.items()):
        own = list(model.parameters())
        if own and not model.training and not any(id(p) in recorder.names or hasattr(p, "placements") for p in own):
            frozen = not any(p.requires_grad for p in own)
            values = digest([checksum(p) for p in own])
            recorder.event("held", type=type(model).__name__, site=site, frozen=frozen, parameters=values)


def _register(recorder: _Recorder, optimizer: Any, site: str | None, late: bool = False) -> dict[str, Any]:
    if optimizer in recorder.optimizers:
        return recorder.optimizers[optimizer]
    number = len(recorder.optimizers) + 1
    size = _count(p for group in optimizer.param_groups for p in group["params"])
    state = {"id": number, "steps": 0, "shape": (), "size": size, "odd": 0, "count": -1, "recorded": True}
    recorder.optimizers[optimizer] = state
    recorder.event("optimizer", id=number, late=late, site=site)
    return state


def _describe_parameters(recorder: _Recorder, optimizer: Any, state: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    described = [
        [
            *recorder.names.get(id(p), (0, f"parameter {i} {tuple(p.shape)}")),
            id(p) in recorder.frozen,
            hasattr(p, "placements") or hasattr(p, "_ddparity_private"),
        ]
        for i, p in enumerate(parameters)
    ]
    if not recorder.fully_sharded and any(hasattr(p, "placements") for p in parameters):
        recorder.event("tensor_parallel")
    if described != state["count"]:
        state["count"] = described
        recorder.event("parameters", opt=state["id"], params=described)


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


def _watch_clipping(recorder: _Recorder) -> None:
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
            journal.hidden += 1
            try:
                result = function(parameters, *args, **options)
            finally:
                journal.hidden -= 1
            limit = args[0] if args else next((options[n] for n in ("max_norm", "clip_value") if n in options), None)
            norm = float(result) if by_norm and not hasattr(result, "placements") else None
            recorder.event("clip", norm=norm, limit=None if limit is None else float(limit), site=journal.site())
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
            recorder.event("unscale", site=journal.site())
        return unscale(self, optimizer)

    def stepped(self: Any, optimizer: Any, *args: Any, **options: Any) -> Any:
        result = step(self, optimizer, *args, **options)
        if self.is_enabled() and (state := recorder.optimizers.get(optimizer)) is not None:
            recorder.event("scaler_step", opt=state["id"], site=journal.site())
        return result

    for name, watched in (("scale", scaled), ("unscale_", unscaled), ("step", stepped)):
        replace(GradScaler, name, watched)


def _watch_modules(recorder: _Recorder) -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel as DDP

    journal = recorder.journal
    evaluate: Any = torch.nn.Module.eval
    compiling: Any = torch.compile
    convert: Any = torch.nn.SyncBatchNorm.__dict__["convert_sync_batchnorm"].__func__

    def watched(self: Any) -> Any:
        result = evaluate(self)
        if not torch.compiler.is_compiling() and not journal.hidden and not journal.windows:
            recorder.evaluated[self] = journal.site()
        if not torch.compiler.is_compiling() and journal.windows and not journal.hidden and recorder.events < 5_000:
            buffers = {name: checksum(b) for name, b in self.named_buffers() if not hasattr(b, "placements")}
            inside = [one for one in self.modules() if isinstance(one, DDP)]
            known = {recorder.names[id(p)][0] for p in self.parameters() if id(p) in recorder.names}
            parameters = [checksum(p) for p in self.parameters() if not hasattr(p, "placements")]
            recorder.event(
                "eval",
                type=type(self).__name__,
                wrapped=bool(inside),
                ddps=sorted(known),
                buffers=buffers,
                parameters=digest(parameters) if journal.windows < 400 else None,
                site=journal.site(),
            )
        return result

    def compiled(*args: Any, **options: Any) -> Any:
        recorder.event("compile", site=journal.site())
        return compiling(*args, **options)

    def converted(cls: Any, module: Any, *args: Any, **options: Any) -> Any:
        wrapped = any(isinstance(one, DDP) for one in module.modules())
        if wrapped or (not journal.hidden and any(id(p) in recorder.names for p in module.parameters())):
            recorder.event("converted", site=journal.site())
        journal.hidden += 1
        try:
            return convert(cls, module, *args, **options)
        finally:
            journal.hidden -= 1

    replace(torch.nn.Module, "eval", watched)
    replace(torch, "compile", compiled)
    replace(torch.nn.SyncBatchNorm, "convert_sync_batchnorm", classmethod(functools.wraps(convert)(converted)))

"""Watch models: DDP and its forwards, sharding, batch norms that are converted, and models that are evaluated."""

from __future__ import annotations

import functools
import gc
import weakref
from types import ModuleType
from typing import Any

from .journal import batch_size, checksum, digest, replace
from .private import private
from .state import HASHED, MOST_EVENTS, Recorder
from .streams import stream_states

_LARGE_BUFFER = 2**20  # bytes
_EVALUATIONS = 20  # from a line, whose checksums are taken: some scripts put a part into eval mode in each step


def watch_ddp(recorder: Recorder) -> None:
    import torch
    from torch.distributed.algorithms.join import Join
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
        recorder.ddps[self] = number = recorder.number("ddp", journal.site())
        weakref.finalize(self, _forget, recorder, number).atexit = False
        with journal.safely:
            ignored = set(getattr(self, "parameters_to_ignore", ()))
            frozen = []
            for name, parameter in module.named_parameters():
                if name in ignored:
                    recorder.ignored[id(parameter)] = number
                    continue
                recorder.names[id(parameter)] = (number, name)
                if not parameter.requires_grad:
                    frozen.append(name)
                    recorder.frozen[id(parameter)] = number
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
                ranks=_ranks(self.process_group),
            )

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or recorder.events > MOST_EVENTS:
            return forward(self, *args, **options)
        with journal.safely:
            number = recorder.ddps.get(self)
            hashed = journal.windows < HASHED or recorder.forwards < HASHED
            recorder.forwards += 1
            grad = torch.is_grad_enabled()
            values: dict[str, Any] = {"n": batch_size((args, options))}
            if self.will_sync_module_buffers():
                values["buffers"] = True
            if hashed:
                values["x"] = digest((args, options))
                values["rng"] = stream_states()[0]
                if private().drops_out(self):
                    values["dropout"] = True
            else:
                values["x"] = None
            recorder.event(
                "forward",
                ddp=number,
                train=bool(self.module.training),  # Lightning leaves the wrapper in eval mode
                grad=grad,
                sync=bool(grad and self.require_backward_grad_sync),
                given=journal.given,
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

    for name, function in (("__init__", init), ("forward", watched), ("register_comm_hook", hooked)):
        replace(DDP, name, function)
    replace(Join, "__enter__", joined)


def _ranks(group: Any) -> list[int]:
    import torch

    return torch.distributed.get_process_group_ranks(group)


def _forget(recorder: Recorder, number: int) -> None:
    """Forget the parameters of a DDP that is gone: others may get their ids."""
    recorder.names = {key: value for key, value in recorder.names.items() if value[0] != number}
    recorder.ignored = {key: value for key, value in recorder.ignored.items() if value != number}
    recorder.frozen = {key: value for key, value in recorder.frozen.items() if value != number}


def watch_sharding(recorder: Recorder, fsdp: ModuleType) -> None:
    """Put the recorder around both ways to shard a model, once the script has imported them: that takes long."""
    import torch

    journal = recorder.journal
    flatten: Any = fsdp.FullyShardedDataParallel.__init__
    shard: Any = fsdp.fully_shard
    switch: Any = fsdp.FSDPModule.set_requires_gradient_sync

    def switched(self: Any, requires_gradient_sync: bool, *args: Any, **options: Any) -> Any:
        recorder.reduces, site = bool(requires_gradient_sync), journal.site()
        recorder.event("reduces", wanted=recorder.reduces, site=site)
        return switch(self, requires_gradient_sync, *args, **options)

    def sharded(module: Any, *args: Any, **options: Any) -> Any:
        mesh = options.get("mesh")
        every = range(torch.distributed.get_world_size() if mesh is None else 0)
        ranks = sorted(mesh.mesh.flatten().tolist()) if mesh is not None else list(every)
        recorder.fully_sharded = True
        recorder.event("fsdp", ranks=ranks, site=journal.site())
        return shard(module, *args, **options)

    def flattened(self: Any, *args: Any, **options: Any) -> None:
        flatten(self, *args, **options)
        recorder.flat.add(self)
        recorder.event("fsdp", ranks=sorted(_ranks(self.process_group)), site=journal.site())

    replace(fsdp.FullyShardedDataParallel, "__init__", flattened)
    replace(fsdp, "fully_shard", sharded)
    replace(fsdp.FSDPModule, "set_requires_gradient_sync", switched)


def watch_stages(recorder: Recorder, stages: ModuleType) -> None:
    """Record that a pipeline gives each rank a stage of the model, once the script has imported torch's pipelining."""
    stage: Any = private().pipeline_stage(stages)
    make: Any = stage.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        recorder.event("pipeline", site=recorder.journal.site())

    replace(stage, "__init__", init)


def _norm(module: Any) -> tuple[str, bool]:
    """Return the kind of a batch norm, and whether it takes statistics over the ranks; "" for another module."""
    import torch

    kind = type(module)
    if not private().is_batch_norm(module):
        return "", False
    own = kind.__module__.startswith("ddparity.")
    return kind.__name__, isinstance(module, torch.nn.SyncBatchNorm) or own


def note_large(recorder: Recorder) -> None:
    """Record which large buffers have not changed since DDP was made."""
    for ddp, number in list(recorder.ddps.items()):
        same = [
            name
            for name, buffer in ddp.module.named_buffers()
            if (number, name) in recorder.large and recorder.large[number, name] == checksum(buffer)
        ]
        if same:
            recorder.event("large", ddp=number, same=same)


def note_held(recorder: Recorder) -> None:
    """Record the parameters of models that were put into eval mode before the training, and still are: teachers."""
    for model, site in list(recorder.evaluated.items()):
        own = list(model.parameters())
        if own and not model.training and not any(id(p) in recorder.names or hasattr(p, "placements") for p in own):
            frozen = not any(p.requires_grad for p in own)
            values = digest([checksum(p) for p in own])
            recorder.event("held", type=type(model).__name__, site=site, frozen=frozen, parameters=values)


def note_beside(recorder: Recorder) -> None:
    """Record the parameters of models in no DDP and no optimizer: frozen ones, averages that a script makes itself."""
    import torch

    journal = recorder.journal
    modules = [one for one in gc.get_objects() if issubclass(type(one), torch.nn.Module)]
    inner = {id(child) for one in modules for child in one.__dict__.get("_modules", {}).values()}
    trained = {id(p) for o in list(recorder.optimizers) for group in o.param_groups for p in group["params"]}
    known = trained | recorder.names.keys() | recorder.ignored.keys()
    for model in (found for one in modules if id(one) not in inner for found in _outside(one, known)):
        own = list(model.parameters())
        recorder.event(
            "beside",
            type=type(model).__name__,
            size=sum(p.numel() for p in own),
            frozen=not any(p.requires_grad for p in own),
            parameters=digest([checksum(p) for p in own]),
            steps=journal.windows,
            site=journal.site(4),
        )


def _outside(module: Any, known: set[int]) -> list[Any]:
    """Return the largest parts of a module that have parameters, and none that is known or a shard."""
    own = list(module.parameters())
    if any(hasattr(p, "placements") or hasattr(p, "_ddparity_private") or hasattr(p, "_local_shard") for p in own):
        return []
    if not any(id(p) in known for p in own):
        return [module] if own else []
    return [found for child in module.children() for found in _outside(child, known)]


def _note_evaluated(recorder: Recorder, model: Any, site: str | None) -> None:
    """Record the buffers and parameters of a model that is put into eval mode after optimizer steps."""
    buffers = {name: checksum(b) for name, b in model.named_buffers() if not hasattr(b, "placements")}
    known = {recorder.names[id(p)][0] for p in model.parameters() if id(p) in recorder.names}
    parameters = [checksum(p) for p in model.parameters() if not hasattr(p, "placements")]
    recorder.event(
        "eval",
        type=type(model).__name__,
        ddps=sorted(known),
        buffers=buffers,
        parameters=digest(parameters) if recorder.journal.windows < 400 else None,
        steps=recorder.journal.windows,
        site=site,
    )


def watch_modules(recorder: Recorder) -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel as DDP

    journal = recorder.journal
    evaluate: Any = torch.nn.Module.eval
    compiling: Any = torch.compile
    convert: Any = torch.nn.SyncBatchNorm.__dict__["convert_sync_batchnorm"].__func__

    def watched(self: Any) -> Any:
        result = evaluate(self)
        if torch.compiler.is_compiling() or journal.hidden:
            return result
        site = journal.site()
        if not journal.windows:
            recorder.evaluated[self] = site
        elif recorder.evaluations[site] < _EVALUATIONS:
            recorder.evaluations[site] += 1
            with journal.safely:
                _note_evaluated(recorder, self, site)
        return result

    def compiled(*args: Any, **options: Any) -> Any:
        journal.compiles = True
        recorder.event("compile", site=journal.site())
        return compiling(*args, **options)

    def converted(cls: Any, module: Any, *args: Any, **options: Any) -> Any:
        with journal.safely:
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

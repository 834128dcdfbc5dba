"""A model on every rank, whose gradients are those of the global batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..batchnorm import Room, shared_layers
from ..comm.allreduce import sum_hook
from ..compat import comm_hooks
from ..runtime.agreement import agreed
from .strict import sparse_refusal

logger = logging.getLogger(__name__)

Reduction = Literal["fast", "strict"]
Statistics = Literal["all", "rank0"]

_TERMS = "_ddparity_terms"


@dataclass
class Terms:
    """What `replicate` was asked for, kept on what it returned. `room`: see `RunningStatistics`.

    `buffers_equal`: the construction, or the last step in `accumulate`, left the same buffers on all ranks.
    """

    reduction: Reduction = "fast"
    batchnorm_statistics: Statistics = "all"
    room: Room = field(default_factory=Room)
    buffers_equal: bool = True


def replicate(
    model: nn.Module,
    reduction: Reduction = "fast",
    batchnorm_statistics: Statistics = "all",
    **ddp_options: Any,
) -> DistributedDataParallel | nn.Module:
    """Wrap a model in torch's DistributedDataParallel so that gradients are summed over the ranks, not averaged.

    With losses weighted by `accumulate`, whose weights sum to one over all ranks, the gradients after a step are those
    of the global batch's mean loss. In a world of one, with or without a process group, returns the model itself.

    Args:
        model: on its device, the same parameters' shapes on every rank; rank 0's values are broadcast.
        reduction: "fast", DDP's own overlapped reduction. "strict", in `accumulate`: gradients are summed along one
            binary tree over the step's micro-batches, so that parameters, optimizer state and buffers have the same
            bits on any number of processes, given the hardware, the torch version and the intra-op threads a process.
        batchnorm_statistics: whose batches move the running statistics of plain batch norms, in `accumulate`: "all"
            micro-batches', in their order, as in one process; "rank0": rank 0's, as in DDP (`broadcast_buffers`).
        ddp_options: of DistributedDataParallel: `find_unused_parameters`, `static_graph`, `process_group`, …

    Collectives: DDP's: at construction the parameters and buffers; a step the gradients once, and the buffers once in
    the first forward (`broadcast_buffers`), in `accumulate` not if all of them are running statistics that are equal
    anyway since construction or the last step: those that it exchanges, and those of norms synchronised over all ranks.
    A strict one also agrees on the number of threads, at construction, through the group's store.

    Raises:
        TypeError: the model is wrapped already, or no module.
        ValueError: an option is unknown. For strict: a batch norm is synchronised over several ranks, an embedding has
            sparse gradients, static_graph or mixed_precision is set, or the ranks' numbers of intra-op threads differ
            (`RankFailure` on those that came first).

    Source: https://pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """
    for name, value, known in (
        ("reduction", reduction, get_args(Reduction)),
        ("batchnorm_statistics", batchnorm_statistics, get_args(Statistics)),
    ):
        if value not in known:
            raise ValueError(f'replicate({name}={value!r}) is unknown: use "{known[0]}" or "{known[1]}"')
    if not isinstance(model, nn.Module):
        raise TypeError(f"replicate() got a {type(model).__name__}: give a torch.nn.Module")
    if isinstance(model, DistributedDataParallel):
        raise TypeError("replicate() got a DistributedDataParallel: give the module inside, model.module")
    if reduction == "strict":
        _check_strict(model, ddp_options)
    if not dist.is_initialized() or dist.get_world_size(ddp_options.get("process_group")) == 1:
        # The user's own object goes back: a note on it tells `accumulate` what to do. Of words alone, so that a pickle
        # of the model needs no ddparity.
        model.__dict__.pop(_TERMS, None)
        if reduction == "strict":
            model.__dict__[_TERMS] = (reduction, batchnorm_statistics)
        return model
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None and device.type == "cuda":
        ddp_options.setdefault("device_ids", [device])
    replicated = DistributedDataParallel(model, **ddp_options)
    replicated.register_comm_hook(replicated.process_group, sum_hook)
    terms = Terms(reduction, batchnorm_statistics, buffers_equal=ddp_options.get("init_sync", True))
    replicated.__dict__[_TERMS] = terms
    return replicated


def _check_strict(model: nn.Module, ddp_options: dict[str, Any]) -> None:
    """Refuse what has no strict reduction. Every rank has the same model and options, so all refuse alike."""
    if synchronised := [name for name, _ in shared_layers(model)]:
        raise ValueError(
            f'replicate(reduction="strict"): {synchronised[0]} is a SyncBatchNorm, whose statistics are those of the '
            f"micro-batches that run at the same time, so that the result depends on the number of processes: use "
            f'reduction="fast", or plain batch norms (revert_sync_batchnorm(model))'
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(sparse_refusal(f"{name}.weight" if name else "weight"))
    for option, instead in (("static_graph", "leave it out"), ("mixed_precision", "use torch.autocast")):
        if ddp_options.get(option):
            raise ValueError(
                f'replicate(reduction="strict", {option}={ddp_options[option]!r}): DDP does that in a backward that '
                f"reduces, and strict reduces after the last: {instead}"
            )
    threads = torch.get_num_threads()
    with agreed('replicate(reduction="strict")', ddp_options.get("process_group")) as agreement:
        if agreement is not None:
            agreement.same("the number of intra-op threads (OMP_NUM_THREADS, torch.set_num_threads)", threads)
    logger.info("strict: the bits are those of %d intra-op threads a process, on any number of processes", threads)


def terms_of(model: nn.Module) -> Terms | None:
    """What `replicate` was asked for; None for a module that it did not return, or did in a world of one, "fast"."""
    asked = model._modules.get("_orig_mod") or model  # inside of torch.compile
    kept: Terms | tuple[Reduction, Statistics] | None = asked.__dict__.get(_TERMS)
    return Terms(*kept) if isinstance(kept, tuple) else kept


def averages(model: DistributedDataParallel) -> bool:
    """Whether a DDP module divides its gradients by the world size, as DDP does without `replicate`."""
    return sum_hook not in comm_hooks(model)

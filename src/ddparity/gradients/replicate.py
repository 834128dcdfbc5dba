"""A model on every rank, whose gradients are those of the global batch."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..batchnorm import shared_layers
from ..compat import holds_old_fsdp, sharded_modules, uncompiled
from ..runtime.agreement import agreed
from ..runtime.world import check_joined
from .replica import CHECK_EVERY, Reduction, Statistics, Words, asked, forget, refuse_nested
from .strict import sparse_refusal

logger = logging.getLogger(__name__)

CommHook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]  # of a state and a dist.GradBucket


def replicate(
    model: nn.Module,
    reduction: Reduction = "fast",
    batchnorm_statistics: Statistics = "all",
    check_every: int = CHECK_EVERY,
    recheck_every: int | None = None,
    comm_hook: CommHook | tuple[Any, CommHook] | None = None,
    **ddp_options: Any,
) -> DistributedDataParallel | nn.Module:
    """Wrap a model in torch's DistributedDataParallel, for the steps of `accumulate`.

    With losses weighted by `accumulate` the gradients after a step are those of the global batch's mean loss. Outside
    of `accumulate` the model is plain DDP, which averages gradients over the ranks in every backward. In a world of
    one, with or without a process group, return the model itself.

    Args:
        model: on its device, the same parameters' shapes on every rank; rank 0's values are broadcast.
        reduction: "fast", one average of the gradients a step; a large model's is overlapped with the last backward.
            "strict", in `accumulate`: gradients are summed along one binary tree over the step's micro-batches, so that
            parameters, optimizer state and buffers have the same bits on any number of processes, given the hardware,
            the torch version and the intra-op threads a process.
        batchnorm_statistics: whose batches move the running statistics of plain batch norms, in `accumulate`: "all"
            micro-batches', in their order, as in one process; "rank0": rank 0's, as in DDP (`broadcast_buffers`).
        check_every: compare the ranks' parameters after every so many steps of `accumulate`; 0: never. It compares them
            at the start of each epoch, too.
        recheck_every: in every so many steps of `accumulate`, and in an epoch's first, each rank also runs one of
            another rank's micro-batches, and the ranks compare the bits of both gradients, and of the weights.
            `WrongArithmetic` names the device that is wrong on every rank, and the step is not taken. The loop gets one
            micro-batch more, two at the first use, with `.recheck` True and a `.share` of 0. None: never.
        comm_hook: how DDP's buckets are reduced, fast only: a communication hook of torch, as `bf16_compress_hook`, or
            `(state, hook)`, as `(PowerSGDState(None), powerSGD_hook)`. It gets DDP's process group where no state is
            given. A world of one leaves it out, and a step that leaves a rank without a micro-batch does.
        ddp_options: of DistributedDataParallel: `find_unused_parameters`, `static_graph`, `process_group`, …

    Collectives: DDP's: at construction the parameters and buffers; a step the gradients once, and the buffers once in
    the first forward (`broadcast_buffers`), in `accumulate` not if all of them are running statistics that are equal
    anyway since construction or the last step: those that it exchanges, and those of norms synchronised over all ranks.
    A strict one also agrees on the number of threads, at construction, through the group's store.

    Raises:
        TypeError: the model is wrapped or sharded already, or no module, or `comm_hook` is no function.
        RuntimeError: a launcher started this process as one of several, and it has not joined them.
        ValueError: an option is unknown. For strict: the model is sharded by `fully_shard`, a batch norm is
            synchronised over several ranks, an embedding has sparse gradients, static_graph, mixed_precision or
            comm_hook is set, or the ranks' numbers of intra-op threads differ (`RankFailure` on those that came
            first).

    Sources: https://pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html,
    https://pytorch.org/docs/stable/ddp_comm_hooks.html
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
    _refuse_sharded(model, reduction)
    refuse_nested(model, "replicate() got a module that holds a DistributedDataParallel")
    check_joined("replicate() was called")
    words = (reduction, batchnorm_statistics, operator.index(check_every), _checked_recheck(model, recheck_every))
    state_and_hook = _checked_hook(comm_hook, reduction, recheck_every)
    _agree(model, words, comm_hook is not None, ddp_options.get("process_group"))
    if reduction == "strict":
        _check_strict(model, ddp_options)
    if not dist.is_initialized() or dist.get_world_size(ddp_options.get("process_group")) == 1:
        # The user's own object goes back: a note on it tells `accumulate` what to do. Of words alone, so that a pickle
        # of the model needs no ddparity.
        forget(uncompiled(model))
        if reduction == "strict":
            asked(uncompiled(model), words, equal=True)
        return model
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None and device.type == "cuda":
        ddp_options.setdefault("device_ids", [device])
    replicated = DistributedDataParallel(model, **ddp_options)
    if state_and_hook is not None:
        state, hook = state_and_hook
        replicated.register_comm_hook(replicated.process_group if state is None else state, hook)
    asked(replicated, words, equal=ddp_options.get("init_sync", True))
    return replicated


def _refuse_sharded(model: nn.Module, reduction: Reduction) -> None:
    if holds_old_fsdp(model):
        raise TypeError(
            "replicate() got a model of FullyShardedDataParallel (FSDP1), which reduces gradients by itself: shard it "
            "with torch.distributed.fsdp.fully_shard, and give it to accumulate() without replicate()"
        )
    if not sharded_modules(model):
        return
    if reduction == "strict":
        raise ValueError(
            'replicate(reduction="strict") got a model of fully_shard(): torch reduces its gradients shard by shard, '
            "in an order that depends on the number of processes, and strict sums whole gradients along one tree: "
            "replicate the model without fully_shard(), or give the sharded model to accumulate(), which is fast"
        )
    raise TypeError(
        "replicate() got a model of fully_shard(), which reduces gradients by itself: give it to accumulate() as it is"
    )


def _checked_recheck(model: nn.Module, every: int | None) -> int:
    if every is None:
        return 0
    steps = operator.index(every)
    if steps < 1:
        raise ValueError(f"replicate(recheck_every={every}): give a number of steps, at least 1, or None")
    if synchronised := [name for name, _ in shared_layers(model)]:
        raise ValueError(
            f"replicate(recheck_every={every}): {synchronised[0]} is a SyncBatchNorm, whose statistics are those of "
            f"the micro-batches that run at the same time, so no rank can run one of them again alone: leave "
            f"recheck_every out, or use plain batch norms (revert_sync_batchnorm(model))"
        )
    return steps


def _checked_hook(
    given: CommHook | tuple[Any, CommHook] | None, reduction: Reduction, recheck_every: int | None
) -> tuple[Any, CommHook] | None:
    """Return a communication hook with its state."""
    if given is None:
        return None
    state, hook = given if isinstance(given, tuple) and len(given) == 2 else (None, given)
    if isinstance(hook, tuple) or not callable(hook):
        raise TypeError(
            f"replicate(comm_hook={given!r}): give a function of a state and a bucket, or (state, function)"
        )
    if reduction == "strict":
        raise ValueError(
            'replicate(reduction="strict", comm_hook=…): strict reduces by itself, in an order that does not depend on '
            "the number of processes: leave comm_hook out"
        )
    if recheck_every is not None:
        raise ValueError(
            "replicate(recheck_every=…, comm_hook=…): a hook reduces in the backward, and recheck_every compares the "
            "gradients of one micro-batch: leave one out"
        )
    return state, hook


def _agree(model: nn.Module, words: Words, hooked: bool, group: dist.ProcessGroup | None) -> None:
    """Compare what the ranks ask for, before DDP's collectives would hang where it differs."""
    with agreed("replicate()", group) as agreement:
        if agreement is not None:
            agreement.all_same(
                {
                    "replicate(reduction=…)": words[0],
                    "replicate(batchnorm_statistics=…)": words[1],
                    "replicate(check_every=…)": words[2],
                    "replicate(recheck_every=…)": words[3],
                    "replicate(comm_hook=…), given or not": hooked,
                    "the number of synchronised batch norms": len(shared_layers(model)),
                }
            )


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

"""A loss over the whole global batch, at one micro-batch's memory: `backward_over_batch`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..batchnorm import synchronises
from ..comm.allreduce import copies_of_ranks
from ..comm.nesting import to_device
from ..data.rng import RandomState, seed_streams
from ..data.step import Step
from ..runtime.agreement import agreed
from .accumulate import accumulate, check_batches, first_dimension, state_of
from .recheck import buffers_of, set_buffers
from .replica import Replica
from .sharded import Sharded

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_WHO = "backward_over_batch()"


def backward_over_batch(
    model: nn.Module | Sequence[nn.Module],
    step: Iterable[Any],
    embed: Callable[[Any, Any], torch.Tensor],
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Run the backward of a loss over all samples of a step; return the loss, detached, on every rank.

    For contrastive and metric learning and for Barlow Twins, whose loss is no mean over samples. All micro-batches run
    forward without graphs, and their rows are exchanged. Each rank computes the loss of all rows and its gradient by
    row. Then each micro-batch runs again, inside of `accumulate`, with the same random numbers, and its rows' gradients
    go backward. So a step costs one forward more. Its memory is that of one micro-batch's activations, all rows, what
    the loss keeps, and the data of this rank's share.

    Gradients are those of `loss(rows)`, added to what the parameters had; call `optimizer.step()` after it. They and
    their bits depend on the number of ranks as those of `accumulate` do. Parameters that `loss` uses (a temperature)
    get theirs, too, also if they are not the model's. Buffers and random streams are after it as after one pass. The
    caller's autocast holds in both; for a `GradScaler` let `loss` return `scaler.scale(...)`. A plain batch norm
    normalises over its micro-batch. `embed` and `loss` must not draw from generators of their own.

    Args:
        model: as for `accumulate`.
        step: a step of a `Loader`, or any batches; each rank gives its own.
        embed: gives the rows of a batch, (samples, columns), floating-point, a row a sample in the batch's order; two
            views of a sample are columns of its row. It gets `model` and the data on the model's device.
        loss: gives a scalar of the rows of all ranks, in sample order (of foreign batches, in rank order). Its random
            streams are the same on every rank.

    Collectives: one all-gather of 40 bytes and one of the rows (as many a rank as the largest share has), and those of
    `accumulate`; for foreign batches one of 8 bytes more. Those of synchronised batch norms run in both passes.

    Raises:
        TypeError: `embed` gives no floating-point tensor, or `loss` no tensor.
        ValueError: `embed` gives other than a row a sample in two dimensions, or rows of another width or dtype than
            elsewhere, or `loss` not a scalar with a gradient, or no rank has a row, or the model has synchronised batch
            norms and the ranks not equally many micro-batches.
        RankFailure: another rank failed in its first pass.
        RuntimeError: inside of a loop of `accumulate` over the model.

    Source: gradient caching, Gao et al. 2021, https://arxiv.org/abs/2101.06983

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> batches = [torch.eye(2), torch.ones(1, 2)]
        >>> loss = backward_over_batch(model, batches, lambda model, x: model(x), lambda rows: rows.var(0).sum())
        >>> model.weight.grad.shape
        torch.Size([2, 2])
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    replicas = [state_of(one) for one in models]
    if not replicas:
        raise ValueError(f"{_WHO} got an empty list of models")
    if any(one.held for one in replicas):
        raise RuntimeError(f"{_WHO}: a loop of accumulate() over this model is not finished: call it outside of loops")
    group = replicas[0].group
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    device = next((one.device for each in models for one in each.parameters()), torch.device("cpu"))
    check_batches(step, _WHO)
    batches: Sequence[Any] = step if isinstance(step, Step) else list(step)
    if isinstance(step, Step):
        numbers = list(step.shares)
        if len(numbers) != world_size:
            raise ValueError(
                f"{_WHO}: this step is shared among {len(numbers)} ranks, but the model's process group has "
                f"{world_size}: replicate the model over all ranks of the Loader"
            )
    else:
        numbers = [row[0] for row in _exchanged([len(batches)], group, device)]
    shared = any(map(synchronises, models))
    if len(set(numbers)) > 1 and shared:
        raise ValueError(
            f"{_WHO}: this rank has {numbers[rank]} micro-batches in this step and others have more or fewer, but the "
            f"model has synchronised batch norms, which every rank must run equally often: give each rank as many "
            f"micro-batches (a BatchPlan's short last step is left out with drop_last=True)"
        )

    problem: Exception | None = None
    parts: list[torch.Tensor] = []
    states: list[dict[str, Any]] = []
    before = RandomState().state_dict()
    try:
        with contextlib.ExitStack() as stack:
            for one in replicas:
                if isinstance(one, Sharded) and len(set(numbers)) > 1:
                    stack.enter_context(one.shards.gathered())
            _first_pass(model, replicas, batches, embed, device, parts, states)
        mine = torch.cat(parts) if parts else torch.zeros(0, 0, device=device)
    except Exception as error:
        if shared:
            raise  # other ranks may wait in a batch norm's collective, which no other may meet
        problem = error
    RandomState().load_state_dict(before)
    about = [1, 0, 0, 0, 0] if problem is not None else [0, *mine.shape, _DTYPES.index(mine.dtype), _seed_of(before)]
    table = _exchanged(about, group, device)
    if any(row[0] for row in table):
        with agreed(_WHO, group):
            if problem is not None:
                raise problem
    kinds = {(width, dtype) for _, count, width, dtype, _ in table if count}
    if len(kinds) != 1:
        said = " and ".join(f"{width} columns of {_DTYPES[dtype]}" for width, dtype in sorted(kinds))
        raise ValueError(f"{_WHO}: embed gave rows of {said or 'no sample on any rank'}: all ranks' rows must fit")
    ((width, code),) = kinds
    counts = [row[1] for row in table]
    rows = _all_rows(mine.to(_DTYPES[code]).reshape(-1, width), counts, group).requires_grad_()

    seed_streams(step.seed if isinstance(step, Step) else table[0][4])
    value, gradients = _loss_and_gradients(loss, rows)
    RandomState().load_state_dict(before)
    by_row = gradients.pop(rows)
    own = {parameter for each in models for parameter in each.parameters()}
    inside = [(one, gradient) for one, gradient in gradients.items() if one in own]
    if inside and any(isinstance(one, Sharded) for one in replicas):
        raise ValueError(
            f"{_WHO}: loss uses parameters of a model of fully_shard(), which has only shards of them here: use "
            f"them in embed, or keep them outside of the model"
        )

    starts = [sum(counts[:number]) for number in range(world_size + 1)]
    owner = next(number for number in range(world_size) if numbers[number])
    of_first = {sum(numbers[:number]): starts[number] for number in range(world_size) if numbers[number]}
    position, at, scale = 0, starts[rank], 1
    for micro in accumulate(model, batches, count=None if isinstance(step, Step) else _one):
        if not micro.recheck:
            scale = round(micro.weight / micro.share)  # 1, or the number of ranks that gradients are averaged over
            if states:
                RandomState().load_state_dict(states[position])
        part = _checked(embed(model, micro.data), None)
        start = of_first[micro.index] if micro.recheck else at
        part_gradient = by_row[start : start + len(part)]
        if not part.requires_grad:
            raise ValueError(f"{_WHO}: the rows of embed do not depend on a trained parameter: is it under no_grad?")
        if not micro.recheck:
            if len(part) != len(parts[position]):
                raise ValueError(f"{_WHO}: embed gave {len(parts[position])} rows, and {len(part)} the second time")
            position, at = position + 1, at + len(part)
        surrogate = (part * part_gradient).sum()
        first = micro.index == 0 and (isinstance(step, Step) or rank == owner)  # foreign ones are numbered on each rank
        for parameter, gradient in inside:
            surrogate = surrogate + (parameter * (gradient if first else torch.zeros_like(gradient))).sum()
        (surrogate * scale).backward()
    for parameter, gradient in gradients.items():
        if parameter not in own:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return value


def _one(data: Any) -> float:
    return 1.0


@torch.no_grad()
def _first_pass(
    model: Any,
    replicas: Sequence[Replica | Sharded],
    batches: Sequence[Any],
    embed: Callable[[Any, Any], torch.Tensor],
    device: torch.device,
    parts: list[torch.Tensor],
    states: list[dict[str, Any]],
) -> None:
    """Append each micro-batch's rows to `parts`, and of foreign batches the random streams to `states`."""
    buffers = buffers_of([one.module for one in replicas])
    for one in replicas:
        one.hold()  # a forward must not broadcast buffers, since ranks may have other numbers of forwards
    try:
        for number in range(len(batches)):
            if isinstance(batches, Step):
                micro = batches.load(number)
                data = micro.data
                if micro.seed is not None:
                    seed_streams(micro.seed)
            else:
                data = batches[number]
                states.append(RandomState().state_dict())
            data = data if device.type == "cpu" else to_device(data, device)
            part = _checked(embed(model, data), data)
            if parts and (part.dtype, part.shape[1]) != (parts[0].dtype, parts[0].shape[1]):
                raise ValueError(
                    f"{_WHO}: embed gave {part.shape[1]} columns of {part.dtype} for micro-batch {number}, and "
                    f"{parts[0].shape[1]} of {parts[0].dtype} before: rows must be of one width and dtype"
                )
            parts.append(part)
    finally:
        for one in replicas:
            one.release()
        set_buffers(buffers)
        torch.clear_autocast_cache()  # it holds weights without graphs now


def _checked(rows: Any, data: Any) -> torch.Tensor:
    """Return the rows of a batch, if they are rows and, with `data`, as many as it has samples."""
    if not isinstance(rows, torch.Tensor) or rows.dtype not in _DTYPES:
        kind = f"a tensor of {rows.dtype}" if isinstance(rows, torch.Tensor) else f"a {type(rows).__name__}"
        raise TypeError(f"{_WHO}: embed gave {kind}: return a floating-point tensor, a row a sample")
    if rows.ndim != 2:
        raise ValueError(f"{_WHO}: embed gave a tensor of shape {tuple(rows.shape)}: return (samples, columns)")
    try:
        samples = len(rows) if data is None else first_dimension(data)
    except TypeError:
        return rows  # data without tensors
    if len(rows) != samples:
        raise ValueError(f"{_WHO}: embed gave {len(rows)} rows for {samples} samples: return a row a sample")
    return rows


def _all_rows(mine: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the rows of all ranks, in rank order."""
    if group is None:
        return mine.detach().clone()
    padded = mine.new_zeros(max(counts), mine.shape[1])
    padded[: len(mine)] = mine
    everyones = copies_of_ranks(padded, group)
    return torch.cat([of_rank[:count] for of_rank, count in zip(everyones, counts, strict=True)])


def _exchanged(values: list[int], group: dist.ProcessGroup | None, device: torch.device) -> list[list[int]]:
    if group is None:
        return [values]
    rows: list[list[int]] = copies_of_ranks(torch.tensor(values, dtype=torch.int64, device=device), group).tolist()
    return rows


def _loss_and_gradients(
    loss: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
) -> tuple[torch.Tensor, dict[torch.Tensor, torch.Tensor]]:
    """Return the loss, and its gradient for the rows and each parameter that it uses."""
    with torch.enable_grad():
        value = loss(rows)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{_WHO}: loss gave a {type(value).__name__}: return a scalar tensor")
    if value.numel() != 1 or not value.requires_grad:
        lacks = "" if value.requires_grad else " without a gradient"
        raise ValueError(
            f"{_WHO}: loss gave a tensor of shape {tuple(value.shape)}{lacks}: return a scalar of the rows"
        )
    leaves: dict[torch.Tensor, None] = {}
    waiting, seen = [value.grad_fn], {value.grad_fn}
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[leaf] = None
        for following, _ in node.next_functions if node is not None else ():
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    if rows not in leaves:
        raise ValueError(f"{_WHO}: loss gave a scalar that does not depend on the rows, so it has no gradient for them")
    found = torch.autograd.grad(value, list(leaves), grad_outputs=torch.ones_like(value))
    return value.detach(), dict(zip(leaves, found, strict=True))


def _seed_of(state: dict[str, Any]) -> int:
    """Return a seed that follows from random streams."""
    generator = torch.Generator()
    generator.set_state(state["torch"])
    return int(torch.randint(2**62, (1,), generator=generator))

"""`predict`: shares out the batches, runs the model, collects the outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from ..batches import to_device
from ..errors import DDParityError
from ..gather import NOTHING, check_receiver, gather_present
from ..keyed import Fetch, KeyedDataset, sized_length
from ..meeting import Meeting, agreed
from ..plan import checked_integer, share
from ..replicate import unwrapped
from ..seeds import derive, kept_streams, numbered, seed_streams
from ..trees import concatenate
from .outputs import check_rows, rows

_POLL_S = 0.5  # how often a rank looks whether another one failed


def predict(
    model: nn.Module | Callable[[Any], Any],
    dataset: Any,
    batch_size: int,
    to: int | Literal["all"] = 0,
    *,
    inputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **dataloader_options: Any,
) -> Any:
    """Run a model over a data set on all ranks; each sample once, outputs in data-set order on rank `to`.

    Batch b is samples b * batch_size and following, whatever the world size, and each rank runs a contiguous share of
    the batches, with random streams keyed by the batch. So the outputs do not depend on the number of processes.

    Args:
        model: a module, run in eval and inference mode inside of DDP if it is wrapped, or any function of a batch. Its
            modes, and the random streams, are as before at the end, also on an exception.
        dataset: map-style, of the same length on every rank.
        batch_size: samples a batch, 1 or more.
        to: the rank that receives, or "all".
        inputs: what a module is called with, from a batch; None: the first entry of a list or tuple, as from a data
            set of (input, target), else the batch itself. A function is called with the batch.
        seed: keys the random streams, with the batch.
        num_workers, collate_fn, dataloader_options: of torch.utils.data.DataLoader.

    Returns:
        The outputs (a tensor, or dicts and tuples of them, one row a sample), on the model's device; None on a rank
        that does not receive. Of an empty data set, whose outputs have no structure: an empty tensor.

    Collectives: those of `gather`, once, at the end; while running none, but for a look at the store twice a second.

    Raises:
        TypeError, ValueError: a bad argument; an output without one row a sample.
        DDParityError: the model failed; names the data-set indices of the batch.
        RankFailure: on every other rank, where one failed.

    Example:
        >>> predict(nn.Identity(), torch.arange(5), batch_size=2)
        tensor([0, 1, 2, 3, 4])
    """
    joined = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    with agreed("predict") as meeting:
        check_receiver(to, world_size)
        size = checked_integer(batch_size, "batch_size")
        if size < 1:
            raise ValueError(f"predict(batch_size={batch_size}): must be at least 1")
        length = sized_length(dataset, "predict")
        if meeting is not None:
            meeting.same("the data set's length", length)
        key = derive(seed, "predict")
        mine = share(-(-length // size), rank, world_size)
        batches = [range(b * size, min(b * size + size, length)) for b in mine]
        loader: DataLoader[Any] = DataLoader(
            KeyedDataset(dataset),  # type: ignore[arg-type]
            batch_sampler=[Fetch(list(batch), numbered(key, batch.start) + 1) for batch in batches],
            num_workers=num_workers,
            collate_fn=collate_fn,
            **{"pin_memory": torch.cuda.is_available(), "generator": torch.Generator(), **dataloader_options},
        )
        outputs = _run(model, inputs, key, loader, batches, meeting)
        local = concatenate(outputs) if outputs else NOTHING
    collected = gather_present(local, to)
    if to not in ("all", rank):
        return None
    if collected is NOTHING:
        return torch.empty(0)
    if rows(collected) != length:
        raise DDParityError(f"predict() collected {rows(collected)} rows for {length} samples")
    return collected


def _run(
    model: nn.Module | Callable[[Any], Any],
    inputs: Callable[[Any], Any] | None,
    key: int,
    loader: DataLoader[Any],
    batches: list[range],
    meeting: Meeting | None,
) -> list[Any]:
    call, device = _callable(model, inputs)
    outputs: list[Any] = []
    looked = time.monotonic()
    with kept_streams(), _evaluating(model), torch.inference_mode():
        for batch, data in zip(batches, loader, strict=True):
            seed_streams(numbered(key, batch.start))
            where = f"data-set indices {batch.start} to {batch.stop - 1}"
            try:
                output = call(data if device is None else to_device(data, device))
            except Exception as error:
                raise DDParityError(f"the model failed for the {where}: {type(error).__name__}: {error}") from error
            check_rows(output, len(batch), f"the output for the {where}")
            outputs.append(output)
            if meeting is not None and time.monotonic() - looked > _POLL_S:
                looked = time.monotonic()
                meeting.poll()
    return outputs


def _callable(
    model: nn.Module | Callable[[Any], Any], inputs: Callable[[Any], Any] | None
) -> tuple[Callable[[Any], Any], torch.device | None]:
    if not isinstance(model, nn.Module):
        return (model if inputs is None else lambda batch: model(inputs(batch))), None
    module = unwrapped(model)
    take = inputs or (lambda batch: batch[0] if isinstance(batch, (list, tuple)) else batch)
    parameter = next(module.parameters(), None)
    return lambda batch: module(take(batch)), None if parameter is None else parameter.device


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode, and at the end each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if modes:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training

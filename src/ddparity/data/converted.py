"""What a Loader takes from a torch DataLoader that it gets in place of a data set: plan, collate function, workers."""

from __future__ import annotations

from typing import Any, cast

from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

from .dataset import sized_length
from .orders import WeightedPlan
from .plan import BatchPlan, Plan

_WITH_WORKERS = ("prefetch_factor", "persistent_workers", "multiprocessing_context", "timeout")  # refused without them


def plan_of(dataloader: DataLoader[Any], sizes: dict[str, Any]) -> Plan:
    """Return the plan that draws as the DataLoader does on one process; its batch is the global batch.

    Args:
        sizes: `global_batch`, `micro_batch` and `seed` that Loader() got, or None.

    Raises:
        TypeError: the DataLoader cuts batches by a batch sampler, or has a sampler of another kind.
        ValueError: its sampler is that of another data set.
    """
    batch, sampler = dataloader.batch_size, cast(Any, dataloader.sampler)
    if batch is None:
        raise TypeError(
            "Loader() got a DataLoader with a batch_sampler or batch_size=None, so its batches are not known: give the "
            "data set, and an OrderPlan"
        )
    length = sized_length(dataloader.dataset, "Loader", "; or give the data set, and a StreamPlan")
    given = {name: value for name, value in sizes.items() if value is not None}
    global_batch = given.get("global_batch", batch)
    cut: dict[str, Any] = {"global_batch": global_batch, "micro_batch": global_batch, "seed": 0, **given}
    # Not of classes derived from these, which may draw otherwise.
    weighted, at_random = type(sampler) is WeightedRandomSampler, type(sampler) is RandomSampler
    if (at_random or type(sampler) is SequentialSampler) and len(sampler.data_source) != length:
        raise ValueError(
            f"Loader() got a DataLoader whose {type(sampler).__name__} is of {len(sampler.data_source)} samples, and "
            f"its data set has {length}: give a torch.utils.data.Subset of it, or the data set, and an OrderPlan"
        )
    if weighted or (at_random and sampler.replacement):
        draws = sampler.num_samples - (sampler.num_samples % max(global_batch, 1) if dataloader.drop_last else 0)
        weights = sampler.weights if weighted else length
        return WeightedPlan(weights, num_samples=draws, replacement=sampler.replacement, **cut)
    shuffles = at_random and sampler.num_samples == length
    if not shuffles and type(sampler) is not SequentialSampler:
        raise TypeError(
            f"Loader() got a DataLoader with a {type(sampler).__name__}: a plan shares out the samples. Give the data "
            f"set, and an OrderPlan of one process's sampler; in place of a DistributedSampler, shuffle=True"
        )
    return BatchPlan(length, shuffle=shuffles, drop_last=dataloader.drop_last, **cut)


def options_of(dataloader: DataLoader[Any], num_workers: int) -> dict[str, Any]:
    """Return its options that do not decide which samples a batch has, for so many workers, except `collate_fn`."""
    names = ("worker_init_fn", *_WITH_WORKERS * (num_workers > 0))
    # It has values of its own for options that were left out.
    options = {name: getattr(dataloader, name) for name in names if getattr(dataloader, name, None)}
    return {**options, "pin_memory": True} if dataloader.pin_memory else options

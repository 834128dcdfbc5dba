"""Whether a plan fits: to the data set that a Loader gets, to the number of ranks, and to a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch.utils.data import IterableDataset

from .dataset import sized_length
from .plan import BatchPlan, Plan, check_plan_methods
from .stream import StreamPlan


def checked_plan(dataset: Any, plan: Plan | None, sizes: dict[str, Any], options: dict[str, Any]) -> Plan:
    """Return the plan that Loader() got, or a BatchPlan of its sizes, and of the order that it takes from `options`."""
    given = {name: value for name, value in sizes.items() if value is not None}
    if plan is None:
        if "global_batch" not in given:
            raise TypeError(
                "Loader() got neither a plan nor a global_batch: give Loader(dataset, global_batch=…, micro_batch=…, "
                "seed=…), or Loader(dataset, plan)"
            )
        order: dict[str, Any] = {name: options.pop(name) for name in ("shuffle", "drop_last") if name in options}
        whole: dict[str, Any] = {"micro_batch": given["global_batch"], **given, **order}
        return BatchPlan(sized_length(dataset, "Loader"), **whole)
    if given:
        raise TypeError(f"Loader() got a plan, and {', '.join(given)}: the plan decides that. Leave it out")
    check_plan_methods(plan)
    if not hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset):
        return plan
    length = sized_length(dataset, "Loader", "; or give a StreamPlan")
    if plan.length is not None and length != plan.length:
        raise ValueError(
            f"the data set has {length} samples and the plan {plan.length}: make the plan with "
            f"{type(plan).__name__}(…) of this data set"
        )
    return plan


def check_world_size(plan: Plan | StreamPlan, world_size: int) -> None:
    """Check that every rank has a micro-batch in a full step.

    Raises:
        ValueError: there are more ranks than micro-batches in a step.
    """
    if world_size > plan.micro_batches_per_step:
        raise ValueError(
            f"there are {world_size} ranks but only {plan.micro_batches_per_step} micro-batches in a step "
            f"({_sizes_of(plan)}), so some ranks would never have work. Start "
            f"at most {plan.micro_batches_per_step} processes, or make the micro-batch smaller"
        )


def check_even_shares(plan: Plan | StreamPlan, world_size: int) -> None:
    """Check that all ranks have equally many micro-batches in every step.

    Raises:
        ValueError: in some step a rank has more micro-batches than another.
    """
    sizes: Sequence[int]
    for step in {0, plan.steps_per_epoch - 1} if plan.steps_per_epoch else ():  # the steps between are like the first
        sizes = plan.sizes if isinstance(plan, StreamPlan) else plan.sizes(0, step)
        if len(sizes) % world_size:
            raise ValueError(
                f"step {step} of an epoch has {len(sizes)} micro-batches (of {sum(sizes)} samples), which "
                f"{world_size} ranks cannot share evenly, but the model has synchronised batch norms, which every rank "
                f"must run equally often. Start another number of processes, change the batch sizes, or leave out the "
                f"short last step with drop_last=True"
            )


def continued(plan: BatchPlan, saved: dict[str, Any], epoch: int, step: int) -> tuple[int, int] | None:
    """Return the position in a plan that has more samples than the saved one, and begins with the same steps.

    None if it is no such plan. A shuffled order of more samples is another order from its first step on, and so is
    every epoch after the first.
    """
    own, before = plan.description(), saved.get("num_samples")
    if type(before) is not int or not 0 <= before < plan.num_samples or plan.shuffle:
        return None
    if {**own, "num_samples": before} != saved:
        return None
    old_steps = dataclasses.replace(plan, num_samples=before).steps_per_epoch
    done = old_steps if (epoch, step) == (1, 0) else step
    if (epoch, step) != (1, 0) and (epoch != 0 or not 0 <= step <= old_steps):
        return None
    return (0, done) if done * plan.global_batch <= before else None  # a short step would have been longer


def _sizes_of(plan: Plan | StreamPlan) -> str:
    if hasattr(plan, "global_batch") and hasattr(plan, "micro_batch"):
        return f"global batch {plan.global_batch}, micro-batch {plan.micro_batch}"
    return type(plan).__name__

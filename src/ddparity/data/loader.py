"""The loader: a torch DataLoader that loads a plan's micro-batches, each whole, with random streams of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler

from ..runtime.progress import mark_progress
from .dataset import Fetch, KeyedDataset, loaded, sized_length
from .plan import BatchPlan, MicroBatch, checked_integer, share
from .step import LoadedMicroBatch, Step

# The plan decides these.
_DECIDED = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "in_order")


class Loader:
    """Loads the steps of a `BatchPlan`, on this rank its share of each.

    One worker loads a micro-batch as a whole, after seeding Python's, NumPy's and torch's streams from the
    micro-batch's key: augmentation is the same for any number of workers and processes.

    A checkpoint holds its position, which counts the steps that are done, not what workers have loaded ahead. A step is
    done when a loop over its micro-batches has ended, `accumulate`'s or `for micro in step`, or the next step is asked
    for; an epoch when the loop over its steps has ended. So save after `optimizer.step()`, and resume by
    `for epoch in loader.epochs(stop)`.

    Args:
        dataset: map-style, of `plan.num_samples` samples.
        plan: what each step consumes.
        num_workers, collate_fn, dataloader_options: of torch.utils.data.DataLoader. Workers are persistent unless
            `persistent_workers=False`, and memory is pinned where CUDA is, unless `pin_memory=False`.

    Attributes:
        plan: the plan. dataloader: the torch DataLoader inside.

    Collectives: none.

    Raises:
        TypeError: an iterable data set, or an option that the plan decides.
        ValueError: the data set's length is not the plan's.

    Source: https://pytorch.org/docs/stable/data.html
    """

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **dataloader_options: Any,
    ) -> None:
        length = sized_length(dataset, "Loader")
        if length != plan.num_samples:
            raise ValueError(
                f"the data set has {length} samples and the plan {plan.num_samples}: make the plan with "
                f"BatchPlan(len(dataset), …)"
            )
        if decided := [name for name in _DECIDED if name in dataloader_options]:
            raise TypeError(f"Loader() got {', '.join(decided)}: the plan decides that, see BatchPlan")
        self.plan = plan
        self._order = _Order(plan)
        self._position = (0, 0)  # the epoch and step that come next
        self._resumes = False  # from a checkpoint, at the position
        self.dataloader: DataLoader[Any] = DataLoader(
            KeyedDataset(dataset),  # type: ignore[arg-type]
            batch_sampler=self._order,
            num_workers=num_workers,
            collate_fn=collate_fn,
            # A generator of its own: the DataLoader draws a seed from it each epoch.
            **{
                "persistent_workers": num_workers > 0,
                "pin_memory": torch.cuda.is_available(),
                "generator": torch.Generator(),
                **dataloader_options,
            },
        )

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def position(self) -> tuple[int, int]:
        """The epoch and step that come next."""
        return self._position

    def epochs(self, stop: int) -> range:
        """The epochs up to `stop` that are left from the position on: `range(stop)` without a checkpoint."""
        return range(self._position[0], stop)

    def epoch(self, epoch: int, start_step: int | None = None) -> Iterator[Step]:
        """The steps of an epoch, from `start_step` on. Starting another epoch ends the iterator before.

        Args:
            start_step: None: 0, or after `load_state_dict` the step to go on with.

        Raises:
            ValueError: more ranks than micro-batches in a step, no such step, or the first epoch after
                `load_state_dict` is not the one to go on with.
            SampleError: while iterating; the data set failed, and the message names the data-set index.
        """
        joined = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        check_world_size(self.plan, world_size)
        if start_step is None:
            start_step = self._resumed_step(epoch)
        if not 0 <= start_step <= len(self):
            raise ValueError(f"epoch(start_step={start_step}): the plan's epochs have {len(self)} steps")
        self._order.restart(epoch, start_step, rank, world_size)
        self._position, self._resumes = (epoch, start_step), False
        return self._steps(self._order.run, epoch, start_step, rank, world_size)

    def _resumed_step(self, epoch: int) -> int:
        if not self._resumes:
            return 0
        if self._position[0] != epoch:
            raise ValueError(
                f"epoch({epoch}): this Loader goes on with epoch {self._position[0]}, step {self._position[1]}, of its "
                f"checkpoint: go through loader.epochs(stop), or pass start_step to begin elsewhere"
            )
        return self._position[1]

    def state_dict(self) -> dict[str, Any]:
        """The plan, and the epoch and step that come next; the same on every rank and on any world size."""
        return {"plan": dataclasses.asdict(self.plan), "epoch": self._position[0], "step": self._position[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the step that came next. Ends the iterator before.

        Raises:
            ValueError: the plan was another one; says in what.
        """
        own, theirs = dataclasses.asdict(self.plan), state["plan"]
        if differing := [name for name in own if own[name] != theirs.get(name)]:
            what = ", ".join(f"{name}={theirs.get(name)!r} there and {own[name]!r} here" for name in differing)
            raise ValueError(
                f"the Loader's plan was another one, whose steps are not these: {what}. Make the BatchPlan as it was, "
                f"or load without the Loader and begin an epoch anew"
            )
        if state["epoch"] < 0 or not 0 <= state["step"] <= len(self):
            raise ValueError(f"the plan has no step {state['step']} of epoch {state['epoch']}")
        self._order.run += 1
        self._position, self._resumes = (state["epoch"], state["step"]), True

    def _steps(self, run: int, epoch: int, start_step: int, rank: int, world_size: int) -> Iterator[Step]:
        def check_current() -> None:
            if self._order.run != run:
                raise RuntimeError(f"epoch {epoch} of this Loader has ended: another one was started")

        def load_next() -> LoadedMicroBatch:
            check_current()
            data = next(batches)
            micro = issued.popleft()
            return LoadedMicroBatch(data, micro.weight, micro.index, micro.seed)

        def reach(epoch: int, step: int) -> None:
            if self._order.run == run:  # a step that was kept may be gone through late
                self._position = max(self._position, (epoch, step))

        check_current()
        plan, batches, issued = self.plan, loaded(self.dataloader), self._order.issued
        for number in range(start_step, len(self)):
            shares = _shares(plan.micro_batches_in(number), world_size)
            size = shares[rank]
            step = Step(epoch, number, size, load_next, shares, plan.seed_after(epoch, number), plan)
            step.on_end = functools.partial(reach, epoch, number + 1)
            yield step
            mark_progress()
            step.end()
            if size:
                step.load(size - 1)  # what was not taken is not the next step's
        reach(epoch + 1, 0)


@functools.lru_cache(maxsize=64)
def _shares(count: int, world_size: int) -> tuple[int, ...]:
    return tuple(len(share(count, rank, world_size)) for rank in range(world_size))


class _Order:
    """A DataLoader's batch sampler: a rank's micro-batches of an epoch, noting each as it is issued."""

    def __init__(self, plan: BatchPlan) -> None:
        self._plan = plan
        self.run = 0
        self.issued: deque[MicroBatch] = deque()
        self._range = (0, 0, 0, 1)

    def restart(self, epoch: int, start_step: int, rank: int, world_size: int) -> None:
        self.run += 1
        self.issued = deque()
        self._range = (epoch, start_step, rank, world_size)

    def __iter__(self) -> Iterator[Fetch]:
        epoch, start_step, rank, world_size = self._range
        issued = self.issued
        for step in self._plan.steps(epoch, start_step, None, rank, world_size):
            for micro in step:
                issued.append(micro)
                yield Fetch(micro.samples.tolist(), micro.seed + 1)


def check_world_size(plan: BatchPlan, world_size: int) -> None:
    """Refuse more ranks than micro-batches."""
    if world_size > plan.micro_batches_per_step:
        raise ValueError(
            f"{world_size} ranks but only {plan.micro_batches_per_step} micro-batches in a step (global batch "
            f"{plan.global_batch}, micro-batch {plan.micro_batch}): some ranks would never have work. Start at most "
            f"{plan.micro_batches_per_step} processes, or make the micro-batch smaller"
        )


def check_even_shares(plan: BatchPlan, world_size: int) -> None:
    """Refuse a plan with a step in which some ranks have more micro-batches than others."""
    for step in {0, plan.steps_per_epoch - 1} if plan.steps_per_epoch else ():  # all but the last are like the first
        count = plan.micro_batches_in(step)
        if count % world_size:
            raise ValueError(
                f"step {step} of an epoch has {count} micro-batches (of {plan.samples_in(step)} samples), which "
                f"{world_size} ranks cannot share evenly, but the model has synchronised batch norms, which every rank "
                f"must run equally often: start another number of processes, change the batch sizes, or leave out the "
                f"short last step with drop_last=True"
            )


class ShardSampler(Sampler[int]):
    """This rank's contiguous share of range(num_samples), in order, without padding; sizes differ by at most one.

    Args:
        num_samples: 0 or more.
        rank, world_size: None: those of the default process group, or a world of one.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> [list(ShardSampler(5, rank, 2)) for rank in (0, 1)]
        [[0, 1, 2], [3, 4]]
    """

    def __init__(self, num_samples: int, rank: int | None = None, world_size: int | None = None) -> None:
        count = checked_integer(num_samples, "num_samples")
        if count < 0:
            raise ValueError(f"ShardSampler(num_samples={num_samples}): must be at least 0")
        joined = dist.is_available() and dist.is_initialized()
        if rank is None:
            rank = dist.get_rank() if joined else 0
        if world_size is None:
            world_size = dist.get_world_size() if joined else 1
        self.indices = share(count, rank, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

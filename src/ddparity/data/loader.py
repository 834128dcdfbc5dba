"""Load a plan's micro-batches with a torch DataLoader; and a sampler of a rank's share for users' own loaders.

`Loader` loads each micro-batch as a whole and with random streams of its own. `ShardSampler` gives a rank its
contiguous share of a data set.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler

from ..runtime.progress import mark_progress
from .converted import options_of, plan_of
from .dataset import KeyedDataset, MicroBatchSampler, load_batches, seeded, worker_options
from .fitting import check_world_size, checked_plan, continued
from .orders import WeightedPlan
from .plan import FIRST_STEP, BatchPlan, Plan
from .sizes import checked_integer, share
from .step import LoadedMicroBatch, Step
from .stream import StreamPlan
from .stream_steps import StreamSteps

# The options of a DataLoader that the plan decides.
_PLAN_OPTIONS = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "in_order")


class Loader:
    """Load this rank's share of the steps of a plan.

    One worker loads a micro-batch as a whole. Before that, it seeds the streams of Python, NumPy and torch with the
    micro-batch's seed, so augmentation is the same for any number of workers and processes.

    A checkpoint holds the loader's position: the epoch and step that come next. The position counts the steps that are
    done, not the micro-batches that workers load ahead. A step is done when the loop over its micro-batches ends
    (`accumulate`'s, or `for micro in step`), or when the script asks for the next step. In a loop over steps of several
    loaders, as in `zip`, all are done whose last micro-batch was taken when the first of them ends. An epoch is done
    when the loop over its steps ends. So save after `optimizer.step()`, and resume with `for epoch in
    loader.epochs(stop)`, or with `for step in loader.steps(stop)` where steps are counted. `for step in loader` loops
    over the epoch at the position, or what is left of it.

    Args:
        dataset: a map-style data set of `plan.length` samples. It needs no length where the plan is given: a data set
            that draws its samples at random has none. With a `StreamPlan`: anything with `shard(num_shards=, index=)`,
            as Hugging Face's IterableDataset has, or a function `stream(reader, readers, epoch)` that returns an
            iterable of a reader's part. Or a torch DataLoader of a map-style data set, as a script for one process has:
            its batch is the global batch, and its order, collate function and workers hold; give `micro_batch`.
        plan: what each step consumes: a `BatchPlan`, `WeightedPlan`, `LengthPlan`, `OrderPlan` or a `Plan` of your own.
            None: a `BatchPlan` of `global_batch`, `micro_batch` (None: the global batch), `seed`, and of `shuffle` and
            `drop_last` as torch's DataLoader has them, except that `shuffle` is True unless it is given.
        num_workers, collate_fn, dataloader_options: passed to torch.utils.data.DataLoader; what is left out is that of
            a DataLoader that was given, or torch's default. As there, each epoch has new workers, with a copy of the
            data set as it is then, unless `persistent_workers=True`. Memory is pinned if CUDA is available, unless
            `pin_memory=False`.

    Attributes:
        dataset: the data set; of a DataLoader that was given, its data set.
        plan: the plan.
        dataloader: the torch DataLoader inside.

    Raises:
        TypeError: the data set is iterable, an option is one that the plan decides, there is neither a plan nor a
            global batch, or there are both; or the plan lacks what `Plan` asks for.
        ValueError: the length of the data set is not `plan.length`.

    Collectives: none; of streams, those of `StreamPlan`, and two all-gathers in `state_dict`.

    Source: https://pytorch.org/docs/stable/data.html
    """

    def __init__(
        self,
        dataset: Any,
        plan: Plan | StreamPlan | None = None,
        num_workers: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        global_batch: int | None = None,
        micro_batch: int | None = None,
        seed: int | None = None,
        **dataloader_options: Any,
    ) -> None:
        sizes = {"global_batch": global_batch, "micro_batch": micro_batch, "seed": seed}
        if isinstance(dataset, DataLoader):
            if plan is None:
                plan, sizes = plan_of(dataset, sizes), dict.fromkeys(sizes)
            num_workers = dataset.num_workers if num_workers is None else num_workers
            collate_fn = collate_fn or dataset.collate_fn
            dataloader_options = {**options_of(dataset, num_workers), **dataloader_options}
            dataset = dataset.dataset
        num_workers = num_workers or 0
        self._stream: StreamSteps | None = None
        if not isinstance(plan, StreamPlan):
            plan = checked_plan(dataset, plan, sizes, dataloader_options)
        if refused := [name for name in _PLAN_OPTIONS if name in dataloader_options]:
            raise TypeError(
                f"Loader() got {', '.join(refused)}: the plan decides that. Leave it out, and give the plan the sizes "
                f"and the order"
            )
        self.dataset = dataset
        self.plan: Plan | StreamPlan = plan
        self._position = (0, 0)  # the epoch and step that come next
        self._before = 0  # the steps of the epochs before the position's
        self._resumes = False  # whether the position is that of a checkpoint and no epoch has started since
        self._end_workers: Callable[[], None] = lambda: None  # of the current iterator
        if isinstance(plan, StreamPlan):
            if given := [name for name, value in sizes.items() if value is not None]:
                raise TypeError(f"Loader() got a plan, and {', '.join(given)}: the plan decides that. Leave it out")
            self._stream = StreamSteps(dataset, plan, num_workers, collate_fn, dataloader_options)
            self.dataloader: DataLoader[Any] = self._stream.dataloader
            return
        self._batch_sampler = MicroBatchSampler(plan)
        self.dataloader = DataLoader(
            KeyedDataset(dataset),  # type: ignore[arg-type]  # torch types data sets by one index, and this takes many
            batch_sampler=self._batch_sampler,
            num_workers=num_workers,
            collate_fn=collate_fn,
            # The DataLoader draws a seed in each epoch. Its own generator keeps the global one unchanged.
            **{
                "pin_memory": torch.cuda.is_available(),
                "generator": torch.Generator(),
                **dataloader_options,
                **worker_options(num_workers, dataloader_options.get("worker_init_fn")),
            },
        )

    def __len__(self) -> int:
        if self.plan.steps_per_epoch is None:
            raise TypeError("the steps of a stream are known when it ends: give StreamPlan(steps_per_epoch=…)")
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[Step]:
        """Return an iterator over the steps from the position to the end of its epoch.

        After a loop that ended early, the next one loops over the rest of the epoch.
        """
        epoch, step = self._position
        return self.epoch(epoch, step)

    @property
    def position(self) -> tuple[int, int]:
        """The epoch and step that come next."""
        return self._position

    def epochs(self, stop: int) -> range:
        """Return the epochs from the position to before `stop`: `range(stop)` for a new Loader."""
        return range(self._position[0], stop)

    @property
    def steps_done(self) -> int:
        """The number of steps before the position, over all epochs."""
        return self._before + self._position[1]

    def steps(self, stop: int | None = None) -> Iterator[Step]:
        """Yield the steps from the position on, over the ends of epochs, until `stop` steps are done in all.

        After `load_state_dict`, the steps that were done before count. None: without end.

        Raises:
            ValueError: an epoch has no steps, so the loop would not end; and as `epoch`.
        """
        while stop is None or self.steps_done < stop:
            start = self._position
            empty = start[1] == 0
            for step in self.epoch(*start):
                empty = False
                yield step
                if stop is not None and self._before + step.number + 1 >= stop:
                    self._pass(step.epoch, step.number + 1)  # the script has asked for the next step
                    return
            if empty:
                raise ValueError(f"steps({stop}): epoch {start[0]} of the plan has no steps: {self.plan}")

    def epoch(self, epoch: int, start_step: int | None = None) -> Iterator[Step]:
        """Return an iterator over the steps of an epoch, from `start_step` on. It ends the iterator before it.

        Args:
            start_step: None: 0, or after `load_state_dict` the step of the checkpoint's position.

        Raises:
            ValueError: there are more ranks than micro-batches in a step; or the epoch has no such step; or this is
                the first epoch after `load_state_dict`, but not the epoch of the checkpoint's position.
            SampleError: while iterating; the data set failed. The message has the data-set index.
            RuntimeError: while iterating; another epoch was started, or a state was loaded.
        """
        rank, world_size = _rank_and_world_size()
        check_world_size(self.plan, world_size)
        if start_step is None:
            start_step = self._resumed_step(epoch)
        steps = self._steps_in(epoch)
        if not start_step >= 0 or (steps is not None and start_step > steps):
            raise ValueError(f"epoch(start_step={start_step}): the plan's epochs have {steps} steps")
        if epoch != self._position[0]:
            self._before = self._steps_before(epoch)
        if self._stream is not None:
            self._position, self._resumes = (epoch, start_step), False
            return self._steps_of_stream(self._stream, epoch, start_step, rank, world_size)
        self._end_workers()
        self._batch_sampler.restart(epoch, start_step, rank, world_size)
        self._position, self._resumes = (epoch, start_step), False
        return self._steps(self._batch_sampler.run, epoch, start_step, rank, world_size)

    def _resumed_step(self, epoch: int) -> int:
        if not self._resumes:
            return 0
        if self._position[0] != epoch:
            raise ValueError(
                f"epoch({epoch}): the checkpoint of this Loader continues with epoch {self._position[0]}, step "
                f"{self._position[1]}. Loop over loader.epochs(stop), or pass start_step to start somewhere else"
            )
        return self._position[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the plan and the position; they are the same on every rank and for any world size.

        Of a stream also the states of all readers; all ranks must call it then.

        Collectives: none; of a stream, two all-gathers of the readers' states.
        """
        epoch, step = self._position
        plan = self.plan.description(epoch if step else None)
        state = {"plan": plan, "epoch": epoch, "step": step, "steps_done": self.steps_done}
        return state if self._stream is None else {**state, "readers": self._stream.gathered(self._position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved position. It ends the current iterator.

        A plan without shuffle may have more samples than the saved one, and so more steps: the steps that are done are
        those of its first epoch, which continues.

        Raises:
            ValueError: the saved plan differs from this one (the message lists what differs), or has no such position.
        """
        position = epoch, step = state["epoch"], state["step"]
        own, saved = self.plan.description(epoch if step else None), {"kind": "BatchPlan", **state["plan"]}
        before = state["steps_done"] - step if "steps_done" in state else epoch * len(self)
        if isinstance(self.plan, BatchPlan) and (longer := continued(self.plan, saved, *position)) is not None:
            position, saved, before = longer, own, 0
        saved = {FIRST_STEP: own.get(FIRST_STEP), **saved}  # which ddparity 0.2.0 did not save
        if differing := [name for name in own if own[name] != saved.get(name)]:
            what = ", ".join(
                f"{name}={saved.get(name)!r} in the checkpoint and {own[name]!r} here" for name in differing
            )
            raise ValueError(
                f"the plan of the saved Loader has other steps than this Loader's plan: {what}. Make the same "
                f"plan again, or load the checkpoint without the Loader and start an epoch from its beginning"
            )
        epoch, step = position
        steps = self._steps_in(epoch) if epoch >= 0 else 0
        if epoch < 0 or step < 0 or (steps is not None and step > steps):
            raise ValueError(
                f"the saved position of the Loader is epoch {epoch}, step {step}, but the plan has no step {step} of "
                f"epoch {epoch}: load the checkpoint without the Loader"
            )
        if self._stream is not None:
            self._stream.load(position, state["readers"])
        else:
            self._end_workers()
            self._batch_sampler.run += 1
        self._position, self._before, self._resumes = position, before, True

    def _steps(self, run: int, epoch: int, start_step: int, rank: int, world_size: int) -> Iterator[Step]:
        def check_current() -> None:
            if self._batch_sampler.run != run:
                raise RuntimeError(
                    f"epoch {epoch} of this Loader has ended, because another epoch was started or a state was loaded: "
                    f"a Loader has one iterator at a time"
                )

        def load_next() -> LoadedMicroBatch:
            check_current()
            data = next(batches)
            micro = issued.popleft()
            return LoadedMicroBatch(data, micro.weight, micro.index, micro.seed)

        def advance(epoch: int, step: int) -> None:
            if self._batch_sampler.run == run:
                # The maximum: a script may keep a step and loop over it after later steps.
                self._pass(epoch, step)

        check_current()
        plan, batches, issued = self._batch_sampler.plan, load_batches(self.dataloader), self._batch_sampler.issued
        self._end_workers = _closing(batches)
        steps = plan.steps_in(epoch)
        for number in range(start_step, steps):
            shares = _shares(len(plan.sizes(epoch, number)), world_size)
            size = shares[rank]
            again = functools.partial(self._load_again, epoch, number, world_size)
            step = Step(epoch, number, size, load_next, shares, plan.seed_after(epoch, number), plan, again)
            step.on_end = functools.partial(advance, epoch, number + 1)
            yield step
            mark_progress()
            advance(epoch, number + 1)
            if size:
                step.load(size - 1)  # so that micro-batches that the script did not take do not go to the next step
        advance(epoch + 1, 0)
        batches.close()  # a step that the script keeps would keep the workers alive

    def _steps_of_stream(
        self, stream: StreamSteps, epoch: int, start_step: int, rank: int, world_size: int
    ) -> Iterator[Step]:
        def advance(epoch: int, step: int) -> None:
            self._pass(epoch, step)
            stream.keep_from(self._position)

        for step in stream.steps(epoch, start_step, rank, world_size):
            step.on_end = functools.partial(advance, epoch, step.number + 1)
            yield step
            mark_progress()
            advance(epoch, step.number + 1)
        advance(epoch + 1, 0)

    def _steps_in(self, epoch: int) -> int | None:
        """Return the steps of an epoch; None: they are known when the stream ends."""
        return self.plan.steps_per_epoch if isinstance(self.plan, StreamPlan) else self.plan.steps_in(epoch)

    def _steps_before(self, epoch: int) -> int:
        """Return the steps of the epochs before this one; of streams whose epochs end by themselves, those done."""
        plan, count = self.plan, self.plan.steps_per_epoch
        if count is None:
            return self.steps_done if epoch > self._position[0] else 0
        if isinstance(plan, (StreamPlan, WeightedPlan)) or type(plan).steps_in is Plan.steps_in:
            return epoch * count  # epochs are equal
        return sum(map(plan.steps_in, range(epoch)))

    def _pass(self, epoch: int, step: int) -> None:
        """Let the position be at this step of this epoch, or at the next epoch after the last step of an epoch."""
        if epoch > self._position[0]:
            self._before += self._position[1]
        self._position = max(self._position, (epoch, step))

    def _load_again(self, epoch: int, step: int, world_size: int, rank: int, number: int) -> LoadedMicroBatch:
        """Return a micro-batch of any rank, loaded beside the others: the position and the workers do not change.

        If the loader has workers, one more loads it and ends. What a data set opens at its first sample, for example a
        file, must not be open in this process when it forks the next workers.
        """
        plan = self._batch_sampler.plan
        micro = plan.step(epoch, step, rank, world_size)[number]
        indices = seeded(plan, epoch, micro)
        like = self.dataloader
        dataloader: DataLoader[Any] = DataLoader(
            like.dataset,
            batch_sampler=[indices],
            num_workers=min(like.num_workers, 1),
            collate_fn=like.collate_fn,
            timeout=like.timeout,
            worker_init_fn=like.worker_init_fn,
            multiprocessing_context=like.multiprocessing_context,
            generator=torch.Generator(),
        )
        batches = load_batches(dataloader)
        data = next(batches)
        batches.close()
        return LoadedMicroBatch(data, micro.weight, micro.index, micro.seed)


class ShardSampler(Sampler[int]):
    """Sample this rank's contiguous share of range(num_samples), in order and without padding.

    The sizes of the shares differ by at most one. It works with any DataLoader.

    Args:
        num_samples: samples in the data set, 0 or more.
        rank, world_size: None: those of the default process group, or rank 0 of 1 without a group.

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
        own_rank, own_world_size = _rank_and_world_size()
        self.indices = share(
            count, own_rank if rank is None else rank, own_world_size if world_size is None else world_size
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _closing(batches: Generator[Any]) -> Callable[[], None]:
    """Return a function that ends a generator of batches, and its workers, if it is still there."""
    known = weakref.ref(batches)

    def end() -> None:
        if (alive := known()) is not None:
            alive.close()

    return end


def _rank_and_world_size() -> tuple[int, int]:
    """Return those of the default process group, or rank 0 of 1 without a group."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


@functools.lru_cache(maxsize=64)
def _shares(count: int, world_size: int) -> tuple[int, ...]:
    return tuple(len(share(count, rank, world_size)) for rank in range(world_size))

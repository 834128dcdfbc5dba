"""`predict`: share out the batches, run the model, collect the outputs."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ..comm.nesting import to_device
from ..comm.transfer import Receiver, checked_receiver
from ..data.rng import seed_streams
from ..errors import DDParityError
from ..runtime.agreement import Agreement, agreed
from ..runtime.progress import progress
from .collect import Memory
from .identity import Key, checked_key, identity
from .metrics import Metric
from .model import Checksums, Model, callable_of, evaluating, reached
from .outputs import Schema
from .source import Balance, Batches, Shards, Source, assigned, check_balance, cut, is_stream

if TYPE_CHECKING:  # the import of Arrow is slow
    import pyarrow as pa

    from .directory import Directory

_POLL_S = 0.5  # between a rank's looks whether another one failed, and its counts of samples for the progress bar

Folder = str | os.PathLike[str]


def predict(
    model: Model,
    dataset: Any,
    batch_size: int,
    to: Receiver | Folder = 0,
    *,
    inputs: Callable[[Any], Any] | None = None,
    metric: Any = None,
    targets: Callable[[Any], Any] | None = None,
    balance: Balance = "contiguous",
    device: torch.device | str | None = None,
    rows_per_file: int | None = None,
    schema: pa.Schema | None = None,
    key: Key = None,
    show_progress: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **dataloader_options: Any,
) -> Any:
    """Run a model over a data set on all ranks; return outputs in data-set order on rank `to`, each sample once.

    Batch b is samples b * batch_size and following, for any world size, and has random streams of its own. Ranks run
    whole batches, so the outputs do not depend on the number of processes.

    Args:
        model: a module, or any function of a batch. A module, and modules that a function uses, run in eval mode and
            under no_grad. If one is a DDP module, the module inside it runs. Modes, buffers and random streams are
            restored at the end, also on an exception. Batches are moved to the device of the module, or to that of the
            modules that the function uses if it is the same for all.
        dataset: map-style, of the same length on every rank; or a stream that can be cut into shards: `num_shards`,
            and `shard(num_shards=, index=)` as datasets.IterableDataset, or a function `stream(reader, readers, epoch)`
            with an attribute `num_shards`. Batches of a stream are cut within a shard.
        batch_size: samples of a batch, at least 1.
        to: the rank that receives; "all"; or a directory for a Parquet data set with one row a sample. Each rank writes
            to the directory while it runs. After an interruption the same call completes it, at any world size.
        inputs: a function from a batch to what the model is called with. None: a module is called with the first entry
            of a list or tuple, as of a data set of (input, target), else with the batch; a function with the batch. A
            dict goes to a module's keywords if its forward takes them all.
        metric: return this instead of the outputs, which then do not move. It is a function of a batch's output and the
            batch that returns a number, which is summed over all batches, or an `Average`, for the weighted mean, or
            a pair of a sum and its weight; or a dict of these. Or it is a torchmetrics object: each rank updates a
            copy, the object does not change.
        targets: with a torchmetrics object, a function from a batch to the second argument of `update`. None: the
            batch's second entry.
        balance: "contiguous": each rank runs a contiguous share of the batches; "dynamic": a rank that is free runs the
            next ones, for samples that differ in cost.
        device: where outputs are kept; None: where the model leaves them.
        rows_per_file: of the Parquet data set, a multiple of `batch_size`. An interruption loses the files that are
            being written.
        schema: Arrow types of some columns of the Parquet data set, if the first batch does not show them, e.g. since
            it holds None.
        key: a str, an int or a nested tuple of them that names what this call computes. A call resumes a directory
            only if its key is equal. It is required to resume if the model is a function, or with `inputs` or
            `collate_fn`, since functions are not compared. Change it with anything else that is not compared: code;
            hooks of a module, and attributes other than numbers and strings; all but three samples of the data set.
        show_progress: show one progress bar for all ranks.
        seed: of the random streams, together with the batch.
        num_workers, collate_fn, dataloader_options: of torch.utils.data.DataLoader.

    Returns:
        The outputs; None on a rank that does not receive. The model's output for a batch is a nesting of dicts, tuples,
        named tuples and dataclasses. Its leaves are tensors and arrays with one row a sample, lists with one entry a
        sample, or None. In the result a tensor or array has all rows; if the shapes of rows differ it is a list with
        one tensor a sample. A list has all entries: numbers, strings, None, tensors and arrays of any shape, and
        nestings of them. The result of an empty data set, whose outputs have no structure, is an empty tensor.
        With `metric`: its value. With a directory: its Path on every rank, see `read_predictions`.

    Collectives: none while batches run, but a look at the store twice a second. At the end those of `bring_together`;
    with a metric those of `gather`; with a directory none.

    Raises:
        TypeError, ValueError: a bad argument, or one that differs between ranks; parameters, buffers that are saved, or
            samples that differ between ranks; an output without one row a sample; a batch whose output has another
            structure than the first one's; a directory that holds something else, or that needs `key` to be resumed.
        DDParityError: the model fails; names the data-set indices of the batch. SampleError: the data set fails.
        RankFailure: on every other rank, if one fails.

    Example:
        >>> predict(torch.nn.Identity(), torch.arange(5), batch_size=2)
        tensor([0, 1, 2, 3, 4])
        >>> predict(torch.nn.Identity(), torch.arange(5), 2, metric=lambda output, batch: output.sum())
        10
    """

    def predictor() -> Predictor:
        return Predictor(
            dataset,
            batch_size,
            balance=balance,
            seed=seed,
            num_workers=num_workers,
            collate_fn=collate_fn,
            **{"persistent_workers": False, **dataloader_options},
        )

    call = _Call(model, to, inputs, metric, targets, device, rows_per_file, schema, key, show_progress)
    return _predict(predictor, call)


class Predictor:
    """`predict` that keeps its data loader, so that a loop that predicts after each epoch keeps its workers.

    It takes the arguments of `predict` that are about the data; a call takes the others.

    Example:
        >>> predictor = Predictor(torch.arange(5), batch_size=2)
        >>> for epoch in range(2):
        ...     outputs = predictor(torch.nn.Identity())
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        balance: Balance = "contiguous",
        seed: int = 0,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **dataloader_options: Any,
    ) -> None:
        check_balance(balance)
        self.dataset = dataset
        self._balance = balance
        make: Callable[..., Source] = Shards if is_stream(dataset) else Batches
        if make is Shards and balance == "dynamic":
            raise ValueError(
                'predict(balance="dynamic") needs a map-style data set: workers get their shards before the first batch'
            )
        self._source = make(dataset, batch_size, seed, num_workers, collate_fn, dataloader_options)
        self._seed, self._batch_size = seed, batch_size
        self._collate_fn = collate_fn

    def __call__(
        self,
        model: Model,
        to: Receiver | Folder = 0,
        *,
        inputs: Callable[[Any], Any] | None = None,
        metric: Any = None,
        targets: Callable[[Any], Any] | None = None,
        device: torch.device | str | None = None,
        rows_per_file: int | None = None,
        schema: pa.Schema | None = None,
        key: Key = None,
        show_progress: bool = False,
    ) -> Any:
        """Predict, see `predict`. Every rank calls it."""
        call = _Call(model, to, inputs, metric, targets, device, rows_per_file, schema, key, show_progress)
        return _predict(lambda: self, call)


class Sink(Protocol):
    """Takes the outputs. Every rank calls `finish` after all ranks have run all batches; it returns the result."""

    def take(self, samples: range, where: str, output: Any, batch: Any) -> None: ...
    def finish(self) -> Any: ...


@dataclass(frozen=True)
class _Call:
    """The arguments of `predict` and `Predictor.__call__` that are not about the data."""

    model: Model
    to: Receiver | Folder
    inputs: Callable[[Any], Any] | None
    metric: Any
    targets: Callable[[Any], Any] | None
    device: torch.device | str | None
    rows_per_file: int | None
    schema: pa.Schema | None
    key: Key
    show_progress: bool

    def directory(self) -> Path | None:
        """Return the directory that outputs go to; None if they go to ranks.

        Raises:
            ValueError: the path is empty or a number, or a file is in its way.
        """
        if not isinstance(self.to, (str, os.PathLike)) or self.to == "all":
            return None
        if isinstance(self.to, str) and (not self.to or self.to.isdigit()):
            raise ValueError(f'predict(to={self.to!r}): give a rank as an integer, "all", or the path of a directory')
        path = Path(self.to)
        # On every rank, and not only on the one that makes the directory, so that all raise the same error.
        if (found := next(filter(os.path.lexists, (path, *path.parents)), None)) is not None and not found.is_dir():
            raise ValueError(
                f"predict(to={os.fspath(self.to)!r}): {found} is a file, and outputs go to a directory: give one that "
                f"is empty or new, or remove the file"
            )
        return path

    def check_metric(self) -> None:
        """Check that the metric is not a class, which is callable, too.

        Raises:
            TypeError: it is.
        """
        if isinstance(self.metric, type):
            name = self.metric.__name__
            raise TypeError(f"predict(metric={name}) got a class: give an instance, as in metric={name}(…)")


def _predict(predictor: Callable[[], Predictor], given: _Call) -> Any:
    joined = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    with ExitStack() as shown:
        with agreed("predict") as agreement:
            given.check_metric()
            checked_key(given.key)
            made = predictor()
            source, balance = made._source, made._balance
            modules = reached(given.model, inputs=given.inputs, metric=given.metric, targets=given.targets)
            if agreement is not None:
                kind = None if given.metric is None else type(given.metric).__name__
                own: dict[str, object] = {
                    "batch_size": made._batch_size,
                    "seed": made._seed,
                    "balance": balance,
                    "to": str(given.to),
                }
                own |= {"metric": kind, "rows_per_file": given.rows_per_file, "key": checked_key(given.key)}
                named: dict[str, object] = {f"predict's {name}": value for name, value in own.items()}
                named |= {"the data set's length": source.length, "the data set's num_shards": source.shards}
                checksums = Checksums(modules, not isinstance(given.model, nn.Module))
                agreement.all_same({**named, "the model": checksums.text}, {"the model": checksums.difference})
            call, device = callable_of(given.model, given.inputs, modules.values())
            path, chunks = given.directory(), cut(len(source), world_size, balance)
            sink: Sink
            if path is not None:
                directory = _directory(path, given, made, agreement, rank)
                shown.callback(directory.close)
                sink, chunks = directory, directory.chunks
            else:
                to = checked_receiver(given.to, world_size)
                receives = to in ("all", rank)
                if given.metric is not None:
                    sink = Metric(given.metric, given.targets, to, receives, source.length, device)
                else:
                    schema = Schema(agreement)
                    keep = None if given.device is None else torch.device(given.device)
                    sink = Memory(source, schema, to, rank, world_size, keep)
            count = _Count(agreement, shown, source.length, rank, given.show_progress)
            take = partial(agreement.count, "chunks") if agreement is not None else itertools.count(1).__next__
            mine = assigned(chunks, rank, world_size, balance, lambda: take() - 1)
            with evaluating(modules.values()):
                _run(call, device, source, mine, sink, agreement, count)
        count.show()  # after the agreement, all ranks have counted their samples
    with agreed("collecting the outputs of predict") as agreement:
        try:
            return sink.finish()
        except RuntimeError as error:
            if agreement is not None and not isinstance(error, DDParityError):
                agreement.raise_cause(error)  # the backend's error if another rank has ended
            raise


def _directory(path: Path, given: _Call, made: Predictor, agreement: Agreement | None, rank: int) -> Directory:
    from .directory import Directory, prepare, rows_of_a_file

    source = made._source
    if given.metric is not None:
        raise ValueError(
            f"predict(to={str(path)!r}, metric=…): a run that resumes does not see all outputs. Compute the metric on "
            f"read_predictions(), or call predict() once for each"
        )
    if not isinstance(source, Batches):
        raise TypeError(
            f"predict(to={str(path)!r}) got a data set that can only be iterated, but a row's index needs a known "
            f"length: collect the outputs on a rank, or give a map-style data set"
        )
    if rank == 0:
        known = identity(given.model, given.inputs, made._collate_fn, source.dataset, source.length)
        run = {
            **known.values,
            "length": source.length,
            "batch size": source.batch_size,
            "rows_per_file": rows_of_a_file(source, given.rows_per_file),
            "seed": made._seed,
            "schema": None if given.schema is None else str(given.schema),
            "key": checked_key(given.key),
        }
        prepared = prepare(path, run, known.uncompared)
        if agreement is not None:
            agreement.publish("prepared", prepared)
    else:
        assert agreement is not None, "there are other ranks"
        prepared = agreement.receive("prepared")
    if agreement is None:  # one process: its first batch is the data set's first, so it never waits for the types
        return Directory(path, source, prepared, given.schema, lambda: None, lambda: None, records=True)
    tell: Callable[[], None] = partial(agreement.publish, "types", "")
    hear: Callable[[], object] = partial(agreement.receive, "types")
    return Directory(path, source, prepared, given.schema, tell, hear, records=rank == 0)


def _run(
    call: Callable[[Any], Any],
    device: torch.device | None,
    source: Source,
    chunks: Iterator[range],
    sink: Sink,
    agreement: Agreement | None,
    count: _Count,
) -> None:
    looked = time.monotonic()
    compare = None if agreement is None else partial(_compare_samples, agreement)
    for samples, data in source.loaded(chunks, compare):
        seed_streams(source.seed(samples))
        where = source.where(samples)
        batch = data if device is None else to_device(data, device)
        output = None  # frees the last output, so that the model can use its memory again
        try:
            output = call(batch)
        except Exception as error:
            raise DDParityError(f"the model failed for the {where}: {type(error).__name__}: {error}") from error
        sink.take(samples, where, output, batch)
        del batch, data  # before the next batch is loaded
        count.add(len(samples))
        if time.monotonic() - looked > _POLL_S:
            looked = time.monotonic()
            count.show()
            if agreement is not None:
                agreement.check()
    count.show()


def _compare_samples(agreement: Agreement, digests: dict[int, str | None]) -> None:
    """Compare digests of a few samples, by their indices, with those of the first rank that calls this.

    Raises:
        ValueError: a sample differs.
    """
    theirs = json.loads(agreement.first_value("samples", json.dumps(digests)))
    for index, digest in digests.items():
        other = theirs[str(index)]
        if None not in (digest, other) and digest != other:
            raise ValueError(
                f"predict() got data sets that differ between ranks: they have the same length, but sample {index} of "
                f"this rank has other content than that of another rank. Give the same data set on every rank, e.g. "
                f"with the names of its files sorted"
            )


class _Count:
    """Counts the samples that all ranks have run, in the store, and shows the number on rank 0."""

    def __init__(
        self, agreement: Agreement | None, shown: ExitStack, length: int | None, rank: int, show: bool
    ) -> None:
        self._agreement = agreement
        self._display = shown.enter_context(progress(length, rank, "predict", "samples")) if show else None
        if show and agreement is not None and rank == 0:
            agreement.while_waiting = self.show  # also while rank 0 waits for the others
        self._new = self._total = 0

    def add(self, samples: int) -> None:
        self._new += samples

    def show(self) -> None:
        if self._display is None:
            return
        before = self._total
        self._total = before + self._new if self._agreement is None else self._agreement.count("samples", self._new)
        self._new = 0
        if self._total > before and self._display.due(self._total):
            self._display.update(self._total, self._total)

"""Watch data loaders: which samples each iteration draws, in which order, and from which random streams.

The indices are read where the loader takes them from its sampler, so workers that load ahead change nothing. When the
loop of a training has made enough optimizer steps, its iteration ends, and the rest of the sampler is read without
loading, so that the record of the epoch is complete.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import math
import sys
import time
import weakref
import zlib
from typing import Any

from .draws import CHUNK, MOST_INDICES, Iteration, RecordedSampler, StatefulSampler
from .items import note_items
from .journal import Journal, batch_size, digest, replace
from .private import private
from .streams import count_seeds, watched_fetch

_DIGESTS_PER_ITERATION = 4
_DIGESTS_OF_STREAM = 64
_MOST_DATASETS = 8


class _Recorder:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.opened: dict[int, Iteration] = {}  # the iteration that begins on a loader
        self.loaders: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self.datasets: dict[int, Any] = {}  # kept until the end, to read items again
        self.subsets: dict[int, str | None] = {}  # where they were made
        self.samplers: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
        self.made = 0
        self.iterations = 0
        self.drained = 0  # indices that were read where a loop was cut
        self.live: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_loaders(journal: Journal) -> None:
    """Put the recorder around torch's DataLoader, its iterators and fetchers, and Subset."""
    from torch.utils.data import DataLoader, DistributedSampler, Subset

    recorder = _Recorder(journal)
    iterator_class, fetchers, sampler = private().loader_hooks()
    advance: Any = iterator_class.__next__
    make_subset: Any = Subset.__init__
    make_sampler: Any = DistributedSampler.__init__

    def init_subset(self: Any, *args: Any, **options: Any) -> None:
        make_subset(self, *args, **options)
        recorder.subsets[id(self)] = journal.site()

    def init_sampler(self: Any, *args: Any, **options: Any) -> None:
        make_sampler(self, *args, **options)
        recorder.samplers[self] = journal.site()

    def following(self: Any) -> Any:
        iteration = getattr(self, "_ddparity_iteration", None)
        if iteration is None:
            return advance(self)
        if iteration.windows >= 0:
            iteration.steps += journal.windows - iteration.windows
        iteration.windows = journal.windows
        enough = iteration.steps >= journal.limit() and journal.backwards == 0 and not iteration.over
        if not journal.windows and journal.backwards and journal.compiles:  # steps that torch.compile hides
            enough = iteration.given >= 4 * journal.steps and not iteration.over
        frame = sys._getframe(1)
        if enough and _takes_an_end(frame):
            with journal.safely:
                _drain(self, iteration, recorder, handled=not _is_loop(frame))
            raise StopIteration
        journal.fetching = iteration.number
        begin = time.perf_counter()
        try:
            batch = advance(self)
        except StopIteration:
            if not iteration.over:
                iteration.over = True
                journal.write("end", it=iteration.number, given=iteration.given, how="exhausted")
            raise
        finally:
            journal.loading_s += time.perf_counter() - begin
        iteration.given += 1
        journal.given += 1
        journal.batch = batch_size(batch)
        most = _DIGESTS_OF_STREAM if iteration.stream else _DIGESTS_PER_ITERATION
        if iteration.given <= most:
            with journal.safely:
                journal.write("batch", it=iteration.number, n=iteration.given - 1, d=digest(batch), given=journal.given)
        elif iteration.given % CHUNK == 0:
            journal.write("given", it=iteration.number, given=iteration.given)
        return batch

    _watch_class(recorder, DataLoader)
    journal.watch_loader = lambda module: _watch_class(recorder, module.StatefulDataLoader)  # has both of its own
    private().set_index_sampler(lambda self: _recorded(self, sampler(self), recorder))
    replace(iterator_class, "__next__", following)
    replace(Subset, "__init__", init_subset)
    replace(DistributedSampler, "__init__", init_sampler)
    for kind in fetchers:
        replace(kind, "fetch", watched_fetch(journal, kind.fetch))
    count_seeds(journal)
    journal.at_end.append(lambda: _finish(recorder))


def _watch_class(recorder: _Recorder, kind: Any) -> None:
    """Put the recorder around the making of a class of loaders, and around the begin of a pass."""
    import torch

    journal = recorder.journal
    make: Any = kind.__init__
    iterate: Any = kind.__iter__

    def init(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        if journal.hidden or self in recorder.loaders or torch.utils.data.get_worker_info() is not None:
            return
        if type(self.dataset).__module__.startswith("ddparity."):  # its plan decides what is drawn, and is tested
            journal.passes += 1
            journal.write("ours", site=journal.site())
            return
        recorder.made += 1
        with journal.safely:
            recorder.loaders[self] = _describe(recorder, self, recorder.made, journal.site())

    def begin(self: Any) -> Any:
        described = recorder.loaders.get(self)
        if described is None or journal.hidden:
            return iterate(self)
        recorder.iterations += 1
        iteration = Iteration(recorder.iterations, described["stream"])
        described["passes"] += 1
        journal.passes += 1
        planned = None
        with contextlib.suppress(Exception):
            planned = None if described["stream"] else len(self)
        iteration.planned = planned
        sampler_of = self.batch_sampler if self.batch_sampler is not None else self.sampler
        inner = getattr(sampler_of, "sampler", sampler_of)
        journal.write(
            "iter",
            it=iteration.number,
            loader=described["id"],
            n=described["passes"] - 1,
            planned=planned,
            epoch=getattr(inner, "epoch", None) if isinstance(getattr(inner, "epoch", None), int) else None,
            site=journal.site(),
        )
        recorder.opened[id(self)] = iteration
        try:
            iterator = iterate(self)
        finally:
            recorder.opened.pop(id(self), None)
        with contextlib.suppress(AttributeError), journal.safely:  # a subclass may give an iterator of its own
            iterator._ddparity_iteration = iteration
            recorder.live.add(iterator)
            weakref.finalize(iterator, _left, journal, iteration).atexit = False
            base, workers = private().iterator_seed(iterator)
            journal.write("seed", it=iteration.number, base=base, workers=workers)
        return iterator

    replace(kind, "__init__", init)
    replace(kind, "__iter__", begin)


def _recorded(loader: Any, sampler: Any, recorder: _Recorder) -> Any:
    if loader not in recorder.loaders or id(loader) not in recorder.opened:
        return sampler
    kind = StatefulSampler if hasattr(sampler, "state_dict") else RecordedSampler
    return kind(sampler, loader, recorder.opened, recorder.journal)


def _left(journal: Journal, iteration: Iteration) -> None:
    """Record that a loop left an iteration before its end."""
    if not iteration.over:
        iteration.over = True
        journal.write("end", it=iteration.number, given=iteration.given, how="left")


def _finish(recorder: _Recorder) -> None:
    """Record iterations that a `break` ended, and items of each data set."""
    for iterator in list(recorder.live):
        _left(recorder.journal, iterator._ddparity_iteration)
    note_items(recorder.journal, recorder.datasets)


def _takes_an_end(frame: Any) -> bool:
    """Return whether the caller of `next` expects an end: it is a loop, or handles StopIteration."""
    code = frame.f_code
    loops = dis.opname[code.co_code[frame.f_lasti]] in ("FOR_ITER", "SEND", "YIELD_FROM")
    return loops or "StopIteration" in code.co_names


def _is_loop(frame: Any) -> bool:
    """Return whether the caller of `next` is a loop, which ends with the batches. A generator may begin again."""
    code = frame.f_code
    return dis.opname[code.co_code[frame.f_lasti]] == "FOR_ITER" and not code.co_flags & inspect.CO_GENERATOR


def _drain(iterator: Any, iteration: Iteration, recorder: _Recorder, handled: bool) -> None:
    """Read the rest of the sampler without loading anything, unless the run would read more than MOST_INDICES so."""
    iteration.over = True
    recorder.journal.write("end", it=iteration.number, given=iteration.given, how="cut", handled=handled)
    begin = iteration.indices
    most = min(MOST_INDICES, begin + MOST_INDICES - recorder.drained)
    whole = (iteration.planned or 0) * begin // max(1, iteration.batches)
    if iteration.stream or whole > most:
        return
    for _ in private().undrawn(iterator):  # to its end: what has more batches than its length begins again by itself
        if iteration.indices > most or iteration.batches > (iteration.planned or math.inf):
            break
    recorder.drained += iteration.indices - begin


def _describe(recorder: _Recorder, loader: Any, number: int, site: str | None) -> dict[str, Any]:
    """Record what a loader is made of."""
    from torch.utils.data import DistributedSampler, IterableDataset, Subset

    dataset = loader.dataset
    stream = isinstance(dataset, IterableDataset)
    length = None
    with contextlib.suppress(Exception):
        length = None if stream else len(dataset)
    base, mapped, subset_site = dataset, None, None
    while isinstance(base, Subset):
        subset_site = recorder.subsets.get(id(base), subset_site)
        indices = [int(i) for i in base.indices]
        mapped = indices if mapped is None else [indices[i] for i in mapped]
        base = base.dataset
    sampler = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    inner = getattr(sampler, "sampler", sampler)
    base_length = None
    with contextlib.suppress(Exception):
        base_length = len(base) if not stream else None
    recorder.journal.write(
        "loader",
        id=number,
        site=site,
        stream=stream,
        dataset=f"{type(base).__module__}.{type(base).__qualname__}",
        key=id(base),
        own=id(dataset),
        length=length,
        base_length=base_length,
        subset=mapped if mapped is None or len(mapped) <= MOST_INDICES else None,
        subset_digest=None if mapped is None else zlib.crc32(repr(mapped).encode()),
        subset_site=subset_site,
        sampler=f"{type(inner).__module__}.{type(inner).__qualname__}",
        sampler_site=recorder.samplers.get(inner) if isinstance(inner, DistributedSampler) else None,
        sampler_drops=bool(getattr(inner, "drop_last", False)),
        repeats=_repeats(inner),
        chosen=_chosen(sampler),
        batch=loader.batch_size,
        drop_last=bool(getattr(loader, "drop_last", False)),
        workers=loader.num_workers,
        shuffles=_shuffles(dataset) if stream else None,
    )
    if not stream and len(recorder.datasets) < _MOST_DATASETS:
        recorder.datasets[id(base)] = base
    return {"id": number, "stream": stream, "passes": 0}


def _chosen(sampler: Any) -> list[int | None] | None:
    """Return how many samples the innermost sampler draws from, and a checksum of them; None where no one says so.

    It is the loader's own, such as SubsetRandomSampler, or stands below one that shares its samples out, also as what
    that one calls its data set.
    """
    from torch.utils.data import Sampler

    found = [sampler]
    while len(found) < 8:
        held = getattr(found[-1], "__dict__", {})
        values = [*held.values(), *getattr(held.get("dataset"), "__dict__", {}).values()]
        below = [one for one in values if isinstance(one, Sampler) and not any(one is other for other in found)]
        if not below:
            break
        found.append(below[0])
    with contextlib.suppress(Exception):  # a sampler without a length, or whose indices are no numbers
        if len(indices := getattr(found[-1], "indices", ())) and len(indices) <= MOST_INDICES:
            chosen = sorted({int(i) for i in indices})
            return [len(chosen), zlib.crc32(repr(chosen).encode())]
        if any(hasattr(one, "num_replicas") for one in found[:-1]):
            return [len(found[-1]), None]
    return None


def _repeats(sampler: Any) -> bool:
    """Return whether a sampler gives a sample several times by design, in other augmentations, to other ranks too."""
    values = getattr(sampler, "__dict__", {}).items()
    return any("repe" in name and isinstance(value, int) and value > 1 for name, value in values)


def _shuffles(dataset: Any) -> str | None:
    """Return the attribute of a stream that says that its order depends on the epoch, or on a seed."""
    names = [name for name in ("set_epoch", "epoch", "_epoch", "current_epoch") if hasattr(dataset, name)]
    names += [name for name in ("shuffle", "shuffle_buffer", "buffer_size") if getattr(dataset, name, False)]
    return next(iter(names), None)

"""Watch data loaders: which samples each iteration draws, in which order, and from which random streams.

The indices are read where the loader takes them from its sampler, so workers that load ahead change nothing. When the
loop of a training has made enough optimizer steps, its iteration ends, and the rest of the sampler is read without
loading, so that the record of the epoch is complete.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import io
import os
import random
import sys
import time
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

from .journal import Journal, digest, replace
from .private import private

_MOST_INDICES = 2_000_000  # of one iteration
_DIGESTS_PER_ITERATION = 4
_DIGESTS_OF_STREAM = 64
_FETCHES = 6
_CHUNK = 100
_PROBES = 6
_PROBE_S = 2.0
_MOST_DATASETS = 8


class _Iteration:
    """One pass over a loader."""

    def __init__(self, number: int, stream: bool) -> None:
        self.number, self.stream = number, stream
        self.batches = 0  # drawn from the sampler
        self.given = 0  # to the loop
        self.planned: int | None = None  # the loader's length
        self.windows = -1  # optimizer steps at the last `next`
        self.steps = 0
        self.indices = 0
        self.pending: list[list[Any]] = []
        self.complete = False
        self.over = False


class _RecordedSampler:
    """A loader's sampler of batches, which notes what it gives."""

    def __init__(self, sampler: Any, loader: Any, recorder: _Recorder) -> None:
        self._sampler, self._loader, self._recorder = sampler, loader, recorder

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name in ("_sampler", "_loader", "_recorder"):
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __iter__(self) -> Iterator[Any]:
        iteration = self._recorder.opened.get(id(self._loader))  # now, not at the first item
        drawn: Iterator[Any] = iter(self._sampler)
        if iteration is None:
            return drawn
        kind = _StatefulBatches if hasattr(drawn, "state_dict") else _Batches
        return kind(drawn, iteration, self._recorder)


class _Batches:
    """The batches of indices of one iteration, which are noted as they are given."""

    def __init__(self, drawn: Any, iteration: _Iteration, recorder: _Recorder) -> None:
        self._drawn, self._iteration, self._recorder = drawn, iteration, recorder

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._drawn)
        except StopIteration:
            if not self._iteration.complete:
                self._iteration.complete = True
                self._recorder.flush(self._iteration)
            raise
        with self._recorder.journal.safely:
            self._recorder.drawn(self._iteration, batch)
        return batch


class _StatefulSampler(_RecordedSampler):
    """A sampler that torchdata's loader saves and restores: it asks for these methods by name."""

    def state_dict(self) -> Any:
        return self._sampler.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._sampler.load_state_dict(state)


class _StatefulBatches(_Batches):
    def state_dict(self) -> Any:
        return self._drawn.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._drawn.load_state_dict(state)


class _Recorder:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.opened: dict[int, _Iteration] = {}  # the iteration that begins on a loader
        self.loaders: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self.datasets: dict[int, Any] = {}  # kept until the end, to read items again
        self.subsets: dict[int, str | None] = {}  # where they were made
        self.samplers: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
        self.made = 0
        self.iterations = 0
        self.live: weakref.WeakSet[Any] = weakref.WeakSet()

    def drawn(self, iteration: _Iteration, batch: Any) -> None:
        iteration.batches += 1
        if iteration.stream or iteration.indices > _MOST_INDICES:
            return
        items = batch if isinstance(batch, (list, tuple)) else [batch]
        row = [int(i) if hasattr(i, "__index__") else zlib.crc32(repr(i).encode()) for i in items]
        iteration.indices += len(row)
        iteration.pending.append(row)
        if iteration.batches < _CHUNK or len(iteration.pending) >= _CHUNK:
            self.flush(iteration)

    def flush(self, iteration: _Iteration) -> None:
        if iteration.pending or iteration.complete:
            self.journal.write("draw", it=iteration.number, rows=iteration.pending, complete=iteration.complete)
            iteration.pending = []


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
        if enough and _takes_an_end(sys._getframe(1)):
            with journal.safely:
                _drain(self, iteration, recorder)
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
        most = _DIGESTS_OF_STREAM if iteration.stream else _DIGESTS_PER_ITERATION
        if iteration.given <= most:
            with journal.safely:
                journal.write("batch", it=iteration.number, n=iteration.given - 1, d=digest(batch))
        elif iteration.given % _CHUNK == 0:
            journal.write("given", it=iteration.number, given=iteration.given)
        return batch

    _watch_class(recorder, DataLoader)
    journal.watch_loader = lambda module: _watch_class(recorder, module.StatefulDataLoader)  # has both of its own
    private().set_index_sampler(lambda self: _recorded(self, sampler(self), recorder))
    replace(iterator_class, "__next__", following)
    replace(Subset, "__init__", init_subset)
    replace(DistributedSampler, "__init__", init_sampler)
    for kind in fetchers:
        replace(kind, "fetch", _watched_fetch(journal, kind.fetch))
    _count_seeds(journal)
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
        iteration = _Iteration(recorder.iterations, described["stream"])
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
    kind = _StatefulSampler if hasattr(sampler, "state_dict") else _RecordedSampler
    return kind(sampler, loader, recorder)


def _left(journal: Journal, iteration: _Iteration) -> None:
    """Record that a loop left an iteration before its end."""
    if not iteration.over:
        iteration.over = True
        journal.write("end", it=iteration.number, given=iteration.given, how="left")


def _takes_an_end(frame: Any) -> bool:
    """Return whether the caller of `next` expects an end: it is a loop, or handles StopIteration."""
    code = frame.f_code
    loops = dis.opname[code.co_code[frame.f_lasti]] in ("FOR_ITER", "SEND", "YIELD_FROM")
    return loops or "StopIteration" in code.co_names


def _drain(iterator: Any, iteration: _Iteration, recorder: _Recorder) -> None:
    """Read the rest of the sampler without loading anything."""
    iteration.over = True
    recorder.journal.write("end", it=iteration.number, given=iteration.given, how="cut")
    if not iteration.stream:
        for _ in private().undrawn(iterator):
            if iteration.indices > _MOST_INDICES or iteration.batches == iteration.planned:
                break


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
        subset=mapped if mapped is None or len(mapped) <= _MOST_INDICES else None,
        subset_digest=None if mapped is None else zlib.crc32(repr(mapped).encode()),
        subset_site=subset_site,
        sampler=f"{type(inner).__module__}.{type(inner).__qualname__}",
        sampler_site=recorder.samplers.get(inner) if isinstance(inner, DistributedSampler) else None,
        sampler_drops=bool(getattr(inner, "drop_last", False)),
        repeats=_repeats(inner),
        batch=loader.batch_size,
        drop_last=bool(getattr(loader, "drop_last", False)),
        workers=loader.num_workers,
        shuffles=_shuffles(dataset) if stream else None,
    )
    if not stream and len(recorder.datasets) < _MOST_DATASETS:
        recorder.datasets[id(base)] = base
    return {"id": number, "stream": stream, "passes": 0}


def _repeats(sampler: Any) -> bool:
    """Return whether a sampler gives a sample several times by design, in other augmentations, to other ranks too."""
    values = getattr(sampler, "__dict__", {}).items()
    return any("repe" in name and isinstance(value, int) and value > 1 for name, value in values)


def _shuffles(dataset: Any) -> str | None:
    """Return the attribute of a stream that says that its order depends on the epoch, or on a seed."""
    names = [name for name in ("set_epoch", "epoch", "_epoch", "current_epoch") if hasattr(dataset, name)]
    names += [name for name in ("shuffle", "shuffle_buffer", "buffer_size") if getattr(dataset, name, False)]
    return next(iter(names), None)


def _watched_fetch(journal: Journal, fetch: Any) -> Any:
    """Return torch's fetch with a record of the random streams before and after it, for its first calls."""

    @functools.wraps(fetch)
    def watched(self: Any, index: Any) -> Any:
        done = getattr(self, "_ddparity_fetches", 0)
        if done >= _FETCHES or journal.hidden or type(self.dataset).__module__.startswith("ddparity."):
            return fetch(self, index)
        self._ddparity_fetches = done + 1
        import torch

        before, seeds = stream_states(), journal.seeds
        found = fetch(self, index)
        after = stream_states()
        if before != after:
            info = torch.utils.data.get_worker_info()
            journal.write(
                "fetch",
                n=done,
                worker=None if info is None else info.id,
                base=None if info is None else info.seed - info.id,
                parent=os.getppid(),
                own=id(self.dataset),  # the same in a forked worker
                it=journal.fetching if info is None else None,
                before=before,
                drew=[a != b for a, b in zip(before, after)],
                reseeded=journal.seeds != seeds,
            )
        return found

    return watched


def stream_states() -> list[int]:
    """Return checksums of the states of the global random streams: torch's, NumPy's and Python's."""
    import torch

    states = [zlib.crc32(torch.get_rng_state().numpy().tobytes()), 0, zlib.crc32(repr(random.getstate()).encode())]
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        states[1] = zlib.crc32(state[1].tobytes(), int(state[2]))
    return states


def _count_seeds(journal: Journal) -> None:
    """Count the calls that seed a global stream: a data set that seeds itself by item may repeat numbers by design."""
    import torch

    def counted(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            journal.seeds += 1
            return function(*args, **options)

        return call

    torch.manual_seed = counted(torch.manual_seed)
    torch.random.manual_seed = torch.manual_seed
    random.seed = counted(random.seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed = counted(numpy.random.seed)


def _finish(recorder: _Recorder) -> None:
    """Record iterations that a `break` ended, and items of each data set, read twice under one seed."""
    journal = recorder.journal
    for iterator in list(recorder.live):
        _left(journal, iterator._ddparity_iteration)
    start = time.monotonic()
    for key, dataset in recorder.datasets.items():
        length = None
        with contextlib.suppress(Exception):
            length = len(dataset)
        if not length or time.monotonic() - start > _PROBE_S:
            continue
        places = sorted({i * (length - 1) // max(1, _PROBES - 1) for i in range(_PROBES)})
        digests = []
        for place in places:
            one, two = _read(dataset, place), _read(dataset, place)
            digests.append(one if one == two else None)
            if time.monotonic() - start > _PROBE_S:
                break
        journal.write("items", key=key, places=places[: len(digests)], digests=digests)


def _read(dataset: Any, place: int) -> int | None:
    import torch

    kept = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    kept_numpy = None if numpy is None else numpy.random.get_state()
    torch.default_generator.manual_seed(0)
    random.seed(0)
    if numpy is not None:
        numpy.random.seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return digest(dataset[place])
    except Exception:
        return None
    finally:
        random.setstate(kept[0])
        torch.set_rng_state(kept[1])
        if numpy is not None and kept_numpy is not None:
            numpy.random.set_state(kept_numpy)

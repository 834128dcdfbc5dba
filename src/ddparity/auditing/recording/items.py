"""Read items of the data sets again at the end, so that the ranks' data sets can be compared."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from .journal import Journal, digest

_PROBES = 6  # items of a data set
_PROBE_S = 2.0  # of all data sets
_WAIT_S = 3.0  # longer for an item that began in time
_MOST_STORED = 10_000  # items of a sequence
_DEEPEST = 3  # data sets in data sets


def note_items(journal: Journal, datasets: Mapping[int, Any]) -> None:
    """Record some items of each data set, read twice under one seed. The keys are ids.

    An item may wait for what never comes, so a thread reads them, for some seconds at most.
    """
    output = sys.stdout
    journal.reading = True
    journal.hidden += 1
    left = list(datasets)
    reader = threading.Thread(target=_note_items, args=(journal, datasets, left), daemon=True)
    try:
        reader.start()
        reader.join(_PROBE_S + _WAIT_S)
    except RuntimeError:  # Python 3.12 and later start no thread when they end
        _note_items(journal, datasets, left)
    if reader.is_alive():
        sys.stdout = output
        journal.write(
            "items", key=left[0], places=[], digests=[], stored=[], samples=[], drawn=True
        )  # samples of a queue
        return
    journal.reading = False
    journal.hidden -= 1


def _note_items(journal: Journal, datasets: Mapping[int, Any], left: list[int]) -> None:
    start = time.monotonic()
    for key, dataset in datasets.items():
        del left[: left.index(key)]
        length = None
        with contextlib.suppress(Exception):
            length = len(dataset)
        if not length or time.monotonic() - start > _PROBE_S:
            continue
        places = sorted({i * (length - 1) // max(1, _PROBES - 1) for i in range(_PROBES)})
        digests: list[list[int | None] | None] = []
        draws: list[tuple[list[int | None] | None, ...]] = []
        for place in places:
            one, two = _read(dataset, place), _read(dataset, place)
            digests.append(one if one == two else None)
            draws.append((one, _read(dataset, place, seed=1 + place)))
            if time.monotonic() - start > _PROBE_S:
                break
        stored: list[tuple[int, bool]] = []
        with contextlib.suppress(Exception):
            stored = _stored([dataset], length)
        places, kept = places[: len(digests)], [one for one, _ in stored]
        samples = [one for one, is_value in stored if not is_value]
        drawn = _is_drawn(draws)
        journal.write("items", key=key, places=places, digests=digests, stored=kept, samples=samples, drawn=drawn)


def _is_drawn(draws: list[tuple[list[int | None] | None, ...]]) -> bool:
    """Return whether each part of the items, also the label, is another when it is read again under another seed."""
    pairs = [list(zip(one, two)) for one, two in draws if one is not None and two is not None]
    return bool(pairs) and all(any(a != b for a, b in part) for part in zip(*pairs))


def _stored(holder: Any, length: int, depth: int = 0) -> list[tuple[int, bool]]:
    """Return checksums of what a data set keeps for its items, and whether each is one number an item.

    Of sequences and arrays that are not shorter than the data set. One integer an item is no sample: a label or place.
    """
    import torch

    values = holder if isinstance(holder, (list, tuple)) else getattr(holder, "__dict__", {}).values()
    found: list[tuple[int, bool]] = []
    for value in values:
        is_array = isinstance(value, torch.Tensor) or hasattr(value, "dtype")
        is_sequence = value.ndim > 0 if is_array else isinstance(value, (list, tuple, str, bytes))
        if is_sequence and len(value) >= length:
            is_value, is_whole = _numbers(value, is_array)
            if not (is_whole and len(value) == length):
                found.append((digest(value[:_MOST_STORED]), is_value and len(value) == length))
        elif depth < _DEEPEST and isinstance(value, (tuple, torch.utils.data.Dataset)):
            found += _stored(value, length, depth + 1)
    return found


def _numbers(value: Any, is_array: bool) -> tuple[bool, bool]:
    """Return whether a sequence has one number at each place, and whether those are integers, or nothing yet."""
    if is_array:
        return value.ndim == 1, value.ndim == 1 and "float" not in str(value.dtype)
    first = value[0] if isinstance(value, (list, tuple)) else value
    return isinstance(first, (int, float)), first is None or isinstance(first, int)


def _read(dataset: Any, place: int, seed: int = 0) -> list[int | None] | None:
    """Return checksums of the parts of an item; None for one that is its place."""
    import torch

    kept = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    kept_numpy = None if numpy is None else numpy.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            item = dataset[place]
        parts = item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else [item]
        return [None if _is_place(one, place) else digest(one) for one in parts]
    except Exception:
        return None
    finally:
        random.setstate(kept[0])
        torch.set_rng_state(kept[1])
        if numpy is not None and kept_numpy is not None:
            numpy.random.set_state(kept_numpy)


def _is_place(value: Any, place: int) -> bool:
    import torch

    single = isinstance(value, int) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return single and int(value) == place

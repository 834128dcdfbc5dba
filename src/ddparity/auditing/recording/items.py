"""Read items of the data sets again at the end, so that the ranks' data sets can be compared."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import time
from collections.abc import Mapping
from typing import Any

from .journal import Journal, digest

_PROBES = 6  # items of a data set
_PROBE_S = 2.0  # of all data sets


def note_items(journal: Journal, datasets: Mapping[int, Any]) -> None:
    """Record some items of each data set, read twice under one seed. The keys are ids."""
    start = time.monotonic()
    for key, dataset in datasets.items():
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

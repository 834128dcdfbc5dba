"""Which ranks have not come to an agreement: what that costs the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ddparity.runtime.agreement import Agreement, Calls

RANKS = 24


def test_one_rank_asks_for_all_which_have_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of those that wait would ask for each rank otherwise: a million requests in a job of 1,024."""
    store, asked, add = dist.HashStore(), [], Store.add

    def counted(self: Any, key: str, amount: int) -> int:
        asked.append(key)
        return int(add(self, key, amount))

    for rank in range(RANKS - 2):
        store.add(f"first/{rank}", 1)
    calls = Calls("first", 1)
    waiting = [Agreement(store, "first/call1", rank, range(RANKS), "first", calls) for rank in range(RANKS - 2)]
    monkeypatch.setattr(Store, "add", counted)
    with ThreadPoolExecutor(len(waiting)) as pool:
        found = list(pool.map(lambda one: one._absent(calls), waiting))
    assert found == [[RANKS - 2, RANKS - 1]] * len(waiting)
    assert len(asked) == len(waiting) + RANKS

"""The ranks agree on what they are about to exchange, before a collective that would hang where they differ."""

from __future__ import annotations

import torch.distributed as dist

from ..compat import group_name
from ..runtime.agreement import Meeting, reaching_store, store_root


def agree(group: dist.ProcessGroup, what: str) -> None:
    """Return when all ranks of the group have come here with the same `what`.

    Raises ValueError on a rank that came with something else, and RankFailure on the others, at once. No collective:
    some short requests to the group's store.
    """
    rank, store, key = dist.get_rank(), store_root(), f"batchnorm/{group_name(group)}"
    with reaching_store(what):
        call = store.add(f"{key}/calls/{rank}", 1)
    meeting = Meeting(store, f"{key}/call{call}", rank, dist.get_process_group_ranks(group), what)
    try:
        meeting.same("what a SyncBatchNorm is about to exchange", what)
    except ValueError as error:
        meeting.fail(error)
        raise
    meeting.arrive()
    meeting.wait()

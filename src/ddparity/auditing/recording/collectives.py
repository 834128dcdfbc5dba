"""Watch the process group: who joined it, the sequence of collectives, and small values that are reduced."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

from .journal import Journal, checksum

_NAMES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",  # torch 2.13 renamed what ends with `tensor`
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "gather_into_tensor",
    "gather_single",
    "all_reduce_coalesced",
    "all_gather_coalesced",
    "all_to_all",
    "all_to_all_single",
    "gather",
    "scatter",
    "barrier",
    "monitored_barrier",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
)
_SMALL = 64  # values that are recorded
_MOST_ROWS = 100_000  # of an array that is looked at
_MOST = 20_000
_DIGESTS = 400


def watch_collectives(journal: Journal) -> None:
    """Put the recorder around the functions of torch.distributed, and `init_process_group`."""
    import torch.distributed as dist

    if not dist.is_available():
        return
    count = [0]

    def watched(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            import torch

            if torch.compiler.is_compiling() or journal.hidden or count[0] > _MOST:
                return function(*args, **options)
            count[0] += 1
            outside = dist.GroupMember.NON_GROUP_MEMBER
            group = next((one for one in (*args, *options.values()) if _is_group(one)), None)
            if group is outside:  # torch warns and returns
                return function(*args, **options)
            values: dict[str, Any] = {"op": None}
            with journal.safely:
                values = _describe(journal, name, args, options, count[0])
            ranks = None
            if group is not None and group is not dist.group.WORLD and isinstance(group, dist.ProcessGroup):
                ranks = dist.get_process_group_ranks(group)
            site = journal.site()
            journal.write("collective", name=name, n=count[0], group=ranks, site=site, **values)
            if math.prod(values.get("shape", ())) > _SMALL:  # it may change parameters
                journal.shape.append(site)
            journal.hidden += 1
            try:
                return function(*args, **options)
            finally:
                journal.hidden -= 1
                journal.write("completed", n=count[0])

        return call

    for name in _NAMES:
        if hasattr(dist, name):
            function = watched(name, getattr(dist, name))
            setattr(dist, name, function)
            setattr(dist.distributed_c10d, name, function)

    for name in ("send", "recv", "isend", "irecv", "batch_isend_irecv", "new_group"):
        function = _noted(journal, getattr(dist, name), "group" if name == "new_group" else "message", of=name)
        setattr(dist, name, function)
        setattr(dist.distributed_c10d, name, function)

    with journal.safely:
        _watch_store(journal)
    begin, end = dist.init_process_group, dist.destroy_process_group

    @functools.wraps(begin)
    def init(*args: Any, **options: Any) -> Any:
        journal.write("joining", site=journal.site())
        journal.hidden += 1
        try:
            result = begin(*args, **options)
        finally:
            journal.hidden -= 1
        journal.world = dist.get_world_size()
        journal.write(
            "joined", rank=dist.get_rank(), world=dist.get_world_size(), backend=dist.get_backend(), site=journal.site()
        )
        return result

    @functools.wraps(end)
    def destroyed(*args: Any, **options: Any) -> Any:
        journal.write("left", site=journal.site())
        return end(*args, **options)

    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.destroy_process_group = init, destroyed  # type: ignore[attr-defined]  # dist re-exports them
    journal.at_end.append(lambda: journal.write("ended", group=dist.is_initialized()))


def _watch_store(journal: Journal) -> None:
    """Record what the script itself says to other ranks by way of a store."""
    from torch import distributed

    dist: Any = distributed

    def told(function: Any) -> Any:
        noted = _noted(journal, function, "message")

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            own = not journal.hidden and not journal.is_library(sys._getframe(1).f_code.co_filename)
            return (noted if own else function)(*args, **options)

        return call

    for name in ("set", "get", "wait", "add", "compare_set", "multi_get", "multi_set", "check", "append"):
        for kind in (dist.Store, dist.TCPStore, dist.FileStore, dist.PrefixStore):
            if name in vars(kind):
                setattr(kind, name, told(getattr(kind, name)))


def _is_group(value: Any) -> bool:
    import torch.distributed as dist

    return isinstance(value, dist.ProcessGroup) or value is dist.GroupMember.NON_GROUP_MEMBER


def _noted(journal: Journal, function: Any, kind: str, of: str = "store") -> Any:
    """Return a function with a record of each call that has ended: messages between two ranks are no collectives.

    Of messages also where it begins: the other rank may have one, and say so, before the call ends.
    """
    count = [0]

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if kind == "message" and count[0] < _MOST:
            journal.write(kind, of=of)
        result = function(*args, **options)
        count[0] += 1
        if count[0] < _MOST:
            journal.write(kind, of=of)
        return result

    return call


def _numbers(given: Any) -> list[float]:
    """Return the numbers of an object that ranks gather, such as `(correct, count)`, or a dict of metrics."""
    if isinstance(given, dict):
        given = list(given.values())
    if isinstance(given, (list, tuple)):
        return [number for one in given[:_SMALL] for number in _numbers(one)]
    return [float(given)] if isinstance(given, (int, float)) else []


def _rows(given: Any) -> int | None:
    """Return the rows of an object that ranks gather: an array, a list of numbers, or arrays; else None.

    Also None where whole numbers that are all different may say which samples the rows are of.
    """
    if isinstance(given, (list, tuple)):
        if given and all(hasattr(one, "tolist") and hasattr(one, "ndim") for one in given):
            parts = [_rows(one) for one in given]
            return None if None in parts else sum(part or 0 for part in parts)
        if not all(isinstance(one, (int, float)) for one in given):
            return None
        named = all(isinstance(one, int) for one in given) and len({*given}) == len(given)
        return None if named else len(given)
    if not hasattr(given, "tolist") or not getattr(given, "ndim", 0):
        return None
    return None if _names_rows(given) else len(given)


def _names_rows(array: Any) -> bool:
    """Return whether an array, or one of its few columns, has whole numbers that are all different."""
    if not 1 <= array.ndim <= 2 or array.shape[0] < 2 or array.shape[0] > _MOST_ROWS or math.prod(array.shape[1:]) > 8:
        return False
    columns = [array.tolist()] if array.ndim == 1 else list(zip(*array.tolist()))
    return any(len({*one}) == len(one) and all(float(v).is_integer() for v in one) for one in columns)


def _describe(
    journal: Journal, name: str, args: tuple[Any, ...], options: dict[str, Any], number: int
) -> dict[str, Any]:
    """Return the shape and type of the first tensor; its values where they are few; whether it is a gradient."""
    import torch
    import torch.distributed as dist

    tensors = [one for one in (*args, *options.values()) if isinstance(one, torch.Tensor)]
    second = name.endswith(("_tensor", "_single")) and len(tensors) > 1  # the first is the output
    found = tensors[second] if tensors else None
    op = next(
        (one for one in (*args, *options.values()) if isinstance(one, dist.ReduceOp | dist.ReduceOp.RedOpType)), None
    )
    values: dict[str, Any] = {"op": None if op is None else str(op).rpartition(".")[2]}
    if name == "all_reduce" and op is None:
        values["op"] = "SUM"
    if "gather_object" in name:
        given = options.get("obj", args[int(name == "all_gather_object")] if len(args) > int(name[0] == "a") else None)
        values |= {"numbers": _numbers(given)[:_SMALL], "rows": _rows(given)}
    if found is None:
        return values
    values |= {"shape": list(found.shape), "dtype": str(found.dtype)}
    if found.grad_fn is not None:
        values["graph"] = True
    readable = found.device.type == "cpu" and not hasattr(found, "placements")
    if found.numel() <= _SMALL and readable:
        values["values"] = [float(v) for v in found.detach().reshape(-1).tolist()] if not found.is_complex() else None
    if "gather" in name and readable and not found.is_complex():
        values["named"] = _names_rows(found.detach())
    if name == "all_reduce" and number < _DIGESTS and found.is_floating_point() and not hasattr(found, "placements"):
        values |= {"digest": checksum(found), "gradient": journal.is_gradient(found)}
        if values["gradient"] and not journal.reduced:
            journal.reduced = True
            values["spreads"] = journal.spreads()
    return values

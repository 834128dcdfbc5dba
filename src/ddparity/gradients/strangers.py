"""Parameters that an optimizer trains though no replicated or sharded model has them, so that nobody reduces them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..comm.allreduce import copies_of_ranks
from ..comm.bits import parts, words_of
from ..errors import DDParityError
from ..runtime.agreement import Agreement
from .replica import replicated_models

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Seen:
    """What an optimizer trained when it stepped first: how many parameters, and the strangers, with their bits."""

    number: int
    strangers: list[nn.Parameter]
    words: list[int]


_seen: weakref.WeakKeyDictionary[Optimizer, _Seen] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []  # one for all loops
_told: list[bool] = []


def watch() -> None:
    """Look at each optimizer that steps from now on."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))


def leave_out(optimizer: Optimizer) -> None:
    """Do not look at this optimizer: each rank trains its own model with it, on purpose."""
    _seen[optimizer] = _Seen(_number(optimizer), [], [])


def _number(optimizer: Optimizer) -> int:
    number = 0
    for group in optimizer.param_groups:
        number += len(group["params"])
    return number


def _look(optimizer: Optimizer, _arguments: Any, _options: Any) -> None:
    number, seen = _number(optimizer), _seen.get(optimizer)
    if seen is None or seen.number != number:
        everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found = _strangers(everything)
        _seen[optimizer] = _Seen(number, found, words_of(found))


def _strangers(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    # Those of `fully_shard` are DTensors, which have no `parts`.
    known = {id(parameter) for model in replicated_models() for parameter in model.parameters()}
    return [one for one in parameters if id(one) not in known and one.requires_grad and parts(one.detach()) is not None]


def words() -> list[int]:
    """Return what the ranks compare: how many strangers there are, and their bits at first and now."""
    number = first = now = 0
    for seen in list(_seen.values()):
        left = {id(one) for one in _strangers(seen.strangers)}  # their module may have been replicated since
        number += len(left)
        pairs = zip(seen.strangers, seen.words, words_of(seen.strangers), strict=True)
        for position, (one, old, new) in enumerate(pairs, 1):
            if id(one) in left:
                first, now = first + position * old, now + position * new
    return [number, first, now]


def check(rows: Sequence[Sequence[int]]) -> None:
    """Raise on every rank where strangers that were equal are so no more. `rows`: the ranks' `words`.

    Ranks may train other things beside the model, each its own: where they have not equally many, nothing is said.

    Raises:
        DDParityError: they would have to be reduced.
    """
    numbers, first, now = (set(column) for column in zip(*rows, strict=True))
    if len(numbers) > 1 or len(now) == 1:
        return
    if len(first) == 1:
        raise DDParityError(_text())
    if not _told:
        _told.append(True)
        logger.warning(
            "%s. Where each rank is to train its own, this is no error; they differed at first, too", _text()
        )


def compare(group: dist.ProcessGroup, device: torch.device) -> None:
    """As `check`; one collective of 24 bytes, which every rank calls."""
    check(copies_of_ranks(torch.tensor(words(), device=device), group).tolist())


def check_by_store(agreement: Agreement) -> None:
    """As `check`, by a request to the group's store.

    Raises:
        DDParityError: this rank's differ from those of the first rank to call this.
    """
    number, first, now = words()
    if number and agreement.first_value(f"strangers/{number}/{first}", str(now)) != str(now):
        raise DDParityError(_text())


def _text() -> str:
    shapes = [tuple(one.shape) for seen in list(_seen.values()) for one in _strangers(seen.strangers)]
    return (
        f"accumulate(): an optimizer trains {len(shapes)} parameters that no replicated or sharded model has, the "
        f"first of shape {shapes[0]}, so that nobody reduces their gradients, and they differ between the ranks: "
        f"replicate the module that has them, too (beside a model of fully_shard(), shard it), and give both, "
        f"accumulate([model, criterion], …)"
    )

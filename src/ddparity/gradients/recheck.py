"""Find a device that computes wrong numbers: another rank computes a micro-batch again, and the bits are compared.

A micro-batch is a pure function of the weights and its key, so every rank can compute every one. In every K-th step
each rank keeps a digest of its first micro-batch: of the data, the weights and the gradient. After its last one it runs
one more, the first of another rank, and the ranks exchange the digests. Where they differ, each rank runs two more: its
own again, and that of a third rank. Two of three equal digests tell which rank is wrong (verdict.py).

    rank 0: own first … own last | first of 1 | (own first | first of 2)
    rank 1: own first … own last | first of 2 | (own first | first of 0)
    rank 2: own first … own last | first of 0 | (own first | first of 1)

These run through the loop's body, since only the body has the forward, the loss and the backward.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import struct
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..comm.allreduce import copies_of_ranks
from ..comm.bits import check_words, is_same, parts, put_back
from ..comm.nesting import to_device
from ..comm.trees import take_apart, tensors_in
from ..data.rng import seed_streams
from ..data.step import LoadedMicroBatch, Step
from ..errors import WrongArithmetic
from .aside import Aside
from .devices import computer_of, place_of, repeatable
from .verdict import Verdict, verdict

logger = logging.getLogger(__name__)

Named = Sequence[tuple[str, nn.Parameter]]
Words = list[int]  # 32 bits each: of the data, of each weight, of each gradient
Again = Generator[LoadedMicroBatch, None, Words]
Buffers = list[tuple[nn.Module, str, torch.Tensor | None, torch.Tensor | None]]  # with a copy of the value

_TEXT_BYTES = 2048  # of a message about a rank


class Rechecks:
    """The rechecks of a model.

    Args:
        every: so often, in steps.
        group: of at least 2 ranks.

    Attributes:
        done: so many rechecks. off: the ranks cannot compare bits.
    """

    def __init__(self, every: int, group: dist.ProcessGroup) -> None:
        self.every, self.group = every, group
        self.done, self.off = 0, False
        self._waits = 0  # steps until the next one

    def due(self, numbers: Sequence[int]) -> bool:
        """Count a step; return whether it has a recheck. A step in which a rank has no micro-batch is passed over.

        Args:
            numbers: micro-batches of each rank.
        """
        if self.off or self._waits > 0 or 0 in numbers:
            self._waits = max(0, self._waits - 1)
            return False
        self._waits = self.every - 1
        return True

    def soon(self) -> None:
        """Let the next step have a recheck."""
        self._waits = 0

    def offset(self) -> int:
        """Return how far the rank is whose micro-batch a rank runs: other pairs in each recheck."""
        return 1 + self.done % (self.group.size() - 1)


class Recheck:
    """The recheck of one step. Every rank makes it, and calls `begin`, `keep` and `run`.

    Args:
        rechecks: of the model.
        step: what can load a micro-batch again.
        weights: all parameters of the models, the same on every rank. trained: those whose gradients are compared.
        modules: whose buffers are as before the first micro-batch when it is run again.
        pausing: a context in which gradients and batch statistics do not count, and are as before at its end.
        device: of the data; None: where it is.
    """

    def __init__(
        self,
        rechecks: Rechecks,
        step: Step,
        weights: Named,
        trained: Named,
        modules: Sequence[nn.Module],
        pausing: Callable[[], AbstractContextManager[None]],
        device: torch.device | None,
    ) -> None:
        self._rechecks, self._step, self._weights, self._trained = rechecks, step, weights, trained
        self._modules, self._pausing, self._device = modules, pausing, device
        self._group = rechecks.group
        self._rank, self._ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._wire = next((parameter.device for _, parameter in weights), torch.device("cpu"))
        self._aside: Aside | None = None
        self._stack = contextlib.ExitStack()
        self._known = {id(one): one for root in modules for one in root.modules()}
        self._others: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers of other modules, with copies, see `_seen`

    # The rank's own first micro-batch

    @torch.no_grad()
    def begin(self, data: Any) -> None:
        """Before the first micro-batch: let its gradient be alone in the parameters, and keep what it starts from."""
        self._buffers = buffers_of(self._modules)
        self._data = _word_of(data)
        self._aside = Aside([parameter for _, parameter in self._trained])
        self._stack.enter_context(repeatable(self._device))
        self._stack.enter_context(self._seen())

    @torch.no_grad()
    def keep(self, micro: LoadedMicroBatch, number: int) -> None:
        """After the first micro-batch: keep its digest, and add its gradient to what the parameters had.

        Args:
            micro: as the loop got it. number: of it in this rank's share.
        """
        assert self._aside is not None, "begin() was called"
        self._aside.settle()
        self._own, self._micro, self._number = self._words(self._data), micro, number
        self.close()

    def close(self) -> None:
        """End the first micro-batch, also where the loop was left."""
        self._stack.close()
        if self._aside is not None:
            self._aside.put_back()
        self._aside = None

    # The others, after the rank's last one

    def run(self) -> Iterator[LoadedMicroBatch]:
        """Yield micro-batches that have run on other ranks, and compare. Every rank calls it before the reduction.

        Collectives: one of 16 bytes, which says what each rank's first micro-batch is, and one of 24 bytes. At the
        first use one of 8 bytes more. Where digests differ, one of 32 bytes, and for the error one of 8 bytes a weight
        and a gradient, and three small ones.

        Raises:
            WrongArithmetic: on every rank.
        """
        first_use = self._rechecks.done == 0
        if first_use and not self._comparable():
            return
        rows = self._exchanged([self._number, _bits(self._micro.weight)])
        self._where = [(number, _float(bits)) for number, bits in rows]
        offset = self._rechecks.offset()
        again = (yield from self._one(self._rank)) if first_use else self._own
        other = yield from self._one(self._beside(offset))
        table = self._exchanged([_digest(self._own), _digest(again), _digest(other)])
        self._rechecks.done += 1
        if unstable := [rank for rank, row in enumerate(table) if row[0] != row[1]]:
            self._stop(f"rank {self._global(unstable[0])} ran a micro-batch twice, and got other bits the second time")
            return
        votes = {rank: {rank: row[0]} for rank, row in enumerate(table)}
        for rank, row in enumerate(table):
            votes[self._beside(offset, rank)][rank] = row[2]
        if any(len(set(of.values())) > 1 for of in votes.values()):
            yield from self._decide(votes, offset, other)

    def _decide(self, votes: dict[int, dict[int, int]], offset: int, other: Words) -> Iterator[LoadedMicroBatch]:
        """Run the micro-batches that tell which rank is wrong, and raise the error."""
        again = yield from self._one(self._rank)
        distance = offset % (self._ranks - 1) + 1  # of a third rank, if there is one
        third = yield from self._one(self._beside(distance))
        table = self._exchanged([_digest(self._own), _digest(again), _digest(other), _digest(third)])
        unstable = {rank for rank, row in enumerate(table) if row[0] != row[1]}
        for rank, row in enumerate(table):
            if self._ranks > 2:
                votes[self._beside(distance, rank)][rank] = row[3]
            elif row[2] != row[3]:  # it was the same micro-batch
                unstable.add(rank)
        found = verdict(votes, unstable)
        if found.ranks:
            words = {self._beside(distance): third, self._beside(offset): other, self._rank: self._own}
            self._report(found, words, unstable)
        several = " and ".join(str(self._global(rank)) for rank in sorted(unstable))
        self._stop(f"ranks {several} ran a micro-batch twice, and got other bits the second time")

    def _one(self, rank: int) -> Again:
        """Yield the first micro-batch of a rank; return its words."""
        number, weight = self._where[rank]
        assert self._step.load_again is not None, "a step that cannot load again is refused"
        micro = self._step.load_again(rank, number)
        data = micro.data if self._device is None or self._device.type == "cpu" else to_device(micro.data, self._device)
        word = _word_of(data)
        with self._pausing(), self._buffers_of_then(), repeatable(self._device):
            if micro.seed is not None:
                seed_streams(micro.seed)
            yield LoadedMicroBatch(data, weight, micro.index, micro.seed, share=0.0, recheck=True)
            return self._words(word)

    @contextlib.contextmanager
    def _buffers_of_then(self) -> Iterator[None]:
        """Give the buffers what they held before the first micro-batch; put back at the end what they hold now."""
        now, known = buffers_of(self._modules), len(self._others)
        beside = [(buffer, buffer.clone()) for buffer, _ in self._others]
        set_buffers(self._buffers)
        _set_values(self._others)
        try:
            with self._seen():
                yield
        finally:
            set_buffers(now)
            _set_values([*beside, *self._others[known:]])

    @contextlib.contextmanager
    def _seen(self) -> Iterator[None]:
        """Keep the buffers of modules beside the models, such as a frozen teacher, as they are before the body runs it.

        Only their content is put back, not which tensor a module has as its buffer: `functional_call` lends it others.
        """
        thread = threading.get_ident()

        def keep(module: nn.Module, _: Any) -> None:
            if torch.compiler.is_compiling() or id(module) in self._known or threading.get_ident() != thread:
                return
            new = {id(one): one for one in module.modules() if id(one) not in self._known}
            self._known |= new  # which also keeps them, so that no other module gets the id
            buffers = [buffer for one in new.values() for buffer in one._buffers.values() if buffer is not None]
            with torch.no_grad():
                self._others += [(buffer, buffer.clone()) for buffer in buffers]

        with warnings.catch_warnings():  # that hooks run for the wrapper of a compiled module, too, which does no harm
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            hook = register_module_forward_pre_hook(keep)
            try:
                yield
            finally:
                hook.remove()

    @torch.no_grad()
    def _words(self, of_data: int) -> Words:
        named: list[tuple[str, torch.Tensor | None]] = [*self._weights]
        named += [(name, parameter.grad) for name, parameter in self._trained]
        held = [[] if one is None else parts(one) or [] for _, one in named]
        return [of_data, *check_words(held, [f"{name} {one is None}" for name, one in named])]

    def _name_of(self, number: int) -> str:
        if number == 0:
            return "the data"
        if number <= len(self._weights):
            return f"the weight {self._weights[number - 1][0]}"
        return f"the gradient of {self._trained[number - 1 - len(self._weights)][0]}"

    # What the ranks tell each other

    def _beside(self, distance: int, rank: int | None = None) -> int:
        return ((self._rank if rank is None else rank) + distance) % self._ranks

    def _exchanged(self, values: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(values, dtype=torch.int64, device=self._wire)
        rows: list[list[int]] = copies_of_ranks(mine, self._group).tolist()
        return rows

    def _broadcast(self, tensor: torch.Tensor, rank: int) -> None:
        dist.broadcast(tensor, self._global(rank), group=self._group)

    def _text_of(self, rank: int, mine: str) -> str:
        """Return what a rank says, on every rank."""
        text = mine.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        message = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._wire)
        self._broadcast(message, rank)
        return bytes(message.cpu().numpy()).rstrip(b"\0").decode(errors="replace")

    def _global(self, rank: int) -> int:
        """Return the rank in the world of a rank in the group."""
        return dist.get_global_rank(self._group, rank)

    # What the user is told

    def _comparable(self) -> bool:
        """Return whether all ranks have the same kind of device and software; else switch rechecks off and say why."""
        mine = computer_of(self._wire)
        words = [row[0] for row in self._exchanged([int.from_bytes(_hash(mine.encode())[:7], "little")])]
        if len(set(words)) == 1:
            return True
        other = next(rank for rank, one in enumerate(words) if one != words[0])
        first, second = (self._text_of(rank, mine) for rank in (0, other))
        self._stop(f"rank {self._global(0)} computes on {first}, and rank {self._global(other)} on {second}")
        return False

    def _stop(self, why: str) -> None:
        """Switch rechecks off, on every rank, and say why on the first one."""
        self._rechecks.off = True
        if self._rank == 0:
            logger.warning(
                "replicate(recheck_every=%d) is off from here on, since the bits of gradients cannot be compared: %s. "
                "Kernels that add in any order do not repeat themselves, and neither does a loop or a data set that "
                'draws random numbers of its own or counts. Use reduction="strict", which asks for deterministic '
                "kernels, or leave recheck_every out",
                self._rechecks.every,
                why,
            )

    def _report(self, found: Verdict, words: Mapping[int, Words], unstable: set[int]) -> None:
        """Raise the error on every rank. Every rank calls it.

        Args:
            words: of the micro-batches that this rank has run, by their ranks.
        """
        reference = torch.tensor(words.get(found.micro_batch, [0] * len(self._own)), device=self._wire)
        mine = reference.clone()
        self._broadcast(reference, found.right)
        first = torch.full((1,), -1, dtype=torch.int64, device=self._wire)
        if self._rank == found.wrong and len(different := (mine != reference).nonzero()):
            first[0] = different[0, 0]
        self._broadcast(first, found.wrong)
        index = self._exchanged([self._micro.index])[found.micro_batch][0]
        ranks = [self._global(rank) for rank in found.ranks]
        place = json.loads(self._text_of(found.ranks[0], json.dumps(place_of(self._wire))))
        known = len(ranks) == 1
        record = {
            "ranks": ranks,
            "host": place["host"] if known else "",
            "device": place["device"] if known else "",
            "epoch": self._step.epoch,
            "step": self._step.number,
            "micro_batch": index,
            "differs": self._name_of(int(first)) if int(first) >= 0 else "",
            "repeats": not unstable,
        }
        if not known:
            who = f"ranks {' or '.join(map(str, ranks))} compute wrong numbers"
            why = "each has bits of its own" if self._ranks == 2 else "no single rank explains the differences"
        else:
            who = f"rank {ranks[0]} computes wrong numbers, on {place['host']}, {place['device']}"
            why = (
                f"{found.agreeing} other ranks agree, and it has other bits" if found.agreeing else "it has other bits"
            )
            why += ", and others again when it runs the micro-batch a second time" if unstable else ""
        if self._rank == 0:
            logger.error("wrong arithmetic: %s", json.dumps(record))
        if record["differs"] == "the data":
            raise WrongArithmetic(
                f"accumulate(): the data set gives {'ranks' if len(ranks) > 1 else 'rank'} "
                f"{' or '.join(map(str, ranks))} other data than the others, for micro-batch {index} of step "
                f"{record['step']} of epoch {record['epoch']}. The step is not taken. Let every rank read the same "
                f"samples; if it does, its device or memory is wrong",
                record,
            )
        raise WrongArithmetic(
            f"accumulate(): {who}: {why}, for micro-batch {index} of step {record['step']} of epoch {record['epoch']}; "
            f"the first difference is in {record['differs'] or 'the result'}. The step is not taken. Take the device "
            f"out of the job and continue from a checkpoint. If that helps nothing, look for what differs on that "
            f"rank: a loop that draws random numbers on it alone, such as torch.rand() for a log, a module beside the "
            f"model with other weights or buffers, a data set or a setting",
            record,
        )


# State


def buffers_of(modules: Sequence[nn.Module]) -> Buffers:
    """Return the buffers of modules, with copies of their values."""
    found = {id(module): module for root in modules for module in root.modules()}
    return [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in found.values()
        for name, buffer in module._buffers.items()
    ]


@torch.no_grad()
def set_buffers(buffers: Buffers) -> None:
    """Put back what `buffers_of` returned."""
    for module, name, buffer, value in buffers:
        module._buffers[name] = buffer
        if buffer is not None and value is not None and not is_same(buffer, value):
            put_back(buffer, value)


def _set_values(buffers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for buffer, value in buffers:
        if not is_same(buffer, value):
            put_back(buffer, value)


# Digests


def _word_of(data: Any) -> int:
    """Return 32 bits of a batch's tensors and arrays; 0 if it has none. A path beside them may differ between ranks."""
    try:
        description, leaves = take_apart(data)
    except (TypeError, ValueError):
        return 0
    dense = [leaves[number] for number in tensors_in(description)]
    return check_words([dense], [str([(str(one.dtype), list(one.shape)) for one in dense])])[0] if dense else 0


def _digest(words: Words) -> int:
    """Return 64 bits, as a signed integer."""
    return int.from_bytes(_hash(struct.pack(f"<{len(words)}Q", *words)), "little", signed=True)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])

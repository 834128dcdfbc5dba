"""Pass the warnings of a scheduler (SIGUSR1, SIGUSR2) on to ranks and machines, and know which ranks obeyed one."""

from __future__ import annotations

from collections.abc import Collection

from .ending import RankProcesses, send
from .exchange import Exchange
from .signals import Signals


class Warnings:
    """The warnings that the ranks of one machine have received, and whether the ranks have stopped on one.

    `forwarded`: those that the current ranks have received.
    """

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._from_nodes: set[int] = set()  # those that other machines passed on
        self.begin()

    def begin(self) -> None:
        """The ranks start, or start again."""
        self.forwarded: set[int] = set()
        self.waits_for_nodes = False  # this machine's ranks have stopped on a warning; others may still save

    def forward(self, pids: Collection[int], exchange: Exchange | None) -> None:
        """Pass warnings on to the ranks and to the other machines, and theirs to these ranks."""
        own = self._signals.take_warnings()
        others = exchange.signals(own) if exchange is not None else []
        # A scheduler may warn every machine: ranks get the warning once.
        new = [number for number in own if number not in self._from_nodes]
        self._from_nodes = self._from_nodes - set(own) | set(others)
        for number in dict.fromkeys([*new, *others]):
            self.forwarded.add(number)
            send(pids, number)

    def obeyed(self, codes: Collection[int]) -> int | None:
        """Return the warning on which processes with these exit codes stopped; None: not all of them did on one."""
        codes = set(codes)
        return next((number for number in self.forwarded if codes and codes <= {128 + number, -number}), None)

    def have_failed(self, ranks: RankProcesses, exchange: Exchange | None) -> bool:
        """Return whether ranks have failed. Ranks that stop on a warning wait for all that still save."""
        codes = ranks.codes - {0}
        if not codes or self.obeyed(codes) is None:
            return bool(codes)
        if not ranks.all_ended:
            return False
        if exchange is None:
            return True
        if not self.waits_for_nodes:
            self.waits_for_nodes = True
            exchange.finish()
        return exchange.all_finished()

"""torch's elastic agent, which here also tells why a job failed, and leaves nothing running."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext

from .ending import Guardian, end, how_ended, kill_sessions, runs, send
from .exchange import Exchange
from .fates import Cause, Fate, culprit, from_json, read_fate, report, settled, to_json, with_leavers
from .memory import MemoryWatch
from .output import RankFiles
from .watch import Verdict, Watch, Watched, describe

_PATIENCE_S = 3.0  # for the rank that failed first, when only victims have ended
_PAUSE_S = 0.4  # for ranks that fail alike
_FORWARDED = ("SIGUSR1", "SIGUSR2")


@dataclass(frozen=True)
class Habits:
    """How an agent watches its ranks and ends them."""

    grace_s: float = 3.0  # from a signal to SIGKILL
    hang_timeout_s: float = 60.0
    on_hang: Literal["end", "report"] = "end"


class Agent(LocalElasticAgent):
    """One machine's agent. Ranks that failed are `fates` after `run`, with those of the other machines.

    What differs from torch's: a failure is looked at before the others are ended, so that its cause is known; signals
    go to main processes first; a job that hangs is named; a failure before any progress is not tried again.
    """

    def __init__(self, spec: WorkerSpec, files: RankFiles, habits: Habits, start_method: str = "spawn") -> None:
        super().__init__(spec, files, start_method=start_method)
        self.fates: list[Fate] = []
        self.verdict: Verdict | None = None
        self._files, self._habits = files, habits
        self._host = socket.gethostname()
        self._guardian = Guardian()
        self._memory = MemoryWatch()
        self._seen: dict[int, tuple[int, float]] = {}  # local rank: exit code, when it was seen
        self._watch: Watch | None = None
        self._exchange: Exchange | None = None
        self._asked = False
        self._forwarded: set[int] = set()

    def folders(self) -> dict[int, Path]:
        """What each rank of this machine has left, by rank."""
        return {self._rank(local): folder for local, folder in self._files.folders.items()}

    def close(self) -> None:
        self._guardian.dismiss()
        self._files.close()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.fates, self.verdict, self._seen = [], None, {}
        self._exchange = None
        store, node, nodes = worker_group.store, worker_group.group_rank, worker_group.group_world_size
        assert store is not None and node is not None and nodes is not None, "the rendezvous gives them"
        if nodes > 1:
            self._exchange = Exchange(store, node, nodes)
        started: dict[int, Any] = super()._start_workers(worker_group)
        if self._processes():
            self._guardian.watch(self._pids())
            ranks = [
                Watched(
                    worker.global_rank, self._processes()[worker.local_rank], self._files.folders[worker.local_rank]
                )
                for worker in worker_group.workers
            ]
            self._watch = Watch(ranks, self._habits.hang_timeout_s, self._exchange)
        _on_signals(_FORWARDED, self._forward)
        _on_signals(("SIGQUIT",), self._ask)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._processes():
            self._look()
            assert self._watch is not None
            verdict = self._watch.look()
            if self._asked:
                self._asked = False
                print(f"ddparity: {self._watch.stragglers(always=True)}", file=sys.stderr)
            if verdict is not None and self._habits.on_hang == "report":
                print(f"ddparity: {describe(verdict)}", file=sys.stderr)
                self._keep_stacks(verdict, ends=False)
                verdict = None
            if self._exchange is not None:
                for number in self._exchange.signals(self._forwarded):
                    self._forward(number, None)
            elsewhere = self._exchange is not None and self._exchange.failed()
            if verdict is not None or elsewhere or any(code for code, _ in self._seen.values()):
                self._conclude(worker_group, verdict)
                super()._monitor_workers(worker_group)  # it waits for the processes, which have ended
                return RunResult(state=WorkerState.FAILED)
            if len(self._seen) < len(self._pids()):
                # torch would look once more: a rank that has failed since would be gone, and the others ended by it.
                return RunResult(state=WorkerState.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **options: Any) -> None:
        if any(runs(pid) for pid in self._pids()):
            try:
                end(self._pids(), death_sig, self._habits.grace_s)
            except SignalException:  # the second one
                kill_sessions(self._pids())
        super()._shutdown(death_sig, *args, **options)
        self._files.close()

    def _processes(self) -> dict[int, int]:
        """Process ids by local rank; none for functions, which multiprocessing runs."""
        return dict(self._pcontext.pids()) if isinstance(self._pcontext, SubprocessContext) else {}

    def _pids(self) -> list[int]:
        return list(self._processes().values())

    def _look(self) -> None:
        for local, pid in self._processes().items():
            if local not in self._seen and (code := how_ended(pid)) is not None:
                self._seen[local] = code, time.time()
                if self._watch is not None:
                    self._watch.ended(self._rank(local), code)

    def _rank(self, local: int) -> int:
        return int(self._worker_group.workers[local].global_rank)

    def _conclude(self, worker_group: WorkerGroup, verdict: Verdict | None) -> None:
        """Wait until the cause is known, end the other ranks, and keep how each ended."""
        assert self._watch is not None
        if verdict is None:
            self._settle()
            own = [self._fate(local, code, at) for local, (code, at) in self._seen.items() if code]
            if own and culprit(own).cause in (Cause.CRASHED, Cause.VICTIM):
                verdict = self._watch.explain()  # Gloo aborts one rank where sizes differ, and cuts off the others
        if verdict is not None:
            self._keep_stacks(verdict, ends=True)
        by_themselves = dict(self._seen)
        end(self._pids(), signal.SIGTERM, self._habits.grace_s)
        self._look()
        fates = [
            self._fate(local, code, at, ended_by_us=local not in by_themselves)
            for local, (code, at) in self._seen.items()
        ]
        if self._exchange is not None:
            fates = [fate for text in self._exchange.all_fates(to_json(fates)) for fate in from_json(text)]
        self.fates, self.verdict = with_leavers(fates), verdict
        if self._remaining_restarts > 0:
            self._again(worker_group)

    def _again(self, worker_group: WorkerGroup) -> None:
        """Say what failed and that it is tried again, or have it not tried again."""
        found = culprit(self.fates)
        progress = self._watch is None or self._watch.progressed
        if self.verdict is None and found.cause in (Cause.FAILED, Cause.LEFT) and not progress:
            self._remaining_restarts = 0
            self.fates = [replace(fate, evidence=f"{fate.evidence}it failed before any progress: not tried again")
                          if fate is found else fate for fate in self.fates]  # fmt: skip
            return
        number = worker_group.spec.max_restarts - self._remaining_restarts + 1
        print(self.told(), file=sys.stderr)
        print(f"ddparity: starting again: restart {number} of {worker_group.spec.max_restarts}", file=sys.stderr)

    def _settle(self) -> None:
        """Give the rank that failed first the time to end: a victim may be quicker."""
        start = time.monotonic()
        while True:
            fates = with_leavers(self._fate(local, code, at) for local, (code, at) in self._seen.items())
            if len(self._seen) == len(self._pids()):
                return
            waited = time.monotonic() - start
            if not any(fate.code for fate in fates) and waited > _PAUSE_S:  # another machine's failure
                return
            if any(fate.code for fate in fates) and settled(fates, waited, _PATIENCE_S, _PAUSE_S):
                return
            time.sleep(0.02)
            self._look()

    def _fate(self, local: int, code: int, at: float, ended_by_us: bool = False) -> Fate:
        folder, logs = self._files.folders[local], self._files.logs[local]
        fate = read_fate(self._rank(local), self._host, folder, code, at, ended_by_us, logs)
        if code == -signal.SIGKILL and not ended_by_us:
            fate = replace(fate, evidence=self._memory.evidence(self._processes()[local]))
        return fate

    def _keep_stacks(self, verdict: Verdict, ends: bool) -> None:
        if self._files.kept is not None and self._watch is not None:
            self._watch.keep_stacks(verdict, self._files.kept, ends)
            print(f"ddparity: the stacks of all ranks are in {self._files.kept}", file=sys.stderr)

    def told(self) -> str:
        """What the end of the output says."""
        world_size = self._worker_group.workers[0].world_size if self._worker_group.workers else 0
        if self.verdict is not None:
            return f"ddparity: {describe(self.verdict)}"
        return report(self.fates, world_size)

    def stopped_by(self) -> int | None:
        """The preemption signal on which all ranks ended in order, having saved."""
        codes = {fate.code for fate in self.fates if not fate.ended_by_us}
        return next((number for number in self._forwarded if codes <= {128 + number, -number, 0}), None)

    def slow(self) -> str:
        """Which ranks the others waited for; empty where none stood out."""
        return self._watch.stragglers() if self._watch is not None else ""

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True  # answered at the next look

    def _forward(self, number: int, frame: object) -> None:
        """Pass a scheduler's warning on to the ranks, and in the next look to the other machines."""
        if number not in self._forwarded:
            self._forwarded.add(number)
            send(self._pids(), number)


def _on_signals(names: tuple[str, ...], handler: Callable[[int, object], None]) -> None:
    for name in names:
        with suppress(ValueError, AttributeError):  # not the main thread; a system without it
            signal.signal(getattr(signal, name), handler)

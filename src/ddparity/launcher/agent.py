"""torch's elastic agent, which here also tells why a job failed, and leaves nothing running."""

from __future__ import annotations

import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from ..compat import PrefixStore, forget_bootstrap_store
from ..errors import RendezvousError
from ..runtime.network import is_listening_at, limit_tcp_waits, split_endpoint
from .diagnosis import messages
from .diagnosis.exits import (
    Cause,
    ExitReport,
    describe_exits,
    is_settled,
    lost_reports,
    mark_left_early,
    pack_reports,
    read_exit_report,
    root_cause,
    unpack_reports,
)
from .diagnosis.hang_report import HangReport, add_positions, describe_hang
from .diagnosis.watch import Watch, WatchedRank
from .ending import Guardian, end, how_ended, kill_sessions, send
from .exchange import SILENT_S, Exchange, Machine, machines_of, plain_reason
from .output import RankFiles, say, tell
from .resources import MemoryWatch
from .signals import Signals

_PATIENCE_S = 3.0  # for the rank that failed first, when only victims have ended
_PAUSE_S = 0.4  # for ranks that fail alike
_FORWARD_S = 2.0  # for the last output, when a signal has come
_LONG_S = 60.0  # ranks that ran for so long had progressed, whatever they do
_TAKEN_IN = "a machine has come: starting again, with it"


class MachineLost(RendezvousError):
    """The machine that holds the job's store has gone, or another one while ranks were started."""


@dataclass(frozen=True)
class Habits:
    """How an agent watches its ranks and ends them."""

    grace_s: float = 3.0  # from a signal to SIGKILL
    hang_timeout_s: float = 60.0
    on_hang: Literal["end", "report"] = "end"
    meeting: str | None = None  # HOST:PORT of the store, of a job on several machines


class Agent(LocalElasticAgent):
    """One machine's agent. Ranks that failed are `exit_reports` after `run`, with those of the other machines.

    What differs from torch's: a failure is looked at before the others are ended, so that its cause is known; signals
    go to main processes first; a job that hangs is named; a failure before any progress is not tried again.
    """

    def __init__(
        self, spec: WorkerSpec, files: RankFiles, habits: Habits, signals: Signals, start_method: str = "spawn"
    ) -> None:
        super().__init__(spec, files, start_method=start_method)
        self.exit_reports: list[ExitReport] = []
        self.hang: HangReport | None = None
        self._files, self._habits, self._signals = files, habits, signals
        # Where several machines meet at a store; another kind of rendezvous may have no such address.
        said = habits.meeting or ""
        self._address = split_endpoint(said) if said.rpartition(":")[2].isdigit() else None
        self._host = socket.gethostname()
        self._guardian = Guardian()
        self._memory = MemoryWatch()
        self._seen: dict[int, tuple[int, float]] = {}  # local rank: exit code, when it was seen
        self._watch: Watch | None = None
        self._exchange: Exchange | None = None
        self._started = 0.0
        self._world_size = 0
        self._finished: RunResult | None = None  # of this machine's ranks, while others run
        self._count_waiting = spec.rdzv_handler.num_nodes_waiting
        # An assignment is a type error, since it is a method: torch's loop would wait for the store in it.
        setattr(spec.rdzv_handler, "num_nodes_waiting", self._waiting)  # noqa: B010 - see above
        self._forwarded: set[int] = set()  # of the scheduler's warnings, to the ranks that run
        self._heard: set[int] = set()  # of those, from other machines
        self._waited_for = False  # these ranks have stopped on one, those of other machines may be at work

    def folders(self) -> dict[int, Path]:
        """What each rank of this machine has left, by rank."""
        return {self._rank(local): folder for local, folder in self._files.folders.items()}

    def run(self, *args: Any, **options: Any) -> RunResult:
        try:
            found: RunResult = super().run(*args, **options)
            return found
        finally:
            self._signals.raising = True  # no rank runs

    def close(self) -> None:
        self._guardian.dismiss()
        self._close_files()
        self._close_exchange()
        delattr(self._worker_group.spec.rdzv_handler, "num_nodes_waiting")  # a cycle, which keeps the store's sockets

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        """Also where a machine goes between the rendezvous and the start: then the others meet again."""
        while True:
            try:
                super()._initialize_workers(worker_group)
                return
            except (DistError, RendezvousConnectionError) as error:
                if self._habits.meeting is None:
                    raise
                self._not_together(error)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._signals.raising = True
        self._signals.check()
        self._close_exchange()
        if self._address is not None:
            limit_tcp_waits(self._address[1], SILENT_S)
            forget_bootstrap_store(worker_group.spec.rdzv_handler)
        super()._rendezvous(worker_group)
        if self._address is not None:
            limit_tcp_waits(self._address[1], SILENT_S)  # a static rendezvous connects just now

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state is WorkerState.HEALTHY and self._exchange is not None:  # torch's loop found a machine
            self._exchange.change()
            self._tell(_TAKEN_IN)
        self._close_exchange()
        super()._restart_workers(worker_group)

    def _exit_barrier(self) -> None:
        """torch's ends the store under machines that run for five minutes longer; here `_monitor_workers` waits."""
        if self._exchange is None:
            self._signals.raising = True
            self._signals.check()
            super()._exit_barrier()  # type: ignore[no-untyped-call]  # torch gives no type

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.exit_reports, self.hang, self._seen, self._finished = [], None, {}, None
        self._forwarded.clear()
        self._waited_for = False
        several = self._address is not None and self._meet(worker_group, self._address)
        with self._signals.starting():
            started: dict[int, Any] = super()._start_workers(worker_group)
        self._started = time.monotonic()
        if not self._processes():  # of functions: torch waits for those as long as they take
            self._signals.raising = True
            self._signals.check()
        else:
            self._guardian.watch(self._pids())
            ranks = [
                WatchedRank(
                    worker.global_rank, self._processes()[worker.local_rank], self._files.folders[worker.local_rank]
                )
                for worker in worker_group.workers
            ]
            self._watch = Watch(ranks, self._habits.hang_timeout_s, self._exchange if several else None)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._signals.check()
        if self._processes():
            self._look()
            assert self._watch is not None
            hang = self._watch.look()
            if self._signals.asked:
                self._signals.asked = False
                self._tell(self._watch.stragglers(always=True))
            if hang is not None and self._habits.on_hang == "report":
                self._tell(describe_hang(hang))
                self._keep_stacks(hang, ends=False)
                hang = None
            self._warn()
            changes = self._exchange is not None and self._exchange.changes()
            elsewhere = self._exchange is not None and self._exchange.failed()
            if hang is not None or changes or elsewhere or self._have_failed():
                self._conclude(worker_group, hang)
                super()._monitor_workers(worker_group)  # it waits for the processes, which have ended
                return RunResult(state=WorkerState.FAILED)
            if len(self._seen) < len(self._pids()) or self._waited_for:
                # torch would look once more: a rank that has failed since would be gone, and the others ended by it.
                return RunResult(state=WorkerState.HEALTHY)
            kill_sessions(self._pids())  # what they started and left
        if self._finished is None:
            result: RunResult = super()._monitor_workers(worker_group)
            if result.state is not WorkerState.SUCCEEDED or self._exchange is None:
                return result
            self._finished = result
            self._exchange.finish()
        if self._exchange is not None and self._exchange.all_finished():
            self._exchange.leave()
            return self._finished
        return RunResult(state=WorkerState.HEALTHY)

    def _meet(self, worker_group: WorkerGroup, address: tuple[str, int]) -> bool:
        """Begin a round with the other machines. Gives whether there are any."""
        store, node, nodes = worker_group.store, worker_group.group_rank, worker_group.group_world_size
        assert store is not None and node is not None and nodes is not None, "the rendezvous gives them"
        maximum = worker_group.spec.max_restarts
        ranks = tuple(worker.global_rank for worker in worker_group.workers)
        own = Machine(self._host, ranks, maximum - self._remaining_restarts, is_listening_at(address[1]))
        if worker_group.spec.rdzv_handler.get_backend() == "static":  # one store for all rounds
            store = PrefixStore(f"round{own.restarts}", store)
        patience_s = _PATIENCE_S + self._habits.grace_s + 2
        self._exchange = Exchange(
            store, node, nodes, own, patience_s, self._count_waiting, address, self._signals.patience
        )
        # A machine that came late has restarted less often, and torch's ranks meet under the number of restarts.
        restarts = max(machine.restarts for machine in self._exchange.machines)
        self._remaining_restarts = max(0, maximum - restarts)
        world_size = worker_group.workers[0].world_size
        if self._exchange.leads and self._world_size not in (0, world_size):
            self._tell(f"goes on with {world_size} ranks on {nodes} machines")
        self._world_size = world_size
        return nodes > 1

    def _waiting(self) -> int:
        """How many machines wait to be taken in; asks nobody where a thread does that."""
        return self._exchange.waiting if self._exchange is not None else int(self._count_waiting())

    def _close_files(self) -> None:
        self._files.close(hurry=self._signals.patience(_FORWARD_S))

    def _close_exchange(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
        self._exchange = None

    def _not_together(self, error: Exception) -> None:
        """Tell whether to meet again; raises where not."""
        try:
            self._count_waiting()
        except Exception as gone:
            raise MachineLost(
                f"lost {self._habits.meeting}, where the job's machines meet: {plain_reason(gone)}. The job ends here "
                f"({self._host}): start it again on all machines"
            ) from error
        reason = f"a machine went while ranks were started: {plain_reason(error)}"
        if self._remaining_restarts == 0:
            raise MachineLost(reason) from error
        self._remaining_restarts -= 1
        self._tell(f"{reason}: meeting again")

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **options: Any) -> None:
        end(self._pids(), death_sig, self._habits.grace_s, hurry=self._signals.repeated)
        super()._shutdown(death_sig, *args, **options)
        self._close_files()

    def _processes(self) -> dict[int, int]:
        """Process ids by local rank; none for functions, which multiprocessing runs."""
        return dict(self._pcontext.pids()) if isinstance(self._pcontext, SubprocessContext) else {}

    def _pids(self) -> list[int]:
        return list(self._processes().values())

    def _look(self) -> None:
        for local, pid in self._processes().items():
            if local in self._seen:
                continue
            code = how_ended(pid)
            if code is None and self._lingers(local):
                code = 1
            if code is not None:
                self._seen[local] = code, time.time()
                if self._watch is not None:
                    self._watch.ended(self._rank(local), code)

    def _have_failed(self) -> bool:
        """Whether ranks have. Those that stop on a scheduler's warning may save until the last, on all machines."""
        codes = {code for code, _ in self._seen.values()} - {0}
        if not codes or self._warning(codes) is None:
            return bool(codes)
        if len(self._seen) < len(self._pids()):
            return False
        if self._exchange is None:
            return True
        if not self._waited_for:
            self._waited_for = True
            self._exchange.finish()
        return self._exchange.all_finished()

    def _warning(self, codes: set[int]) -> int | None:
        """The scheduler's warning that all these exit codes tell of."""
        return next((number for number in self._forwarded if codes and codes <= {128 + number, -number}), None)

    def _lingers(self, local: int) -> bool:
        """Whether a rank left its exception a while ago and does not end: another thread of it goes on."""
        with suppress(OSError):
            left = (self._files.folders[local] / "error.json").stat().st_mtime
            return time.time() - left > min(self._habits.grace_s, self._habits.hang_timeout_s / 2)
        return False

    def _rank(self, local: int) -> int:
        return int(self._worker_group.workers[local].global_rank)

    def _conclude(self, worker_group: WorkerGroup, hang: HangReport | None) -> None:
        """Wait until the cause is known, end the other ranks, and keep how each ended."""
        assert self._watch is not None
        exchange = self._exchange
        if hang is None:
            self._settle()
            own = [self._exit_report(local, code, at) for local, (code, at) in self._seen.items() if code]
            if own and root_cause(own).cause in (Cause.CRASHED, Cause.CONSEQUENCE):
                hang = self._watch.explain()  # Gloo aborts one rank where sizes differ, and cuts off the others
            if hang is None and exchange is not None:
                hang = messages.unpack_hang(exchange.announced() or "")
        if hang is not None:
            self._keep_stacks(hang, ends=True)
        by_themselves = set(self._seen)
        end(self._pids(), signal.SIGTERM, self._habits.grace_s, hurry=lambda: bool(self._signals.ending))
        self._look()
        reports = [
            self._exit_report(local, code, at, ended_by_us=local not in by_themselves)
            for local, (code, at) in self._seen.items()
        ]
        if exchange is not None and exchange.changes() and all(report.cause > Cause.LOST for report in reports):
            self._remaining_restarts += 1  # which torch takes: this is no failure
            self._tell(_TAKEN_IN)
            return
        if self._watch.progressed:
            reports = [replace(report, progressed=True) for report in reports]
        if exchange is not None:
            reports = self._of_all_machines(exchange, reports)
        self.exit_reports = mark_left_early(reports)
        self.hang = (
            add_positions(hang, {report.rank: report.traceback for report in reports}) if hang is not None else None
        )
        if exchange is not None and exchange.lost is not None:
            self._remaining_restarts = 0  # there is nowhere to meet
        if self._remaining_restarts > 0:
            self._again(worker_group)

    def _of_all_machines(self, exchange: Exchange, own: list[ExitReport]) -> list[ExitReport]:
        silent = exchange.silent()
        told = exchange.all_exit_reports(pack_reports(own))
        reports = [report for text in told if text is not None for report in unpack_reports(text)]
        gone = exchange.lost is not None
        for node, text in enumerate(told):
            machine = exchange.machines[node]
            if text is not None or (gone and not machine.holds):  # of those only the store could tell
                continue
            name = machines_of(exchange.machines, [node])
            if gone:
                reason = f"lost {name}, which holds the job's store: {exchange.lost}"
            elif node in silent:
                reason = f"lost {name}: not heard of for {silent[node]:.0f} s"
            else:
                reason = f"lost {name}: no word from it"
            reports += lost_reports(machine.ranks, machine.host, reason, time.time())
        return reports

    def _again(self, worker_group: WorkerGroup) -> None:
        """Say what failed and that it is tried again, or have it not tried again."""
        if self.stopped_by() is not None:  # the scheduler takes the machine away
            self._remaining_restarts = 0
            return
        found = root_cause(self.exit_reports)
        progress = any(report.progressed for report in self.exit_reports) or time.monotonic() - self._started > _LONG_S
        if self.hang is None and found.cause in (Cause.FAILED, Cause.LEFT_EARLY) and not progress:
            self._remaining_restarts = 0
            told = replace(found, evidence=f"{found.evidence}it failed before any progress: not tried again")
            self.exit_reports = [told if report is found else report for report in self.exit_reports]
            return
        number = worker_group.spec.max_restarts - self._remaining_restarts + 1
        with self._signals.let_through():
            say(self.told())
        self._tell(f"starting again: restart {number} of {worker_group.spec.max_restarts}")

    def _settle(self) -> None:
        """Give the rank that failed first the time to end: a victim may be quicker."""
        start = time.monotonic()
        while True:
            reports = mark_left_early(self._exit_report(local, code, at) for local, (code, at) in self._seen.items())
            if len(self._seen) == len(self._pids()):
                return
            waited = time.monotonic() - start
            elsewhere = self._exchange is not None and (self._exchange.failed() or self._exchange.changes())
            pause_s = _PATIENCE_S if self._forwarded else _PAUSE_S  # ranks that stop in order may be saving
            if (elsewhere or not any(report.code for report in reports)) and waited > pause_s:
                return
            if any(report.code for report in reports) and is_settled(reports, waited, _PATIENCE_S, pause_s):
                return
            time.sleep(0.02)  # the end of a process, seen without reaping it, wakes nobody
            self._look()

    def _exit_report(self, local: int, code: int, at: float, ended_by_us: bool = False) -> ExitReport:
        folder, logs = self._files.folders[local], self._files.logs[local]
        report = read_exit_report(self._rank(local), self._host, folder, code, at, ended_by_us, logs)
        if code == -signal.SIGKILL and not ended_by_us:
            report = replace(report, evidence=self._memory.evidence(self._processes()[local]))
        return report

    def _keep_stacks(self, hang: HangReport, ends: bool) -> None:
        if self._files.kept is not None and self._watch is not None:
            self._watch.keep_stacks(hang, self._files.kept, ends)
            self._tell(f"the stacks of all ranks are in {self._files.kept}")

    def told(self) -> str:
        """What the end of the output says."""
        world_size = self._worker_group.workers[0].world_size if self._worker_group.workers else 0
        if self.hang is not None:
            return f"ddparity: {describe_hang(self.hang)}"
        return describe_exits(self.exit_reports, world_size)

    def stopped_by(self) -> int | None:
        """The preemption signal on which all ranks ended in order, having saved."""
        if self.hang is not None or any(
            report.ended_by_us or report.left_early or report.lost for report in self.exit_reports
        ):
            return None
        return self._warning({report.code for report in self.exit_reports} - {0})

    def slow(self) -> str:
        """Which ranks the others waited for; empty where none stood out."""
        return self._watch.stragglers() if self._watch is not None else ""

    def _warn(self) -> None:
        """Pass a scheduler's warning on to the ranks and to the other machines, and theirs to these ranks."""
        own = self._signals.take_warnings()
        others = self._exchange.signals(own) if self._exchange is not None else []
        # A scheduler may warn all machines: ranks get one of both.
        mine = [number for number in own if number not in self._heard]
        self._heard = self._heard - set(own) | set(others)
        for number in dict.fromkeys([*mine, *others]):
            self._forwarded.add(number)
            send(self._pids(), number)

    def _tell(self, line: str) -> None:
        with self._signals.let_through():
            tell(line)

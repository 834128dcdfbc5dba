"""The agent of one machine: torch's elastic agent, which here also reports why a job failed and leaves nothing running.

It starts this machine's ranks, watches them, ends them after a failure, and starts them again.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from ..compat import PrefixStore, close_outputs, forget_bootstrap_store
from ..errors import RendezvousError
from ..runtime.network import is_listening_at, limit_tcp_waits, split_endpoint
from .diagnosis import messages
from .diagnosis.absence import Notice
from .diagnosis.desync import describe_ranks
from .diagnosis.exits import (
    Cause,
    ExitReport,
    add_exception,
    describe_exits,
    is_settled,
    mark_left_early,
    root_cause,
    signal_name,
)
from .diagnosis.hang_report import HangReport, add_positions, describe_hang, describe_rows
from .diagnosis.late import describe_doing, only_waits, stacks_of
from .diagnosis.watch import Watch, WatchedRank
from .ending import Guardian, RankProcesses, end, end_left, runs
from .exchange import SILENT_S, Exchange, Node, plain_reason
from .forwarding import Warnings
from .lingering import LINGER_S, Lingering
from .output import RankFiles, say, tell
from .resources import MemoryWatch
from .signals import Signals

_CAUSE_TIMEOUT_S = 3.0  # for the rank that failed first to end, when only ranks that failed because of it have ended
_SAME_CAUSE_S = 0.4  # for other ranks that fail for the same reason
_OUTPUT_TIMEOUT_S = 2.0  # for the last output, when a signal has come
_PROGRESS_S = 60.0  # a rank that ran for this long counts as one that made progress
_NODE_JOINED = "a machine has joined: all ranks start again with it"


class NodeLost(RendezvousError):
    """The machine that holds the job's store is lost, or another machine was lost while the ranks were started."""


@dataclass(frozen=True)
class AgentOptions:
    """How an agent watches its ranks and ends them. `rendezvous`: HOST:PORT of the store; None: one machine alone."""

    grace_s: float = 30.0  # from a signal to SIGKILL
    hang_timeout_s: float | None = None  # None: the time-out of the process group
    on_hang: Literal["end", "report"] = "end"
    rendezvous: str | None = None
    children: Literal["live", "end"] = "live"  # what the ranks left running when all ended well


class Agent(LocalElasticAgent):
    """Run the ranks of one machine. After `run`, `exit_reports` has the ranks that failed, of all machines.

    It differs from torch's agent in four ways. It finds the cause of a failure before it ends the other ranks. It sends
    signals to the main processes first. It names the rank that hangs. It does not repeat a failure before any progress.
    """

    def __init__(
        self, spec: WorkerSpec, files: RankFiles, options: AgentOptions, signals: Signals, start_method: str = "spawn"
    ) -> None:
        super().__init__(spec, files, start_method=start_method)
        self.exit_reports: list[ExitReport] = []
        self.hang: HangReport | None = None
        self._files, self._options, self._signals = files, options, signals
        # The store's address. A rendezvous of another kind than torch's store may have no HOST:PORT.
        endpoint = options.rendezvous or ""
        self._address = split_endpoint(endpoint) if endpoint.rpartition(":")[2].isdigit() else None
        self._host = socket.gethostname()
        self._mark = files.root_log_dir  # in the environment of all that the ranks start
        self._guardian = Guardian(self._mark)
        self._memory = MemoryWatch()
        self._ranks = RankProcesses({}, {}, files)
        self._lingering = Lingering(options.grace_s)
        self._watch: Watch | None = None
        self._exchange: Exchange | None = None
        self._started = 0.0
        self._world_size = 0
        self._logs_run = 0  # the number of this run in the folder of the logs
        self._succeeded = False  # all ranks of the job have ended well
        self._finished: RunResult | None = None  # of this machine's ranks, while other machines' ranks still run
        self._count_waiting_nodes = spec.rdzv_handler.num_nodes_waiting
        # torch's loop would wait for the store in this method. setattr, since mypy refuses to assign to a method.
        setattr(spec.rdzv_handler, "num_nodes_waiting", self._waiting_nodes)  # noqa: B010 - see above
        self._warnings = Warnings(signals)
        self._later: HangReport | None = None  # a hang that waits until no rank is at a debugger's prompt
        self._prompted = False  # it was told that the job waits for a debugger

    def folders(self) -> dict[int, Path]:
        """Return the folder of each rank of this machine, in which the rank writes files for its agent."""
        return {self._rank(local): folder for local, folder in self._files.folders.items()}

    def run(self, *args: Any, **options: Any) -> RunResult:
        try:
            result: RunResult = super().run(*args, **options)
            return result
        finally:
            self._signals.raising = True  # no rank runs any more

    def close(self) -> None:
        self._guardian.dismiss()
        self._close_files()
        self._close_exchange()
        # The handler and this agent would refer to each other, which would keep the store's sockets open.
        delattr(self._worker_group.spec.rdzv_handler, "num_nodes_waiting")

    def failure_report(self) -> str:
        """Return the last lines of the output of a job that failed."""
        world_size = self._worker_group.workers[0].world_size if self._worker_group.workers else 0
        if self.hang is not None:
            return f"ddparity: {describe_hang(self.hang)}"
        return describe_exits(self.exit_reports, world_size)

    def preemption_signal(self) -> int | None:
        """Return the signal on which all ranks saved and stopped; None where the job ended in another way."""
        if self.hang is not None or any(one.ended_by_us or one.left_early or one.lost for one in self.exit_reports):
            return None
        return self._warnings.obeyed({one.code for one in self.exit_reports} - {0})

    def straggler_report(self) -> str:
        """Return which ranks the others waited for; empty where no rank stands out."""
        return self._watch.stragglers() if self._watch is not None else ""

    # The steps of torch's agent, in the order in which it calls them.

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        """Repeat the rendezvous where a machine is lost between the rendezvous and the start of the ranks."""
        while True:
            try:
                super()._initialize_workers(worker_group)
                return
            except (DistError, RendezvousConnectionError) as error:
                if self._options.rendezvous is None:
                    raise
                self._prepare_another_rendezvous(error)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._signals.raising = True
        self._signals.check()
        self._close_exchange()
        if self._address is not None:
            limit_tcp_waits(self._address[1], SILENT_S)
            forget_bootstrap_store(worker_group.spec.rdzv_handler)
        super()._rendezvous(worker_group)
        if self._address is not None:
            limit_tcp_waits(self._address[1], SILENT_S)  # again: a static rendezvous opens its connection only now

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.exit_reports, self.hang, self._finished, self._succeeded = [], None, None, False
        self._warnings.begin()
        several = self._address is not None and self._open_exchange(worker_group, self._address)
        self._begin_logs()
        with self._signals.starting():
            started: dict[int, Any] = super()._start_workers(worker_group)
        self._started = time.monotonic()
        close_outputs(self._pcontext)  # they would hide that a rank has closed its own
        # multiprocessing runs functions. torch waits for them itself, for as long as they take.
        pids = dict(self._pcontext.pids()) if isinstance(self._pcontext, SubprocessContext) else {}
        self._ranks = RankProcesses(pids, {local: self._rank(local) for local in pids}, self._files)
        self._lingering = Lingering(self._options.grace_s)
        if not pids:
            self._signals.raising = True
            self._signals.check()
        else:
            self._guardian.watch(self._ranks.pids)
            ranks = [WatchedRank(self._rank(local), pid, self._files.folders[local]) for local, pid in pids.items()]
            self._watch = Watch(ranks, self._options.hang_timeout_s, self._exchange if several else None)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if not self._lingering.told:  # otherwise a signal ends the wait, and the failure is told
            self._signals.check()
        if self._ranks.pids:
            self._look()
            assert self._watch is not None
            hang = self._watch.look()
            for notice in self._watch.take_notices():
                self._notify(notice)
            if self._signals.asked:
                self._signals.asked = False
                self._tell(f"what the ranks do now:\n{describe_rows(self._watch.rows())}")
                self._tell(self._watch.stragglers(always=True))
            if hang is not None and self._options.on_hang == "report":
                self._tell(describe_hang(hang))
                self._keep_stacks(hang, ends=False)
                hang = None
            self._warnings.forward(self._ranks.pids, self._exchange)
            changes = self._exchange is not None and self._exchange.changes()
            failed_elsewhere = self._exchange is not None and self._exchange.failed()
            if not (changes or failed_elsewhere or self._signals.ending) and self._waits_for_prompt(hang):
                return RunResult(state=WorkerState.HEALTHY)
            hang, self._later = hang or self._later, None
            failed = hang is not None or failed_elsewhere or self._have_failed()
            if failed and not changes and not self._signals.ending and self._ranks.saving(self._may_run):
                return RunResult(state=WorkerState.HEALTHY)
            if failed or changes:
                self._end_after_failure(worker_group, hang)
                super()._monitor_workers(worker_group)  # collects the exit codes of the processes, which have ended
                return RunResult(state=WorkerState.FAILED)
            if not self._ranks.all_ended or self._warnings.waits_for_nodes:
                # torch's method would look again. It would end all ranks if one has failed since, and hide the cause.
                return RunResult(state=WorkerState.HEALTHY)
        if self._finished is None:
            result: RunResult = super()._monitor_workers(worker_group)
            if result.state is not WorkerState.SUCCEEDED:
                return result
            self._finished = result
            if self._exchange is not None:
                self._exchange.finish()
        if self._exchange is not None:
            if not self._exchange.all_finished():
                return RunResult(state=WorkerState.HEALTHY)
            self._exchange.leave()
        self._succeeded = True
        if self._options.children == "end" and (said := end_left(self._ranks.pids, self._mark)):
            self._tell(f"ended {said}, which the script had left running (--children end)")
        return self._finished

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state is WorkerState.HEALTHY and self._exchange is not None:  # torch's loop found a machine
            self._exchange.change()
            self._tell(_NODE_JOINED)
        self._close_exchange()
        super()._restart_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Do nothing in a job with an exchange, where `_monitor_workers` has waited for the other machines.

        torch's barrier waits for five minutes, then closes the store while other machines may still need it.
        """
        if self._exchange is None:
            self._signals.raising = True
            self._signals.check()
            super()._exit_barrier()  # type: ignore[no-untyped-call]  # torch gives no type

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **options: Any) -> None:
        if not self._succeeded:  # a background process of a script that has ended well lives on, as without a launcher
            said = signal_name(self._signals.ending[0]) if self._signals.ending else ""
            self._end(death_sig, self._signals.repeated, said)
        super()._shutdown(death_sig, *args, **options)
        self._close_files()

    # Several machines.

    def _open_exchange(self, worker_group: WorkerGroup, address: tuple[str, int]) -> bool:
        """Begin a round with the other machines. Return whether there are any."""
        store, node_rank, nnodes = worker_group.store, worker_group.group_rank, worker_group.group_world_size
        assert store is not None and node_rank is not None and nnodes is not None, "the rendezvous sets them"
        maximum = worker_group.spec.max_restarts
        ranks = tuple(worker.global_rank for worker in worker_group.workers)
        restarts, logs = maximum - self._remaining_restarts, self._logs_run or self._files.free_run()
        own = Node(self._host, ranks, restarts, is_listening_at(address[1]), logs, bool(self._logs_run))
        if worker_group.spec.rdzv_handler.get_backend() == "static":  # one store for all rounds
            store = PrefixStore(f"round{own.restarts}", store)
        timeout_s = _CAUSE_TIMEOUT_S + 2 * self._options.grace_s + 2  # a failed rank saves, then others on a signal
        self._exchange = Exchange(
            store, node_rank, nnodes, own, timeout_s, self._count_waiting_nodes, address, self._signals.patience
        )
        # A machine that joined late has restarted less often. torch's ranks use the number of restarts in their keys.
        restarts = max(node.restarts for node in self._exchange.nodes)
        self._remaining_restarts = max(0, maximum - restarts)
        world_size = worker_group.workers[0].world_size
        if self._exchange.leads and self._world_size not in (0, world_size):
            self._tell(f"the job continues with {world_size} ranks on {nnodes} machines")
        self._world_size = world_size
        return nnodes > 1

    def _begin_logs(self) -> None:
        """Keep the logs of earlier runs. Machines that share the folder write to one run, also those that join."""
        if not self._logs_run:
            nodes = self._exchange.nodes if self._exchange is not None else ()
            numbers = [one.logs for one in nodes if one.begun] or [one.logs for one in nodes]
            self._logs_run = max(numbers, default=0) or self._files.free_run()
            self._files.begin_run(self._logs_run)

    def _prepare_another_rendezvous(self, error: Exception) -> None:
        """Use one restart for another rendezvous. Raise NodeLost where the store is lost or no restart remains."""
        try:
            self._count_waiting_nodes()
        except Exception as lost:
            raise NodeLost(
                f"lost the job's store at {self._options.rendezvous}: {plain_reason(lost)}. The job ends on this "
                f"machine ({self._host}): start it again on all machines"
            ) from error
        reason = f"a machine was lost while the ranks were started: {plain_reason(error)}"
        if self._remaining_restarts == 0:
            raise NodeLost(reason) from error
        self._remaining_restarts -= 1
        self._tell(f"{reason}: repeating the rendezvous")

    def _waiting_nodes(self) -> int:
        """Return how many machines wait to join. The exchange's thread asks the store; without it, ask here."""
        return self._exchange.waiting if self._exchange is not None else int(self._count_waiting_nodes())

    def _close_exchange(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
        self._exchange = None

    # The ranks of this machine.

    def _rank(self, local_rank: int) -> int:
        return int(self._worker_group.workers[local_rank].global_rank)

    def _look(self, at_once: bool = False) -> None:
        """Note the ranks that have ended. `at_once`: those that have failed and still run count, whatever they do."""
        for rank, code in self._ranks.look(0.0) if at_once else self._ranks.look(LINGER_S, self._may_run):
            if self._watch is not None:
                self._watch.ended(rank, code)

    def _may_run(self, rank: int, pid: int, folder: Path, since_s: float) -> bool:
        """Return whether a rank may go on after its exception."""
        with suppress(SignalException):  # a signal during the message: it ends the wait, and the failure is told
            return not self._signals.ending and self._lingering.may_run(self._tell, rank, pid, folder, since_s)
        return False

    def _waits_for_prompt(self, hang: HangReport | None) -> bool:
        """Return whether the job goes on, despite a failure or a hang, since a person is at a debugger's prompt."""
        if hang is None and self._later is None and not self._have_failed():
            return False
        assert self._watch is not None
        prompts = self._watch.at_prompt()
        if prompts and not self._prompted:
            what = f"hang: {hang.headline}" if hang is not None else "a rank has failed"
            self._tell(f"{what}. The job ends when {describe_ranks(prompts)} leaves the debugger")
        self._later, self._prompted = hang or self._later, bool(prompts)
        return bool(prompts)

    def _have_failed(self) -> bool:
        return self._warnings.have_failed(self._ranks, self._exchange)

    # After a failure.

    def _end_after_failure(self, worker_group: WorkerGroup, hang: HangReport | None) -> None:
        """Wait until the cause is known, end the other ranks, and keep how each rank ended."""
        assert self._watch is not None
        exchange = self._exchange
        self._look(at_once=True)
        failed = self._ranks.codes - {0}
        if hang is not None and failed and self._warnings.obeyed(failed) is None:
            hang = None  # a rank that failed is the cause, also one that runs on for a thread of its own
        if hang is None:
            self._wait_for_cause()
            own = [one for one in self._ranks.exit_reports(self._memory) if one.code]
            if own and root_cause(own).cause in (Cause.CRASHED, Cause.CONSEQUENCE):
                # Where tensor sizes differ, Gloo aborts one rank and closes the connections of the others.
                hang = self._watch.explain()
            if hang is None and exchange is not None:
                hang = messages.unpack_hang(exchange.announced() or "")
        leaving = self._watch.exceptions() if hang is not None else {}
        if hang is not None:
            self._keep_stacks(hang, ends=True)
        ended_before = self._ranks.ended
        self._end(signal.SIGTERM, lambda: bool(self._signals.ending), "", hang)
        self._look()
        reports = self._ranks.exit_reports(self._memory, ended_before)
        if hang is not None:
            reports = [
                add_exception(one, leaving[one.rank].message, leaving[one.rank].traceback, hang.headline)
                if one.rank in leaving
                else one
                for one in reports
            ]
        if exchange is not None and exchange.changes() and all(one.cause > Cause.LOST for one in reports):
            self._remaining_restarts += 1  # torch's loop takes one, but this is no failure
            self._tell(_NODE_JOINED)
            return
        if self._watch.progressed:
            reports = [replace(one, progressed=True) for one in reports]
        if exchange is not None:
            reports = exchange.all_exit_reports(reports)
        self.exit_reports = mark_left_early(reports)
        if any(one.interrupted for one in reports):
            hang = None  # the exception is the cause
        self.hang = add_positions(hang, {one.rank: one.traceback for one in reports}) if hang is not None else None
        if exchange is not None and exchange.lost is not None:
            self._remaining_restarts = 0  # without the store there is no rendezvous
        if self._remaining_restarts > 0:
            self._decide_restart(worker_group)

    def _end(self, number: int, hurry: Callable[[], bool], on: str, hang: HangReport | None = None) -> None:
        """End the ranks and all that they started. Say which rank takes long, and what it does.

        `on`: the signal that the launcher got; "" after a failure or a hang. Then a rank that waits in a collective has
        nothing to save: it gets no time.
        """
        ended_before = self._ranks.ended

        def slow(pids: list[int], left_s: float) -> bool:
            ranks = self._ranks.ranks_of(pids)
            stacks = {} if hurry() else stacks_of(ranks, before_kill=not left_s)
            had_time = {rank for rank, one in ranks.items() if self._lingering.is_over(*one)}
            if stacks and not on and all(rank in had_time or only_waits(stack) for rank, stack in stacks.items()):
                return False
            ranks = {rank: one for rank, one in ranks.items() if runs(one[0])}  # reading stacks takes a moment
            if not ranks:
                return True
            they = describe_doing(ranks, stacks)
            if left_s:
                cause = "" if on else f"{self._first_line(hang, ended_before)}; "
                self._tell(f"{cause}waiting up to {left_s:.0f} s for {they}: a signal (Ctrl-C) ends this now")
            elif hurry():
                self._tell(f"killed {they}, at another signal")
            else:
                late = f"had not ended {self._options.grace_s:g} s after {signal_name(number)} (--shutdown-timeout)"
                self._tell(f"killed {they}, which {late}")
            return True

        end(self._ranks.pids, number, self._options.grace_s, self._mark, hurry, slow)

    def _first_line(self, hang: HangReport | None, ended: Collection[int]) -> str:
        """Return what has failed, in one line, before all is known."""
        if hang is not None:
            return describe_hang(hang).partition("\n")[0]
        own = [one for one in self._ranks.exit_reports(self._memory, ended) if one.code]
        if not own:
            return "another machine's rank failed" if self._exchange is not None else "a rank failed"
        found = root_cause(own)
        return f"rank {found.rank} failed: {found.ending()}"

    def _wait_for_cause(self) -> None:
        """Wait for the rank that failed first. A rank that failed because of another one may end before it."""
        start = time.monotonic()
        while True:
            reports = mark_left_early(self._ranks.exit_reports(self._memory))
            if self._ranks.all_ended:
                return
            waited = time.monotonic() - start
            elsewhere = self._exchange is not None and (self._exchange.failed() or self._exchange.changes())
            pause_s = (
                _CAUSE_TIMEOUT_S if self._warnings.forwarded else _SAME_CAUSE_S
            )  # after a warning, ranks may be saving
            if (elsewhere or not any(one.code for one in reports)) and waited > pause_s:
                return
            if any(one.code for one in reports) and is_settled(reports, waited, _CAUSE_TIMEOUT_S, pause_s):
                return
            time.sleep(0.02)  # `_look` leaves the exit codes for torch to collect, so that no event wakes this loop
            self._look()

    def _decide_restart(self, worker_group: WorkerGroup) -> None:
        """Report what failed and announce the restart, or forbid the restart where it would not help."""
        if self.preemption_signal() is not None:  # the scheduler takes the machine away
            self._remaining_restarts = 0
            return
        found = root_cause(self.exit_reports)
        progress = any(one.progressed for one in self.exit_reports) or time.monotonic() - self._started > _PROGRESS_S
        if self.hang is None and found.cause in (Cause.FAILED, Cause.LEFT_EARLY) and not progress:
            self._remaining_restarts = 0
            evidence = f"{found.evidence}it failed before any progress: no restart"
            self.exit_reports = [replace(one, evidence=evidence) if one is found else one for one in self.exit_reports]
            return
        number = worker_group.spec.max_restarts - self._remaining_restarts + 1
        with self._signals.let_through():
            say(self.failure_report())
        self._tell(f"all ranks start again: restart {number} of {worker_group.spec.max_restarts}")

    def _notify(self, notice: Notice) -> None:
        """Tell which ranks others wait for, in two lines; the whole table goes to the folder of the logs."""
        for line in notice.lines:
            self._tell(line)
        if self._files.kept is not None:
            path = self._files.kept / "waits.txt"
            try:
                with path.open("a") as file:
                    file.write(
                        f"{time.strftime('%Y-%m-%d %H:%M:%S')} {notice.lines[0]}\n{describe_rows(notice.report.rows)}\n"
                    )
            except OSError as error:
                self._files.lose(path, error)
            self._keep_stacks(notice.report, ends=False)

    def _keep_stacks(self, hang: HangReport, ends: bool) -> None:
        if self._files.kept is not None and self._watch is not None:
            try:
                self._watch.keep_stacks(hang, self._files.kept, ends)
            except OSError as error:
                self._files.lose(self._files.kept, error)
                return
            if ends:
                self._tell(f"the stacks of all ranks are in {self._files.kept}")

    def _close_files(self) -> None:
        self._files.close(hurry=self._signals.patience(_OUTPUT_TIMEOUT_S))

    def _tell(self, line: str) -> None:
        with self._signals.let_through():
            tell(line)

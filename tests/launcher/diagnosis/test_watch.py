"""Real ranks over Gloo that hang in many ways, and what the watch reports of them."""

from __future__ import annotations

import re
import shutil
import signal
import textwrap
from pathlib import Path

import psutil
import pytest

from ddparity.launcher.diagnosis import stacks, watch
from ddparity.launcher.diagnosis.absence import Notice
from ddparity.launcher.diagnosis.desync import Finding
from ddparity.launcher.diagnosis.hang_report import HangReport, describe_hang
from ddparity.launcher.diagnosis.instruments import FLIGHT, SERVER
from ddparity.launcher.diagnosis.stacks import read_stacks, signal_for_stacks
from ddparity.launcher.diagnosis.watch import Watch, WatchedRank
from tests.launcher.diagnosis.watched import Job, job

pytestmark = pytest.mark.skipif(
    shutil.which("py-spy") is None and not Path("/proc/self/wchan").exists(), reason="Linux"
)


def _ended(job: Job) -> bool:
    return len(job.endings) == len(job.processes)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "dist.all_reduce(torch.ones(4)) if rank == 0 else dist.broadcast(torch.ones(4), 0)",
            "the ranks do not agree on collective #4: "
            "rank 0 calls all_reduce of 4 float32, rank 1 calls broadcast of 4 float32",
        ),
        (
            "dist.all_reduce(torch.ones(4 if rank == 0 else 8))",
            "the ranks do not agree on collective #4: "
            "rank 0 calls all_reduce of 4 float32, rank 1 calls all_reduce of 8 float32",
        ),
        (
            "dist.all_reduce(torch.ones(4, dtype=torch.float32 if rank == 0 else torch.float64))",
            "the ranks do not agree on collective #4: "
            "rank 0 calls all_reduce of 4 float32, rank 1 calls all_reduce of 4 float64",
        ),
        (
            "from ddparity.comm.allreduce import copies_of_ranks\ncopies_of_ranks(torch.ones(4 if rank == 0 else 8))",
            "the ranks do not agree on collective #4: "
            "rank 0 calls all_to_all of 4 float32, rank 1 calls all_to_all of 8 float32",
        ),
    ],
    ids=["kind", "shape", "dtype", "shape of a short one"],
)
def test_a_mismatch_is_named_whatever_the_time_out(tmp_path: Path, body: str, said: str) -> None:
    with job(tmp_path, f"ready()\n{body}\ntime.sleep(600)", hang_timeout_s=600) as running:
        running.until_ready()
        running.until(_ended)
        assert running.report is not None, running.endings
        assert (running.report.kind, running.report.headline) == ("mismatch", said)
        assert all("script.py:" in row.where for row in running.report.rows)


ABSENT = {
    "sleeping": ("time.sleep(600)", "sleeping"),
    "lock": ("lock = threading.Lock(); lock.acquire(); lock.acquire()", "waiting for a lock"),
    "event": ("threading.Event().wait()", "waiting for a lock"),
    "loop": ("while True: pass", "running Python"),
    "gil": ("ctypes.PyDLL(None).sleep(600)", "in C code, holding the GIL"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", "stopped (SIGSTOP)"),
}


@pytest.mark.parametrize("names", [("sleeping", "lock", "loop"), ("event", "gil", "stopped")], ids="-".join)
def test_ranks_that_do_not_call_are_reported_with_their_activities(tmp_path: Path, names: tuple[str, ...]) -> None:
    bodies = "\n".join(f"if rank == {rank}:\n    {ABSENT[name][0]}" for rank, name in enumerate(names, 1))
    lines = f"ready()\nif rank == 0: dist.all_reduce(torch.ones(4)); time.sleep(600)\n{bodies}"
    with job(tmp_path, lines, 4) as running:
        running.until_ready()
        running.until(_ended)
        report = running.report
        assert report is not None, running.endings
        assert (report.kind, report.blamed) == ("absent", (1, 2, 3))
        assert [row.activity for row in report.rows] == ["in all_reduce", *(ABSENT[name][1] for name in names)]
        assert all("script.py" in row.where for row in report.rows[1:])
        text = describe_hang(report)
        assert text.startswith("hang: ranks 1-3 have not called all_reduce #4: rank 0 waits in all_reduce of 4 float32")
        assert max(len(line) for line in text.splitlines()[1:]) <= 120
        written = running.watch.keep_stacks(report, tmp_path / "stacks")
        assert [path.name for path in written] == [f"stacks-rank-{rank}.txt" for rank in range(4)]
        assert all("script.py" in one.read_text() for one in written[1:])


def test_a_rank_that_is_stopped_while_it_waits(tmp_path: Path) -> None:
    """Its last answer says that it waits, as the others do."""
    body = "ready()\nwhile rank == 0 and not os.path.exists('go'): time.sleep(0.01)\ndist.all_reduce(torch.ones(4))"
    with job(tmp_path, f"os.chdir({str(tmp_path)!r})\n{body}") as running:
        running.until_ready()
        running.until(lambda job: "waited for rank 0" in job.watch.stragglers(always=True))
        running.processes[1].send_signal(signal.SIGSTOP)
        stopped = psutil.Process(running.processes[1].pid)
        running.until(lambda job: stopped.status() == psutil.STATUS_STOPPED)  # not while its thread of Gloo still runs
        (tmp_path / "go").touch()
        running.until(_ended)
        report = running.report
        assert report is not None, running.endings
        assert (report.blamed, report.rows[1].activity) == ((1,), "stopped (SIGSTOP)")
        assert report.headline.startswith("rank 1 does not answer: rank 0 waits in all_reduce of 4 float32")


def test_a_stuck_data_loader(tmp_path: Path) -> None:
    body = """
        class Stuck(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, index):
                if rank == 1:
                    time.sleep(600)
                return index
        ready()
        for _ in torch.utils.data.DataLoader(Stuck(), num_workers=1):
            dist.all_reduce(torch.ones(4))
    """
    with job(tmp_path, body) as running:
        running.until_ready()
        running.until(_ended)
        assert running.report is not None, running.endings
        assert running.report.rows[1].activity == "waiting for data-loader workers"


@pytest.mark.parametrize("nproc", [2, 3])
def test_a_rank_that_returns_early(tmp_path: Path, nproc: int) -> None:
    """Gloo closes the connections of the others, which may fail before the watch looks: then records show the cause."""
    with job(tmp_path, "ready()\nif rank != 1: dist.all_reduce(torch.ones(4))", nproc, 600) as running:
        running.until_ready()
        running.until(_ended)
        report = running.report or running.watch.explain()
        assert report is not None, running.endings
        assert (report.kind, report.blamed, report.left) == ("finished", (1,), (1,))
        assert report.headline.startswith("rank 1 finished without calling all_reduce #4: rank")
        assert report.headline.endswith(", the last call of rank 1 was all_reduce #3")


def test_ddps_own_reductions_are_seen(tmp_path: Path) -> None:
    body = """
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        for _ in range(3):
            model(torch.ones(4)).sum().backward()
        ready()
        if rank != 2:
            model(torch.ones(4)).sum().backward()
        time.sleep(600)
    """
    with job(tmp_path, body, 3) as running:
        running.until_ready()
        running.until(_ended)
        assert running.report is not None, running.endings
        assert (running.report.kind, running.report.blamed) == ("absent", (2,))
        assert "all_reduce of 20 float32" in running.report.headline


def test_a_sub_group(tmp_path: Path) -> None:
    body = """
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for _ in range(3):
            dist.all_reduce(torch.ones(3), group=groups[rank // 2])
        ready()
        if rank == 2:
            dist.all_reduce(torch.ones(3), group=groups[1])
        if rank != 3:
            dist.all_reduce(torch.ones(4))
        time.sleep(600)
    """
    with job(tmp_path, body, 4) as running:
        running.until_ready()
        running.until(_ended)
        assert running.report is not None, running.endings
        assert running.report.blamed == (3,)
        assert "of group 2" in running.report.headline


def test_a_rank_that_is_late_is_told_in_two_lines_and_goes_on(tmp_path: Path) -> None:
    body = """
        ready()
        if rank == 0:
            import subprocess
            subprocess.run(["sleep", "7"])
        dist.all_reduce(torch.ones(4))
    """
    with job(tmp_path, body, hang_timeout_s=None) as running:
        running.watch = Watch(running.watched, report_s=4)
        running.until_ready()
        running.until(_ended)
        assert running.report is None and running.endings == {0: 0, 1: 0}
        (notice,) = running.watch.take_notices()
        first, second = notice.lines
        assert re.match(
            r"for [45] s: rank 0 has not called all_reduce #4: rank 1 waits in all_reduce of 4 float32", first
        )
        assert re.search(
            r"rank 0: .*script.py:\d+, in <module>, waiting for a child process, since then \d s of CPU", first
        )
        assert first.endswith("1 child process (sleep) with 0 s of CPU")
        assert second.startswith("the job goes on until the time-out of its process group (30 min)")


def test_when_torch_ends_a_wait_the_launcher_knows_for_whom_it_was(tmp_path: Path) -> None:
    body = """
        from datetime import timedelta
        group = dist.new_group([0, 1], timeout=timedelta(seconds=6))
        ready()
        if rank == 0: dist.all_reduce(torch.ones(4), group=group)
        time.sleep(600)
    """
    with job(tmp_path, body, hang_timeout_s=None) as running:
        running.until_ready()
        running.until(lambda job: bool(job.endings))
        report = running.report or running.watch.explain()  # on a busy machine, a rank ends long after its time-out
        assert report is not None and (report.kind, report.blamed) == ("absent", (1,))
        assert report.headline.startswith("rank 1 has not called all_reduce #1 of group 1: rank 0 waits in")
        assert report.rows[1].activity == "sleeping" and "script.py" in report.rows[1].where


def test_a_collective_that_outlives_the_time_out_of_its_group_is_ended_and_an_agreement_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agreement ends itself if a rank does not come. If all have come, one may save for as long as it needs."""
    monkeypatch.setattr(watch, "_AFTER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(Finding, "timeout_s", lambda finding: 1.0)  # Gloo would end a wait itself after its own
    body = f"""
        from ddparity.runtime.waits import end_wait, note_wait
        os.environ["TORCHELASTIC_ERROR_FILE"] = f"{tmp_path}/{{rank}}/error.json"
        ready()
        if rank == 1:
            wait = note_wait("first()", "first/1/before", [0], time.time(), 1.0)
            while not os.path.exists("{tmp_path}/told"):
                time.sleep(0.05)
            end_wait(wait)
            dist.all_reduce(torch.ones(1))
        time.sleep(600)
    """
    with job(tmp_path, body, hang_timeout_s=None) as running:
        running.watch = Watch(running.watched, report_s=4)
        running.until_ready()
        notices: list[Notice] = []
        running.until(lambda job: bool(notices.extend(job.watch.take_notices()) or notices))
        assert running.report is None
        first, second = notices[0].lines
        assert re.match(
            r"for \d+ s: rank 1 waits in first\(\) for rank 0\. rank 0: .*script.py:\d+, in <module>", first
        )
        assert "(1 s), if it has not come to it until then" in second
        (tmp_path / "told").touch()
        running.until(_ended)
        assert running.report is not None
        assert running.report.headline.startswith("rank 0 has not called all_reduce")


# Rank 1 is late by more than three time-outs. Then all ranks end by themselves.
HARMLESS = {
    "a first step": "print('ready', flush=True)\nif rank: time.sleep(4)\ndist.all_reduce(torch.ones(4))",
    "no collectives": "print('ready', flush=True)\ntime.sleep(4)",
    "a checkpoint": """
ready()
class Slow:
    def __reduce__(self):
        time.sleep(4)
        return int, ()
if rank: torch.save(Slow(), os.devnull)
dist.all_reduce(torch.ones(4))
""",
    "uneven tensors": """
ready()
dist.all_to_all_single(torch.zeros(3), torch.zeros(3), [1, 2] if rank == 0 else [2, 1], [1, 2] if rank == 0 else [2, 1])
dist.barrier()
""",
}


@pytest.mark.parametrize("body", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_only_takes_long_is_no_hang(tmp_path: Path, body: str) -> None:
    with job(tmp_path, body, hang_timeout_s=1) as running:
        running.until_ready()
        running.until(_ended)
        assert running.report is None, describe_hang(running.report)
        assert running.endings == {0: 0, 1: 0}
        assert running.watch.explain() is None
        assert all((tmp_path / f"err-{rank}").read_text() == "" for rank in (0, 1))  # the server is silent
        assert not any((folder / SERVER).exists() for folder in running.folders)


@pytest.mark.parametrize(
    ("body", "code"), [("os.abort()", -6), ("ctypes.string_at(0)", -11), ("raise OSError('disk full')", 1)]
)
def test_a_rank_that_fails_is_no_hang(tmp_path: Path, body: str, code: int) -> None:
    with job(tmp_path, f"ready()\nif rank: {body}\ndist.all_reduce(torch.ones(4))", hang_timeout_s=600) as running:
        running.until_ready()
        running.until(_ended)
        assert running.report is None
        assert running.endings[1] == code  # an abort is held only for a second
        assert running.watch.explain() is None
        assert (running.folders[0] / FLIGHT).exists()
        fatal = (running.folders[1] / "fatal.txt").read_text()
        assert ("script.py" in fatal) == (code < 0)


def test_a_script_without_torch_waits_for_nothing(tmp_path: Path) -> None:
    with job(tmp_path, "import sys\nprint('ready')\nassert 'torch' not in sys.modules", head="") as running:
        running.until_ready()
        running.until(_ended)
        assert running.endings == {0: 0, 1: 0}


def test_without_a_debugger_torchs_server_and_a_signal_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_py_spy_program", lambda: None)
    body = "ready()\nif rank == 0: dist.all_reduce(torch.ones(4))\nctypes.PyDLL(None).sleep(600)"
    with job(tmp_path, body) as running:
        running.until_ready()
        running.until(_ended)
        assert running.report is not None
        pids = {rank: process.pid for rank, process in enumerate(running.processes)}
        found = read_stacks(pids, dict(enumerate(running.folders)))
        assert found[0].user_frame() is not None
        assert found[1].user_frame() is None  # the server's thread needs the GIL for this
        assert "script.py" in signal_for_stacks(pids[1], running.folders[1])


def test_ranks_that_have_not_started(tmp_path: Path) -> None:
    watch = Watch([WatchedRank(0, 2**22 + 1, tmp_path)], 1)
    assert watch.look() is None and watch.explain() is None and not watch.progressed
    assert watch.stragglers() == ""


class Board:
    """Connect agents as a store does, within one process."""

    def __init__(self, texts: dict[str, str], node: int) -> None:
        self._texts, self._node, self.leads = texts, node, node == 0

    def publish(self, state: str) -> None:
        self._texts[f"state/{self._node}"] = state

    def read(self) -> list[str]:
        return [text for key, text in self._texts.items() if key.startswith("state/")]

    def announce(self, text: str) -> None:
        self._texts["announced"] = text

    def announced(self) -> str | None:
        return self._texts.get("announced")


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (
            "if rank != 3: dist.all_reduce(torch.ones(4))",
            "absent",
            "rank 3 has not called all_reduce #4: ranks 0-2 wait in",
        ),
        (
            "dist.all_reduce(torch.ones(4)) if rank < 3 else dist.barrier()",
            "mismatch",
            "the ranks do not agree on collective #4: ranks 0-2 call all_reduce of 4 float32, rank 3 calls barrier",
        ),
    ],
)
def test_agents_of_two_machines_agree(tmp_path: Path, body: str, kind: str, said: str) -> None:
    with job(tmp_path, f"ready()\n{body}\ntime.sleep(600)", 4) as running:
        running.until_ready()
        texts: dict[str, str] = {}
        ranks = [WatchedRank(rank, running.processes[rank].pid, running.folders[rank]) for rank in range(4)]
        watches = [Watch(ranks[2 * node : 2 * node + 2], 2, Board(texts, node)) for node in (0, 1)]
        reports: list[HangReport | None] = [None, None]

        def both(job: Job) -> bool:
            for node, watch in enumerate(watches):
                reports[node] = reports[node] or watch.look()
            return all(reports)

        running.watch = Watch([], 0)
        running.until(both)
        leading, following = reports
        assert leading is not None and following is not None
        assert (leading.kind, leading.blamed) == (kind, (3,))
        assert leading.headline.startswith(said)
        assert (following.headline, following.rows) == (leading.headline, leading.rows)
        assert [bool(row.host and "script.py" in row.where) for row in leading.rows] == [True] * 4
        assert set(leading.stacks) == {0, 1} and set(following.stacks) == {2, 3}


def test_ranks_of_another_machine_that_are_late_are_told_by_the_leading_agent(tmp_path: Path) -> None:
    """In a second world: their agent asks them how many collectives they have called there."""
    body = f"""
        dist.destroy_process_group()
        dist.init_process_group("gloo", "file://{tmp_path}/second", rank=rank, world_size=4)
        print("ready", flush=True)
        if rank < 2: dist.all_reduce(torch.ones(4))
        time.sleep(600)
    """
    with job(tmp_path, f"for _ in range(3): dist.all_reduce(torch.ones(16))\n{textwrap.dedent(body)}", 4) as running:
        running.until_ready()
        texts: dict[str, str] = {}
        ranks = running.watched
        watches = [Watch(ranks[2 * n : 2 * n + 2], None, Board(texts, n), report_s=3) for n in (0, 1)]
        told: list[list[Notice]] = [[], []]

        def both(job: Job) -> bool:
            for node, watch in enumerate(watches):
                assert watch.look() is None
                told[node] += watch.take_notices()
            return bool(told[0])

        running.watch = Watch([])
        running.until(both)
        (notice,), following = told
        assert following == []
        said = r"for \d s: ranks 2, 3 have not called all_reduce #1: ranks 0, 1 wait in all_reduce"
        assert re.match(said, notice.lines[0])
        assert re.search(r"ranks 2, 3: .*script.py:\d+, in <module>, sleeping", notice.lines[0])
        assert [bool(row.host and "script.py" in row.where) for row in notice.report.rows] == [True] * 4

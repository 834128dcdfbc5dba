"""Each way to fail of docs/failures.md: the launcher's last lines, when it ends, its exit code, and what it leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ddparity as dp
from ddparity.launcher.diagnosis.exits import Cause, ExitReport, describe_exits, has_exception, read_exit_report
from ddparity.launcher.diagnosis.hang_report import HangReport, Row, add_positions
from ddparity.launcher.diagnosis.stacks import shorten_traceback
from tests.launcher.failure_cases import CASES, OURS, Case, NotPermittedError, Outcome, run_case

PAGE = Path(__file__).parents[2] / "docs" / "failures.md"
HANG_S = 2.0  # --hang-timeout
WITHIN_S = 10.0  # from the failure, or from the report of a hang
STARTED_S = 40.0  # from the start of a launcher that starts no rank
SLOWER = 6  # the cases together load the machine: a launcher takes as many times as long to start as alone
_LAUNCHERS_OWN = re.compile(r"torch/distributed/(elastic|run|launcher)|ddparity/(launcher/|cli|__main__)|runpy")

pytestmark = pytest.mark.timeout(600)  # the first test runs all cases


@pytest.fixture(scope="module")
def start_s() -> float:
    """How long a launcher takes to start on this machine, which may be busy."""
    begin = time.monotonic()
    subprocess.run([*OURS, "--help"], stdout=subprocess.DEVNULL, timeout=120, check=True)
    return time.monotonic() - begin


@pytest.fixture(scope="module")
def outcomes(start_s: float, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | NotPermittedError]:
    """Run all cases, four at a time, since they mostly wait."""
    folder = tmp_path_factory.mktemp("failures")

    def run(case: Case) -> Outcome | NotPermittedError:
        try:
            launcher = (*OURS, "--hang-timeout", str(HANG_S))
            return run_case(case, launcher, folder / case.name, 60 + SLOWER * start_s, warm=True)
        except NotPermittedError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((case.name for case in CASES), pool.map(run, CASES)))


def _outcome(outcomes: dict[str, Outcome | NotPermittedError], name: str) -> Outcome:
    found = outcomes[name]
    if isinstance(found, NotPermittedError):
        pytest.skip(f"not permitted here: {found}")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_end_names_the_cause(case: Case, outcomes: dict[str, Outcome | NotPermittedError], start_s: float) -> None:
    outcome = _outcome(outcomes, case.name)
    end = outcome.end(15)
    assert re.search(case.report, f"{end}\n", re.DOTALL | re.MULTILINE), outcome.text
    assert outcome.code == case.code, outcome.text
    within_s = STARTED_S + SLOWER * start_s if outcome.from_start else WITHIN_S + HANG_S * (case.code == 124)
    assert outcome.seconds < within_s
    assert outcome.left == ()
    if (line := case.line()) is not None:
        assert re.search(rf'train\.py(", line |:){line}\b', end), outcome.text
    if not case.while_starting:
        assert not _LAUNCHERS_OWN.search(end), outcome.text
        lines = [line for line in outcome.text.splitlines() if not line.startswith("ddparity: waiting up to")]
        assert case.send is None or len(lines) <= 1  # ranks may take long to end on a busy machine


def test_ctrl_c_in_a_save_leaves_the_checkpoint_before(outcomes: dict[str, Outcome | NotPermittedError]) -> None:
    dp.load_checkpoint(_outcome(outcomes, "ctrl-c-in-a-save").folder / "last.safetensors", model=torch.nn.Linear(5, 5))


TRACE = """Traceback (most recent call last):
  File "/home/me/train.py", line 21, in <module>
    for batch in loader:
                 ^^^^^^
  File "/env/lib/python3.11/site-packages/torch/utils/data/dataloader.py", line 725, in __next__
    data = self._next_data()
           ^^^^^^^^^^^^^^^^^
  File "/env/lib/python3.11/site-packages/torch/_utils.py", line 803, in reraise
    raise exception
KeyError: Caught KeyError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "/env/lib/python3.11/site-packages/torch/utils/data/_utils/fetch.py", line 54, in fetch
    data = [self.dataset[idx] for idx in possibly_batched_index]
  File "/home/me/train.py", line 17, in __getitem__
    return self.images[index]
  [Previous line repeated 2 more times]
KeyError: 20"""


def test_a_long_traceback_is_shown_with_the_users_frames() -> None:
    assert shorten_traceback(TRACE).splitlines() == [
        "Traceback (most recent call last):",
        '  File "/home/me/train.py", line 21, in <module>',
        "    for batch in loader:",
        "  … 2 frames, to torch/_utils.py:803, in reraise",
        "KeyError: Caught KeyError in DataLoader worker process 0.",
        "Original Traceback (most recent call last):",
        "  … 1 frame, torch/utils/data/_utils/fetch.py:54, in fetch",
        '  File "/home/me/train.py", line 17, in __getitem__',
        "    return self.images[index]",
        "  [Previous line repeated 2 more times]",
        "KeyError: 20",
    ]
    short = "\n".join(TRACE.splitlines()[:8])
    assert shorten_traceback(short) == short


def test_a_rank_that_has_ended_gets_the_position_of_its_traceback() -> None:
    row = Row(0, "node0", "", "", "in all_reduce", "all_reduce #6", 1.0)
    hang = HangReport("finished", "default", (1,), "", (row, replace(row, rank=1), replace(row, where="a.py:1")), {})
    positions = [(row.where, row.function) for row in add_positions(hang, {0: TRACE}).rows]
    assert positions == [("/home/me/train.py:17", "__getitem__"), ("", ""), ("a.py:1", "")]


def test_an_exception_counts_before_a_crash_at_exit(tmp_path: Path) -> None:
    extra: dict[str, object] = {"py_callstack": TRACE}
    record = {"message": {"message": "ValueError: bad batch", "extraInfo": extra}}
    (tmp_path / "error.json").write_text(json.dumps(record))  # as torch's `record` in another process has it
    assert not has_exception(tmp_path)
    assert read_exit_report(0, "node0", tmp_path, -signal.SIGABRT, 0.0).cause is Cause.CRASHED
    extra["pid"] = 7
    (tmp_path / "error.json").write_text(json.dumps(record))
    assert has_exception(tmp_path)
    found = read_exit_report(0, "node0", tmp_path, -signal.SIGABRT, 0.0)
    assert (found.cause, found.exit_code, found.ending()) == (Cause.FAILED, 1, "ValueError: bad batch")


def test_a_lost_data_loader_worker_is_no_closed_connection_of_another_rank() -> None:
    trace = 'File ".../torch/utils/data/dataloader.py", line 1\nFile ".../multiprocessing/connection.py", line 2'
    closed = ExitReport(1, "node0", 1, 0.0, message="ConnectionResetError: [Errno 104] Connection reset by peer")
    assert replace(closed, traceback='File ".../torch/distributed/rendezvous.py", line 1').cause is Cause.CONSEQUENCE
    assert replace(closed, traceback=trace).cause is Cause.FAILED


_SAVE = '  File ".../torch/distributed/checkpoint/state_dict_saver.py", line 1, in save\n'
_UPLOAD = '  File ".../fsspec/core.py", line 2, in flush\n    self.socket.send(data)\n'


@pytest.mark.parametrize(
    ("message", "trace", "cause"),
    [
        ("ConnectionResetError: Connection reset by peer", _SAVE + _UPLOAD, Cause.FAILED),
        ("ConnectionResetError: Connection reset by peer", _UPLOAD + _SAVE, Cause.FAILED),
        (
            "CheckpointException: ranks:dict_keys([1])\nTraceback (most recent call last): (RANK 1)\n"
            '  File ".../torch/distributed/utils.py", line 3, in reduce_scatter\nBroken pipe',
            _SAVE,
            Cause.FAILED,
        ),
        (
            "EOFError: Connection closed by peer",
            _UPLOAD + '  File ".../torch/distributed/distributed_c10d.py", line 4, in all_reduce\n    work.wait()\n',
            Cause.CONSEQUENCE,
        ),
    ],
    ids=["upload", "storage", "quoted", "collective"],
)
def test_what_a_checkpoints_upload_raises_is_no_consequence(message: str, trace: str, cause: Cause) -> None:
    """torch's distributed checkpoints and FSDP call storage in code of torch.distributed."""
    full = f"Traceback (most recent call last):\n{trace}{message}"
    assert ExitReport(1, "node0", 1, 0.0, message=message, traceback=full).cause is cause


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("TimeoutExpired: Command '['upload']' timed out after 2 seconds", Cause.FAILED),
        ("BrokenPipeError: [Errno 32] Broken pipe", Cause.FAILED),
        ("RuntimeError: [gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:4", Cause.CONSEQUENCE),
        ("torch.distributed.DistBackendError: NCCL communicator was aborted", Cause.CONSEQUENCE),
    ],
)
def test_a_program_that_takes_too_long_is_no_failure_of_another_rank(message: str, cause: Cause) -> None:
    assert ExitReport(0, "node0", 1, 0.0, message=message).cause is cause


def test_an_exception_raised_from_another_ranks_failure_is_no_cause(tmp_path: Path) -> None:
    def exit_report(earlier: str) -> ExitReport:
        extra = {"py_callstack": TRACE, "before": [earlier]}
        (tmp_path / "error.json").write_text(json.dumps({"message": {"message": "Stop: no loss", "extraInfo": extra}}))
        return read_exit_report(0, "node0", tmp_path, 1, 0.0)

    assert (
        exit_report("RuntimeError: [gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:4").cause
        is Cause.CONSEQUENCE
    )
    # A connection to a data server is no connection between ranks.
    assert exit_report("ConnectionResetError: [Errno 104] Connection reset by peer").cause is Cause.FAILED


def test_the_traceback_of_rank_0_is_shown_where_another_rank_is_the_cause() -> None:
    cause = ExitReport(1, "node0", -signal.SIGSEGV, 1.0)
    own = ExitReport(0, "node0", 1, 2.0, message="KeyError: 20", traceback=TRACE)
    text = describe_exits([own, cause], 2)
    assert text.startswith(f"ddparity: the traceback of rank 0:\n{TRACE}\n")
    assert text.splitlines()[-1] == "ddparity: rank 0: KeyError: 20"
    victim = replace(own, message="RankFailure: rank 1 failed")
    assert TRACE not in describe_exits([victim, cause], 2)


def test_a_signal_without_a_name_is_shown_by_its_number() -> None:
    assert ExitReport(0, "node0", -signal.SIGRTMIN - 3, 0.0).ending() == f"ended by signal {signal.SIGRTMIN + 3}"


def test_the_page_has_each_case() -> None:
    """`python benchmarks/failures.py` writes it."""
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows[2:] == [case.failure for case in CASES]

"""Who can reach a job: where it listens, and what becomes of what others write for the launcher to read."""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch._C._distributed_c10d import Store
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousStateError

from ddparity.compat import PrefixStore, TCPStore
from ddparity.errors import RendezvousError
from ddparity.launcher import exchange
from ddparity.launcher.diagnosis import flight, limits, messages
from ddparity.launcher.diagnosis.exits import ExitReport, pack_reports, read_exit_report, unpack_reports
from ddparity.launcher.diagnosis.instruments import SERVER
from ddparity.launcher.exchange import Exchange, Node
from ddparity.launcher.handlers import rendezvous_handler
from ddparity.launcher.options import parse
from ddparity.launcher.rendezvous import check_nodes, check_rendezvous, node_info
from ddparity.runtime.network import is_loopback

from ..machines import SRC, Machine, run_threads
from ..ranks import free_port

ROOT = Path(__file__).parents[2]
WAITS = """
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
print("ready", flush=True)
time.sleep(600)
"""


class Planted:
    """A pickle that creates a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "waits.py").write_text(WAITS)
    return str(tmp_path / "waits.py")


def _tcp_addresses(machine: Machine) -> set[str]:
    """Return the addresses at which a launcher and its ranks listen."""
    found = set()
    for process in machine.family():
        with suppress(psutil.Error):
            found |= {one.laddr.ip for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}
    return found


def test_a_job_on_one_machine_listens_on_the_loopback_alone(script: str, started: list[Machine]) -> None:
    """The launcher's store, Gloo's connections and the rendezvous at a port of the user's. Files are the user's."""
    for line in ([], ["--nnodes", "1", "--master-port", str(free_port())]):
        machine = Machine([*line, "--nproc", "2", script])
        started.append(machine)
        machine.wait_for("ready")
        addresses = _tcp_addresses(machine)
        assert addresses, "psutil shows the ports of these processes"
        assert all(map(is_loopback, addresses)), addresses
        folder = Path(machine.ranks()[0].environ()["TORCHELASTIC_ERROR_FILE"]).parents[1]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        machine.process.terminate()
        assert machine.end() == 143
        assert not folder.exists()


def _elastic(line: str, folder: Path) -> RendezvousHandler:
    (folder / "t.py").touch()
    setup = check_rendezvous(parse([*line.split(), str(folder / "t.py")]))
    try:
        return rendezvous_handler(setup)
    finally:
        setup.close()


@pytest.mark.parametrize(
    "text",
    [
        "a pickle",
        b"not JSON",
        b'{"round": 0}',
        b'{"round": 0, "complete": false, "closed": false, "deadline": null, "nodes": [["a", 1]]}',
        b'{"round": "0", "complete": false, "closed": false, "deadline": null, "nodes": []}',
        b'{"round": 0, "complete": false, "closed": false, "deadline": 5, "nodes": []}',
        b'{"round": 0, "complete": false, "closed": false, "deadline": null, "nodes": 7}',
        b"[" * 100_000,
        b'"' + b"x" * (limits.MESSAGE + 1) + b'"',
    ],
    ids=["pickle", "text", "short", "name", "type", "time", "nodes", "deep", "long"],
)
def test_what_others_write_as_the_state_of_the_rendezvous_runs_no_code(text: str | bytes, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    planted = pickle.dumps(Planted(mark)) if isinstance(text, str) else text
    handler = _elastic(f"--nnodes 1:2 --rdzv-id job --rendezvous 127.0.0.1:{(port := free_port())}", tmp_path)
    other = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=10), wait_for_workers=False)
    other.set("torch.rendezvous.job", base64.b64encode(planted).decode())
    with pytest.raises(RendezvousStateError, match="the state of the rendezvous cannot be read"):
        handler.next_rendezvous()
    assert not mark.exists()


def test_a_launcher_that_reads_a_planted_state_ends_with_a_word(
    script: str, started: list[Machine], tmp_path: Path
) -> None:
    port, mark = free_port(), tmp_path / "ran"
    where = ["--nnodes", "2", "--rdzv-id", "job", "--rendezvous", f"127.0.0.1:{port}"]
    machine = Machine([*where, "--nproc", "1", script])
    started.append(machine)
    deadline = time.monotonic() + 30
    while True:
        try:
            other = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=10), wait_for_workers=False)
            break
        except RuntimeError:
            assert time.monotonic() < deadline, machine.text
    other.wait(["torch.rendezvous.job"], timedelta(seconds=30))
    other.set("torch.rendezvous.job", base64.b64encode(pickle.dumps(Planted(mark))).decode())
    assert machine.end() == 125
    assert "the state of the rendezvous cannot be read" in machine.lines[-1]
    assert not mark.exists()


# What the launcher reads.


def test_files_of_ranks_are_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * 100)
    assert limits.read_file(tmp_path / "long", 10) == b"x" * 10
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        limits.read_file(tmp_path / "pipe")
    os.mkfifo(tmp_path / "error.json")
    os.mkfifo(tmp_path / flight.FLIGHT)
    assert read_exit_report(0, "a", tmp_path, 1, 0.0).message == ""
    assert flight.read_record_file(tmp_path) is None


def test_a_rank_that_answers_without_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "ANSWER", 1 << 20)
    sent = [0]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / SERVER))
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    sent[0] += connection.send(b"x" * 65536)

        thread = threading.Thread(target=answer)
        thread.start()
        start = time.monotonic()
        assert flight.ask_records({0: tmp_path}, 20.0) == {}
        thread.join(20)
    assert time.monotonic() - start < 10
    assert sent[0] < 4 << 20


@pytest.mark.parametrize("text", ["", "[]", "[1]", '{"host": 1}', "[" * 100_000, '{"ranks": [{}]}', "\x80\x04."])
def test_what_is_no_message_is_left_out(text: str) -> None:
    assert messages.unpack_all([text]) == []
    assert messages.unpack_hang('{"hang"' + text) is None
    assert messages.asked_group('{"look"' + text) is None
    assert unpack_reports(text) in (None, [])


def test_exit_reports_that_are_too_long_keep_their_ends() -> None:
    report = ExitReport(0, "a", 1, 0.0, message="ValueError: \x00" * 10**5, traceback="é" * 10**6 + "the end")
    text = pack_reports([report] * 8)
    assert len(text) < limits.MESSAGE
    found = unpack_reports(text)
    assert found is not None
    assert found[7].message.startswith("ValueError: ") and found[7].traceback.endswith("the end")


def test_a_line_that_no_machine_wrote(tmp_path: Path) -> None:
    (tmp_path / "t.py").touch()
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    store.append("ddparity/nodes/all", "\x80\x04planted\n")  # type: ignore[attr-defined]
    with pytest.raises(RendezvousError, match="in a way that cannot be read"):
        check_nodes(store, 0, 1, node_info(parse([str(tmp_path / "t.py")])), 5.0)


# What the machines tell each other. Each is a thread with its own connection to the store.


def _meet(port: int, size: int, timeout_s: float = 5.0) -> list[Exchange]:
    found: dict[int, Exchange] = {}

    def machine(number: int) -> None:
        own = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=20), wait_for_workers=False)
        node = Node(f"node{number}", (number,), 0, False)
        patience = lambda _: lambda: False  # noqa: E731
        found[number] = Exchange(
            PrefixStore("round", own), number, size, node, timeout_s, lambda: 0, ("127.0.0.1", port), patience
        )

    run_threads(machine, [(number,) for number in range(size)])
    return [found[number] for number in range(size)]


@pytest.mark.parametrize("silent", [None, 0, 1], ids=["all report", "the leading one is lost", "another one is lost"])
def test_each_machine_has_the_exit_reports_of_all(silent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_LOST_S", 1.5)
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    exchanges = _meet(store.port, 3)
    assert {tuple(node.host for node in one.nodes) for one in exchanges} == {("node0", "node1", "node2")}
    found: dict[int, list[ExitReport]] = {}

    def report(number: int) -> None:
        found[number] = exchanges[number].all_exit_reports([ExitReport(number, f"node{number}", number, 0.0)])

    threads = [threading.Thread(target=report, args=(number,)) for number in range(3) if number != silent]
    if silent is not None:
        exchanges[silent].close()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == [number for number in range(3) if number != silent]
    for reports in found.values():
        assert [one.rank for one in reports] == [0, 1, 2]
        assert [bool(one.lost) for one in reports] == [number == silent for number in range(3)]
    for one in exchanges:
        one.close()


def test_garbage_of_another_machine_is_no_word_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_LEAVE_S", 0.2)
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    exchanges = _meet(store.port, 2)
    store.set("round/ddparity/fates/1", "\x80\x04planted")
    store.append("round/ddparity/reported", "1 ")  # type: ignore[attr-defined]
    reports = exchanges[0].all_exit_reports([ExitReport(0, "node0", 1, 0.0)])
    assert [(one.rank, bool(one.lost)) for one in reports] == [(0, False), (1, True)]
    assert json.loads(store.get("round/ddparity/fates"))["1"] == "\x80\x04planted"
    for one in exchanges:
        one.close()


class _Counted:
    """Counts the requests of one thread to torch's stores, without the questions of a poll."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made = threading.local()
        for name in ("add", "set", "get", "wait", "compare_set", "append", "multi_get"):
            monkeypatch.setattr(Store, name, self._count(getattr(Store, name)))

    def _count(self, method: Any) -> Any:
        def request(*args: Any) -> Any:
            self._made.count = self.made + 1
            return method(*args)

        return request

    @property
    def made(self) -> int:
        return getattr(self._made, "count", 0)


def test_the_requests_of_a_machine_do_not_grow_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.py").touch()
    info = node_info(parse([str(tmp_path / "t.py")]))
    counted, most = _Counted(monkeypatch), []
    for size in (3, 12):
        store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
        made: list[int] = []

        def machine(number: int, size: int = size, port: int = store.port, made: list[int] = made) -> None:
            own = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=20), wait_for_workers=False)
            check_nodes(own, number, size, info, 20.0)
            node = Node(f"node{number}", (number,), 0, False)
            found = Exchange(own, number, size, node, 1.0, lambda: 0, ("127.0.0.1", 1), lambda _: lambda: False)
            made.append(counted.made)
            found.close()

        run_threads(machine, [(number,) for number in range(size)])
        assert len(made) == size
        most.append(max(made))
    assert most[0] >= most[1] - 1, most  # the last one to come compares: it may also be the one that collects


def test_launches_leave_nothing_behind() -> None:
    """Processes, ports, sockets, files, shared memory, descriptors, threads; in full by `make scale`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--quick", "--ranks", ""]
    path = os.pathsep.join(filter(None, (str(SRC), os.environ.get("PYTHONPATH"))))
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "0 descriptors, 0 threads" in ended.stdout


def test_another_machine_can_pass_on_no_signal_but_a_warning() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    (one,) = _meet(store.port, 1)
    store.append("round/ddparity/signals", f"9 {int(signal.SIGUSR1)} 999 x ")  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while not (found := one.signals([])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == [signal.SIGUSR1]
    assert not one.failed()
    one.close()

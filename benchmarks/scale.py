"""Measure the store, the agreements of ranks and the agents of jobs of up to 1,024 ranks, without training.

python benchmarks/scale.py [--ranks 8,64,256,1024] [--launches 200] [--nproc 32] [--quick]

A rank or an agent is a thread with its own connection to one TCP store, in a few processes: what the store and the
protocols cost. Ranks' servers are simulated, too; no stack is read. Then `--launches` jobs of `--nproc` processes are
started and ended, and what they leave behind is counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch.distributed as dist
from torch._C._distributed_c10d import Store

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.results import machine, spread, table, write_section

from ddparity.compat import PrefixStore, TCPStore
from ddparity.runtime.network import listen_at

PROCESSES = 4  # that the threads are in
RANKS_PER_MACHINE = 8
LIMIT = timedelta(seconds=120)
OPERATIONS = 8  # in the record of each rank's last collectives
MISMATCHED = 5  # the rank that calls another collective than the others
TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 18, in <module>\n' * 10


# In a process of the simulation.


class Simulated(threading.local):
    """What the thread that runs is: a rank or an agent, with its own connection to the store."""

    number: int
    size: int
    machine: int
    per_machine: int
    store: Store
    requests: int = 0


simulated = Simulated()


def count_requests() -> None:
    """Count each request that a thread makes through torch's stores."""
    for name in ("add", "set", "get", "check", "wait", "compare_set", "append", "multi_get", "multi_set"):
        setattr(Store, name, counted(getattr(Store, name)))


def counted(method: Callable[..., Any]) -> Callable[..., Any]:
    def request(*args: Any) -> Any:
        simulated.requests += 1
        return method(*args)

    return request


def simulate_ranks() -> None:
    """Let `first` and `agreed` take the thread for a rank of a process group."""
    from ddparity.runtime import agreement, first, members

    group = SimpleNamespace(
        is_initialized=lambda: True,
        get_rank=lambda: simulated.number,
        get_world_size=lambda group=None: simulated.size,
        DistNetworkError=dist.DistNetworkError,
    )
    for module in (agreement, first, members):
        module.dist = group
    agreement.default_store = lambda: simulated.store
    agreement._machine_id = lambda: f"machine{simulated.machine}"
    if hasattr(agreement, "group_timeout_s"):
        agreement.group_timeout_s = lambda group: 1800.0


def one_request() -> int:
    """Return how many requests this thread makes in two seconds."""
    end, made = time.monotonic() + 2.0, 0
    while time.monotonic() < end:
        simulated.store.add("counter", 1)
        made += 1
    return made


def list_of_members() -> None:
    from ddparity.runtime.members import Member, collect_members

    local = simulated.number % simulated.per_machine
    own = Member(f"node{simulated.machine}.cluster.example", local, simulated.per_machine, simulated.machine)
    store = PrefixStore("ddparity", simulated.store)
    assert len(collect_members(store, simulated.number, simulated.size, own, time.monotonic() + 120)) == simulated.size


def first_of_the_world() -> None:
    from ddparity.runtime.first import first

    with first("world"):
        pass


def first_of_each_node() -> None:
    from ddparity.runtime.first import first

    with first("node"):
        pass


def agreement_of_all() -> None:
    from ddparity.runtime.agreement import agreed

    with agreed("the benchmark"):
        pass


def meeting(backend: str) -> Callable[[], None]:
    """Return the rendezvous of an agent: torch's interface, the comparison of the machines, the first words."""

    def meet() -> None:
        from ddparity.launcher.exchange import Exchange, Node
        from ddparity.launcher.handlers import StateAsJson
        from ddparity.launcher.rendezvous import NodeInfo, check_nodes

        number, size, store = simulated.number, simulated.size, simulated.store
        if backend == "c10d":
            from torch.distributed.elastic.rendezvous import RendezvousParameters
            from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
            from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

            parameters = RendezvousParameters("c10d", "", "job", size, size, "127.0.0.1", join_timeout=120)
            handler = create_handler(store, StateAsJson(C10dRendezvousBackend(store, "job")), parameters)
            info = handler.next_rendezvous()
            number, store = info.rank, info.store
            simulated.handler = handler  # it sends heartbeats while it lives
        check_nodes(store, number, size, NodeInfo("node", 8, True, str(size), "2", "3", "0"), 60.0)
        ranks = tuple(range(number * simulated.per_machine, (number + 1) * simulated.per_machine))
        own, count = Node(f"node{number}", ranks, 0, False), lambda: 0
        found = Exchange(store, number, size, own, 30.0, count, ("127.0.0.1", 1), lambda seconds: lambda: False)
        simulated.exchange = found

    return meet


def verdict() -> None:
    """Watch the ranks of this machine until the agents know which rank hangs."""
    from ddparity.launcher.diagnosis.watch import Watch, WatchedRank

    exchange: Any = simulated.exchange
    own = exchange.nodes[exchange._node_rank].ranks
    watch = Watch([WatchedRank(rank, os.getpid(), simulated.folders[rank]) for rank in own], 3600.0, exchange)
    while (report := watch.look()) is None:
        time.sleep(0.1)  # as the agent does between two looks
    assert report.blamed == (MISMATCHED,), report


def failure() -> None:
    """Rank 0 fails: its agent tells it, and all agents write their reports."""
    from ddparity.launcher.diagnosis.exits import ExitReport, describe_exits, mark_left_early

    exchange: Any = simulated.exchange
    own = exchange.nodes[exchange._node_rank]
    if 0 not in own.ranks:
        while not exchange.failed():
            time.sleep(0.1)  # as the agent does between two looks
    reports = [
        ExitReport(rank, own.host, 1, 0.0, message="OSError: full", traceback=TRACEBACK)
        if rank == 0
        else ExitReport(rank, own.host, -15, 1.0, ended_by_us=True)
        for rank in own.ranks
    ]
    found = mark_left_early(exchange.all_exit_reports(reports))
    assert len(found) == sum(len(node.ranks) for node in exchange.nodes)
    assert "rank 0 failed: OSError: full" in describe_exits(found, len(found))
    exchange.close()


PARTS: dict[str, Callable[[], Any]] = {
    "requests": one_request,
    "members": list_of_members,
    "first of the world": first_of_the_world,
    "first of each node": first_of_each_node,
    "agreement": agreement_of_all,
    "static": meeting("static"),
    "c10d": meeting("c10d"),
    "verdict": verdict,
    "failure": failure,
}


class Servers:
    """The servers of simulated ranks, which answer as torch's do: all ranks wait in a collective, one in another."""

    def __init__(self, ranks: range, folder: Path) -> None:
        self.folders = {rank: folder / str(rank) for rank in ranks}
        self._selector = selectors.DefaultSelector()
        for rank, own in self.folders.items():
            own.mkdir(parents=True)
            server = socket.socket(socket.AF_UNIX)
            server.bind(str(own / "server.sock"))
            server.listen()
            self._selector.register(server, selectors.EVENT_READ, rank)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                server: Any = key.fileobj
                connection, _ = server.accept()
                with connection, suppress(OSError):
                    connection.recv(4096)
                    body = record_of(key.data)
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    connection.sendall(head + body)


def record_of(rank: int) -> bytes:
    entries = [
        {
            "record_id": number,
            "process_group": ["0", "default_pg"],
            "collective_seq_id": number,
            "p2p_seq_id": 0,
            "profiling_name": "gloo:all_reduce",
            "input_sizes": [[8 if last and rank == MISMATCHED else 4]],
            "output_sizes": [[8 if last and rank == MISMATCHED else 4]],
            "input_dtypes": ["Float"],
            "output_dtypes": ["Float"],
            "time_created_ns": number,
            "timeout_ms": 1800000,
            "state": "scheduled",
            "retired": not last,
            "is_p2p": False,
        }
        for number in range(1, OPERATIONS + 1)
        for last in [number == OPERATIONS]
    ]
    return json.dumps({"entries": entries}).encode()


def simulate(pipe: Connection, place: int) -> None:
    """Run the parts that come through the pipe: for each, the threads of this process, with one connection each."""
    import ddparity.launcher.diagnosis.stacks as stacks

    stacks.read_stacks = lambda pids, folders, *args: dict.fromkeys(pids, stacks.Stack())
    from ddparity.launcher.diagnosis import instruments

    assert instruments.SERVER == "server.sock", instruments.SERVER
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    count_requests()
    simulate_ranks()
    kept: dict[int, dict[str, Any]] = {}
    stores: list[TCPStore] = []
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        while (job := pipe.recv()) is not None:
            part, size, port, per_machine = job
            own = range(place * size // PROCESSES, (place + 1) * size // PROCESSES)
            if part == "connect":
                for one in kept.values():
                    if "handler" in one:
                        one["handler"]._stop_heartbeats()  # they would miss the store
                stores = [TCPStore("127.0.0.1", port, None, False, LIMIT, wait_for_workers=False) for _ in own]
                kept = {number: {} for number in own}
                pipe.send([])
                continue
            if part == "serve":
                servers = Servers(range(own.start * per_machine, own.stop * per_machine), Path(folder) / str(size))
                everyone = dict(servers.folders)
                for number in own:
                    kept[number]["folders"] = everyone
                pipe.send(everyone)
                continue
            if isinstance(part, tuple):  # the folders of all processes
                for number in own:
                    kept[number]["folders"] = part[0]
                pipe.send([])
                continue
            found: list[Any] = []
            gate = threading.Barrier(len(own) + 1)
            threads = [
                threading.Thread(target=run, args=(part, number, size, per_machine, store, kept, gate, found))
                for number, store in zip(own, stores)
            ]
            for thread in threads:
                thread.start()
            pipe.send("ready")
            start = pipe.recv()
            time.sleep(max(0.0, start - time.time()))  # until the moment at which all processes begin
            gate.wait()
            for thread in threads:
                thread.join()
            assert len(found) == len(own), f"{part}: {len(own) - len(found)} of {len(own)} threads failed"
            pipe.send(found)


def run(
    part: str,
    number: int,
    size: int,
    per_machine: int,
    store: TCPStore,
    kept: dict[int, dict[str, Any]],
    gate: threading.Barrier,
    found: list[Any],
) -> None:
    simulated.number, simulated.size, simulated.machine = number, size, number // per_machine
    simulated.per_machine = per_machine
    simulated.store = PrefixStore(part if part not in ("first of each node", "agreement") else "members", store)
    for name, value in kept[number].items():
        setattr(simulated, name, value)
    gate.wait()
    simulated.requests, start = 0, time.time()
    value = PARTS[part]()
    found.append((time.time(), simulated.requests, value, start))
    for name in ("exchange", "handler"):
        if name in vars(simulated):
            kept[number][name] = vars(simulated)[name]


# In the main process.


class Simulation:
    """The processes in which the ranks and agents are threads, and the store, which this process holds."""

    def __init__(self) -> None:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # connections to a store that has ended
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for place in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=simulate, args=(theirs, place), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def connect(self, size: int) -> TCPStore:
        listener = listen_at("127.0.0.1", 0)
        port = listener.getsockname()[1]
        store = TCPStore(
            "127.0.0.1", port, None, True, LIMIT, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._all(("connect", size, port, 1))
        return store

    def serve(self, size: int, per_machine: int) -> None:
        folders: dict[int, Path] = {}
        for found in self._all(("serve", size, 0, per_machine)):
            folders |= found
        self._all(((folders,), size, 0, per_machine))

    def measure(self, part: str, size: int, per_machine: int) -> tuple[float, float, float]:
        """Return the seconds until the last thread was through, its requests on average, and the sum of its values."""
        for pipe in self._pipes:
            pipe.send((part, size, 0, per_machine))
        for pipe in self._pipes:
            assert pipe.recv() == "ready"
        start = time.time() + 0.2
        for pipe in self._pipes:
            pipe.send(start)
        found = [one for pipe in self._pipes for one in pipe.recv()]
        seconds = max(end for end, *_ in found) - start
        return seconds, sum(one[1] for one in found) / size, sum(one[2] or 0 for one in found)

    def _all(self, job: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(job)
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)


def simulate_size(simulation: Simulation, ranks: int) -> list[str]:
    per_machine = min(RANKS_PER_MACHINE, ranks // 2)
    machines = ranks // per_machine
    store = simulation.connect(ranks)
    _, _, requests = simulation.measure("requests", ranks, per_machine)
    row = [f"{ranks:,}", f"{machines}", f"{requests / 2:,.0f}"]
    for part in ("members", "first of the world", "first of each node", "agreement"):
        seconds, asked, _ = simulation.measure(part, ranks, per_machine)
        row.append(f"{seconds:.2f} ({asked:.0f})")
    del store
    for part in ("static", "c10d"):
        store = simulation.connect(machines)
        seconds, asked, _ = simulation.measure(part, machines, per_machine)
        row.append(f"{seconds:.1f} ({asked:.0f})")
        if part == "static":
            simulation.serve(machines, per_machine)
            seconds, _, _ = simulation.measure("verdict", machines, per_machine)
            row.append(f"{seconds:.1f}")
            seconds, _, _ = simulation.measure("failure", machines, per_machine)
            row.append(f"{seconds:.1f}")
        del store
    static, found, failed, c10d = row[-4:]
    return [*row[:-4], c10d, static, found, failed]


# What a launch leaves behind.


def traces() -> dict[str, set[Any]]:
    """Return what a launch could leave on this machine: processes of this user, sockets, files, shared memory."""
    processes = set()
    for process in psutil.process_iter(["pid", "create_time", "cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or ())
        if MARK in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            processes.add((process.info["pid"], words))
    listening = {
        (one.laddr.ip, one.laddr.port, one.pid)
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.pid in OWN
    }
    folder = os.environ["TMPDIR"]
    unix = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if f"{folder}/" in line}
    files = {path.name for path in Path(folder).iterdir()}
    shared = {path.name for path in Path("/dev/shm").glob("*") if not held(path)}
    return {"processes": processes, "ports": listening, "sockets": unix, "files": files, "shared memory": shared}


def held(path: Path) -> bool:
    """Return whether a process uses a file of shared memory: then another job has it."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(path) in (process / "maps").read_text():
                return True
            if any(os.readlink(number) == str(path) for number in (process / "fd").iterdir()):
                return True
    return False


MARK = "scale_mark"
OWN: set[int] = set()
RANK = """
import os, torch, torch.distributed as dist  # scale_mark
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(4))
dist.barrier()
dist.destroy_process_group()
"""
QUICK_RANK = """
import os, multiprocessing.shared_memory, tempfile
kept = open("/dev/null")
tempfile.NamedTemporaryFile(delete=True).close()
"""


def launch_often(launches: int, nproc: int, often: int) -> str:
    """Start and end jobs and return in a sentence what is left. One in `often` has torch in each rank."""
    from ddparity.launcher.run import run_command

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        before_this = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        script = Path(folder) / f"{MARK}.py"
        script.write_text(RANK)
        light = Path(folder) / f"{MARK}_light.py"
        light.write_text(QUICK_RANK)
        run_command([str(light)], 1)  # what the first launch imports and opens stays
        before, descriptors, threads = traces(), len(os.listdir("/proc/self/fd")), threading.active_count()
        times = []
        for number in range(launches):
            began = time.monotonic()
            # A command starts and ends by itself; the others run in this process, where descriptors would stay open.
            if number % often == min(10, often - 1):
                command = [sys.executable, "-m", "ddparity", "run", "--nproc", str(nproc), str(script)]
                subprocess.run(command, check=True, timeout=600, stderr=subprocess.DEVNULL)
            else:
                assert run_command([str(light)], nproc) == 0
            times.append(time.monotonic() - began)
        after = traces()
        left = {what: sorted(map(str, after[what] - before[what])) for what in after}
        left["descriptors"] = [str(number) for number in range(descriptors, len(os.listdir("/proc/self/fd")))]
        left["threads"] = [str(number) for number in range(threads, threading.active_count())]
    tempfile.tempdir = None
    os.environ.pop("TMPDIR")
    if before_this is not None:
        os.environ["TMPDIR"] = before_this
    said = ", ".join(f"{len(found)} {what}" for what, found in left.items())
    assert not any(left.values()), left
    return (
        f"{launches} launches of {nproc} processes, one in {often} with a group over Gloo, {spread(times, 1)} s each, "
        f"left behind: {said}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", help='default: 8,64,256,1024; "" for none')
    parser.add_argument("--launches", type=int, help="default: 200; 0 for none")
    parser.add_argument("--nproc", type=int, help="of each launch; default: 32")
    parser.add_argument("--quick", action="store_true", help="run small sizes by default, and only print the result")
    options = parser.parse_args()
    small = ("8,64", 3, 4) if options.quick else ("8,64,256,1024", 200, 32)
    given = (options.ranks, options.launches, options.nproc)
    ranks, launches, nproc = (one if one is not None else default for one, default in zip(given, small))
    facts = machine()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each rank
    OWN.add(os.getpid())
    sizes = [int(size) for size in ranks.split(",") if size]
    if sizes:
        simulation, rows = Simulation(), []
        try:
            for size in sizes:
                rows.append(simulate_size(simulation, size))
        finally:
            simulation.close()
        report("scale", _SIMULATED.format(facts=facts, processes=PROCESSES, table=table(HEAD, rows)), options.quick)
    if launches:
        left = launch_often(launches, nproc, often=200 if launches > 10 else 2)
        report("launches", f"## What many launches leave behind\n\n{facts}\n\n`scale.py`: {left}", options.quick)


def report(section: str, text: str, quick: bool) -> None:
    print(text, flush=True)
    if not quick:
        write_section(section, text)


HEAD = [
    "ranks",
    "machines",
    "requests a second",
    "list of members, s",
    'first("world"), s',
    'first("node"), s',
    "agreement, s",
    "rendezvous, c10d, s",
    "static, s",
    "hang's verdict, s",
    "failure's report, s",
]
_SIMULATED = """\
## Large jobs, simulated

{facts}

`scale.py`: a rank or an agent is a thread with its own connection to one store, in {processes} processes. They share
the cores with the store. Seconds until the last one is through; in brackets, the requests to the store that one makes
on average. The verdict is that of a mismatch, from the moment at which the ranks wait; an agent looks every second. A
failure's report is complete on all machines.

{table}
"""


if __name__ == "__main__":
    main()

"""Test addresses, routes and ports, and the rendezvous of two machines, each a network namespace of this one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from ddparity.compat import PrefixStore, TCPStore
from ddparity.errors import RendezvousError
from ddparity.launcher.options import Launch, parse
from ddparity.launcher.rendezvous import NodeInfo, check_nodes, check_rendezvous, compare_nodes, explain
from ddparity.runtime import network
from ddparity.runtime.network import Route

from ..machines import run_threads
from ..ranks import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("endpoint", "found"),
    [
        ("node0:29400", ("node0", 29400)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[fd00::7]:65535", ("fd00::7", 65535)),
        (" localhost:0 ", ("localhost", 0)),
    ],
)
def test_endpoints(endpoint: str, found: tuple[str, int]) -> None:
    assert network.split_endpoint(endpoint) == found
    assert network.split_endpoint(network.join_endpoint(*found)) == found


@pytest.mark.parametrize("endpoint", ["node0", "", ":1", "node0:", "node0:x", "node0:65536", "[fd00::7]", "node0:-1"])
def test_an_invalid_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        network.split_endpoint(endpoint)


def test_a_default_port() -> None:
    assert network.split_endpoint("node0", 7) == ("node0", 7)
    assert network.split_endpoint("[fd00::7]", 7) == ("fd00::7", 7)


def test_the_loopback() -> None:
    route = network.route_to("127.0.0.1")
    assert (route.address, route.loopback) == ("127.0.0.1", True)
    assert network.interface_variables(route, {}) == {}
    assert network.is_this_machine("localhost") and network.is_this_machine("127.0.0.1")
    assert not network.is_this_machine("no-such-host.invalid")
    assert all(not network.is_loopback(address) for found in network.interfaces().values() for address in found)


@pytest.mark.parametrize(
    ("name", "count", "environ", "expected"),
    [
        ("127.0.1.1", 1, {}, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}),
        ("10.0.0.1", 2, {}, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}),
        (None, 1, {}, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}),
        ("10.0.0.1", 1, {}, {}),
        # What the user has set stays.
        ("127.0.1.1", 2, {"GLOO_SOCKET_IFNAME": "ib0"}, {"NCCL_SOCKET_IFNAME": "=eth1"}),
        ("127.0.1.1", 2, {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib"}, {}),
    ],
)
def test_interfaces_for_the_workers(
    name: str | None, count: int, environ: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "hostname_address", lambda: name)
    monkeypatch.setattr(network, "interfaces", lambda: {f"eth{i}": ["10.0.0.1"] for i in range(count)})
    assert network.interface_variables(Route("node0", "10.0.0.2", "eth1"), environ) == expected


def test_ports() -> None:
    with network.listen_at("127.0.0.1", 0) as server:
        assert server.getsockname()[0] == "127.0.0.1"
        port = server.getsockname()[1]
        with pytest.raises(OSError, match="Address already in use"):
            network.listen_at("127.0.0.1", port)
        assert network.process_at_port(port).startswith(f" by process {os.getpid()} (")
    network.listen_at("127.0.0.1", port).close()


def _info(host: str, **changed: object) -> NodeInfo:
    return replace(NodeInfo(host, 2, True, "2:2", "2.14.1", "3.11.7", "0.1.0"), **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"torch": "2.14.1+cpu"}, None),
        ({"python": "3.12.1"}, None),
        ({"nproc": 4, "nproc_given": False}, None),  # one for each GPU, on machines that differ
        ({"nproc": 4}, "the machines differ in --nproc: 2 on a and c, 4 on b; give the same .* or --nproc auto"),
        ({"torch": "2.13.0"}, "the machines differ in torch: 2.14.1 on a and c, 2.13.0 on b; install the same version"),
        ({"ddparity": "0.2.0"}, "the machines differ in ddparity: 0.1.0 on a and c, 0.2.0 on b"),
        ({"nnodes": "1:4"}, "the machines differ in --nnodes: 2 to 2 on a and c, 1 to 4 on b"),
    ],
)
def test_machines_are_compared(changed: dict[str, object], message: str | None) -> None:
    found = compare_nodes([_info("a"), _info("b", **changed), _info("c")])
    if message is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(message, found)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


def _check(store: TCPStore, size: int, machines: list[tuple[int, NodeInfo]], timeout_s: float) -> list[str | None]:
    """What each machine, a thread with its own connection, finds."""
    found: list[str | None] = ["did not end"] * len(machines)

    def machine(place: int, rank: int, info: NodeInfo) -> None:
        own = TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=20), wait_for_workers=False)
        try:
            check_nodes(PrefixStore("job", own), rank, size, info, timeout_s)
            found[place] = None
        except RendezvousError as error:
            found[place] = str(error)

    run_threads(machine, [(n, *entry) for n, entry in enumerate(machines)])
    return found


def test_machines_check_nodes(store: TCPStore) -> None:
    assert _check(store, 3, [(rank, _info(f"node{rank}")) for rank in range(3)], 10) == [None] * 3


def test_a_mistake_is_found_on_every_machine(store: TCPStore) -> None:
    found = _check(store, 2, [(0, _info("a")), (1, _info("b", torch="2.6.0"))], 10)
    assert (
        found
        == ["the machines differ in torch: 2.14.1 on a, 2.6.0 on b; install the same version on every machine"] * 2
    )


def test_two_machines_with_one_number(store: TCPStore) -> None:
    found = _check(store, 3, [(0, _info("a")), (1, _info("b")), (1, _info("c"))], 10)
    for text in found:
        assert text is not None and "2 machines have number 1 (" in text and "none has 2" in text


def test_a_machine_that_does_not_say(store: TCPStore) -> None:
    (found,) = _check(store, 2, [(0, _info("a"))], 0.2)
    assert found == "machine 1 met the others but did not say what it was started with: did its launcher fail?"


def _launch(tmp_path: Path, line: str) -> Launch:
    script = tmp_path / "t.py"
    script.write_text("")
    return parse([*line.split(), str(script)])


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("no-such-host.invalid", "that name has no address on this machine"),
        ("127.0.0.1", "Connection refused: nothing listens at that port there"),
    ],
)
def test_no_store_there(host: str, reason: str, tmp_path: Path) -> None:
    said: list[str] = []
    launch = _launch(tmp_path, f"--nnodes 2 --node-rank 1 --rendezvous {host}:{free_port()} --rdzv-conf timeout=1")
    start = time.monotonic()
    with pytest.raises(RendezvousError) as caught:
        check_rendezvous(launch, said.append)
    assert time.monotonic() - start < 5
    text = str(caught.value)
    assert text.startswith(f"machine 1 ({socket.gethostname()}) did not meet the job's machines at {host}:")
    assert reason in text and "come from the options; check that the launcher runs on the first machine" in text


def test_the_reason_of_a_wait_is_printed_once(tmp_path: Path) -> None:
    said: list[str] = []
    launch = _launch(tmp_path, f"--nnodes 2 --node-rank 1 --rendezvous 127.0.0.1:{free_port()} --rdzv-conf timeout=5")
    with pytest.raises(RendezvousError):
        check_rendezvous(launch, said.append)
    (line,) = said
    assert line.startswith("machine 1 (") and "from 127.0.0.1 on interface lo, up to 5 s: " in line
    assert "Connection refused" in line


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        launch = _launch(tmp_path, f"--nnodes 2 --node-rank 0 --rendezvous 127.0.0.1:{port}")
        with pytest.raises(RendezvousError, match=f"port {port} is taken on this machine .* by process {os.getpid()} "):
            check_rendezvous(launch)
    store = TCPStore("0.0.0.0", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    launch = _launch(tmp_path, f"--nnodes 2 --node-rank 0 --rendezvous 127.0.0.1:{store.port}")
    with pytest.raises(RendezvousError, match=r"the store of another job listens there. Give another port"):
        check_rendezvous(launch)
    # Without node ranks it may be the store of this job's other launcher.
    launch = _launch(tmp_path, f"--nnodes 2 --rendezvous 127.0.0.1:{store.port}")
    setup = check_rendezvous(launch)
    assert (setup.config.local_addr, setup.address, setup.listener) == ("127.0.0.1", "127.0.0.1", None)


def test_torchs_errors_become_one_sentence(tmp_path: Path) -> None:
    launch = _launch(tmp_path, f"--nnodes 2 --node-rank 0 --rendezvous 127.0.0.1:{free_port()}")
    setup = check_rendezvous(launch)
    setup.close()
    error = RuntimeError("Timed out after 11 seconds waiting for clients. 1/2 clients joined.\nException raised from x")
    text = str(explain(error, launch, setup, 11.0))
    assert "after 11.0 s: 1 of 2 machines came" in text and "Exception" not in text


def test_one_machine_alone_needs_no_check(tmp_path: Path) -> None:
    launch = _launch(tmp_path, "--nproc 2")
    setup = check_rendezvous(launch)
    assert (setup.alone, setup.route, setup.listener) == (True, None, None)
    assert setup.variables == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}


# Two machines on one: two network namespaces, connected by a pair of virtual interfaces.

PREFIX = f"ddp{os.getpid() % 10000}"
ADDRESSES = ("10.77.1.1", "10.77.1.2")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, str]]:
    """Yield two namespaces, 10.77.1.1 and 10.77.1.2, in which the host name has the loopback's address."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    names = (f"{PREFIX}a", f"{PREFIX}b")
    hosts = [Path("/etc/netns") / name for name in names]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip(
                "link",
                "add",
                f"{PREFIX}x",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                f"{PREFIX}y",
                "netns",
                names[1],
            )
            for name, end, address in zip(names, (f"{PREFIX}x", f"{PREFIX}y"), ADDRESSES):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", end, "up")
            for folder in hosts:
                folder.mkdir(parents=True)
                own = f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n10.77.1.1 head\n"
                (folder / "hosts").write_text(own)
            _ip("netns", "exec", names[0], "true")
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield names
    finally:
        for name, folder in zip(names, hosts):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()


SUM = """
import datetime, os, torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=15))
one = torch.ones(1)
dist.all_reduce(one)
if os.environ["LOCAL_RANK"] == "0":  # every socket that listens on this machine, as the kernel shows it
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in open(table).read().splitlines()[1:]:
            if line.split()[3] == "0A":
                print(f"listens {line.split()[1].split(':')[0]}\\n", end="")
dist.barrier()
print(f"rank {dist.get_rank()}: {one.item():g} {os.environ.get('GLOO_SOCKET_IFNAME')}\\n", end="")
dist.destroy_process_group()
"""


class Machines:
    """Run `ddparity run` on several machines; `stop` ends them with all processes that they started."""

    def __init__(self, script: Path) -> None:
        self.script, self.started = script, []

    def start(self, namespace: str, line: str, **variables: str) -> subprocess.Popen[str]:
        clean = {k: v for k, v in os.environ.items() if not k.endswith("SOCKET_IFNAME")}
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, "-m", "tests.node", *line.split(), str(self.script)],
            cwd=ROOT,
            env=clean | {"TORCH_CPP_LOG_LEVEL": "FATAL"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        for process in self.started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
            process.communicate()


@pytest.fixture
def machines(namespaces: tuple[str, str], tmp_path: Path) -> Iterator[Machines]:
    (tmp_path / "sum.py").write_text(SUM)
    found = Machines(tmp_path / "sum.py")
    yield found
    found.stop()


@pytest.mark.parametrize(
    "ways",
    [
        ("--rendezvous 10.77.1.1:{port}", "--rendezvous 10.77.1.1:{port}"),
        ("--rendezvous head:{port} --node-rank 0", "--rendezvous head:{port} --node-rank 1"),
        tuple(f"--node_rank {rank} --master_addr 10.77.1.1 --master_port {{port}}" for rank in range(2)),
    ],
    ids=["c10d", "numbers and a name", "torchrun's static"],
)
def test_machines_whose_names_have_the_loopbacks_address(
    ways: tuple[str, str], machines: Machines, namespaces: tuple[str, str]
) -> None:
    """Failures 13: Gloo listens at 127.0.1.1 without the variable; torch's c10d finds no machine to be the host."""
    port = free_port()
    both = [
        machines.start(name, f"--nnodes 2 --nproc 1 {way.format(port=port)}") for name, way in zip(namespaces, ways)
    ]
    ended = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    lines = sorted(line for out, _ in ended for line in out.splitlines())
    # The stores and Gloo's connections listen at the address towards the rendezvous, and nowhere else.
    here = {socket.inet_aton(address)[::-1].hex().upper() for address in ADDRESSES}
    listens = {line.split()[1] for line in lines if line.startswith("listens")}
    assert listens == here
    lines = [line for line in lines if not line.startswith("listens")]
    assert [line.split()[:3] for line in lines] == [["rank", "0:", "2"], ["rank", "1:", "2"]]
    assert {line.split()[3] for line in lines} == {f"{PREFIX}x", f"{PREFIX}y"}
    if "--node" in ways[0]:  # node ranks are kept
        assert "rank 0:" in ended[0][0]


@pytest.mark.parametrize(
    ("interface", "message"), [("lo", "is the loopback, which no other machine"), ("eth9", "is not up on this machine")]
)
def test_the_wrong_interface(interface: str, message: str, machines: Machines, namespaces: tuple[str, str]) -> None:
    """Each machine reports at once what Gloo would report after the group's time-out."""
    line = f"--nnodes 2 --rendezvous 10.77.1.1:{free_port()} --node-rank 0"
    process = machines.start(namespaces[0], line, GLOO_SOCKET_IFNAME=interface)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"GLOO_SOCKET_IFNAME={interface}: that interface {message}" in err.splitlines()[-1]
    assert f"give one of {PREFIX}x (10.77.1.1" in err.splitlines()[-1]


def test_no_route(machines: Machines, namespaces: tuple[str, str]) -> None:
    line = "--nnodes 2 --node-rank 1 --rendezvous 10.88.0.1:29400 --rdzv-conf timeout=1"
    process = machines.start(namespaces[1], line)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Network is unreachable: no interface of this machine leads there" in err.splitlines()[-1]


def test_two_machines_with_node_rank_0(machines: Machines, namespaces: tuple[str, str]) -> None:
    line = f"--nnodes 2 --node-rank 0 --rendezvous 10.77.1.1:{free_port()} --rdzv-conf timeout=30"
    first = machines.start(namespaces[0], line)
    port = int(line.split(":")[1].split()[0])
    look = f"network.wait_for_store(('10.77.1.1', {port}), time.monotonic() + 30)"
    python = ["ip", "netns", "exec", namespaces[0], sys.executable, "-c"]
    store = [*python, f"import time; from ddparity.runtime import network; {look}"]
    subprocess.run(store, check=True, timeout=60, cwd=ROOT)
    second = machines.start(namespaces[1], line)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"two machines have number 0: 10.77.1.1:{port} is another machine's address" in err.splitlines()[-1]
    assert first.poll() is None


def test_different_numbers_of_processes(machines: Machines, namespaces: tuple[str, str]) -> None:
    line = f"--nnodes 2 --rendezvous 10.77.1.1:{free_port()} --node-rank"
    both = [machines.start(name, f"{line} {rank} --nproc {rank + 1}") for rank, name in enumerate(namespaces)]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "the machines differ in --nproc: 1 on" in err.splitlines()[-1]


def test_the_other_machine_does_not_join(machines: Machines, namespaces: tuple[str, str]) -> None:
    line = f"--nnodes 2 --rendezvous 10.77.1.1:{free_port()} --rdzv-conf timeout=3"
    numbered, unnumbered = machines.start(namespaces[0], f"{line} --node-rank 0"), None
    _, err = numbered.communicate(timeout=60)
    assert (numbered.returncode, "1 of 2 machines came" in err.splitlines()[-1]) == (1, True), err
    unnumbered = machines.start(namespaces[0], line)
    _, err = unnumbered.communicate(timeout=60)
    assert (unnumbered.returncode, "fewer than 2 machines came" in err.splitlines()[-1]) == (1, True), err

"""What collectives move, and how long that takes, at limits where the answer is known."""

from __future__ import annotations

import math

import pytest

from ddparity.scaling.links import (
    HERE,
    Cost,
    Link,
    Machine,
    Time,
    Traffic,
    all_gather,
    all_to_all,
    read_link,
    ring,
    slices,
    time_of,
    tree,
)

FREE = Cost(0.0, 0.0, 1, 1)
IDEAL = Machine({"all-to-all": FREE, "all-gather": FREE, "ring": FREE, "slices": FREE}, 0.0, True)
SIZES = (1, 4_096, 10**9)


@pytest.mark.parametrize(
    ("text", "rate", "latency"),
    [
        ("25Gbit,20us", 25e9 / 8, 20e-6),
        ("1 Gbit/s, 100 µs", 1e9 / 8, 100e-6),
        ("200mbit,5ms", 25e6, 5e-3),
        ("10Gbps,0s", 1.25e9, 0.0),
        ("3.5GB/s,800ns", 3.5e9, 800e-9),
        ("3GBps,1ms", 3e9, 1e-3),
        ("900 MB,1us", 900e6, 1e-6),
    ],
)
def test_a_link_is_read(text: str, rate: float, latency: float) -> None:
    found = read_link(text)
    assert (found.bytes_per_s, found.latency_s) == (pytest.approx(rate), pytest.approx(latency))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give a bandwidth and the latency of one message, as in 25Gbit,20us"),
        ("25Gbit", "--link 25Gbit: give a bandwidth"),
        ("25,20", "--link 25,20: give a bandwidth"),
        ("25Gibit,20us", "the unit Gibit is unknown"),
        ("25Gb,20us", "the unit Gb is unknown"),  # bits or bytes?
        ("25Gbit,20min", "the unit min is unknown"),
        ("0Gbit,20us", "a bandwidth must be more than 0"),
        ("1.2.3Gbit,20us", "give a bandwidth"),
        ("-1Gbit,20us", "give a bandwidth"),
    ],
)
def test_a_wrong_link_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="--link") as caught:
        read_link(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("size", SIZES)
def test_one_rank_exchanges_nothing(size: int) -> None:
    for collective in (all_to_all, all_gather, ring, tree, slices):
        traffic = collective(size, 1)
        assert (traffic.rounds, traffic.messages, traffic.sent_bytes) == (0, 0, 0)
        assert time_of(traffic, IDEAL, Link("slow", 1.0, 1.0)) == Time()


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 1024])
def test_bytes_and_rounds_are_those_of_the_algorithms(ranks: int) -> None:
    """A reduction cannot take fewer bytes than 2 (N - 1) / N of the buffer, nor fewer rounds than log2 N each way."""
    for size in SIZES:
        assert all_to_all(size, ranks).sent_bytes == all_gather(size, ranks).sent_bytes == (ranks - 1) * size
        least = 2 * (ranks - 1) / ranks * size
        assert ring(size, ranks).sent_bytes == tree(size, ranks).sent_bytes == slices(size, ranks).sent_bytes == least
        assert slices(size, ranks, rows=3).sent_bytes == pytest.approx(2 * least)
    assert (ring(1, ranks).rounds, all_gather(1, ranks).rounds) == (2 * (ranks - 1), ranks - 1)
    assert (all_to_all(1, ranks).rounds, slices(1, ranks).rounds) == (1, 2)
    assert tree(1, ranks).rounds == 2 * math.ceil(math.log2(ranks))
    assert 2 ** (tree(1, ranks).rounds // 2) >= ranks > 2 ** (tree(1, ranks).rounds // 2 - 1)


def test_without_latency_only_bytes_count_and_without_bytes_only_rounds() -> None:
    traffic = ring(8_000, 4)
    assert time_of(traffic, IDEAL, Link("", 1_000.0, 0.0)) == Time(0.0, 0.0, 12.0)
    assert time_of(traffic, IDEAL, Link("", math.inf, 0.5)) == Time(0.0, 3.5, 0.0)
    assert time_of(traffic, IDEAL, HERE) == Time()


def test_bytes_go_over_the_link_while_the_processes_work() -> None:
    machine = Machine({"ring": Cost(0.1, 1e-3, 2, 2)}, 0.0, True)
    traffic = ring(1_000, 2)  # 1,000 bytes sent, in 2 rounds: 0.1 s + 1 s of work
    assert time_of(traffic, machine, HERE) == Time(pytest.approx(1.1), 0.0, 0.0)
    assert time_of(traffic, machine, Link("fast", 1e4, 0.0)).total_s == pytest.approx(1.1)
    slow = time_of(traffic, machine, Link("slow", 250.0, 0.01))  # 4 s on the wire, of which 1 s is also work
    assert slow == Time(pytest.approx(1.1), pytest.approx(0.03), pytest.approx(3.0))


@pytest.mark.parametrize(
    ("traffic", "over_gloo", "over_nccl"),
    [(all_to_all(1, 4), 2, 1), (slices(1, 4), 4, 2), (ring(1, 4), 7, 6), (all_gather(1, 4), 4, 3)],
)
def test_gloo_sends_when_the_other_rank_receives(traffic: Traffic, over_gloo: int, over_nccl: int) -> None:
    costs = {traffic.kind: Cost(0.0, 0.0, 1, 1)}
    for gloo, latencies in ((True, over_gloo), (False, over_nccl)):
        machine = Machine(costs, 0.0, gloo)
        assert time_of(traffic, machine, Link("", math.inf, 0.5)) == Time(0.0, 0.5 * latencies, 0.0)


def test_rounds_and_messages_beyond_the_measured_ones_take_their_time() -> None:
    costs = {"ring": Cost(0.2, 0.0, 2, 2), "all-to-all": Cost(0.2, 0.0, 1, 1)}
    machine = Machine(costs, 0.01, True)
    assert time_of(ring(1, 5), machine, HERE).total_s == pytest.approx(0.8)  # 8 rounds of 0.1 s
    assert time_of(tree(1, 5), machine, HERE).total_s == pytest.approx(0.6)  # 6
    assert time_of(all_to_all(1, 5), machine, HERE).total_s == pytest.approx(0.23)  # 4 messages, 3 more than measured
    assert time_of(ring(1, 5), machine.slowed(3.0), HERE).total_s == pytest.approx(2.4)

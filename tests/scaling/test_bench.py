"""`ddparity bench` on real processes, and the bytes that a step sends beside those that the kernel counts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddparity as dp
from ddparity.gradients.replica import only
from ddparity.scaling.bench import RANKS, Report, bench
from ddparity.scaling.links import Cost, Link, Machine
from ddparity.scaling.measure import parts_of, statistics_bytes_of, strict_parts_of
from ddparity.scaling.model import Variant, Work, step_traffic
from ddparity.scaling.picture import picture
from ddparity.scaling.report import show

from ..ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
MICRO_BATCHES = 2  # of a rank


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 10))


def wide() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 600), nn.ReLU(), nn.Linear(600, 600), nn.Linear(600, 10))


def normed() -> nn.Module:
    layers = (nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.BatchNorm2d(48))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, 10))


MODELS = {"small": small, "wide": wide, "normed": normed}
LAYERS = {"normed": (32, 48)}


def _received() -> dict[str, int]:
    """Return how many bytes each TCP connection of this process has received (TCP_INFO)."""
    found = {}
    for descriptor in Path("/proc/self/fd").iterdir():
        if not (descriptor.is_symlink() and os.readlink(descriptor).startswith("socket:")):
            continue
        with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                found[os.readlink(descriptor)] = int.from_bytes(info[128:136], sys.byteorder)
    return found


def _bytes_of_a_step(name: str, variant: Variant) -> float:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = MODELS[name]()
    if variant == "SyncBatchNorm":
        net = dp.convert_sync_batchnorm(net)
    model = dp.replicate(net, "strict" if variant == "strict" else "fast")
    data = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))

    def step() -> None:
        for micro in dp.accumulate(model, [data] * MICRO_BATCHES, equal_counts=True):
            x, y = micro.data
            (F.cross_entropy(model(x), y) * micro.weight).backward()
        model.zero_grad()

    with only(model):
        for _ in range(4):  # the first ones agree on more, and order the parts
            step()
        before = _received()
        for _ in range(4):
            step()
        # One of an earlier test may be closed meanwhile.
        return sum(now - before.get(name, 0) for name, now in _received().items()) / 4


def _bytes(cases: list[tuple[str, Variant]]) -> list[float]:
    return [_bytes_of_a_step(*case) for case in cases]


CASES: list[tuple[str, Variant]] = [
    ("small", "fast"),
    ("small", "strict"),
    ("wide", "fast"),
    ("wide", "strict"),
    ("normed", "fast"),
    ("normed", "strict"),
    ("normed", "SyncBatchNorm"),
]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bytes_of_a_step_are_those_that_the_kernel_counts(ranks: int) -> None:
    counted = run_ranks(_bytes, ranks, CASES)
    free = Cost(0.0, 0.0, 1, 1)
    machine = Machine({"all-to-all": free, "all-gather": free, "ring": free, "slices": free}, 0.0, True)
    for number, (name, variant) in enumerate(CASES):
        net = MODELS[name]()
        parameters = list(net.parameters())
        backwards = list(range(len(parameters)))[::-1]
        work = Work(
            (1.0,), 1.0, 0.0, 0.0, 0.0, 0, 0.6, parts_of(parameters, backwards, [1.0] * len(parameters)),
            strict_parts_of(parameters, backwards, [1.0] * len(parameters)), LAYERS.get(name, ()),
            statistics_bytes_of(net), MICRO_BATCHES * ranks,
        )  # fmt: skip
        traffic = step_traffic(work, machine, variant, (MICRO_BATCHES,) * ranks)
        expected = sum(one.sent_bytes for one in traffic)
        headers = 150 * sum(one.messages for one in traffic)
        mean = sum(values[number] for values in counted) / ranks
        assert expected * 0.999 <= mean <= expected * 1.01 + headers, (name, variant)


def loss(model: nn.Module, data: list[torch.Tensor]) -> torch.Tensor:
    x, y = data
    return F.cross_entropy(model(x), y)


def _task(net: Any, **parts: Any) -> dp.Task:
    data = torch.utils.data.TensorDataset(torch.randn(48, 1, 8, 8), torch.randint(10, (48,)))
    given = {"dataset": lambda split: data, "global_batch": 16, "micro_batch": 4, **parts}
    return dp.Task(model=net, loss=loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01), **given)


def _bench_twice() -> list[str]:
    """The model that each rank trains alone, to measure it, stays in memory while the next one is measured."""
    found = []
    for net in (small, wide):
        report = bench(_task(net), net.__name__, [], threads=1, seconds=0.2)
        found += [] if report is None else list(report.measured.steps_s)
    return found


def test_two_models_are_measured_one_after_the_other() -> None:
    assert run_ranks(_bench_twice, 2) == [["fast", "strict"] * 2, []]


def _bench_normed() -> Report | None:
    return bench(_task(normed), "normed", [Link("slow", 1e6, 1e-3)], threads=1, seconds=0.3)


def test_all_variants_of_a_model_with_batch_norms(capsys: pytest.CaptureFixture[str]) -> None:
    found, other = run_ranks(_bench_normed, 2)
    assert other is None
    measured = found.measured
    assert list(measured.steps_s) == ["fast", "strict", "SyncBatchNorm"]
    assert measured.work.layers == (32, 48)
    assert len(measured.stages) == 2
    here, slow = found.forecasts
    for variant in measured.steps_s:
        assert [one.prediction.ranks for one in here.grown[variant]] == list(RANKS)
        assert [one.prediction.ranks for one in here.same[variant]] == [1, 2, 4]
        assert here.grown[variant][0].speed_up == here.same[variant][0].speed_up == 1
        # The model is fitted to what was measured here.
        predicted = here.same[variant][1].prediction
        expected = max(measured.median_s(variant), predicted.compute_s)  # whatever else runs on the machine
        assert predicted.step_s - predicted.load_s == pytest.approx(expected, rel=1e-6)
        assert all(a.speed_up >= b.speed_up for a, b in zip(here.grown[variant], slow.grown[variant], strict=True))
    # 1 MB/s and 1 ms: two layers of a synchronised norm take 4 ms a micro-batch at least.
    at_two = {variant: slow.same[variant][1].prediction for variant in measured.steps_s}
    assert at_two["SyncBatchNorm"].latency_s - at_two["fast"].latency_s >= 4 * 2 * 1e-3 - 1e-3 - 1e-9
    show(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "SyncBatchNorm" in printed and "rank 1 " in printed and "over slow: speed-up" in printed
    assert xml.etree.ElementTree.fromstring(picture(found)) is not None
    assert json.loads(json.dumps(found.to_json()))["predictions"][1]["link"]["latency_s"] == 1e-3


def _bench_wrong(number: int) -> str:
    wrong = [
        _task(lambda: nn.Sequential(nn.Flatten(), nn.EmbeddingBag(10, 10, sparse=True))),
        _task(small, dataset=lambda split: [], global_batch=16),
        _task(small, global_batch=4),
    ]
    with pytest.raises(ValueError, match=r".") as caught:
        bench(wrong[number], "wrong", threads=1, seconds=0.1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "has sparse gradients, whose size depends on the data"),
        (1, "the training set is empty"),
        (2, "2 ranks but only 1 micro-batch"),
    ],
)
def test_what_cannot_be_measured_is_refused_on_every_rank(number: int, message: str) -> None:
    assert all(message in said for said in run_ranks(_bench_wrong, 2, number))


def test_one_process_is_refused() -> None:
    with pytest.raises(ValueError, match="start at least 2 of them, with --nproc 2"):
        bench(_task(small), "small")


def test_the_command_measures_the_digits(tmp_path: Path) -> None:
    options = ["--nproc", "2", "--seconds", "1", "--link", "1Gbit,100us", "--json", "b.json", "--plot", "b.svg"]
    command = [sys.executable, "-m", "ddparity", "bench", str(ROOT / "examples" / "digits.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=230, check=False)
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())  # a title is as wide as its table
    assert "Where a step's time goes (fast)" in printed
    assert "not measured: the model has no batch norm" in printed
    assert "4 micro-batches a rank, over 1Gbit,100us: speed-up (efficiency)" in printed
    found = json.loads((tmp_path / "b.json").read_text())
    assert (found["ranks"], found["parameters"], found["micro_batches"]) == (2, 29_066, [4, 4])
    assert set(found["step_s"]) == {"fast", "strict"}
    assert min(found["step_s"].values()) > 0
    assert all(min(one.values()) >= 0 and one["forward_s"] > 0 for one in found["stages_s"])
    # Gradients are sent once: 29,066 numbers and one a parameter tensor, of 4 bytes.
    assert found["sent_bytes"]["fast"] == 4 * (29_066 + 6)
    drawn = xml.etree.ElementTree.parse(tmp_path / "b.svg").getroot()
    texts = [one.text for one in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"rank 0", "rank 1", "backward", "over 1Gbit,100us: speed-up over the ranks"} <= set(texts)

"""The Triton kernels of the batch norm, without and with a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddparity.batchnorm import stock
from ddparity.batchnorm.passes import passes_for

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this build of torch has no Triton")

ROOT = Path(__file__).parents[2]


def _compare(device: str, variables: dict[str, str]) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.batchnorm.kernel_cases", device],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return ended.stdout + ended.stderr


def test_they_agree_with_torchs_operators_where_tritons_interpreter_runs_them() -> None:
    assert _compare("cpu", {"TRITON_INTERPRET": "1"}) == "all agree\n"


@pytest.mark.gpu
def test_they_agree_with_torchs_operators_on_a_card() -> None:
    assert _compare("cuda", {}) == "all agree\n"


@pytest.mark.gpu
def test_a_result_has_the_same_bits_each_time() -> None:
    x = torch.randn(64, 64, 56, 56, device="cuda")
    kernels = passes_for(x)
    assert kernels.__name__ == "ddparity.batchnorm.kernels"
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = x.to(memory_format=layout)
        first, _ = kernels.moments(laid)
        assert (first - stock.moments(laid.double())[0]).abs().max() < 1e-7
        for _ in range(5):
            assert torch.equal(kernels.moments(laid)[0], first)

"""Tests of the Triton kernels, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddparity.batchnorm import reference
from ddparity.batchnorm.dispatch import kernels_for

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


@pytest.mark.skipif(
    torch.__version__ < "2.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton 3.2, torch 2.6's, has an interpreter that converts arrays of one element; NumPy 2.4 refuses that",
)
def test_kernels_in_the_interpreter_equal_the_reference_kernels() -> None:
    assert _compare("cpu", {"TRITON_INTERPRET": "1"}) == "all agree\n"


@pytest.mark.gpu
def test_kernels_on_a_gpu_equal_the_reference_kernels() -> None:
    assert _compare("cuda", {}) == "all agree\n"


@pytest.mark.gpu
def test_each_call_gives_the_same_bits() -> None:
    x = torch.randn(64, 64, 56, 56, device="cuda")
    kernels = kernels_for(x)
    assert kernels.__name__ == "ddparity.batchnorm.triton_kernels"
    for layout in (torch.contiguous_format, torch.channels_last):
        value = x.to(memory_format=layout)
        first, _ = kernels.moments(value)
        assert (first - reference.moments(value.double())[0]).abs().max() < 1e-7
        for _ in range(5):
            assert torch.equal(kernels.moments(value)[0], first)

"""Check that every test leaves the process as it was: no process group, variable or child process is left."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import hypothesis
import psutil
import pytest
import torch
import torch.distributed as dist

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# A shell makes its background jobs ignore Ctrl-C. Processes that tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Variables of pytest, and those that torch sets at the first import of its compiler.
_OWN_VARIABLES = ("PYTEST_CURRENT_TEST", "PYTEST_VERSION", "TORCHINDUCTOR_CACHE_DIR")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # torch's modules hold a million objects, which each collection would search


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    before = _variables()
    yield
    if psutil.Process().children():
        gc.collect()  # loaders end their workers when they are freed
    assert not dist.is_initialized(), "the test left a process group"
    assert _variables() == before, "the test left changed environment variables"
    left = [child.cmdline() for child in psutil.Process().children() if _is_alive(child) and not _is_server(child)]
    assert not left, f"the test left processes: {left}"


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES}


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _is_server(process: psutil.Process) -> bool:
    """Return whether this process stays: the fork server, the resource tracker, torch's compile worker, our own server.

    Some versions of torch keep the compile worker until this process ends.
    """
    command = " ".join(process.cmdline())
    return any(
        name in command
        for name in ("forkserver", "resource_tracker", "_inductor/compile_worker", "tests.launcher.warm")
    )

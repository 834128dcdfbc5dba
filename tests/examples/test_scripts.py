"""The examples that are scripts, shortened: in strict mode each has the same bits on one process and on two.

All of them run in one start of processes for each number of ranks, since each process imports scikit-learn.
"""

from __future__ import annotations

import contextlib
import io
import runpy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(450)  # of the first test, for all examples
EXAMPLES = Path(__file__).parents[2] / "examples"
STRICT: dict[str, dict[str, Any]] = {
    "bert": {"pretrain": 3, "steps": 3},
    "contrastive": {"epochs": 1},
    "gan": {"epochs": 1},
    "nanogpt": {"steps": 4, "save_every": 2},
    "stream": {"epochs": 1, "save_every": 10},
}
SHARDED: dict[str, Any] = {"steps": 4, "save_every": 2}
# The option that says where an example saves, its value in the example's folder, and the checkpoint's name there.
CHECKPOINTS = {
    "nanogpt": ("checkpoint", "last.safetensors", "last.safetensors"),
    "stream": ("folder", "", "last.safetensors"),
    "fully_shard": ("folder", "", "checkpoint.safetensors"),
}
Result = tuple[Any, str]  # what main() returns, and what it prints


def _run(name: str, folder: Path, options: dict[str, Any]) -> Result:
    if name in CHECKPOINTS:
        option, path, _ = CHECKPOINTS[name]
        options = {**options, option: folder / name / path}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**options)
    return result, printed.getvalue()


def _run_all(folder: Path, resumed: Path | None) -> dict[str, Result]:
    """Run each example, and those that save once more from the checkpoints in `resumed`."""
    every = {**{name: {**options, "reduction": "strict"} for name, options in STRICT.items()}, "fully_shard": SHARDED}
    results = {name: _run(name, folder, options) for name, options in every.items()}
    for name in CHECKPOINTS if resumed else ():
        results[f"{name} resumed"] = _run(name, resumed, {**every[name], "resume": True})
    return results


@pytest.fixture(scope="module")
def results() -> Iterator[dict[int, list[dict[str, Result]]]]:
    """What each rank has, on two processes and on one. The one also continues the checkpoint of two before the last."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        together = run_ranks(_run_all, 2, folder / "2", None, timeout_s=200)
        for example, (*_, file) in CHECKPOINTS.items():
            (folder / f"2/{example}/{file}.1").replace(folder / f"2/{example}/{file}")
        alone = run_ranks(_run_all, 1, folder / "1", folder / "2", timeout_s=200)
        yield {1: alone, 2: together}


@pytest.mark.parametrize("name", STRICT)
def test_strict_bits_on_one_process_and_on_two(name: str, results: dict[int, list[dict[str, Result]]]) -> None:
    ((alone, printed),) = (ranks[name] for ranks in results[1])
    assert [ranks[name][0] for ranks in results[2]] == [alone, alone]
    assert f"fingerprint {alone}" in printed and f"fingerprint {alone}" in results[2][0][name][1]
    assert not results[2][1][name][1], "rank 1 prints nothing"
    if name in CHECKPOINTS:
        assert results[1][0][f"{name} resumed"][0] == alone


def test_a_sharded_training_is_that_of_one_process(results: dict[int, list[dict[str, Result]]]) -> None:
    """To rounding, since torch sums shard by shard. A checkpoint of two processes continues on one."""
    alone, printed = results[1][0]["fully_shard"]
    assert "step 4: loss" in printed and f"held-out loss {alone:.4f}" in printed
    first, second = (ranks["fully_shard"] for ranks in results[2])
    assert second == (first[0], "")
    assert first[0] == pytest.approx(alone, rel=1e-4)
    assert results[1][0]["fully_shard resumed"][0] == pytest.approx(alone, rel=1e-4)

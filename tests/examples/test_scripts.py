"""The examples that are scripts, shortened: in strict mode each has the same bits on one process and on two."""

from __future__ import annotations

import contextlib
import io
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {
    "bert": {"pretrain": 3, "steps": 3},
    "contrastive": {"epochs": 1},
    "gan": {"epochs": 1},
    "nanogpt": {"steps": 4, "save_every": 2},
    "stream": {"epochs": 1, "save_every": 10},
}
CHECKPOINTS = {"nanogpt": ("checkpoint", "last.safetensors"), "stream": ("folder", "")}


def _train(name: str, world_size: int, folder: Path, **options: Any) -> tuple[str, str]:
    """Return the fingerprint that the ranks agree on, and what rank 0 printed. The others print nothing."""
    if name in CHECKPOINTS:
        option, file = CHECKPOINTS[name]
        options[option] = folder / file
    results = run_ranks(_run, world_size, name, {**SHORT[name], "reduction": "strict", **options})
    assert len({fingerprint for fingerprint, _ in results}) == 1
    assert not any(printed for _, printed in results[1:])
    return results[0]


def _shard(folder: Path, options: dict[str, Any]) -> tuple[float, str]:
    return _run("fully_shard", {"folder": folder, "steps": 4, "save_every": 2, **options})  # type: ignore[return-value]


def test_a_sharded_training_is_that_of_one_process(tmp_path: Path) -> None:
    """To rounding, since torch sums shard by shard. A checkpoint of two processes continues on one."""
    [(alone, printed)] = run_ranks(_shard, 1, tmp_path / "1", {})
    together = run_ranks(_shard, 2, tmp_path / "2", {})
    assert "step 4: loss" in printed and f"held-out loss {alone:.4f}" in printed
    assert together[1] == (together[0][0], "")
    assert together[0][0] == pytest.approx(alone, rel=1e-4)
    (tmp_path / "2/checkpoint.safetensors.1").replace(tmp_path / "2/checkpoint.safetensors")
    [(resumed, _)] = run_ranks(_shard, 1, tmp_path / "2", {"resume": True})
    assert resumed == pytest.approx(alone, rel=1e-4)


def _run(name: str, options: dict[str, Any]) -> tuple[str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        fingerprint = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**options)
    return fingerprint, printed.getvalue()


@pytest.mark.parametrize("name", SHORT)
def test_strict_bits_on_one_process_and_on_two(name: str, tmp_path: Path) -> None:
    (alone, printed), (together, _) = (_train(name, nproc, tmp_path / str(nproc)) for nproc in (1, 2))
    assert alone == together
    assert f"fingerprint {alone}" in printed
    if name not in CHECKPOINTS:
        return
    # The checkpoint before the last one, of two processes, continues on one and ends with the same bits.
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "2", resumed)
    (resumed / "last.safetensors.1").replace(resumed / "last.safetensors")
    assert _train(name, 1, resumed, resume=True)[0] == alone

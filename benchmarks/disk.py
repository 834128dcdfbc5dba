"""Contenders of `checkpoint.py`, each in a process of its own, which stays and waits while another one runs.

What one leaves behind (memory, threads, a warm cache) would serve the others in a shared process. On a machine with
other programs the time until a call ends says little, so each also has its processor time: of all its threads, in the
program and in the system.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import ddparity as dp

Action = Callable[[], Callable[[], None] | None]  # may return what waits until the file is on disk
Actions = dict[str, Action]
# Freed memory stays in the process. By default glibc returns some of it, by chance, and to get it again takes half as
# long as a save.
KEEP_MEMORY = {f"MALLOC_{name}_THRESHOLD_": str(2**32) for name in ("MMAP", "TRIM")}
FIGURES = ("returns", "written", "processor")  # milliseconds until the call returns, until it is done, and of processor


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(8)])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 1000)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def ours(folder: Path) -> Actions:
    (model, optimizer), path = trained(), folder / "c"
    return {
        "save": lambda: dp.save_checkpoint(path, model=model, optimizer=optimizer),
        "background": lambda: dp.save_checkpoint(path, background=True, model=model, optimizer=optimizer).wait,
        "load": lambda: done(dp.load_checkpoint(path, model=model, optimizer=optimizer)),
    }


def by_torch(folder: Path) -> Actions:
    (model, optimizer), path = trained(), folder / "c"

    def save() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        flush(path)

    def load() -> None:
        states = torch.load(path)
        model.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])

    return {"save": save, "load": load}


def by_safetensors(folder: Path) -> Actions:
    (model, optimizer), path = trained(), folder / "c"

    def save() -> None:
        state = optimizer.state_dict()["state"]
        moments = {f"{number}.{name}": value for number, one in state.items() for name, value in one.items()}
        safetensors.torch.save_file({**model.state_dict(), **moments}, path)
        flush(path)

    def load() -> None:
        found = safetensors.torch.load_file(path)
        state = optimizer.state_dict()
        for number, one in state["state"].items():
            one.update({name: found.pop(f"{number}.{name}") for name in one})
        model.load_state_dict(found)
        optimizer.load_state_dict(state)

    return {"save": save, "load": load}


def by_copy(folder: Path) -> Actions:
    model, optimizer = trained()

    def save() -> None:
        copies = [value.clone() for value in model.state_dict().values()]
        copies += [value.clone() for state in optimizer.state.values() for value in state.values()]

    return {"save": save}


def predictions(folder: Path) -> Actions:
    """Write the outputs of a small model for 200,000 samples: 10 numbers and a class each, 8.8 MB."""
    samples = torch.randn(200_000, 10)
    into = folder / "predictions"

    def predict() -> None:
        dp.predict(lambda batch: {"scores": batch * 2, "class": batch.argmax(1)}, samples, 500, to=into)

    def read() -> None:
        dp.read_predictions(into)

    def empty() -> None:
        shutil.rmtree(into, ignore_errors=True)

    return {"clear": empty, "predict": predict, "read": read}


CONTENDERS: dict[str, Callable[[Path], Actions]] = {
    "ddparity": ours, "torch": by_torch, "safetensors": by_safetensors, "copy": by_copy, "predictions": predictions,
}  # fmt: skip


def flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def done(_: object) -> None:
    """Drop a result."""


class Contender:
    """A contender's process, which saves or loads whenever it is asked to. `source`: the folder of another ddparity."""

    def __init__(self, name: str, folder: str, source: str | None = None) -> None:
        own = tempfile.mkdtemp(dir=folder)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | KEEP_MEMORY
        if source is not None:
            environment["PYTHONPATH"] = source
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, own], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def ask(self, action: str) -> list[float]:
        """Return the milliseconds of an action, see `FIGURES`."""
        assert self._process.stdin and self._process.stdout
        print(action, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("a contender's process has ended; its error stands above")
        times: list[float] = json.loads(answer)
        return times

    def close(self) -> None:
        self._process.communicate(timeout=60)


def in_turns(
    contenders: dict[str, Contender], actions: list[str], rounds: int
) -> dict[tuple[str, str], list[list[float]]]:
    """Return the milliseconds of each contender, action and round. The first round is a warm-up, and left out."""
    names, found = list(contenders), dict[tuple[str, str], list[list[float]]]()
    for number in range(rounds + 1):
        for action in actions:
            for name in names[number % len(names) :] + names[: number % len(names)]:
                times = contenders[name].ask(action)
                if number and times:
                    found.setdefault((name, action), []).append(times)
    return found


def _processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def serve(name: str, folder: str) -> None:
    """Do the actions whose names come, in a contender's process."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    actions: Any = CONTENDERS[name](Path(folder))
    for line in sys.stdin:
        action, times = actions.get(line.strip()), []
        if action is not None:
            before, start = _processor_s(), time.perf_counter()
            wait = action()
            times = [(time.perf_counter() - start) * 1e3]
            if wait is not None:
                wait()
            times += [(time.perf_counter() - start) * 1e3, (_processor_s() - before) * 1e3]
        print(json.dumps(times), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])

"""Record the losses and metrics of a training: lines of JSON in a file, and events for TensorBoard."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.atomic import replacing
from ..comm.transfer import gather_json
from ..runtime.agreement import agreed

HELD_OUT = "test/"  # what the names of metrics begin with, so that none of them is "loss" or "step"
_PERIOD_S = 1.0  # between two exchanges of losses
_MOST_STEPS = 100  # between two exchanges


def beside(checkpoint: Path, name: str) -> Path:
    """Return the path of what belongs to a checkpoint: metrics.jsonl, or last.metrics.jsonl for last.safetensors."""
    return checkpoint.with_name(name if checkpoint.stem == "checkpoint" else f"{checkpoint.stem}.{name}")


def need_tensorboard() -> None:
    """Raise ImportError if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard is not installed, but event files need it: pip install 'ddparity[tensorboard]', or leave "
            "--tensorboard out"
        )


class Record:
    """The losses and metrics of a training. Every rank makes one and calls its methods; rank 0 writes.

    The loss of a step is that of its global batch: the losses of the micro-batches times their shares, added in float64
    in the order of the micro-batches. So it is the same on any number of ranks, if the micro-batches' losses are.

    A line is written by one call: a crash leaves whole lines, or one that is cut at the end. A failure to write ends
    the record with one line to the user, and not the training.

    Args:
        path: the file. Lines of steps after `done` are dropped, also the last line if it was cut. A file of another
            training becomes `path.1`, in place of an earlier one.
        events: the folder for TensorBoard; None: no events.
        done: the steps that the checkpoint has, with which the training continues; 0: a new training.
        state: what `state` returned when the checkpoint was saved, which tells its file from that of another training;
            None: the file is taken to be the checkpoint's.
        say: shows a line to the user.

    Collectives: one agreement here; two all-gathers in each `exchange`.

    Raises:
        ImportError: on every rank, as `RankFailure` on the others: TensorBoard is not installed.
        OSError: the same: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        events: Path | None,
        rank: int,
        done: int,
        say: Callable[[str], None],
        state: dict[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.loss: float | None = None  # of the last step whose loss is known, on rank 0
        self._writes = rank == 0
        self._say = say
        self._losses: list[tuple[int, float, torch.Tensor]] = []  # step, share, loss of this rank's micro-batches
        self._steps: list[dict[str, Any]] = []  # the lines of steps whose loss is not known yet
        self._step = done  # the last one that ended
        self._due = done + 1  # the step after which losses are exchanged
        self._exchanged_at = time.monotonic()
        self._evaluated = 0  # the last step of whose metrics there is a line
        self._count, self._digest = 0, hashlib.sha256()  # of the lines in the file
        self._events: Any = None
        with agreed(f"starting the record of metrics, {path}"):
            if self._writes:
                kept, is_another = self._continue(done, state)
                if events is not None:
                    self._events = _writer(events, 0 if is_another else done)
                    if is_another:
                        self._show(kept)

    def _continue(self, done: int, state: dict[str, Any] | None) -> tuple[list[dict[str, Any]], bool]:
        """Leave in the file the lines up to step `done`. Return them, and whether the file was another training's."""
        lines = read_lines(self.path)
        is_another = bool(lines) and (not done or not _begin_as(state, lines))
        if is_another:
            # Before a training that began anew, and ended before its first checkpoint, the file was the checkpoint's.
            earlier = self.path.with_name(f"{self.path.name}.1")
            lines = before if done and _begin_as(state, before := read_lines(earlier)) else []
            self._say(f"{self.path.name} of an earlier training is now {earlier.name}")
        kept = [line for line in lines if line["step"] <= done]
        self._evaluated = max((line["step"] for line in kept if _metrics_of(line)), default=0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path, keep=2 if is_another else None) as file:
            file.write("".join(map(_text, kept)).encode())
        self._count_in(kept)
        return kept, is_another

    @property
    def state(self) -> dict[str, Any]:
        """How many lines rank 0 has written, and their digest: for the checkpoint, and then for a record's `state`."""
        return {"lines": self._count, "sha256": self._digest.hexdigest()}

    def _count_in(self, lines: list[dict[str, Any]]) -> None:
        self._count += len(lines)
        for line in lines:
            self._digest.update(_without_time(line))

    def take(self, loss: torch.Tensor, share: float) -> None:
        """Take the loss of a micro-batch of this step, a tensor of one element. Nothing waits for the device."""
        self._losses.append((self._step + 1, share, loss.detach()))

    def end_step(self, epoch: int, rate: Any) -> None:
        """End a step of an epoch, counted from 0. `rate`: its learning rate, a number or tensor; None: unknown."""
        self._step += 1
        rate = rate.clone() if isinstance(rate, torch.Tensor) else rate  # the scheduler changes it in place
        self._steps.append({"step": self._step, "epoch": epoch + 1, "lr": rate, "time": time.time()})
        if self._step >= self._due:
            self.exchange()

    def exchange(self) -> None:
        """Exchange the losses of the steps since the last exchange, and write their lines. Every rank calls it.

        `end_step` calls it about once a second; rank 0 decides after how many steps.
        """
        if not self._steps:  # on every rank
            return
        now = time.monotonic()
        wait = int(len(self._steps) * _PERIOD_S / max(now - self._exchanged_at, 1e-9))
        self._exchanged_at = now
        values = torch.stack([loss.reshape(()) for _, _, loss in self._losses]).tolist() if self._losses else []
        rows = [(step, share, loss) for (step, share, _), loss in zip(self._losses, values, strict=True)]
        everyones = gather_json({"rows": rows, "wait": min(max(wait, 1), _MOST_STEPS)})
        self._due = self._step + everyones[0]["wait"]
        if self._writes:
            sums = {line["step"]: 0.0 for line in self._steps}
            for theirs in everyones:  # in rank order, which is that of the micro-batches
                for step, share, loss in theirs["rows"]:
                    sums[step] += share * loss
            self._write([{**line, "loss": sums[line["step"]]} for line in self._steps])
        self._losses, self._steps = [], []

    def metrics(self, epoch: int, metrics: dict[str, float]) -> None:
        """Write the metrics of the held-out set after the last step. Collectives: those of `exchange`."""
        self.exchange()
        if self._writes and metrics and self._step > self._evaluated:  # a resumed epoch without steps evaluates again
            self._evaluated = self._step
            named = {HELD_OUT + name: value for name, value in metrics.items()}
            self._write([{"step": self._step, "epoch": epoch + 1, "time": time.time(), **named}])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self.loss = next((line["loss"] for line in reversed(lines) if "loss" in line), self.loss)
        lines = [{name: value for name, value in map(_plain, line.items()) if name != "lr" or value is not None}
                 for line in lines]  # fmt: skip
        try:
            with open(self.path, "ab", buffering=0) as file:
                for line in lines:
                    file.write(_text(line).encode())
                    self._count_in([line])
            if self._events is not None:
                self._show(lines)
        except OSError as error:
            self._writes = False
            self._say(f"metrics are no longer written, the training goes on: {error}")

    def _show(self, lines: list[dict[str, Any]]) -> None:
        """Write lines to TensorBoard's file."""
        for line in lines:
            for tag, value in _scalars(line):
                self._events.add_scalar(tag, value, line["step"], walltime=line.get("time"))
        self._events.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._events is not None:
            self._events.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of metrics, without those that are cut or no line of it; none without a file."""
    try:
        texts = path.read_bytes().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    found = []
    for text in texts[:-1]:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def _writer(folder: Path, done: int) -> Any:
    """Return TensorBoard's writer. TensorBoard then hides the events of steps after `done` that are in the folder."""
    need_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=done + 1)


def _begin_as(state: dict[str, Any] | None, lines: list[dict[str, Any]]) -> bool:
    """Return whether the first of these lines are those that a record had written when it was in this state."""
    if state is None:  # a checkpoint of version 0.2.0 has none
        return True
    digest = hashlib.sha256(b"".join(map(_without_time, lines[: state["lines"]])))
    return bool(len(lines) >= state["lines"] and digest.hexdigest() == state["sha256"])


def _without_time(line: dict[str, Any]) -> bytes:
    """Return what a digest has of a line: no time, so that equal trainings have equal checkpoints."""
    return _text({name: value for name, value in line.items() if name != "time"}).encode()


def _metrics_of(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name.startswith(HELD_OUT)}


def _scalars(line: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the tags and values of TensorBoard for a line. A value that is no finite number is shown as NaN."""
    named = {f"train/{name}": line[name] for name in ("loss", "lr") if name in line} | _metrics_of(line)
    return [(tag, math.nan if value is None else value) for tag, value in named.items()]


def _plain(item: tuple[str, Any]) -> tuple[str, Any]:
    """Return an entry of a line as JSON has it: numbers that are not finite are null."""
    name, value = item
    if isinstance(value, torch.Tensor):
        value = value.item()
    return name, None if isinstance(value, float) and not math.isfinite(value) else value


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"

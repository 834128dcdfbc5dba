"""A training on ranks of which one computes wrong numbers: one bit is flipped, in some phase of a step.

`make rechecks` runs many rechecks of healthy ranks, and writes the figures to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.data.step import LoadedMicroBatch
from ddparity.gradients.recheck import Rechecks
from ddparity.gradients.replica import replica_of

EVERY = 3  # steps between rechecks; the first is in step 0
MICROS = 2  # micro-batches a rank


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is flipped on rank `rank`, and where.

    `phase`: "own", in the rank's first micro-batch; "recheck", in that of another rank; "always", in each micro-batch;
    or a place between the micro-batches of the step. `step`: from this one on for "always", else in this one alone.
    """

    what: str
    phase: str
    step: int
    rank: int = 1

    def hits(self, step: int, micro: LoadedMicroBatch | None, place: str) -> bool:
        if dist.get_rank() != self.rank:
            return False
        if self.phase not in ("own", "recheck", "always"):
            return step == self.step and place == self.phase
        if micro is None or place != "micro-batch":
            return False
        return (
            step >= self.step
            if self.phase == "always"
            else step == self.step and micro.recheck == (self.phase != "own")
        )


# What is flipped, in which phase, and in which step. Of a step without a recheck a flip in one gradient or activation
# is in everybody's average, where nobody can find it; a device that is wrong in each step is found in the next recheck.
FAULTS = [
    *(Fault("gradient", phase, 3) for phase in ("own", "recheck", "always")),
    *(Fault("activation", phase, 3) for phase in ("own", "recheck", "always")),
    *(Fault(what, "always", 4) for what in ("gradient", "activation")),
    *(Fault("weight", phase, 3) for phase in ("own", "recheck")),
    *(Fault("weight", place, 4) for place in ("before", "forward", "backward", "after", "optimizer")),
    *(Fault("gradient", "after", step) for step in (3, 4)),
    *(Fault("optimizer state", "after", step) for step in (2, 3, 4)),
    Fault("optimizer state", "optimizer", 3),
    Fault("weight", "before", 5, rank=0),
    Fault("gradient", "always", 5, rank=2),
]


def flip(tensor: torch.Tensor, bit: int = 22) -> None:
    """Flip one bit of one element, as a fault does: no version counter shows it."""
    tensor.data.view(torch.int32).view(-1)[tensor.numel() // 2].bitwise_xor_(1 << bit)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def loader(world_size: int, steps: int = 20, micros: int = MICROS, tail: int = 0) -> dp.Loader:
    batch = 4 * micros * world_size
    rows = torch.randn(batch * steps + tail, 6, generator=torch.Generator().manual_seed(0))
    return dp.Loader(rows, dp.BatchPlan(len(rows), batch, 4, seed=3))


@contextmanager
def _flipping(model: nn.Module, fault: Fault | None, state: dict[str, Any]) -> Iterator[None]:
    """Flip gradients and activations of the micro-batches that the fault is in."""

    def active() -> bool:
        return fault is not None and fault.hits(state["step"], state["micro"], "micro-batch")

    def gradient(grad: torch.Tensor) -> torch.Tensor:
        if fault is not None and fault.what == "gradient" and active():
            grad = grad.clone()
            flip(grad)
        return grad

    def activation(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        if fault is not None and fault.what == "activation" and active():
            output = output.clone()
            flip(output)
        return output

    net = model.module if hasattr(model, "module") else model
    hooks = [net.last.weight.register_hook(gradient), net.norm.register_forward_hook(activation)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train(fault: Fault | None, reduction: str, steps: int = 10, every: int | None = EVERY, raises: bool = False) -> Any:
    """Train; return what happened: the step and the error if a fault was found, and the state at the end."""
    model = dp.replicate(Net(), reduction=reduction, check_every=0, recheck_every=every)
    net = model.module if hasattr(model, "module") else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    state: dict[str, Any] = {"step": 0, "micro": None, "flipped": False}
    seen: list[tuple[int, bool]] = []
    losses, shares = 0.0, 0.0

    def place(name: str) -> None:
        if fault is None or not fault.hits(state["step"], state["micro"], name) or state["flipped"]:
            return
        if fault.what == "weight":
            flip(net.first.weight)
        elif fault.what == "gradient" and name != "micro-batch":
            flip(net.first.weight.grad)
        elif fault.what == "optimizer state":
            flip(optimizer.state[net.first.weight]["exp_avg"], 26)
        else:
            return
        state["flipped"] = True

    with _flipping(model, fault, state):
        for step in loader(dist.get_world_size() if dist.is_initialized() else 1).epoch(0):
            if step.number == steps:
                break
            state["step"] = step.number
            place("before")
            before = dp.fingerprint(net)
            try:
                for number, micro in enumerate(dp.accumulate(model, step)):
                    state["micro"] = micro
                    seen.append((micro.index, micro.recheck))
                    place("micro-batch")
                    loss = model(micro.data).square().mean()
                    if number == 0:
                        place("forward")
                    (loss * micro.weight).backward()
                    if number == 0:
                        place("backward")
                    losses, shares = losses + loss.item() * micro.share, shares + micro.share
            except dp.WrongArithmetic as error:
                if raises:
                    raise
                found = {"step": step.number, "rank": error.rank, "ranks": error.ranks, "error": str(error)}
                return {**found, "record": error.record, "taken": fault is None or dp.fingerprint(net) != before}
            finally:
                state["micro"] = None
            place("after")
            optimizer.step()
            optimizer.zero_grad()
            place("optimizer")
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    return {"step": None, "weights": dp.fingerprint(weights), "seen": seen, "losses": losses, "shares": shares,
            "next": torch.rand(()).item()}  # fmt: skip


def silent() -> None:
    """Let no log line of an expected failure reach the terminal."""
    logging.getLogger("ddparity").setLevel(logging.CRITICAL)


def recheck_of(model: nn.Module) -> Rechecks:
    """Return the rechecks of a model, which must not be off."""
    replica = replica_of(model)
    assert replica is not None and replica.rechecks is not None and not replica.rechecks.off
    return replica.rechecks


def healthy(rechecks: int) -> int:
    """Return how many rechecks of healthy ranks were done, half of them in each mode, without an alarm."""
    done = 0
    for reduction in ("fast", "strict"):
        model = dp.replicate(Net(), reduction=reduction, recheck_every=1, check_every=0)
        optimizer = torch.optim.Adam(model.parameters())
        for step in loader(dist.get_world_size(), steps=rechecks // 2, micros=1).epoch(0):
            for micro in dp.accumulate(model, step):
                (model(micro.data).square().mean() * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
        done += recheck_of(model).done
    return done


def main() -> None:
    from benchmarks.results import machine, table, write_section

    from tests.ranks import run_ranks

    rechecks, facts, rows = int(sys.argv[1]), machine(), []
    for world_size in (2, 3):
        start = time.monotonic()
        done = set(run_ranks(healthy, world_size, rechecks // 2, timeout_s=3600))
        assert done == {rechecks // 2}, done
        rows.append([f"{world_size}", f"{rechecks // 2:,}", f"{world_size * rechecks // 2:,}", "0",
                     f"{time.monotonic() - start:.0f}"])  # fmt: skip
    text = "\n\n".join(
        [
            "## Rechecks",
            facts,
            "`make rechecks`: `replicate(recheck_every=1)`, healthy processes, a small network with batch norm and "
            "dropout, half of the steps in the fast and half in the strict mode.",
            table(["processes", "rechecks", "micro-batches compared", "false alarms", "seconds"], rows),
        ]
    )
    print(text)
    write_section("rechecks", text)


if __name__ == "__main__":
    main()
